"""What sft and dpo share: the tokenizer, the examples of all sets, how many steps they make."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from tanren import runs
from tanren.config.training import by_nemo
from tanren.convert import hf
from tanren.data import examples as token_cache
from tanren.data import packing, selection, template
from tanren.data import tokenizer as tokenizers
from tanren.data.blend import Batch
from tanren.data.chat import Chat, Example
from tanren.data.packing import Numbers
from tanren.data.rows import Conversations, Items, Pairs
from tanren.engine import loop
from tanren.engine.checkpoint import TrainingState
from tanren.engine.distributed import Ranks
from tanren.engine.step import Budget, Objective
from tanren.plan.checks import check_schedule, check_vocabulary
from tanren.plan.paths import RunFolder
from tanren.plan.plan import TuningPlan, digest
from tanren.stages import own_tokenizer, synthetic, training
from tanren.stages.convert import check_tokenizers
from tanren.stages.feed import RowFeed
from tanren.stages.training import Session

logger = logging.getLogger("tanren")
LogProbs = npt.NDArray[np.float64]


class Examples:
    """The examples of all sets, numbered one set after the other, as they are trained on.

    The samples are numbered likewise: of dpo sample s is a pair, and has the examples 2s, 2s + 1.
    """

    def __init__(self, choice: selection.Choice) -> None:
        self.choice = choice
        self.starts = np.cumsum([0, *(len(one.lengths) for one in choice.sets)])
        self.samples = np.cumsum([0, *(len(one) for one in choice.sets)])
        # Where each sample's examples begin.
        self._firsts = np.concatenate(
            [one.samples[:-1] + start for one, start in zip(choice.sets, self.starts, strict=False)]
            + [self.starts[-1:]]
        )
        measured = [selection.measured(one, choice.sequence_length) for one in choice.sets]
        # As the model's input, without the last token; 0 where nothing is left to train on.
        self.lengths: Numbers = np.concatenate([inputs for inputs, _ in measured])
        self.trained: Numbers = np.concatenate([trained for _, trained in measured])

    def __getitem__(self, number: int) -> Example:
        at = int(np.searchsorted(self.starts, number, side="right")) - 1
        example = self.choice.sets[at].example(int(number - self.starts[at]))
        cut = selection.cut(example, self.choice.sequence_length)
        assert cut is not None, number
        return cut

    def numbers(self, samples: selection.Samples) -> Numbers:
        """Samples (of a set, of its numbers) by their numbers over all sets."""
        found: Numbers = self.samples[samples[:, 0]] + samples[:, 1]
        return found

    def of_samples(self, samples: Numbers) -> Numbers:
        """The examples of some samples, but those with nothing to train on."""
        counts = np.diff(self._firsts)[samples]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        found: Numbers = np.repeat(self._firsts[samples], counts) + within
        return found[self.trained[found] > 0]

    @cached_property
    def rewards(self) -> npt.NDArray[np.float32]:
        """[examples] of pairs: what the data says that each answer is worth."""
        found: npt.NDArray[np.float32] = np.concatenate(
            [np.asarray(one.rewards).ravel() for one in self.choice.sets]
        )
        return found


@dataclass(frozen=True)
class Data:
    """What a run reads. `items` are examples (sft) or pairs (dpo)."""

    plan: TuningPlan
    examples: Examples
    table: tuple[selection.Row, ...]
    dev: Numbers
    end_ids: tuple[int, ...]
    reference: LogProbs | None = None

    def items(self, epoch: int) -> Numbers:
        """What an epoch reads."""
        return self.items_of(self.examples.choice.epoch(epoch))

    def items_of(self, samples: selection.Samples) -> Numbers:
        numbers = self.examples.numbers(samples)
        return self.examples.of_samples(numbers) if self.plan.stage == "sft" else numbers

    def with_reference(self, reference: LogProbs | None) -> Data:
        return replace(self, reference=reference)

    def feed(self, rows: Conversations | Pairs, device: torch.device) -> RowFeed:
        """Rows of these examples as micro batches."""
        return RowFeed(
            rows, self.collate, model=self.plan.model, device=device,
            micro_batch=self.plan.batch.micro_batch,
            lengths=self.examples.lengths, trained=self.examples.trained,
        )  # fmt: skip

    def collate(self, rows: list[Numbers]) -> Batch:
        """A packed micro batch (see `packing.collate`); of dpo with what belongs to its pairs.

        That is numbers [2 x pairs], which example of the run each is; rewards and reference
        [2 x pairs]; present [pairs]. Without any pair there is one that is not present, number -1.
        """
        texts = [[self.examples[int(number)] for number in row] for row in rows]
        width = self.plan.recipe.row_length
        if self.plan.recipe.layout.pipeline == 1:
            # What pipeline stages send one another has one shape.
            width = packing.trimmed(texts, width)
        batch = packing.collate(texts, width)
        if self.plan.stage == "sft":
            return batch
        numbers = np.concatenate(rows)
        present = np.ones(max(len(numbers) // 2, 1), dtype=bool)
        if not len(numbers):
            numbers, present[0] = np.array([-1, -1]), False
        found = {
            "numbers": torch.from_numpy(numbers),
            "rewards": torch.from_numpy(self.examples.rewards[numbers]),
            "present": torch.from_numpy(present),
        }
        if self.reference is not None:
            found["reference"] = torch.from_numpy(self.reference[numbers])
        return batch | found


def read(plan: TuningPlan, ranks: Ranks) -> Data:
    """Make the tokenizer's folder and the tokens, or find them, and choose what the run reads.

    The first rank makes them; the others wait.
    """
    tokenized = [synthetic.conversations(plan)] if plan.made_up else _tokenized(plan, ranks)
    choice = selection.choose(tokenized, plan.recipe, plan.recipe_file)
    examples = Examples(choice)
    end_ids = sorted({end for one in choice.sets for end in one.end_ids})
    data = Data(plan, examples, choice.rows, np.empty(0, dtype=np.int64), tuple(end_ids))
    return replace(data, dev=data.items_of(choice.dev))


def _tokenized(plan: TuningPlan, ranks: Ranks) -> list[token_cache.Tokenized]:
    """The tokens of all sets that are read, made where they are not there."""
    kind, cache = plan.stage, Path(plan.cache)
    folder = plan.folder.tokenizer
    sets = [one for one in plan.recipe.datasets if one.max_samples != 0]
    made: list[Path] = [folder for _ in sets]
    if ranks.is_first:
        make_tokenizer(plan, folder)
        made = [
            token_cache.make(one, kind, folder, chat=lambda: Chat(folder), cache=cache)
            for one in sets
        ]
    dist.broadcast_object_list(made, 0)
    return [token_cache.read(path, one, kind) for path, one in zip(made, sets, strict=True)]


def make_tokenizer(plan: TuningPlan, folder: Path) -> Path:
    """The run's own tokenizer, with the chat template: what is trained with, and exported.

    Raises:
        RequestError: it has more pieces than the model, or is not the base's.
    """
    if folder.is_dir():
        return folder
    assert plan.tokenizer is not None
    source = plan.tokenizer
    if plan.recipe.tokenizer is None and plan.base is not None:
        base = RunFolder(plan.folder.root.with_name(plan.base))
        if base.plan.is_file():
            own_tokenizer.of(base)  # refuses one of which nothing is left
    original = hf.locate(source.removeprefix("hf:")) if source.startswith("hf:") else Path(source)
    size = tokenizers.read(original).size
    check_vocabulary(plan.recipe_file, plan.model, size, original)
    next_step = "leave tokenizer out of the recipe: the base brings its own"
    if plan.hf_source is not None:
        check_tokenizers(hf.locate(plan.hf_source), str(original), plan.recipe_file, next_step)
    if plan.base_tokenizer is not None:
        check_tokenizers(Path(plan.base_tokenizer), str(original), plan.recipe_file, next_step)
    template.prepare(original, plan.recipe.template, folder, f"{plan.recipe_file}: template")
    return folder


def lay_out(plan: TuningPlan, data: Data, rows: Conversations | Pairs, ranks: Ranks) -> int:
    """The steps of the run, written down with what became of each set.

    Raises:
        RequestError: the schedule does not fit so few steps.
    """
    steps = plan.recipe.steps or rows.steps
    check_schedule(plan.recipe, steps, plan.recipe_file)
    epochs = plan.recipe.epochs or rows.epochs(steps)
    if ranks.is_first:
        logger.info("%d steps are %.3g epochs", steps, epochs)
        for row in data.table:
            logger.info(
                "%s: %d read, %d too long, %d used, %d for dev",
                row.name, row.read, row.too_long, row.used, row.dev,
            )  # fmt: skip
        known = runs.read_json(plan.folder.examples) or {}
        runs.write_json(
            plan.folder.examples,
            known
            | {
                "settings": digest(plan.settings),
                "steps": steps,
                "epochs": round(epochs, 3),
                "end_ids": data.end_ids,
                "sets": [asdict(row) for row in data.table],
            },
        )
    return steps


@dataclass(frozen=True)
class Work:
    """What a training does, ready to be done: what it minimises, reads, and is measured on."""

    objective: Objective
    feed: RowFeed
    held_out: loop.HeldOut | None


def train(session: Session, steps: int, begin: Callable[[TrainingState], Work | None]) -> None:
    """Make the model, begin from its base or go on, and train it by the recipe's engine.

    Args:
        begin: given the model with random weights, loads where it starts from; None where the run
            was asked to stop meanwhile.
    """
    plan = session.plan
    assert isinstance(plan, TuningPlan)
    budget = Budget(steps, plan.recipe.global_batch)
    if by_nemo(plan.recipe):
        # It is imported nowhere else, and only where it is installed.
        from tanren.stages.nemo.trainer import train as train_by_nemo

        train_by_nemo(session, budget, begin, lambda: made(plan))
        return
    state = training.make_state(plan, steps)
    work = begin(state)
    if work is not None:
        training.train(
            session, state, work.objective, work.feed, work.held_out, budget, lambda: made(plan)
        )


def held_out(
    plan: TuningPlan, data: Data, feed_of: Callable[[Items, int], RowFeed]
) -> loop.HeldOut | None:
    """The dev examples as one step.

    Args:
        feed_of: given items and more of them than there are, reads them all in the first step.
    """
    if not len(data.dev):
        return None
    feed = feed_of(lambda epoch: data.dev, len(data.dev))
    return loop.HeldOut(feed, plan.recipe.evaluation.every_steps)


def made(plan: TuningPlan) -> dict[str, Any]:
    """What DONE says of a tuned model beside what all trainings say."""
    lora = plan.recipe.lora
    return {
        "tokenizer": str(plan.folder.tokenizer),
        "template": plan.recipe.template,
        "lora": lora.model_dump(mode="json") if lora else None,
    }


def end_ids(folder: RunFolder) -> tuple[int, ...]:
    """The tokens that end an answer of a tuned model."""
    laid_out = runs.read_json(folder.examples) or {}
    return tuple(laid_out.get("end_ids", ()))
