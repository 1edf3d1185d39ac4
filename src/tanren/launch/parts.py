"""A stage cut into parts on a cluster: a job a part, and the stage's own job, which joins them.

Plain jobs with dependencies, not the schedulers' arrays: these are asked for, numbered, listed and
waited for in another way on each of the three.
"""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tanren import runs
from tanren.config.errors import RequestError, WorkError
from tanren.launch import queue, submit
from tanren.launch.orders import Order, shown
from tanren.launch.scheduler import After
from tanren.plan.make import make_plan
from tanren.plan.paths import Part, RunFolder
from tanren.plan.plan import Plan, Request
from tanren.plan.site import Place

# A job that was taken out of the queue is gone from the scheduler's list after so long.
WITHDRAW_SECONDS = 60.0


def check(order: Order, site: str | None) -> None:
    """Refuse parts where they would mean nothing."""
    stage, asked = order.recipe_file.name.split(".")[0], f"PARTS={order.parts}"
    if stage != "preprocess":
        raise RequestError(
            asked, f"gives each of several nodes a share of the text, and {stage} reads none",
            "leave it out; NODES= is the size of a training job",
        )  # fmt: skip
    if order.chain > 1:
        raise RequestError(
            f"{asked} CHAIN={order.chain}",
            "do not go together: a part that its walltime has ended keeps what it made",
            "leave CHAIN out; the same command again submits the parts that are not done",
        )
    if site is None:
        raise RequestError(
            asked, "asks for nodes of a cluster; on one machine preprocess takes all cores already",
            "SITE=... names one (recipes/sites); or leave it out",
        )  # fmt: skip


def cut(request: Request, parts: int) -> list[tuple[Request, Plan]]:
    """The parts of a stage, each with its plan.

    Raises:
        RequestError: the recipe cannot be carried out in parts.
    """
    asked = [replace(request, part=Part(number, parts)) for number in range(1, parts + 1)]
    return [(part, make_plan(part)) for part in asked]


def refuse_at_work(folder: RunFolder, parts: int | None = None) -> None:
    """Refuse a run while parts of it are at work: it would remove their shards at its end.

    Args:
        parts: these may be at work: those of the run cut into so many.
    """
    states = functools.cache(queue.states_at)
    for part, one in runs.parts(folder):
        if part.of == parts or one.done.exists():
            continue
        live = queue.live_jobs(one, states)
        if live:
            raise RequestError(
                shown(one.root), f"is at work, or waits for it: job {', '.join(live)}",
                f"PARTS={part.of} joins it with the others when they are done; or make cancel "
                f"RUN={folder.root.parent.name}/{folder.root.name}",
            )  # fmt: skip


def send(
    order: Order, request: Request, place: Place, after: After, must_be_done: tuple[Path, ...],
    say: Callable[[str], None],
) -> tuple[After, tuple[Path, ...]]:  # fmt: skip
    """Submit the parts that are neither done nor in the queue.

    A joining job that waits for too few is taken out of the queue.

    Args:
        after, must_be_done: what the parts wait for.
    Returns:
        what the joining job waits for: jobs, and run folders that must be done when it starts.
    """
    assert order.parts is not None, order
    folder, states = request.folder, functools.cache(queue.states_at)
    every = cut(request, order.parts)
    refuse_at_work(folder, order.parts)
    needs = tuple(plan.folder.root for _, plan in every)
    joining = queue.live_jobs(folder, states)
    if "running" in joining.values():
        return After(), needs
    if runs.is_locked(folder.lock):
        raise RequestError(
            shown(folder.root), "is being made on this machine", "wait for it, or end it first"
        )
    ids: list[str] = []
    missing = []
    for part, plan in every:
        if submit.look(plan).done:
            continue
        live = queue.live_jobs(plan.folder, states)
        ids += live
        missing += [] if live else [(part, plan)]
    said = [f"{len(every)} parts"]
    done = len(every) - len(ids) - len(missing)
    said += [f"{done} done"] if done else []
    said += [f"{len(ids)} in the queue already: job {', '.join(ids)}"] if ids else []
    if missing:
        if joining:
            say(f"job {', '.join(_withdraw(folder))}, which was to join the parts, is replaced; "
                "what waits for it must be submitted again")  # fmt: skip
        for part_of_before, one in runs.parts(folder):
            # Their shards stay, and are found whatever the parts are now.
            if part_of_before.of != order.parts:
                shutil.rmtree(one.root)
        new = [_submit(order, part, plan, place, after, must_be_done) for part, plan in missing]
        said.append(f"{len(new)} submitted: job {', '.join(new)}")
        ids += new
    say("; ".join(said))
    return After(tuple(ids)), needs


def _submit(
    order: Order, part: Request, plan: Plan, place: Place, after: After,
    must_be_done: tuple[Path, ...],
) -> str:  # fmt: skip
    # Of other text, or of shards that are gone: it must not count until it is made again.
    plan.folder.done.unlink(missing_ok=True)
    return queue.submit(order, part, plan, place, after, must_be_done).ids[-1]


def _withdraw(folder: RunFolder) -> tuple[str, ...]:
    """Take a run's jobs out of the queue; which they were.

    Raises:
        WorkError: the scheduler still has them a minute later.
    """
    jobs = tuple(queue.live_jobs(folder))
    for job in reversed(jobs):
        queue.end(folder, job)
    deadline = time.monotonic() + WITHDRAW_SECONDS
    while queue.live_jobs(folder):
        if time.monotonic() > deadline:
            raise WorkError(
                shown(folder.root), f"job {', '.join(jobs)} was cancelled, and is still there",
                "the same command again, when make status does not show it any more",
            )  # fmt: skip
        time.sleep(1)
    return jobs
