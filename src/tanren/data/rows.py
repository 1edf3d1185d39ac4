"""Which examples a step trains on, and in which rows: a function of the seed and the step alone.

So a run that was interrupted reads on where it stopped, and another number of ranks reads the same
rows in the same steps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import ceil

import numpy as np

from tanren.data.packing import Bins, Numbers, best_fit, evened

# The items of an epoch; their order does not matter.
Items = Callable[[int], Numbers]


class Conversations:
    """Rows of packed conversations, drawn anew each epoch, so many a step."""

    def __init__(
        self, lengths: Numbers, items: Items, *, width: int, a_step: int, seed: int,
        packing: bool = True, epochs: float | None = None,
    ) -> None:  # fmt: skip
        """Lay out rows.

        Args:
            lengths: [examples], of each one as the model's input.
            items: the examples of an epoch, by their numbers.
            packing: without it each row holds one example.
            epochs: where the rows end; without it they never do.
        """
        self.lengths, self.items, self.width, self.a_step = lengths, items, width, a_step
        self.seed, self.packing = seed, packing
        # Where each epoch's rows begin, as far as it is known.
        self._starts = [0]
        self._epoch = lru_cache(maxsize=2)(self._lay_out)
        self.last = None if epochs is None else self._rows_of(epochs)

    @property
    def steps(self) -> int:
        """Steps until the rows end; the last one may have fewer."""
        assert self.last is not None
        return -(-self.last // self.a_step)

    def epochs(self, steps: int) -> float:
        """How often so many steps read the data, were each epoch as many rows as the first."""
        return steps * self.a_step / len(self._epoch(0))

    def rows(self, step: int) -> list[Numbers]:
        """The examples of each row of a step, from 0."""
        first, last = step * self.a_step, (step + 1) * self.a_step
        if self.last is not None:
            last = min(last, self.last)
        return [self._row(number) for number in range(first, last)]

    def _row(self, number: int) -> Numbers:
        while self._starts[-1] <= number:
            self._starts.append(self._starts[-1] + len(self._epoch(len(self._starts) - 1)))
        epoch = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self._epoch(epoch)[number - self._starts[epoch]]

    def _rows_of(self, epochs: float) -> int:
        whole = int(epochs)
        rows = sum(len(self._epoch(epoch)) for epoch in range(whole))
        part = epochs - whole
        return rows + (ceil(part * len(self._epoch(whole))) if part else 0)

    def _lay_out(self, epoch: int) -> Bins:
        generator = np.random.default_rng([self.seed, epoch])
        items = generator.permutation(self.items(epoch))
        if not self.packing:
            return Bins(items, np.arange(len(items) + 1))
        bins = best_fit(self.lengths[items], self.width)
        # The fullest bins come first out of it, and those with the longest examples.
        order = generator.permutation(len(bins))
        sizes = np.diff(bins.starts)[order]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        within = np.arange(len(items)) - np.repeat(starts[:-1], sizes)
        return Bins(items[bins.items[np.repeat(bins.starts[:-1][order], sizes) + within]], starts)


class Pairs:
    """Pairs of a chosen and a rejected answer, so many a step, each step's packed into rows.

    Pair p has the examples 2p and 2p + 1, which stand side by side in one row.
    """

    def __init__(
        self, lengths: Numbers, items: Items, *, width: int, a_step: int, seed: int,
        epochs: float | None = None, together: int = 1,
    ) -> None:  # fmt: skip
        """Lay out pairs.

        Args:
            lengths: [examples], of each one as the model's input.
            items: the pairs of an epoch, by their numbers.
            epochs: where the pairs end; without it they never do.
            together: rows that are read at a time; a step's pairs are spread evenly over a
                multiple of it. The pairs of a step do not depend on it.
        """
        self.lengths, self.together = lengths.reshape(-1, 2).sum(1), together
        self.width = width
        alone = Conversations(
            self.lengths, items, width=width, a_step=a_step, seed=seed, packing=False, epochs=epochs
        )
        self._alone = alone

    @property
    def steps(self) -> int:
        """Steps until the pairs end; the last one may have fewer."""
        return self._alone.steps

    def epochs(self, steps: int) -> float:
        """How often so many steps read the pairs."""
        return self._alone.epochs(steps)

    def rows(self, step: int) -> list[Numbers]:
        """The examples of each row of a step, from 0."""
        pairs = np.concatenate(self._alone.rows(step))
        lengths = self.lengths[pairs]
        bins = evened(lengths, best_fit(lengths, self.width), self.width, self.together)
        return [
            np.stack([2 * pairs[row], 2 * pairs[row] + 1], axis=1).ravel()
            for row in (bins[number] for number in range(len(bins)))
        ]
