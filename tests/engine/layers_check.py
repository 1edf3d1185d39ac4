"""Run by test_layers.py, `python -m tests.engine.layers_check cpu|cuda`: Triton and torch.

On a CPU with TRITON_INTERPRET=1, which Triton must find when it is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from tanren.engine import norm_kernels
from tanren.engine.kernels import adam_step, split_and_rotate, swiglu
from tanren.engine.norm_kernels import add_and_norm, norm

# Groups of keys, queries of each, and the size of a head: of llm-jp-4-8b, and odd ones.
HEADS = ((8, 4, 128), (1, 1, 64), (3, 3, 24))
# Rows of no power of two and of one.
WIDTHS = (1100, 64)
EPSILON = 1e-2


def check_swiglu(device: str) -> None:
    """One block and a bit, forwards and backwards."""
    torch.manual_seed(1)
    mine = torch.randn(3, 2, 2 * 1100, device=device, requires_grad=True)
    theirs = mine.detach().double().requires_grad_()
    gate, up = theirs.chunk(2, -1)
    largest = torch.full((1,), torch.nan, device=device), torch.full((1,), torch.nan, device=device)
    expected, found = F.silu(gate) * up, swiglu(mine, lambda: largest[0], lambda: largest[1])
    upstream = torch.randn_like(found)
    found.backward(upstream)
    expected.backward(upstream.double())
    assert float(largest[0]) == float(found.abs().max())
    assert float(largest[1]) == float(mine.grad.abs().max())
    assert torch.equal(swiglu(mine.detach()), found)
    near = {"rtol": 1e-5, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(found, expected, **near)
    torch.testing.assert_close(mine.grad, theirs.grad, **near)


def check_rotation(device: str, groups: int, queries: int, width: int) -> None:
    """Five tokens of two samples at positions of their own."""
    torch.manual_seed(2)
    half = 50 * torch.rand(5, 1, 1, width // 2, device=device)
    angles = torch.cat([half, half], -1)
    size = groups * (queries + 2) * width
    mine = torch.randn(5, 2, size, device=device, requires_grad=True)
    theirs = mine.detach().double().requires_grad_()
    split = theirs.view(5, 2, groups, queries + 2, width)
    expected = (
        turned(split[..., :queries, :].reshape(5, 2, groups * queries, width), angles),
        turned(split[..., queries, :], angles),
        split[..., queries + 1, :],
    )
    found = split_and_rotate(mine, angles, groups)
    near = {"rtol": 1e-5, "atol": 1e-5, "check_dtype": False}
    compare(found, expected, near)
    torch.testing.assert_close(mine.grad, theirs.grad, **near)


def compare(
    found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], near: dict[str, Any]
) -> None:
    """Results; and go back from both with the same random gradients."""
    upstream = [torch.randn_like(one) for one in found]
    torch.autograd.backward(found, upstream)
    torch.autograd.backward(expected, [one.double() for one in upstream])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **near)


def turned(heads: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """LLaMA's rotary embedding as Hugging Face writes it."""
    first, second = heads.chunk(2, -1)
    other = torch.cat([-second, first], -1)
    return heads * angles.double().cos() + other * angles.double().sin()


def check_norm(device: str, width: int, *, frozen: bool) -> None:
    """Of a stream and of a sum, forwards and backwards, with more rows than programs."""
    torch.manual_seed(4)

    def drawn(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=device, requires_grad=True)

    # A GPU has two programs for each of some hundred multiprocessors, the interpreter four.
    rows = 301 if device == "cuda" else 21
    mine = [drawn(rows, 2, width), drawn(rows, 2, width), drawn(width)]
    mine[2].requires_grad_(not frozen)
    theirs = [one.detach().double().requires_grad_() for one in mine]
    largest = torch.full((3, 1), torch.nan, device=device)
    first = norm(mine[0], mine[2], EPSILON, lambda: largest[0])
    total, second = add_and_norm(
        mine[0], mine[1], mine[2], EPSILON, lambda: largest[1], lambda: largest[2]
    )
    summed = theirs[0] + theirs[1]
    expected = [true_norm(theirs[0], theirs[2]), summed, true_norm(summed, theirs[2])]
    found = [first, total, second]
    near = {"rtol": 1e-5, "atol": 1e-4, "check_dtype": False}
    compare(found, expected, near)
    for one, other in zip(mine[: 2 if frozen else 3], theirs, strict=False):
        torch.testing.assert_close(one.grad, other.grad, **near)
    assert not frozen or mine[2].grad is None
    assert float(largest[0]) == float(first.abs().max())
    assert float(largest[1]) == float(second.abs().max())
    # The branch has the sum's gradient alone, the stream another as well.
    assert float(largest[2]) == float(mine[1].grad.abs().max())


