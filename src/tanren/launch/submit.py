"""From a request to a finished, or submitted, run: reads what is there, plans, starts."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson

from tanren import provenance, runs
from tanren.config.errors import RequestError, TanrenError
from tanren.config.load import (
    changed_fields,
    read_model,
    read_recipe,
    read_user,
    recipe_path,
    repository,
)
from tanren.config.merge import Merge
from tanren.config.schema import Convert, Evaluation, Recipe
from tanren.config.training import Midtrain, Training
from tanren.environments import HARNESS, MERGE, OWN
from tanren.launch import container, inputs, local, native, origins, soups
from tanren.launch.container import Container
from tanren.launch.machine import this_machine, visible_gpus
from tanren.plan import training
from tanren.plan.bench import Bench, bench_recipe, made_up_data
from tanren.plan.midtrain import has_new_data
from tanren.plan.paths import APART_STAGES, RunFolder
from tanren.plan.plan import (
    Begun,
    EvaluationPlan,
    ExportPlan,
    Machine,
    MidtrainPlan,
    Plan,
    PreprocessPlan,
    Product,
    Request,
    TrainingPlan,
    comparable,
    differences,
    digest,
    of_soup,
    own_image,
    product_behind,
    read_plan,
    reference,
    references,
    stage_of,
)
from tanren.plan.site import Wish


@dataclass(frozen=True)
class Order:
    """A command line, taken apart but not yet read."""

    recipe_file: Path
    variant: str | None = None
    name: str | None = None
    assignments: tuple[str, ...] = ()
    # apptainer, singularity, native; None chooses by what is there.
    runtime: str | None = None
    # Folders that a container is to see besides those that the recipe names.
    binds: tuple[str, ...] = ()
    # A cluster's name, or local; None finds it out.
    site: str | None = None
    wish: Wish = field(default_factory=Wish)
    # Jobs to wait for, and how many jobs one run is cut into.
    after: tuple[str, ...] = ()
    chain: int = 1
    # Nodes that make the shards of preprocess, each by a job of its own; None for one job.
    parts: int | None = None
    # `field=value` of user.toml for this once.
    user: tuple[str, ...] = ()
    # The recipe of the variant may be absent: a stage that follows another has seldom one.
    plain_if_absent: bool = False
    # Run a few steps of the stage to measure it.
    bench: Bench | None = None
    # Submit code that no commit holds.
    allow_dirty: bool = False

    def command(self, verb: str) -> str:
        """This order as a command that can be pasted."""
        words = ["bin/tanren", verb, shown(self.recipe_file)]
        words += ["--variant", self.variant] if self.variant else []
        words += ["--name", self.name] if self.name else []
        for assignment in self.assignments:
            words += ["--set", assignment]
        words += ["--runtime", self.runtime] if self.runtime else []
        for bind in self.binds:
            words += ["--bind", bind]
        for assignment in self.user:
            words += ["--set", f"user.{assignment}"]
        words += ["--site", self.site] if self.site else []
        return shlex.join(words)


def shown(path: Path | str) -> str:
    """A path as a person would type it: relative where it is below the current folder."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def runs_root() -> Path:
    """Where run folders go: $RUNS, else user.toml's runs, else runs/ in the repository."""
    stated = os.environ.get("RUNS") or read_user().runs
    return Path(stated).expanduser().resolve() if stated else repository() / "runs"


def recipe_of(order: Order) -> tuple[str, Recipe]:
    """The stage and the recipe that an order names, with its variant and its changes."""
    path, variant = order.recipe_file.resolve(), order.variant
    if order.plain_if_absent and not recipe_path(path, variant).exists():
        variant = None
    stage, recipe = read_recipe(path, variant, list(order.assignments))
    return stage, bench_recipe(recipe, order.bench, path) if order.bench else recipe


def refuse_given(order: Order, recipe: Recipe) -> None:
    """Refuse to start from `init: given` before anything is made for it.

    Raises:
        RequestError: with how to name the base.
    """
    if isinstance(recipe, Training):
        training.refuse_given(recipe, str(order.recipe_file))


