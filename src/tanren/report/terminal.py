"""What a person sees while a stage runs and when it has ended. Plain lines where no terminal is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from tanren import runs
from tanren.config.errors import TanrenError
from tanren.data.fetch import Progress as Fetching
from tanren.data.fetch import Report
from tanren.images.lock import Lock
from tanren.launch.clusters import Row
from tanren.launch.orders import shown
from tanren.plan.paths import RunFolder
from tanren.plan.plan import ConvertPlan, EvaluationPlan, ExportPlan, MergePlan, Plan, TrainingPlan
from tanren.report.bench import print_bench
from tanren.report.conversation import print_sets
from tanren.report.small_curve import print_loss

PLAIN_SECONDS = 10.0
# What of the held-out metrics a summary shows, and how it calls them.
HELD_OUT = {"loss": "held out", "accuracy": "accuracy", "margin": "margin"}


class Tail:
    """New whole lines of a growing JSON-lines file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = path.stat().st_size if path.exists() else 0

    def read(self) -> list[dict[str, float]]:
        """Lines that were completed since the last call."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self.offset)
            block = file.read()
        end = block.rfind(b"\n") + 1
        self.offset += end
        return runs.json_lines(block[:end])


def clock(seconds: float) -> str:
    """`0:42`, `12:05`, `3:10:00`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def tokenized(now: Mapping[str, Any]) -> str:
    """How far the tokenizing is (`data.tokenize.Progress` as values)."""
    speed = now["tokens"] / max(now["seconds"], 1e-9)
    return (
        f"{now['doing']} {now['done']}/{now['total']}  {now['tokens']:,} tokens  "
        f"{speed:,.0f} tokens/s"
    )


class Watcher:
    """Follows one attempt of a stage: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, plan: Plan, folder: RunFolder, attempt: int, console: Console) -> None:
        self.plan, self.console = plan, console
        self.tail = Tail(folder.metrics)
        self.total = runs.total_steps(plan)
        self.step, self.text, self.printed, self.last_plain = 0, "", "", time.monotonic()
        self.step_seconds: list[float] = []
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        console.print(
            f"[bold]{plan.stage}[/] → {shown(folder.root)}   log {folder.log(attempt).name}"
        )
        if console.is_terminal:
            self.bar = Progress(
                SpinnerColumn(),
                BarColumn(bar_width=24),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                console=console,
                transient=True,
            )
            self.task = self.bar.add_task("starting", total=self.total)
            self.bar.start()

    def __call__(self) -> None:
        for line in self.tail.read():
            self._take(line)
        if self.bar is not None and self.task is not None:
            self.bar.update(
                self.task, total=self.total, completed=self.step,
                description=self.text or "starting",
            )  # fmt: skip
        elif self.text != self.printed and time.monotonic() - self.last_plain > PLAIN_SECONDS:
            self.last_plain, self.printed = time.monotonic(), self.text
            self.console.print(f"  {self.text}", highlight=False)

    def close(self) -> None:
        """Take the bar away; what stays is printed by the summary."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _take(self, line: dict[str, float]) -> None:
        if "loss" in line:
            # What sft and dpo read is known once they have begun.
            self.total = self.total or runs.total_steps(self.plan)
        if "loss" in line and self.total:
            self.step = int(line["step"])
            self.step_seconds = [*self.step_seconds[-49:], line["seconds"]]
            left = (self.total - self.step) * sum(self.step_seconds) / len(self.step_seconds)
            rest = f"{clock(left)} left" if self.step < self.total else "saving"
            self.text = (
                f"step {self.step}/{self.total}  loss {line['loss']:.3f}  "
                f"{line['tokens_per_second']:,.0f} tokens/s  {rest}"
            )
        elif "doing" in line:
            left = (line["total"] - line["done"]) * line["seconds"] / max(line["done"], 1)
            self.text = f"{tokenized(line)}  {clock(left)} left"


def console() -> Console:
    """The console of a command: colours and bars on a terminal, plain text in a pipe."""
    return Console(soft_wrap=True, highlight=False)


def watching(
    plan: Plan, screen: Console
) -> tuple[Callable[[RunFolder, int], Callable[[], None]], Callable[[], None]]:
    """A watcher to hand to the launcher, and what closes it."""
    open_watchers: list[Watcher] = []

    def watch(folder: RunFolder, attempt: int) -> Callable[[], None]:
        open_watchers.append(Watcher(plan, folder, attempt, screen))
        return open_watchers[-1]

    def close() -> None:
        for watcher in open_watchers:
            watcher.close()

    return watch, close


