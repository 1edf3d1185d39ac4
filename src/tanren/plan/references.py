"""What a recipe stands on: `stage:X` in it, and the product of that stage."""

from __future__ import annotations

from tanren.config.errors import RequestError
from tanren.config.merge import Merge, export_named
from tanren.config.schema import Convert, Evaluation, Export, Recipe
from tanren.config.training import Midtrain, Training, Tuning
from tanren.plan.paths import EXPORTS, TRAINING_STAGES, run_name, stage_name, stage_of
from tanren.plan.plan import Product, Request


def references(recipe: Recipe) -> tuple[str, ...]:
    """Every `stage:X` that a recipe stands on, in the order in which to make them."""
    if isinstance(recipe, Convert):
        found = [recipe.tokenizer]
    elif isinstance(recipe, Midtrain):
        found = [recipe.data, recipe.init]
    elif isinstance(recipe, Tuning):
        found = [recipe.tokenizer, recipe.init]
    elif isinstance(recipe, Export):
        found = [recipe.of]
    elif isinstance(recipe, Merge):
        return tuple(model for model in recipe.ingredients if export_named(model))
    elif isinstance(recipe, Evaluation):
        if of_soup(recipe):
            return (recipe.of,)
        whose = stage_of(stage_name(recipe.of))
        found = [recipe.of, f"stage:{run_name('export', None, None, whose)}"]
    else:
        found = []
    return tuple(r for r in found if r is not None and r.startswith("stage:"))


def reference(stage_reference: str, variant: str | None, name: str | None) -> str:
    """The run folder's name that `stage:X` means inside a run of this variant and name.

    Training stages, soups and exports follow the run's variant and name, so that an export of
    NAME=a never takes the weights of another run (but see `candidates`). Preparing stages are
    shared. A full name (`stage:midtrain-a`) is taken as it is.
    """
    stage = stage_name(stage_reference)
    follows = stage in (*TRAINING_STAGES, *EXPORTS, "merge")
    return run_name(stage, variant, name) if follows else stage


def candidates(
    recipe: Recipe, stage_reference: str, variant: str | None, name: str | None
) -> tuple[str, ...]:
    """The run folders' names that `stage:X` may mean, the first one that has begun before others.

    What is exported or evaluated is the run's of the same variant and name alone. A training may
    also stand on a base that has fewer of the two: trials of sft share one midtraining.
    """
    named = reference(stage_reference, variant, name)
    stage = stage_name(stage_reference)
    if not isinstance(recipe, Training) or stage not in (*TRAINING_STAGES, "merge"):
        return (named,)
    fewer = ((variant, None), (None, name), (None, None))
    return tuple(dict.fromkeys([named, *(run_name(stage, *one) for one in fewer)]))


def base_of(request: Request) -> str | None:
    """The run folder's name of the base that a training begins from; None where it is no run."""
    recipe = request.recipe
    if not isinstance(recipe, Training) or recipe.init not in references(recipe):
        return None
    return product_behind(request, recipe.init).folder.root.name


def product_behind(request: Request, stage_reference: str) -> Product:
    """The product of one of `references`. A soup names the export of a run by its whole name."""
    if isinstance(request.recipe, Merge):
        return request.products[stage_reference]
    return request.products[reference(stage_reference, request.variant, request.name)]


def product_of(request: Request, stage_reference: str, *stages: str) -> Product:
    """The product that a recipe refers to, which must be of one of these stages."""
    product = product_behind(request, stage_reference)
    if product.stage not in stages:
        raise RequestError(
            request.recipe_file,
            f"{stage_reference} is a {product.stage} stage",
            f"here it must be {' or '.join(f'stage:{stage}' for stage in stages)}",
        )
    return product


def of_soup(recipe: Evaluation) -> bool:
    """Whether it is a soup that is evaluated, which is a Hugging Face folder without an export."""
    return stage_of(stage_name(recipe.of)) == "merge"
