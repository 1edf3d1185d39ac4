"""What a stage would do, found out without changing anything: for `make plan`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tanren import provenance
from tanren.config.errors import RequestError
from tanren.config.load import repository
from tanren.launch import (
    changes,
    clusters,
    fetching,
    local,
    orders,
    parts,
    queue,
    reading,
    soups,
    submit,
)  # fmt: skip
from tanren.launch.container import Container
from tanren.launch.orders import Order
from tanren.plan.make import make_plan
from tanren.plan.plan import Machine, Plan, Request
from tanren.plan.site import Place, check_group


@dataclass(frozen=True)
class Preview:
    """A stage's plan, its place on a cluster, and what starting it now would mean.

    `jobs` are those of its chain or its `parts`, with the one that joins them; `first` the stages
    that must be made before it and their places. `refused` are what a start would end with;
    `other` is such a refusal by the run's own folder, which is the plan's own error as well.
    """

    plan: Plan
    state: str = "new"
    place: Place | None = None
    jobs: int = 1
    parts: int = 0
    first: tuple[tuple[str, Place | None], ...] = ()
    notes: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    scripts: list[tuple[str, str]] = field(default_factory=list)
    other: RequestError | None = None


def preview(order: Order) -> Preview:
    """Look at what an order would do.

    Raises:
        RequestError: there can be no plan of it.
    """
    place = clusters.place_for(order)
    request = reading.read_request(order, _machine(order, place))
    planned = make_plan(request)
    state, new, other = _state(planned)
    first: tuple[tuple[str, Place | None], ...] = ()
    lost = None
    try:
        first = _first(order, request)
    except RequestError as error:  # of a run that was never begun
        lost = error
    if first:
        names = ", ".join(name for name, _ in first)
        state += f"; {names} must be made first (make does it, or --needs)"
    inside = submit.container_for(order, request, place.type.gpus if place else None)
    scripts = _scripts(request, planned, place, inside)
    if place and order.parts:
        cut = parts.cut(request, order.parts)
        done = sum(submit.look(part).done for _, part in cut)
        state += f"; {done} of {order.parts} parts are done" if done else ""
        text = queue.script(cut[0][1].folder, place, request.task)
        title = f"job script for {place.site.scheduler}, part 1 of {order.parts}"
        scripts.insert(0, (title, text))

    checks: list[Callable[[], None]] = [
        lambda: orders.refuse_start(order, request),
        lambda: changes.refuse_below(order, request, new, lambda _: None),
        lambda: submit.check_disk(planned),
    ]
    if not order.parts:
        checks.append(lambda: parts.refuse_at_work(planned.folder))
    if place:
        checks += [
            lambda: check_group(place),
            lambda: provenance.refuse_dirty(repository(), clusters.may_be_dirty(order)),
            lambda: clusters.refuse_unfetched(order, request, needs=True),
            lambda: soups.check_jobs(request),
            lambda: clusters.refuse_without_image(order, planned, place, inside),
        ]
    refused = [] if state.startswith("done") else _refused(checks)
    if lost is not None:
        refused.insert(0, _said(lost))
    return Preview(
        plan=planned,
        place=place,
        state=state,
        jobs=order.parts + 1 if order.parts else order.chain,
        parts=order.parts or 0,
        first=first,
        notes=[*fetching.notes(request.recipe, request.task), *submit.idle_binds(order, inside)],
        refused=refused,
        scripts=scripts,
        other=other,
    )


def _state(planned: Plan) -> tuple[str, bool, RequestError | None]:
    """In words; whether the run is new; why its folder refuses the plan."""
    other, new = None, False
    try:
        start = submit.look(planned)
        new = start.new
        going = f"goes on from iteration {start.iteration}" if start.iteration else "new"
        state = "done" if start.done else going
    except RequestError as error:
        other, state = error, "would be refused, see below"
    now, jobs = clusters.state_of(planned.folder)
    if now in clusters.GOING:
        state += f"; {now} now{', job ' + ', '.join(jobs) if jobs else ''}"
    return state, new, other


def _machine(order: Order, place: Place | None) -> Machine | None:
    """A job's; None for this one."""
    return queue.machine_of(place, order.runtime) if place else None


def _first(order: Order, request: Request) -> tuple[tuple[str, Place | None], ...]:
    """What must be made first, each after what it stands on itself."""
    found: dict[str, Place | None] = {}
    for name, needed in reading.missing_runs(order, request).items():
        found[name] = None
        try:
            place = clusters.place_for(needed)
            below = reading.read_request(needed, _machine(needed, place))
        except RequestError:  # its text is not here: a plan of this stage can be made all the same
            continue
        del found[name]
        found |= {**dict(_first(needed, below)), name: place}
    return tuple(found.items())


def _refused(checks: list[Callable[[], None]]) -> list[str]:
    found = []
    for check in checks:
        try:
            check()
        except RequestError as error:
            found.append(_said(error))
    return found


def _said(error: RequestError) -> str:
    return f"{error.place}: {error.problem}; {error.next_step}"


def _scripts(
    request: Request, planned: Plan, place: Place | None, inside: Container | None
) -> list[tuple[str, str]]:
    """The job's script for the scheduler, and the one that runs on each node."""
    meeting = local.Meeting("THE_FIRST_HOST", queue.FIRST_PORT)
    text = local.script(
        planned.folder, planned.launch, 1, request.machine.cores, inside, meeting,
        place.site.environment if place else {},
    )  # fmt: skip
    if place is None:
        return [("job script", text)]
    scheduled = queue.script(planned.folder, place, request.task)
    return [(f"job script for {place.site.scheduler}", scheduled), ("on each node", text)]