def summary(plan: Plan, screen: Console) -> None:
    """What a finished stage made, from its run folder."""
    result = runs.result_of(plan.folder)
    assert result is not None, plan.run
    if plan.stage == "preprocess":
        sources = ", ".join(f"{s['name']} {s['tokens']:,}" for s in result["sources"])
        screen.print(
            f"  {result['tokens']:,} tokens ({sources}), {result['vocabulary_size']:,} pieces"
        )
    elif isinstance(plan, ConvertPlan):
        screen.print(
            f"  {plan.model.parameters / 1e6:,.1f} M parameters from {shown(result['hf'])}"
        )
    elif plan.bench is not None:
        print_bench(runs.read_json(plan.folder.bench), plan.folder, screen)
    elif isinstance(plan, TrainingPlan):
        _training_summary(plan, result, screen)
        print_report(plan.folder, screen, write=True)
    elif isinstance(plan, EvaluationPlan):
        screen.print(f"  model      {shown(result['hf'])}", markup=False)
        _print_scores(result["scores"], screen)
        screen.print(f"  scores     {shown(plan.folder.scores)}", markup=False)
    elif isinstance(plan, MergePlan):
        screen.print(f"  soup       {plan.recipe.merge_method} of {len(plan.folders)} models")
        screen.print(f"  model      [bold]{shown(result['hf'])}[/]")
    elif isinstance(plan, ExportPlan):
        screen.print(f"  model      [bold]{shown(result['hf'])}[/]")
        if result["sample"]:
            text = " ".join(result["sample"].split())
            screen.print("  sample     ", end="")
            screen.print(text, markup=False)


def _print_scores(scores: list[dict[str, Any]], screen: Console) -> None:
    """Scores as `task  metric (filter)  0.4375 ± 0.0221`."""
    width = max(len(one["task"]) for one in scores) + 2
    for one in scores:
        filter_ = "" if one["filter"] == "none" else f" ({one['filter']})"
        error = "" if one["stderr"] is None else f" ± {one['stderr']:.4f}"
        screen.print(f"  {one['task']:<{width}}{one['metric']}{filter_}  {one['value']:.4f}{error}",
                     markup=False)  # fmt: skip


def _training_summary(plan: TrainingPlan, result: dict[str, Any], screen: Console) -> None:
    first, last = result["loss"]
    steps = runs.curve(plan.folder.metrics, "tokens")
    rates = runs.curve(plan.folder.metrics, "tokens_per_second")
    # Steady state: the first steps warm up.
    steady = sorted(rates[step] for step in list(rates)[min(5, len(rates) - 1) :])
    laid_out = runs.read_json(plan.folder.examples) or {}
    epochs = f", {laid_out['epochs']:,.3g} epochs" if "epochs" in laid_out else ""
    screen.print(f"  loss       {first:.3f} → [bold]{last:.3f}[/]   ({result['iteration']} steps, "
                 f"{int(max(steps.values())):,} tokens{epochs})")  # fmt: skip
    for name, (before, after) in result["held_out"].items():
        if name in HELD_OUT:
            screen.print(f"  {HELD_OUT[name]:<10} {before:.3f} → [bold]{after:.3f}[/]")
    if laid_out:
        print_sets(laid_out["sets"], screen)
    if steady:
        screen.print(f"  speed      {steady[len(steady) // 2]:,.0f} tokens/s (median step)")
    screen.print(f"  checkpoint {shown(plan.folder.checkpoint(int(result['iteration'])))}")


def print_report(folder: RunFolder, screen: Console, *, write: bool) -> None:
    """A small curve of the loss, and where the page about a run is or how it is made.

    Args:
        write: make the page now, if that takes no longer than a second or so. A page that cannot be
            written is no failure of the run.
    """
    from tanren.report import page

    print_loss(folder, screen)
    command = f"make report RUN={folder.root.parent.name}/{folder.root.name}"
    if write and page.cheap(folder):
        try:
            screen.print(f"  report     {shown(page.write([folder]))}", markup=False)
        except TanrenError as error:
            screen.print(f"  report     not made: {error.problem}   ({command})", markup=False)
    elif folder.report.exists():
        screen.print(f"  report     {shown(folder.report)}   ({command}: anew)", markup=False)
    else:
        screen.print(f"  report     {command}", markup=False)


