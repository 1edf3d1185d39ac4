"""Packed examples train as each would alone, in every layout, and logits are made where they count.

The reference is transformers, one example at a time and without padding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing

from tanren.engine.loss import answer_loss
from tanren.engine.packed import block_mask
from tests.conftest import Tanren, _made_once
from tests.engine.packed_runs import LAYOUTS, SHAPES, pair, single, texts

ALONE = ["one by one", "rows, unknown", *(f"{kind}, {recompute}" for kind in ("rows", "thd")
                         for recompute in ("none", "selective", "full"))]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process found, and two."""

    def run(tanren: Tanren) -> None:
        for name in SHAPES:
            (tanren.runs / name).mkdir(parents=True)
        multiprocessing.spawn(single, (tanren.runs,), 1)
        multiprocessing.spawn(pair, (tanren.runs,), 2)

    return _made_once(tmp_path_factory, "packed", run)


def read(path: Path) -> Any:
    return torch.load(path, weights_only=False)


def expected_gradient(name: str, whole: dict[str, torch.Tensor]) -> torch.Tensor:
    """That of a megatron-core parameter among transformers' gradients in a checkpoint's layout."""
    for local, checkpoint in (
        ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
        ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
    ):
        name = name.replace(local, checkpoint)
    if "layers." not in name:
        return whole[name]
    head, _, tail = name.partition("layers.")
    number, _, rest = tail.partition(".")
    return whole[f"{head}layers.{rest}"][int(number)]


def part_of(name: str, gradient: torch.Tensor, rank: int) -> torch.Tensor:
    """What one of two tensor-parallel ranks has of a parameter."""
    if "norm" in name:
        return gradient
    if "linear_fc1" in name:
        return torch.cat([half.chunk(2)[rank] for half in gradient.chunk(2)])
    rows = "linear_proj" in name or "linear_fc2" in name
    return gradient.chunk(2, dim=1 if rows else 0)[rank]


def assert_same_gradients(
    found: dict[str, torch.Tensor], whole: dict[str, torch.Tensor], rank: int | None = None
) -> None:
    for name, gradient in found.items():
        expected = expected_gradient(name, whole)
        if rank is not None:
            expected = part_of(name, expected, rank)
        assert gradient.shape == expected.shape, name
        near = 1e-5 * float(expected.abs().max())
        torch.testing.assert_close(gradient, expected, rtol=0.0, atol=near, msg=name)


def assert_same_losses(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert [len(one) for one in found] == [len(one) for one in expected]
    torch.testing.assert_close(torch.cat(found), torch.cat(expected), rtol=1e-6, atol=2e-6)


def by_micro_batch(losses: list[torch.Tensor]) -> list[torch.Tensor]:
    """Of five examples and of one; in the third there is nothing, and what it gives is random."""
    return [torch.cat(losses[:5]), losses[5]]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("run", ALONE)
def test_packed_examples_have_the_losses_and_gradients_of_each_alone(
    folder: Path, shape: str, run: str
) -> None:
    found = read(folder / shape / "single.pt")
    reference, losses = found["transformers"], found[run]["losses"]
    assert len(torch.cat(reference["losses"])) == 29
    if run == "one by one":
        assert_same_losses(losses, reference["losses"])
    else:
        assert_same_losses(losses[:2], by_micro_batch(reference["losses"]))
        total, tokens = found[run]["report"].tolist()
        assert tokens == 29
        assert total == pytest.approx(float(torch.cat(reference["losses"]).sum()), rel=1e-6)
    assert len(found[run]["gradients"]) == (14 if shape == "tied" else 15)
    assert_same_gradients(found[run]["gradients"], reference["gradients"])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", ["", ", unknown"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_find_what_one_does(
    folder: Path, shape: str, layout: str, weights: str
) -> None:
    reference = read(folder / shape / "single.pt")["transformers"]
    ranks = [read(folder / shape / f"{rank}.pt")[layout + weights] for rank in range(2)]
    with_losses = ranks[1:] if layout == "pipeline" else ranks
    for found in with_losses:
        assert_same_losses(found["losses"][:2], by_micro_batch(reference["losses"]))
        assert len(found["losses"]) == 3
        assert found["report"][1] == 29
    if layout == "pipeline":
        assert ranks[0]["losses"] is None
        assert not ranks[0]["gradients"].keys() & ranks[1]["gradients"].keys()
    for rank, found in enumerate(ranks):
        gradients = found["gradients"]
        if layout == "pipeline" and shape == "tied" and rank == 1:
            # The last stage has the embedding once more, under the name of the output layer.
            gradients["embedding.word_embeddings.weight"] = gradients.pop("output_layer.weight")
        part = None if layout == "pipeline" else rank
        assert len(gradients) in ({7, 8} if layout == "pipeline" else {14, 15})
        assert_same_gradients(gradients, reference["gradients"], part)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_reduced_after_the_last_of_them(folder: Path, shape: str) -> None:
    """Of two data-parallel ranks, whose buckets are reduced while the backward pass goes on."""
    reference = read(folder / shape / "single.pt")["transformers"]
    for rank in range(2):
        found = read(folder / shape / f"{rank}.pt")["data, overlapped"]["gradients"]
        assert len(found) == (14 if shape == "tied" else 15)
        assert_same_gradients(found, reference["gradients"])


