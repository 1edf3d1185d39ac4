"""Stages one after the other, the runs of the FP8 gate, and what a job calls."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from tanren.cli.command import (
    AfterJobs,
    Binds,
    Chain,
    Dirty,
    Hours,
    Name,
    Needs,
    Nodes,
    RecipeFile,
    Reservation,
    Runtime,
    Sets,
    SiteName,
    Type,
    Variant,
    app,
    order_of,
)
from tanren.cli.run import run_stage
from tanren.config.errors import EXIT_STOPPED, TanrenError


@app.command(epilog="Example: bin/tanren pipeline recipes/tiny --stages convert,midtrain,export")
def pipeline(
    task: Annotated[Path, typer.Argument(help="a recipe folder, recipes/TASK")],
    stages: Annotated[str, typer.Option("--stages", help="in their order, with commas")],
    variant: Variant = None, name: Name = None, runtime: Runtime = None, bind: Binds = None,
    set_: Sets = None, site: SiteName = None, nodes: Nodes = None, hours: Hours = None,
    type_: Type = None, reservation: Reservation = None, after: AfterJobs = None, chain: Chain = 1,
    allow_dirty: Dirty = False,
) -> None:  # fmt: skip
    """Several stages, one after the other; on a cluster all are submitted with dependencies.

    Sizes and fields (--nodes, --set ...) are the training stages'.
    """
    from dataclasses import replace

    from tanren.config.errors import RequestError
    from tanren.config.schema import STAGES
    from tanren.launch.orders import recipe_of, refuse_given
    from tanren.plan.paths import PREPARING_STAGES, TRAINING_STAGES
    from tanren.plan.site import Wish
    from tanren.report import terminal

    wanted = [stage for stage in stages.split(",") if stage]
    for stage in wanted:
        if stage not in STAGES:
            raise RequestError(
                f"--stages {stages}", f"{stage} is no stage", f"the stages are {', '.join(STAGES)}"
            )
    given = order_of(task / "stage.yaml", variant, name, set_, runtime, bind, site, nodes, hours,
                   type_, reservation, after, chain, allow_dirty=allow_dirty)  # fmt: skip
    orders = []
    for number, stage in enumerate(wanted):
        order = replace(given, recipe_file=task / f"{stage}.yaml", plain_if_absent=True)
        if stage not in TRAINING_STAGES:
            order = replace(order, assignments=(), wish=Wish(), chain=1)
        if stage in PREPARING_STAGES:
            order = replace(order, variant=None, name=None)
        if number:
            order = replace(order, after=())
        refuse_given(order, recipe_of(order)[1])
        orders.append(order)
    screen = terminal.console()
    for order in orders:
        run_stage(order, False, screen)


@app.command(epilog="Example: bin/tanren gate recipes/tiny/midtrain.yaml --fp8 delayed,blockwise")
def gate(
    recipe: RecipeFile,
    steps: Annotated[int, typer.Option("--steps", min=1, help="of each run")] = 200,
    fp8: Annotated[
        Optional[list[str]],
        typer.Option("--fp8", help="delayed,tensorwise,blockwise; else the recipe's or tensorwise"),
    ] = None,
    limit: Annotated[
        float, typer.Option("--limit", min=0.001, help="of a relative difference, in percent")
    ] = 0.5,
    control: Annotated[
        bool, typer.Option("--control", help="bf16 a second time: how far chance alone leads")
    ] = False,
    variant: Variant = None, name: Name = None, set_: Sets = None, runtime: Runtime = None,
    bind: Binds = None, site: SiteName = None, nodes: Nodes = None, hours: Hours = None,
    type_: Type = None, reservation: Reservation = None, needs: Needs = False,
    allow_dirty: Dirty = False,
) -> None:  # fmt: skip
    """Whether FP8 trains as bf16 does: the same steps in each, and their losses compared.

    The learning rate stays at its peak after the warm-up. Of a finished run the curves stay and the
    weights go. Exit code 1 says that FP8 is refused.
    """
    from tanren.config.errors import WorkError
    from tanren.launch import clusters
    from tanren.launch import gate as gates
    from tanren.plan.gate import CONTROL, compare
    from tanren.report import gate as report
    from tanren.report import terminal

    screen = terminal.console()
    order = order_of(recipe, variant, name, set_, runtime, bind, site, nodes, hours, type_,
                   reservation, allow_dirty=allow_dirty)  # fmt: skip
    stated = tuple(one for text in fp8 or [] for one in text.split(",") if one)
    trials = gates.trials(order, stated, steps, control=control)
    pending = [trial for trial in trials if not trial.is_done]
    if pending and clusters.place_for(order) is not None:
        for trial in pending:
            run_stage(trial.order, needs, screen)
        screen.print("once they are done, the same command compares them")
        return
    if pending:
        gates.check(trials, pending)
    failed: dict[str, str] = {}
    for trial in pending:
        try:
            run_stage(trial.order, needs, screen)
        except TanrenError as error:
            # One that was stopped goes on; and without bf16 there is nothing to compare with.
            if trial is trials[0] or error.exit_code == EXIT_STOPPED:
                raise
            failed[trial.scaling] = f"{error.place}: {error.problem}"
        else:
            gates.drop_checkpoints(trial)  # before the next one needs the room
    finished = [trial for trial in trials if trial.scaling not in failed]
    for trial in finished:
        gates.drop_checkpoints(trial)  # those that jobs have left
    curves = {trial.scaling: gates.read_curves(trial) for trial in finished}
    bf16, *others = (trial.scaling for trial in trials)
    compared = {one: compare(curves[bf16], curves[one]) for one in others if one in curves}
    share = limit / 100
    folder = gates.write(order, trials, compared, share, failed)
    svg = report.picture(f"{folder.parent.name}/{recipe.stem}", curves, compared, share)
    (folder / "gate.svg").write_text(svg)
    report.print_gate(compared, failed, steps, share, screen)
    screen.print(f"  {folder / 'gate.json'}, gate.svg", markup=False)
    refused = [
        one
        for one in others
        if one != CONTROL and (one in failed or not compared[one].passes(share))
    ]
    if refused:
        advice = "--set fp8=none, or try the others: --fp8 delayed,tensorwise,blockwise"
        if not control:
            advice += "; --control shows how far apart two runs in bf16 are"
        raise WorkError(
            "the FP8 gate",
            f"refuses {', '.join(refused)}: the loss is not that of bf16 within {limit:g} %",
            advice,
        )


@app.command(hidden=True)
def job(run: Path, segment: Annotated[int, typer.Option("--segment")] = 1) -> None:
    """What a scheduler's job calls on its first node."""
    from tanren.launch import job as jobs
    from tanren.plan.paths import RunFolder
    from tanren.plan.plan import TrainingPlan, read_plan
    from tanren.report import terminal

    screen = terminal.console()
    ending = jobs.run(
        RunFolder(run), segment, lambda plan: terminal.watching(plan, screen)[0], screen.print
    )
    if ending is not None:
        raise ending
    done = read_plan(RunFolder(run).plan)
    if done.bench is not None:
        # Nobody waits at a terminal: it goes to the job's log.
        terminal.summary(done, screen)
    elif isinstance(done, TrainingPlan):
        terminal.print_report(done.folder, screen, write=True)
