"""The head's gradients as products of FP8, with Transformer Engine and Triton played by torch.

What is tested is what lies between them: scales, orders, chunks of sixteens, what is cast when. The
kernels have checks of their own (kernel_check.py), and the products were compared on a GPU.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tanren.engine import head

TOKENS, WIDTH, REAL, COLUMNS = 37, 64, 203, 256


class DType(enum.Enum):
    kFloat8E4M3 = torch.float8_e4m3fn  # noqa: N815
    kFloat8E5M2 = torch.float8_e5m2  # noqa: N815


@dataclass
class Storage:
    """A matrix in FP8 as it stands, transposed, or both; of bytes."""

    data: torch.Tensor | None
    fp8_scale_inv: torch.Tensor
    fp8_dtype: DType
    data_transpose: torch.Tensor | None = None

    def read(self, held: torch.Tensor | None) -> torch.Tensor:
        assert held is not None and held.dtype == torch.uint8
        return held.view(self.fp8_dtype.value).float() * self.fp8_scale_inv


def general_gemm(
    a: Storage, b: Storage, *, layout: str, grad: bool, out: torch.Tensor, out_dtype: torch.dtype,
    use_split_accumulator: bool, accumulate: bool = False,
) -> None:  # fmt: skip
    """As Transformer Engine's on Hopper, whose products read rows along what they sum over."""
    assert grad and use_split_accumulator and out_dtype == out.dtype
    if layout == "NN":  # b [tokens, columns] times a [columns, hidden]
        found = b.read(b.data) @ a.read(a.data_transpose).T
    else:  # the transpose of b [tokens, columns] times a [tokens, hidden]
        assert layout == "NT"
        found = b.read(b.data_transpose) @ a.read(a.data_transpose).T
    assert found.shape == out.shape
    out.copy_(out + found if accumulate else found)


def to_fp8_gradient(
    logits: torch.Tensor, labels: torch.Tensor, first: int, columns: int, highest: torch.Tensor,
    log_sum: torch.Tensor, d_softmax: torch.Tensor, d_label: torch.Tensor, scale: torch.Tensor,
    by_token: torch.Tensor, by_column: torch.Tensor,
) -> None:  # fmt: skip
    mine = head.Vocabulary(first, columns, None)  # type: ignore[arg-type]
    gradient = logits.float()
    head.to_gradient(gradient, labels, mine, highest, log_sum, d_softmax, d_label)
    assert float((gradient * scale).abs().max()) <= torch.finfo(by_token.dtype).max
    by_token.copy_((gradient * scale).to(by_token.dtype))
    by_column.copy_(by_token.T)


def to_fp8_transposed(matrix: torch.Tensor, scale: torch.Tensor, result: torch.Tensor) -> None:
    result.copy_((matrix.float() * scale).T.to(result.dtype))


def module(monkeypatch: pytest.MonkeyPatch, name: str, **held: Any) -> None:
    made = ModuleType(name)
    made.__dict__.update(held)
    monkeypatch.setitem(sys.modules, name, made)


