"""A mix as a table: what is there of each source, what the run takes, how often it reads it."""

from __future__ import annotations

import orjson
from rich.console import Console

from tanren.config.training import Midtrain
from tanren.plan.mix import Mixture, SourceShare


def print_mix(
    mix: Mixture, recipe: Midtrain, screen: Console, *, by_glob: bool = False
) -> None:  # fmt: skip
    """The table of a mix, its totals, and the steps that these make.

    Args:
        by_glob: one row for all the sources that a glob names.
    """
    titles = ("source", "tokens there", mix.rule.removesuffix("s"), "used", "epochs", "of the run")
    groups = _by_glob(mix) if by_glob else {source.name: [source] for source in mix.sources}
    cells = [
        (
            name,
            f"{sum(source.tokens for source in group):,}",
            f"{group[0].stated:g}" if len(group) > 1 else _stated(mix, group[0]),
            f"{sum(source.used for source in group):,}",
            f"{max(source.epochs for source in group):.2f}",
            f"{sum(source.weight for source in group):.2%}",
        )
        for name, group in groups.items()
    ]
    cells += [(name, f"{tokens:,}", "0", "0", "", "") for name, tokens in mix.left_out.items()]
    there = sum(source.tokens for source in mix.sources) + sum(mix.left_out.values())
    total = ("total", f"{there:,}", "", f"{mix.tokens:,}", "", "")
    rows = [titles, *cells, total]
    widths = [max(len(row[column]) for row in rows) for column in range(len(titles))]
    for row in rows:
        name, *numbers = (
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        line = "  ".join([name, *numbers]).rstrip()
        screen.print(line, style="bold" if row in (titles, total) else None, markup=False)
    steps = f"{mix.steps:,} steps"
    if mix.data_start:
        steps = f"{mix.steps - mix.data_start:,} steps (from {mix.data_start:,} to {mix.steps:,})"
    screen.print(
        f"{mix.tokens:,} tokens in {steps} of {recipe.sequence_length:,} x "
        f"{recipe.global_batch:,} tokens",
        markup=False,
    )


def as_json(mix: Mixture, recipe: Midtrain, notes: tuple[str, ...]) -> str:
    """The same for programs."""
    value = mix.model_dump(mode="json") | {
        "tokens": mix.tokens,
        "sequence_length": recipe.sequence_length,
        "global_batch": recipe.global_batch,
        "notes": notes,
    }
    return orjson.dumps(value, option=orjson.OPT_INDENT_2).decode()


def _by_glob(mix: Mixture) -> dict[str, list[SourceShare]]:
    """The sources by the glob that names them, with their number; others by their name."""
    groups: dict[str, list[SourceShare]] = {}
    for source in mix.sources:
        groups.setdefault(source.pattern or source.name, []).append(source)
    return {
        f"{name} ({len(group)})" if len(group) > 1 else group[0].name: group
        for name, group in groups.items()
    }


def _stated(mix: Mixture, source: SourceShare) -> str:
    """A ratio or a share; a share that a glob spreads over its sources with the glob."""
    spread = mix.rule == "shares" and source.pattern not in (None, source.name)
    return f"{source.pattern} {source.stated:g}" if spread else f"{source.stated:g}"
