"""The table of --verify."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from tanren.report.verify import print_report


def printed(differences: list[tuple[str, float, float]]) -> str:
    report: dict[str, Any] = {
        "differences": [
            {"where": where, "largest": largest, "relative": relative}
            for where, largest, relative in differences
        ],
        "tolerance": 1e-4, "tokens": 48, "seconds": 12.34,
    }  # fmt: skip
    out = io.StringIO()
    print_report(report, Console(file=out, width=120))
    return out.getvalue()


def test_a_layer_is_a_line_with_the_larger_differences() -> None:
    text = printed([
        ("embedding", 0.0, 0.0), ("layer 0 attention", 3e-6, 2e-7), ("layer 0 MLP", 1e-6, 4e-7),
        ("layer 10 attention", 1e-6, 1e-7), ("layer 10 MLP", 2e-6, 9e-8),
        ("final norm", 1e-6, 1e-6), ("logits", 1.2e-5, 1.9e-6),
    ])  # fmt: skip
    assert text == (
        "               largest  relative\n"
        "  embedding    0.0e+00   0.0e+00\n"
        "  layer 0      3.0e-06   4.0e-07\n"
        "  layer 10     2.0e-06   1.0e-07\n"
        "  final norm   1.0e-06   1.0e-06\n"
        "  logits       1.2e-05   1.9e-06\n"
        "  48 tokens, fp32, in 12.3 s; relative to a token's vector, 1e-04 is the bound\n"
    )


def test_the_line_that_differs_says_so_and_a_nan_stays_one() -> None:
    wrong = printed([("embedding", 0.0, 0.0), ("layer 0 attention", 0.5, 2e-2)])
    assert wrong.splitlines()[2] == "  layer 0     5.0e-01   2.0e-02   differs"
    nan = float("nan")
    broken = printed([("layer 1 attention", nan, nan), ("layer 1 MLP", 1.0, 1e-5)])
    assert broken.splitlines()[1].split() == ["layer", "1", "nan", "nan", "differs"]
