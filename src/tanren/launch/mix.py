"""A recipe's mix on its own: from the data that is there, or from a table before there is any."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tanren import tokenfiles
from tanren.config.errors import RequestError
from tanren.config.training import Midtrain
from tanren.launch import inputs, reading
from tanren.launch.orders import Order, shown
from tanren.plan.midtrain import data_of, source_counts, table_counts
from tanren.plan.mix import Mixture, SourceCount, count_notes, make_mixture
from tanren.plan.plan import Machine, Product


def compile_mix(order: Order, table: Path | None) -> tuple[Midtrain, Mixture, tuple[str, ...]]:
    """The mix of a recipe, read from its own start.

    Args:
        table: counts to take in place of the preprocessed data.
    Returns:
        the recipe, its mix, and notes for a person: where the counts are from, how they differ.
    Raises:
        RequestError: there are no counts, or the token files are not those that were counted.
    """
    request = reading.read_request(order, Machine())
    recipe = request.recipe
    if not isinstance(recipe, Midtrain):
        raise RequestError(order.recipe_file, "has no mix", "name a midtrain recipe")
    data = data_of(request, recipe)
    counts, notes = _counts(order, recipe, data, table, request.counts)
    return recipe, make_mixture(recipe, counts, str(request.recipe_file)), notes


def _counts(
    order: Order, recipe: Midtrain, data: Product, table: Path | None,
    stated: Mapping[str, int] | None,
) -> tuple[tuple[SourceCount, ...], tuple[str, ...]]:  # fmt: skip
    if table is not None:
        return table_counts(inputs.read_counts(table), data.folder), (f"counts of {table}",)
    counted = source_counts(data)
    if counted is not None:
        for count in counted:
            _check(count)
        notes = count_notes(counted, stated, shown(recipe.mix.counts or "")) if stated else ()
        return counted, (f"counts of {shown(data.folder.root)}", *notes)
    if stated is not None:
        name = shown(recipe.mix.counts or "")
        return table_counts(stated, data.folder), (f"counts of {name}: preprocess has not run",)
    raise RequestError(
        data.folder.root,
        "holds no tokens to count",
        f"make preprocess, or {order.command('mix')} --counts TABLE.tsv",
    )


def _check(count: SourceCount) -> None:
    """Hold what preprocess wrote down to the token files."""
    there = tokenfiles.count(Path(count.prefix))
    if there.tokens != count.tokens:
        raise RequestError(
            tokenfiles.idx_path(Path(count.prefix)),
            f"counts {there.tokens:,} tokens, and preprocess wrote down {count.tokens:,}",
            tokenfiles.AGAIN,
        )
