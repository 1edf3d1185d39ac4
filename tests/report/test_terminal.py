"""What a person reads while a stage runs."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from rich.console import Console

from tanren import runs
from tanren.data.fetch import Progress
from tanren.launch.clusters import Row
from tanren.launch.preview import Preview
from tanren.plan.make import make_plan
from tanren.plan.paths import RunFolder
from tanren.report import terminal
from tanren.report.plan import print_plan
from tests.plan.test_plan import midtrain, request


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.4, "0:00"), (42.9, "0:42"), (725, "12:05"), (11_400, "3:10:00")]
)
def test_clock(seconds: float, shown: str) -> None:
    assert terminal.clock(seconds) == shown


def test_tail_gives_whole_lines_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = terminal.Tail(path)
    assert tail.read() == []
    path.write_bytes(b'{"step": 1}\n{"step"')
    assert tail.read() == [{"step": 1}]
    with path.open("ab") as file:
        file.write(b': 2}\n{"step": 3}\n')
    assert tail.read() == [{"step": 2}, {"step": 3}]
    assert tail.read() == []
    assert terminal.Tail(path).read() == []


def test_status_draws_the_training_not_the_bench_behind_it(tmp_path: Path) -> None:
    rows = []
    for run in ("tiny/midtrain", "tiny/bench.midtrain"):
        folder = RunFolder(tmp_path / run)
        folder.root.mkdir(parents=True)
        folder.metrics.write_bytes(b'{"step": 1, "loss": 5.0, "seconds": 1.0}\n' * 2)
        rows.append(Row(run, "done", loss=5.0))
    os.utime(RunFolder(tmp_path / "tiny/midtrain").metrics, (1, 1))
    screen = io.StringIO()
    terminal.print_status(rows, tmp_path, Console(file=screen, width=80))
    assert "the loss of tiny/midtrain\n" in screen.getvalue()


def step(number: int, seconds: float = 0.5) -> dict[str, float]:
    return {"step": number, "loss": 5.4321, "seconds": seconds, "tokens_per_second": 12_345.6}


def watch(tmp_path: Path, *, is_terminal: bool) -> tuple[terminal.Watcher, io.StringIO]:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=is_terminal, width=80, soft_wrap=True)
    return terminal.Watcher(midtrain(), RunFolder(tmp_path), 2, console), screen


def test_a_pipe_gets_a_line_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    watcher, screen = watch(tmp_path, is_terminal=False)
    path = RunFolder(tmp_path).metrics
    runs.append_line(path, step(20))
    watcher()
    now += 11
    watcher()
    watcher()
    now += 11
    watcher()
    runs.append_line(path, step(320))
    watcher()
    watcher.close()
    header, *lines = screen.getvalue().splitlines()
    assert header.endswith("log 2.log")
    assert lines == [
        "  step 20/320  loss 5.432  12,346 tokens/s  2:30 left",
        "  step 320/320  loss 5.432  12,346 tokens/s  saving",
    ]


def test_a_terminal_gets_a_bar_that_fits(tmp_path: Path) -> None:
    watcher, screen = watch(tmp_path, is_terminal=True)
    runs.append_line(RunFolder(tmp_path).metrics, step(160))
    watcher()
    assert watcher.bar is not None
    watcher.bar.refresh()
    watcher.close()
    assert "step 160/320  loss 5.432  12,346 tokens/s  1:20 left" in screen.getvalue()


def test_a_fetch_in_a_pipe_says_now_and_then_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(terminal, "PLAIN_SECONDS", -1.0)
    text = io.StringIO()
    with terminal.fetching(Console(file=text, soft_wrap=True)) as report:
        report(Progress("asking the hub"))
        report(Progress("fetching o/a", files=2, total_files=5, bytes=2**29, total_bytes=3 * 2**30))
    assert text.getvalue().splitlines() == [
        "  asking the hub",
        "  fetching o/a (2/5 files), 0.50 of 3.00 GiB",
    ]


def test_a_fetch_on_a_terminal_has_a_bar() -> None:
    text = io.StringIO()
    with terminal.fetching(Console(file=text, force_terminal=True, width=160)) as report:
        report(Progress("asking the hub"))
        report(Progress("fetching o/a", files=2, total_files=5, bytes=2**20, total_bytes=2**22))
    assert "fetching o/a (2/5 files)" in text.getvalue()
    assert "1.0/4.2 MB" in text.getvalue()


@pytest.mark.parametrize(
    ("checkpoints", "rhythm", "kept"),
    [
        ("{every_steps: 80}", "every 80 steps, the newest 2 stay", 2),
        (
            "{every_steps: 1, every_minutes: 30, keep_last: 1, keep_every: 100}",
            "every 1 step or 30 minutes, the newest 1 stay, and those at multiples of 100 steps",
            4,
        ),
    ],
)
def test_a_plan_says_when_checkpoints_come_and_what_they_take(
    checkpoints: str, rhythm: str, kept: int
) -> None:
    found = rows("midtrain", "steps=300", f"checkpoints={checkpoints}")
    assert f"checkpoints {rhythm}" in found
    assert [row for row in found if f": {kept} checkpoints and one being written" in row]


def rows(stage: str, *sets: str) -> list[str]:
    """The lines of a plan, with one space between name and value."""
    text = io.StringIO()
    plan = make_plan(request(stage, *sets))
    print_plan(Preview(plan), Console(file=text, soft_wrap=True))
    return [" ".join(line.split()) for line in text.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("schedule", "shown"),
    [
        ("{style: WSD}", "0.003 → 0, WSD, minus_sqrt over the last 120, warm-up 10"),
        ("{style: cosine, decay_style: null, decay_steps: null}", "0.003 → 0, cosine, warm-up 10"),
        ("{style: cosine, decay_style: null, decay_steps: 200}",
         "0.003 → 0, cosine over 200 steps, warm-up 10"),
        ("{style: constant, decay_style: null, decay_steps: null}", "0.003, constant, warm-up 10"),
    ],
)  # fmt: skip
def test_a_schedule_reads_as_it_moves(schedule: str, shown: str) -> None:
    assert f"learning rate {shown}" in rows("midtrain", f"schedule={schedule}")


def test_what_sources_share_is_said_once() -> None:
    sources = [
        '{name: a, hf: o/c@v1, files: ["a/*"]}', "{name: own, path: /text/*.jsonl}",
        '{name: b, hf: o/c@v1, files: ["b/*", "c/*"]}', '{name: d, hf: o/c@v1, files: ["d/*"]}',
        '{name: e, hf: o/e@v1, files: ["e/*"]}',
    ]  # fmt: skip
    shown = rows("preprocess", f"sources=[{', '.join(sources)}]", "prepend_bos=true")
    assert shown[3:] == [
        "tokenizer trained, 2,048 pieces",
        "documents beginning of sequence added, end added",
        "from hf:o/c@v1",
        "source a a/*",
        "source own /text/*.jsonl",
        "from hf:o/c@v1",
        "source b b/* c/*",
        "source d d/*",
        "source e hf:o/e@v1 e/*",
        "processes 1 on this machine (cpu)",
    ]
