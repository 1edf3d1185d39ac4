"""The head's losses and gradients are those of the whole vocabulary in fp64, in any parts."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.utils._python_dispatch import TorchDispatchMode

from tanren.engine import head
from tests.conftest import Tanren, _made_once
from tests.engine.head_runs import (
    CHUNKS,
    COEFFICIENT,
    PADDED,
    REAL,
    TOKENS,
    WIDTH,
    cases,
    example,
    expected,
    run,
)
from tests.engine.processes import check


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one rank found, and each of three."""

    def make(tanren: Tanren) -> None:
        tanren.runs.mkdir()
        for ranks in (1, 3):
            multiprocessing.spawn(run, (ranks, tanren.runs), ranks)

    return _made_once(tmp_path_factory, "head", make)


@pytest.fixture
def whole(alone: None) -> head.Vocabulary:
    """The vocabulary on one rank."""
    assert dist.group.WORLD is not None
    return head.Vocabulary.of(REAL, PADDED, dist.group.WORLD)


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("case", cases(), ids=str)
def test_losses_and_gradients_are_those_of_the_whole_vocabulary_in_fp64(
    folder: Path, ranks: int, case: tuple[torch.dtype, float, int | None, torch.dtype | None]
) -> None:
    dtype, z_loss, _, main = case
    parts = [torch.load(folder / f"{ranks}-{rank}.pt")[case] for rank in range(ranks)]
    whole = expected(dtype, z_loss)
    # Logits of over 200 have in bf16 a rounding of 1, and so have the losses.
    exact = dtype == torch.float32
    for found in parts:
        assert found["losses"].shape == (2 if z_loss else 1, TOKENS)
        assert found["losses"].dtype == torch.float32
        torch.testing.assert_close(
            found["losses"].double(), whole["losses"][: len(found["losses"])],
            rtol=2e-6 if exact else 0.02, atol=2e-4 if exact else 2.0,
        )  # fmt: skip
        assert torch.equal(found["losses"], parts[0]["losses"])
        assert torch.equal(found["hidden"], parts[0]["hidden"])
    weight = torch.cat([found["weight"] for found in parts])
    assert weight.dtype == (dtype if main is None else main)
    assert weight.shape == (PADDED, WIDTH)
    assert torch.count_nonzero(weight[REAL:]) == 0
    if not exact:
        # With its own rounding of the logits; the passes alone are in the next test.
        other = torch.load(folder / "1-0.pt")[dtype, z_loss, None, None]
        whole = {"hidden": other["hidden"].double(), "weight": other["weight"].double()}
    for name, found in (("hidden", parts[0]["hidden"]), ("weight", weight)):
        size = float(whole[name].abs().max())
        near = 2e-5 if exact else 2e-2
        torch.testing.assert_close(found.double(), whole[name], rtol=0.0, atol=near * size)


@pytest.mark.parametrize("z_loss", [0.0, COEFFICIENT])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_logits_is_fp64s_but_for_one_rounding(
    whole: head.Vocabulary, dtype: torch.dtype, z_loss: float
) -> None:
    hidden, weight, labels, counts = example(torch.float32)
    logits = (hidden @ weight.T).to(dtype).requires_grad_()
    losses = head.losses_of_logits(logits * 1, labels, whole, z_loss)
    (counts * losses).sum().backward()
    dense = logits.detach().double().requires_grad_()
    log_z = dense[:, :REAL].logsumexp(1)
    true = torch.stack([log_z - dense.gather(1, labels[:, None])[:, 0], z_loss * log_z.square()])
    (counts * true).sum().backward()
    torch.testing.assert_close(losses.double(), true[: len(losses)], rtol=2e-6, atol=2e-5)
    assert logits.grad is not None and logits.grad.dtype == dtype
    assert dense.grad is not None
    near = 2e-5 if dtype == torch.float32 else 2**-8 + 2e-5
    torch.testing.assert_close(logits.grad.double(), dense.grad, rtol=near, atol=1e-6)


def test_the_logits_become_their_gradient(whole: head.Vocabulary) -> None:
    """No second tensor of the logits' size is kept for the backward pass or made by it."""
    hidden, weight, labels, _ = example(torch.float32)
    logits = (hidden @ weight.T).requires_grad_() * 1
    places: list[int] = []
    logits.register_hook(lambda gradient: places.append(gradient.data_ptr()))
    head.losses_of_logits(logits, labels, whole, COEFFICIENT).square().sum().backward()
    assert places == [logits.data_ptr()]


