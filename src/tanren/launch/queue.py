"""Submits stages to a cluster's scheduler, remembers their jobs, asks how they are, ends them.

jobs.json is written before the scheduler is asked, so that an answer that got lost is looked for by
the job's name instead of submitting twice.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import orjson
from pydantic import ValidationError

from tanren import runs
from tanren.config.errors import RequestError, TanrenError, WorkError
from tanren.config.fields import Strict
from tanren.config.load import read_site, repository, sites
from tanren.config.schema import Recipe
from tanren.config.site import User
from tanren.data import hub
from tanren.environments import EVERY
from tanren.launch import container, order_file, scheduler
from tanren.launch.orders import Order, shown
from tanren.launch.scheduler import After, JobRequest, State
from tanren.plan.cost import Gpu
from tanren.plan.paths import APART_STAGES, TRAINING_STAGES, RunFolder
from tanren.plan.plan import Machine, Plan, Request
from tanren.plan.site import Place, Wish, make_place

# Where the processes of several nodes meet: one of PORTS from here on, by the job's id.
FIRST_PORT, PORTS = 20000, 20000
# Name and state of each job of a site.
States = Callable[[str], dict[str, tuple[str, State]]]


class Submitted(Strict):
    """One job of a run. The id is None while the scheduler has not answered."""

    id: str | None
    name: str
    site: str
    segment: int
    submitted: str


@dataclass(frozen=True)
class Sent:
    """What came of submitting a run: its jobs, the last one first to be waited for."""

    ids: tuple[str, ...]
    new: bool


_SUBMITS = {"pbs": "qsub", "gridengine": "qsub", "slurm": "sbatch"}


def find_site(wanted: str | None, user: User) -> str | None:
    """The site to use: the wish, else user.toml's, else by what this machine has; None is local."""
    name = wanted or os.environ.get("SITE") or user.site
    if name is None:
        found = [
            site_name
            for site_name, site in sites().items()
            if site.found_by
            and all(Path(folder).is_dir() for folder in site.found_by)
            and shutil.which(_SUBMITS[site.scheduler])
        ]
        return found[0] if found else None
    if name.endswith(".yaml"):
        return str(Path(name).expanduser().resolve())
    return None if name == "local" else name


def place_of(site_name: str, recipe: Recipe, stage: str, wish: Wish, user: User) -> Place:
    """The place of a stage on a site, within the site's limits."""
    return make_place(
        site_name, read_site(site_name), recipe.job, wish, user.group,
        trains=stage in (*TRAINING_STAGES, *APART_STAGES),
    )  # fmt: skip


def machine_of(place: Place, runtime: str | None = None) -> Machine:
    """What the job will have, as far as the site's file knows.

    Args:
        runtime: of the order, which the job takes with it (not so an environment's RUNTIME);
            `native` is a Python that is known where the job runs alone.
    """
    gpu = place.site.gpu
    return Machine(
        gpus=place.gpus,
        nodes=place.nodes,
        cores=place.type.cores,
        gpu=Gpu(gpu.name, gpu.memory_gib, quack=runtime != "native")
        if gpu and place.gpus
        else None,
    )


def job_request(folder: RunFolder, place: Place, task: str) -> JobRequest:
    """A run's job in the words that all schedulers share."""
    title = "-".join(dict.fromkeys([folder.whole.root.name, folder.root.name]))
    # A name of its own, by which a job whose id got lost is found again.
    mark = hashlib.sha256(str(folder.root).encode()).hexdigest()[:6]
    return JobRequest(
        # A letter first, as Grid Engine wants it.
        name=f"{'' if task[0].isalpha() else 't'}{task}-{title}"[:50] + f"-{mark}",
        type=place.type_name,
        nodes=place.nodes,
        hours=place.hours,
        group=place.group,
        output=folder.job_log.parent,
        gpus_per_node=place.type.gpus,
        cores=place.type.cores,
        reservation=place.reservation,
    )


