"""Curves of any length as few points, so that no peak is lost; and their running means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Points of a curve on a page, at most: of a curve with more, the smallest and the largest value of
# each of half as many buckets.
POINTS = 2000
# Steps that a smoothed curve averages over: this share of the curve, within these bounds.
_SHARE, _LEAST, _MOST = 1 / 40, 5, 500


@dataclass(frozen=True)
class Curve:
    """A metric by step, in the order of the steps."""

    steps: Sequence[int]
    values: Sequence[float]

    def __len__(self) -> int:
        return len(self.steps)


def thinned(curve: Curve, points: int = POINTS) -> Curve:
    """The curve with its ends, and of each bucket of steps its smallest and its largest value."""
    count = len(curve)
    if count <= points:
        return curve
    buckets = points // 2 - 1
    kept = [0]
    for number in range(buckets):
        # The ends are kept anyway.
        begin = 1 + number * (count - 2) // buckets
        end = 1 + (number + 1) * (count - 2) // buckets
        inside = range(begin, end)
        low = min(inside, key=curve.values.__getitem__)
        high = max(inside, key=curve.values.__getitem__)
        kept += sorted({low, high})
    kept.append(count - 1)
    return Curve([curve.steps[at] for at in kept], [curve.values[at] for at in kept])


def window_of(curve: Curve) -> int:
    """Over how many steps a curve of this length is smoothed."""
    return min(max(int(len(curve) * _SHARE), _LEAST), _MOST)


def smoothed(curve: Curve, window: int) -> Curve:
    """The exponential mean with the centre of mass of a plain mean over `window` values.

    Divided by the sum of its weights, so that it begins at the first value (Adam's bias
    correction; Kingma and Ba 2015, section 3).
    """
    keep = (window - 1) / (window + 1)
    total = weight = 0.0
    values = []
    for value in curve.values:
        total = keep * total + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        values.append(total / weight)
    return Curve(curve.steps, values)
