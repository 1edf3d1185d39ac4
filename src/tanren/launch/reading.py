"""From an order to a request: reads the recipe, and what is there of the stages below."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from tanren import runs
from tanren.config.errors import RequestError
from tanren.config.load import changed_fields, read_model
from tanren.config.merge import Merge
from tanren.config.schema import Convert, Evaluation, Recipe
from tanren.config.training import Midtrain, Training
from tanren.launch import container, inputs, soups
from tanren.launch.machine import this_machine, visible_gpus
from tanren.launch.orders import Order, check_names, order_of, recipe_of, runs_root
from tanren.plan.bench import made_up_data
from tanren.plan.paths import (
    APART_STAGES,
    TRAINING_STAGES,
    RunFolder,
    is_run_of,
    stage_name,
    stage_of,
)
from tanren.plan.plan import Begun, Machine, Product, Request, digest, own_image
from tanren.plan.references import candidates, of_soup, product_behind, reference, references


def read_request(order: Order, machine: Machine | None = None) -> Request:
    """Read every file that an order names, and what its inputs look like on disk.

    Args:
        machine: what the job will have on a cluster; None for this machine.
    """
    path = order.recipe_file.resolve()
    check_names(order)
    stage, recipe = recipe_of(order)
    recipe = inputs.with_absolute_paths(recipe, path.parent)
    model = read_model(recipe.model) if isinstance(recipe, Convert | Training) else None
    if machine is None:
        inside = container.choose(order.runtime, visible_gpus(), own_image(recipe))
        machine = this_machine(in_image=inside is not None or stage in APART_STAGES)
    request = Request(
        task=path.parent.name,
        stage=stage,
        recipe=recipe,
        recipe_file=path,
        runs=runs_root(),
        machine=machine,
        variant=order.variant,
        name=order.name,
        model=model,
        inputs=inputs.marks(recipe),
        counts=inputs.counts(recipe),
        bench=order.bench,
        changed=changed_fields(path, order.variant, list(order.assignments)),
    )
    begun = None if order.bench else runs.read_json(request.folder.plan)
    return with_products(replace(request, base=(begun or {}).get("base")))


def with_products(request: Request) -> Request:
    """A request with what the stages that it stands on, and its own run, have made by now."""
    if isinstance(request.recipe, Merge):
        return replace(request, products=soups.products(request))
    products = {}
    for wanted in references(request.recipe):
        name = reference(wanted, request.variant, request.name)
        folder = RunFolder(request.runs / request.task / name)
        if folder == request.folder:
            raise RequestError(
                request.recipe_file,
                f"{wanted} is this run itself",
                "name another run (stage:midtrain-NAME), or checkpoint:PATH",
            )
        products[name] = read_product(_behind(request, wanted, folder.root.parent))
    if request.bench and not request.bench.real and isinstance(request.recipe, Midtrain):
        made_up = Product("preprocess", request.folder.made_up, result=made_up_data(request.recipe))
        products = {reference(request.recipe.data, request.variant, request.name): made_up}
    if isinstance(request.recipe, Evaluation):
        products = _with_current_export(request.recipe, products)
    laid_out = runs.read_json(request.folder.examples) or {}
    return replace(
        request,
        products=products,
        begun=None if request.bench else _begun(request.folder),
        steps=laid_out.get("steps"),
        steps_of=laid_out.get("settings"),
    )


def _behind(request: Request, wanted: str, task: Path) -> RunFolder:
    """The folder behind a reference: of its candidates the first that has begun, else the first.

    A run, and a job, keeps to the base that it was given. With a recipe of its own for a variant,
    the base of another one is no candidate.

    Args:
        task: the task's folder of runs.
    """
    names = candidates(request.recipe, wanted, request.variant, request.name)
    if request.base in names:
        return RunFolder(task / str(request.base))
    if request.variant:
        named = f"{stage_name(wanted)}.{request.variant}"
        own = request.recipe_file.with_name(f"{named}.yaml").exists()
        names = tuple(name for name in names if name.startswith(named) or not own)
    folders = [RunFolder(task / name) for name in names]
    begun = (one for one in folders if one.plan.exists() or one.jobs.exists())
    return next(begun, folders[0])


def _with_current_export(recipe: Evaluation, products: dict[str, Product]) -> dict[str, Product]:
    """An export of another checkpoint than the wanted one is as good as none."""
    if of_soup(recipe):
        return products
    (_, source), (name, export) = products.items()
    wanted = recipe.iteration
    if wanted == "latest" and source.iterations:
        wanted = source.iterations[-1]
    if export.result is None or wanted in ("latest", export.result["iteration"]):
        return products
    return {**products, name: replace(export, result=None)}


def _begun(folder: RunFolder) -> Begun | None:
    """What a run folder says of a run that has begun: one with a checkpoint, or done."""
    plan, done = runs.read_json(folder.plan), runs.result_of(folder)
    there = runs.iterations(folder)
    iteration = there[-1] if there else done.get("iteration") if done else None
    if plan is None or iteration is None:
        return None
    return Begun(plan["settings"], plan.get("data_start", 0), iteration)


def read_product(folder: RunFolder) -> Product:
    """What another stage's run folder holds."""
    started = runs.read_json(folder.plan)
    stage = stage_of(folder.root.name)
    result = made(folder, stage)
    if result is not None and stage in TRAINING_STAGES and folder.tokenizer.is_dir():
        # Where it is now, and also where a run of before had none of its own and was given it.
        result |= {"tokenizer": str(folder.tokenizer)}
    return Product(
        stage=stage,
        folder=folder,
        result=result,
        started=digest(started["settings"]) if started else None,
        iterations=tuple(i for i in runs.iterations(folder) if i > 0),
    )


