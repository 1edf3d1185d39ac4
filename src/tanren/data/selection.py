"""Which samples of which sets a run reads: too long, so many at most, dev, and how often an epoch.

All of it is drawn by the recipe's seed and the sets' names alone, so it is the same on every rank,
whatever their number, and a set's share does not change with the sets beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tanren.config.data import ChatSet
from tanren.config.errors import RequestError
from tanren.config.training import Tuning
from tanren.data.chat import Example
from tanren.data.examples import Tokenized

# Rows of (the set's number, the sample's number), [samples, 2].
Samples = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Row:
    """What became of a set, for the table: samples, and what an epoch reads of it.

    `too_long` is what was cut or left out, `used` what is trained on, `dev` what is held out.
    """

    name: str
    read: int
    too_long: int
    used: int
    dev: int
    samples_per_epoch: int
    examples: int
    tokens: int
    trained_tokens: int


@dataclass(frozen=True)
class Choice:
    """The samples of a run."""

    sets: tuple[Tokenized, ...]
    used: tuple[npt.NDArray[np.int64], ...]
    dev: Samples
    rows: tuple[Row, ...]
    seed: int
    sequence_length: int

    def epoch(self, number: int) -> Samples:
        """The training samples of an epoch (from 0) in the order in which it reads them.

        Every sample comes as often as its set's upsampling says; of its fraction a part of the
        samples comes once more, another part each time.
        """
        parts = []
        for at, (one, used) in enumerate(zip(self.sets, self.used, strict=True)):
            whole, more = _times(len(used), one.chat_set.upsampling)
            drawn = _random(self.seed, "once more", one.chat_set.name, number)
            chosen = np.concatenate([*[used] * whole, drawn.permutation(used)[:more]])
            parts.append(np.stack([np.full_like(chosen, at), chosen], axis=1))
        order = _random(self.seed, "order", "", number)
        result: Samples = order.permutation(np.concatenate(parts))
        return result

    @property
    def samples_per_epoch(self) -> int:
        return sum(row.samples_per_epoch for row in self.rows)

    def examples(self, set_number: int, sample: int) -> list[Example]:
        """The examples of a sample as they are trained on: cut where they are too long."""
        kept = [cut(one, self.sequence_length) for one in self.sets[set_number].examples_of(sample)]
        return [one for one in kept if one is not None]


def choose(sets: Sequence[Tokenized], recipe: Tuning, recipe_file: object) -> Choice:
    """Choose the samples of a run.

    An example of n tokens has n - 1 inputs: it is too long where these are over sequence_length.
    `drop` leaves out a sample that has such an example; `truncate` cuts the example, and leaves out
    what has no answer left then (a pair that has lost one of its two).

    Args:
        sets: those with `max_samples: 0` are left out.
    Raises:
        RequestError: a sample is too long (`too_long: error`), all of a set's are, nothing is left
            to train on, or nothing for dev, which is wanted.
    """
    chosen = tuple(one for one in sets if one.chat_set.max_samples != 0)
    used, dev, rows = [], [], []
    for at, one in enumerate(chosen):
        fits, too_long = _fitting(one, recipe, recipe_file)
        most = one.chat_set.max_samples
        order = _random(recipe.seed, "samples", one.chat_set.name).permutation(fits)
        order = order if most is None else order[:most]
        held_out = _dev_samples(one.chat_set, recipe, len(order))
        # The first of what was drawn: with more samples the dev ones stay dev.
        part = np.sort(order[:held_out])
        dev.append(np.stack([np.full_like(part, at), part], axis=1))
        used.append(np.sort(order[held_out:]))
        rows.append(_row(one, used[-1], too_long, held_out, recipe.sequence_length))
    if not sum(row.used for row in rows):
        raise RequestError(
            f"{recipe_file}: datasets", "no sample is left to train on",
            "name more data, or raise max_samples",
        )  # fmt: skip
    if not sum(row.dev for row in rows) and _wants_dev(chosen, recipe):
        raise RequestError(
            f"{recipe_file}: max_dev_ratio",
            f"no dev sample is left: {recipe.max_dev_ratio:g} of {rows[0].used} samples of "
            f"{rows[0].name} is less than one"
            if len(rows) == 1
            else f"no dev sample is left: {recipe.max_dev_ratio:g} of each dataset is less than "
            "one sample",
            "raise max_dev_ratio, or state max_dev_samples: 0 to train without",
        )
    return Choice(chosen, tuple(used), np.concatenate(dev), tuple(rows), recipe.seed,
                  recipe.sequence_length)  # fmt: skip


def measured(one: Tokenized, sequence_length: int) -> tuple[Numbers, Numbers]:
    """Inputs (tokens but the last) and trained tokens of each example, as it is trained on.

    Both are 0 where nothing is left of an example to train on.
    """
    inputs = one.lengths - 1
    trained = one.counts.astype(np.int64)
    for number in np.flatnonzero(inputs > sequence_length).tolist():
        kept = cut(one.example(number), sequence_length)
        inputs[number] = 0 if kept is None else len(kept.tokens) - 1
        trained[number] = 0 if kept is None else kept.trained.sum()
    return inputs, trained


def _fitting(
    one: Tokenized, recipe: Tuning, recipe_file: object
) -> tuple[npt.NDArray[np.int64], int]:
    """The samples that can be trained on, and how many were too long."""
    limit = recipe.sequence_length + 1
    longest = np.maximum.reduceat(one.lengths, one.samples[:-1])
    long = np.flatnonzero(longest > limit)
    if len(long) and recipe.too_long == "error":
        raise RequestError(
            one.place(int(long[0])),
            f"has {longest[long[0]] - 1} tokens, and sequence_length is {recipe.sequence_length}"
            + (f"; {len(long)} of {len(one)} samples are too long" if len(long) > 1 else ""),
            f"raise sequence_length in {recipe_file}, or state too_long: drop or truncate",
        )
    if recipe.too_long == "truncate":
        lost = [n for n in long.tolist() if not _is_left(one, n, recipe.sequence_length)]
    else:
        lost = long.tolist()
    fits = np.setdiff1d(np.arange(len(one)), lost, assume_unique=True)
    if not len(fits):
        cut = recipe.too_long == "truncate"
        raise RequestError(
            f"{recipe_file}: sequence_length",
            f"no answer of {one.chat_set.name} begins within {recipe.sequence_length} tokens"
            if cut
            else f"all {len(one)} samples of {one.chat_set.name} are longer than "
            f"{recipe.sequence_length} tokens",
            ("raise it, or state " if cut else "raise it, or state too_long: truncate, or ")
            + "max_samples: 0 for this set",
        )
    return fits, len(long)


def _is_left(one: Tokenized, sample: int, sequence_length: int) -> bool:
    """Whether something is trained of a sample that is cut: of a pair, of both sides."""
    kept = [cut(example, sequence_length) is not None for example in one.examples_of(sample)]
    return all(kept) if one.kind == "dpo" else any(kept)


def cut(example: Example, sequence_length: int) -> Example | None:
    """What is trained on of an example, which ends with a trained token; None where nothing is."""
    limit = sequence_length + 1
    if len(example.tokens) <= limit:
        return example
    trained = np.flatnonzero(example.trained[:limit])
    if not len(trained):
        return None
    end = int(trained[-1]) + 1
    return Example(example.tokens[:end], example.trained[:end])


def _dev_samples(chat_set: ChatSet, recipe: Tuning, samples: int) -> int:
    if not chat_set.split_dev:
        return 0
    # A little up: in floating point 0.29 of 100 are less than 29.
    return min(recipe.max_dev_samples, int(recipe.max_dev_ratio * samples + 1e-9))


def _wants_dev(sets: Sequence[Tokenized], recipe: Tuning) -> bool:
    return (
        recipe.max_dev_samples > 0
        and recipe.max_dev_ratio > 0
        and any(one.chat_set.split_dev for one in sets)
    )


def _times(samples: int, upsampling: float) -> tuple[int, int]:
    """How often an epoch reads all samples, and how many it reads once more."""
    whole = int(upsampling)
    return whole, round((upsampling - whole) * samples)


def _row(
    one: Tokenized, used: npt.NDArray[np.int64], too_long: int, dev: int, sequence_length: int
) -> Row:
    whole, more = _times(len(used), one.chat_set.upsampling)
    mine = np.zeros(len(one), dtype=bool)
    mine[used] = True
    mine = np.repeat(mine, np.diff(one.samples))  # of the examples
    inputs, trained = measured(one, sequence_length)
    mine &= trained > 0
    return Row(
        name=one.chat_set.name, read=len(one), too_long=too_long, used=len(used), dev=dev,
        samples_per_epoch=whole * len(used) + more, examples=int(mine.sum()),
        tokens=int((inputs[mine] + 1).sum()), trained_tokens=int(trained[mine].sum()),
    )  # fmt: skip


def _random(seed: int, purpose: str, name: str, number: int = 0) -> np.random.RandomState:
    """A stream of its own for each purpose, set and epoch; this class's draws never change."""
    words = hashlib.sha256(f"{seed}\n{purpose}\n{name}\n{number}".encode()).digest()
    return np.random.RandomState(np.frombuffer(words, dtype="<u4"))
