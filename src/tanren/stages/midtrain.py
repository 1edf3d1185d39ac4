"""Continued pre-training: base + mix → checkpoints."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch
import torch.distributed as dist

from tanren import runs
from tanren.config.errors import RequestError
from tanren.convert import hf
from tanren.data import blend, indexed
from tanren.data import tokenizer as tokenizers
from tanren.engine import distributed, loop
from tanren.engine import model as models
from tanren.engine.checkpoint import Saver, TrainingState, load, load_base
from tanren.engine.log import Metrics
from tanren.engine.optimizer import build_optimizer, build_schedule
from tanren.plan.checks import check_vocabulary
from tanren.plan.paths import RunFolder
from tanren.plan.plan import MidtrainPlan, digest
from tanren.stages.convert import check_tokenizers, convert_base

logger = logging.getLogger("tanren")


def run(plan: MidtrainPlan, attempt: int) -> None:
    """Train, or go on training, until the last step or a signal."""
    folder = plan.folder
    deadline = os.environ.get("TANREN_DEADLINE")
    stop = loop.StopRequest(
        # One rank asks the file system; the others hear of it with the loss.
        folder.stop if os.environ.get("RANK", "0") == "0" else None,
        float(deadline) if deadline else None,
    )
    stop.install()
    ranks = distributed.initialize(plan.recipe.layout, plan.launch.device, plan.recipe.seed)
    _describe(plan, ranks)
    data = _data(plan)
    state = _state(plan)
    _start(plan, state, folder)

    metrics = Metrics(folder.metrics, folder.tensorboard, attempt=attempt, enabled=ranks.is_first)
    settings = plan.recipe.checkpoints
    saver = Saver(folder, keep_last=settings.keep_last, reshard=settings.reshard)
    outcome = loop.train(
        state,
        data.train,
        _held_out(plan, data),
        loop.Budget(
            steps=plan.batch.steps,
            sequence_length=plan.recipe.sequence_length,
            global_batch=plan.recipe.global_batch,
            micro_batch=plan.batch.micro_batch,
            accumulation=plan.batch.accumulation,
            flops_per_token=plan.model.flops_per_token(plan.recipe.sequence_length),
            data_start=plan.data_start,
        ),
        device=ranks.device,
        saver=saver,
        save_every=settings.every_steps,
        metrics=metrics,
        stop=stop,
        workers=2 if ranks.device.type == "cuda" else 0,
        hang_seconds=plan.recipe.job.hang_minutes * 60,
    )
    metrics.close()
    if ranks.is_first:
        _close(plan, folder, outcome)
    distributed.finalize()


def _describe(plan: MidtrainPlan, ranks: distributed.Ranks) -> None:
    layout, batch = plan.recipe.layout, plan.batch
    logger.info(
        "%.2f B parameters on %d x %s: tensor %d, pipeline %d, context %d, data %d; %s, fp8 %s; "
        "%d steps of %d x %d tokens",
        plan.model.parameters / 1e9, ranks.world, ranks.device.type, layout.tensor,
        layout.pipeline, layout.context, batch.data_parallel, plan.precision, plan.recipe.fp8,
        batch.steps, plan.recipe.global_batch, plan.recipe.sequence_length,
    )  # fmt: skip


def _data(plan: MidtrainPlan) -> blend.Blend:
    """Check the token files and lay out the samples of the present mix, to the run's end."""
    assert plan.mix is not None
    for source in plan.mix.sources:
        counts = indexed.check(Path(source.prefix))
        if counts.tokens != source.tokens:
            raise RequestError(
                f"{source.prefix}.idx",
                f"counts {counts.tokens} tokens, the plan {source.tokens}",
                "the data was made again since: run the stage under a new NAME=",
            )
    tokenizer = tokenizers.read(RunFolder(Path(plan.data)).tokenizer)
    check_vocabulary(plan.recipe_file, plan.model, tokenizer.size, tokenizer.folder)
    if plan.hf_source is not None and dist.get_rank() == 0:
        base = hf.locate(plan.hf_source) if plan.start.startswith("hf:") else Path(plan.hf_source)
        check_tokenizers(base, str(tokenizer.folder), plan.recipe_file)
    evaluation = plan.recipe.evaluation
    return blend.build(
        plan.mix.sources,
        split=plan.recipe.split,
        sequence_length=plan.recipe.sequence_length,
        train_samples=(plan.batch.steps - plan.data_start) * plan.recipe.global_batch,
        held_out_samples=evaluation.sequences if evaluation else 0,
        seed=plan.recipe.seed,
        tokenizer=blend.DatasetTokenizer(tokenizer.size, tokenizer.eod),
        cache=plan.folder.index_cache,
        data=str(plan.settings["inputs"]["data"]),
    )


