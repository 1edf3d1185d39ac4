"""Examples of many lengths into rows of one width, and rows into micro batches."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

Numbers = npt.NDArray[np.int64]


class Example(Protocol):
    """A text to train on.

    As the model's input it takes one position less than it has tokens: the last token is only a
    label. That is its length for packing.
    """

    @property
    def tokens(self) -> npt.NDArray[np.int32]:
        """[n], two or more."""

    @property
    def trained(self) -> npt.NDArray[np.bool_]:
        """[n], true for a token whose loss counts: an answer's, or the one that ends it."""


@dataclass(frozen=True)
class Bins:
    """Numbers of items, bin after bin: bin b holds items[starts[b] : starts[b + 1]]."""

    items: Numbers
    starts: Numbers

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, number: int) -> Numbers:
        return self.items[self.starts[number] : self.starts[number + 1]]


def best_fit(lengths: npt.NDArray[Any], capacity: int) -> Bins:
    """Best-fit decreasing: the longest item first, each into the fullest bin that has room.

    It never takes more than 11/9 of the fewest bins, and a bit (Johnson et al., SIAM J. Comput.
    3(4), 1974). How many bins depends on the lengths alone. Items of one length are taken in the
    order given: who shuffles them first gets other bins, as many, and as full.

    What must stay together is one item of the summed length: of a preference, the chosen and the
    rejected answer.

    Args:
        lengths: [items], from 1 to the capacity.
    """
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    sizes, counts = np.unique(lengths, return_counts=True)
    assert not len(sizes) or 1 <= sizes[0] <= sizes[-1] <= capacity, (sizes[-1], capacity)
    # Bins of one room (free space) are alike, and a bin that took an item is then the fullest that
    # has room for the next of that length. So all items of a length go, as many as a bin takes,
    # into all bins of a room at once: the work is by the pairs of length and room, not by items.
    open_bins: dict[int, deque[Numbers]] = {}
    rooms = 0  # Bit r is set where there are bins of room r.
    bin_of = np.empty(len(order), dtype=np.int64)
    bins = first = 0
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        last = first + count
        while first < last:
            fitting = rooms >> size
            if fitting:
                room = size + (fitting & -fitting).bit_length() - 1
            else:
                room = capacity
                new = -(-(last - first) // (room // size))
                open_bins[room] = deque([np.arange(bins, bins + new)])
                rooms |= 1 << room
                bins += new
            alike = open_bins[room].popleft()
            each = min(room // size, last - first)
            taking = min(len(alike), (last - first) // each)
            bin_of[first : first + taking * each] = np.repeat(alike[:taking], each)
            first += taking * each
            if taking < len(alike):
                open_bins[room].appendleft(alike[taking:])
            if not open_bins[room]:
                rooms ^= 1 << room
            left = room - each * size
            if left:
                open_bins.setdefault(left, deque()).append(alike[:taking])
                rooms |= 1 << left
    starts = np.zeros(bins + 1, dtype=np.int64)
    np.cumsum(np.bincount(bin_of, minlength=bins), out=starts[1:])
    return Bins(order[np.argsort(bin_of, kind="stable")], starts)


def evened(lengths: npt.NDArray[Any], bins: Bins, capacity: int, multiple: int) -> Bins:
    """The items in as many bins as fill up a multiple, none of them much fuller than the others.

    Who works through bins in rounds, one a process, then has none that is nearly empty, and none to
    wait for. The longest item first, each into the emptiest bin (Graham, SIAM J. Appl. Math. 17(2),
    1969); where one would overflow, the bins stay as they are.

    Args:
        lengths: [items].
        bins: of these items.
        capacity: of a bin.
    """
    count = -(-len(bins) // multiple) * multiple
    heap = [(0, number) for number in range(count)]
    bin_of = np.empty(len(lengths), dtype=np.int64)
    for item in np.argsort(-lengths.astype(np.int64), kind="stable"):
        full, number = heap[0]
        heapq.heapreplace(heap, (full + int(lengths[item]), number))
        bin_of[item] = number
    if max(heap)[0] > capacity:
        return bins
    order = np.argsort(bin_of, kind="stable")
    starts = np.searchsorted(bin_of[order], np.arange(count + 1))
    return Bins(order, starts)


def trimmed(rows: Sequence[Sequence[Example]], width: int, multiple: int = 128) -> int:
    """The width that these rows need, rounded up, and no more than `width`."""
    longest = max(sum(len(one.tokens) - 1 for one in row) for row in rows)
    return min(-(-max(longest, 1) // multiple) * multiple, width)


def collate(rows: Sequence[Sequence[Example]], width: int) -> dict[str, torch.Tensor]:
    """One micro batch of packed rows, on the CPU.

    Args:
        rows: the examples of each row, none over the width together. A row may be empty: such
            rows fill up the last batch of an epoch.
    Returns:
        Positions are numbered over the rows, row x width + column.

        - tokens, position_ids: int64 [rows, width]. Positions restart with each example. What is
          left of a row behind its examples is padding (token 0), and a segment of its own.
        - cu_seqlens: int32 [segments + 1], where segments (examples and paddings) begin, and at
          last rows x width. None goes over a row's end.
        - max_seqlen: int32, the longest segment. See `to_device`.
        - positions: int64 [m], ascending, where the loss counts; targets: int64 [m], the token to
          predict there; weights: float32 [m], ones; examples: int64 [m], which example it belongs
          to, numbered over the micro batch (there are no more than segments, which is how long to
          make their sums without asking the GPU). Without any there is one with a weight of 0, so
          that no kernel meets an empty tensor.
    """
    tokens = np.zeros((len(rows), width), dtype=np.int64)
    position_ids = np.zeros((len(rows), width), dtype=np.int64)
    ends, number = [0], 0
    positions: list[Numbers] = []
    targets: list[Numbers] = []
    examples: list[Numbers] = []
    for row, packed in enumerate(rows):
        column = 0
        for example in packed:
            length = len(example.tokens) - 1
            assert len(example.trained) == length + 1 > 1, (row, length)
            assert column + length <= width, (row, column, length, width)
            tokens[row, column : column + length] = example.tokens[:-1]
            position_ids[row, column : column + length] = np.arange(length)
            counting = np.flatnonzero(example.trained[1:])
            positions.append(counting + ends[-1])
            targets.append(example.tokens[1:][counting].astype(np.int64))
            examples.append(np.full(len(counting), number))
            number, column = number + 1, column + length
            ends.append(row * width + column)
        if column < width:
            position_ids[row, column:] = np.arange(width - column)
            ends.append((row + 1) * width)
    counted = sum(map(len, positions))
    nothing = [] if counted else [np.zeros(1, dtype=np.int64)]

    def joined(parts: list[Numbers]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([*nothing, *parts]))

    return {
        "tokens": torch.from_numpy(tokens),
        "position_ids": torch.from_numpy(position_ids),
        "cu_seqlens": torch.tensor(ends, dtype=torch.int32),
        "max_seqlen": torch.tensor(max(np.diff(ends)), dtype=torch.int32),
        "positions": joined(positions),
        "targets": joined(targets),
        "weights": torch.ones(counted) if counted else torch.zeros(1),
        "examples": joined(examples),
    }


def to_device(batch: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """A micro batch on the device, but max_seqlen.

    That one says how many blocks to start: read from the GPU, it would be waited for.
    """
    return {
        name: value if name == "max_seqlen" else value.to(device, non_blocking=True)
        for name, value in batch.items()
    }
