"""Flat ranges as boxes, and fp32 masters in two halves."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from tanren.engine.boxes import LIMIT, Part, cut, join, split

SHAPES = st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple)


@given(SHAPES, st.data(), st.sampled_from([1, 3, LIMIT]))
def test_boxes_are_the_range_in_its_order(
    shape: tuple[int, ...], data: st.DataObject, limit: int
) -> None:
    numel = math.prod(shape)
    start, end = sorted(data.draw(st.tuples(st.integers(0, numel), st.integers(0, numel))))
    boxes = list(cut(start, end, shape, limit))
    flat = torch.arange(numel).view(shape)
    found = []
    for box in boxes:
        where = tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))
        assert flat[where].shape == box.sizes
        own = flat[where].flatten().tolist()
        assert own == list(range(box.first, box.first + len(own)))
        assert len(own) <= max(limit, math.prod(shape[1:]))
        found += own
    assert found == list(range(start, end))
    if limit == LIMIT:
        assert len(boxes) <= 2 * len(shape) - 1


def test_gate_and_up_of_the_second_of_two_ranks_lie_apart() -> None:
    """One parameter of 4 rows, of which two are of the gate; layer 1 of 3."""
    parts = (
        Part("fc1", (3, 8, 5), (1, 2, 0), (2, 5), 0),
        Part("fc1", (3, 8, 5), (1, 6, 0), (2, 5), 10),
    )
    found = [(c.offsets, c.sizes, c.first) for part in parts for c in part.chunks(3, 12)]
    assert found == [
        ((1, 2, 3), (1, 1, 2), 3),
        ((1, 3, 0), (1, 1, 5), 5),
        ((1, 6, 0), (1, 1, 2), 10),
    ]
    assert list(parts[1].chunks(0, 10)) == []


# fp32 as bits: noughts, the ends of the subnormals, a half of the last bit kept (rounded up), one
# below and one above it, a carry into the exponent, 1.0, infinity, not a number.
BITS = [
    0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x10000, 0x7FFFFF, 0x800000, 0x3F7FFFFF, 0x3F7F8000,
    0x3F800000, 0x3F808000, 0x3F818000, 0x7F7F0000, 0x7F800000, 0x7FC00001,
]  # fmt: skip


def masters() -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    some = torch.randint(-(2**31), 2**31, (20_000,), generator=generator)
    every = torch.cat([torch.tensor(BITS), torch.tensor(BITS) - 2**31, some])
    return every.to(torch.int32).view(torch.float32)


def test_a_master_comes_back_from_its_halves_bit_for_bit() -> None:
    master = masters()
    weight, remainder = split(master)
    assert (weight.dtype, remainder.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(join(weight, remainder).view(torch.int32), master.view(torch.int32))


def test_the_weight_is_the_master_rounded_half_away_from_nought() -> None:
    master = masters()
    master = master[master.abs() < 1e38]
    weight, _ = split(master)
    below = master.view(torch.int32) & 0xFFFF
    tie = below == 0x8000
    assert int(tie.sum()) >= 4
    # As torch rounds, but for ties, which torch rounds to even.
    assert torch.equal(weight[~tie], master[~tie].bfloat16())
    upper = master[tie].view(torch.int32) >> 16
    assert torch.equal(weight[tie].view(torch.int16).int(), upper + 1)


def test_transformer_engines_kernel_is_followed_by_hand() -> None:
    """-1.00390625 is 0xBF808000: the lower half is negative, so the weight is 0xBF81."""
    weight, remainder = split(torch.tensor([-1.00390625, 1.001953125, -0.0]))
    assert weight.view(torch.int16).tolist() == [0xBF81 - 2**16, 0x3F80, -(2**15)]
    assert remainder.tolist() == [-(2**15), 0x4000, 0]
