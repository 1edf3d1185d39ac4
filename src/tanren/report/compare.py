"""`tanren diff`: the differences of two runs, and their curves at some steps."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console

from tanren.launch.compare import Compared

# Rows of the table, besides the step where the curves part.
ROWS = 10
_TITLES = {"result": "made"}


def print_compared(compared: Compared, there: str, here: str, screen: Console) -> None:
    """In what two runs of a stage differ; `there` is the first one."""
    screen.print(f"[bold]{compared.stage}[/]   there {there}, here {here}")
    for note in compared.notes:
        screen.print(f"  note       {note}", markup=False)
    for name, found in compared.groups.items():
        title = _TITLES.get(name, name)
        for number, line in enumerate(found or ["the same"]):
            screen.print(f"  {'' if number else title:<10} {line}", markup=False)
    print_curves(compared, screen)


def print_curves(compared: Compared, screen: Console) -> None:
    """Losses side by side at some steps, the last values, and where they part."""
    losses, others = compared.curves["loss"]
    if not losses and not others:
        return
    steps = compared.common_steps
    if steps:
        screen.print(f"  {'step':>8}  {'there':>12}  {'here':>12}  {'difference':>11}")
    for step in shown_steps(steps, compared.parts_at):
        mark = "   ← they part" if step == compared.parts_at else ""
        screen.print(
            f"  {step:>8}  {losses[step]:>12.6f}  {others[step]:>12.6f}  "
            f"{others[step] - losses[step]:>+11.2e}{mark}", markup=False,
        )  # fmt: skip
    held_out = compared.curves["held_out_loss"]
    ends = [f"{name} {_end(pair[0])} there, {_end(pair[1])} here"
            for name, pair in (("loss", (losses, others)), ("held out", held_out))
            if pair[0] or pair[1]]  # fmt: skip
    screen.print(f"  the end    {'; '.join(ends)}", markup=False)
    screen.print(f"  losses     {verdict(compared)}", markup=False)


def verdict(compared: Compared) -> str:
    """Whether the losses are equal, and where not from which step on."""
    losses, others = compared.curves["loss"]
    steps = compared.common_steps
    if not steps:
        return "no step is in both"
    if compared.parts_at is not None:
        return f"differ from step {compared.parts_at} on"
    rest = "" if losses.keys() == others.keys() else f" (there {len(losses)}, here {len(others)})"
    return f"equal bit for bit in all {len(steps)} steps that both have{rest}"


def shown_steps(steps: list[int], parts_at: int | None) -> list[int]:
    """The first step, the last one, some between, and the one where the curves part."""
    if len(steps) <= ROWS:
        return steps
    chosen = {steps[round(n * (len(steps) - 1) / (ROWS - 1))] for n in range(ROWS)}
    return sorted(chosen | ({parts_at} if parts_at is not None else set()))


def _end(curve: Mapping[int, float]) -> str:
    return f"{curve[max(curve)]:.6f} (step {max(curve)})" if curve else "none"
