"""A rank's flat share of a parameter as boxes of the whole tensor that a checkpoint holds.

The distributed optimizer cuts the parameters, laid end to end, into one contiguous range a rank. In
a tensor such a range is at most three rectangles: the rest of a row, whole rows, the start of one.
torch.distributed.checkpoint stores a tensor as any boxes that do not overlap, so that each rank
writes and reads its own ones and nothing is gathered.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

# Elements of a box: what a writer's thread widens at a time (256 MiB of fp32), and what another
# layout reads at least.
LIMIT = 1 << 26


@dataclass(frozen=True)
class Box:
    """A rectangle of a tensor whose elements lie in a row: from the flat index `first` on."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    first: int


def cut(start: int, end: int, shape: tuple[int, ...], limit: int = LIMIT) -> Iterator[Box]:
    """The boxes of the flat range [start, end) of a contiguous tensor, in their order.

    Of a matrix they are three at most, besides the cuts that `limit` asks for.

    Args:
        limit: elements of a box, though never less than a row.
    """
    if start >= end:
        return
    if len(shape) == 1:
        for first in range(start, end, limit):
            yield Box((first,), (min(limit, end - first),), first)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), end // row  # whole rows
    if first > last:
        yield from _within(last, start, end, shape, limit)
        return
    yield from _within(first - 1, start, first * row, shape, limit)
    step = max(limit // row, 1)
    for some in range(first, last, step):
        rest = (0,) * (len(shape) - 1)
        yield Box((some, *rest), (min(step, last - some), *shape[1:]), some * row)
    yield from _within(last, last * row, end, shape, limit)


def _within(row: int, start: int, end: int, shape: tuple[int, ...], limit: int) -> Iterator[Box]:
    before = row * math.prod(shape[1:])
    for box in cut(start - before, end - before, shape[1:], limit):
        yield Box((row, *box.offsets), (1, *box.sizes), before + box.first)


@dataclass(frozen=True)
class Chunk:
    """A box of a checkpoint's tensor, and where its elements begin in the flat parameter."""

    name: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    first: int

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)


@dataclass(frozen=True)
class Part:
    """A contiguous part of a parameter, and where it lies in a checkpoint's tensor.

    Most parameters are one; gate and up of SwiGLU, one parameter here, are two.

    Args:
        name, shape: of the checkpoint's tensor, over all layers and ranks.
        offsets: of the part in it; first the axes that the parameter does not have (the layer).
        local: the part's own shape.
        first: where it begins in the flat parameter.
    """

    name: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    local: tuple[int, ...]
    first: int

    def chunks(self, start: int, end: int) -> Iterator[Chunk]:
        """What of the flat parameter's range [start, end) lies in this part."""
        outer = len(self.shape) - len(self.local)
        last = self.first + math.prod(self.local)
        mine = max(start, self.first) - self.first, min(end, last) - self.first
        for box in cut(*mine, self.local):
            inner = (o + b for o, b in zip(self.offsets[outer:], box.offsets, strict=True))
            offsets = (*self.offsets[:outer], *inner)
            sizes = (1,) * outer + box.sizes
            yield Chunk(self.name, self.shape, offsets, sizes, self.first + box.first)


def join(weight: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """The fp32 master of a bf16 weight and the 16 bits that Transformer Engine keeps beside it.

    The weight's bits are the master's upper half, and one more where the lower half, as a signed
    number, is below nought: rounded half up (AdamFunctorMasterParamRemainder in
    transformer_engine/common/multi_tensor/adam.cu).

    Args:
        weight: bf16.
        remainder: int16, of the same shape.
    Returns:
        fp32, of that shape.
    """
    upper = weight.view(torch.int16).int()
    upper -= (remainder < 0).int()
    upper <<= 16
    upper |= remainder.int() & 0xFFFF
    return upper.view(torch.float32)


def split(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bf16 weight and the int16 remainder of an fp32 master; `join` gives it back."""
    bits = master.view(torch.int32)
    # A cast to a shorter integer keeps the lower bits.
    remainder = bits.to(torch.int16)
    upper = (bits >> 16) + (remainder < 0).int()
    return upper.to(torch.int16).view(torch.bfloat16), remainder