@pytest.mark.parametrize("shape", SHAPES)
def test_an_examples_mean_is_the_loss_that_transformers_gives(folder: Path, shape: str) -> None:
    found = read(folder / shape / "single.pt")
    packed = torch.cat(found["rows, none"]["losses"][:2])
    lengths = [len(one) for one in found["transformers"]["losses"]]
    means = torch.stack([one.mean() for one in packed.split(lengths)])
    assert len(means) == len(texts()) == 6
    torch.testing.assert_close(means, found["transformers"]["means"], rtol=1e-6, atol=0.0)


def test_an_example_knows_nothing_of_its_neighbours(folder: Path) -> None:
    """Not to the last bit, in its own row or in another one."""
    apart, _, _ = read(folder / "more.pt")
    for number, (before, after) in enumerate(zip(apart["before"], apart["after"], strict=True)):
        assert len(before)
        assert torch.equal(before, after) == (number != 1), number


def test_an_example_has_the_same_losses_wherever_it_lies(folder: Path) -> None:
    apart, _, _ = read(folder / "more.pt")
    d, c, b, a = apart["moved"]
    assert_same_losses([a, b, c, d], apart["before"])


def test_positions_restart_with_each_example(folder: Path) -> None:
    """Losses cannot tell in fp32, since rotary embedding goes by distance; its rounding in bf16."""
    apart, _, _ = read(folder / "more.pt")
    found, start = apart["turns"], apart["turns from the start"]
    assert found.shape == (24, 2, 1, 8)
    for row, lengths in enumerate([(9, 7, 8), (5, 19)]):
        places = torch.cat([torch.arange(length) for length in lengths])
        assert torch.equal(found[:, row], start[places, 0])


def test_a_micro_batch_with_nothing_to_train_on_changes_nothing(folder: Path) -> None:
    _, empty, _ = read(folder / "more.pt")
    total, tokens, report = empty["found"]
    assert (float(total), int(tokens), report.tolist()) == (0.0, 0, [0.0, 0.0])
    assert len(empty["gradients"]) == 15
    for gradient in empty["gradients"]:
        assert torch.count_nonzero(gradient) == 0
        assert torch.isfinite(gradient).all()


def test_losses_are_in_fp32_for_a_model_in_bf16(folder: Path) -> None:
    _, _, losses = read(folder / "more.pt")
    reference = read(folder / "untied" / "single.pt")["transformers"]["losses"]
    assert {one.dtype for one in losses} == {torch.float32}
    found, expected = torch.cat(losses[:2]), torch.cat(reference)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.15)


def test_tokens_without_weight_do_not_count() -> None:
    losses = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    total, tokens, report = answer_loss(torch.tensor([1.0, 0.0, 1.0]), losses)
    assert (total.item(), tokens.item(), report.tolist()) == (5.0, 2, [5.0, 2.0])
    assert (tokens.dtype, report.requires_grad) == (torch.int32, False)
    total.backward()
    assert losses.grad is not None
    assert losses.grad.tolist() == [1.0, 0.0, 1.0]


def test_the_mask_by_hand() -> None:
    """Two examples of two positions and a padding; then a row of one example of one and padding."""
    mask = block_mask(torch.tensor([0, 2, 3, 4, 7, 8], dtype=torch.int32), 2, 4)
    assert mask.shape == (2, 1, 4, 4)
    seen = [["".join("x" if hidden else "o" for hidden in line) for line in row[0]] for row in mask]
    assert seen == [
        ["oxxx", "ooxx", "xxox", "xxxo"],
        ["oxxx", "ooxx", "ooox", "xxxo"],
    ]
