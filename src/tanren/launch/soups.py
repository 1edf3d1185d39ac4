"""The exports that go into a soup: where they are, and what makes those that are not there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tanren import runs
from tanren.config.errors import RequestError
from tanren.config.merge import ExportReference, Merge, export_named
from tanren.launch import inputs
from tanren.launch.orders import Order
from tanren.plan.paths import TRAINING_STAGES, RunFolder, iteration_of, run_name, stage_of
from tanren.plan.plan import Product, Request
from tanren.plan.references import references


def products(request: Request) -> dict[str, Product]:
    """What a soup's references to stages mean now, by the reference.

    `result` has `hf`, `identity` (a mark of that folder) and, of a training, `iteration`. `folder`
    is that of the run which makes the Hugging Face folder: the export's, of a training.

    Raises:
        RequestError: a run has no such iteration, or no folder of whole weights.
    """
    assert isinstance(request.recipe, Merge)
    return {model: _product(request, model) for model in references(request.recipe)}


def _product(request: Request, model: str) -> Product:
    named = export_named(model)
    assert named is not None
    place, stage = str(request.recipe_file), stage_of(named.run)
    run = RunFolder(request.runs / (named.task or request.task) / named.run)
    if run == request.folder:
        raise RequestError(
            f"{place}: {model}", "is this run itself", "name another run: stage:merge-NAME"
        )
    if stage in ("convert", "merge"):
        if named.iteration is not None:
            raise RequestError(
                f"{place}: {model}", f"{stage} has no iterations", f"stage:{named.run}"
            )
        made = runs.result_of(run)
        hf = Path(made["hf"]) if made and made.get("hf") else None
        return Product(stage, run, _result(hf, None) if hf and hf.is_dir() else None)
    if stage not in TRAINING_STAGES:
        raise RequestError(
            f"{place}: {model}", f"{stage} makes no model",
            "stage:midtrain, stage:sft, stage:dpo, stage:convert or stage:merge-NAME",
        )  # fmt: skip
    export = RunFolder(run.root.with_name(export_of(named.run)))
    iteration = _iteration(run, named, f"{place}: {model}")
    hf = run.export(iteration) if iteration is not None else None
    if hf is not None and (hf / "adapter_config.json").is_file():
        raise RequestError(
            hf, "holds adapters beside a base, and a soup is made of whole weights",
            f"rm -r {hf}, and export with adapters: merged",
        )  # fmt: skip
    there = hf is not None and (hf / "config.json").is_file()
    return Product("export", export, _result(hf, iteration) if hf and there else None)


def _result(hf: Path, iteration: int | None) -> dict[str, object]:
    identity = inputs.mark_of_folder(hf, "the model's")
    if iteration is not None:
        identity = f"iteration {iteration}, {identity}"
    return {"hf": str(hf), "iteration": iteration, "identity": identity}


def check_jobs(request: Request) -> None:
    """Refuse what one job would have to make: two exports of a run are in one folder."""
    if not isinstance(request.recipe, Merge):
        return
    makers: dict[Path, str] = {}
    for model, product in request.products.items():
        if product.result is not None:
            continue
        if product.folder.root in makers:
            raise RequestError(
                f"{request.recipe_file}: {model}",
                f"and {makers[product.folder.root]} are exports of one run, which are made one "
                "after the other, and neither is there",
                "make export ITER=... for one of them first",
            )
        makers[product.folder.root] = model


def export_of(run: str) -> str:
    """The name of a training run's export (`sft.100B-try2` → `export.sft.100B-try2`)."""
    stage = stage_of(run)
    return run_name("export", None, None, stage) + run.removeprefix(stage)


def _iteration(run: RunFolder, named: ExportReference, place: str) -> int | None:
    """The wanted iteration, or the newest that there is; None while there is none.

    Of a run whose checkpoints were removed the exports are left.
    """
    saved = [number for number in runs.iterations(run) if number > 0]
    exported = sorted(
        number for path in run.hf.glob("iter_*") if (number := iteration_of(path)) is not None
    )
    if named.iteration is None:
        return max(saved or exported, default=None)
    if saved and named.iteration not in {*saved, *exported}:
        there = ", ".join(map(str, sorted({*saved, *exported})))
        raise RequestError(place, f"{run.root} has no checkpoint {named.iteration}",
                           f"it has {there}")  # fmt: skip
    return named.iteration


def run_of(model: str) -> str:
    """The folder's name of the run whose export a soup's model is."""
    named = export_named(model)
    assert named is not None, model
    return named.run


def order_for(order: Order, plain: Order, wanted: str) -> Order:
    """What makes a folder that a soup lacks.

    Args:
        plain: the order of the run that a reference names, with its variant and its name.
    """
    named = export_named(wanted)
    assert named is not None
    stage = stage_of(named.run)
    task = order.recipe_file.resolve().parent
    folder = task.with_name(named.task) if named.task else task
    if stage not in TRAINING_STAGES:
        return replace(plain, recipe_file=folder / f"{stage}.yaml", plain_if_absent=True)
    iteration = (f"iteration={named.iteration}",) if named.iteration is not None else ()
    return replace(plain, recipe_file=folder / "export.yaml", plain_if_absent=True,
                   assignments=(f"of=stage:{stage}", *iteration))  # fmt: skip
