"""Adapters train alone and alike in every layout, and become weights or a PEFT folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from tanren import runs
from tanren.convert import hf, llama, lora, mcore
from tanren.convert.tensors import Held
from tanren.plan.paths import RunFolder
from tests.engine.adapters import (
    ALL,
    CASES,
    LAYOUTS,
    MIDDLE,
    ORIGINS,
    RANK,
    SHAPE,
    STEPS,
    TIED,
    hf_tensors,
    samples,
)
from tests.engine.processes import start

# Each linear layer's name in the model and in checkpoints, and its columns and rows.
LINEARS = {
    "self_attention.linear_qkv": (32, 64),
    "self_attention.linear_proj": (32, 32),
    "mlp.linear_fc1": (32, 96),
    "mlp.linear_fc2": (48, 32),
}
SAVED = {
    f"decoder.layers.{linear}.adapter.{part}.weight": (2, *shape)
    for linear, (columns, rows) in LINEARS.items()
    for part, shape in (("linear_in", (RANK, columns)), ("linear_out", (rows, RANK)))
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bases, and what one process left."""
    folder = tmp_path_factory.mktemp("lora")
    for name, shape in (("base", SHAPE), ("base-tied", TIED)):
        mcore.write_base(shape, llama.to_mcore(shape, Held(hf_tensors(shape))), folder / name)
    start("tests.engine.adapters", folder, 1)
    return folder


@pytest.fixture(scope="module")
def one(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(root / "one.pt")
    return found


@pytest.fixture(scope="module")
def two(root: Path) -> Path:
    start("tests.engine.adapters", root, 2)
    return root


def test_an_untrained_model_with_adapters_is_its_base(one: dict[str, Any]) -> None:
    assert one["as the base"]


def test_the_adapters_alone_are_trained(one: dict[str, Any]) -> None:
    trained = one["trained"]
    assert {name: shape for name, (shape, _) in trained.items()} == {
        f"decoder.layers.{layer}.{linear}_adapter.{part}.weight": shape
        for layer in range(SHAPE.layers)
        for linear, (columns, rows) in LINEARS.items()
        for part, shape in (("linear_in", (RANK, columns)), ("linear_out", (rows, RANK)))
    }
    assert all(gradient > 0 for _, gradient in trained.values())
    assert one["optimized"] == sum(rows * columns for (rows, columns), _ in trained.values())
    assert len(one["frozen"]) == SHAPE.layers * 6 + 3
    assert all(one["frozen"].values())


def test_a_checkpoint_holds_the_adapters_alone(root: Path) -> None:
    checkpoint = RunFolder(root / "single").checkpoint(MIDDLE)
    held = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    state = {f"optimizer.state.{kind}." for kind in ("param", "exp_avg", "exp_avg_sq")}
    names = {*SAVED, *(kind + name for kind in state for name in SAVED)}
    assert set(held) == names | {"rng_state/shard_0.0_1.1"}
    assert {name: tuple(held[name].size) for name in SAVED} == SAVED
    assert lora.settings_of(checkpoint) == ALL
    assert lora.settings_of(root / "base") is None


def same(found: dict[str, Any], expected: dict[str, Any], steps: int) -> None:
    """The last steps' losses and gradient norms, then weights and moments, agree."""
    for key in ("loss", "norm"):
        assert len(found[key]) == steps
        assert found[key] == pytest.approx(expected[key][-steps:], rel=2e-5), key
    assert found["tensors"].keys() == expected["tensors"].keys()
    for name, tensor in expected["tensors"].items():
        near = 2e-5 * float(tensor.abs().max())
        assert near > 0, name
        torch.testing.assert_close(found["tensors"][name], tensor, rtol=0, atol=near, msg=name)


@pytest.mark.parametrize(
    ("layout", "case"), [(layout, case) for layout in LAYOUTS for case in CASES[layout]]
)
def test_two_processes_train_what_one_does(two: Path, layout: str, case: str) -> None:
    expected = torch.load(two / "single" / f"{case}.pt")
    assert expected["loss"][-1] < expected["loss"][0] - 0.03
    same(torch.load(two / layout / f"{case}.pt"), expected, STEPS)


@pytest.mark.parametrize("layout", ORIGINS)
def test_a_run_goes_on_in_another_layout(two: Path, layout: str) -> None:
    """One process's checkpoint in two tensor-parallel ones, theirs in one alone, and so on."""
    expected = torch.load(two / "single" / "all.pt")
    same(torch.load(two / layout / "resumed.pt"), expected, STEPS - MIDDLE)


@pytest.mark.parametrize("layout", ["tensor", "sequence"])
def test_dropout_leaves_whole_weights_alike_on_both_ranks(two: Path, layout: str) -> None:
    first, second = (found["whole"] for found in torch.load(two / layout / "dropout.pt"))
    assert len(first) == len(second) == SHAPE.layers * len(LINEARS)
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())


