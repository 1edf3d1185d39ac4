"""A curve in a terminal."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from tanren.report.small_curve import ROWS, drawn, print_loss
from tanren.report.thin import Curve
from tests.report.folders import make_run


def test_a_curve_falls_from_the_upper_left_to_the_lower_right() -> None:
    lines = drawn(Curve(list(range(1, 201)), [5.0 - step / 50 for step in range(200)]), 40)
    assert len(lines) == ROWS + 1
    assert lines[0].split()[0] == "4.96"
    assert lines[ROWS - 1].split()[0] == "1.06"
    full = [line.count("█") for line in lines[:ROWS]]
    assert full == sorted(full)
    assert full[0] < 10
    assert full[-1] > 30
    assert lines[-1].split() == ["1", "200"]
    assert max(map(len, lines)) <= 40 + 8


def test_a_flat_curve_and_one_of_two_steps_are_drawn_too() -> None:
    assert len(drawn(Curve([1, 2], [3.0, 3.0]), 40)) == ROWS + 1


def test_a_curve_is_printed_only_where_it_fits(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    printed = {}
    for name, terminal, width in (("wide", True, 100), ("narrow", True, 50), ("pipe", False, 100)):
        out = io.StringIO()
        print_loss(folder, Console(file=out, force_terminal=terminal, width=width))
        printed[name] = out.getvalue().count("\n")
    assert printed == {"wide": ROWS + 1, "narrow": 0, "pipe": 0}
