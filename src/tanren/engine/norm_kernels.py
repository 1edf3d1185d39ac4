"""RMSNorm (Zhang & Sennrich 2019) in Triton, with the sum before it. GPU runs alone import this.

Between two products of a layer lie a sum, a norm and, in FP8, the search for a largest value. As
three kernels they read what they wrote just before; here the stream is read and written once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from tanren.engine.kernels import Measured, Where, nowhere, store_largest
from tanren.engine.main_grad import already_in_main_grad

# Backward, so many programs for each multiprocessor share the rows; each sums the gradient of the
# weight over its own. With up to 8 warps and these registers a thread they are there at once.
_PROGRAMS = 2
_REGISTERS, _OF_WARPS = 128, 8


@triton.jit  # type: ignore[untyped-decorator]
def _rms_norm(  # type: ignore[no-untyped-def]
    stream, branch, total, weight, normed, scales, largest, width, epsilon,
    block: tl.constexpr, adds: tl.constexpr, measures: tl.constexpr,
):  # fmt: skip
    """One row, of `stream + branch` where it adds, which goes to `total`."""
    column = tl.arange(0, block)
    inside = column < width
    at = tl.program_id(0).to(tl.int64) * width + column
    value = tl.load(stream + at, inside, other=0.0).to(tl.float32)
    if adds:
        value += tl.load(branch + at, inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + at, rounded, inside)
        # What the layers behind see of it.
        value = rounded.to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(value * value, 0) / width + epsilon)
    factor = tl.load(weight + column, inside, other=0.0).to(tl.float32)
    result = (value * scale * factor).to(normed.dtype.element_ty)
    tl.store(normed + at, result, inside)
    tl.store(scales + tl.program_id(0), scale)
    if measures:
        store_largest(largest, tl.max(tl.abs(result.to(tl.float32)), 0))


@triton.jit  # type: ignore[untyped-decorator]
def _read(  # type: ignore[no-untyped-def]
    upstream, later, total, scales, row, rows, width, column, adds: tl.constexpr
):
    """What the gradient of one row is made of; noughts behind the last."""
    inside = (column < width) & (row < rows)
    at = row.to(tl.int64) * width + column
    grad = tl.load(upstream + at, inside, other=0.0)
    value = tl.load(total + at, inside, other=0.0)
    more = tl.load(later + at, inside, other=0.0) if adds else grad
    return grad, value, more, tl.load(scales + row, row < rows, other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _rms_norm_gradient(  # type: ignore[no-untyped-def]
    upstream, later, total, weight, scales, result, of_weight, largest, rows, width,
    block: tl.constexpr, adds: tl.constexpr, weighs: tl.constexpr, measures: tl.constexpr,
):  # fmt: skip
    """Every so many-th row. `later` is the gradient of `total` from where it is added again."""
    row = tl.program_id(0)
    column = tl.arange(0, block)
    inside = column < width
    factor = tl.load(weight + column, inside, other=0.0).to(tl.float32)
    sums = tl.zeros([block], tl.float32)
    most = tl.zeros([block], tl.float32)
    grad, value, more, scale = _read(
        upstream, later, total, scales, row, rows, width, column, adds
    )  # fmt: skip
    while row < rows:
        # The next row is on its way while this one is computed.
        after = row + tl.num_programs(0)
        next_grad, next_value, next_more, next_scale = _read(
            upstream, later, total, scales, after, rows, width, column, adds
        )
        unit = value.to(tl.float32) * scale
        weighed = grad.to(tl.float32)
        if weighs:
            sums += weighed * unit
        weighed *= factor
        found = (weighed - unit * (tl.sum(weighed * unit, 0) / width)) * scale
        if adds:
            found += more.to(tl.float32)
        rounded = found.to(result.dtype.element_ty)
        tl.store(result + row.to(tl.int64) * width + column, rounded, inside)
        if measures:
            most = tl.maximum(most, tl.abs(rounded.to(tl.float32)))
        row, grad, value, more, scale = after, next_grad, next_value, next_more, next_scale
    if weighs:
        tl.store(of_weight + tl.program_id(0) * width + column, sums, inside)
    if measures:
        store_largest(largest, tl.max(most, 0))


@triton.jit  # type: ignore[untyped-decorator]
def _rms_norm_weight_gradient(  # type: ignore[no-untyped-def]
    each, total, programs, width, columns: tl.constexpr, at_once: tl.constexpr
):
    """total += what each program of the kernel above summed."""
    column = tl.program_id(0) * columns + tl.arange(0, columns)
    line = tl.arange(0, at_once)
    inside = column < width
    sums = tl.zeros([at_once, columns], tl.float32)
    first = 0
    while first < programs:
        row = (first + line)[:, None]
        sums += tl.load(
            each + row * width + column[None, :], (row < programs) & inside[None, :], other=0.0
        )
        first += at_once
    before = tl.load(total + column, inside, other=0.0).to(tl.float32)
    tl.store(total + column, (before + tl.sum(sums, 0)).to(total.dtype.element_ty), inside)


def _layout(width: int) -> dict[str, int]:
    """Of a row in one program: 16 elements a thread, up to 16 warps."""
    block = triton.next_power_of_2(width)
    return {"block": block, "num_warps": min(max(block // 512, 1), 16)}


def _forwards(
    stream: torch.Tensor, branch: torch.Tensor | None, weight: torch.Tensor, epsilon: float,
    of_normed: Where,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The sum, or the stream itself; its norm; what each row was multiplied with [rows]."""
    assert stream.is_contiguous() and (branch is None or branch.is_contiguous())
    width = stream.size(-1)
    rows = stream.numel() // width
    total = stream if branch is None else torch.empty_like(stream)
    normed = torch.empty_like(stream)
    scales = stream.new_empty(rows, dtype=torch.float32)
    measured = Measured(of_normed(), rows)
    _rms_norm[(rows,)](
        stream, branch, total, weight, normed, scales, width=width, epsilon=epsilon,
        adds=branch is not None, **_layout(width), **measured.options(),
    )  # fmt: skip
    measured.finish()
    return total, normed, scales


