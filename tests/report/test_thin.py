"""Curves of any length as few points."""

from __future__ import annotations

import math
import random

import pytest

from tanren.report.thin import Curve, smoothed, thinned, window_of


def noisy(count: int) -> Curve:
    draw = random.Random(7)
    return Curve(list(range(1, count + 1)), [draw.gauss(3, 1) for _ in range(count)])


@pytest.mark.parametrize("count", [1, 2, 50])
def test_a_short_curve_stays_as_it_is(count: int) -> None:
    assert thinned(noisy(count), points=50) == noisy(count)


@pytest.mark.parametrize("count", [51, 1000, 9999])
def test_a_long_curve_keeps_its_ends_and_every_peak(count: int) -> None:
    curve = noisy(count)
    curve.values[count // 3], curve.values[count // 2] = 99.0, -99.0  # type: ignore[index]
    few = thinned(curve, points=50)
    assert 25 <= len(few) == len(few.values) <= 50
    assert (few.steps[0], few.steps[-1]) == (1, count)
    assert sorted(set(few.steps)) == list(few.steps)
    assert {99.0, -99.0} <= set(few.values)
    assert all(
        curve.values[step - 1] == value for step, value in zip(few.steps, few.values, strict=True)
    )


def test_smoothing_begins_at_the_first_value_and_keeps_a_constant() -> None:
    assert smoothed(Curve([1, 2, 3], [4.0, 4.0, 4.0]), 5).values == pytest.approx([4.0] * 3)
    mean = smoothed(noisy(4000), 100).values
    assert len(mean) == 4000
    assert mean[0] == pytest.approx(noisy(1).values[0])
    # The variance of an exponential mean over n values is 1/n of theirs.
    late = mean[1000:]
    assert math.sqrt(sum((v - 3) ** 2 for v in late) / len(late)) == pytest.approx(0.1, rel=0.35)


def test_the_window_grows_with_the_curve_between_bounds() -> None:
    assert [window_of(noisy(n)) for n in (10, 1000, 100_000)] == [5, 25, 500]