def script(folder: RunFolder, place: Place, task: str, segment: int = 1) -> str:
    """The script that the scheduler is given; it hands over to `tanren job` on the first node."""
    job = job_request(folder, place, task)
    seconds = int(place.hours * 3600 - place.save_seconds)
    environment = {
        **place.site.environment,
        "TANREN_PYTHON": sys.executable,
        "RUNS": str(folder.whole.root.parents[1]),
        "IMAGES": str(container.images_folder()),
        "DATA": str(hub.data_root()),
    }
    own = [environment.variable for environment in EVERY]
    for name in ("TANREN_USER", "TANREN_CACHE", "HF_HOME", *own):
        if name in os.environ:
            environment[name] = os.environ[name]
    command = [str(repository() / "bin" / "tanren"), "job", str(folder.root)]
    command += ["--segment", str(segment)] if segment > 1 else []
    lines = [
        "#!/bin/bash",
        *scheduler.adapter(place.site.scheduler).header(job),
        f"# {folder.root}, written by tanren. Nothing here is to be edited.",
        f"exec >>{shlex.quote(str(folder.job_log))} 2>&1",
        *place.site.setup,
        "set -euo pipefail",
        *(f"export {key}={shlex.quote(value)}" for key, value in environment.items()),
        f"export TANREN_DEADLINE=$(($(date +%s) + {seconds}))",
        f"exec {shlex.join(command)}",
    ]
    return "\n".join(lines) + "\n"


def read_jobs(folder: RunFolder) -> list[Submitted]:
    """The jobs of a run, oldest first."""
    value = runs.read_json(folder.jobs) or []
    try:
        return [Submitted.model_validate(item) for item in value]
    except ValidationError as error:
        raise RequestError(
            folder.jobs, f"was not written by this version of tanren: {error.errors()[0]['msg']}",
            "remove it once the scheduler has no job of this run",
        ) from None  # fmt: skip


def states_at(site_name: str) -> dict[str, tuple[str, State]]:
    """What a site's scheduler has now: name and state of each job, by its id."""
    adapter = scheduler.adapter(read_site(site_name).scheduler)
    return adapter.states(scheduler.ask(adapter.query(), "list jobs"))


def live_jobs(folder: RunFolder, states: States = states_at) -> dict[str, State]:
    """The jobs of a run that the scheduler still has, with their states.

    A job whose id never came is found by its name, and its id written down.

    Args:
        states: asks a site's scheduler; whoever looks at many runs asks it once.
    """
    jobs = read_jobs(folder)
    if not jobs:
        return {}
    there = states(jobs[-1].site)
    known = {job.id for job in jobs}
    for number, job in enumerate(jobs):
        if job.id is None:
            found = [key for key, (name, _) in there.items()
                     if job.name == name and key not in known]  # fmt: skip
            jobs[number] = job.model_copy(update={"id": found[0] if found else ""})
    if any(job.id is None for job in read_jobs(folder)):
        _write_jobs(folder, [job for job in jobs if job.id])
    ids = [job.id for job in jobs if job.id in there]
    return {key: there[key][1] for key in ids if key and there[key][1] != "ended"}


def _write_jobs(folder: RunFolder, jobs: Iterable[Submitted]) -> None:
    runs.write_json(folder.jobs, [orjson.loads(job.model_dump_json()) for job in jobs])


def submit(
    order: Order, request: Request, plan: Plan, place: Place, after: After,
    must_be_done: tuple[Path, ...] = (), *, chain: int = 1,
) -> Sent:  # fmt: skip
    """Submit a stage, or find the jobs of it that are there already.

    Args:
        after: jobs to wait for.
        must_be_done: run folders that must be done when the job starts.
        chain: jobs, one after the other, each of which goes on where the last one stopped.
    Raises:
        RequestError: the scheduler refuses. WorkError: it does not answer; nothing is lost.
    """
    folder = plan.folder
    runs.make(folder)
    (folder.root / "log").mkdir(exist_ok=True)
    with runs.locked(folder.root / ".submit", wait_seconds=60):
        live = live_jobs(folder)
        if live:
            return Sent(tuple(live), new=False)
        order_file.write(order, request, place, folder, must_be_done)
        for mark in (folder.failed, folder.stopped, folder.stop):
            mark.unlink(missing_ok=True)
        ids: list[str] = []
        for segment in range(1, chain + 1):
            waits = after if segment == 1 else After((ids[-1],), success=False)
            ids.append(_submit_one(folder, place, request.task, segment, waits))
    return Sent(tuple(ids), new=True)