def _state(plan: MidtrainPlan) -> TrainingState:
    recipe = plan.recipe
    config = models.transformer_config(
        plan.model,
        recipe.layout,
        precision=plan.precision,
        fp8=recipe.fp8,
    )
    model = models.wrap_for_training(models.build(plan.model, config, recipe.z_loss))
    optimizer = build_optimizer(recipe.optimizer, model, precision=plan.precision)
    schedule = build_schedule(
        recipe.schedule, recipe.optimizer, optimizer,
        steps=plan.batch.steps, global_batch=recipe.global_batch,
    )  # fmt: skip
    return TrainingState(model, optimizer, schedule, plan.model)


def _start(plan: MidtrainPlan, state: TrainingState, folder: RunFolder) -> None:
    """Go on from the newest checkpoint of this run, else from its base, else from scratch."""
    # Iteration 0 is the base of a run that starts from a Hugging Face folder.
    newest = runs.latest_checkpoint(folder)
    if newest:
        logger.info("going on from %s", folder.checkpoint(newest))
        load(state, folder.checkpoint(newest))
        if plan.data_start:
            logger.info(
                "the present data began at iteration %d; %d of its samples are read",
                plan.data_start,
                (newest - plan.data_start) * plan.recipe.global_batch,
            )
        return
    kind, _, where = plan.start.partition(":")
    if kind == "scratch":
        logger.info("starting from random weights, as the recipe says (init: scratch)")
    else:
        checkpoint = _converted(plan, folder, where) if kind == "hf" else Path(where)
        if not (checkpoint / ".metadata").exists():
            raise RequestError(
                f"{plan.recipe_file}: init",
                f"{checkpoint} is not a torch_dist checkpoint",
                "name the folder that holds .metadata and metadata.json, such as .../iter_0000500",
            )
        problem = runs.checkpoint_problem(checkpoint, foreign=True)
        if problem:
            raise RequestError(checkpoint, problem, "make the base again, or fetch it again")
        logger.info("starting from %s", checkpoint)
        load_base(state.model, checkpoint, plan.recipe_file)
    # The optimizer keeps fp32 copies of the weights: take those that were just loaded.
    state.optimizer.reload_model_params()


def _converted(plan: MidtrainPlan, folder: RunFolder, source: str) -> Path:
    """The base of `init: hf:` as this run's iteration 0, converted by the first rank."""
    checkpoint = folder.checkpoint(0)
    if dist.get_rank() == 0 and not checkpoint.exists():
        convert_base(hf.locate(source), plan.model, checkpoint, plan.recipe_file)
    dist.barrier()
    return checkpoint


def _held_out(plan: MidtrainPlan, data: blend.Blend) -> loop.HeldOut | None:
    evaluation = plan.recipe.evaluation
    if evaluation is None or data.held_out is None:
        return None
    return loop.HeldOut(data.held_out, evaluation.sequences, evaluation.every_steps)


def _close(plan: MidtrainPlan, folder: RunFolder, outcome: loop.Outcome) -> None:
    if outcome.stopped is not None:
        logger.info("stopped by %s after step %d, saved", outcome.stopped, outcome.iteration)
        runs.mark_stopped(folder, outcome.stopped, outcome.iteration)
        return
    losses = runs.curve(folder.metrics, "loss")
    measured = runs.curve(folder.metrics, "held_out_loss")
    # Of the present data alone: losses on other documents say nothing beside these.
    held_out = {step: loss for step, loss in measured.items() if step >= plan.data_start}
    runs.mark_done(
        folder,
        {
            "identity": digest([plan.settings, losses[outcome.iteration]]),
            "iteration": outcome.iteration,
            "hf": plan.hf_source,
            "tokenizer": str(RunFolder(Path(plan.data)).tokenizer),
            "model": plan.model.model_dump(mode="json"),
            "loss": [losses[min(losses)], losses[max(losses)]],
            "held_out_loss": [held_out[min(held_out)], held_out[max(held_out)]]
            if held_out
            else None,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        },
    )
