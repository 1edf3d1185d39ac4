"""What `make doctor` found, as a person reads it."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from tanren.launch.doctor import Group

_STYLES = {"ok": "green", "warning": "yellow", "missing": "bold red"}


def print_groups(groups: list[Group], screen: Console) -> None:
    """A group a stage, a line a finding, and below what is not in order what to do next."""
    width = max(len(one.what) for group in groups for one in group.findings) + 2
    for group in groups:
        screen.print(group.title, style="bold", markup=False)
        for one in group.findings:
            line = Text(f"  {one.state:<9}", style=_STYLES[one.state])
            screen.print(line.append(f"{one.what:<{width}}{one.found}", style="default"),
                         soft_wrap=True)  # fmt: skip
            if one.next_step:
                screen.print(f"  {'':<9}{'':<{width}}next: {one.next_step}", markup=False,
                             highlight=False, soft_wrap=True)  # fmt: skip
