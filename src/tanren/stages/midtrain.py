"""Continued pre-training: base + mix → checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import get_batch_on_this_cp_rank

from tanren.config.errors import RequestError
from tanren.convert import hf
from tanren.data import blend, indexed
from tanren.data import tokenizer as tokenizers
from tanren.engine import loop
from tanren.engine.loss import token_loss
from tanren.engine.step import Budget, Objective, Work
from tanren.plan.checks import check_vocabulary
from tanren.plan.paths import RunFolder
from tanren.plan.plan import MidtrainPlan
from tanren.stages import own_tokenizer, synthetic, training
from tanren.stages.convert import check_tokenizers

logger = logging.getLogger("tanren")


def run(plan: MidtrainPlan, attempt: int) -> None:
    """Train, or go on training, until the last step or a signal."""
    session = training.begin(plan, attempt)
    data = _data(plan)
    state = training.make_state(plan, plan.batch.steps, plan.recipe.z_loss)
    training.start(plan, state)
    if state.iteration and plan.data_start:
        logger.info(
            "the present data began at iteration %d; %d of its samples are read",
            plan.data_start,
            (state.iteration - plan.data_start) * plan.recipe.global_batch,
        )
    training.train(
        session,
        state,
        Objective(forward_step, width=3, means=_means, shown=("loss", "z_loss")),
        Samples(plan, data.train, plan.recipe.global_batch, session.ranks.device),
        _held_out(plan, data, session.ranks.device),
        Budget(plan.batch.steps, plan.recipe.global_batch, plan.data_start),
        lambda: {"tokenizer": str(plan.folder.tokenizer)},
    )


def _data(plan: MidtrainPlan) -> blend.Blend:
    """Lay out the samples of the present mix, to the run's end."""
    assert plan.mix is not None
    tokenizer = synthetic.tokens(plan) if plan.made_up else _tokens(plan)
    evaluation = plan.recipe.evaluation
    return blend.build(
        plan.mix.sources,
        split=plan.recipe.split,
        sequence_length=plan.recipe.sequence_length,
        train_samples=(plan.batch.steps - plan.data_start) * plan.recipe.global_batch,
        held_out_samples=evaluation.sequences if evaluation else 0,
        seed=plan.recipe.seed,
        tokenizer=tokenizer,
        cache=plan.folder.index_cache,
        data=str(plan.settings["inputs"]["data"]),
    )


def _tokens(plan: MidtrainPlan) -> blend.DatasetTokenizer:
    """Check the token files, and that they are made with the base's tokenizer."""
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
    if dist.get_rank() == 0:
        own_tokenizer.keep(plan, tokenizer.folder)
    return blend.DatasetTokenizer(tokenizer.size, tokenizer.eod)


def forward_step(data: Iterator[blend.Batch], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    """One micro batch through this rank's part of the model, as megatron-core's schedules ask."""
    batch = get_batch_on_this_cp_rank(next(data))
    output = model(
        batch["tokens"],
        batch["position_ids"],
        attention_mask=None,
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return output, partial(token_loss, batch["loss_mask"])


def _means(sums: list[float]) -> dict[str, float]:
    """Means over the tokens that counted, in nats, from what `token_loss` reports."""
    loss, tokens, z_loss = sums
    means = {"loss": loss / tokens}
    # log²Z is never nought to the last bit, so that nought is what no z-loss reports.
    if z_loss:
        means["z_loss"] = z_loss / tokens
    return means


@dataclass(frozen=True)
class Samples:
    """The samples of a blend, so many a step, in their order; see `step.Feed`."""

    plan: MidtrainPlan
    dataset: Any
    a_step: int
    device: torch.device

    @property
    def shape(self) -> tuple[int, int]:
        return self.plan.recipe.sequence_length, self.plan.batch.micro_batch

    def batches(self, first: int, last: int, *, workers: int) -> Iterator[blend.Batch]:
        """tokens, labels, loss_mask, position_ids, each [micro batch, sequence]."""
        sampler = blend.MicroBatches(
            first=first * self.a_step,
            last=last * self.a_step,
            micro_batch=self.plan.batch.micro_batch,
            data_rank=parallel_state.get_data_parallel_rank(),
            data_size=parallel_state.get_data_parallel_world_size(),
        )
        return blend.batches(self.dataset, sampler, workers=workers, device=self.device)

    def accumulation(self, iteration: int) -> int:
        return self.a_step // (self.plan.batch.micro_batch * self.plan.batch.data_parallel)

    def work(self, iteration: int) -> Work:
        length = self.plan.recipe.sequence_length
        tokens = (self.plan.data_start + iteration) * self.a_step * length
        return Work(tokens, tokens * self.plan.model.flops_per_token(length), tokens)


def _held_out(plan: MidtrainPlan, data: blend.Blend, device: torch.device) -> loop.HeldOut | None:
    evaluation = plan.recipe.evaluation
    if evaluation is None or data.held_out is None:
        return None
    feed = Samples(plan, data.held_out, evaluation.sequences, device)
    return loop.HeldOut(feed, evaluation.every_steps)
