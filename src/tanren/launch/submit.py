"""From a request to a finished, or submitted, run: compares it with its folder, and starts it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from tanren import provenance, runs
from tanren.config.errors import RequestError, TanrenError
from tanren.config.load import repository
from tanren.environments import HARNESS, MERGE, OWN
from tanren.launch import changes, container, local, native, origins
from tanren.launch.container import Container
from tanren.launch.machine import visible_gpus
from tanren.launch.orders import Order
from tanren.launch.reading import made
from tanren.plan.midtrain import has_new_data
from tanren.plan.paths import APART_STAGES, RunFolder
from tanren.plan.plan import (
    EvaluationPlan,
    ExportPlan,
    MidtrainPlan,
    Plan,
    PreprocessPlan,
    Request,
    TrainingPlan,
    own_image,
    read_plan,
)


@dataclass(frozen=True)
class Start:
    """What starting a plan means, given what its run folder holds."""

    plan: Plan
    done: bool
    iteration: int | None

    @property
    def new(self) -> bool:
        """Whether nothing of the run is there that could be gone on from."""
        return not (self.done or self.iteration)


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
        changed = changes.between(before, plan)
        done = made(folder, plan.stage) is not None
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
                raise RequestError(
                    folder.root,
                    f"{'was made' if done else 'was begun'} with other settings: "
                    f"{'; '.join(changed[:6])}",
                    _next_to_other_settings(plan, done=done, new_data=new_data),
                )
            there = runs.latest_checkpoint(folder) or 0
            if plan.data_start != there:
                raise RequestError(
                    folder.root,
                    f"has gone on to iteration {there} since this was planned",
                    "the same command again plans anew",
                )
    return Start(plan, False, runs.latest_checkpoint(folder))


def _next_to_other_settings(plan: Plan, *, done: bool, new_data: bool) -> str:
    """What to do about a run that was started with other settings."""
    folder, reads = plan.folder, ""
    if plan.stage == "preprocess":
        reads = "; what reads it wants --set data=stage:preprocess-NAME, convert --set tokenizer="
    name = f"give the new run a name (NAME=... or --name{reads})"
    if runs.is_locked(folder.lock):
        return f"it is at work now: wait for it, or {name}"
    steps = ["--set resume=new-data goes on with the new data from here"] if new_data else []
    # As first given: the recipe's file is as it was, more often than not.
    steps += [] if done else ['the settings of then, SET="..." among them, go on with it']
    return "; or ".join([*steps, name]) + f", or rm -r {folder.root}"


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
        f"has {_room(free)} free, and the checkpoints of this run need {_room(needed)} "
        f"({keep} kept and one being written, {_room(plan.checkpoint_gib)} each)",
        f"{fewer}free some space, or RUNS= on a larger disk",
    )


def _room(gib: float) -> str:
    return f"{gib:,.1f} GiB" if gib >= 1 else f"{gib * 1024:,.0f} MiB"


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


def idle_binds(order: Order, inside: Container | None) -> list[str]:
    """A note on BIND= where there is no container that it could mean; none else."""
    if inside is not None or not order.binds:
        return []
    return [f"BIND={' '.join(order.binds)} changes nothing: the stage runs in no container"]


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

    `job` is what the passport says of it, `environment` the site's variables.
    """

    starter: tuple[str, ...]
    meeting: local.Meeting
    job: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


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
    runs.make(folder)
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
        meeting, stated = (nodes.meeting, nodes.environment) if nodes else (None, {})
        script = local.script(folder, plan.launch, attempt, cores, inside, meeting, stated)
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
