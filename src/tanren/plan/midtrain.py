"""The plan of midtraining: what of which data, from which iteration on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tanren.config.errors import RequestError
from tanren.config.training import Midtrain
from tanren.plan.batch import check_divides, make_batch, stated_steps
from tanren.plan.checks import check_schedule, check_vocabulary
from tanren.plan.cost import estimated_hours, fitted
from tanren.plan.mix import Mixture, SourceCount, count_notes, make_mixture
from tanren.plan.paths import TRAINING_STAGES, RunFolder
from tanren.plan.plan import MidtrainPlan, Plan, Product, Request, common, comparable, settings_of
from tanren.plan.references import base_of, product_of
from tanren.plan.training import (
    FREE,
    begin,
    check_fit,
    idle_note,
    launch_of,
    precision_of,
    room_of,
    shape_settings,
)


class LengthUnknownError(RequestError):
    """The steps follow from data that is not there yet: a plan can be made behind preprocess."""


def midtrain_plan(request: Request, recipe: Midtrain) -> MidtrainPlan:
    """Plan midtraining.

    Raises:
        RequestError: the recipe does not fit the machine, its data or its base.
    """
    model, place = request.model, str(request.recipe_file)
    assert model is not None
    data_parallel = check_fit(request, recipe)
    precision = precision_of(request, recipe)
    held_out = (recipe.evaluation.sequences,) if recipe.evaluation else ()
    recipe = fitted(
        model, recipe, data_parallel, (recipe.global_batch, *held_out), precision,
        request.machine.gpu,
    )  # fmt: skip
    data = data_of(request, recipe)
    if data.result:
        check_vocabulary(place, model, data.result["vocabulary_size"], data.folder.tokenizer)
    data_start = _data_start(request, recipe, data)
    mix, steps, notes = _mix(request, recipe, data, data_start)
    batch = make_batch(recipe, data_parallel, place, steps=steps)
    if recipe.evaluation:
        check_divides(
            f"{place}: evaluation.sequences", recipe.evaluation.sequences, recipe, data_parallel
        )
    check_schedule(recipe, batch.steps, place)
    base = begin(request, recipe, "convert", "merge", *TRAINING_STAGES)
    inputs: dict[str, Any] = {**request.inputs, "data": data.identity}
    if base.product is not None:
        inputs["init"] = base.identity
    settings = settings_of(recipe, without=(*FREE, "tokens", "resume")) | {
        "mix": _mix_settings(recipe),
        "shape": shape_settings(model),
        "steps": batch.steps,
        "precision": precision,
        "inputs": inputs,
    }
    launch = launch_of(request, recipe, data_parallel)
    gpu = request.machine.gpu
    return MidtrainPlan(
        **common(request, settings, launch),
        **room_of(request, recipe, data_parallel, batch.accumulation),
        recipe=recipe,
        model=model,
        precision=precision,
        batch=batch,
        mix=mix,
        data_start=data_start,
        notes=(*base.notes, *notes, *idle_note(request, data_parallel, recipe)),
        data=str(data.folder.root),
        start=base.start,
        base=base_of(request),
        adapters=base.adapters,
        hf_source=base.hf_source,
        hours=estimated_hours(model, recipe, batch.tokens, gpu, launch.processes) if gpu else None,
    )


def _mix(
    request: Request, recipe: Midtrain, data: Product, data_start: int
) -> tuple[Mixture | None, int, tuple[str, ...]]:
    """The mix over what preprocess counted, else over the recipe's table; the steps; notes.

    Raises:
        RequestError: the steps follow from the mix, and there are no counts yet.
    """
    place = str(request.recipe_file)
    counts, table = source_counts(data), recipe.mix.counts
    if table is not None and Path(table).is_relative_to(request.recipe_file.parent):
        table = str(Path(table).relative_to(request.recipe_file.parent))
    notes: tuple[str, ...] = ()
    if counts is not None:
        notes = count_notes(counts, request.counts or {}, table) if table else ()
    elif request.begun is not None and "steps" in request.begun.settings:
        # The data was removed after the run had begun: its length is what it was.
        return None, stated_steps(recipe) or int(request.begun.settings["steps"]), ()
    elif request.counts is not None:
        counts = table_counts(request.counts, data.folder)
        notes = (f"tokens are those of {table}: preprocess has not run",)
    steps = stated_steps(recipe)
    if counts is not None:
        mix = make_mixture(recipe, counts, place, data_start=data_start)
        return mix, mix.steps, notes
    if steps is None:
        raise LengthUnknownError(
            place,
            "states neither steps nor tokens, and the data that they follow from is not there",
            "make preprocess, or state mix.counts: a table of NAME<TAB>TOKENS",
        )
    return None, steps, ()


def data_of(request: Request, recipe: Midtrain) -> Product:
    """The preprocessed data of a training recipe."""
    return product_of(request, recipe.data, "preprocess")


def source_counts(data: Product) -> tuple[SourceCount, ...] | None:
    """The sources as preprocess counted them; None while it has not run."""
    if data.result is None:
        return None
    return tuple(
        SourceCount(s["name"], str(data.folder.tokens_of(s["name"])), s["tokens"], s["documents"])
        for s in data.result["sources"]
    )


def table_counts(table: Mapping[str, int], folder: RunFolder) -> tuple[SourceCount, ...]:
    """The sources of a table of counts, with the files that preprocess would make of them."""
    return tuple(
        SourceCount(name, str(folder.tokens_of(name)), tokens) for name, tokens in table.items()
    )


def _mix_settings(recipe: Midtrain) -> dict[str, Any]:
    """What the order of samples depends on: not the limit, and not where counts came from."""
    return {"ratios": recipe.mix.ratios or {}, "shares": recipe.mix.shares}


def _data_start(request: Request, recipe: Midtrain, data: Product) -> int:
    """Where the run begins to read the data that it now asks for.

    The same data as before: where it began, or where the run goes on if it was set back to before
    that. Other data, where the recipe allows it: where the run goes on.
    """
    begun = request.begun
    if begun is None:
        return 0
    now = {**settings_of(recipe), "mix": _mix_settings(recipe), "inputs": {"data": data.identity}}
    if _of_data(begun.settings) == _of_data(comparable(begun.settings, now)):
        return min(begun.data_start, begun.iteration)
    return begun.iteration if recipe.resume == "new-data" else 0


def _of_data(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that say which samples are read, and in which order."""
    found = {key: settings.get(key) for key in ("data", "mix", "split")}
    return found | {"identity": settings.get("inputs", {}).get("data")}


def _beside_data(settings: Mapping[str, Any]) -> dict[str, Any]:
    """All other settings, but for the steps."""
    found = {k: v for k, v in settings.items() if k not in ("data", "mix", "split", "steps")}
    return found | {"inputs": {k: v for k, v in settings["inputs"].items() if k != "data"}}


def has_new_data(before: Plan, plan: Plan) -> bool:
    """Whether a plan differs from the one that its run has begun with in its data alone.

    The steps may differ where they follow from the mix, which then begins anew.
    """
    if not isinstance(plan, MidtrainPlan) or not isinstance(before, MidtrainPlan):
        return False
    was, now = before.settings, comparable(before.settings, plan.settings)
    other = _of_data(was) != _of_data(now) or plan.data_start != before.data_start
    follows = was["steps"] == now["steps"] or stated_steps(plan.recipe) is None
    return other and follows and _beside_data(was) == _beside_data(now)