def test_ranks_drop_alike_what_they_share_and_apart_what_they_split(two: Path) -> None:
    first, second = (found["dropped"] for found in torch.load(two / "tensor" / "dropout.pt"))
    alike = {name for name, kept in first.items() if torch.equal(kept, second[name])}
    assert len(first) == SHAPE.layers * len(LINEARS)
    assert alike == {name for name in first if name.endswith(("qkv_adapter", "fc1_adapter"))}


def test_dropout_is_of_training_alone(one: dict[str, Any]) -> None:
    assert one["in training"], "without dropout training computes the same"
    first, second = one["dropped"]
    assert (first - second).abs().max() > 1e-3
    assert one["not dropped"]


def test_the_model_without_its_adapters_is_the_base_again(one: dict[str, Any]) -> None:
    assert one["without"]
    assert one["with them again"]


def test_a_bf16_run_keeps_adapters_in_bf16_and_their_masters_in_fp32(root: Path, one: Any) -> None:
    half = torch.load(root / "single" / "bf16.pt")
    kinds = {name: tensor.dtype for name, tensor in half["tensors"].items()}
    assert {kinds[name] for name in SAVED} == {torch.bfloat16}
    assert {kinds["optimizer.state.param." + name] for name in SAVED} == {torch.float32}
    full = torch.load(root / "single" / "all.pt")
    assert half["loss"] == pytest.approx(full["loss"], rel=0.02)


def test_adapters_of_another_kind_are_refused_by_both_names(one: dict[str, Any]) -> None:
    without, other_rank = one["refusals"]
    kind = "alpha 6, beside attention_qkv attention_dense mlp_fc1 mlp_fc2"
    saved = f"was saved with adapters of rank 4, {kind}, and this run has "
    assert saved + "no adapters" in without
    assert saved + f"adapters of rank 8, {kind}" in other_rank


@pytest.mark.parametrize("layout", ["single", "tensor"])
def test_a_base_takes_up_the_adapters_of_a_checkpoint(
    two: Path, one: dict[str, Any], layout: str
) -> None:
    found = torch.load(two / layout / "folded.pt")
    assert (found - one["losses of the base"]).abs().max() > 0.1
    torch.testing.assert_close(found, one["losses"], rtol=2e-5, atol=2e-5)


def transformers_logits(folder: Path, adapters: Path | None = None) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapters is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapters))
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(samples()[0][:, :-1]).logits
    return logits


def test_the_export_speaks_as_the_engine_does(
    root: Path, one: dict[str, Any], tmp_path: Path
) -> None:
    checkpoint = RunFolder(root / "single").checkpoint(MIDDLE)
    settings = lora.settings_of(checkpoint)
    assert settings is not None
    with (
        mcore.open_checkpoint(root / "base") as base,
        mcore.open_checkpoint(checkpoint) as adapters,
    ):
        for name, tensors in (("base", base), ("merged", lora.merged(SHAPE, base, adapters, ALL))):
            with runs.whole_folder(tmp_path / name) as folder:
                hf.write_tensors(folder, llama.to_hf(SHAPE, tensors))
                hf.write_settings(folder, SHAPE, torch.float32, None, None)
        lora.write_peft(tmp_path / "peft", SHAPE, adapters, settings, str(tmp_path / "base"))
    before, engine = transformers_logits(tmp_path / "base"), one["logits"]
    assert (engine - before).abs().max() > 0.1
    merged = transformers_logits(tmp_path / "merged")
    assert (merged - engine).abs().max() < 2e-5
    beside = transformers_logits(tmp_path / "base", tmp_path / "peft")
    assert (beside - engine).abs().max() < 2e-5
