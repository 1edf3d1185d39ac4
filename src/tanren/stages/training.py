"""What the stages that train share: how they begin, where they start from, how they end."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model

from tanren import runs, tracking
from tanren.config.errors import RequestError
from tanren.config.training import Lora, Tuning, by_nemo
from tanren.convert import hf, mcore, unpickle
from tanren.convert import lora as adapters_of
from tanren.engine import distributed, flash4, kernel_cache, loop, lora, products, timing
from tanren.engine import model as models
from tanren.engine.checkpoint import TrainingState, load, load_base
from tanren.engine.log import Metrics
from tanren.engine.optimizer import build_optimizer, build_schedule
from tanren.engine.profile import Rates
from tanren.engine.saver import Saver
from tanren.engine.step import Budget, Feed, Objective
from tanren.engine.stop import Rhythm, StopRequest
from tanren.plan.paths import CHECKPOINT_FILES
from tanren.plan.plan import TrainingPlan, digest
from tanren.stages import bench
from tanren.stages.convert import convert_base

logger = logging.getLogger("tanren")


@dataclass(frozen=True)
class Session:
    """One attempt of a training: its plan, its ranks, and how it is asked to stop."""

    plan: TrainingPlan
    attempt: int
    ranks: distributed.Ranks
    stop: StopRequest
    # Of a bench: what the device does at best.
    rates: Rates | None = None


def begin(plan: TrainingPlan, attempt: int) -> Session:
    """Join the process group, and listen to requests to stop."""
    timing.startup.reached("imports")
    deadline = os.environ.get("TANREN_DEADLINE")
    stop = StopRequest(
        # One rank asks the file system; the others hear of it with the loss.
        plan.folder.stop if os.environ.get("RANK", "0") == "0" else None,
        float(deadline) if deadline else None,
    )
    stop.install()
    recipe, layout = plan.recipe, plan.recipe.layout
    ranks = distributed.initialize(layout, plan.launch.device, recipe.seed)
    if ranks.device.type == "cuda":
        kernel_cache.keep(plan.folder.kernels)
    timing.startup.reached("process groups")
    logger.info(
        "%.2f B parameters on %d x %s: tensor %d, pipeline %d, context %d, data %d; %s, fp8 %s",
        plan.model.parameters / 1e9, ranks.world, ranks.device.type, layout.tensor,
        layout.pipeline, layout.context, plan.batch.data_parallel, plan.precision, recipe.fp8,
    )  # fmt: skip
    measured = plan.bench and not by_nemo(plan.recipe)
    rates = bench.rates_of(plan, ranks.device) if measured else None
    return Session(plan, attempt, ranks, stop, rates)


def make_state(plan: TrainingPlan, steps: int, z_loss: float = 0.0) -> TrainingState:
    """The model with random weights, its optimizer and its schedule."""
    timing.startup.reached("data")
    recipe = plan.recipe
    config = models.transformer_config(
        plan.model,
        recipe.layout,
        precision=plan.precision,
        fp8=recipe.fp8,
    )
    takes_flash4 = flash4.wanted(
        recipe.attention, plan.precision, plan.model, recipe.layout.context
    )
    if takes_flash4:
        logger.info("attention by %s %s", flash4.PACKAGE, flash4.VERSION)
    settings = _lora(plan)
    takes_quack = products.wanted(
        recipe.linear, plan.precision, recipe.fp8, plan.model, recipe.layout.tensor,
        lora=settings is not None,
    )  # fmt: skip
    if takes_quack:
        logger.info("products by %s %s", products.PACKAGE, products.VERSION)
    llama = models.build(plan.model, config, z_loss, flash4=takes_flash4, quack=takes_quack)
    if settings is not None:
        lora.add_adapters(llama, settings, seed=recipe.seed)
    model = models.wrap_for_training(llama, "bf16" if recipe.main_gradients == "bf16" else "fp32")
    optimizer = build_optimizer(recipe.optimizer, model, precision=plan.precision)
    schedule = build_schedule(
        recipe.schedule, recipe.optimizer, optimizer,
        steps=steps, global_batch=recipe.global_batch,
    )  # fmt: skip
    timing.startup.reached("model")
    return TrainingState(model, optimizer, schedule, plan.model)


def _lora(plan: TrainingPlan) -> Lora | None:
    return plan.recipe.lora if isinstance(plan.recipe, Tuning) else None


def start(plan: TrainingPlan, state: TrainingState) -> None:
    """Go on from the newest checkpoint of this run, else from its base, else from scratch."""
    if _lora(plan) is not None or runs.latest_checkpoint(plan.folder) in (None, 0):
        # A run's checkpoints hold its adapters alone.
        load_start(plan, state)
    resume(plan, state)


def resume(plan: TrainingPlan, state: TrainingState) -> bool:
    """Load the newest checkpoint of this run; False while it has none.

    Those of NeMo hold Lightning's loop, too, which loads them itself.
    """
    # Iteration 0 is the base of a run that starts from a Hugging Face folder.
    newest = runs.latest_checkpoint(plan.folder)
    if newest and not by_nemo(plan.recipe):
        logger.info("going on from %s", plan.folder.checkpoint(newest))
        load(state, plan.folder.checkpoint(newest))
    return bool(newest)


def load_start(plan: TrainingPlan, state: TrainingState) -> None:
    """Load the base."""
    if plan.start == "scratch":
        logger.info("starting from random weights, as the recipe says (init: scratch)")
    else:
        checkpoint = _base(plan)
        logger.info("starting from %s", checkpoint)
        load_base(state.model, checkpoint, plan.recipe_file)
    for adapters in map(Path, plan.adapters):
        logger.info("with the adapters of %s", adapters)
        settings = adapters_of.settings_of(adapters)
        assert settings is not None, adapters
        with mcore.open_checkpoint(adapters) as tensors:
            lora.fold(unwrap_model(state.model), tensors, settings)
    # The optimizer keeps fp32 copies of the weights: take those that were just loaded.
    state.optimizer.reload_model_params()


def _base(plan: TrainingPlan) -> Path:
    """The base as a checkpoint, made sure to be whole; that of a Hugging Face folder is made."""
    kind, _, where = plan.start.partition(":")
    checkpoint = _converted(plan, where) if kind == "hf" else Path(where)
    tensors, _ = mcore.weights_of(checkpoint)
    if not (tensors / ".metadata").exists():
        raise RequestError(
            f"{plan.recipe_file}: init",
            f"{checkpoint} is not a torch_dist checkpoint",
            "name the folder that holds .metadata and metadata.json, such as .../iter_0000500, or "
            "one of NeMo 2, which holds them in weights/",
        )
    listed = (checkpoint / CHECKPOINT_FILES).exists()
    problem = runs.checkpoint_problem(checkpoint if listed else tensors, foreign=True)
    if problem:
        raise RequestError(checkpoint, problem, "make the base again, or fetch it again")
    # megatron-core would run what these name.
    unpickle.load(tensors / "common.pt")
    unpickle.load_metadata(tensors / ".metadata")
    return checkpoint


def _converted(plan: TrainingPlan, source: str) -> Path:
    """The base of `init: hf:` as this run's iteration 0, converted by the first rank."""
    checkpoint = plan.folder.checkpoint(0)
    if dist.get_rank() == 0 and not checkpoint.exists():
        convert_base(hf.locate(source), plan.model, checkpoint, plan.recipe_file)
    dist.barrier()
    return checkpoint


