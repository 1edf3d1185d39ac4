"""Where a training's time goes, measured while it trains: its start, its steps, its slowest rank.

Nothing here waits for a GPU or asks other ranks for anything that the loop does not ask anyway.
"""

from __future__ import annotations

import logging
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.autograd.profiler import record_function

logger = logging.getLogger("tanren")
# A rank is slow from this ratio to the median of its stage on, and worth a word after so many
# steps in a row; the next word comes after so many more.
SLOW, SLOW_STEPS, QUIET_STEPS = 1.05, 3, 100
# What of a step a profile can tell apart by these names (torch.profiler.record_function).
DATA, OPTIMIZER = "tanren.data", "tanren.optimizer"


class Startup:
    """What the seconds before the first step went into, phase after phase."""

    def __init__(self) -> None:
        # The time since the process began is taken once, from a clock that may be set; what
        # follows is counted by one that may not.
        before = time.time() - psutil.Process().create_time()
        self._began = time.perf_counter() - max(before, 0.0)
        self._last = self._began
        self.phases: dict[str, float] = {}

    def reached(self, phase: str) -> None:
        """The phase that ends here took the time since the last call."""
        now = time.perf_counter()
        self.phases[phase] = self.phases.get(phase, 0.0) + now - self._last
        self._last = now

    @property
    def seconds(self) -> float:
        return self._last - self._began

    def end(self) -> Wall:
        """The first step begins: say what came before it, and count from here."""
        self.reached("rest")
        if dist.get_rank() == 0:
            phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.phases.items())
            logger.info("%.1f s from the process's start to the first step: %s",
                        self.seconds, phases)  # fmt: skip
        return Wall()


# A process starts once.
startup = Startup()


class Wall:
    """Which share of the time since its begin was spent in steps."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._steps = 0.0

    def add(self, seconds: float) -> None:
        self._steps += seconds

    def share(self) -> float:
        """Between 0 and 1; 0 before the first step."""
        return self._steps / max(time.perf_counter() - self._began, 1e-9)


class _Marks:
    """Begins and ends of work on the device: events on a GPU, the clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._free: list[Any] = []

    def now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event: Any = self._free.pop() if self._free else None
        if event is None:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def between(self, begin: Any, end: Any) -> float:
        """Milliseconds. Events go back to be used again, and must have happened by now."""
        if not self.on_gpu:
            return 1e3 * float(end - begin)
        milliseconds = float(begin.elapsed_time(end))
        self._free += [begin, end]
        return milliseconds


class StepTimer:
    """Times what a rank does in a step: how long it waits for data, and its forward passes.

    A forward pass counts from the moment its batch is there. The first one of a step is left out:
    it waits for parameters that other ranks send.
    """

    def __init__(self, device: torch.device) -> None:
        self._marks = _Marks(device)
        self._begin: Any = None
        self._pairs: list[tuple[Any, Any]] = []
        self._before: list[tuple[Any, Any]] = []
        self._passes = 0
        self.data_seconds = 0.0

    def batches(self, data: Iterator[Any]) -> Iterator[Any]:
        """The same batches, waited for under the clock."""
        while True:
            began = time.perf_counter()
            with record_function(DATA):
                batch = next(data, None)
            self.data_seconds += time.perf_counter() - began
            if batch is None:
                return
            if self._passes:
                self._begin = self._marks.now()
            yield batch

    def forward(self, forward_step: Callable[..., Any]) -> Callable[..., Any]:
        """The same forward step, under the clock; see `Objective.forward_step`."""

        def timed(data: Iterator[Any], model: torch.nn.Module) -> Any:
            result = forward_step(data, model)
            if self._begin is not None:
                self._pairs.append((self._begin, self._marks.now()))
            self._begin = None
            self._passes += 1
            return result

        return timed

    def begin_step(self) -> None:
        self.data_seconds, self._passes, self._begin = 0.0, 0, None

    def forward_milliseconds(self) -> float:
        """The median forward pass of the step before this one; 0 where none was timed.

        Called once a step. Of the step before, since its work on the GPU is done for sure.
        """
        found = [self._marks.between(begin, end) for begin, end in self._before]
        self._before, self._pairs = self._pairs, []
        return statistics.median(found) if found else 0.0


@dataclass(frozen=True)
class Slowest:
    """The rank whose forward passes are the slowest beside the median of its pipeline stage's."""

    rank: int
    over_median: float


def slowest(milliseconds: Sequence[float], stages: Sequence[int]) -> Slowest | None:
    """Find the slowest rank, by the time of its forward passes.

    Of an even number of ranks the lower median is taken: of two, the slow one is compared with the
    fast one.

    Args:
        milliseconds: [ranks], 0 where a rank has timed nothing.
        stages: [ranks], the pipeline stage of each.
    Returns:
        None where no stage has two ranks that timed something.
    """
    found: list[Slowest] = []
    for stage in set(stages):
        timed = [
            (value, rank)
            for rank, (value, own) in enumerate(zip(milliseconds, stages, strict=True))
            if own == stage and value > 0
        ]
        if len(timed) > 1:
            worst, rank = max(timed)
            found.append(Slowest(rank, worst / statistics.median_low(v for v, _ in timed)))
    return max(found, key=lambda one: one.over_median, default=None)


class SlowRank:
    """Says when the same rank is slow for some steps in a row, and does not say it too often."""

    def __init__(self) -> None:
        self._rank, self._steps, self._said = -1, 0, -QUIET_STEPS

    def look(self, step: int, found: Slowest | None) -> bool:
        """Whether this step is the one to warn at."""
        slow = found is not None and found.over_median > SLOW
        if found is None or not slow:
            self._rank, self._steps = -1, 0
            return False
        self._steps = self._steps + 1 if found.rank == self._rank else 1
        self._rank = found.rank
        if self._steps < SLOW_STEPS or step - self._said < QUIET_STEPS:
            return False
        self._said = step
        return True


class Ranks:
    """Watches the forward times of all ranks; where each runs is asked for once."""

    def __init__(self, device: torch.device) -> None:
        """Every rank calls this at the same time."""
        world = dist.get_world_size()
        pipeline = parallel_state.get_pipeline_model_parallel_world_size()
        # megatron-core lays pipeline stages outermost (tp-cp-ep-dp-pp).
        self._stages = [rank // (world // pipeline) for rank in range(world)]
        here = (socket.gethostname(), os.environ.get("LOCAL_RANK", "0"))
        self._places: list[Any] = [None] * world
        dist.all_gather_object(self._places, here)
        # Processes that share a CPU's cores slow one another down: that is worth no word.
        self._on_gpu = device.type == "cuda"
        self._slow = SlowRank()

    def look(self, step: int, milliseconds: Sequence[float]) -> dict[str, Any]:
        """What metrics.jsonl says of the slowest rank; a warning where it stays slow."""
        found = slowest(milliseconds, self._stages)
        if found is None:
            return {}
        if self._on_gpu and self._slow.look(step, found) and dist.get_rank() == 0:
            host, gpu = self._places[found.rank]
            logger.warning(
                "rank %d (%s, local GPU %s) is slow: a forward pass takes it %.1f ms, %.0f %% over "
                "the median of its stage",
                found.rank, host, gpu, milliseconds[found.rank], 100 * (found.over_median - 1),
            )  # fmt: skip
        return {
            "slowest_rank": found.rank,
            "slowest_over_median": round(found.over_median, 4),
        }
