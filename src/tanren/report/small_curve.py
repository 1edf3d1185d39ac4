"""A curve in a terminal: a few lines of block characters."""

from __future__ import annotations

from rich.console import Console

from tanren import runs
from tanren.plan.paths import RunFolder
from tanren.report.charts import number
from tanren.report.record import curves_of
from tanren.report.thin import Curve

_EIGHTHS = " ▁▂▃▄▅▆▇█"
ROWS, NARROWEST, WIDEST = 6, 60, 72


def print_loss(folder: RunFolder, screen: Console) -> None:
    """The loss of a run, where the terminal is wide enough and there is something to see."""
    if not screen.is_terminal or screen.width < NARROWEST:
        return
    curve = curves_of(runs.read_lines(folder.metrics)).get("loss")
    if curve is None or len(curve) < 2:
        return
    for line in drawn(curve, min(screen.width - 12, WIDEST)):
        screen.print(line, markup=False, highlight=False)


def drawn(curve: Curve, width: int) -> list[str]:
    """The curve's means over `width` columns, as a filled area with its range beside it.

    Returns:
        ROWS lines and one with the first and the last step.
    """
    columns = min(width, len(curve))
    means = []
    for column in range(columns):
        begin = column * len(curve) // columns
        end = (column + 1) * len(curve) // columns
        means.append(sum(curve.values[begin:end]) / (end - begin))
    low, high = min(means), max(means)
    # The lowest column still has an eighth: an empty one would be no value.
    heights = [1 + round((value - low) / (high - low or 1.0) * (8 * ROWS - 1)) for value in means]
    beside = {0: number(high), ROWS - 1: number(low)}
    label = max(map(len, beside.values()))
    lines = []
    for row in range(ROWS):
        below = 8 * (ROWS - 1 - row)
        blocks = "".join(_EIGHTHS[min(max(height - below, 0), 8)] for height in heights)
        lines.append(f"  {beside.get(row, ''):>{label}} {blocks}".rstrip())
    first, last = f"{curve.steps[0]:,}", f"{curve.steps[-1]:,}"
    lines.append(f"  {'':>{label}} {first}{last:>{max(columns - len(first), len(last) + 1)}}")
    return lines
