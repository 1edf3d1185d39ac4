"""Stages on a cluster as a person sees them: where they go, what they wait for, how they are."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from tanren import provenance, runs
from tanren.config.errors import RequestError, TanrenError
from tanren.config.load import read_user, repository
from tanren.launch import changes, container, fetching, orders, parts, queue, reading, soups, submit
from tanren.launch.container import Container
from tanren.launch.orders import Order, shown
from tanren.plan.make import make_plan
from tanren.plan.paths import APART_STAGES, RunFolder
from tanren.plan.plan import Plan, Request, read_plan
from tanren.plan.references import product_behind, references
from tanren.plan.site import Place, check_group


def place_for(order: Order) -> Place | None:
    """Where an order's stage runs; None for this machine.

    Raises:
        RequestError: the site has not what is asked for, or the order asks a machine for jobs.
    """
    user = read_user(order.user)
    site = queue.find_site(order.site, user)
    if order.parts is not None:
        parts.check(order, site)
    if site is None:
        wish = order.wish
        asked = [name for name, value in (("NODES", wish.nodes), ("HOURS", wish.hours),
                 ("TYPE", wish.type), ("AFTER", order.after)) if value]  # fmt: skip
        asked += ["CHAIN"] if order.chain > 1 else []
        if asked and not order.after:
            raise RequestError(
                f"{', '.join(asked)}", "ask for a job, and this machine is no cluster",
                "SITE=... names one (recipes/sites); or leave it out",
            )  # fmt: skip
        return None
    stage, recipe = orders.recipe_of(order)
    return queue.place_of(site, recipe, stage, order.wish, user)


def send(order: Order, place: Place, needs: bool, say: Callable[[str], None]) -> tuple[str, ...]:
    """Submit a stage, and before it what it stands on and is missing if asked to.

    Returns:
        its jobs; none when it is done already.
    """
    check_group(place)
    request = reading.read_request(order, queue.machine_of(place, order.runtime))
    orders.refuse_start(order, request)
    # Before anything is submitted: what does not fit is refused here.
    plan = make_plan(request)
    start = submit.look(plan)
    changes.refuse_below(order, request, start.new, say)
    if not start.done:
        provenance.refuse_dirty(repository(), may_be_dirty(order))
        refuse_unfetched(order, request, needs)
    soups.check_jobs(request)
    waits, made_first = list(order.after), []
    for wanted in references(request.recipe):
        its_jobs = _needed(order, request, wanted, needs, say)
        if its_jobs:
            waits += its_jobs
            made_first.append(product_behind(request, wanted).folder.root)
    if start.done:
        say(f"{plan.stage} is done: {shown(plan.run)}")
        return ()
    for note in plan.notes:
        say(f"note: {note}")
    submit.check_disk(plan)
    inside = submit.container_for(order, request, place.type.gpus)
    if plan.stage in APART_STAGES or plan.launch.own == "merge":
        submit.make_ready(plan.stage, inside)
    else:
        refuse_without_image(order, plan, place, inside)
    for note in submit.idle_binds(order, inside):
        say(f"note: {note}")
    after, others = queue.after_jobs(dict.fromkeys(waits), place, request.runs)
    # Grid Engine starts a job after any end of another; the job itself looks at these.
    must_be_done = tuple(dict.fromkeys([*made_first, *others]))
    if order.parts is None:
        parts.refuse_at_work(plan.folder)
    else:
        after, must_be_done = parts.send(order, request, place, after, must_be_done, say)
    sent = queue.submit(order, request, plan, place, after, must_be_done, chain=order.chain)
    jobs = ", ".join(sent.ids)
    waiting = f", after {', '.join(after.ids)}" if after.ids and sent.new else ""
    verb = "submitted" if sent.new else "is in the queue already"
    say(f"{plan.stage} {verb}: job {jobs} on {place.title}{waiting}")
    say(f"  log      {shown(plan.folder.root / 'log')}   (make status; make logs RUN="
        f"{request.task}/{plan.folder.root.name})")  # fmt: skip
    return sent.ids


def may_be_dirty(order: Order) -> bool:
    """Whether code that no commit holds may be submitted."""
    return order.allow_dirty or bool(os.environ.get("ALLOW_DIRTY"))


def refuse_without_image(order: Order, plan: Plan, place: Place, inside: Container | None) -> None:
    """Refuse a job on GPUs that has no image to run in, unless that is wanted.

    Raises:
        RequestError: naming the image, and how it is made.
    """
    apart = plan.stage in APART_STAGES or plan.launch.own == "merge"
    if inside is None and place.type.gpus and order.runtime != "native" and not apart:
        image = container.default_image(place.type.gpus, plan.launch.own).name
        raise RequestError(
            container.images_folder(),
            f"holds no image for GPUs ({image}.sif), which the job needs",
            f"make build-image IMAGE={image}, or RUNTIME=native where its Python has Transformer "
            "Engine",
        )  # fmt: skip


def refuse_unfetched(order: Order, request: Request, needs: bool) -> None:
    """Before anything is submitted: what any of its stages takes from the hub must be here."""
    fetching.refuse_missing(request.recipe, request.task)
    for needed in reading.missing(order, request) if needs else ():
        refuse_unfetched(needed, reading.read_request(needed, request.machine), needs)


def _needed(
    order: Order, request: Request, wanted: str, needs: bool, say: Callable[[str], None]
) -> tuple[str, ...]:
    """The job to wait for before a stage can use another's product; none when it is there."""
    product = product_behind(request, wanted)
    if product.result is not None:
        return ()
    live = queue.live_jobs(product.folder)
    if live:
        return tuple(live)[-1:]
    needed = reading.needed(order, request, wanted)
    if needed is None:
        return ()
    if not needs:
        reading.refuse_missing(order, request)
    place = place_for(needed)
    assert place is not None, needed
    return send(needed, place, True, say)[-1:]


