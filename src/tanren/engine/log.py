"""Metrics: one JSON line a step in metrics.jsonl, the same in TensorBoard, a plain line in the log.

Weights & Biases has them from metrics.jsonl, by a process of its own (tanren.tracking).

A tracker that fails is dropped with a warning; training does not wait for it or die of it.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from tanren import runs
from tanren.config.errors import WorkError
from tanren.tracking import Follower

logger = logging.getLogger("tanren")


class Metrics:
    """Writes the metrics of one attempt. Only the first rank has one that writes."""

    def __init__(
        self, path: Path, tensorboard: Path | None, *, attempt: int, enabled: bool,
        follower: Follower | None = None,
    ) -> None:  # fmt: skip
        self.path, self.attempt, self.enabled = path, attempt, enabled
        self._follower = follower
        self._board = _tensorboard(tensorboard) if enabled and tensorboard else None

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append the metrics of a step."""
        if not self.enabled:
            return
        line = {"step": step, **values, "attempt": self.attempt, "time": round(time.time(), 3)}
        try:
            runs.append_line(self.path, line)
        except OSError as error:
            raise WorkError(
                self.path,
                f"cannot be written: {error.strerror}",
                "make room and run the same command again: it goes on from the last checkpoint",
            ) from error
        if self._follower is not None:
            self._follower.look()
        if self._board is not None:
            try:
                for key, value in values.items():
                    if isinstance(value, int | float):
                        self._board.add_scalar(key, value, step)
            except Exception as error:  # any tracker's failure is the tracker's alone
                logger.warning("tensorboard is left out from here on: %s", error)
                self._board = None

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard.writer import SummaryWriter

        return SummaryWriter(str(folder))
    except Exception as error:  # not installed, or the disk is full: training goes on without
        logger.warning("tensorboard is left out: %s", error)
        return None
