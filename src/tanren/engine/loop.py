"""The training loop: megatron-core's schedule, one global batch a step, saved and measured."""

from __future__ import annotations

import faulthandler
import gc
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from torch.autograd.profiler import record_function

from tanren.config.errors import WorkError
from tanren.data.blend import Batch
from tanren.engine import timing
from tanren.engine.checkpoint import TrainingState
from tanren.engine.log import Metrics
from tanren.engine.saver import Saver
from tanren.engine.step import (
    Budget,
    Feed,
    Objective,
    Total,
    check_after,
    check_before,
    run_pass,
    totals,
)
from tanren.engine.stop import Rhythm, StopRequest
from tanren.engine.timing import StepTimer

logger = logging.getLogger("tanren")


@dataclass(frozen=True)
class HeldOut:
    """What the model is measured on, as one step, and how often."""

    feed: Feed
    every_steps: int | None


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended. `stopped` names the signal that ended it early.

    `in_steps` is the share of the time from the first step's begin to the end that steps took;
    saves and evaluations take the rest.
    """

    iteration: int
    stopped: str | None
    in_steps: float


@contextmanager
def _collecting_by_hand() -> Iterator[None]:
    """Collections of garbage at random moments make ranks wait for one another: the loop asks for
    them. None need go through what is there before, all that torch and megatron-core import.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


@_collecting_by_hand()
def train(
    state: TrainingState,
    objective: Objective,
    feed: Feed,
    held_out: HeldOut | None,
    budget: Budget,
    *,
    device: torch.device,
    saver: Saver,
    rhythm: Rhythm,
    metrics: Metrics,
    stop: StopRequest,
    workers: int = 0,
    hang_seconds: float = 1800.0,
    around: Callable[[int], AbstractContextManager[None]] | None = None,
) -> Outcome:
    """Train from `state.iteration` to `budget.steps`, or until asked to stop.

    Args:
        hang_seconds: a step that takes longer, its evaluation and save included, ends the process
            with the stacks of its threads on stderr. When one rank hangs the others wait for it in
            a collective, so that every rank's stacks come into the log.
        around: given the number of a step, from 1, gives what that step runs in.
    Raises:
        WorkError: the loss is not a number; the last checkpoint stays as it is.
    """
    _connect(state)
    timer, ranks = StepTimer(device), timing.Ranks(device)
    data = timer.batches(
        feed.batches(
            state.iteration - budget.data_start, budget.steps - budget.data_start, workers=workers
        )
    )
    # What is held out is the present data's: a new mix is measured where it begins.
    if held_out and state.iteration == budget.data_start:
        measure(state, objective, held_out, device, metrics)
        timing.startup.reached("held-out")
    state.model.train()
    saved = state.iteration
    wall = timing.startup.end()
    try:
        while state.iteration < budget.steps:
            faulthandler.dump_traceback_later(hang_seconds, exit=True)
            began = time.perf_counter()
            rate = float(state.optimizer.param_groups[0]["lr"])
            try:
                with around(state.iteration + 1) if around else nullcontext():
                    means, grad_norm, total = _step(
                        state, objective, feed, data, budget, device, stop, saver, rhythm, timer
                    )
            except WorkError:
                # Every rank is here alike: the checkpoint that is being written is still whole.
                saver.close()
                raise
            state.iteration += 1
            seconds = time.perf_counter() - began
            wall.add(seconds)
            timed = {
                "data_seconds": round(timer.data_seconds, 4),
                **ranks.look(state.iteration, total.forward),
            }
            record(
                state, objective, feed, budget, metrics, means, rate, grad_norm, seconds, device,
                timed,
            )  # fmt: skip
            saver.poll()
            if held_out and held_out.every_steps and state.iteration % held_out.every_steps == 0:
                measure(state, objective, held_out, device, metrics)
            if (
                rhythm.due(state.iteration, total.late)
                or state.iteration == budget.steps
                or total.stop
            ):
                saver.save(state)
                saved, rhythm.since = state.iteration, time.monotonic()
            if state.iteration % 50 == 0:
                gc.collect()
            if total.stop:
                break
        saver.close()
    except BaseException:
        saver.abort()
        raise
    finally:
        faulthandler.cancel_dump_traceback_later()
    assert saved == state.iteration
    if state.iteration < budget.steps:
        return Outcome(state.iteration, stop.reason or "another rank", wall.share())
    if held_out and not (held_out.every_steps and budget.steps % held_out.every_steps == 0):
        measure(state, objective, held_out, device, metrics)
    return Outcome(state.iteration, None, wall.share())