def read_request(order: Order, machine: Machine | None = None) -> Request:
    """Read every file that an order names, and what its inputs look like on disk.

    Args:
        machine: what the job will have on a cluster; None for this machine.
    """
    path = order.recipe_file.resolve()
    _check_names(order)
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
    return with_products(request)


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
        products[name] = read_product(folder)
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
    return Product(
        stage=stage,
        folder=folder,
        result=_made(folder, stage),
        started=digest(started["settings"]) if started else None,
        iterations=tuple(i for i in runs.iterations(folder) if i > 0),
    )


def _made(folder: RunFolder, stage: str) -> dict[str, Any] | None:
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


def check_name(value: str, option: str = "--name", also: str = "-") -> None:
    """Refuse a name that cannot be part of a folder's name.

    Args:
        also: what it may hold beside letters, digits, _ and a dot.
    """
    if not re.fullmatch(rf"[A-Za-z0-9_][A-Za-z0-9_.{also}]*", value):
        raise RequestError(
            f"{option} {value}",
            "cannot be part of a folder's name",
            "use letters, digits, _ and . (in a name - as well)",
        )


def _check_names(order: Order) -> None:
    """Variant and name become parts of a folder's name, from which both can be read back."""
    if order.variant is not None:
        check_name(order.variant, "--variant", "")
    if order.name is not None:
        check_name(order.name)


def missing(order: Order, request: Request) -> list[Order]:
    """The orders of the stages that this one stands on and that are not there."""
    found = (needed(order, request, wanted) for wanted in references(request.recipe))
    return [one for one in found if one is not None]


def needed(order: Order, request: Request, wanted: str) -> Order | None:
    """The order of the stage behind a reference; None where what it makes is there."""
    product = product_behind(request, wanted)
    exportable = request.stage in ("export", "eval") and product.iterations
    if product.result is not None or exportable:
        return None
    if isinstance(request.recipe, Merge):
        run = soups.run_of(wanted)
        return soups.order_for(order, order_of(order, run, stage_of(run)), wanted)
    plain = order_of(order, reference(wanted, order.variant, order.name), product.stage)
    return _export_for(order, plain, request.recipe) if product.stage == "export" else plain


def order_of(order: Order, folder_name: str, stage: str) -> Order:
    """The order of another run of the same task, by its folder's name."""
    rest = folder_name.removeprefix(stage)
    variant, _, name = rest.removeprefix(".").partition("-") if rest else ("", "", "")
    return replace(
        order,
        recipe_file=order.recipe_file.with_name(f"{stage}.yaml"),
        variant=variant if rest.startswith(".") else None,
        name=(name if rest.startswith(".") else rest.removeprefix("-")) or None,
        assignments=(),
        plain_if_absent=False,
        bench=None,
        # What was asked for the stage itself: its size, its parts.
        wish=Wish(),
        chain=1,
        parts=None,
    )


def _export_for(order: Order, plain: Order, recipe: Recipe) -> Order:
    """The export that an evaluation stands on: of the same run, with its variant and name."""
    assert isinstance(recipe, Evaluation), recipe
    of = () if recipe.of == "stage:midtrain" else (f"of={recipe.of}",)
    iteration = () if recipe.iteration == "latest" else (f"iteration={recipe.iteration}",)
    return replace(plain, variant=order.variant, name=order.name, assignments=(*of, *iteration),
                   plain_if_absent=True)  # fmt: skip


def refuse_missing(order: Order, request: Request) -> None:
    """Name the command that makes what is missing."""
    for needed in missing(order, request):
        stage = needed.recipe_file.stem
        raise RequestError(
            request.folder.root,
            f"stands on {stage}, which has not been made",
            f"{needed.command(stage)}   (or add --needs, as make does)",
        )


