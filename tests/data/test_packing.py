"""Packing fills rows and loses nothing; a micro batch says whose each position is."""

from __future__ import annotations

import json
import os
import random
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from tanren.data import tokenizer as tokenizers
from tanren.data.packing import Bins, Numbers, best_fit, collate, evened, to_device, trimmed
from tests.conftest import REPOSITORY

# No part of the repository: see tests/stages/test_real_data.py.
DATA = Path(os.environ.get("TANREN_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
MODEL = DATA / "llm-jp-tokenizer-v4" / "llm-jp-tokenizer_ver4.0_alpha1.0.model"


def contents(bins: Bins) -> list[list[int]]:
    return [bins[number].tolist() for number in range(len(bins))]


def free_spaces_one_by_one(lengths: list[int], capacity: int) -> list[int]:
    """Best-fit decreasing as it is defined: item after item, all bins looked at."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [bin for bin, space in enumerate(free) if space >= length]
        if not fitting:
            fitting = [len(free)]
            free.append(capacity)
        free[min(fitting, key=lambda bin: free[bin])] -= length
    return sorted(free)


def test_a_small_case_by_hand() -> None:
    lengths = np.array([3, 5, 2, 5, 3, 1, 2])
    assert contents(best_fit(lengths, 8)) == [[1, 0], [3, 4], [2, 6, 5]]


def test_nothing_takes_no_bins() -> None:
    bins = best_fit(np.zeros(0, dtype=np.int32), 8)
    assert (len(bins), bins.items.tolist(), bins.starts.tolist()) == (0, [], [0])


@given(
    st.integers(1, 40).flatmap(
        lambda capacity: st.tuples(
            st.just(capacity), st.lists(st.integers(1, capacity), max_size=80), st.randoms()
        )
    )
)
@settings(deadline=None)
def test_every_item_is_in_one_bin_and_no_bin_is_too_full(
    case: tuple[int, list[int], random.Random],
) -> None:
    capacity, listed, shuffler = case
    lengths = np.array(listed, dtype=np.int32)
    bins = best_fit(lengths, capacity)
    assert len(bins.items) == len(lengths)
    assert sorted(bins.items.tolist()) == list(range(len(lengths)))
    free = sorted(capacity - int(lengths[items].sum()) for items in contents(bins))
    assert all(space >= 0 for space in free)
    assert free == free_spaces_one_by_one(listed, capacity)
    shuffler.shuffle(listed)
    assert len(best_fit(np.array(listed, dtype=np.int32), capacity)) == len(bins)


def test_shuffled_items_make_other_bins() -> None:
    numbers = np.random.default_rng(0)
    lengths = numbers.integers(1, 100, 1000)
    order = numbers.permutation(len(lengths))
    first = {frozenset(bin) for bin in contents(best_fit(lengths, 400))}
    again = {frozenset(bin) for bin in contents(best_fit(lengths, 400))}
    shuffled = best_fit(lengths[order], 400)
    other = {frozenset(order[bin].tolist()) for bin in contents(shuffled)}
    assert first == again
    assert len(first) == len(other)
    assert len(first & other) < len(first) / 10


def test_an_item_over_the_capacity_is_our_own_mistake() -> None:
    for lengths in ([9, 3], [0, 3]):
        with pytest.raises(AssertionError):
            best_fit(np.array(lengths), 8)


@pytest.mark.skipif(not MODEL.exists(), reason=f"there is no {MODEL}")
def test_real_problems_fill_rows_to_99_percent() -> None:
    lines = (DATA / "gsm8k" / "train.jsonl").read_text().splitlines()
    texts = [f"{one['question']}\n{one['answer']}" for one in map(json.loads, lines)]
    lengths = np.array([len(ids) for ids in tokenizers.read(MODEL).encode(texts)])
    assert len(lengths) == 7473
    for capacity in (2048, 4096):
        bins = best_fit(lengths, capacity)
        assert lengths.sum() / (len(bins) * capacity) > 0.99


class Text(NamedTuple):
    tokens: npt.NDArray[np.int32]
    trained: npt.NDArray[np.bool_]


def text(tokens: list[int], trained: str) -> Text:
    assert len(tokens) == len(trained)
    return Text(np.array(tokens, dtype=np.int32), np.array([mark == "+" for mark in trained]))


def test_a_micro_batch_by_hand() -> None:
    """Two examples and two paddings; a full row; an empty row."""
    rows = [
        [text([11, 12, 13, 14], "--++"), text([21, 22], "-+")],
        [text([31, 32, 33, 34, 35, 36], "+-+--+"), text([41, 42], "+-")],
        [],
    ]
    batch = collate(rows, 6)
    expected = {
        "tokens": [[11, 12, 13, 21, 0, 0], [31, 32, 33, 34, 35, 41], [0] * 6],
        "position_ids": [[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 0], [0, 1, 2, 3, 4, 5]],
        "cu_seqlens": [0, 3, 4, 6, 11, 12, 18],
        "max_seqlen": 6,
        # The first token of an example is nobody's label: its mark does not count.
        "positions": [1, 2, 3, 7, 10],
        "targets": [13, 14, 22, 33, 36],
        "weights": [1.0, 1.0, 1.0, 1.0, 1.0],
        "examples": [0, 0, 1, 2, 2],
    }
    assert {name: value.tolist() for name, value in batch.items()} == expected
    types = {name: value.dtype for name, value in batch.items()}
    integers = dict.fromkeys(expected, torch.int64)
    assert types == integers | {
        "cu_seqlens": torch.int32, "max_seqlen": torch.int32, "weights": torch.float32,
    }  # fmt: skip


@pytest.mark.parametrize("rows", [[[], []], [[text([5, 6, 7], "+--")], []]])
def test_a_micro_batch_without_an_answer_has_one_position_of_no_weight(
    rows: list[list[Text]],
) -> None:
    batch = collate(rows, 4)
    found = [batch[name].tolist() for name in ("positions", "targets", "weights", "examples")]
    assert found == [[0], [0], [0.0], [0]]


@st.composite
def micro_batches(draw: st.DrawFn) -> tuple[int, list[list[Text]]]:
    width = draw(st.integers(1, 12))
    rows: list[list[Text]] = []
    for _ in range(draw(st.integers(1, 4))):
        row: list[Text] = []
        left = width
        while left and draw(st.booleans()):
            length = draw(st.integers(1, left))
            left -= length
            tokens = draw(st.lists(st.integers(1, 99), min_size=length + 1, max_size=length + 1))
            row.append(text(tokens, "".join(draw(st.sampled_from("+-")) for _ in tokens)))
        rows.append(row)
    return width, rows


@given(micro_batches())
@settings(deadline=None)
def test_a_micro_batch_gives_every_example_back(case: tuple[int, list[list[Text]]]) -> None:
    width, rows = case
    batch = {name: value.numpy() for name, value in collate(rows, width).items()}
    starts, tokens = batch["cu_seqlens"], batch["tokens"].ravel()
    assert (starts[0], starts[-1], batch["tokens"].shape) == (0, len(tokens), (len(rows), width))
    segments = list(pairwise(starts))
    assert all(first < last <= (first // width + 1) * width for first, last in segments)
    assert batch["max_seqlen"] == max(last - first for first, last in segments)
    restarted = [place for first, last in segments for place in range(last - first)]
    assert batch["position_ids"].ravel().tolist() == restarted

    examples = [example for row in rows for example in row]
    marks = [list(tokens[first:last]) for first, last in segments]
    assert [list(example.tokens[:-1]) for example in examples] == [
        segment for segment in marks if any(segment)
    ]
    own = [first for (first, _), segment in zip(segments, marks, strict=True) if any(segment)]
    counted = [
        (own[number] + place, label, number)
        for number, example in enumerate(examples)
        for place, (label, mark) in enumerate(
            zip(example.tokens[1:], example.trained[1:], strict=True)
        )
        if mark
    ]
    found = list(zip(*(batch[name] for name in ("positions", "targets", "examples")), strict=True))
    assert found == (counted or [(0, 0, 0)])
    assert batch["weights"].tolist() == ([1.0] * len(counted) or [0.0])


def test_workers_make_micro_batches() -> None:
    """As a DataLoader's collate_fn in another process."""
    rows = [[text([number, 7, 8, 9], "-+-+")] for number in range(1, 6)]
    loader: DataLoader[dict[str, torch.Tensor]] = DataLoader(
        rows,  # type: ignore[arg-type]
        batch_sampler=[[0, 1], [2, 3]], collate_fn=partial(collate, width=4), num_workers=1,
    )  # fmt: skip
    made = list(loader)
    assert [batch["tokens"][:, 0].tolist() for batch in made] == [[1, 2], [3, 4]]
    moved = to_device(made[0], torch.device("meta"))
    assert moved.keys() == made[0].keys()
    assert {name for name, value in moved.items() if value.device.type == "cpu"} == {"max_seqlen"}


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=40).map(np.array),
    st.integers(60, 200),
    st.integers(1, 6),
)
def test_evened_bins_hold_every_item_once_in_a_multiple_of_bins(
    lengths: Numbers, capacity: int, multiple: int
) -> None:
    tight = best_fit(lengths, capacity)
    bins = evened(lengths, tight, capacity, multiple)
    assert sorted(bins.items.tolist()) == list(range(len(lengths)))
    sums = [int(lengths[bins[number]].sum()) for number in range(len(bins))]
    assert max(sums) <= capacity
    if bins is not tight:
        assert len(bins) == -(-len(tight) // multiple) * multiple
        # Whoever is fullest was the emptiest when its last, and shortest, item came.
        assert max(sums) - min(sums) <= int(lengths.max())


def test_bins_that_cannot_be_evened_stay_tight() -> None:
    lengths = np.array([6, 6, 4, 4, 4])  # 12 and 12; evened 14 and 10
    tight = best_fit(lengths, 12)
    assert len(tight) == 2
    assert evened(lengths, tight, 12, 1) is tight


def test_pairs_of_a_step_fill_every_replica_alike() -> None:
    """100 pairs of 300 tokens in rows of 8,192: 4 rows, and with three replicas 6 of 17 or 16."""
    lengths = np.full(100, 300)
    tight = best_fit(lengths, 8192)
    assert [len(tight[number]) for number in range(len(tight))] == [27, 27, 27, 19]
    bins = evened(lengths, tight, 8192, 3)
    assert [len(bins[number]) for number in range(len(bins))] == [17, 17, 17, 17, 16, 16]


def test_a_micro_batch_is_as_wide_as_its_longest_row() -> None:
    def one(length: int) -> Text:
        """A text that takes so many positions as input."""
        return text([1] * (length + 1), "-" * length + "+")

    rows = [[one(100), one(31)], [one(12)]]
    assert trimmed(rows, 4096) == 256
    assert trimmed(rows, 200) == 200
    assert trimmed([[one(128)]], 4096) == trimmed([[], []], 4096) == 128
