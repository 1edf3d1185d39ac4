"""Run by test_layers.py, `python -m tests.engine.layer_kernel_check cpu|cuda`: Triton and torch.

On a CPU with TRITON_INTERPRET=1, which Triton must find when it is imported.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F

from tanren.engine.layer_kernels import split_and_rotate, swiglu

# Groups of keys, queries of each, and the size of a head: of llm-jp-4-8b, and odd ones.
HEADS = ((8, 4, 128), (1, 1, 64), (3, 2, 24))


def check_swiglu(device: str) -> None:
    """One block and a bit, forwards and backwards."""
    torch.manual_seed(1)
    mine = torch.randn(3, 2, 2 * 1100, device=device, requires_grad=True)
    theirs = mine.detach().double().requires_grad_()
    gate, up = theirs.chunk(2, -1)
    expected, found = F.silu(gate) * up, swiglu(mine)
    upstream = torch.randn_like(found)
    found.backward(upstream)
    expected.backward(upstream.double())
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
    upstream = [torch.randn_like(one) for one in found]
    torch.autograd.backward(found, upstream)
    torch.autograd.backward(expected, [one.double() for one in upstream])
    near = {"rtol": 1e-5, "atol": 1e-5, "check_dtype": False}
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **near)
    torch.testing.assert_close(mine.grad, theirs.grad, **near)


def turned(heads: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """LLaMA's rotary embedding as Hugging Face writes it."""
    first, second = heads.chunk(2, -1)
    other = torch.cat([-second, first], -1)
    return heads * angles.double().cos() + other * angles.double().sin()


if __name__ == "__main__":
    check_swiglu(sys.argv[1])
    for heads in HEADS:
        check_rotation(sys.argv[1], *heads)
    print("checked", 1 + len(HEADS))
