"""Passes over the logits on a GPU, in Triton: what their softmax needs, and their gradient.

All wait for memory alone: one read, then one read and one write. For products of FP8 the gradient
is written in two orders instead of over the logits, and what it is multiplied with is transposed.
Import it on a GPU only; Triton comes with torch there. The first two passes in torch, with what
they mean, are in tanren.engine.head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Columns that a program takes at a time, and its warps.
BLOCK, WARPS = 8192, 8
# Rows and columns of a tile that is written as it stands and transposed, and its warps.
TILE, TILE_WARPS = (128, 128), 4


# SFT and DPO have another number of tokens in each micro batch.
@triton.jit(do_not_specialize=["tokens"])  # type: ignore[untyped-decorator]
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


# With columns that are known to the compiler, some elements of a tile are noughts that are known to
# it as well, and those it writes wrongly in FP8. Triton 3.6 does; to be dropped when one passes
# kernel_check.py without.
@triton.jit(do_not_specialize=["columns"])  # type: ignore[untyped-decorator]
def _fp8_gradient_kernel(  # type: ignore[no-untyped-def]
    logits, stride, labels, first, highest, log_sum, d_softmax, d_label, scale,
    by_token, by_column, tokens, columns,
    width: tl.constexpr, rows: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """A tile a program; tiles of the same tokens lie beside one another in the grid.

    All that is of a token alone is worked out once a row: an element takes one product, one power
    of two, and what its label wants.
    """
    program, blocks = tl.program_id(0), tl.cdiv(width, block)
    token = ((program // blocks) * rows + tl.arange(0, rows)).to(tl.int64)
    at = (program % blocks) * block + tl.arange(0, block)
    known, inside = token < tokens, at < width
    here = known[:, None] & inside[None, :]
    x = tl.load(logits + token[:, None] * stride + at[None, :], mask=here, other=0.0)
    by = tl.load(scale)
    log_z = tl.load(highest + token, known, other=0.0) + tl.load(log_sum + token, known, other=0.0)
    weight = by * tl.load(d_softmax + token, known, other=0.0)
    # With a z-loss a probability may count less than nothing.
    sign = tl.where(weight < 0, -1.0, 1.0)
    less = 1.4426950408889634 * log_z - tl.log2(tl.abs(weight))
    of_label = by * tl.load(d_label + token, known, other=0.0)
    label = (tl.load(labels + token, known, other=0) - first).to(tl.int32)
    gradient = sign[:, None] * tl.exp2(x.to(tl.float32) * 1.4426950408889634 - less[:, None])
    gradient = tl.where(at[None, :] == label[:, None], gradient - of_label[:, None], gradient)
    gradient = tl.where((at < columns)[None, :], gradient, 0.0)
    cast = gradient.to(by_token.dtype.element_ty)
    tl.store(by_token + token[:, None] * width + at[None, :], cast, mask=here)
    # Read again, or Triton computes all of it a second time in the order that is written next.
    tl.debug_barrier()
    cast = tl.load(by_token + token[:, None] * width + at[None, :], mask=here, other=0.0)
    across = by_column + at[:, None].to(tl.int64) * tokens + token[None, :]
    tl.store(across, tl.trans(cast), mask=inside[:, None] & known[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _fp8_transpose_kernel(  # type: ignore[no-untyped-def]
    matrix, scale, result, height, width, rows: tl.constexpr, block: tl.constexpr
):
    """A tile a program."""
    program, blocks = tl.program_id(0), tl.cdiv(width, block)
    row = ((program // blocks) * rows + tl.arange(0, rows)).to(tl.int64)
    column = (program % blocks) * block + tl.arange(0, block)
    here = (row < height)[:, None] & (column < width)[None, :]
    x = tl.load(matrix + row[:, None] * width + column[None, :], mask=here, other=0.0)
    cast = (x.to(tl.float32) * tl.load(scale)).to(result.dtype.element_ty)
    across = result + column[:, None].to(tl.int64) * height + row[None, :]
    tl.store(across, tl.trans(cast), mask=(column < width)[:, None] & (row < height)[None, :])


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


def _shape(logits: torch.Tensor, *vectors: torch.Tensor) -> tuple[int, int]:
    """Tokens and width of logits, looked at with what there is of each token."""
    tokens, width = logits.shape
    assert all(one.shape == (tokens,) and one.is_contiguous() for one in vectors)
    assert logits.stride(1) == 1
    return tokens, width


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
    tokens, width = _shape(logits, labels, highest, log_sum, d_softmax, d_label)
    _gradient_kernel[(tokens * triton.cdiv(width, block),)](
        logits, logits.stride(0), labels, first, highest, log_sum, d_softmax, d_label,
        columns=columns, width=width, block=block, num_warps=warps,
    )  # fmt: skip


def to_fp8_gradient(
    logits: torch.Tensor,
    labels: torch.Tensor,
    first: int,
    columns: int,
    highest: torch.Tensor,
    log_sum: torch.Tensor,
    d_softmax: torch.Tensor,
    d_label: torch.Tensor,
    scale: torch.Tensor,
    by_token: torch.Tensor,
    by_column: torch.Tensor,
    *,
    tile: tuple[int, int] = TILE,
    warps: int = TILE_WARPS,
) -> None:
    """The gradient that `to_gradient` makes, times `scale`, in FP8 and in both orders.

    Args:
        logits: [tokens, width], left as they are.
        scale: [1] in fp32; what it makes larger than the type holds becomes its largest value.
        by_token: [tokens, width], where it goes.
        by_column: [width, tokens], the same transposed.
    """
    tokens, width = _shape(logits, labels, highest, log_sum, d_softmax, d_label)
    assert by_token.shape == (tokens, width) and by_token.is_contiguous()
    assert by_column.shape == (width, tokens) and by_column.is_contiguous()
    rows, block = tile
    _fp8_gradient_kernel[(triton.cdiv(tokens, rows) * triton.cdiv(width, block),)](
        logits, logits.stride(0), labels, first, highest, log_sum, d_softmax, d_label, scale,
        by_token, by_column, tokens, columns,
        width=width, rows=rows, block=block, num_warps=warps,
    )  # fmt: skip


def to_fp8_transposed(
    matrix: torch.Tensor,
    scale: torch.Tensor,
    result: torch.Tensor,
    *,
    tile: tuple[int, int] = TILE,
    warps: int = TILE_WARPS,
) -> None:
    """Write a matrix [height, width], times `scale` [1] in fp32, to `result` [width, height].

    What is larger than the result's type holds becomes its largest value.
    """
    height, width = matrix.shape
    assert matrix.is_contiguous() and result.is_contiguous()
    assert result.shape == (width, height)
    rows, block = tile
    _fp8_transpose_kernel[(triton.cdiv(height, rows) * triton.cdiv(width, block),)](
        matrix, scale, result, height, width, rows=rows, block=block, num_warps=warps
    )
