"""The mix: counted sources, and what a recipe says of them, to what the run reads of each.

The arithmetic is exact: a ratio is the decimal that stands in the recipe, not the nearest binary
number, so that a total is the same everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction
from math import ceil, floor
from typing import Literal

from tanren.config.errors import RequestError
from tanren.config.fields import Strict
from tanren.config.training import Midtrain
from tanren.plan.batch import ceil_div, stated_steps, tokens_per_step

# "Once" is a little more than once: ratios are of all tokens while the held-out documents are not
# read, and the last step is filled up. With split 998,1,1 the first alone makes 1.002.
EPOCH_TOLERANCE = Fraction(1, 100)


@dataclass(frozen=True)
class SourceCount:
    """A source and its tokens. A table of counts does not know the documents."""

    name: str
    prefix: str
    tokens: int
    documents: int | None = None


class SourceShare(Strict):
    """One source of the mix: what is there, what is taken.

    `stated` is the recipe's ratio or share, `pattern` the name or glob that it stands beside.
    `epochs` are over the training part of the split, which megatron-core cuts by documents; here
    it is taken as its share of the tokens.
    """

    name: str
    prefix: str
    tokens: int
    stated: float
    pattern: str | None
    used: int
    weight: float
    epochs: float


class Mixture(Strict):
    """What the run reads: from iteration `data_start` to `steps`, all sources mixed throughout."""

    rule: Literal["ratios", "shares"]
    sources: tuple[SourceShare, ...]
    # Sources with a ratio or share of 0, and their tokens.
    left_out: dict[str, int]
    data_start: int
    steps: int

    @property
    def tokens(self) -> int:
        """What the sources give together. The last step is filled up to its whole size."""
        return sum(source.used for source in self.sources)


def make_mixture(
    recipe: Midtrain, counts: tuple[SourceCount, ...], place: str, *, data_start: int = 0
) -> Mixture:
    """Compile a recipe's mix.

    By ratios each source gives its tokens times its ratio, rounded up. Where the recipe states no
    length, that total is the length; else the ratios are proportions. By shares each source gets
    its share of the stated length.

    Args:
        data_start: the iteration at which the run begins to read this mix.
    Raises:
        RequestError: a name that fits no source or two, a source without a share, a part of the
            split without documents, a source that would be read more often than the recipe allows.
    """
    rule: Literal["ratios", "shares"] = "ratios" if recipe.mix.shares is None else "shares"
    stated = recipe.mix.ratios or {} if recipe.mix.shares is None else recipe.mix.shares
    patterns = _patterns([count.name for count in counts], stated, f"{place}: mix.{rule}")
    if rule == "shares":
        _all_have_a_share(counts, patterns, place)
    numbers = {
        count.name: _exact(stated[patterns[count.name]]) if count.name in patterns else Fraction(1)
        for count in counts
    }
    read = tuple(count for count in counts if numbers[count.name])
    _check_there_are_tokens(read, rule, place)
    _check_split(read, recipe, place)
    if rule == "ratios":
        parts = [Fraction(ceil(count.tokens * numbers[count.name])) for count in read]
    else:
        together: dict[str, int] = {}
        for count in read:
            pattern = patterns[count.name]
            together[pattern] = together.get(pattern, 0) + count.tokens
        parts = [
            numbers[count.name] * Fraction(count.tokens, together[patterns[count.name]])
            for count in read
        ]
    whole = sum(parts, Fraction(0))

    length = stated_steps(recipe)
    steps = data_start + ceil_div(int(whole), tokens_per_step(recipe)) if length is None else length
    if steps <= data_start:
        raise RequestError(
            f"{place}: resume",
            f"the run has {steps} steps, and the new data would begin after {data_start}",
            "start another run from its checkpoint: NAME=... and init: checkpoint:PATH",
        )
    budget = (steps - data_start) * tokens_per_step(recipe)
    used = [int(part) for part in parts] if length is None else _rounded(parts, budget)
    training = _training_share(recipe)
    epochs = [part / whole * budget / (count.tokens * training)
              for count, part in zip(read, parts, strict=True)]  # fmt: skip
    mixture = Mixture(
        rule=rule,
        sources=tuple(
            SourceShare(
                name=count.name,
                prefix=count.prefix,
                tokens=count.tokens,
                stated=float(numbers[count.name]),
                pattern=patterns.get(count.name),
                used=taken,
                weight=float(part / whole),
                epochs=float(times),
            )
            for count, part, taken, times in zip(read, parts, used, epochs, strict=True)
        ),
        left_out={count.name: count.tokens for count in counts if count not in read},
        data_start=data_start,
        steps=steps,
    )
    _check_epochs(recipe, mixture, epochs, place)
    return mixture


def count_notes(
    there: tuple[SourceCount, ...], table: Mapping[str, int], name: object
) -> tuple[str, ...]:
    """How a recipe's table of counts differs from the data, in one line; nothing if it does not."""
    counted = {count.name: count.tokens for count in there}
    differing = [
        f"{source} {table.get(source, 0):,} there, {counted.get(source, 0):,} in the data"
        for source in [*counted, *(source for source in table if source not in counted)]
        if table.get(source) != counted.get(source)
    ]
    if not differing:
        return ()
    more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
    return (f"{name} is not what preprocess counted: {'; '.join(differing[:3])}{more}",)


