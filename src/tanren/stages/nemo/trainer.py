"""A training by Lightning's Trainer with NeMo's MegatronStrategy, told as the engine's loop is."""

from __future__ import annotations

import faulthandler
import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import nemo.lightning as nl
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer
from nemo.lightning.pytorch.plugins import MegatronMixedPrecision
from nemo.lightning.pytorch.plugins.data_sampler import DataSampler
from nemo.utils import logging as nemo_logging

from tanren import runs
from tanren.data.blend import Batch
from tanren.engine import loop, timing
from tanren.engine.checkpoint import TrainingState
from tanren.engine.log import Metrics
from tanren.engine.optimizer import build_schedule, optimizer_config
from tanren.engine.step import Budget, Feed, Total, check_after, check_before, totals
from tanren.engine.stop import Rhythm
from tanren.plan.plan import TuningPlan
from tanren.stages import training
from tanren.stages.nemo.checkpoint import Checkpoints
from tanren.stages.nemo.model import Reduction, Tuned, training_config
from tanren.stages.training import Session
from tanren.stages.tuning import Work

logger = logging.getLogger("tanren")


class _StoppedBefore(Exception):  # noqa: N818
    """The run was asked to stop before its first step, and has said so."""


def train(
    session: Session,
    budget: Budget,
    begin: Callable[[TrainingState], Work | None],
    made: Callable[[], dict[str, Any]],
) -> None:
    """Train to the end or to a request to stop; see `tuning.train` and `training.train`."""
    plan = session.plan
    assert isinstance(plan, TuningPlan)
    if not os.environ.get("TANREN_DEBUG"):
        nemo_logging.setLevel(logging.ERROR)
        for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
            logging.getLogger(name).setLevel(logging.ERROR)
    timing.startup.reached("data")
    with training.written(session) as metrics:
        rows = Rows(budget, training.workers(session.ranks.device))
        steps = Steps(session, budget, begin, rows, metrics)
        # Iteration 0 is the base of a run that starts from a Hugging Face folder.
        newest = runs.latest_checkpoint(plan.folder)
        resumed = str(plan.folder.checkpoint(newest)) if newest else None
        if resumed:
            logger.info("going on from %s", resumed)
        try:
            trainer_of(session, budget, steps).fit(
                model_of(plan, steps), datamodule=rows, ckpt_path=resumed
            )
            training.close(session, steps.outcome(), budget, made)
        except _StoppedBefore:
            pass
        metrics.close()


def trainer_of(session: Session, budget: Budget, steps: Steps) -> nl.Trainer:
    """Lightning's Trainer with NeMo's strategy, without what a run folder has of its own."""
    plan, device = session.plan, session.ranks.device
    on_gpu, recipe = device.type == "cuda", plan.recipe
    in_fp32 = recipe.main_gradients != "bf16"
    overlap = on_gpu and plan.batch.data_parallel > 1
    bf16 = plan.precision == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    trainer = nl.Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=plan.launch.processes_per_node,
        num_nodes=plan.launch.nodes,
        strategy=nl.MegatronStrategy(
            ddp=DistributedDataParallelConfig(
                grad_reduce_in_fp32=in_fp32,
                use_distributed_optimizer=True,
                overlap_grad_reduce=overlap,
                overlap_param_gather=overlap,
                check_for_nan_in_grad=False,
            ),
            ckpt_async_save=False,
            ckpt_parallel_load=False,
            # So that it loads whatever the number of ranks is.
            ckpt_optim_fully_reshardable=True,
            use_gloo_process_groups=on_gpu,
            replace_progress_bar=False,
        ),
        plugins=[
            MegatronMixedPrecision(
                precision="bf16-mixed" if bf16 else "32",
                params_dtype=dtype,
                pipeline_dtype=dtype,
                autocast_enabled=False,
                grad_reduce_in_fp32=in_fp32,
            ),
            TorchElasticEnvironment() if "RANK" in os.environ else LightningEnvironment(),
        ],
        max_steps=budget.steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=str(plan.folder.root),
    )
    # NeMo's Trainer copies what it is given, which ours, with its lock, does not bear.
    trainer.callbacks.append(steps)
    return trainer


def model_of(plan: TuningPlan, steps: Steps) -> Tuned:
    """NeMo's model of a plan, with its optimizer; its weights come when training begins."""
    overlap = plan.launch.device == "cuda" and plan.batch.data_parallel > 1
    config = optimizer_config(
        plan.recipe.optimizer, precision=plan.precision, overlap_param_gather=overlap
    )
    model = Tuned(
        training_config(plan.model, plan.recipe.layout.recompute),
        optim=nl.MegatronOptimizerModule(config=config),
    )
    model.real_vocabulary = plan.model.vocabulary_size
    model.reduction = Reduction(steps.reduce)
    return model


class _Sampler(DataSampler):
    """Tells NeMo's step how many micro batches it has; they are dealt out already."""

    dataloader_type = "single"

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def setup(self, global_rank: int) -> None:
        """Nothing: the feed knows its rank."""

    def transform_dataloader(self, dataloader: Any, consumed_samples: int = 0) -> Any:
        """The same: a resumed run's feed begins where it stopped."""
        return dataloader

    def on_megatron_step_start(self, step: Any) -> Any:
        """NeMo's hook before the micro batches of a step."""
        feed, state = self.rows.feed, self.rows.state
        step.seq_length, step.micro_batch_size = feed.shape
        step.num_microbatches = feed.accumulation(state.iteration)
        return step


