"""Every example is read so often as asked, in rows that fit, the same whoever reads them."""

from __future__ import annotations

import numpy as np
import pytest

from tanren.data.rows import Conversations, Pairs

LENGTHS = np.random.default_rng(0).integers(3, 60, 100)
WIDTH = 64


def every(epoch: int) -> np.ndarray:
    return np.arange(100)


def conversations(**changes: object) -> Conversations:
    settings = {"width": WIDTH, "a_step": 8, "seed": 5, **changes}
    return Conversations(LENGTHS, every, **settings)


def read(rows: Conversations | Pairs, steps: int) -> list[list[int]]:
    return [row.tolist() for step in range(steps) for row in rows.rows(step)]


def test_two_epochs_read_each_example_twice_in_rows_that_fit() -> None:
    rows = conversations(epochs=2.0)
    found = read(rows, rows.steps)
    numbers, times = np.unique(np.concatenate(found), return_counts=True)
    assert numbers.tolist() == list(range(100))
    assert set(times) == {2}
    filled = [LENGTHS[row].sum() for row in found]
    assert max(filled) <= WIDTH
    assert sum(filled) / (len(filled) * WIDTH) > 0.9
    assert len(rows.rows(rows.steps - 1)) == len(found) - 8 * (rows.steps - 1)


def test_epochs_are_packed_anew_and_their_rows_are_not_in_the_order_of_lengths() -> None:
    rows = conversations(epochs=2.0)
    found = read(rows, rows.steps)
    half = len(found) // 2
    assert len(found) == 2 * half
    first, second = ({tuple(sorted(row)) for row in part} for part in (found[:half], found[half:]))
    assert first != second
    longest = [max(LENGTHS[row]) for row in found[:half]]
    assert longest != sorted(longest, reverse=True)


def test_a_step_is_the_same_whoever_asks_for_it_and_when() -> None:
    straight, later = conversations(), conversations()
    steps = [read(straight, 30)[8 * step : 8 * step + 8] for step in range(30)]
    assert [row.tolist() for row in later.rows(29)] == steps[29]
    assert [row.tolist() for row in later.rows(3)] == steps[3]
    assert read(conversations(seed=6), 1) != steps[0]


def test_part_of_an_epoch() -> None:
    whole, more = conversations(epochs=1.0), conversations(epochs=1.25)
    assert whole.last is not None
    assert more.last == whole.last + -(-whole.last // 4)


def test_without_packing_a_row_holds_one_example() -> None:
    rows = conversations(packing=False, epochs=1.0)
    found = read(rows, rows.steps)
    assert sorted(found) == [[number] for number in range(100)]
    assert rows.steps == 13
    assert len(rows.rows(12)) == 4


@pytest.mark.parametrize("a_step", [1, 8, 50])
def test_a_step_of_pairs_holds_so_many_with_both_answers_in_one_row(a_step: int) -> None:
    pairs = Pairs(
        LENGTHS, lambda epoch: np.arange(50), width=2 * WIDTH, a_step=a_step, seed=5, epochs=1.0
    )
    seen = []
    for step in range(pairs.steps):
        rows = pairs.rows(step)
        assert all(LENGTHS[row].sum() <= 2 * WIDTH for row in rows)
        both = np.concatenate(rows).reshape(-1, 2)
        assert (both[:, 0] % 2 == 0).all()
        assert (both[:, 1] == both[:, 0] + 1).all()
        assert len(both) == min(a_step, 50 - step * a_step)
        seen += (both[:, 0] // 2).tolist()
    assert sorted(seen) == list(range(50))


def test_steps_are_so_many_epochs() -> None:
    whole = conversations(epochs=1.0)
    rows = whole.last
    assert rows
    assert conversations().epochs(rows) == pytest.approx(whole.a_step)
    assert conversations(packing=False).epochs(3) == pytest.approx(3 * whole.a_step / LENGTHS.size)
