"""What a person sees while a stage runs and when it has ended. Plain lines where no terminal is."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
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
from tanren.config.schema import Preprocess, Source
from tanren.data.fetch import Progress as Fetching
from tanren.data.fetch import Report
from tanren.images.lock import Lock
from tanren.launch.clusters import Row
from tanren.launch.submit import shown
from tanren.plan.batch import Batch
from tanren.plan.cost import explained
from tanren.plan.paths import RunFolder
from tanren.plan.plan import ConvertPlan, ExportPlan, Launch, MidtrainPlan, Plan
from tanren.plan.site import Place
from tanren.report.mix import print_mix

PLAIN_SECONDS = 10.0


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
        values = []
        for line in block[:end].splitlines():
            try:
                values.append(orjson.loads(line))
            except orjson.JSONDecodeError:
                continue
        return values


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
        self.total = plan.batch.steps if isinstance(plan, MidtrainPlan) else None
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
            self.bar.update(self.task, completed=self.step, description=self.text or "starting")
        elif self.text != self.printed and time.monotonic() - self.last_plain > PLAIN_SECONDS:
            self.last_plain, self.printed = time.monotonic(), self.text
            self.console.print(f"  {self.text}", highlight=False)

    def close(self) -> None:
        """Take the bar away; what stays is printed by the summary."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _take(self, line: dict[str, float]) -> None:
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
    elif isinstance(plan, MidtrainPlan):
        _training_summary(plan, result, screen)
    elif isinstance(plan, ExportPlan):
        screen.print(f"  model      [bold]{shown(result['hf'])}[/]")
        if result["sample"]:
            text = " ".join(result["sample"].split())
            screen.print("  sample     ", end="")
            screen.print(text, markup=False)


def _training_summary(plan: MidtrainPlan, result: dict[str, Any], screen: Console) -> None:
    first, last = result["loss"]
    rates = runs.curve(plan.folder.metrics, "tokens_per_second")
    # Steady state: the first steps warm up.
    steady = sorted(rates[step] for step in list(rates)[min(5, len(rates) - 1) :])
    screen.print(f"  loss       {first:.3f} → [bold]{last:.3f}[/]   ({plan.batch.steps} steps, "
                 f"{plan.batch.tokens:,} tokens)")  # fmt: skip
    if result["held_out_loss"]:
        before, after = result["held_out_loss"]
        screen.print(f"  held out   {before:.3f} → [bold]{after:.3f}[/]")
    if steady:
        screen.print(f"  speed      {steady[len(steady) // 2]:,.0f} tokens/s (median step)")
    screen.print(f"  checkpoint {shown(plan.folder.checkpoint(int(result['iteration'])))}")


def print_plan(
    plan: Plan, state: str, place: Place | None, notes: list[str],
    scripts: list[tuple[str, str]], screen: Console, parts: int = 0,
) -> None:  # fmt: skip
    """The plan as a person reads it, and the scripts that would run.

    Args:
        parts: jobs that make its parts, besides the one that joins them.
    """
    variant = f" variant {plan.variant}" if plan.variant else ""
    rows = [
        ("run folder", shown(plan.run)),
        ("state", state),
        ("recipe", shown(plan.recipe_file) + variant),
    ]
    if isinstance(plan, MidtrainPlan):
        rows += _midtrain_rows(plan, plan.batch)
    elif isinstance(plan, ConvertPlan):
        rows.append(("base", plan.recipe.source))
        rows.append(("parameters", f"{plan.model.parameters:,}"))
    elif isinstance(plan, ExportPlan):
        rows.append(("checkpoint", f"{shown(plan.source)}, iteration {plan.iteration}"))
    else:
        rows += _preprocess_rows(plan.recipe)
    launch = plan.launch
    if place is None:
        rows.append(("processes", f"{launch.processes} on this machine ({launch.device})"))
    else:
        rows += _place_rows(place, launch, parts)
        hours = plan.hours[0] if isinstance(plan, MidtrainPlan) and plan.hours else 0.0
        trains = place.hours - place.save_seconds / 3600
        if hours > trains:
            longer = ", or more HOURS=" if place.hours < place.type.walltime_hours else ""
            rows.append(("too short", f"the run takes about {hours:.1f} hours: "
                         f"CHAIN={-(-hours // trains):.0f}{longer}"))  # fmt: skip
    rows += [("note", note) for note in notes]
    width = max(len(name) for name, _ in rows) + 2
    for name, value in rows:
        # Whole lines: a path that is cut cannot be copied.
        screen.print(f"{name:<{width}}{value}", markup=False)
    if isinstance(plan, MidtrainPlan) and plan.mix is not None:
        print_mix(plan.mix, plan.recipe, screen, by_glob=True)
    for title, script in scripts:
        screen.print(title, style="bold")
        screen.print(script.rstrip(), markup=False, style="dim")


