"""A step: what it reads and minimises, what the ranks tell one another of it, what is checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from tanren.config.errors import WorkError
from tanren.data.blend import Batch
from tanren.engine.checkpoint import TrainingState
from tanren.engine.timing import StepTimer


@dataclass(frozen=True)
class Work:
    """What a run has done up to some iteration: tokens read, and FLOP of the model for them.

    `predicted` are those of the tokens that went through the output layer.
    """

    tokens: int
    flops: float
    predicted: int


class Feed(Protocol):
    """What is read, step by step, cut into this rank's micro batches."""

    @property
    def shape(self) -> tuple[int, int]:
        """Sequence length and micro batch that pass between pipeline stages."""

    def batches(self, first: int, last: int, *, workers: int) -> Iterator[Batch]:
        """The micro batches of the iterations from `first` (done before) to `last`."""

    def accumulation(self, iteration: int) -> int:
        """Micro batches of a rank in the step behind this iteration; the same on every rank."""

    def work(self, iteration: int) -> Work:
        """What the first iterations are together."""


@dataclass(frozen=True)
class Objective:
    """What a stage minimises.

    `forward_step` takes one micro batch through this rank's part of the model, as megatron-core's
    schedules ask, and its loss function reports `width` sums. `means` turns the sums over a global
    batch into what is logged, with `loss` among it. `check_first` is given the sums before the
    first update of a run.
    """

    forward_step: Callable[[Iterator[Batch], torch.nn.Module], tuple[torch.Tensor, Any]]
    width: int
    means: Callable[[list[float]], dict[str, float]]
    # Of the means, those that a line of the log has.
    shown: tuple[str, ...] = ("loss",)
    check_first: Callable[[list[float]], None] | None = None


@dataclass(frozen=True)
class Budget:
    """How long to train, and the samples of a step, by which the schedule counts.

    `data_start` is the iteration that the data begins at.
    """

    steps: int
    global_batch: int
    data_start: int = 0


@dataclass(frozen=True)
class Total:
    """Of a step, what the ranks told one another.

    `sums` are the reports of the global batch; `stop` and `late` whether any rank was asked to
    stop, or finds a checkpoint late; `forward` each rank's milliseconds of a forward pass
    (`StepTimer`).
    """

    sums: list[float]
    stop: bool
    late: bool
    forward: list[float]


def run_pass(
    state: TrainingState,
    objective: Objective,
    feed: Feed,
    data: Iterator[Batch],
    iteration: int,
    *,
    forward_only: bool = False,
    timer: StepTimer | None = None,
) -> list[torch.Tensor]:
    """The micro batches of one step, forwards and backwards: what each reported."""
    sequence_length, micro_batch = feed.shape
    reports: list[torch.Tensor] = get_forward_backward_func()(
        forward_step_func=timer.forward(objective.forward_step)
        if timer
        else objective.forward_step,
        data_iterator=data,
        model=[state.model],
        num_microbatches=feed.accumulation(iteration),
        seq_length=sequence_length,
        micro_batch_size=micro_batch,
        forward_only=forward_only,
    )
    return reports


def totals(
    reports: list[torch.Tensor], width: int, device: torch.device, *, stop: bool = False,
    late: bool = False, forward: float = 0.0,
) -> Total:  # fmt: skip
    """What the ranks have to tell one another of a step, in one reduction."""
    first = width + 2
    total = torch.zeros(first + dist.get_world_size(), dtype=torch.float64, device=device)
    # The last pipeline stage has the losses; its tensor-parallel ranks have them alike.
    if reports and parallel_state.get_tensor_model_parallel_rank() == 0:
        total[:width] = torch.stack(reports).double().sum(0)
    total[width], total[width + 1] = float(stop), float(late)
    total[first + dist.get_rank()] = forward
    dist.all_reduce(total)
    found: list[float] = total.tolist()
    return Total(found[:width], found[width] > 0, found[width + 1] > 0, found[first:])


def check_before(iteration: int, objective: Objective, total: Total) -> None:
    """Look at a step's loss before its update; every rank has the same, so all stop alike.

    Raises:
        WorkError: it is not a number, or not what the objective expects of the first step.
    """
    loss = objective.means(total.sums)["loss"]
    if not math.isfinite(loss):
        raise WorkError(
            f"step {iteration + 1}",
            f"the loss is {loss}",
            "the last checkpoint is from before; lower optimizer.lr or look at the data",
        )
    if iteration == 0 and objective.check_first is not None:
        objective.check_first(total.sums)


def check_after(iteration: int, grad_norm: float) -> None:
    """Look at the gradient norm of an update, which is the same on every rank.

    Raises:
        WorkError: it is not a number. The weights are spoilt then and must not be saved; bf16 has
            no loss scaler that would skip the step.
    """
    if not math.isfinite(grad_norm):
        raise WorkError(
            f"step {iteration + 1}",
            f"the gradient norm is {grad_norm}",
            "the last checkpoint is from before; lower optimizer.lr or look at the data",
        )
