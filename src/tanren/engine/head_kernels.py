"""Two passes over the logits on a GPU, in Triton: what their softmax needs, and their gradient.

Both wait for memory alone: one read, then one read and one write. Import it on a GPU only; Triton
comes with torch there. The same passes in torch, with what they mean, are in tanren.engine.head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Columns that a program takes at a time, and its warps.
BLOCK, WARPS = 8192, 8


@triton.jit  # type: ignore[untyped-decorator]
def _softmax_kernel(  # type: ignore[no-untyped-def]
    logits, stride, labels, first, parts, tokens,
    columns: tl.constexpr, width: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One row a program, by an online softmax (Milakov & Gimelshein 2018, arXiv 1805.02867)."""
    token = tl.program_id(0).to(tl.int64)
    logits += token * stride
    highest = float("-inf")
    total = 0.0
    for start in range(0, columns, block):
        at = start + tl.arange(0, block)
        # By the width, a multiple of 16: a mask at any other column makes every load a single one.
        x = tl.load(logits + at, mask=at < width, other=float("-inf")).to(tl.float32)
        x = tl.where(at < columns, x, float("-inf"))
        above = tl.maximum(highest, tl.max(x, 0))
        total = total * tl.exp(highest - above) + tl.sum(tl.exp(x - above), 0)
        highest = above
    label = tl.load(labels + token) - first
    mine = (label >= 0) & (label < columns)
    wanted = tl.load(logits + label, mask=mine, other=float("-inf")).to(tl.float32)
    tl.store(parts + token, highest)
    tl.store(parts + tokens + token, wanted)
    tl.store(parts + 2 * tokens + token, total)


@triton.jit  # type: ignore[untyped-decorator]
def _gradient_kernel(  # type: ignore[no-untyped-def]
    logits, stride, labels, first, highest, log_sum, d_softmax, d_label,
    columns: tl.constexpr, width: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """A block of one row a program; a row's blocks lie beside one another in the grid."""
    program, blocks = tl.program_id(0), tl.cdiv(width, block)
    # 16,384 tokens have more logits than 32 bits count.
    token = (program // blocks).to(tl.int64)
    at = (program % blocks) * block + tl.arange(0, block)
    logits += token * stride
    x = tl.load(logits + at, mask=at < width, other=0.0)
    probability = tl.exp(x.to(tl.float32) - tl.load(highest + token) - tl.load(log_sum + token))
    label = tl.load(labels + token) - first
    gradient = tl.load(d_softmax + token) * probability
    gradient = tl.where(at == label, gradient - tl.load(d_label + token), gradient)
    gradient = tl.where(at < columns, gradient, 0.0)
    tl.store(logits + at, gradient.to(x.dtype), mask=at < width)


def softmax_parts(
    logits: torch.Tensor,
    labels: torch.Tensor,
    first: int,
    columns: int,
    *,
    block: int = BLOCK,
    warps: int = WARPS,
) -> torch.Tensor:
    """See tanren.engine.head.softmax_parts."""
    tokens = logits.size(0)
    assert logits.stride(1) == labels.stride(0) == 1
    parts = torch.empty(3, tokens, dtype=torch.float32, device=logits.device)
    _softmax_kernel[(tokens,)](
        logits, logits.stride(0), labels, first, parts, tokens,
        columns=columns, width=logits.size(1), block=block, num_warps=warps,
    )  # fmt: skip
    return parts


def to_gradient(
    logits: torch.Tensor,
    labels: torch.Tensor,
    first: int,
    columns: int,
    highest: torch.Tensor,
    log_sum: torch.Tensor,
    d_softmax: torch.Tensor,
    d_label: torch.Tensor,
    *,
    block: int = BLOCK,
    warps: int = WARPS,
) -> None:
    """See tanren.engine.head.to_gradient."""
    tokens, width = logits.shape
    vectors = (labels, highest, log_sum, d_softmax, d_label)
    assert all(one.shape == (tokens,) and one.is_contiguous() for one in vectors)
    assert logits.stride(1) == 1
    _gradient_kernel[(tokens * triton.cdiv(width, block),)](
        logits, logits.stride(0), labels, first, highest, log_sum, d_softmax, d_label,
        columns=columns, width=width, block=block, num_warps=warps,
    )  # fmt: skip