def _exact(number: float) -> Fraction:
    """The shortest decimal that reads as this number: what a person wrote."""
    return Fraction(repr(number))


def _patterns(names: list[str], stated: Iterable[str], place: str) -> dict[str, str]:
    """The name or glob that each source is named by; a source's own name goes first."""
    found = {}
    for name in names:
        fitting = [name] if name in stated else [p for p in stated if fnmatchcase(name, p)]
        if len(fitting) > 1:
            raise RequestError(
                place,
                f"{' and '.join(fitting)} both name source {name}",
                f"name {name} itself as well, or make one of them narrower",
            )
        if fitting:
            found[name] = fitting[0]
    for pattern in stated:
        if pattern not in found.values():
            own = any(fnmatchcase(name, pattern) for name in names)
            raise RequestError(
                f"{place}.{pattern}",
                "is left without a source: those it fits have lines of their own"
                if own
                else "names no source of the data",
                "remove it" if own else f"the sources are {_some(names)}",
            )
    return found


def _some(names: list[str]) -> str:
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _all_have_a_share(
    counts: tuple[SourceCount, ...], patterns: Mapping[str, str], place: str
) -> None:
    without = [count.name for count in counts if count.name not in patterns]
    if without:
        raise RequestError(
            f"{place}: mix.shares",
            f"no share names {_some(without)}",
            f"give it one, such as {without[0]}: 0.1; 0 leaves it out",
        )


def _check_there_are_tokens(read: tuple[SourceCount, ...], rule: str, place: str) -> None:
    if not read:
        raise RequestError(f"{place}: mix.{rule}", "leave every source out", "give one more than 0")
    for count in read:
        if not count.tokens:
            raise RequestError(
                f"{place}: mix.{rule}",
                f"source {count.name} has no tokens",
                f"leave it out ({count.name}: 0), or look at its text",
            )


def _rounded(parts: list[Fraction], budget: int) -> list[int]:
    """The budget in these proportions as whole numbers that add up to it."""
    whole, done, given, result = sum(parts, Fraction(0)), Fraction(0), 0, []
    for part in parts:
        done += part
        upto = round(done / whole * budget)
        result.append(upto - given)
        given = upto
    return result


def _training_share(recipe: Midtrain) -> Fraction:
    parts = [int(part) for part in recipe.split.split(",")]
    return Fraction(parts[0], sum(parts))


def _check_epochs(recipe: Midtrain, mixture: Mixture, epochs: list[Fraction], place: str) -> None:
    """Refuse a source that would be read more often than `max_epochs`, with what would be right."""
    allowed = _exact(recipe.mix.max_epochs)
    often, source = max(zip(epochs, mixture.sources, strict=True), key=lambda pair: pair[0])
    if often <= allowed * (1 + EPOCH_TOLERANCE):
        return
    needed = Fraction(ceil(often * 100), 100)
    if stated_steps(recipe) is None:
        ratio = floor(_exact(source.stated) * allowed / often * 10_000) / 10_000
        other = f"a ratio of at most {ratio:g} for {source.name}"
    else:
        reads = floor((mixture.steps - mixture.data_start) * allowed / often)
        fits = mixture.data_start + reads
        other = (
            f"at most {fits} steps ({fits * tokens_per_step(recipe):,} tokens), or a lower "
            f"{mixture.rule.removesuffix('s')} for it"
            if reads
            else f"a lower {mixture.rule.removesuffix('s')} for it"
        )
    training = round(source.tokens * _training_share(recipe))
    raise RequestError(
        f"{place}: mix",
        f"source {source.name} would be read {float(often):,.2f} times ({source.used:,} tokens, "
        f"and it has {training:,} to train on), and max_epochs is {recipe.mix.max_epochs:g}",
        f"mix.max_epochs: {float(needed)!r}, or {other}",
    )


def _check_split(read: tuple[SourceCount, ...], recipe: Midtrain, place: str) -> None:
    """Refuse a split that leaves a source without a document in a part that is read.

    megatron-core cuts each source by documents, and would look for samples in an empty part for
    ever. The rounding is its own.
    """
    parts = [float(part) for part in recipe.split.split(",")]
    ends = [sum(parts[: number + 1]) / sum(parts) for number in range(len(parts))]
    for count in read:
        if count.documents is None:
            continue
        training = round(ends[0] * count.documents)
        evaluation = round(ends[1] * count.documents) - training
        problem = "to train on" if not training else "to hold out" if not evaluation else None
        if problem is None or (problem == "to hold out" and recipe.evaluation is None):
            continue
        raise RequestError(
            f"{place}: split",
            f"{recipe.split} leaves none of the {count.documents} documents of source "
            f"{count.name} {problem}",
            "give that part a larger share, leave the source out, or leave out the evaluation",
        )
