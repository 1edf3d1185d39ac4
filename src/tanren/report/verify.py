"""The table of --verify: how far two forms of a model are apart, a line a layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.console import Console


def print_report(report: Mapping[str, Any], screen: Console) -> None:
    """Print the differences, of a layer the larger ones of its attention and its MLP.

    Args:
        report: stages/verify.py's, as plain values.
    """
    lines: dict[str, list[float]] = {}
    for one in report["differences"]:
        words = one["where"].split()
        place = " ".join(words[:2]) if words[0] == "layer" else one["where"]
        before = lines.setdefault(place, [0.0, 0.0])
        for column, value in enumerate((one["largest"], one["relative"])):
            if math.isnan(value) or value > before[column]:
                before[column] = value
    width = max(map(len, lines))
    screen.print(f"  {'':<{width}}   largest  relative", highlight=False)
    for place, (largest, relative) in lines.items():
        beyond = "" if relative <= report["tolerance"] else "   differs"
        screen.print(
            f"  {place:<{width}}  {largest:8.1e}  {relative:8.1e}{beyond}",
            markup=False, highlight=False,
        )  # fmt: skip
    screen.print(
        f"  {report['tokens']} tokens, fp32, in {report['seconds']:.1f} s; relative to a token's "
        f"vector, {report['tolerance']:.0e} is the bound",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
