"""The plan of a soup: which folders go into it."""

from __future__ import annotations

from typing import Any

from tanren.config.merge import Merge, export_named
from tanren.plan.plan import Launch, MergePlan, Request, common, settings_of


def merge_plan(request: Request, recipe: Merge) -> MergePlan:
    """Plan a soup."""
    inputs: dict[str, Any] = dict(request.inputs)
    folders: dict[str, str | None] = {}
    for model in recipe.ingredients:
        if export_named(model) is None:
            folders[model] = model
            continue
        product = request.products[model]
        folders[model] = str(product.result["hf"]) if product.result else None
        inputs[model] = product.identity
    settings = settings_of(recipe) | {"inputs": inputs}
    return MergePlan(
        **common(request, settings, Launch(engine=False, processes=1, device="cpu", own="merge")),
        recipe=recipe,
        folders=folders,
    )