@pytest.fixture
def fp8(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """tanren.engine.head_fp8 over the players above."""
    te = "transformer_engine"
    module(monkeypatch, f"{te}_torch", DType=DType)
    for name in (te, f"{te}.pytorch", f"{te}.pytorch.tensor", f"{te}.pytorch.tensor.storage"):
        module(monkeypatch, name)
    module(monkeypatch, f"{te}.pytorch.cpp_extensions", general_gemm=general_gemm)
    storage = f"{te}.pytorch.tensor.storage.float8_tensor_storage"
    module(monkeypatch, storage, Float8TensorStorage=Storage)
    kernels = {"to_fp8_gradient": to_fp8_gradient, "to_fp8_transposed": to_fp8_transposed}
    module(monkeypatch, "tanren.engine.head_kernels", **kernels)
    import tanren.engine

    monkeypatch.setattr(
        tanren.engine, "head_kernels", sys.modules["tanren.engine.head_kernels"], raising=False
    )
    monkeypatch.delitem(sys.modules, "tanren.engine.head_fp8", raising=False)
    from tanren.engine import head_fp8

    yield head_fp8
    # It holds the players.
    del sys.modules["tanren.engine.head_fp8"]
    del tanren.engine.head_fp8


@pytest.fixture
def whole(alone: None) -> head.Vocabulary:
    """The vocabulary on one rank."""
    assert dist.group.WORLD is not None
    return head.Vocabulary.of(REAL, COLUMNS, dist.group.WORLD)


def example() -> tuple[torch.Tensor, Any, torch.Tensor, torch.Tensor]:
    """Hidden states, a weight with its main_grad, labels, and what each loss counts."""
    torch.manual_seed(5)
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    weight: Any = (0.3 * torch.randn(COLUMNS, WIDTH)).requires_grad_()
    weight.main_grad = torch.ones(COLUMNS, WIDTH)
    counts = torch.ones(TOKENS)
    counts[3] = 0.0
    return hidden, weight, torch.randint(REAL, (TOKENS,)), counts


def off(found: torch.Tensor, true: torch.Tensor) -> float:
    return float((found - true).norm() / true.norm())


@pytest.mark.parametrize("scale", [1.0, 1e-4, 3e3])
@pytest.mark.parametrize("z_loss", [0.0, 1e-3])
def test_gradients_are_those_of_bf16_but_for_fp8s_rounding(
    fp8: Any, whole: head.Vocabulary, z_loss: float, scale: float
) -> None:
    """Of no multiple of 16 tokens, in chunks, whatever a loss counts."""
    hidden, weight, labels, counts = example()
    counts *= scale
    exact = [one.detach().clone().requires_grad_() for one in (hidden, weight)]
    cast = fp8.Weight().cast(weight.detach(), changed=True)
    losses = head.losses_by_chunks(
        hidden, weight, labels, whole, z_loss, loss_weights=counts, chunk=16, fp8=cast
    )
    expected = head.losses_by_chunks(*exact, labels, whole, z_loss, loss_weights=counts, chunk=64)
    assert losses.shape == (2 if z_loss else 1, TOKENS)
    torch.testing.assert_close(losses, expected)
    (counts * losses).sum().backward()
    (counts * expected).sum().backward()
    assert hidden.grad is not None and exact[0].grad is not None and exact[1].grad is not None
    assert 0.001 < off(hidden.grad, exact[0].grad) < 0.06
    assert 0.001 < off(weight.main_grad - 1, exact[1].grad) < 0.06
    assert torch.count_nonzero(hidden.grad[3]) == 0
    assert torch.equal(weight.main_grad[REAL:], torch.ones(COLUMNS - REAL, WIDTH))
    assert weight.grad_added_to_main_grad


def test_where_nothing_counts_gradients_are_nought(fp8: Any, whole: head.Vocabulary) -> None:
    hidden, weight, labels, counts = example()
    cast = fp8.Weight().cast(weight.detach(), changed=True)
    losses = head.losses_by_chunks(
        hidden, weight, labels, whole, loss_weights=0 * counts, chunk=16, fp8=cast
    )
    (0 * counts * losses).sum().backward()
    assert hidden.grad is not None and torch.count_nonzero(hidden.grad) == 0
    assert torch.equal(weight.main_grad, torch.ones(COLUMNS, WIDTH))


def test_a_weight_is_cast_again_when_it_changed_and_where_it_was(fp8: Any) -> None:
    weight = torch.randn(COLUMNS, WIDTH)
    kept = fp8.Weight()
    first = kept.cast(weight, changed=False)  # the first call casts anyhow
    before = first.read(first.data_transpose).clone()
    weight.mul_(2.0)
    assert kept.cast(weight, changed=False) is first
    again = kept.cast(weight, changed=True)
    assert again.data_transpose.data_ptr() == first.data_transpose.data_ptr()
    torch.testing.assert_close(again.read(again.data_transpose), 2 * before)