@dataclass(frozen=True)
class Row:
    """One run in the table of `make status`."""

    run: str
    state: str
    job: str = ""
    step: int = 0
    steps: int = 0
    loss: float | None = None
    rate: float | None = None
    left: float | None = None
    last: str = ""


# States of a run that something is at work on, or will be.
GOING = ("running", "queued", "waiting")


def status(root: Path) -> list[Row]:
    """Every run below a runs folder, by its run folder and, where it has jobs, its scheduler.

    A part has a row until it is done; then it counts in its run's.
    """
    folders = sorted({path.parent for name in ("plan.json", "jobs.json", "parts")
                      for path in root.glob(f"*/*/{name}")})  # fmt: skip
    states, rows = functools.cache(queue.states_at), []
    for folder in map(RunFolder, folders):
        row = _row(folder, root, states)
        cut = [_row(part, root, states) for _, part in runs.parts(folder)]
        if row.state != "done" and cut:
            done = sum(part.state == "done" for part in cut)
            row = replace(row, state=f"{row.state}, parts {done}/{len(cut)}")
            rows += [row, *(part for part in cut if part.state != "done")]
        else:
            rows.append(row)
    return rows


def state_of(
    folder: RunFolder, states: queue.States = queue.states_at
) -> tuple[str, tuple[str, ...]]:
    """How a run is, by its folder and, where it has jobs, its scheduler; and its live jobs."""
    try:
        live = queue.live_jobs(folder, states)
        asked = None
    except TanrenError as error:
        live, asked = {}, error
    state = _state(folder, tuple(live.values()))
    if asked is not None and state == "unfinished":
        state = "unknown: the scheduler does not answer"
    return state, tuple(live)


def _row(folder: RunFolder, root: Path, states: queue.States) -> Row:
    state, live = state_of(folder, states)
    metrics = runs.read_lines(folder.metrics)[-50:]
    steps = [line for line in metrics if "loss" in line]
    total, left = 0, None
    if folder.plan.exists():
        plan = read_plan(folder.plan)
        total = runs.total_steps(plan) or 0
    if steps and total and state == "running":
        mean = sum(line["seconds"] for line in steps) / len(steps)
        left = (total - steps[-1]["step"]) * mean
    log = newest_log(folder, required=False)
    lines = log.read_text(errors="replace").splitlines() if log else []
    return Row(
        run=str(folder.root.relative_to(root)),
        state=state,
        job=" ".join(live),
        step=int(steps[-1]["step"]) if steps else 0,
        steps=total,
        loss=steps[-1]["loss"] if steps else None,
        rate=steps[-1]["tokens_per_second"] if steps else None,
        left=left,
        last=next((line.strip() for line in reversed(lines) if line.strip()), ""),
    )


def _state(folder: RunFolder, live: tuple[str, ...]) -> str:
    if "running" in live:
        return "running"
    if live:
        return "waiting" if set(live) == {"held"} else "queued"
    if folder.done.exists():
        return "done"
    if runs.failure_of(folder) is not None:
        return "failed"
    if folder.stopped.exists():
        return "stopped, goes on"
    if runs.is_locked(folder.lock):
        return "running"
    return "unfinished"


def newest_log(folder: RunFolder, *, required: bool = True) -> Path | None:
    """The log that was written last: an attempt's, or what the scheduler itself had to say.

    Of a run that is cut into parts it may be a part's.
    """
    found: list[Path] = []
    for one in (folder, *(part for _, part in runs.parts(folder))):
        logs = [path for path in (one.root / "log").glob("*.log") if path.stat().st_size]
        found += [path for path in logs if re.fullmatch(r"\d+", path.stem)] or logs
    if not found and required:
        raise RequestError(shown(folder.root), "has no log yet", "make status")
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def folder_of(name: str, root: Path) -> RunFolder:
    """A run folder by its path, or by TASK/RUN below the runs folder."""
    for path in (Path(name), root / name):
        if any((path / file).exists() for file in ("plan.json", "jobs.json", "parts")):
            return RunFolder(path.resolve())
    known = sorted(str(path.parent.relative_to(root)) for path in root.glob("*/*/plan.json"))
    raise RequestError(f"RUN={name}", f"there is no such run in {root}",
                       f"the runs are {', '.join(known[:12]) or 'none'}")  # fmt: skip