class _Largest(TorchDispatchMode):
    """Remembers how many tokens the largest tensor has that is laid out as logits are."""

    tokens = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.shape[1:] == (PADDED,):
            # The weight's transpose has this shape too.
            self.tokens = max(self.tokens, len(result) * result.is_contiguous())
        return result


def leaves() -> tuple[torch.Tensor, Any, torch.Tensor, torch.Tensor]:
    hidden, weight, labels, counts = example(torch.float32)
    return hidden.requires_grad_(), weight.requires_grad_(), labels, counts


def test_the_logits_of_a_chunk_alone_exist(whole: head.Vocabulary) -> None:
    hidden, weight, labels, counts = leaves()
    with _Largest() as largest:
        losses = head.losses_by_chunks(
            hidden, weight, labels, whole, loss_weights=counts, chunk=CHUNKS[0]
        )
        (counts * losses).sum().backward()
    assert largest.tokens == CHUNKS[0]


def test_without_gradients_nothing_but_losses_is_made(whole: head.Vocabulary) -> None:
    hidden, weight, labels, counts = leaves()
    weight.main_grad = torch.ones_like(weight)
    with torch.no_grad(), _Largest() as largest:
        found = head.losses_by_chunks(
            hidden, weight, labels, whole, COEFFICIENT, loss_weights=counts, chunk=CHUNKS[0]
        )
    assert largest.tokens == CHUNKS[0]
    assert not found.requires_grad
    torch.testing.assert_close(
        found.double(), expected(torch.float32, COEFFICIENT)["losses"], rtol=2e-6, atol=2e-4
    )
    assert torch.equal(weight.main_grad, torch.ones_like(weight))


def test_a_frozen_weight_has_no_gradient(whole: head.Vocabulary) -> None:
    hidden, weight, labels, counts = leaves()
    weight = weight.detach()
    losses = head.losses_by_chunks(hidden, weight, labels, whole, loss_weights=counts, chunk=4)
    (counts * losses).sum().backward()
    assert weight.grad is None
    assert hidden.grad is not None
    true = expected(torch.float32, 0.0)["hidden"]
    torch.testing.assert_close(hidden.grad.double(), true, rtol=0.0, atol=2e-5 * float(true.max()))


@pytest.mark.parametrize("wrong", ["twice", "mean", "other weights", "cross-entropy alone"])
def test_what_was_not_announced_is_not_differentiated(whole: head.Vocabulary, wrong: str) -> None:
    hidden, weight, labels, counts = leaves()
    losses = head.losses_by_chunks(
        hidden, weight, labels, whole, COEFFICIENT, loss_weights=counts, chunk=4
    )
    total = (counts * losses).sum()
    if wrong == "twice":
        total = 2 * total
    elif wrong == "mean":
        total = (counts * losses).mean()
    elif wrong == "other weights":
        total = (counts.flip(0) * losses).sum()
    else:
        total = (counts * losses[0]).sum()
    with pytest.raises(RuntimeError, match="is not the sum of losses and weights"):
        total.backward()


def test_a_label_outside_the_vocabulary_spoils_the_loss(whole: head.Vocabulary) -> None:
    """So that training ends there; it would learn that the token has no label."""
    hidden, weight, labels, _ = example(torch.float32)
    labels[5] = REAL
    found = head.losses_of_logits(hidden @ weight.T, labels, whole)[0]
    assert torch.isinf(found).nonzero().flatten().tolist() == [5]


def test_a_tied_weights_hook_gets_noughts(whole: head.Vocabulary) -> None:
    """megatron-core adds what autograd gives it to main_grad: the embedding's gradient alone."""
    hidden, weight, labels, counts = leaves()
    weight.main_grad, weight.zero_out_wgrad = torch.zeros_like(weight), True
    embedded = torch.nn.functional.embedding(labels, weight).sum()
    losses = head.losses_by_chunks(hidden, weight, labels, whole, loss_weights=counts, chunk=4)
    ((counts * losses).sum() + embedded).backward()
    assert torch.equal(weight.grad[:, 0], torch.bincount(labels, minlength=PADDED).float())
    assert torch.count_nonzero(weight.main_grad)


has_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")


@pytest.mark.kernels
@has_triton
def test_triton_and_torch_make_the_same_passes() -> None:
    assert check("kernel_check", "cpu", TRITON_INTERPRET="1") == "checked 5\n"


@pytest.mark.kernels
@has_triton
def test_a_kernel_is_compiled_once_for_any_number_of_tokens() -> None:
    assert check("variants_check") == "_gradient_kernel 1\n_softmax_kernel 1\n"


@pytest.mark.kernels
@has_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_triton_and_torch_make_the_same_passes_on_a_gpu() -> None:
    assert check("kernel_check", "cuda") == "checked 5\n"
