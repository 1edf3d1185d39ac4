"""The reference's log-probabilities of a preference run: computed once, kept, read ever after.

They are kept by what they depend on: the tokens, the weights, the precision. So no run keeps a
second model, and every epoch, resume and run from the same base reads the same numbers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from tanren import runs
from tanren.data.blend import Batch
from tanren.data.packing import Numbers
from tanren.data.rows import Pairs
from tanren.engine.checkpoint import TrainingState
from tanren.engine.packed import packed_forward
from tanren.engine.preference import answer_log_probs
from tanren.engine.step import Objective, run_pass
from tanren.engine.stop import StopRequest
from tanren.stages.feed import RowFeed

logger = logging.getLogger("tanren")
LogProbs = npt.NDArray[np.float64]
# Pairs of a rank between two looks at whether to stop.
_PAIRS_AT_A_TIME = 64
# What was computed in so many seconds is what a kill can take away.
_WRITE_SECONDS = 30.0


@dataclass(frozen=True)
class Kept:
    """A file with a log-probability for each example of a set; NaN where it is not known."""

    path: Path
    examples: int

    def read(self) -> LogProbs:
        """What is known by now."""
        if not self.path.exists():
            return np.full(self.examples, np.nan)
        values: LogProbs = np.load(self.path, allow_pickle=False)
        assert values.shape == (self.examples,), self.path
        return values

    def add(self, values: LogProbs) -> None:
        """Keep what is known here beside what another run has found meanwhile."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        known = np.where(np.isnan(values), self.read(), values)
        half = self.path.with_name(f".{runs.unique()}.{self.path.name}")
        np.save(half, known, allow_pickle=False)
        half.replace(self.path)


class Reference:
    """The log-probabilities of all sets, example after example."""

    def __init__(self, kept: Sequence[Kept], device: torch.device) -> None:
        """Read what is kept; every rank calls this, and one reads."""
        self.kept, self.device = kept, device
        self.starts = np.cumsum([0, *(one.examples for one in kept)])
        self.values = np.full(self.starts[-1], np.nan)
        if dist.get_rank() == 0:
            self.values = np.concatenate([one.read() for one in kept])
        shared = torch.from_numpy(self.values).to(device)
        dist.broadcast(shared, 0)
        self.values = shared.cpu().numpy()

    def missing(self, pairs: Numbers) -> Numbers:
        """Those of the pairs that lack a number."""
        known = np.isfinite(self.values.reshape(-1, 2).sum(1))
        missing: Numbers = pairs[~known[pairs]]
        return missing

    def fill(
        self,
        state: TrainingState,
        pairs: Numbers,
        feed_of: Callable[[int, Numbers], tuple[Pairs, RowFeed]],
        stop: StopRequest,
    ) -> bool:
        """Compute what is missing of the pairs with the model as it is; every rank calls this.

        Args:
            feed_of: given pairs a step, and pairs, lays them out and reads them.
        Returns:
            whether all are there; not so if the run was asked to stop.
        """
        missing = self.missing(pairs)
        if not len(missing):
            logger.info("the reference's log-probabilities of %d pairs are there", len(pairs))
            return True
        ranks = parallel_state.get_data_parallel_world_size()
        layout, feed = feed_of(_PAIRS_AT_A_TIME * ranks, missing)
        logger.info("computing the reference's log-probabilities of %d pairs", len(missing))
        data = feed.batches(0, layout.steps, workers=0)
        began = written = time.monotonic()
        state.model.eval()
        for step in range(layout.steps):
            with torch.no_grad():
                reports = run_pass(state, OBJECTIVE, feed, data, step, forward_only=True)
            stopping = self._take(reports, np.concatenate(layout.rows(step)), stop)
            last = step + 1 == layout.steps
            if last or stopping or time.monotonic() - written > _WRITE_SECONDS:
                written = time.monotonic()
                self._write()
                logger.info("%d of %d pairs in %.0f s", len(missing) - len(self.missing(missing)),
                            len(missing), written - began)  # fmt: skip
            if stopping and not last:
                return False
        state.model.train()
        return True

    def _take(self, reports: list[torch.Tensor], examples: Numbers, stop: StopRequest) -> bool:
        """Exchange what the ranks found of these examples, and whether any is to stop."""
        place = np.empty(len(self.values), dtype=np.int64)
        place[examples] = np.arange(len(examples))
        found = torch.zeros(len(examples) + 1, dtype=torch.float64, device=self.device)
        # The last pipeline stage has the losses; its tensor-parallel ranks have them alike.
        if reports and parallel_state.get_tensor_model_parallel_rank() == 0:
            numbers, sums = torch.cat(reports, dim=1)
            there = (numbers >= 0).cpu().numpy()
            at = torch.from_numpy(place[numbers.long().cpu().numpy()[there]]).to(self.device)
            found[at] = sums[numbers >= 0]
        found[-1] = float(stop.reason is not None)
        dist.all_reduce(found)
        *values, stops = found.tolist()
        self.values[examples] = values
        return bool(stops)

    def _write(self) -> None:
        if dist.get_rank() == 0:
            for one, first in zip(self.kept, self.starts[:-1], strict=True):
                one.add(self.values[first : first + one.examples])


def _report(batch: Batch, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers and log-probabilities of a micro batch's examples, as what the pass reports."""
    numbers = batch["numbers"]
    sums, lengths = answer_log_probs(losses, batch["weights"], batch["examples"], len(numbers))
    return losses.sum(), lengths.sum().int(), torch.stack([numbers.double(), sums])


def forward_step(data: Iterator[Batch], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    """One micro batch through this rank's part of the model."""
    batch = next(data)
    return packed_forward(batch, model), partial(_report, batch)


def _nothing(totals: list[float]) -> dict[str, float]:
    raise AssertionError("a reference pass has no means")


OBJECTIVE = Objective(forward_step, width=0, means=_nothing)
