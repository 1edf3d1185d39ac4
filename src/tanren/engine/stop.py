"""When a training is to stop, and when it is to be saved."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass, field
from pathlib import Path


class StopRequest:
    """Remembers that the process was asked to stop; the loop saves and ends after the step."""

    def __init__(self, file: Path | None = None, deadline: float | None = None) -> None:
        """Watch a file that asks for a stop, and a time (seconds since 1970) to stop at."""
        self.file, self.deadline = file, deadline
        self.signal: str | None = None

    @property
    def reason(self) -> str | None:
        """Why to stop; None while there is no reason."""
        if self.signal is not None:
            return self.signal
        if self.deadline is not None and time.time() > self.deadline:
            return "the end of its walltime"
        if self.file is not None and self.file.exists():
            return "request (STOP)"
        return None

    def install(self) -> None:
        """Take SIGTERM, SIGINT and SIGUSR1 (a scheduler's warning) as requests to stop."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._take)

    def _take(self, number: int, frame: object) -> None:
        self.signal = signal.Signals(number).name


@dataclass
class Rhythm:
    """How often a checkpoint is saved: every so many steps, or minutes after the last one."""

    steps: int | None
    minutes: float | None = None
    since: float = field(default_factory=time.monotonic)

    @property
    def late(self) -> bool:
        """Whether the minutes are over, by this rank's clock. The first to say so decides for all:
        it goes round with the loss.
        """
        return self.minutes is not None and time.monotonic() - self.since > 60 * self.minutes

    def due(self, iteration: int, late: bool) -> bool:
        """Whether to save after this iteration; `late`: some rank's clock says so."""
        return late or (self.steps is not None and iteration % self.steps == 0)
