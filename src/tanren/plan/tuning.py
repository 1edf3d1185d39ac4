"""The plans of sft and dpo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tanren.config.errors import RequestError
from tanren.config.training import Dpo, Sft, Tuning, by_nemo
from tanren.plan.batch import Cut, check_divides
from tanren.plan.checks import check_schedule, check_vocabulary
from tanren.plan.cost import estimated_hours, fitted
from tanren.plan.nemo import check_nemo
from tanren.plan.paths import TRAINING_STAGES, examples_cache
from tanren.plan.plan import DpoPlan, Request, SftPlan, common, digest, settings_of
from tanren.plan.references import base_of, product_of
from tanren.plan.training import (
    FREE,
    Start,
    begin,
    check_fit,
    idle_note,
    launch_of,
    precision_of,
    room_of,
    shape_settings,
)


def tuning_plan(request: Request, recipe: Tuning) -> SftPlan | DpoPlan:
    """Plan sft or dpo.

    Raises:
        RequestError: the recipe does not fit the machine, its base or its base's tokenizer.
    """
    model, place = request.model, str(request.recipe_file)
    assert model is not None
    data_parallel = check_fit(request, recipe)
    if recipe.layout.context > 1:
        raise RequestError(
            f"{place}: layout.context",
            f"{recipe.layout.context} would cut conversations, which is not offered",
            "--set layout.context=1",
        )
    if isinstance(recipe, Dpo) and recipe.fp8 != "none" and recipe.preference.loss != "simpo":
        # Measured: a first loss of 0.723 instead of 0.693, on random weights.
        raise RequestError(
            f"{place}: fp8",
            f"{recipe.fp8} scales by what else is in a micro batch, so that the policy would not "
            "be its own reference where it begins",
            "--set fp8=none",
        )
    made_up = request.bench is not None and not request.bench.real
    if recipe.lora is not None and recipe.init == "scratch" and not made_up:
        raise RequestError(
            f"{place}: lora",
            "trains adapters beside a base, and init: scratch has none",
            "name the base in init, or --set lora=null",
        )
    precision = precision_of(request, recipe)
    # dpo fills what is missing with empty rows.
    rows = (recipe.global_batch,) if isinstance(recipe, Sft) else ()
    recipe = fitted(model, recipe, data_parallel, rows, precision, request.machine.gpu)
    if isinstance(recipe, Sft):
        check_divides(f"{place}: global_batch", recipe.global_batch, recipe, data_parallel)
    base = begin(request, recipe, "convert", "merge", *TRAINING_STAGES)
    if by_nemo(recipe):
        check_nemo(request, recipe, base)
    tokenizer = None if made_up else _tokenizer(request, recipe, base)
    _check_template(recipe, base, place)
    inputs: dict[str, Any] = {**request.inputs, "init": base.identity}
    if recipe.tokenizer is not None and recipe.tokenizer.startswith("stage:"):
        inputs["tokenizer"] = product_of(request, recipe.tokenizer, "preprocess").identity
    # A run that began before there was a choice goes on.
    left_out = FREE if by_nemo(recipe) else (*FREE, "engine")
    settings = settings_of(recipe, without=left_out) | {
        "steps": recipe.steps,
        "shape": shape_settings(model),
        "precision": precision,
        "inputs": inputs,
    }
    steps = recipe.steps
    if steps is None and request.steps_of == digest(settings):
        steps = request.steps
    if steps is not None:
        check_schedule(recipe, steps, place)
    launch = launch_of(request, recipe, data_parallel)
    # How many rows a step of dpo makes is known with its pairs; a pipeline keeps at most so many.
    accumulation = recipe.layout.pipeline
    gpu, hours = request.machine.gpu, None
    if isinstance(recipe, Sft):
        accumulation = recipe.global_batch // (data_parallel * recipe.rows)
        if gpu and steps:
            tokens = steps * recipe.global_batch * recipe.row_length
            hours = estimated_hours(model, recipe, tokens, gpu, launch.processes)
    fields = {
        **common(request, settings, launch),
        **room_of(request, recipe, data_parallel, accumulation),
        "recipe": recipe,
        "model": model,
        "precision": precision,
        "batch": Cut(data_parallel=data_parallel, micro_batch=recipe.rows),
        "steps": steps,
        "start": base.start,
        "base": base_of(request),
        "adapters": base.adapters,
        "hf_source": base.hf_source,
        "notes": (*base.notes, *idle_note(request, data_parallel, recipe)),
        "tokenizer": tokenizer,
        "base_tokenizer": base.result.get("tokenizer") if recipe.tokenizer else None,
        "cache": str(examples_cache(request.runs, request.task)),
        "hours": hours,
    }
    return SftPlan(**fields) if isinstance(recipe, Sft) else DpoPlan(**fields)


def _tokenizer(request: Request, recipe: Tuning, base: Start) -> str | None:
    """The folder of the tokenizer, or `hf:` and the base's reference; None while it is not there.

    Raises:
        RequestError: neither the recipe nor the base has one.
    """
    place = str(request.recipe_file)
    if recipe.tokenizer is not None:
        if not recipe.tokenizer.startswith("stage:"):
            return recipe.tokenizer
        made = product_of(request, recipe.tokenizer, "preprocess")
        if made.result:
            assert request.model is not None
            check_vocabulary(
                place, request.model, made.result["vocabulary_size"], made.folder.tokenizer
            )
        return str(made.folder.tokenizer)
    if base.product is not None:
        found: str | None = base.result.get("tokenizer") or base.result.get("hf")
        return found
    if base.hf_source is not None:
        return f"hf:{base.hf_source}"
    if base.notes:  # a base that is given later
        return None
    raise RequestError(
        f"{place}: tokenizer",
        f"is not stated, and the base ({recipe.init}) carries none",
        "tokenizer: stage:preprocess, or the path of the tokenizer's folder",
    )


def _check_template(recipe: Tuning, base: Start, place: str) -> None:
    """Preferences over answers are learned in the template that the answers were learned in."""
    was = base.result.get("template")
    if isinstance(recipe, Dpo) and was is not None and was != recipe.template:
        assert base.product is not None
        raise RequestError(
            f"{place}: template",
            f"is {recipe.template}, and {Path(base.product.folder.root).name} was trained with "
            f"{was}",
            f"template: {was}",
        )