def _submit_one(folder: RunFolder, place: Place, task: str, segment: int, after: After) -> str:
    adapter = scheduler.adapter(place.site.scheduler)
    file = folder.segment(segment)
    runs.write_atomic(file, script(folder, place, task, segment).encode())
    file.chmod(0o755)
    job = job_request(folder, place, task)
    entry = Submitted(
        id=None, name=job.name, site=place.site_name, segment=segment,
        submitted=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    )  # fmt: skip
    before = read_jobs(folder)
    _write_jobs(folder, [*before, entry])
    try:
        answer = scheduler.ask(adapter.submit(job, file, after), "submit a job")
        number = adapter.job_id(answer)
    except RequestError:
        # Refused, mostly; but a connection that broke after the job was taken looks alike.
        number = _find(place, job.name, {other.id for other in before})
        if number is None:
            _write_jobs(folder, before)
            raise
    if number is None:
        raise WorkError(
            f"{place.site_name}: {shlex.join(adapter.submit(job, file, after))}",
            f"answered {answer.strip()!r}, which holds no job id",
            "make status looks for the job by its name; the same command does not submit it twice",
        )
    _write_jobs(folder, [*before, entry.model_copy(update={"id": number})])
    return number


def _find(place: Place, name: str, known: set[str | None]) -> str | None:
    """The job of this name that is not known yet; None where the scheduler has none."""
    try:
        there = states_at(place.site_name)
    except TanrenError:
        return None
    return next(
        (key for key, (title, _) in there.items() if title == name and key not in known), None
    )


def end(folder: RunFolder, job: str) -> None:
    """Take one job of a run out of the queue, or end it where it runs."""
    adapter = scheduler.adapter(read_site(read_jobs(folder)[-1].site).scheduler)
    scheduler.ask(adapter.cancel(job), f"cancel {job}")


def cancel(folder: RunFolder, *, now: bool) -> str:
    """End a run's jobs and its parts': a training stage saves first, unless it is to end now.

    Returns:
        what was done, for a person.
    """
    states = functools.cache(states_at)
    owners = {
        job: (one, state)
        for one in (*(part for _, part in runs.parts(folder)), folder)
        for job, state in live_jobs(one, states).items()
    }
    if not owners:
        raise RequestError(shown(folder.root), "has no job in the scheduler", "make status")
    running = [job for job, (_, state) in owners.items() if state == "running"]
    gently = (
        bool(running)
        and not now
        and folder.root.name.split(".")[0].split("-")[0] in (TRAINING_STAGES)
    )
    # The last one first: it waits for the others, and would start, or be refused, when they go.
    for job in reversed(list(owners)):
        if gently and job in running:
            folder.stop.touch()
        else:
            end(owners[job][0], job)
    if gently:
        return f"job {running[0]} saves after its step and ends; NOW=1 ends it at once"
    return f"cancelled {', '.join(owners)}"


def after_jobs(
    wishes: Iterable[str], place: Place, runs_root: Path
) -> tuple[After, tuple[Path, ...]]:
    """The jobs that AFTER= names, and on Grid Engine the runs whose success must be looked up.

    Raises:
        RequestError: Grid Engine does not wait for success, and the job is no run of ours.
    """
    ids = tuple(wishes)
    if not ids or place.site.scheduler != "gridengine":
        return After(ids), ()
    owners = {
        job.id: path.parent
        for path in runs_root.glob("*/*/jobs.json")
        for job in read_jobs(RunFolder(path.parent))
    }
    for job in ids:
        if job not in owners:
            raise RequestError(
                f"AFTER={job}",
                "is no job of a run in this runs folder, and Grid Engine waits for the end of a "
                "job, however it ends",
                "name a job that tanren submitted, or submit when the other job is done",
            )
    return After(ids), tuple(owners[job] for job in ids)
