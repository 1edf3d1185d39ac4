"""Rows of examples as micro batches of this rank; see `step.Feed`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from math import ceil
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from torch.utils.data import Dataset

from tanren.config.model import Model
from tanren.data import packing
from tanren.data.blend import Batch, loader
from tanren.data.packing import Numbers
from tanren.data.rows import Conversations, Pairs
from tanren.engine.packed import schedule_shape
from tanren.engine.step import Work

# The examples of some rows, by their numbers, as one micro batch.
Collate = Callable[[list[Numbers]], Batch]


class _Rows(Dataset[Numbers]):
    """Row r of step s under the key (s, r). What a step has not is an empty row."""

    def __init__(self, rows: Callable[[int], list[Numbers]]) -> None:
        self.rows = rows

    def __getitem__(self, key: tuple[int, int]) -> Numbers:
        step, row = key
        known = self.rows(step)
        return known[row] if row < len(known) else np.empty(0, dtype=np.int64)


class RowFeed:
    """The rows of each step, dealt out to the data-parallel ranks."""

    def __init__(
        self, rows: Conversations | Pairs, collate: Collate, *, model: Model, micro_batch: int,
        device: torch.device, lengths: Numbers, trained: Numbers,
    ) -> None:  # fmt: skip
        """Deal out rows.

        Args:
            lengths: [examples], of each one as the model's input.
            trained: [examples], tokens of each one whose loss counts.
        """
        self.rows, self.collate, self.model = rows, collate, model
        self.micro_batch, self.device = micro_batch, device
        self.lengths, self.trained = lengths, trained
        # The sampler, the loop, the dataset and the count of tokens ask for the same steps.
        self._rows_of = lru_cache(maxsize=8)(rows.rows)
        self._work = [Work(0, 0.0, 0)]

    @property
    def shape(self) -> tuple[int, int]:
        return schedule_shape(self.micro_batch, self.rows.width)

    def batches(self, first: int, last: int, *, workers: int) -> Iterator[Batch]:
        """Packed micro batches; see `packing.collate`."""
        batches = loader(
            _Rows(self._rows_of), self._keys(first, last),
            workers=workers, device=self.device, collate=self.collate,
        )  # fmt: skip
        for batch in batches:
            yield packing.to_device(batch, self.device)

    def accumulation(self, iteration: int) -> int:
        a_round: int = self.micro_batch * parallel_state.get_data_parallel_world_size()
        return ceil(len(self._rows_of(iteration)) / a_round)

    def work(self, iteration: int) -> Work:
        while len(self._work) <= iteration:
            examples = np.concatenate(self._rows_of(len(self._work) - 1))
            lengths = self.lengths[examples]
            tokens, trained = int(lengths.sum()), int(self.trained[examples].sum())
            flops = self.model.flops(tokens, int((lengths**2).sum()), trained)
            before = self._work[-1]
            self._work.append(
                Work(before.tokens + tokens, before.flops + flops, before.predicted + trained)
            )
        return self._work[iteration]

    def _keys(self, first: int, last: int) -> Iterator[list[Any]]:
        rank = parallel_state.get_data_parallel_rank()
        ranks = parallel_state.get_data_parallel_world_size()
        for step in range(first, last):
            for turn in range(self.accumulation(step)):
                start = (turn * ranks + rank) * self.micro_batch
                yield [(step, row) for row in range(start, start + self.micro_batch)]
