"""Supervised fine-tuning: base + conversations → checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from tanren.data.blend import Batch
from tanren.data.rows import Conversations, Items
from tanren.engine.checkpoint import TrainingState
from tanren.engine.loss import answer_loss
from tanren.engine.packed import packed_forward
from tanren.engine.step import Objective
from tanren.plan.plan import SftPlan
from tanren.stages import training, tuning


def run(plan: SftPlan, attempt: int) -> None:
    """Train, or go on training, until the last step or a signal."""
    session = training.begin(plan, attempt)
    data = tuning.read(plan, session.ranks)
    recipe, device = plan.recipe, session.ranks.device

    def rows(items: Items, a_step: int, epochs: float | None) -> Conversations:
        return Conversations(
            data.examples.lengths, items, width=recipe.row_length, a_step=a_step,
            seed=recipe.seed, packing=recipe.packing, epochs=epochs,
        )  # fmt: skip

    train = rows(data.items, recipe.global_batch, recipe.epochs)
    steps = tuning.lay_out(plan, data, train, session.ranks)

    def begin(state: TrainingState) -> tuning.Work:
        training.start(plan, state)
        return tuning.Work(
            Objective(forward_step, width=2, means=_means),
            data.feed(train, device),
            tuning.held_out(
                plan, data, lambda items, a_step: data.feed(rows(items, a_step, 1.0), device)
            ),
        )

    tuning.train(session, steps, begin)


def forward_step(data: Iterator[Batch], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    """One packed micro batch through this rank's part of the model."""
    batch = next(data)
    output = packed_forward(batch, model, batch["weights"])
    return output, partial(answer_loss, batch["weights"])


def _means(sums: list[float]) -> dict[str, float]:
    """The mean over the answers' tokens of the global batch, in nats."""
    loss, tokens = sums
    return {"loss": loss / tokens}
