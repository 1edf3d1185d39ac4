"""Tuning on preferences: base + pairs of answers → checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.utils import unwrap_model

from tanren import runs
from tanren.config.errors import WorkError
from tanren.config.training import Preference, by_nemo
from tanren.data.blend import Batch
from tanren.data.rows import Items, Pairs
from tanren.engine import flash4, preference, products
from tanren.engine.checkpoint import TrainingState
from tanren.engine.fingerprint import fingerprint
from tanren.engine.packed import packed_forward
from tanren.engine.step import Objective
from tanren.plan.plan import DpoPlan, digest
from tanren.stages import synthetic, training, tuning
from tanren.stages.reference import Kept, LogProbs, Reference
from tanren.stages.training import Session
from tanren.stages.tuning import Data

logger = logging.getLogger("tanren")
# By how much the first loss may be off that of a policy that is its reference.
_TOLERANCE = 1e-3


def run(plan: DpoPlan, attempt: int) -> None:
    """Train, or go on training, until the last step or a signal."""
    session = training.begin(plan, attempt)
    data = tuning.read(plan, session.ranks)
    recipe, device = plan.recipe, session.ranks.device
    train = _pairs(data, data.items, recipe.global_batch, recipe.epochs)
    steps = tuning.lay_out(plan, data, train, session.ranks)
    compared = recipe.preference.loss != "simpo"

    def begin(state: TrainingState) -> tuning.Work | None:
        read = data
        if not compared or plan.made_up:
            training.start(plan, state)
            if compared:
                read = data.with_reference(synthetic.reference(plan, data.examples.trained))
        else:
            reference = _reference(session, data, state)
            if reference is None:
                return None
            read = data.with_reference(reference)
        return tuning.Work(
            Objective(
                partial(forward_step, recipe.preference),
                width=len(preference.REPORT),
                means=partial(preference.means, recipe.preference),
                shown=("loss", "margin", "accuracy"),
                check_first=_check_first if compared and not plan.made_up else None,
            ),
            read.feed(train, device),
            tuning.held_out(
                plan,
                read,
                lambda items, a_step: read.feed(_pairs(read, items, a_step, 1.0), device),
            ),
        )

    tuning.train(session, steps, begin)


def _pairs(data: Data, items: Items, a_step: int, epochs: float | None) -> Pairs:
    recipe, batch = data.plan.recipe, data.plan.batch
    return Pairs(
        data.examples.lengths, items, width=recipe.row_length, a_step=a_step,
        seed=recipe.seed, epochs=epochs, together=batch.data_parallel * batch.micro_batch,
    )  # fmt: skip


def _reference(session: Session, data: Data, state: TrainingState) -> LogProbs | None:
    """The base's log-probabilities of every pair, and the state ready to train.

    None, and the run marked as stopped, if it was asked to stop.
    """
    plan, ranks = session.plan, session.ranks
    choice = data.examples.choice
    used = np.concatenate(
        [*(start + own for start, own in zip(data.examples.samples, choice.used, strict=False)),
         data.dev]
    )  # fmt: skip
    said = runs.read_json(plan.folder.examples) or {}
    begun = runs.latest_checkpoint(plan.folder) is not None
    reference = None
    if begun and "base" in said:
        # It knows the weights that it began from, and what was computed with them.
        reference = Reference(_kept(data, said["base"], state), ranks.device)
    if reference is None or len(reference.missing(used)):
        training.load_start(plan, state)
        base = fingerprint(state.model)
        reference = Reference(_kept(data, base, state), ranks.device)
        whole = reference.fill(
            state, used,
            lambda a_step, pairs: _laid_out(data, a_step, pairs, ranks.device), session.stop,
        )  # fmt: skip
        if ranks.is_first:
            runs.write_json(plan.folder.examples, said | {"base": base})
        if not whole:
            if ranks.is_first:
                reason = session.stop.reason or "another rank"
                logger.info("stopped by %s; what was computed is kept", reason)
                runs.mark_stopped(plan.folder, reason, 0)
            return None
        training.resume(plan, state)
    else:
        training.start(plan, state)
    return reference.values


def _laid_out(data: Data, a_step: int, pairs: Any, device: torch.device) -> tuple[Pairs, Any]:
    rows = _pairs(data, lambda epoch: pairs, a_step, 1.0)
    return rows, data.feed(rows, device)


def _kept(data: Data, base: str, state: TrainingState) -> list[Kept]:
    """Where the log-probabilities of each set are, by what they depend on."""
    plan = data.plan
    cut = plan.recipe.sequence_length if plan.recipe.too_long == "truncate" else None
    # A policy is compared with what its own engine and kernels made of the reference.
    by = ["nemo"] if by_nemo(plan.recipe) else []
    if not by:
        model = unwrap_model(state.model)
        kernels = {flash4.PACKAGE, products.PACKAGE}
        by = [one for one in (model.attention, model.products) if one in kernels]
    found = []
    for one in data.examples.choice.sets:
        key = digest([one.folder.name, base, plan.precision, plan.recipe.fp8, cut, *by])
        found.append(Kept(Path(plan.cache) / "reference" / f"{key}.npy", len(one.lengths)))
    return found


def forward_step(
    settings: Preference, data: Iterator[Batch], model: torch.nn.Module
) -> tuple[torch.Tensor, Any]:
    """One packed micro batch through this rank's part of the model."""
    batch = next(data)
    return packed_forward(batch, model), partial(_loss, settings, batch)


def _loss(
    settings: Preference, batch: Batch, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    log_probs, lengths = preference.answer_log_probs(
        losses, batch["weights"], batch["examples"], len(batch["numbers"])
    )
    return preference.preference_loss(
        settings, log_probs, lengths, batch.get("reference"), batch["rewards"], batch["present"]
    )


def _check_first(sums: list[float]) -> None:
    """Refuse to go on where the policy is not its reference before the first update.

    Raises:
        WorkError: with both losses.
    """
    of = dict(zip(preference.REPORT, sums, strict=True))
    loss, expected = of["loss"] / of["pairs"], of["loss_at_zero"] / of["pairs"]
    # ipo's, with a beta of 0.1, is 25.
    if abs(loss - expected) <= _TOLERANCE * max(1.0, expected):
        return
    raise WorkError(
        "step 1",
        f"the loss is {loss:.5f}, and a policy that is its own reference has "
        f"{expected:.5f}: the reference's log-probabilities are not those of this base",
        "remove the folder cache/reference beside the run, and the same command computes them "
        "again; if it stays, say so: the engine does not compute alike",
    )
