"""Runs that there are: their state, pages and logs, their end, and each once more."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from tanren.cli.command import app

RunName = Annotated[str, typer.Argument(metavar="RUN", help="a run folder, or TASK/RUN")]


@app.command(epilog="Example: bin/tanren status")
def status() -> None:
    """Every run: its state, its job, how far it is."""
    from tanren.launch import clusters
    from tanren.launch.orders import runs_root
    from tanren.report import terminal

    root = runs_root()
    terminal.print_status(clusters.status(root), root, terminal.console())


@app.command(epilog="Example: bin/tanren report tiny/midtrain tiny/midtrain-hot")
def report(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="a run folder, or TASK/RUN; others laid over it"),
    ],
    out: Annotated[
        Optional[Path], typer.Option("--out", help="a file; else in the first run's folder")
    ] = None,
) -> None:
    """One HTML file about a run, or about several compared, that opens without a network."""
    from tanren.launch import clusters
    from tanren.launch.orders import runs_root, shown
    from tanren.report import page, terminal

    root = runs_root()
    path = page.write([clusters.folder_of(run, root) for run in runs], out)
    terminal.console().print(f"  report     {shown(path)}", markup=False)


@app.command("wandb-sync", epilog="Example: bin/tanren wandb-sync tiny/midtrain")
def wandb_sync(run: RunName) -> None:
    """Send Weights & Biases what it has not yet of a run's metrics; needs a key and a network."""
    from tanren import tracking
    from tanren.launch import clusters
    from tanren.launch.orders import runs_root
    from tanren.report import terminal

    sent = tracking.sync(clusters.folder_of(run, runs_root()))
    terminal.console().print(f"  {sent.lines:,} lines sent, {sent.there:,} are there"
                             f"{': ' + sent.url if sent.url else ''}", markup=False)  # fmt: skip


@app.command(epilog="Example: bin/tanren cancel tiny/midtrain")
def cancel(
    run: RunName, now: Annotated[bool, typer.Option("--now", help="without saving")] = False
) -> None:
    """End a run's jobs; a training stage saves first."""
    from tanren.launch import clusters, queue
    from tanren.launch.orders import runs_root
    from tanren.report import terminal

    terminal.console().print(queue.cancel(clusters.folder_of(run, runs_root()), now=now))


@app.command(epilog="Example: bin/tanren logs tiny/midtrain --follow")
def logs(
    run: RunName, follow: Annotated[bool, typer.Option("--follow", help="as tail -f does")] = False
) -> None:
    """The newest log of a run."""
    from tanren.launch import clusters
    from tanren.launch.orders import runs_root

    log = clusters.newest_log(clusters.folder_of(run, runs_root()))
    sys.stdout.flush()
    os.execvp("tail", ["tail", "-n", "40", *(["-F"] if follow else []), str(log)])


@app.command(epilog="Example: bin/tanren reproduce tiny/midtrain")
def reproduce(
    run: RunName,
    force: Annotated[
        bool, typer.Option("--force", help="although something differs; the passport says what")
    ] = False,
    name: Annotated[
        Optional[str], typer.Option("--name", help="of the replay; else a number")
    ] = None,
) -> None:
    """A run once more from its passport: its commit, image and data, in a new run folder.

    The run is not touched. What it stands on is taken from where it is, or from the replay of the
    same name where that has it.
    """
    from tanren.launch import clusters
    from tanren.launch import compare as comparing
    from tanren.launch import reproduce as replays
    from tanren.launch.orders import check_name, runs_root, shown
    from tanren.report import compare as report
    from tanren.report import terminal

    screen = terminal.console()
    if name is not None:
        check_name(name)
    replay = replays.look(clusters.folder_of(run, runs_root()), name)
    replays.refuse(replay, force)
    for line in replay.differences:
        screen.print(f"note: {line}", markup=False)
    words, environment = replays.prepare(replay, force)
    code = replays.call(words, environment)
    if code:
        raise typer.Exit(code)
    if not replay.folder.done.exists():
        screen.print(f"once it is done: bin/tanren diff {run} {shown(replay.folder.root)}")
        return
    compared = comparing.compare(replay.of, replay.folder)
    for line in compared.groups["result"]:
        screen.print(f"  made       {line}", markup=False)
    report.print_curves(compared, screen)
    same = "is the same, bit for bit" if compared.same_result else "is not the same"
    screen.print(f"{shown(replay.folder.root)} {same}", markup=False)


@app.command(epilog="Example: bin/tanren diff tiny/midtrain tiny/midtrain-try2")
def diff(
    one: Annotated[str, typer.Argument(metavar="RUN_A", help="a run folder, or TASK/RUN")],
    other: Annotated[str, typer.Argument(metavar="RUN_B", help="another run of the same stage")],
) -> None:
    """In what two runs of a stage differ, and their loss curves side by side."""
    from tanren.launch import clusters
    from tanren.launch.compare import compare
    from tanren.launch.orders import runs_root
    from tanren.report import terminal
    from tanren.report.compare import print_compared

    there, here = (clusters.folder_of(run, runs_root()) for run in (one, other))
    print_compared(compare(there, here), one, other, terminal.console())