def _connect(state: TrainingState) -> None:
    """Tell megatron-core's schedule what the optimizer and the gradient buffers do in a step."""
    config = state.model.config
    config.grad_scale_func = state.optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    if state.model.ddp_config.overlap_grad_reduce:
        config.no_sync_func = state.model.no_sync
    if state.model.ddp_config.overlap_param_gather:
        config.param_sync_func = state.model.start_param_sync


def _step(
    state: TrainingState,
    objective: Objective,
    feed: Feed,
    data: Iterator[Batch],
    budget: Budget,
    device: torch.device,
    stop: StopRequest,
    saver: Saver,
    rhythm: Rhythm,
    timer: StepTimer,
) -> tuple[dict[str, float], float, Total]:
    """One optimizer step: its means, its gradient norm, and what all ranks said in it."""
    timer.begin_step()
    with record_function(timing.OPTIMIZER):
        state.model.zero_grad_buffer()
        state.optimizer.zero_grad()
    reports = run_pass(
        state, objective, feed, data, state.iteration - budget.data_start, timer=timer
    )
    total = totals(
        reports, objective.width, device, stop=stop.reason is not None, late=rhythm.late,
        forward=timer.forward_milliseconds(),
    )  # fmt: skip
    means = objective.means(total.sums)
    check_before(state.iteration, objective, total)
    saver.before_update()
    with record_function(timing.OPTIMIZER):
        _, grad_norm, _ = state.optimizer.step()
    check_after(state.iteration, float(grad_norm))
    state.schedule.step(increment=budget.global_batch)
    return means, float(grad_norm), total


def evaluate(
    state: TrainingState, objective: Objective, feed: Feed, device: torch.device
) -> dict[str, float]:
    """The objective's means over a feed of one step, the same in every layout."""
    data = feed.batches(0, 1, workers=0)
    state.model.eval()
    with torch.no_grad():
        reports = run_pass(state, objective, feed, data, 0, forward_only=True)
    state.model.train()
    return objective.means(totals(reports, objective.width, device).sums)


def measure(
    state: TrainingState,
    objective: Objective,
    held_out: HeldOut,
    device: torch.device,
    metrics: Metrics,
) -> None:
    """Evaluate on what is held out, and write it down; every rank calls this."""
    means = evaluate(state, objective, held_out.feed, device)
    metrics.write(state.iteration, {f"held_out_{name}": value for name, value in means.items()})
    if dist.get_rank() == 0:
        logger.info("step %d: held-out %s", state.iteration, _in_words(objective, means))


def _in_words(objective: Objective, means: dict[str, float]) -> str:
    return "  ".join(
        f"{name.replace('_', ' ')} {means[name]:.4f}" for name in objective.shown if name in means
    )


def record(
    state: TrainingState,
    objective: Objective,
    feed: Feed,
    budget: Budget,
    metrics: Metrics,
    means: dict[str, float],
    rate: float,
    grad_norm: float,
    seconds: float,
    device: torch.device,
    timed: dict[str, Any],
) -> None:
    """Write down a step that was done, as a line of metrics and one of the log."""
    if dist.get_rank() != 0:
        return
    read = state.iteration - budget.data_start
    before, after = feed.work(read - 1), feed.work(read)
    tokens = after.tokens - before.tokens
    values: dict[str, Any] = {
        **means,
        "lr": rate,
        "grad_norm": grad_norm,
        "tokens": after.tokens,
        "seconds": round(seconds, 4),
        "tokens_per_second": round(tokens / seconds, 1),
        **timed,
    }
    if device.type == "cuda":
        gpus = dist.get_world_size()
        values |= {
            "tokens_per_second_per_gpu": round(tokens / seconds / gpus, 1),
            "tflops_per_gpu": round((after.flops - before.flops) / seconds / gpus / 1e12, 1),
            "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        }
    metrics.write(state.iteration, values)
    logger.info(
        "step %d/%d  %s  lr %.3g  grad norm %.3f  %.0f tokens/s",
        state.iteration,
        budget.steps,
        _in_words(objective, means),
        rate,
        grad_norm,
        values["tokens_per_second"],
    )