def made(folder: RunFolder, stage: str) -> dict[str, Any] | None:
    """What a finished run made, as long as it is still there.

    A training run whose checkpoints were removed to save room stays done. The shards of a part are
    there until they are joined.
    """
    result = runs.result_of(folder)
    if result is None:
        return None
    if folder.whole != folder:
        return result if folder.shards.is_dir() else None
    # A training that began from a checkpoint knows no Hugging Face folder: None.
    hf = Path(result.get("hf") or "/")
    there = {
        "preprocess": folder.tokenizer.is_dir() and folder.tokens.is_dir(),
        "convert": folder.checkpoint(0).is_dir() and hf.is_dir(),
        "export": hf.is_dir(),
        "merge": hf.is_dir(),
        "eval": folder.scores.is_file(),
    }
    return result if there.get(stage, True) else None


def missing(order: Order, request: Request) -> list[Order]:
    """The orders of the stages that this one stands on and that are not there."""
    return list(missing_runs(order, request).values())


def missing_runs(order: Order, request: Request) -> dict[str, Order]:
    """The same by their run folders' names, of another task (a soup's) with its name."""
    found: dict[str, Order] = {}
    for wanted in references(request.recipe):
        one, root = needed(order, request, wanted), product_behind(request, wanted).folder.root
        if one is not None:
            other = root.parent.name != request.task
            found[f"{root.parent.name}/{root.name}" if other else root.name] = one
    return found


def needed(order: Order, request: Request, wanted: str) -> Order | None:
    """The order of the stage behind a reference; None where what it makes is there."""
    product = product_behind(request, wanted)
    exportable = request.stage in ("export", "eval") and product.iterations
    if product.result is not None or exportable:
        return None
    if isinstance(request.recipe, Merge):
        run = soups.run_of(wanted)
        return soups.order_for(order, order_of(order, run, stage_of(run)), wanted)
    plain = order_of(order, product.folder.root.name, product.stage)
    # Of a pipeline and a soup's recipe the training is meant.
    asked = request.stage in ("export", "eval") and not order.plain_if_absent
    if asked and product.stage in TRAINING_STAGES:
        _refuse_unknown(order, plain, product.folder)
    return _export_for(order, plain, request.recipe) if product.stage == "export" else plain


def _refuse_unknown(order: Order, plain: Order, folder: RunFolder) -> None:
    """Refuse to train for an export or a score what was never begun: its name may be a mistake, and
    there may be others. Without a name, where nothing was trained at all, all is made.
    """
    stage = stage_of(folder.root.name)
    others = _begun_runs(folder.root.parent, stage)
    if folder.root.name in others or not (others or order.name or order.variant):
        return
    there = f" (there is {', '.join(others)})" if others else ""
    raise RequestError(
        folder.root,
        f"there is no such run{there}",
        f"NAME= and VARIANT= of the one that is meant; or train it: {plain.command(stage)} --needs",
    )


def _begun_runs(task: Path, stage: str) -> list[str]:
    """The names of a stage's run folders, in their order; a gate's are no runs to keep."""
    folders = [RunFolder(path) for path in sorted(task.glob("*/")) if is_run_of(stage, path.name)]
    names = [one.root.name for one in folders if one.plan.exists() or one.order.exists()]
    return [name for name in names if not re.search(r"-gate-[a-z0-9]+$", name)]


def _export_for(order: Order, plain: Order, recipe: Recipe) -> Order:
    """The export that an evaluation stands on: of the same run, with its variant and name."""
    assert isinstance(recipe, Evaluation), recipe
    of = () if recipe.of == "stage:midtrain" else (f"of={recipe.of}",)
    iteration = () if recipe.iteration == "latest" else (f"iteration={recipe.iteration}",)
    return replace(plain, variant=order.variant, name=order.name, assignments=(*of, *iteration),
                   plain_if_absent=True)  # fmt: skip


def refuse_missing(order: Order, request: Request) -> None:
    """Name the command that makes what is missing."""
    for run, needed in missing_runs(order, request).items():
        raise RequestError(
            request.folder.root,
            f"stands on {run}, which has not been made",
            f"{needed.command(needed.recipe_file.stem)}   (or add --needs, as make does)",
        )