class Rows(pl.LightningDataModule):
    """The rows of the steps that are left, as micro batches of this rank."""

    def __init__(self, budget: Budget, workers: int) -> None:
        super().__init__()
        self.data_sampler = _Sampler(self)
        self.budget, self.workers = budget, workers
        # Set when training begins.
        self.state: TrainingState
        self.feed: Feed

    def train_dataloader(self) -> Any:
        """Lightning asks for it, and at once for its iterator, when it knows where it goes on."""
        first = self.state.iteration = self.trainer.global_step
        return _Once(lambda: self.feed.batches(first, self.budget.steps, workers=self.workers))


class _Once:
    """An iterable as Lightning wants it, that makes its iterator when it is asked for."""

    def __init__(self, make: Callable[[], Iterator[Batch]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Batch]:
        return self._make()


class Steps(pl.Callback):
    """What the engine's loop does around a step, as Lightning's hooks."""

    work: Work
    state: TrainingState
    wall: timing.Wall

    def __init__(
        self,
        session: Session,
        budget: Budget,
        begin: Callable[[TrainingState], Work | None],
        rows: Rows,
        metrics: Metrics,
    ) -> None:
        self.session, self.budget, self.begin = session, budget, begin
        self.rows, self.metrics = rows, metrics
        plan = session.plan
        assert isinstance(plan, TuningPlan)
        self.plan, self.device = plan, session.ranks.device
        settings = plan.recipe.checkpoints
        self.rhythm = Rhythm(settings.every_steps, settings.every_minutes)
        self.checkpoints = Checkpoints(plan)
        self.stopped: str | None = None
        self._total: Total | None = None
        self._began = self._rate = 0.0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The model is there, with random weights: begin from the base."""
        optimizer: MegatronOptimizer = trainer.optimizers[0].mcore_optimizer
        _with_multipliers(optimizer)
        recipe = self.plan.recipe
        schedule = build_schedule(
            recipe.schedule, recipe.optimizer, optimizer,
            steps=self.budget.steps, global_batch=recipe.global_batch,
        )  # fmt: skip
        model: Any = pl_module
        self.state = TrainingState(model, optimizer, schedule, self.plan.model)
        timing.startup.reached("model")
        work = self.begin(self.state)
        if work is None:
            raise _StoppedBefore
        self.work = work
        model.objective = work.objective
        self.rows.state, self.rows.feed = self.state, work.feed
        timing.startup.reached("base")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lightning has restored what there was to restore."""
        if trainer.global_step:
            self.state.schedule.step(increment=trainer.global_step * self.budget.global_batch)
        logger.info("%d steps of %d samples, by NeMo", self.budget.steps, self.budget.global_batch)
        held_out = self.work.held_out
        if held_out and self.state.iteration == 0:
            loop.measure(self.state, self.work.objective, held_out, self.device, self.metrics)
        # Lightning has put its own handlers in their place.
        self.session.stop.install()
        self.wall = timing.startup.end()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A step begins."""
        faulthandler.dump_traceback_later(self.plan.recipe.job.hang_minutes * 60, exit=True)
        self._began = time.perf_counter()
        self._rate = float(self.state.optimizer.param_groups[0]["lr"])

    def reduce(self, reports: list[torch.Tensor]) -> float:
        """What the ranks say of a step: its mean loss, of the whole global batch."""
        objective = self.work.objective
        self._total = totals(
            reports, objective.width, self.device,
            stop=self.session.stop.reason is not None, late=self.rhythm.late,
        )  # fmt: skip
        return objective.means(self._total.sums)["loss"]

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any
    ) -> None:
        """The gradients are there, the weights are as they were."""
        assert self._total is not None
        check_before(self.state.iteration, self.work.objective, self._total)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """A step is done: write it down, measure, save."""
        state, work, held_out, total = self.state, self.work, self.work.held_out, self._total
        assert total is not None
        grad_norm = float(trainer.callback_metrics["grad_norm"])
        check_after(state.iteration, grad_norm)
        state.schedule.step(increment=self.budget.global_batch)
        state.iteration += 1
        seconds = time.perf_counter() - self._began
        self.wall.add(seconds)
        loop.record(
            state, work.objective, work.feed, self.budget, self.metrics,
            work.objective.means(total.sums), self._rate, grad_norm, seconds, self.device, {},
        )  # fmt: skip
        if held_out and held_out.every_steps and state.iteration % held_out.every_steps == 0:
            loop.measure(state, work.objective, held_out, self.device, self.metrics)
        last = state.iteration == self.budget.steps
        due = self.rhythm.due(state.iteration, total.late) or last or total.stop
        if due and self.plan.bench is None:
            found = self.checkpoints.save(trainer, state.iteration)
            self.metrics.write(state.iteration, found)
            self.rhythm.since = time.monotonic()
        if total.stop and not last:
            self.stopped = self.session.stop.reason or "another rank"
            trainer.should_stop = True
        if (
            last
            and held_out
            and (not held_out.every_steps or self.budget.steps % held_out.every_steps)
        ):
            loop.measure(state, work.objective, held_out, self.device, self.metrics)
        faulthandler.cancel_dump_traceback_later()

    def outcome(self) -> loop.Outcome:
        """How the training ended."""
        return loop.Outcome(self.state.iteration, self.stopped, self.wall.share())


def _with_multipliers(optimizer: MegatronOptimizer) -> None:
    """Give each group back what its rate and decay are multiplied with.

    NeMo hides these from megatron-core's schedule, which it does not use: without them norms would
    be decayed.
    """
    for group in optimizer.param_groups:
        for kind in ("lr_mult", "wd_mult"):
            hidden = group.pop(f"pre_{kind}", None)
            if hidden is not None:
                group[kind] = hidden