def changed_files(request: Request) -> list[RequestError]:
    """The stages below this one whose files are no longer those that they were made from.

    A file that is gone is no change: text may be removed once it is tokens.
    """
    found = []
    for product in request.products.values():
        if product.result is None or not product.folder.plan.exists():
            continue
        before = read_plan(product.folder.plan)
        try:
            now = inputs.marks(before.recipe)
        except RequestError:
            continue
        was = before.settings.get("inputs", {})
        changes = [
            f"{key} {was.get(key)} then, {mark} now"
            for key, mark in now.items()
            if mark is not None and was.get(key) != mark
        ]
        if changes:
            found.append(
                RequestError(
                    product.folder.root,
                    f"was made from other files: {'; '.join(changes)}",
                    f"rm -r {product.folder.root}, and the same command makes it again",
                )
            )
    return found


@dataclass(frozen=True)
class Start:
    """What starting a plan means, given what its run folder holds."""

    plan: Plan
    done: bool
    iteration: int | None


def look(plan: Plan) -> Start:
    """Compare a plan with its run folder: new, to go on, or done.

    Raises:
        RequestError: the folder belongs to other settings, or its newest checkpoint is broken.
    """
    folder = plan.folder
    if plan.bench is not None:
        return Start(plan, False, None)
    if folder.plan.exists():
        before = read_plan(folder.plan)
        changed = differences(before.settings, comparable(before.settings, plan.settings))
        done = _made(folder, plan.stage) is not None
        if done and not changed:
            return Start(plan, True, None)
        begun = done or bool(runs.iterations(folder))
        # A finished export or evaluation of an earlier checkpoint is no obstacle to the next one;
        # nor is a part: which of its shards still serve, their content says.
        part = isinstance(plan, PreprocessPlan) and plan.part is not None
        if changed and begun and not isinstance(plan, ExportPlan | EvaluationPlan) and not part:
            new_data = not done and has_new_data(before, plan)
            if not (
                new_data and isinstance(plan, MidtrainPlan) and plan.recipe.resume == "new-data"
            ):
                state = "was made" if done else "was begun"
                go_on = "--set resume=new-data goes on with the new data from here; or "
                raise RequestError(
                    folder.root,
                    f"{state} with other settings: {'; '.join(changed[:6])}",
                    f"{go_on if new_data else ''}give the new run a name (NAME=... or --name), or "
                    f"rm -r {folder.root}",
                )
            there = runs.latest_checkpoint(folder) or 0
            if plan.data_start != there:
                raise RequestError(
                    folder.root,
                    f"has gone on to iteration {there} since this was planned",
                    "the same command again plans anew",
                )
    return Start(plan, False, runs.latest_checkpoint(folder))


def uncommitted() -> str | None:
    """A note on code that no commit holds; None where there is none.

    On one's own machine it is no more than that: a trial costs nothing, and the run keeps the diff.
    """
    commit = provenance.git_commit(repository())
    if not commit["dirty"]:
        return None
    files = len(commit["changed"])
    return f"{files} files of the checkout are not as in its commit; the run keeps the diff"


def check_disk(plan: Plan) -> None:
    """Refuse a training run whose checkpoints will not fit on the disk of its run folder.

    Raises:
        RequestError: too little is free; the message says what would fit.
    """
    if not isinstance(plan, TrainingPlan) or (plan.bench and not plan.bench.save):
        return
    folder = plan.folder
    there = len(runs.iterations(folder))
    newest = plan.recipe.checkpoints.keep_last
    keep = plan.recipe.checkpoints.kept(runs.total_steps(plan))
    # A new one is written whole before the oldest one goes.
    needed = max(keep + 1 - there, 1) * plan.checkpoint_gib
    place = folder.root
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / 2**30
    if free >= needed:
        return
    fits = int(free / plan.checkpoint_gib) + there - 1 - (keep - newest)
    fewer = f"--set checkpoints.keep_last={fits}, " if 0 < fits < newest else ""
    raise RequestError(
        place,
        f"has {free:,.1f} GiB free, and the checkpoints of this run need {needed:,.1f} "
        f"({keep} kept and one being written, {plan.checkpoint_gib:,.1f} each)",
        f"{fewer}free some space, or RUNS= on a larger disk",
    )


