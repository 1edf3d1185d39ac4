"""Plans of the stages: the one that a request asks for, and those that prepare and export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tanren.config.data import Preprocess
from tanren.config.errors import RequestError
from tanren.config.merge import Merge
from tanren.config.schema import Convert, Evaluation, Export
from tanren.config.training import Midtrain, Tuning
from tanren.plan.checks import check_vocabulary
from tanren.plan.merge import merge_plan
from tanren.plan.midtrain import midtrain_plan
from tanren.plan.paths import TRAINING_STAGES
from tanren.plan.plan import (
    ConvertPlan,
    EvaluationPlan,
    ExportPlan,
    Launch,
    Plan,
    PreprocessPlan,
    Product,
    Request,
    common,
    settings_of,
)
from tanren.plan.references import of_soup, product_of, references
from tanren.plan.tuning import tuning_plan


def make_plan(request: Request) -> Plan:
    """Plan a stage.

    Raises:
        RequestError: the recipe does not fit the machine, its data or its base.
    """
    recipe = request.recipe
    if isinstance(recipe, Preprocess):
        return _preprocess_plan(request, recipe)
    if isinstance(recipe, Convert):
        return _convert_plan(request, recipe)
    if isinstance(recipe, Midtrain):
        return midtrain_plan(request, recipe)
    if isinstance(recipe, Tuning):
        return tuning_plan(request, recipe)
    if isinstance(recipe, Merge):
        return merge_plan(request, recipe)
    if isinstance(recipe, Evaluation):
        return _evaluation_plan(request, recipe)
    return _export_plan(request, recipe)


def _preprocess_plan(request: Request, recipe: Preprocess) -> PreprocessPlan:
    if request.part is not None and recipe.tokenizer.train is not None:
        raise RequestError(
            f"{request.recipe_file}: tokenizer.train",
            f"would train a tokenizer in each of {request.part.of} parts, and all need the same",
            "train it once, by preprocess without PARTS on some of the text, and name its folder: "
            "tokenizer: {path: runs/TASK/preprocess/tokenizer}",
        )
    return PreprocessPlan(
        **common(
            request,
            settings_of(recipe) | {"inputs": dict(request.inputs)},
            Launch(engine=False, processes=1, device="cpu"),
        ),
        recipe=recipe,
        part=request.part,
    )


def _convert_plan(request: Request, recipe: Convert) -> ConvertPlan:
    assert request.model is not None
    inputs: dict[str, Any] = dict(request.inputs)
    tokenizer = None
    if recipe.tokenizer is not None:
        product = product_of(request, recipe.tokenizer, "preprocess")
        tokenizer = str(product.folder.tokenizer)
        inputs["tokenizer"] = product.identity
        if product.result:
            check_vocabulary(
                request.recipe_file, request.model, product.result["vocabulary_size"], tokenizer
            )
    settings = settings_of(recipe) | {"shape": settings_of(request.model), "inputs": inputs}
    return ConvertPlan(
        **common(request, settings, Launch(engine=False, processes=1, device="cpu")),
        recipe=recipe,
        model=request.model,
        tokenizer=tokenizer,
    )


def _export_plan(request: Request, recipe: Export) -> ExportPlan:
    source = product_of(request, recipe.of, *TRAINING_STAGES)
    if source.result and not source.iterations:
        raise RequestError(
            source.folder.checkpoints,
            "holds no checkpoint any more",
            f"train again under another NAME=, or rm -r {source.folder.root} and train again",
        )
    iteration: int | None
    if recipe.iteration == "latest":
        iteration = source.iterations[-1] if source.iterations else None
    else:
        iteration = recipe.iteration
        if source.iterations and iteration not in source.iterations:
            there = ", ".join(str(i) for i in source.iterations)
            raise RequestError(
                f"{request.recipe_file}: iteration",
                f"{source.folder.root} has no checkpoint {iteration}",
                f"it has {there}",
            )
    of = {"of": source.started, "result": source.identity}
    settings = settings_of(recipe) | {"iteration": iteration, "inputs": of}
    return ExportPlan(
        **common(request, settings, Launch(engine=False, processes=1, device="cpu")),
        recipe=recipe,
        source=str(source.folder.root),
        iteration=iteration,
    )


def _evaluation_plan(request: Request, recipe: Evaluation) -> EvaluationPlan:
    source = product_of(request, recipe.of, *TRAINING_STAGES, "merge")
    export = source
    if not of_soup(recipe):
        export = product_of(request, references(recipe)[1], "export")
    elif recipe.iteration != "latest":
        raise RequestError(
            f"{request.recipe_file}: iteration", "a soup has none", "leave ITER= out"
        )
    if request.machine.nodes > 1:
        raise RequestError(
            f"NODES={request.machine.nodes}", "the harness runs on one node", "leave NODES= out"
        )
    model = str(export.result["hf"]) if export.result else None
    iteration = export.result.get("iteration") if export.result else None
    if model is not None and Path(model).parents[1].name != source.folder.root.name:
        raise RequestError(
            export.folder.root, f"is the export of {model}, and not of {source.folder.root}",
            "NAME= and VARIANT= of that run instead of its name in `of`",
        )  # fmt: skip
    inputs = dict(request.inputs) | {"export": export.identity}
    # How many at a time, and where tasks have their data, changes no answer.
    settings = settings_of(recipe, without=("batch_size", "offline", "task_folder"))
    chat = _asks_by_template(source) if recipe.chat is None else recipe.chat
    return EvaluationPlan(
        **common(
            request,
            settings | {"chat": chat, "iteration": iteration, "inputs": inputs},
            Launch(engine=False, processes=1, device=request.machine.device),
        ),
        recipe=recipe,
        model=model,
        iteration=iteration,
        chat=chat,
    )


def _asks_by_template(source: Product) -> bool:
    """Models of sft and dpo are asked so, and soups that carry a template."""
    if source.stage == "merge":
        return bool((source.result or {}).get("chat"))
    return source.stage != "midtrain"