def print_status(rows: list[Row], root: Path, screen: Console) -> None:
    """A table of runs, and the curve of the one that trained last."""
    if not rows:
        screen.print("no runs yet")
        return
    titles = ("run", "state", "job", "step", "loss", "tokens/s", "left", "last line of the log")
    cells = [
        (
            row.run, row.state, row.job, f"{row.step}/{row.steps}" if row.steps else "",
            f"{row.loss:.3f}" if row.loss is not None else "",
            f"{row.rate:,.0f}" if row.rate else "",
            clock(row.left) if row.left is not None else "", row.last,
        )
        for row in rows
    ]  # fmt: skip
    widths = [
        max(len(row[column]) for row in (titles, *cells)) for column in range(len(titles) - 1)
    ]
    for number, row in enumerate([titles, *cells]):
        line = "  ".join(
            [*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]
        )
        # Whole lines in a pipe; what does not fit a terminal is the log, which is at the end.
        shown_line = line[: screen.width] if screen.is_terminal else line
        screen.print(shown_line.rstrip(), style=None if number else "bold", markup=False)
    # A bench's losses are of random tokens.
    benches = [row for row in rows if Path(row.run).name.startswith("bench.")]
    trained = [row for row in rows if row.loss is not None and row not in benches]
    if trained:
        newest = max(trained, key=lambda row: RunFolder(root / row.run).metrics.stat().st_mtime)
        screen.print(f"the loss of {newest.run}", style="bold", markup=False)
        print_report(RunFolder(root / newest.run), screen, write=False)


@contextmanager
def working(screen: Console) -> Iterator[Callable[[str], None]]:
    """A line that says what a long piece of work is at: a spinner, or plain lines in a pipe."""
    began, last = time.monotonic(), ""
    if screen.is_terminal:
        with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(),
                      console=screen, transient=True) as bar:  # fmt: skip
            task = bar.add_task("starting", total=None)
            yield lambda doing: bar.update(task, description=doing)
        return

    def report(doing: str) -> None:
        nonlocal last
        if doing != last:
            last = doing
            screen.print(f"  {clock(time.monotonic() - began):>5}  {doing}")

    yield report


@contextmanager
def fetching(screen: Console) -> Iterator[Report]:
    """How far a fetch is: a bar on a terminal, a line now and then elsewhere."""
    if screen.is_terminal:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24),
                   DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())  # fmt: skip
        with Progress(*columns, console=screen, transient=True) as bar:
            task = bar.add_task("", total=None)
            yield lambda now: bar.update(
                task, description=_fetched(now), completed=now.bytes, total=now.total_bytes or None
            )
        return
    last = time.monotonic()

    def report(now: Fetching) -> None:
        nonlocal last
        if time.monotonic() - last > PLAIN_SECONDS:
            last = time.monotonic()
            sizes = f", {now.bytes / 2**30:,.2f} of {now.total_bytes / 2**30:,.2f} GiB"
            screen.print(f"  {_fetched(now)}{sizes if now.total_bytes else ''}", markup=False)

    yield report


def _fetched(now: Fetching) -> str:
    return f"{now.doing} ({now.files}/{now.total_files} files)" if now.total_files else now.doing


def print_image(
    path: Path, lock: Lock, screen: Console, labels: dict[str, str] | None = None
) -> None:
    """An image's facts, as `make build-image` and `make image-info` end with them."""
    base = lock.base.name + (f" {lock.base.digest}" if lock.base.digest else "")
    changed = " with changes" if lock.commit.dirty else ""
    engine = (
        "torch",
        "transformer-engine",
        "megatron-core",
        "transformers",
        "nemo-toolkit",
        "mergekit",
    )
    rows = [
        ("image", f"{shown(path)}   {lock.bytes / 2**20:,.0f} MiB"),
        ("sha256", lock.sha256),
        ("base", base),
        (
            "definition",
            lock.definition[:12] + f" of commit {(lock.commit.id or 'unknown')[:12]}{changed}",
        ),
        ("packages", f"{len(lock.python)} of Python, {len(lock.system)} of the system"),
        (
            "engine",
            ", ".join(f"{name} {lock.python[name]}" for name in engine if name in lock.python),
        ),
        ("built", f"{lock.built} in {clock(lock.seconds)} with {lock.builder}"),
    ]
    rows += (
        [("labels", ", ".join(f"{key} {value}" for key, value in labels.items()))] if labels else []
    )
    for name, value in rows:
        screen.print(f"  {name:<10} {value}", markup=False)


def print_error(text: str) -> None:
    """An error, to stderr, never a traceback."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(
        f"tanren: {text}", markup=False, style="red" if sys.stderr.isatty() else None
    )
