"""Triton kernels for what lies between matrix products. GPU runs alone import this file.

Each moves its bytes once: a micro batch of 8,192 tokens of llm-jp-4-8b spends a quarter of a layer
outside its matrix products, and what megatron-core and Transformer Engine run there takes two to
three times as long as the bytes need (docs/performance.md has the figures).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

# Elements that one program takes, of a row of SwiGLU and of a parameter.
_BLOCK = 1024


@triton.jit
def store_largest(largest, value):  # type: ignore[no-untyped-def]
    """Each program's own, in the order of a grid of one or two dimensions."""
    tl.store(largest + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), value)


@triton.jit  # type: ignore[untyped-decorator]
def _swiglu(  # type: ignore[no-untyped-def]
    gate_up, result, largest, width, block: tl.constexpr, measures: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < width
    gate = tl.load(gate_up + row * 2 * width + column, inside).to(tl.float32)
    up = tl.load(gate_up + (row * 2 + 1) * width + column, inside).to(tl.float32)
    value = (gate * tl.sigmoid(gate) * up).to(result.dtype.element_ty)
    tl.store(result + row * width + column, value, inside)
    if measures:
        store_largest(largest, tl.max(tl.where(inside, tl.abs(value.to(tl.float32)), 0.0), 0))


@triton.jit  # type: ignore[untyped-decorator]
def _swiglu_gradient(  # type: ignore[no-untyped-def]
    gradient, gate_up, result, largest, width, block: tl.constexpr, measures: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < width
    first, second = row * 2 * width + column, (row * 2 + 1) * width + column
    grad = tl.load(gradient + row * width + column, inside).to(tl.float32)
    gate = tl.load(gate_up + first, inside).to(tl.float32)
    up = tl.load(gate_up + second, inside).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    of_gate = (grad * up * sigmoid * (1 + gate * (1 - sigmoid))).to(result.dtype.element_ty)
    of_up = (grad * gate * sigmoid).to(result.dtype.element_ty)
    tl.store(result + first, of_gate, inside)
    tl.store(result + second, of_up, inside)
    if measures:
        both = tl.maximum(tl.abs(of_gate.to(tl.float32)), tl.abs(of_up.to(tl.float32)))
        store_largest(largest, tl.max(tl.where(inside, both, 0.0), 0))


# Where the largest absolute value of a tensor goes, [1] in fp32; asked when the tensor is made.
Where = Callable[[], torch.Tensor | None]


class Measured:
    """Where a kernel's programs write their largest values, if anybody wants the largest of all."""

    def __init__(self, wanted: torch.Tensor | None, programs: int) -> None:
        self._wanted = wanted
        self._each = None if wanted is None else wanted.new_empty(programs)

    def options(self) -> dict[str, Any]:
        return {"largest": self._each, "measures": self._each is not None}

    def finish(self) -> None:
        if self._each is not None:
            torch.amax(self._each, 0, keepdim=True, out=self._wanted)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate_up: torch.Tensor, of_result: Where, of_gradient: Where
    ) -> torch.Tensor:
        width = gate_up.size(-1) // 2
        result = gate_up.new_empty(*gate_up.shape[:-1], width)
        grid = (gate_up.numel() // (2 * width), triton.cdiv(width, _BLOCK))
        measured = Measured(of_result(), grid[0] * grid[1])
        _swiglu[grid](gate_up, result, width=width, block=_BLOCK, **measured.options())
        measured.finish()
        ctx.save_for_backward(gate_up)
        ctx.of_gradient = of_gradient
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gate_up,) = ctx.saved_tensors
        width = gate_up.size(-1) // 2
        result = torch.empty_like(gate_up)
        grid = (gate_up.numel() // (2 * width), triton.cdiv(width, _BLOCK))
        measured = Measured(ctx.of_gradient(), grid[0] * grid[1])
        _swiglu_gradient[grid](
            gradient.contiguous(), gate_up, result,
            width=width, block=_BLOCK, **measured.options(),
        )  # fmt: skip
        measured.finish()
        return result, None, None


def nowhere() -> None:
    """For what nobody wants to know."""


def swiglu(
    gate_up: torch.Tensor, of_result: Where = nowhere, of_gradient: Where = nowhere
) -> torch.Tensor:
    """SiLU(gate) * up (Shazeer 2020), computed in fp32.

    Args:
        gate_up: [..., 2 x width], gate first; contiguous.
        of_result: where the largest absolute value of the result goes, see `Where`.
        of_gradient: the same of the gradient of `gate_up`, when it is made.
    Returns:
        [..., width], in its dtype.
    """
    assert gate_up.is_contiguous()
    result: torch.Tensor = _SwiGLU.apply(  # type: ignore[no-untyped-call]
        gate_up, of_result, of_gradient
    )
    return result


@triton.jit  # type: ignore[untyped-decorator]
def _split_and_rotate(  # type: ignore[no-untyped-def]
    mixed, query, key, value, angles, samples,
    groups: tl.constexpr, queries: tl.constexpr, half: tl.constexpr,
    all_groups: tl.constexpr, all_queries: tl.constexpr, lanes: tl.constexpr,
    backward: tl.constexpr,
):  # fmt: skip
    """One token of one sample: all its heads. queries are those of a group; all_groups, all_queries
    and lanes are powers of two that hold the groups, these and half a head.
    """
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, lanes)
    # Angles are repeated in the second half of a head.
    angle = tl.load(angles + (row // samples) * 2 * half + lane, lane < half, other=0.0)
    cos, sin = tl.cos(angle)[None, :], tl.sin(angle)[None, :]
    if backward:
        # The inverse of a rotation turns back.
        sin = -sin
    head: tl.constexpr = 2 * half
    mixed += row * groups * (queries + 2) * head
    query += row * groups * queries * head
    key += row * groups * head
    value += row * groups * head
    slot = tl.arange(0, all_groups * all_queries) % all_queries
    group = tl.arange(0, all_groups * all_queries) // all_queries
    is_query = ((slot < queries) & (group < groups))[:, None] & (lane < half)[None, :]
    in_query = (group * queries + slot)[:, None] * head + lane[None, :]
    query_in_mixed = (group * (queries + 2) + slot)[:, None] * head + lane[None, :]
    own = tl.arange(0, all_groups)
    is_group = (own < groups)[:, None] & (lane < half)[None, :]
    in_group = own[:, None] * head + lane[None, :]
    key_in_mixed = (own * (queries + 2) + queries)[:, None] * head + lane[None, :]
    value_in_mixed = key_in_mixed + head
    if backward:
        from_query, from_key, from_value = query + in_query, key + in_group, value + in_group
        to_query, to_key = mixed + query_in_mixed, mixed + key_in_mixed
        to_value = mixed + value_in_mixed
    else:
        from_query, from_key = mixed + query_in_mixed, mixed + key_in_mixed
        from_value = mixed + value_in_mixed
        to_query, to_key, to_value = query + in_query, key + in_group, value + in_group
    # All is asked for before anything is waited for.
    first = tl.load(from_query, is_query).to(tl.float32)
    second = tl.load(from_query + half, is_query).to(tl.float32)
    key_first = tl.load(from_key, is_group).to(tl.float32)
    key_second = tl.load(from_key + half, is_group).to(tl.float32)
    value_first = tl.load(from_value, is_group)
    value_second = tl.load(from_value + half, is_group)
    dtype: tl.constexpr = mixed.dtype.element_ty
    tl.store(to_query, (first * cos - second * sin).to(dtype), is_query)
    tl.store(to_query + half, (second * cos + first * sin).to(dtype), is_query)
    tl.store(to_key, (key_first * cos - key_second * sin).to(dtype), is_group)
    tl.store(to_key + half, (key_second * cos + key_first * sin).to(dtype), is_group)
    tl.store(to_value, value_first, is_group)
    tl.store(to_value + half, value_second, is_group)


class _SplitAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, mixed: torch.Tensor, angles: torch.Tensor, groups: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        width = angles.size(-1)
        queries = mixed.size(-1) // width // groups - 2
        around = mixed.shape[:2]
        parts = (
            mixed.new_empty(*around, groups * queries, width),
            mixed.new_empty(*around, groups, width),
            mixed.new_empty(*around, groups, width),
        )
        _launch(mixed, parts, angles, groups, backward=False)
        ctx.save_for_backward(angles)
        ctx.groups = groups
        return parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (angles,) = ctx.saved_tensors
        parts = tuple(part.contiguous() for part in gradients)
        heads = parts[0].size(2) + 2 * ctx.groups
        mixed = parts[0].new_empty(*parts[0].shape[:2], heads * angles.size(-1))
        _launch(mixed, parts, angles, ctx.groups, backward=True)
        return mixed, None, None


def _launch(
    mixed: torch.Tensor, parts: tuple[torch.Tensor, ...], angles: torch.Tensor, groups: int,
    *, backward: bool,
) -> None:  # fmt: skip
    tokens, samples, size = mixed.shape
    width = angles.size(-1)
    queries = size // width // groups - 2
    all_groups, all_queries = triton.next_power_of_2(groups), triton.next_power_of_2(queries)
    lanes = triton.next_power_of_2(width // 2)
    elements = triton.next_power_of_2(all_groups * (all_queries + 2) * 2 * lanes)
    _split_and_rotate[(tokens * samples,)](
        mixed, *parts, angles, samples,
        groups=groups, queries=queries, half=width // 2,
        all_groups=all_groups, all_queries=all_queries, lanes=lanes, backward=backward,
        # About a hundred elements a thread, so that enough loads are under way.
        num_warps=min(max(elements // 4096, 1), 8),
    )  # fmt: skip


def split_and_rotate(
    mixed: torch.Tensor, angles: torch.Tensor, groups: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values out of one projection, queries and keys turned by their position.

    Rotary embedding (Su et al. 2021) in the form of LLaMA: the first half of a head against its
    second. One pass instead of a split, two copies and two rotations.

    Args:
        mixed: [tokens, samples, groups x (queries of a group + 2) x head], contiguous: of each
            group its queries, its key, its value.
        angles: [tokens, 1, 1, head] in radians and fp32, the second half equal to the first.
        groups: of keys and values.
    Returns:
        [tokens, samples, groups x queries, head] and twice [tokens, samples, groups, head].
    """
    assert mixed.is_contiguous()
    assert angles.dtype == torch.float32 and angles.size(0) == mixed.size(0)
    found: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _SplitAndRotate.apply(  # type: ignore[no-untyped-call]
        mixed, angles.contiguous(), groups
    )
    return found


@triton.jit  # type: ignore[untyped-decorator]
def _adam(  # type: ignore[no-untyped-def]
    weight, remainder, gradient, first, second, size,
    rate, beta1, beta2, epsilon, decay, correction1, correction2, block: tl.constexpr,
):  # fmt: skip
    """The fp32 master weight is bf16's 16 bits and 16 more; where those are a half or above, bf16
    was rounded up to it.
    """
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < size
    high = tl.load(weight + at, inside, other=0).to(tl.int32)
    low = tl.load(remainder + at, inside, other=0).to(tl.int32)
    bits = ((high - (low < 0).to(tl.int32)) << 16) | (low & 0xFFFF)
    master = bits.to(tl.float32, bitcast=True)
    g = tl.load(gradient + at, inside, other=0.0).to(tl.float32)
    m = beta1 * tl.load(first + at, inside, other=0.0).to(tl.float32) + (1 - beta1) * g
    v = beta2 * tl.load(second + at, inside, other=0.0).to(tl.float32) + (1 - beta2) * g * g
    update = (m / correction1) / (tl.sqrt(v / correction2) + epsilon) + decay * master
    bits = (master - rate * update).to(tl.int32, bitcast=True)
    low = bits.to(tl.int16)
    high = (bits >> 16) + (low < 0).to(tl.int32)
    tl.store(weight + at, high.to(tl.int16), inside)
    tl.store(remainder + at, low, inside)
    tl.store(first + at, m.to(first.dtype.element_ty), inside)
    tl.store(second + at, v.to(second.dtype.element_ty), inside)


def adam_step(
    weight: torch.Tensor, remainder: torch.Tensor, gradient: torch.Tensor, first: torch.Tensor,
    second: torch.Tensor, *, rate: float, betas: tuple[float, float], epsilon: float, decay: float,
    step: int,
) -> None:  # fmt: skip
    """One step of AdamW (Loshchilov & Hutter 2019), computed in fp32, in place.

    Args:
        weight: bf16.
        remainder: int16, what the fp32 master weight has below it.
        gradient: fp32 or bf16; the moments `first` and `second` as well.
        step: counted from 1, for the correction of the moments' bias.
    """
    size = weight.numel()
    if not size:
        return
    beta1, beta2 = betas
    _adam[(triton.cdiv(size, _BLOCK),)](
        weight.view(torch.int16), remainder, gradient, first, second, size,
        rate, beta1, beta2, epsilon, decay, 1 - beta1**step, 1 - beta2**step, block=_BLOCK,
    )  # fmt: skip
