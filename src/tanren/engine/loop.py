"""The training loop: megatron-core's schedule, one global batch a step, saved and measured."""

from __future__ import annotations

import faulthandler
import gc
import logging
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_batch_on_this_cp_rank
from torch.utils.data import Dataset

from tanren.config.errors import WorkError
from tanren.data.blend import Batch, MicroBatches, batches
from tanren.engine.checkpoint import Saver, TrainingState
from tanren.engine.log import Metrics
from tanren.engine.loss import token_loss

logger = logging.getLogger("tanren")


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


@dataclass(frozen=True)
class Budget:
    """How long to train, how the global batch is cut, and the iteration that the data begins at."""

    steps: int
    sequence_length: int
    global_batch: int
    micro_batch: int
    accumulation: int
    flops_per_token: float
    data_start: int = 0


@dataclass(frozen=True)
class HeldOut:
    """What the model is measured on and how often."""

    dataset: Dataset[Batch]
    sequences: int
    every_steps: int | None


@dataclass(frozen=True)
class Means:
    """What the ranks found together: means over the tokens that counted, in nats."""

    loss: float
    # None without z-loss.
    z_loss: float | None
    # Whether any rank was asked to stop.
    stop: bool


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended. `stopped` names the signal that ended it early."""

    iteration: int
    stopped: str | None


def forward_step(data: Iterator[Batch], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    """One micro batch through this rank's part of the model, as megatron-core's schedules ask."""
    batch = get_batch_on_this_cp_rank(next(data))
    output = model(
        batch["tokens"], batch["position_ids"], attention_mask=None, labels=batch["labels"]
    )
    return output, partial(token_loss, batch["loss_mask"])


def train(
    state: TrainingState,
    dataset: Dataset[Batch],
    held_out: HeldOut | None,
    budget: Budget,
    *,
    device: torch.device,
    saver: Saver,
    save_every: int,
    metrics: Metrics,
    stop: StopRequest,
    workers: int = 0,
    hang_seconds: float = 1800.0,
) -> Outcome:
    """Train from `state.iteration` to `budget.steps`, or until asked to stop.

    Args:
        hang_seconds: a step that takes longer, its evaluation and save included, ends the process
            with the stacks of its threads on stderr. When one rank hangs the others wait for it in
            a collective, so that every rank's stacks come into the log.
    Raises:
        WorkError: the loss is not a number; the last checkpoint stays as it is.
    """
    config = state.model.config
    config.grad_scale_func = state.optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    if state.model.ddp_config.overlap_grad_reduce:
        config.no_sync_func = state.model.no_sync
    if state.model.ddp_config.overlap_param_gather:
        config.param_sync_func = state.model.start_param_sync
    data = batches(
        dataset,
        MicroBatches(
            first=(state.iteration - budget.data_start) * budget.global_batch,
            last=(budget.steps - budget.data_start) * budget.global_batch,
            micro_batch=budget.micro_batch,
            data_rank=parallel_state.get_data_parallel_rank(),
            data_size=parallel_state.get_data_parallel_world_size(),
        ),
        workers=workers,
        device=device,
    )
    # What is held out is the present data's: a new mix is measured where it begins.
    if held_out and state.iteration == budget.data_start:
        _measure(state, held_out, budget, device, metrics)
    state.model.train()
    # Collections at random moments make ranks wait for one another; a fixed rhythm does not.
    gc.collect()
    gc.disable()
    saved = state.iteration
    try:
        while state.iteration < budget.steps:
            faulthandler.dump_traceback_later(hang_seconds, exit=True)
            began = time.perf_counter()
            rate = float(state.optimizer.param_groups[0]["lr"])
            try:
                means, grad_norm = _step(state, data, budget, device, stop)
            except WorkError:
                # Every rank is here alike: the checkpoint that is being written is still whole.
                saver.close()
                raise
            state.iteration += 1
            seconds = time.perf_counter() - began
            _record(state, budget, metrics, means, rate, grad_norm, seconds, device)
            saver.poll()
            if held_out and held_out.every_steps and state.iteration % held_out.every_steps == 0:
                _measure(state, held_out, budget, device, metrics)
            if state.iteration % save_every == 0 or state.iteration == budget.steps or means.stop:
                saved = _save(state, saver, metrics)
            if state.iteration % 50 == 0:
                gc.collect()
            if means.stop:
                break
        saver.close()
    except BaseException:
        saver.abort()
        raise
    finally:
        faulthandler.cancel_dump_traceback_later()
        gc.enable()
    assert saved == state.iteration
    if state.iteration < budget.steps:
        return Outcome(state.iteration, stop.reason or "another rank")
    if held_out and not (held_out.every_steps and budget.steps % held_out.every_steps == 0):
        _measure(state, held_out, budget, device, metrics)
    return Outcome(state.iteration, None)


def _save(state: TrainingState, saver: Saver, metrics: Metrics) -> int:
    """Begin a checkpoint, note how long that blocked training, and return its iteration."""
    began = time.perf_counter()
    saver.save(state)
    blocked = round(time.perf_counter() - began, 3)
    metrics.write(state.iteration, {"save_blocked_seconds": blocked})
    return state.iteration


def _step(
    state: TrainingState,
    data: Iterator[Batch],
    budget: Budget,
    device: torch.device,
    stop: StopRequest,
) -> tuple[Means, float]:
    """One optimizer step: its losses and its gradient norm."""
    state.model.zero_grad_buffer()
    state.optimizer.zero_grad()
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=data,
        model=[state.model],
        num_microbatches=budget.accumulation,
        seq_length=budget.sequence_length,
        micro_batch_size=budget.micro_batch,
        forward_only=False,
    )
    means = _means(reports, device, stop.reason is not None)
    if not math.isfinite(means.loss):
        # Every rank has the same loss here, so every rank stops, and before the update.
        raise WorkError(
            f"step {state.iteration + 1}",
            f"the loss is {means.loss}",
            "the last checkpoint is from before; lower optimizer.lr or look at the data",
        )
    _, grad_norm, _ = state.optimizer.step()
    if not math.isfinite(grad_norm):
        # The weights are spoilt by now, so they must not be saved. The norm is the same on every
        # rank; bf16 has no loss scaler that would skip the step.
        raise WorkError(
            f"step {state.iteration + 1}",
            f"the gradient norm is {grad_norm}",
            "the last checkpoint is from before; lower optimizer.lr or look at the data",
        )
    state.schedule.step(increment=budget.global_batch)
    return means, float(grad_norm)


def _means(reports: list[torch.Tensor], device: torch.device, stop: bool) -> Means:
    """The losses over the global batch, and whether any rank was asked to stop, in one reduction.

    Args:
        reports: of each micro batch, as `token_loss` makes them.
    """
    total = torch.zeros(4, dtype=torch.float64, device=device)
    # The last pipeline stage has the losses; its tensor-parallel ranks have them alike.
    if reports and parallel_state.get_tensor_model_parallel_rank() == 0:
        total[:3] = torch.stack(reports).double().sum(0)
    total[3] = float(stop)
    dist.all_reduce(total)
    loss, tokens, z_loss, stops = total.tolist()
    # log²Z is never nought to the last bit, so that nought is what no z-loss reports.
    return Means(loss / tokens, z_loss / tokens or None, stops > 0)


def evaluate(
    model: DistributedDataParallel, held_out: HeldOut, budget: Budget, device: torch.device
) -> float:
    """Mean loss in nats a token over the first held-out sequences, the same in every layout."""
    ranks = parallel_state.get_data_parallel_world_size()
    data = batches(
        held_out.dataset,
        MicroBatches(
            first=0,
            last=held_out.sequences,
            micro_batch=budget.micro_batch,
            data_rank=parallel_state.get_data_parallel_rank(),
            data_size=ranks,
        ),
        workers=0,
        device=device,
    )
    model.eval()
    with torch.no_grad():
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=data,
            model=[model],
            num_microbatches=held_out.sequences // (budget.micro_batch * ranks),
            seq_length=budget.sequence_length,
            micro_batch_size=budget.micro_batch,
            forward_only=True,
        )
    model.train()
    return _means(reports, device, stop=False).loss


def _measure(
    state: TrainingState, held_out: HeldOut, budget: Budget, device: torch.device, metrics: Metrics
) -> None:
    loss = evaluate(state.model, held_out, budget, device)
    metrics.write(state.iteration, {"held_out_loss": loss})
    if dist.get_rank() == 0:
        logger.info("step %d: held-out loss %.4f", state.iteration, loss)


def _record(
    state: TrainingState,
    budget: Budget,
    metrics: Metrics,
    means: Means,
    rate: float,
    grad_norm: float,
    seconds: float,
    device: torch.device,
) -> None:
    if dist.get_rank() != 0:
        return
    tokens = budget.global_batch * budget.sequence_length
    values: dict[str, Any] = {
        "loss": means.loss,
        "lr": rate,
        "grad_norm": grad_norm,
        "tokens": state.iteration * tokens,
        "seconds": round(seconds, 4),
        "tokens_per_second": round(tokens / seconds, 1),
    }
    z_loss = ""
    if means.z_loss is not None:
        values["z_loss"] = means.z_loss
        z_loss = f"  z-loss {means.z_loss:.4f}"
    if device.type == "cuda":
        per_gpu = tokens / seconds / dist.get_world_size()
        values |= {
            "tokens_per_second_per_gpu": round(per_gpu, 1),
            "tflops_per_gpu": round(per_gpu * budget.flops_per_token / 1e12, 1),
            "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        }
    metrics.write(state.iteration, values)
    logger.info(
        "step %d/%d  loss %.4f%s  lr %.3g  grad norm %.3f  %.0f tokens/s",
        state.iteration,
        budget.steps,
        means.loss,
        z_loss,
        rate,
        grad_norm,
        values["tokens_per_second"],
    )