def check_weight_of_norm(device: str, kind: torch.dtype) -> None:
    """Its gradient joins what its main_grad has, summed by some times as many programs as it is
    read from at a time, and a part of that.
    """
    torch.manual_seed(5)
    stream, branch = (torch.randn(90, 2, 72, device=device) for _ in range(2))
    weight: Any = torch.nn.Parameter(torch.randn(72, device=device))
    weight.main_grad = torch.randn(72, device=device).to(kind)
    theirs = weight.detach().double().requires_grad_()
    before = weight.main_grad.double()
    _, second = add_and_norm(stream, branch, weight, EPSILON)
    found = [norm(stream, weight, EPSILON), second]
    summed = stream.double() + branch.double()
    expected = [true_norm(stream.double(), theirs), true_norm(summed, theirs)]
    with mock.patch.object(norm_kernels, "_PROGRAMS", 40):
        compare(found, expected, {"rtol": 1e-5, "atol": 1e-4, "check_dtype": False})
    assert weight.grad_added_to_main_grad
    all_of_it = before + theirs.grad
    # It is rounded to main_grad's type twice, once behind each norm, by half of 2^-7 each time.
    near = 1e-4 if kind == torch.float32 else 2**-7 * float(all_of_it.abs().max())
    torch.testing.assert_close(weight.main_grad.double(), all_of_it, rtol=1e-5, atol=near)


def true_norm(stream: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Zhang & Sennrich's equation 4."""
    return stream / (stream.square().mean(-1, keepdim=True) + EPSILON).sqrt() * weight


def check_adam(device: str, moments: torch.dtype, gradients: torch.dtype) -> None:
    """Three steps of a master weight in two halves, and of the same in fp64."""
    torch.manual_seed(3)
    master = torch.randn(2500)
    master[:5] = torch.tensor([0.0, -0.0, 1e-40, -1.99999, 65504.0])
    bits = master.view(torch.int32)
    low = bits.to(torch.int16)
    weight = ((bits >> 16) + (low < 0).int()).to(torch.int16).view(torch.bfloat16).to(device)
    remainder = low.to(device)
    first, second = (torch.zeros(2500, dtype=moments, device=device) for _ in range(2))
    expected, m, v = master.double(), torch.zeros(2500).double(), torch.zeros(2500).double()
    for step in (1, 2, 3):
        gradient = torch.randn(2500).to(gradients)
        adam_step(
            weight, remainder, gradient.to(device), first, second, rate=1e-2, betas=(0.9, 0.95),
            epsilon=1e-8, decay=0.1, step=step,
        )  # fmt: skip
        m = 0.9 * m + 0.1 * gradient.double()
        v = 0.95 * v + 0.05 * gradient.double().square()
        corrected = (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
        expected = expected - 1e-2 * (corrected + 0.1 * expected)
    high, low = weight.cpu().view(torch.int16).int(), remainder.cpu().int()
    found = (((high - (low < 0).int()) << 16) | (low & 0xFFFF)).view(torch.float32)
    # bf16 moments lose 2**-9 of themselves a step, of an update of 1e-2.
    near = 1e-6 if moments == torch.float32 else 3e-4
    torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=near)
    assert torch.equal(weight.cpu().float(), found.bfloat16().float())


if __name__ == "__main__":
    check_swiglu(sys.argv[1])
    for moments in (torch.float32, torch.bfloat16):
        for gradients in (torch.float32, torch.bfloat16):
            check_adam(sys.argv[1], moments, gradients)
    for heads in HEADS:
        check_rotation(sys.argv[1], *heads)
    for width in WIDTHS:
        for frozen in (False, True):
            check_norm(sys.argv[1], width, frozen=frozen)
    for kind in (torch.float32, torch.bfloat16):
        check_weight_of_norm(sys.argv[1], kind)
    print("checked", 7 + len(HEADS) + 2 * len(WIDTHS))