def _preprocess_rows(recipe: Preprocess) -> list[tuple[str, str]]:
    """Tokenizer and sources; what several sources take from is said once, above them."""
    tokenizer = recipe.tokenizer
    trained = f"trained, {tokenizer.train.vocabulary_size:,} pieces" if tokenizer.train else ""
    rows = [
        ("tokenizer", f"hf:{tokenizer.hf}" if tokenizer.hf else tokenizer.path or trained),
        ("documents", f"beginning of sequence {'added' if recipe.prepend_bos else 'not added'}, "
         f"end {'added' if recipe.append_eod else 'not added'}"),
    ]  # fmt: skip
    shared = {hf for hf, times in Counter(s.hf for s in recipe.sources).items() if times > 1}
    above = None
    for source in recipe.sources:
        together = source.hf is not None and source.hf in shared
        if together and source.hf != above:
            rows.append(("from", f"hf:{source.hf}"))
        above = source.hf
        rows.append(
            (f"source {source.name}", " ".join(source.files) if together else _origin(source))
        )
    return rows


def _origin(source: Source) -> str:
    if source.hf is not None:
        return f"hf:{source.hf} {' '.join(source.files)}"
    return source.path or f"Python's {source.python_documentation}"


def _place_rows(place: Place, launch: Launch, parts: int) -> list[tuple[str, str]]:
    hours = _number(place.hours, "hour")
    jobs = parts + 1
    points = (
        f"; {_number(jobs * place.points, 'point')} for the whole time "
        f"({place.type.points_per_hour:g} a node and hour, the site's file)"
        if place.points is not None
        else ""
    )
    group = f", group {place.group}" if place.group else ""
    row = (
        "job",
        f"{place.nodes} x {place.type_name} on {place.title} for at most {hours}{group}",
    )
    if parts:
        row = (
            "jobs",
            f"{parts} + 1, each {row[1]}: {parts} make their parts of the shards, one joins them",
        )
    return [
        row,
        ("cost", f"{jobs * place.nodes * place.hours:,.1f} node-hours{points}"),
        ("processes", f"{launch.processes} on {_number(launch.nodes, 'node')} ({launch.device})"),
    ]


def _number(count: float, thing: str) -> str:
    """`1 hour`, `1.5 hours`, `28,800 points`."""
    return f"{count:,.10g} {thing}{'' if count == 1 else 's'}"


def print_status(rows: list[Row], screen: Console) -> None:
    """A table of runs."""
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


def _midtrain_rows(plan: MidtrainPlan, batch: Batch) -> list[tuple[str, str]]:
    recipe, layout, schedule = plan.recipe, plan.recipe.layout, plan.recipe.schedule
    fp8 = f", fp8 {recipe.fp8}" if recipe.fp8 != "none" else ""
    lr, min_lr = recipe.optimizer.lr, recipe.optimizer.min_lr
    decay = ""
    if schedule.decay_steps:
        decay = (
            f", {schedule.decay_style} over the last {schedule.decay_steps}"
            if schedule.style == "WSD"
            else f" over {schedule.decay_steps} steps"
        )
    operations = plan.model.flops_per_token(recipe.sequence_length) * batch.tokens
    rows = [
        ("starts from", plan.start),
        ("model", f"{recipe.model}: {plan.model.parameters:,} parameters, {plan.precision}{fp8}"),
        ("steps", f"{batch.steps:,} x {batch.tokens_per_step:,} tokens = {batch.tokens:,} tokens"),
        (
            "batch",
            f"{recipe.global_batch} = data parallel {batch.data_parallel} x micro batch "
            f"{batch.micro_batch} x accumulation {batch.accumulation}",
        ),
        (
            "layout",
            f"tensor {layout.tensor}, pipeline {layout.pipeline}, context {layout.context}, "
            f"data {batch.data_parallel}, recompute {layout.recompute}",
        ),
        (
            "learning rate",
            (f"{lr:g}" if schedule.style == "constant" else f"{lr:g} → {min_lr:g}")
            + f", {schedule.style}{decay}, warm-up {schedule.warmup_steps}",
        ),
        ("work", f"{operations:.3g} FLOP (causal half of attention counted once)"),
    ]
    if plan.memory is not None and plan.gpu_memory_gib is not None:
        rows.append(
            (
                "memory",
                f"{plan.memory.total:.0f} of {plan.gpu_memory_gib:.0f} GiB a GPU "
                f"({explained(plan.memory)})",
            )
        )
    keep = recipe.checkpoints.keep_last
    rows.append(
        (
            "disk",
            f"{(keep + 1) * plan.checkpoint_gib:,.2f} GiB: {keep} checkpoints and one being "
            f"written, {plan.checkpoint_gib:,.2f} each",
        )
    )
    if plan.hours is not None:
        hours, assumption = plan.hours
        rows.append(
            (
                "time",
                f"{hours:,.1f} hours {assumption}"
                if hours >= 10
                else f"{hours:.2g} hours {assumption}",
            )
        )
    if plan.data_start:
        rows.append(("data", f"the present mix begins at iteration {plan.data_start:,}"))
    rows += [("note", note) for note in plan.notes]
    if plan.mix is None:
        rows.append(("mix", "tokens and epochs are known once preprocess has run"))
    return rows


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
