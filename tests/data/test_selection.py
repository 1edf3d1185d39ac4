"""Which samples a run reads: the same on every rank, and every number of the table true."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tanren.config.data import ChatSet
from tanren.config.errors import EXIT_REQUEST, RequestError
from tanren.config.training import Checkpointing, Dpo, Optimizer, Sft, Tuning
from tanren.data import selection
from tanren.data.conversations import Kind
from tanren.data.examples import Tokenized
from tanren.data.selection import Choice, choose

FILE = "sft.yaml"


def sft(*sets: Tokenized, **more: Any) -> Tuning:
    """A recipe of these sets; 10 tokens a row unless it says otherwise."""
    kind = Dpo if sets[0].kind == "dpo" else Sft
    return kind(
        model="tiny", init="stage:convert", global_batch=8, optimizer=Optimizer(lr=1e-3), steps=3,
        checkpoints=Checkpointing(every_steps=3), template="llmjp-instruct",
        datasets=tuple(one.chat_set for one in sets), **{"sequence_length": 10, **more},
    )  # fmt: skip


def tokenized(
    samples: list[list[tuple[int, int]]], name: str = "mine", kind: Kind = "sft", **more: Any
) -> Tokenized:
    """A set of samples, whose examples have so many tokens, trained from so many on."""
    flat = [one for sample in samples for one in sample]
    trained = [np.arange(length) >= first for length, first in flat]
    return Tokenized(
        chat_set=ChatSet(name=name, path="/chat.jsonl", **more), kind=kind, folder=Path("/cache"),
        files=[Path("/chat.jsonl")], end_ids=(1,),
        tokens=np.concatenate([np.arange(length, dtype=np.int32) for length, _ in flat]),
        trained=np.concatenate(trained),
        examples=np.cumsum([0, *(length for length, _ in flat)]),
        counts=np.array([int(one.sum()) for one in trained], dtype=np.int32),
        samples=np.cumsum([0, *(len(sample) for sample in samples)]),
        places=np.array([[0, number + 1] for number in range(len(samples))]),
        rewards=np.empty((0, 2), dtype=np.float32),
    )  # fmt: skip


def short(number: int, **more: Any) -> Tokenized:
    """So many samples of 5 tokens, 2 of them trained."""
    return tokenized([[(5, 3)]] * number, **more)


def one_row(choice: Choice) -> selection.Row:
    [row] = choice.rows
    return row


def test_every_sample_is_trained_on_or_held_out() -> None:
    choice = choose([short(100)], sft(short(100)), FILE)
    row = one_row(choice)
    assert (row.read, row.too_long, row.used, row.dev) == (100, 0, 90, 10)
    assert (row.samples_per_epoch, row.examples, row.tokens, row.trained_tokens) == (
        90,
        90,
        450,
        180,
    )
    dev, train = choice.dev[:, 1].tolist(), choice.epoch(0)[:, 1].tolist()
    assert (len(dev), len(train)) == (10, 90)
    assert sorted(dev + train) == list(range(100))
    assert dev != list(range(10)), "they are drawn"
    assert train != sorted(train), "so is the order"


def test_each_epoch_has_an_order_of_its_own_and_always_the_same() -> None:
    def made(seed: int = 1234) -> Choice:
        return choose([short(50)], sft(short(50), seed=seed), FILE)

    first, second = made().epoch(0).tolist(), made().epoch(1).tolist()
    assert made().epoch(0).tolist() == first
    assert second != first
    assert sorted(second) == sorted(first)
    assert made(seed=5).epoch(0).tolist() != first
    assert made(seed=5).dev.tolist() != made().dev.tolist()


def test_the_draws_of_today_are_those_of_tomorrow() -> None:
    """A run that goes on with another version of a library reads on in the same order."""
    choice = choose([short(12, upsampling=1.5)], sft(short(12, upsampling=1.5)), FILE)
    assert choice.dev.tolist() == [[0, 0]]
    assert choice.epoch(2)[:6, 1].tolist() == [2, 1, 8, 11, 10, 3]


def test_a_sets_samples_do_not_depend_on_the_sets_beside_it() -> None:
    one, other = short(40, name="one"), short(60, name="other", max_samples=30)
    alone = choose([other], sft(other), FILE)
    both = choose([one, other], sft(one, other), FILE)
    assert [row.name for row in both.rows] == ["one", "other"]
    assert both.used[1].tolist() == alone.used[0].tolist()
    assert [n for at, n in both.dev.tolist() if at == 1] == alone.dev[:, 1].tolist()
    assert Counter(both.epoch(0)[:, 0].tolist()) == {0: 36, 1: 27}
    assert both.samples_per_epoch == 63


@pytest.mark.parametrize(
    ("samples", "most", "ratio", "dev"),
    [(1000, 100, 0.1, 100), (999, 100, 0.1, 99), (2000, 100, 0.1, 100), (100, 100, 0.29, 29),
     (10, 2, 0.5, 2)],
)  # fmt: skip
def test_dev_is_the_smaller_of_both_limits(samples: int, most: int, ratio: float, dev: int) -> None:
    one = short(samples)
    recipe = sft(one, max_dev_samples=most, max_dev_ratio=ratio)
    row = one_row(choose([one], recipe, FILE))
    assert (row.dev, row.used) == (dev, samples - dev)


def test_max_samples_are_drawn_and_none_leaves_a_set_out() -> None:
    one, none = short(50, max_samples=20), short(50, name="none", max_samples=0)
    choice = choose([one, none], sft(one, none), FILE)
    assert (one_row(choice).read, one_row(choice).used, one_row(choice).dev) == (50, 18, 2)
    chosen = {*choice.epoch(0)[:, 1].tolist(), *choice.dev[:, 1].tolist()}
    assert len(chosen) == 20
    assert chosen != set(range(20))
    more = short(50, max_samples=400)
    assert one_row(choose([more], sft(more), FILE)).used == 45
    # What was dev stays dev where more is read.
    larger = short(50, max_samples=30)
    dev = choose([larger], sft(larger), FILE).dev[:, 1].tolist()
    assert set(choice.dev[:, 1].tolist()) < set(dev)


@pytest.mark.parametrize(("upsampling", "expected"), [(1.0, 40), (2.0, 80), (1.25, 50), (2.9, 116)])
def test_upsampling_reads_all_so_often_and_a_part_once_more(
    upsampling: float, expected: int
) -> None:
    one = short(40, upsampling=upsampling, split_dev=False)
    choice = choose([one], sft(one), FILE)
    assert one_row(choice).samples_per_epoch == choice.samples_per_epoch == expected
    often = [Counter(choice.epoch(number)[:, 1].tolist()) for number in range(3)]
    for counted in often:
        assert sum(counted.values()) == expected
        assert set(counted) == set(range(40))
        assert set(counted.values()) <= {int(upsampling), int(upsampling) + 1}
    if upsampling % 1:
        extra = [{n for n, times in c.items() if times > int(upsampling)} for c in often]
        assert len({frozenset(some) for some in extra}) == 3, "another part each time"


LONG = [[(11, 5)], [(12, 5)], [(20, 11)], [(20, 10)], [(5, 3), (30, 20)], [(30, 20), (40, 12)]]


def test_what_is_too_long_is_left_out_whole() -> None:
    """Eleven tokens are ten inputs with their labels: that fits."""
    one = tokenized(LONG, split_dev=False)
    row = one_row(choose([one], sft(one, too_long="drop"), FILE))
    assert (row.read, row.too_long, row.used, row.examples, row.tokens) == (6, 5, 1, 1, 11)


def test_what_is_too_long_is_cut_and_left_out_where_nothing_is_trained_then() -> None:
    one = tokenized(LONG, split_dev=False)
    choice = choose([one], sft(one, too_long="truncate"), FILE)
    row = one_row(choice)
    assert sorted(choice.used[0].tolist()) == [0, 1, 3, 4]
    assert (row.too_long, row.used, row.examples) == (5, 4, 4)
    assert [len(choice.examples(0, n)) for n in (0, 1, 3, 4)] == [1, 1, 1, 1]
    lengths = [len(choice.examples(0, n)[0].tokens) for n in (0, 1, 3, 4)]
    assert lengths == [11, 11, 11, 5]
    assert (row.tokens, row.trained_tokens) == (38, 6 + 6 + 1 + 2)
    cut = choice.examples(0, 3)[0]
    assert cut.tokens.tolist() == list(range(11))
    assert cut.trained.tolist() == [False] * 10 + [True]


def test_an_example_that_is_cut_ends_with_its_last_trained_token() -> None:
    """Tokens behind it, of the next question, are in vain."""
    one = tokenized([[(20, 15)]], split_dev=False)
    one.trained[3:6] = True
    [cut] = choose([one], sft(one, too_long="truncate"), FILE).examples(0, 0)
    assert cut.tokens.tolist() == [0, 1, 2, 3, 4, 5]


def test_a_pair_that_has_lost_one_side_is_left_out() -> None:
    pairs = [[(20, 5), (8, 5)], [(20, 15), (8, 5)], [(8, 5), (20, 15)], [(8, 5), (8, 5)]]
    one = tokenized(pairs, kind="dpo", split_dev=False)
    choice = choose([one], sft(one, too_long="truncate"), FILE)
    assert choice.used[0].tolist() == [0, 3]
    assert [len(side.tokens) for side in choice.examples(0, 0)] == [11, 8]
    dropped = choose([one], sft(one, too_long="drop"), FILE)
    assert dropped.used[0].tolist() == [3]
    assert one_row(dropped).too_long == 3


def refusal(sets: list[Tokenized], **more: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        choose(sets, sft(*sets, **more), FILE)
    assert caught.value.next_step
    assert caught.value.exit_code == EXIT_REQUEST
    return caught.value


def test_too_long_stops_where_the_recipe_says_so() -> None:
    error = refusal([tokenized([[(5, 3)], *LONG])], too_long="error")
    assert error.place == "/chat.jsonl:3"
    assert error.problem.startswith("has 11 tokens, and sequence_length is 10; 5 of 7")
    fits = tokenized([[(11, 3)]] * 10)
    assert one_row(choose([fits], sft(fits, too_long="error"), FILE)).used == 9


def test_what_leaves_nothing_is_refused() -> None:
    error = refusal([short(5, max_samples=0)])
    assert (error.place, error.problem) == (
        "sft.yaml: datasets", "no sample is left to train on"
    )  # fmt: skip
    error = refusal([tokenized([[(50, 3)]] * 4, name="long"), short(100)])
    assert error.place == "sft.yaml: sequence_length"
    assert error.problem == "all 4 samples of long are longer than 10 tokens"
    assert "truncate" in error.next_step
    error = refusal([tokenized([[(50, 30)]] * 4, name="long")], too_long="truncate")
    assert error.problem == "no answer of long begins within 10 tokens"
    assert "truncate" not in error.next_step


def test_no_dev_sample_is_an_error_where_one_is_wanted() -> None:
    error = refusal([short(9)])
    assert (error.place, error.problem) == (
        "sft.yaml: max_dev_ratio",
        "no dev sample is left: 0.1 of 9 samples of mine is less than one",
    )
    assert "max_dev_samples: 0" in error.next_step
    assert "of each dataset" in refusal([short(9), short(5, name="b")]).problem
    for one, more in (
        (short(9), {"max_dev_samples": 0}),
        (short(9), {"max_dev_ratio": 0.0}),
        (short(9, split_dev=False), {}),
    ):
        choice = choose([one], sft(one, **more), FILE)
        assert (one_row(choice).dev, len(choice.dev)) == (0, 0)
    enough = [short(9), short(10, name="b")]
    assert [row.dev for row in choose(enough, sft(*enough), FILE).rows] == [0, 1]


@settings(deadline=None, max_examples=30)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    most=st.none() | st.integers(1, 40),
    upsampling=st.floats(1, 4, allow_nan=False),
    ratio=st.floats(0, 0.9),
    too_long=st.sampled_from(["drop", "truncate"]),
    data=st.data(),
)
def test_the_table_says_what_is_read(
    sizes: list[int], most: int | None, upsampling: float, ratio: float, too_long: str, data: Any
) -> None:
    example = st.integers(2, 25).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n - 1)))
    samples = st.lists(example, min_size=1, max_size=3)
    sets = [
        tokenized([[(5, 3)], *(data.draw(samples) for _ in range(size))], name=f"{number}",
                  max_samples=most, upsampling=upsampling)
        for number, size in enumerate(sizes)
    ]  # fmt: skip
    recipe = sft(*sets, max_dev_ratio=ratio, too_long=too_long, max_dev_samples=3)
    try:
        choice = choose(sets, recipe, FILE)
    except RequestError as error:
        assert "dev" in error.problem or "no sample" in error.problem
        return
    epoch = choice.epoch(0)
    assert len(epoch) == choice.samples_per_epoch
    for at, row in enumerate(choice.rows):
        train = {n for one, n in epoch.tolist() if one == at}
        dev = {n for one, n in choice.dev.tolist() if one == at}
        assert not train & dev
        assert (len(train), len(dev)) == (row.used, row.dev)
        made = [one for n in train for one in choice.examples(at, n)]
        assert len(made) == row.examples
        assert sum(len(one.tokens) for one in made) == row.tokens
        assert sum(int(one.trained.sum()) for one in made) == row.trained_tokens
        assert all(len(one.tokens) <= 11 and one.trained[-1] for one in made)
        assert all(choice.examples(at, n) for n in train | dev)
        limit = len(sets[at]) if most is None else most
        assert row.used + row.dev <= limit
