"""The FP8 gate as a table and as a picture."""

from __future__ import annotations

from rich.console import Console

from tanren.plan.gate import BF16, CONTROL, END, WINDOW, Comparison, Curves
from tanren.report import curves_svg


def print_gate(
    compared: dict[str, Comparison], failed: dict[str, str], steps: int, limit: float,
    screen: Console,
) -> None:  # fmt: skip
    """A row for each FP8 recipe: its relative differences to bf16, and whether it passes.

    The control's row tells what chance does; where that is no less than the limit, a line says so.

    Args:
        limit: a share of 1.
        failed: of the runs that did not come to their end, why.
    """
    titles = ("fp8", "step 1", "largest", "at step", f"last {END}", "held out", "grad norm",
              "speed", "")  # fmt: skip
    cells = [
        (
            name, _percent(one.first), _percent(one.largest), str(one.at), _percent(one.end),
            "" if one.held_out is None else _percent(one.held_out), f"x {one.grad_norm:.3f}",
            f"x {one.speed:.2f}", _verdict(name, one, limit),
        )
        for name, one in compared.items()
    ]  # fmt: skip
    rows = [titles, *cells]
    widths = [max(len(row[column]) for row in rows) for column in range(len(titles))]
    screen.print(f"loss against bf16 over {steps} steps, limit {100 * limit:g} %", markup=False)
    for row in rows:
        name, *values = (
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        line = "  ".join([name, *values]).rstrip()
        screen.print(line, style="bold" if row is titles else None, markup=False)
    control = compared.get(CONTROL)
    if control is not None and not control.passes(limit):
        screen.print(
            "two runs in bf16 are as far apart as the limit: it decides nothing here; a trained "
            "base, a lower learning rate or a larger batch drift less",
            markup=False,
        )
    for name, problem in failed.items():
        screen.print(f"{name}  refused: {problem}", markup=False)


def picture(
    what: str, curves: dict[str, Curves], compared: dict[str, Comparison], limit: float
) -> str:
    """gate.svg: the losses of bf16 and of each FP8 recipe, and the differences between them.

    Args:
        what: was trained, such as `mine/midtrain`.
        curves: by FP8 recipe, and of `bf16`.
        limit: a share of 1.
    """
    found = "; ".join(
        f"{name}: largest {_percent(one.largest)} at step {one.at}, at the end "
        f"{_percent(one.end)}, {_verdict(name, one, limit)}"
        for name, one in compared.items()
    )
    return curves_svg.draw(
        f"FP8 against bf16: {what}",
        (BF16, curves[BF16].loss),
        {name: curves[name].loss for name in compared},
        {name: one.by_step for name, one in compared.items()},
        limit,
        f"Above, the training loss by step in bf16 and in FP8. Below, the relative difference of "
        f"its means over {WINDOW} steps, with a limit of {100 * limit:g} %. {found}.",
    )


def _verdict(name: str, one: Comparison, limit: float) -> str:
    if name == CONTROL:
        return "chance"
    return "passed" if one.passes(limit) else "refused"


def _percent(share: float) -> str:
    return f"{100 * share:+.3f} %"