def container_for(
    order: Order, request: Request, gpus_per_node: int | None = None
) -> Container | None:
    """The container that an order's stage runs in, with its binds; None for the own Python.

    Args:
        gpus_per_node: of the cluster's nodes; None for this machine.
    """
    if request.stage in APART_STAGES:
        return None
    gpus = visible_gpus() if gpus_per_node is None else gpus_per_node
    inside = container.choose(order.runtime, gpus, own_image(request.recipe))
    if inside is None:
        return None
    return replace(inside, binds=container.binds(request.recipe, request.runs, order.binds))


def make_ready(stage: str, inside: Container | None) -> None:
    """Make sure that what a stage runs in is there: its own environment, or the engine's part.

    Raises:
        RequestError: it is not, and cannot be made.
    """
    if stage in APART_STAGES:
        HARNESS.require()
    elif inside is None and stage == "merge":
        MERGE.require()
    elif inside is None:
        native.complete()


# What a bench's folder keeps: its lock, who asked for it, its logs, and by which code it was run.
_KEPT = (".lock", ".submit", "order.json", "jobs.json", "hosts", "log", "passport.json", "diff")


def _clear(folder: RunFolder) -> None:
    """Remove what the bench before this one left: a bench has no history."""
    for path in folder.root.iterdir():
        if path.is_dir() and path.name not in _KEPT:
            shutil.rmtree(path)
        elif path.name not in _KEPT and path != folder.job:
            path.unlink()


@dataclass(frozen=True)
class Nodes:
    """The nodes of a job: how to start something on each, and where their processes meet.

    `job` is what the passport says of it.
    """

    starter: tuple[str, ...]
    meeting: local.Meeting
    job: Mapping[str, Any] = field(default_factory=dict)


def start(
    plan: Plan, cores: int, inside: Container | None,
    watch: Callable[[RunFolder, int], Callable[[], None]], nodes: Nodes | None = None,
) -> TanrenError | None:  # fmt: skip
    """Run a plan on this machine, or on the nodes of the job that this is, and wait for its end.

    Args:
        inside: the container to run it in; None for this machine's own Python.
        watch: given the folder and the attempt, gives what is called while the job runs.
    """
    if plan.launch.own and inside is None:
        OWN[plan.launch.own].require()
    folder = plan.folder
    folder.root.mkdir(parents=True, exist_ok=True)
    with runs.locked(folder.lock) as lock:
        if look(plan).done:
            return None  # by a command that ended between our look and our lock
        folder.done.unlink(missing_ok=True)
        if plan.bench is not None:
            _clear(folder)
        value = orjson.loads(plan.model_dump_json())
        runs.write_json(folder.plan, value)
        image = inside.lock.facts() if inside else None
        host = {
            **origins.of_host(plan, cores),
            **({"job": dict(nodes.job)} if nodes and nodes.job else {}),
            "inputs": origins.inputs_of(plan),
            "from": origins.chain(plan),
        }
        attempt = provenance.open_attempt(folder, repository(), value, image, host)
        meeting = nodes.meeting if nodes else None
        script = local.script(folder, plan.launch, attempt, cores, inside, meeting)
        # In a scheduler's job job.sh is what the scheduler was given.
        file = folder.node if nodes else folder.job
        runs.write_atomic(file, script.encode())
        file.chmod(0o755)
        starter = nodes.starter if nodes else ()
        ending = local.run(folder, file, attempt, lock, watch(folder, attempt), starter)
        stopped = ending is not None and folder.stopped.exists()
        words = "done" if ending is None else ending.problem
        if stopped:
            words = f"stopped: {(runs.read_json(folder.stopped) or {}).get('reason')}"
        provenance.close_attempt(folder, attempt, words, {"made": origins.made_by(plan)})
    return ending
