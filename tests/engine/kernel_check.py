"""Run by test_head.py, `python -m tests.engine.kernel_check cpu|cuda`: Triton's passes and torch's.

On a CPU with TRITON_INTERPRET=1, which Triton must find when it is imported.
"""

from __future__ import annotations

import sys

import torch

from tanren.engine import head, head_kernels

# First column, real columns, columns; in blocks of 64, some of them whole and some begun.
PARTS = ((0, 203, 203), (0, 256, 256), (100, 90, 112), (192, 11, 64), (256, 0, 64))
TOKENS, VOCABULARY = 7, 203


def check(device: str, dtype: torch.dtype, part: tuple[int, int, int]) -> None:
    """Both passes over one rank's logits, which are a part of wider rows."""
    first, real, width = part
    torch.manual_seed(2)
    rows = (8 * torch.randn(TOKENS, width + 16) + 200).to(dtype)
    labels = torch.randint(min(VOCABULARY, first + real), (TOKENS,))
    labels[0] = max(first + real - 1, 0)
    mine = head.Vocabulary(first, real, None)  # type: ignore[arg-type]
    logits = rows[:, :width]
    expected = head.softmax_parts(logits, labels, mine)
    there, at = rows.clone().to(device)[:, :width], labels.to(device)
    found = head_kernels.softmax_parts(there, at, first, real, block=64, warps=1).cpu()
    assert torch.equal(found[:2], expected[:2]), (dtype, part)
    torch.testing.assert_close(found[2], expected[2], rtol=1e-6, atol=0.0)
    assert torch.isfinite(expected[:1]).all() == bool(real)

    highest, log_sum = torch.full((TOKENS,), 225.0), torch.rand(TOKENS)
    d_softmax, d_label = torch.rand(TOKENS), torch.rand(TOKENS)
    vectors = (highest, log_sum, d_softmax, d_label)
    head_kernels.to_gradient(
        there, at, first, real, *(one.to(device) for one in vectors), block=64, warps=1
    )
    head.to_gradient(logits, labels, mine, *vectors)
    # Within one rounding; Triton's interpreter cuts bf16 off instead.
    rounding = 2**-7 if device == "cpu" else 2**-8
    # The exponent is a difference of numbers near 225, each of which fp32 has to 2^-17.
    near = 2**-15 if dtype == torch.float32 else rounding
    torch.testing.assert_close(there.cpu(), logits, rtol=near, atol=0.0)
    assert torch.count_nonzero(there[:, real:]) == 0
    assert not real or float(there.min()) < 0 < float(there.max())


def check_fp8(device: str, part: tuple[int, int, int]) -> None:
    """The gradient in E5M2, in both orders, is `to_gradient`'s but for one rounding."""
    first, real, width = part
    torch.manual_seed(3)
    rows = (3 * torch.randn(TOKENS, width + 16)).to(torch.bfloat16)
    labels = torch.randint(min(VOCABULARY, first + real), (TOKENS,))
    labels[0] = max(first + real - 1, 0)
    mine = head.Vocabulary(first, real, None)  # type: ignore[arg-type]
    highest, log_sum = torch.full((TOKENS,), 12.0), torch.rand(TOKENS)
    d_softmax, d_label = torch.rand(TOKENS), torch.rand(TOKENS)
    d_softmax[1], d_softmax[2] = -0.5, 0.0
    vectors = (highest, log_sum, d_softmax, d_label)
    by_token = torch.full((TOKENS, width), torch.nan, device=device).to(torch.float8_e5m2)
    by_column = torch.full((width, TOKENS), torch.nan, device=device).to(torch.float8_e5m2)
    scale = torch.full((1,), 2.0**15, device=device)
    there = rows.clone().to(device)[:, :width]
    head_kernels.to_fp8_gradient(
        there, labels.to(device), first, real, *(one.to(device) for one in vectors),
        scale, by_token, by_column, tile=(16, 64), warps=1,
    )  # fmt: skip
    expected = rows[:, :width].float()
    head.to_gradient(expected, labels, mine, *vectors)
    found = by_token.cpu().float() / 2.0**15
    # Triton's interpreter loses the carry where it rounds up to a power of two.
    near = 0.51 if device == "cpu" else 2.0**-2.9
    torch.testing.assert_close(found, expected, rtol=near, atol=2.0**-31)
    assert torch.equal(by_column.cpu().float().T, by_token.cpu().float())
    assert torch.equal(there.cpu(), rows[:, :width])
    assert not real or float(found.min()) < 0 < float(found.max())


def check_transposed(device: str) -> None:
    """A matrix of no whole tiles in E4M3."""
    torch.manual_seed(4)
    matrix = torch.randn(37, 150).to(torch.bfloat16)
    scale = (448 / matrix.abs().max()).float().view(1)
    found = torch.empty(150, 37, dtype=torch.float8_e4m3fn, device=device)
    head_kernels.to_fp8_transposed(
        matrix.to(device), scale.to(device), found, tile=(16, 64), warps=1
    )
    expected = (matrix.float() * scale).T
    near = 0.51 if device == "cpu" else 2.0**-3.9
    torch.testing.assert_close(found.cpu().float(), expected, rtol=near, atol=2.0**-10)
    assert float(found.float().abs().max()) == 448


def far(device: str) -> None:
    """The last of more logits than 32 bits count."""
    tokens, width = 2**14 + 1, 2**17
    logits = torch.zeros(tokens, width, dtype=torch.bfloat16, device=device)
    logits[-1, -1] = 12.0  # of 2^17 e^0 about half
    labels = torch.full((tokens,), width - 1, device=device)
    parts = head_kernels.softmax_parts(logits, labels, 0, width)
    assert parts[:, -1].tolist()[:2] == [12.0, 12.0]
    ones = torch.ones(tokens, device=device)
    head_kernels.to_gradient(logits, labels, 0, width, parts[0], parts[2].log(), ones, ones)
    assert -1 < float(logits[-1, -1]) < float(logits[-1, 0]) == float(logits[-1, -2])
    assert float(logits[0, 0]) == 2.0**-17


if __name__ == "__main__":
    device = sys.argv[1]
    for dtype in (torch.float32, torch.bfloat16):
        for part in PARTS:
            check(device, dtype, part)
    for part in PARTS:
        check_fp8(device, part)
    check_transposed(device)
    if device == "cuda":
        far(device)
    print("checked", len(PARTS))