@contextmanager
def written(session: Session) -> Iterator[Metrics]:
    """Where a training's metrics go; they are closed, and followed to their end, behind it."""
    plan, first = session.plan, session.ranks.is_first
    follower = tracking.follow(plan) if first else None
    yield Metrics(
        plan.folder.metrics, plan.folder.tensorboard, attempt=session.attempt, enabled=first,
        follower=follower,
    )  # fmt: skip
    distributed.finalize()
    # After the last word: the run is done whatever becomes of this.
    if follower is not None:
        follower.end()


def train(
    session: Session,
    state: TrainingState,
    objective: Objective,
    feed: Feed,
    held_out: loop.HeldOut | None,
    budget: Budget,
    made: Callable[[], dict[str, Any]],
) -> None:
    """Train to the end or to a request to stop, and write down how it ended.

    Args:
        made: what DONE says beside what all trainings say.
    """
    plan, ranks, settings = session.plan, session.ranks, session.plan.recipe.checkpoints
    timing.startup.reached("base")
    logger.info("%d steps of %d samples", budget.steps, budget.global_batch)
    measuring, kind = None, Saver
    if plan.bench is not None:
        assert session.rates is not None
        measuring = bench.Measuring(plan, plan.bench, state, feed, session.rates, ranks.device)
        kind = bench.saver_of(plan.bench)
    with written(session) as metrics:
        saver = kind(
            plan.folder,
            keep_last=settings.keep_last,
            keep_every=settings.keep_every,
            report=metrics.write,
        )
        saver.prepare(state)
        outcome = loop.train(
            state,
            objective,
            feed,
            held_out,
            budget,
            device=ranks.device,
            saver=saver,
            rhythm=Rhythm(settings.every_steps, settings.every_minutes),
            metrics=metrics,
            stop=session.stop,
            workers=workers(ranks.device),
            hang_seconds=plan.recipe.job.hang_minutes * 60,
            around=measuring.around if measuring else None,
        )
        metrics.close()
        if measuring is not None and outcome.stopped is None:
            measuring.write()
        close(session, outcome, budget, made)


def workers(device: torch.device) -> int:
    """Processes of a rank that read its data."""
    return 2 if device.type == "cuda" else 0


def close(
    session: Session,
    outcome: loop.Outcome,
    budget: Budget,
    made: Callable[[], dict[str, Any]],
) -> None:
    """Write down how a training ended: DONE or STOPPED; the first rank does it."""
    plan, folder = session.plan, session.plan.folder
    if not session.ranks.is_first:
        return
    if outcome.stopped is not None:
        logger.info("stopped by %s after step %d, saved", outcome.stopped, outcome.iteration)
        runs.mark_stopped(folder, outcome.stopped, outcome.iteration)
        return
    losses = runs.curve(folder.metrics, "loss")
    runs.mark_done(
        folder,
        {
            "identity": digest([plan.settings, losses[outcome.iteration]]),
            "iteration": outcome.iteration,
            "start": plan.start,
            "adapters": plan.adapters,
            "hf": plan.hf_source,
            "model": plan.model.model_dump(mode="json"),
            "loss": _ends(losses),
            "held_out": _held_out(plan, budget.data_start),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "start_seconds": round(timing.startup.seconds, 2),
            "in_steps": round(outcome.in_steps, 4),
            **made(),
        },
    )


def _held_out(plan: TrainingPlan, data_start: int) -> dict[str, list[float]]:
    """The first and the last value of each held-out metric.

    Of the present data alone: losses on other documents say nothing beside these.
    """
    found: dict[str, dict[int, float]] = {}
    for line in runs.read_lines(plan.folder.metrics):
        for key, value in line.items():
            if key.startswith("held_out_") and line["step"] >= data_start:
                found.setdefault(key.removeprefix("held_out_"), {})[line["step"]] = value
    return {name: _ends(curve) for name, curve in found.items()}


def _ends(curve: dict[int, float]) -> list[float]:
    return [curve[min(curve)], curve[max(curve)]]
