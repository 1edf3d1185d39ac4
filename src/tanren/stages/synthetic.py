"""Made-up data for a bench: random tokens and conversations, read as real ones are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch.distributed as dist

from tanren.config.training import Tuning
from tanren.data import indexed
from tanren.data.blend import DatasetTokenizer
from tanren.data.examples import Tokenized
from tanren.data.packing import Numbers
from tanren.plan.bench import DOCUMENT_TOKENS
from tanren.plan.plan import MidtrainPlan, TuningPlan

# Of GSM8K's conversations in llm-jp's v4 tokenizer: 7,473, of 202 tokens in the mean, some four
# times as long; a little over half of the tokens are the answer's.
_SAMPLES, _MEAN, _SPREAD = 7473, 202.0, 0.5
_SHORTEST = 16


def tokens(plan: MidtrainPlan) -> DatasetTokenizer:
    """Write the plan's sources as random tokens; the first rank does, every rank calls this."""
    assert plan.mix is not None
    if dist.get_rank() == 0:
        drawn = np.random.default_rng(plan.recipe.seed)
        for source in plan.mix.sources:
            writer = indexed.Writer(Path(source.prefix), plan.model.vocabulary_size)
            found = drawn.integers(
                plan.model.vocabulary_size, size=source.tokens, dtype=writer.dtype
            )
            writer.add([found], [DOCUMENT_TOKENS] * (source.tokens // DOCUMENT_TOKENS))
            writer.close()
    dist.barrier()
    # There is no text that any of these ends.
    return DatasetTokenizer(plan.model.vocabulary_size, 0)


def conversations(plan: TuningPlan) -> Tokenized:
    """Random conversations, or pairs, of GSM8K's lengths; the same on every rank.

    A pair has one question and two answers.
    """
    recipe: Tuning = plan.recipe
    drawn = np.random.default_rng(recipe.seed)
    answers = 1 if plan.stage == "sft" else 2
    typical = np.log(_MEAN) - _SPREAD**2 / 2
    lengths = drawn.lognormal(typical, _SPREAD, (_SAMPLES, answers)).astype(np.int64)
    # As long as a row's sequence may be, so that a short one keeps some of its samples.
    lengths = lengths.clip(_SHORTEST, recipe.sequence_length).ravel()
    trained_of = (lengths * 0.55).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    place = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
    trained = place >= np.repeat(lengths - trained_of, lengths)
    samples = np.arange(0, len(lengths) + 1, answers, dtype=np.int64)
    return Tokenized(
        chat_set=recipe.datasets[0], kind=plan.stage, folder=plan.folder.root, files=[],
        end_ids=(),
        tokens=drawn.integers(plan.model.vocabulary_size, size=int(starts[-1]), dtype=np.int32),
        trained=trained, examples=starts, counts=trained_of.astype(np.int32), samples=samples,
        places=np.zeros((_SAMPLES, 2), dtype=np.int64),
        rewards=np.tile(np.array([1.0, 0.0], dtype=np.float32), (_SAMPLES, 1)),
    )  # fmt: skip


def reference(plan: TuningPlan, trained: Numbers) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Log-probabilities of answers as a model without knowledge gives them: [examples], in nats.

    Args:
        trained: [examples], tokens of each answer.
    """
    found: np.ndarray[tuple[int], np.dtype[np.float64]] = -np.log(
        float(plan.model.vocabulary_size)
    ) * trained.astype(np.float64)
    return found
