"""What a recipe's mix takes of each source, held to runs that were really made."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from math import ceil
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tanren.config.data import Mix
from tanren.config.errors import RequestError
from tanren.config.training import Checkpointing, Evaluation, Midtrain, Optimizer
from tanren.launch.inputs import read_counts
from tanren.plan.mix import Mixture, SourceCount, count_notes, make_mixture
from tests.conftest import REPOSITORY

TABLE = REPOSITORY / "recipes" / "v4-dolmino" / "dolmino_token_counts.tsv"
ELSEWHERE = REPOSITORY.parent / "shared" / "data" / "mix" / "dolmino_token_counts_v3.0b1.tsv"
RECIPE = Midtrain(
    model="tiny", init="scratch", data="stage:preprocess", sequence_length=10, global_batch=10,
    split="100,0,0", optimizer=Optimizer(lr=3e-4), checkpoints=Checkpointing(every_steps=100),
)  # fmt: skip


def recipe(mix: Mapping[str, Any] | None = None, **fields: Any) -> Midtrain:
    values = {key: float(value) for key, value in (mix or {}).items()}
    rule = fields.pop("rule", "ratios")
    limit = float(fields.pop("max_epochs", 1.0))
    return RECIPE.model_copy(
        update={"mix": Mix(**{rule: values}, max_epochs=limit), **fields},
    )


def counts(**tokens: int) -> tuple[SourceCount, ...]:
    return tuple(SourceCount(name, f"/{name}", number) for name, number in tokens.items())


def compiled(wanted: Midtrain, there: tuple[SourceCount, ...], data_start: int = 0) -> Mixture:
    return make_mixture(wanted, there, "r", data_start=data_start)


def refusal(wanted: Midtrain, there: tuple[SourceCount, ...]) -> str:
    with pytest.raises(RequestError) as refused:
        compiled(wanted, there)
    return refused.value.text()


def used(mixture: Mixture) -> dict[str, int]:
    return {source.name: source.used for source in mixture.sources}


@pytest.mark.parametrize(
    ("ratios", "max_epochs", "tokens", "steps"),
    [
        ({"dclm*": 0.0323, "flan*": 0.5, "pes2o*": 0.0515}, 1, 55_797_411_281, 6_652),
        ({"dclm*": 0.0685, "pes2o*": 0.167, "math*": 2.0}, 2, 113_460_356_693, 13_526),
        (
            {"dclm*": 0.2078, "flan*": 2, "stackexchange*": 4, "math*": 4, "wiki*": 4},
            4,
            337_681_167_151,
            40_255,
        ),
    ],
    ids=["50B", "100B", "300B"],
)
def test_the_mixes_of_v4_midtraining_have_their_tokens_and_iterations(
    ratios: dict[str, float], max_epochs: float, tokens: int, steps: int
) -> None:
    there = counts(**read_counts(TABLE))
    assert len(there) == 36
    wanted = recipe(
        ratios, max_epochs=max_epochs, sequence_length=8192, global_batch=1024, split="998,1,1"
    )
    mixture = compiled(wanted, there)
    assert (mixture.tokens, mixture.steps) == (tokens, steps)
    assert len(mixture.sources) == 36


@pytest.mark.skipif(not ELSEWHERE.exists(), reason="the original table is not there")
def test_the_table_is_the_original() -> None:
    assert read_counts(TABLE) == read_counts(ELSEWHERE)


SIZES = st.lists(st.integers(1, 10**13), min_size=1, max_size=6)
DECIMALS = st.decimals(0, 9, places=4).map(lambda ratio: ratio.normalize())


@settings(deadline=None)
@given(sizes=SIZES, ratio=DECIMALS)
def test_a_ratio_is_the_decimal_that_was_written(sizes: list[int], ratio: Decimal) -> None:
    assume(ratio > 0)
    there = counts(**{f"s{number}": size for number, size in enumerate(sizes)})
    mixture = compiled(recipe({"s*": ratio}, max_epochs=1e15), there)
    for source in mixture.sources:
        assert source.used - 1 < Fraction(ratio) * source.tokens <= source.used


def test_an_exact_product_is_not_rounded_up() -> None:
    """In binary 0.07 x 100 is 7.000000000000001."""
    assert ceil(0.07 * 100) == 8
    assert used(compiled(recipe({"a": 0.07}), counts(a=100))) == {"a": 7}


@settings(deadline=None)
@given(sizes=SIZES, steps=st.integers(1, 10**6), first=DECIMALS)
def test_a_stated_length_leaves_the_ratios_their_proportions(
    sizes: list[int], steps: int, first: Decimal
) -> None:
    assume(first > 0)
    there = counts(**{f"s{number}": size for number, size in enumerate(sizes)})
    wanted = recipe({"s0": first}, steps=steps, max_epochs=1e15)
    mixture = compiled(wanted, there)
    free = compiled(recipe({"s0": first}, max_epochs=1e15), there)
    assert (mixture.steps, mixture.tokens) == (steps, steps * 100)
    for bound, unbound in zip(mixture.sources, free.sources, strict=True):
        assert bound.weight == unbound.weight
        assert abs(bound.used - bound.weight * steps * 100) <= 1


def test_tokens_are_a_length_too() -> None:
    mixture = compiled(recipe(tokens=250), counts(a=600, b=200))
    assert (mixture.steps, used(mixture)) == (3, {"a": 225, "b": 75})


def test_a_share_is_of_the_run_and_a_glob_spreads_it_by_tokens() -> None:
    there = counts(web1=6_000, web2=2_000, math=900, old=500)
    wanted = recipe({"web*": 0.75, "math": 0.25, "old": 0}, rule="shares", steps=20, max_epochs=2)
    mixture = compiled(wanted, there)
    assert used(mixture) == {"web1": 1_125, "web2": 375, "math": 500}
    assert [source.weight for source in mixture.sources] == [0.5625, 0.1875, 0.25]
    assert [source.pattern for source in mixture.sources] == ["web*", "web*", "math"]
    assert mixture.left_out == {"old": 500}


def test_a_source_without_a_share_is_refused() -> None:
    wanted = recipe({"web": 1}, rule="shares", steps=1)
    assert refusal(wanted, counts(web=500, math=500, wiki=5)) == (
        "r: mix.shares: no share names math, wiki.\n"
        "  next: give it one, such as math: 0.1; 0 leaves it out"
    )


def test_a_ratio_of_nothing_leaves_a_source_out() -> None:
    mixture = compiled(recipe({"b*": 0}), counts(a=1_000, b1=10, b2=20))
    assert used(mixture) == {"a": 1_000}
    assert mixture.left_out == {"b1": 10, "b2": 20}
    assert all(source.weight > 0 for source in mixture.sources)


def test_a_name_goes_before_globs() -> None:
    there = counts(**{"dclm/a": 100, "dclm/b": 100, "DCLM": 100, "b": 100})
    mixture = compiled(recipe({"dclm*": 0.5, "*b": 0.25, "dclm/b": 0.1}, steps=1), there)
    assert [source.stated for source in mixture.sources] == [0.5, 0.1, 1.0, 0.25]


@pytest.mark.parametrize(
    ("ratios", "problem"),
    [
        ({"wbe": 1}, "r: mix.ratios.wbe: names no source of the data.\n"
                     "  next: the sources are web/a, web/b, math"),
        ({"Web*": 1}, "r: mix.ratios.Web*: names no source of the data."),
        ({"web*": 1, "*/b": 1}, "r: mix.ratios: web* and */b both name source web/b.\n"
                                "  next: name web/b itself as well, or make one of them narrower"),
        ({"ma*": 0.5, "math": 1}, "r: mix.ratios.ma*: is left without a source: those it fits have "
                                  "lines of their own.\n  next: remove it"),
        ({"*": 0}, "r: mix.ratios: leave every source out.\n  next: give one more than 0"),
    ],
)  # fmt: skip
def test_names_that_do_not_fit_are_refused(ratios: dict[str, float], problem: str) -> None:
    there = counts(**{"web/a": 100, "web/b": 100, "math": 100})
    if "*/b" not in ratios:
        assert refusal(recipe(ratios), there).startswith(problem)
    else:
        assert refusal(recipe(ratios), there) == problem


@pytest.mark.parametrize("rule", ["ratios", "shares"])
def test_a_source_without_tokens_is_refused(rule: str) -> None:
    wanted = recipe({"a": 0.5, "b": 0.5}, rule=rule, steps=1)
    assert refusal(wanted, counts(a=500, b=0)) == (
        f"r: mix.{rule}: source b has no tokens.\n  next: leave it out (b: 0), or look at its text"
    )
    assert used(compiled(recipe({"a": 1, "b": 0}, rule=rule, steps=1), counts(a=500, b=0)))


def test_what_would_be_read_too_often_is_refused_with_what_is_right() -> None:
    there = counts(web=3_000, math=1_000)
    ratios = {"math": 2.5}
    assert refusal(recipe(ratios, split="80,20,0"), there) == (
        "r: mix: source math would be read 3.12 times (2,500 tokens, and it has 800 to train on), "
        "and max_epochs is 1.\n"
        "  next: mix.max_epochs: 3.13, or a ratio of at most 0.8 for math"
    )
    assert refusal(recipe(ratios, split="80,20,0", steps=40), there) == (
        "r: mix: source math would be read 2.27 times (1,818 tokens, and it has 800 to train on), "
        "and max_epochs is 1.\n"
        "  next: mix.max_epochs: 2.28, or at most 17 steps (1,700 tokens), or a lower ratio for it"
    )
    shares = recipe({"web": 0.5, "math": 0.5}, rule="shares", steps=1_000, max_epochs=0.04)
    assert refusal(shares, there).endswith("next: mix.max_epochs: 50.0, or a lower share for it")


@settings(deadline=None)
@given(sizes=SIZES, steps=st.integers(1, 10**6), limit=st.integers(1, 50))
def test_the_advice_helps(sizes: list[int], steps: int, limit: int) -> None:
    there = counts(**{f"s{number}": size for number, size in enumerate(sizes)})
    wanted = recipe({"s0": 1.5}, steps=steps, max_epochs=limit, split="9,1,0")
    try:
        compiled(wanted, there)
    except RequestError as error:
        words = error.next_step.replace(",", "").split()
        more = float(words[1])
        compiled(recipe({"s0": 1.5}, steps=steps, max_epochs=more, split="9,1,0"), there)
        if "steps" in words:
            fewer = int(words[words.index("steps") - 1])
            compiled(wanted.model_copy(update={"steps": fewer}), there)
            if fewer + 1 < steps:
                # One step of 100 tokens more is too much, but for the tolerance.
                over = wanted.model_copy(update={"steps": ceil((fewer + 1) * 1.011)})
                with pytest.raises(RequestError):
                    compiled(over, there)


@pytest.mark.parametrize(("split", "passes"), [("991,9,0", True), ("9901,99,0", True),
                                               ("989,11,0", False)])  # fmt: skip
def test_once_may_be_a_hundredth_more_than_once(split: str, passes: bool) -> None:
    wanted = recipe(split=split)
    if passes:
        assert compiled(wanted, counts(a=1_000_000)).sources[0].epochs > 1
    else:
        assert "would be read 1.01 times" in refusal(wanted, counts(a=1_000_000))


def test_epochs_are_over_the_training_part() -> None:
    mixture = compiled(recipe(steps=16, split="80,20,0"), counts(a=4_000))
    assert mixture.sources[0].epochs == 0.5


def test_a_mix_that_begins_later_is_read_from_its_own_start() -> None:
    there = counts(a=1_000, b=2_000)
    free = compiled(recipe(), there, data_start=70)
    assert (free.steps, free.tokens, free.data_start) == (100, 3_000, 70)
    assert [source.epochs for source in free.sources] == [1.0, 1.0]
    stated = compiled(recipe(steps=100), there, data_start=70)
    assert stated.sources == compiled(recipe(steps=30), there).sources
    with pytest.raises(RequestError) as refused:
        compiled(recipe(steps=70), there, data_start=70)
    assert refused.value.problem == ("the run has 70 steps, and the new data would begin after 70")


@pytest.mark.parametrize(
    ("documents", "split", "held_out", "problem"),
    [
        (
            100,
            "998,1,1",
            True,
            "998,1,1 leaves none of the 100 documents of source web to hold out",
        ),
        (100, "998,1,1", False, None),
        (1000, "998,1,1", True, None),
        (None, "998,1,1", True, None),
        (4, "1,99,0", False, "1,99,0 leaves none of the 4 documents of source web to train on"),
    ],
)
def test_a_split_without_documents_is_refused(
    documents: int | None, split: str, held_out: bool, problem: str | None
) -> None:
    there = (SourceCount("web", "/web", 90_000, documents), SourceCount("out", "/out", 9, 1))
    evaluation = Evaluation(sequences=64) if held_out else None
    wanted = recipe({"out": 0}, split=split, steps=1, evaluation=evaluation)
    if problem is None:
        assert compiled(wanted, there).sources
        return
    assert refusal(wanted, there).startswith(f"r: split: {problem}.")


def test_a_table_that_is_not_the_datas_is_noted() -> None:
    there = counts(a=1_000, b=2, c=3, d=4)
    table = {"a": 1_000, "b": 2, "c": 3, "d": 4}
    assert count_notes(there, table, "t.tsv") == ()
    assert count_notes(there, {**table, "a": 999}, "t.tsv") == (
        "t.tsv is not what preprocess counted: a 999 there, 1,000 in the data",
    )
    other = {"b": 9, "c": 9, "d": 4, "e": 5}
    assert count_notes(there, other, "t.tsv") == (
        "t.tsv is not what preprocess counted: a 0 there, 1,000 in the data; b 9 there, 2 in the "
        "data; c 9 there, 3 in the data and 1 more",
    )
