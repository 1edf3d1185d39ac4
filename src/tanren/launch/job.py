"""`tanren job RUN`: what a scheduler's job does on its first node.

It thaws the order, plans with what the stages below have made by now and with the nodes that the
job was given, and runs the stage on them. Its exit code is the contract's, which schedulers pass on
to the jobs that wait for it.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tanren import provenance, runs
from tanren.config.errors import RequestError, TanrenError, WorkError
from tanren.config.load import read_site, repository
from tanren.launch import container, inputs, local, order_file, queue, reading, scheduler, submit
from tanren.launch.container import Container
from tanren.launch.machine import this_machine, visible_gpus
from tanren.launch.order_file import Ordered
from tanren.launch.scheduler import Allocation
from tanren.plan.make import make_plan
from tanren.plan.paths import APART_STAGES, RunFolder
from tanren.plan.plan import Machine, Plan, Request, own_image


def run(
    folder: RunFolder, segment: int, watching: Callable[[Plan], Callable[..., Callable[[], None]]],
    say: Callable[[str], None],
) -> TanrenError | None:  # fmt: skip
    """Run the stage that a run folder's order asks for, inside a job.

    Args:
        segment: which job of a chain this is, from 1.
    Returns:
        None when the stage is done; else why not, with the contract's exit code.
    """
    order, request = order_file.read(folder)
    site = read_site(order.site)
    allocation = scheduler.adapter(site.scheduler).allocation(os.environ)
    say(f"job {allocation.job_id} on {', '.join(allocation.hosts)}")
    if segment > 1:
        ended = _chain_has_ended(folder)
        if ended is not None:
            return ended
    _check_needs(order)
    if len(allocation.hosts) < order.nodes:
        raise WorkError(
            folder.root,
            f"the job has {len(allocation.hosts)} hosts ({', '.join(allocation.hosts)}), and asked "
            f"for {order.nodes}",
            "submit again; tell the site if it happens again",
        )
    inside = _container(order, request)
    request = reading.with_products(
        replace(
            request,
            machine=_machine(order, inside),
            inputs=inputs.marks(request.recipe),
        )
    )
    plan = make_plan(request)
    start = submit.look(plan)
    if start.done:
        say(f"{plan.stage} is done: {plan.run}")
        return None
    submit.make_ready(plan.stage, inside)
    here, there = provenance.git_commit(repository())["id"], (order.commit or {}).get("id")
    if here and there and here != there:
        say(f"note: the checkout is at {here[:12]} now, and was at {there[:12]} when the job was "
            "submitted; the job runs what is there now")  # fmt: skip
    if start.iteration:
        say(f"{plan.stage} goes on from iteration {start.iteration}")
    nodes = _nodes(order, allocation, folder)
    return submit.start(plan, request.machine.cores, inside, watching(plan), nodes)


def _chain_has_ended(folder: RunFolder) -> TanrenError | None:
    """A chain goes on after a stop that was saved and after a kill, not after a failure."""
    failure = runs.failure_of(folder)
    if failure is not None:
        return WorkError(
            folder.root,
            f"the job before this one failed: {failure.problem}",
            "mend that and submit again; the rest of the chain does nothing",
        )
    return None


def _check_needs(order: Ordered) -> None:
    """Grid Engine starts a job after the end of another, however that one ended."""
    for needed in order.needs:
        if runs.result_of(RunFolder(Path(needed))) is None:
            failure = runs.failure_of(RunFolder(Path(needed)))
            why = f": {failure.problem}" if failure else ""
            part = RunFolder(Path(needed)).whole.root != Path(needed)
            raise RequestError(
                needed,
                f"is not done, and this stage stands on it{why}",
                "the same command again submits the parts that are not done, and this job"
                if part
                else "run that stage, then submit this one again",
            )


def _container(order: Ordered, request: Request) -> Container | None:
    if order.stage in APART_STAGES:
        return None
    inside = container.choose(order.runtime, visible_gpus(), own_image(request.recipe))
    if inside is None:
        return None
    return replace(inside, binds=container.binds(request.recipe, request.runs, order.binds))


def _machine(order: Ordered, inside: Container | None) -> Machine:
    """The job's machine: GPUs counted on this node, not taken from the site's file."""
    here = this_machine(in_image=inside is not None or order.stage in APART_STAGES)
    stated = read_site(order.site).types[order.type].gpus
    if stated and not here.gpus:
        missing = "has no Transformer Engine" if here.idle_gpus else "has no GPU"
        raise WorkError(
            f"TYPE={order.type}", f"this node {missing}, and the site's file says {stated} GPUs",
            "build the image (make build-image IMAGE=train)" if here.idle_gpus else "tell the site",
        )  # fmt: skip
    if not stated:
        here = replace(here, gpus=0, gpu=None, idle_gpus=0)
    return replace(here, gpus=here.gpus * order.nodes, nodes=order.nodes)


def _nodes(order: Ordered, allocation: Allocation, folder: RunFolder) -> submit.Nodes:
    site, hosts = read_site(order.site), allocation.hosts[: order.nodes]
    port = queue.FIRST_PORT + zlib.crc32(allocation.job_id.encode()) % queue.PORTS
    meeting = local.Meeting(hosts[0], port)
    facts = {
        "site": order.site,
        "id": allocation.job_id,
        "type": order.type,
        "nodes": order.nodes,
        "hosts": list(hosts),
        "hours": order.hours,
        "submitted": order.commit,
    }
    if order.nodes == 1:
        return submit.Nodes((), meeting, facts, site.environment)
    hostfile = folder.root / "hosts"
    hostfile.write_text("".join(f"{host}\n" for host in hosts))
    starter = scheduler.adapter(site.scheduler).start_on_every_node(hosts, hostfile)
    return submit.Nodes(tuple(starter), meeting, facts, site.environment)
