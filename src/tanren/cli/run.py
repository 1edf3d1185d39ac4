"""A stage from its order to its end, on this machine or by a scheduler's job."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from tanren.launch.orders import Order
    from tanren.plan.plan import Request


def run_order(order: Order, needs: bool, then: str | None) -> None:
    """Run one stage as run_stage does, and the one that is to follow it."""
    from dataclasses import replace

    from tanren.plan.site import Wish
    from tanren.report import terminal

    screen, stage = terminal.console(), order.recipe_file.stem
    jobs = run_stage(order, needs, screen)
    if then is not None:
        recipe = order.recipe_file.with_name(f"{then}.yaml")
        # An export's recipe says the midtraining's; of other stages it makes a folder of its own.
        of = () if stage == "midtrain" else (f"of=stage:{stage}",)
        after = replace(
            order, recipe_file=recipe, assignments=of, plain_if_absent=True, wish=Wish(), chain=1,
            parts=None, after=jobs[-1:],
        )  # fmt: skip
        run_stage(after, False, screen)


def run_stage(order: Order, needs: bool, screen: Console) -> tuple[str, ...]:
    """Run one stage, and before it what it stands on if asked to; on a cluster, submit them.

    Returns:
        the scheduler's jobs of the stage; none where it ran here or is done.
    """
    from tanren import runs
    from tanren.launch import changes, clusters, fetching, orders, parts, reading, submit
    from tanren.plan.make import make_plan
    from tanren.report import terminal

    place = clusters.place_for(order)
    if place is not None:
        return clusters.send(order, place, needs, screen.print)
    request = reading.read_request(order)
    orders.refuse_start(order, request)
    if needs:
        _refuse_early(order, request)
        for needed in reading.missing(order, request):
            run_stage(needed, True, screen)
        request = reading.read_request(order)
    planned = make_plan(request)
    start = submit.look(planned)
    changes.refuse_below(
        order, request, start.new,
        lambda text: screen.print(text, markup=False, highlight=False),
    )  # fmt: skip
    if start.done:
        screen.print(f"[bold]{planned.stage}[/] is done: {orders.shown(planned.run)}")
        terminal.summary(planned, screen)
        return ()
    reading.refuse_missing(order, request)
    parts.refuse_at_work(planned.folder)
    for note in planned.notes:
        screen.print(f"note: {note}", markup=False, highlight=False)
    submit.check_disk(planned)
    changed = submit.uncommitted()
    if changed:
        screen.print(f"note: {changed}", markup=False, highlight=False)
    if fetching.fetch_missing(request.recipe, lambda: terminal.fetching(screen), screen.print):
        request = reading.read_request(order)
        planned = make_plan(request)
    inside = submit.container_for(order, request)
    submit.make_ready(planned.stage, inside)
    for note in submit.idle_binds(order, inside):
        screen.print(f"note: {note}", markup=False, highlight=False)
    if request.machine.idle_gpus and planned.launch.engine:
        screen.print(
            f"{request.machine.idle_gpus} GPUs stay idle: the engine needs Transformer Engine for "
            "them, and this Python has none; running on the CPU",
            highlight=False,
        )
    if start.iteration and not runs.is_locked(planned.folder.lock):
        screen.print(f"{planned.stage} goes on from iteration {start.iteration}")
    watch, close = terminal.watching(planned, screen)
    try:
        ending = submit.start(planned, request.machine.cores, inside, watch)
    finally:
        close()
    if ending is not None:
        raise ending
    terminal.summary(planned, screen)
    return ()


def _refuse_early(order: Order, request: Request) -> None:
    """Refuse before hours of preparation what would be refused behind them."""
    from tanren.launch import changes, submit
    from tanren.plan.make import make_plan
    from tanren.plan.midtrain import LengthUnknownError

    try:
        planned = make_plan(request)
    except LengthUnknownError:
        return
    start = submit.look(planned)
    if not start.done:
        changes.refuse_below(order, request, start.new, lambda _: None)
        submit.check_disk(planned)