def _backwards(
    ctx: Any, upstream: torch.Tensor, later: torch.Tensor | None, of_total: Where, *, weighs: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradients of the sum and of the weight."""
    total, weight, scales = ctx.saved_tensors
    width, rows = total.size(-1), scales.numel()
    programs = min(rows, _PROGRAMS * _multiprocessors(total.device))
    result = torch.empty_like(total)
    each = total.new_empty(programs, width, dtype=torch.float32) if weighs else None
    measured = Measured(of_total(), programs)
    layout = _layout(width)
    _rms_norm_gradient[(programs,)](
        upstream.contiguous(), None if later is None else later.contiguous(), total, weight,
        scales, result, each, rows=rows, width=width, adds=later is not None, weighs=weighs,
        maxnreg=_REGISTERS if layout["num_warps"] <= _OF_WARPS else None,
        **layout, **measured.options(),
    )  # fmt: skip
    measured.finish()
    return result, None if each is None else _of_weight(ctx.weight, each)


def _of_weight(weight: Any, each: torch.Tensor) -> torch.Tensor:
    """What to return as a weight's gradient, which joins its main_grad where it has one.

    Args:
        each: [programs, width], what each of them summed.
    """
    total = getattr(weight, "main_grad", None)
    if total is None:
        return each.sum(0).to(weight.dtype)
    programs, width = each.shape
    # Small tiles, since there is a program for each multiprocessor and more.
    columns = 16
    _rms_norm_weight_gradient[(triton.cdiv(width, columns),)](
        each, total, programs, width, columns=columns, at_once=32
    )
    return already_in_main_grad(weight)


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        # Under Triton's interpreter.
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, stream: torch.Tensor, weight: torch.Tensor, epsilon: float, of_normed: Where
    ) -> torch.Tensor:
        _, normed, scales = _forwards(stream, None, weight, epsilon, of_normed)
        ctx.save_for_backward(stream, weight, scales)
        # The weight itself: what is saved may come back as another object, without main_grad.
        ctx.weight = weight
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weighs = ctx.needs_input_grad[1]
        result, of_weight = _backwards(ctx, upstream, None, nowhere, weighs=weighs)
        return result, of_weight, None, None


class _AddAndNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, stream: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor, epsilon: float,
        of_normed: Where, of_gradient: Where,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        total, normed, scales = _forwards(stream, branch, weight, epsilon, of_normed)
        ctx.save_for_backward(total, weight, scales)
        ctx.weight = weight
        ctx.of_gradient = of_gradient
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, later: torch.Tensor, upstream: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        weighs = ctx.needs_input_grad[2]
        result, of_weight = _backwards(ctx, upstream, later, ctx.of_gradient, weighs=weighs)
        # The sum's gradient is that of both its parts.
        return result, result, of_weight, None, None, None


def norm(
    stream: torch.Tensor, weight: torch.Tensor, epsilon: float, of_normed: Where = nowhere
) -> torch.Tensor:
    """RMSNorm over the last dimension, computed in fp32.

    Args:
        stream: [..., width], contiguous.
        weight: [width].
        epsilon: is added to the mean square.
        of_normed: where the largest absolute value of the result goes, see `Where`.
    Returns:
        as `stream`.
    """
    found: torch.Tensor = _Norm.apply(stream, weight, epsilon, of_normed)  # type: ignore[no-untyped-call]
    return found


def add_and_norm(
    stream: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor, epsilon: float,
    of_normed: Where = nowhere, of_gradient: Where = nowhere,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The sum of two, rounded to their dtype, and the RMSNorm of that.

    Args:
        stream: [..., width], contiguous; `branch` as well.
        of_gradient: where the largest absolute value of the sum's gradient goes, when it is made.
    Returns:
        sum and norm, each as `stream`; see `norm`.
    """
    found: tuple[torch.Tensor, torch.Tensor] = _AddAndNorm.apply(  # type: ignore[no-untyped-call]
        stream, branch, weight, epsilon, of_normed, of_gradient
    )
    return found
