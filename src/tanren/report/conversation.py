"""What tuning trains on, for a person: an example with its trained part marked, and the sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

_OPEN, _CLOSE = "⟦", "⟧"


def print_example(
    title: str, pieces: Sequence[tuple[str, bool]], screen: Console, *, tokens: int, trained: int
) -> None:
    """An example as text: what is trained is green on a terminal, and in a pipe between ⟦ and ⟧.

    Args:
        title: where it is from.
        pieces: its text in stretches, special tokens visible, and whether each is trained.
        tokens: how many tokens it has, and how many of these are `trained`.
    """
    screen.print(
        f"{title}  {tokens:,} tokens, {trained:,} trained", style="bold", markup=False,
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    text = Text()
    for piece, is_trained in pieces:
        if screen.is_terminal:
            text.append(piece, style="green" if is_trained else "dim")
        else:
            text.append(f"{_OPEN}{piece}{_CLOSE}" if is_trained else piece)
    screen.print(text, highlight=False, soft_wrap=True)


def print_sets(rows: Sequence[Mapping[str, Any]], screen: Console) -> None:
    """The table of the sets of a run: what was read of each, and what became of it.

    Args:
        rows: `data.selection.Row` as values.
    """
    keys = ("read", "too_long", "used", "dev", "samples_per_epoch", "examples", "tokens",
            "trained_tokens")  # fmt: skip
    titles = ["dataset", "read", "too long", "used", "dev", "an epoch", "examples", "tokens",
              "trained"]  # fmt: skip
    cells = [[str(row["name"]), *(f"{row[key]:,}" for key in keys)] for row in rows]
    total = ["total", *(f"{sum(row[key] for row in rows):,}" for key in keys)]
    table = [titles, *cells, *([total] if len(rows) > 1 else [])]
    widths = [max(len(row[column]) for row in table) for column in range(len(titles))]
    for row in table:
        name, *numbers = row
        line = [name.ljust(widths[0]), *map(str.rjust, numbers, widths[1:])]
        style = "bold" if row is titles or row is total else None
        screen.print("  ".join(line), style=style, markup=False, highlight=False, soft_wrap=True)
