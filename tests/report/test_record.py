"""What a run folder says, read for its page."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest

from tanren import runs
from tanren.config.errors import RequestError
from tanren.report import record
from tests.report.folders import make_run


def test_a_chain_is_one_curve_with_its_attempts(tmp_path: Path) -> None:
    folder = make_run(tmp_path, starts=(1, 41, 101))
    # A killed attempt got further than its checkpoint: those steps were run again.
    lines = folder.metrics.read_bytes().splitlines(keepends=True)
    lost = [orjson.loads(line) | {"attempt": 1, "step": 41 + n, "loss": 99.0}
            for n, line in enumerate(lines[:5])]  # fmt: skip
    folder.metrics.write_bytes(
        b"".join([*lines[:40], *(orjson.dumps(one) + b"\n" for one in lost), *lines[40:]])
    )
    read = record.read(folder)
    assert list(read.curves["loss"].steps) == list(range(1, 121))
    assert max(read.curves["loss"].values) < 5
    assert [(a.number, a.first, a.last) for a in read.attempts] == [
        (1, 1, 45), (2, 41, 100), (3, 101, 120),
    ]  # fmt: skip
    assert (read.state, read.going) == ("done", False)
    assert read.node_hours == pytest.approx((39 + 59 + 19) / 3600)
    assert read.points is None
    # What lies between two attempts is no training: 120 steps of a second, and those five again.
    assert read.clock.hours[-1] * 3600 == pytest.approx(125, abs=60)
    assert read.clock.tokens[-1] == 120_000


def test_points_are_the_sites(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    runs.write_json(folder.order, {"site": "abci3", "type": "rt_HF"})
    read = record.read(folder)
    assert read.points == pytest.approx(15 * 119 / 3600)
    assert (read.gpu, read.peak_tflops) == ("NVIDIA H200", 989.0)
    runs.write_json(folder.order, {"site": "nowhere", "type": "rt_HF"})
    assert record.read(folder).points is None
    assert "nowhere" in record.read(folder).points_note


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    with folder.metrics.open("ab") as file:
        file.write(b'{"step": 121, "loss": 2.')
    before = folder.metrics.read_bytes()
    assert len(record.read(folder).curves["loss"]) == 120
    assert folder.metrics.read_bytes() == before


def test_a_run_that_goes_on_is_said_to(tmp_path: Path) -> None:
    folder = make_run(tmp_path, done=False)
    with runs.locked(folder.lock):
        read = record.read(folder)
    assert read.going
    assert read.attempts[-1].ending == "goes on"
    left = record.read(folder)
    assert (left.going, left.attempts[-1].ending) == (False, "ended without a word")
    # It is known to have lived until its last line.
    assert left.node_hours == pytest.approx(119 / 3600)


def test_a_folder_that_cannot_be_read_is_one_message_with_a_next_step(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    passport, plan = folder.passport.read_bytes(), folder.plan.read_bytes()
    for name, content, problem, step in (
        (folder.passport, None, "no passport", "metrics.jsonl"),
        (folder.passport, b'{"format": 9, "entries": []}', "another version", "check out"),
        (folder.plan, None, "has not begun", "make status"),
        (folder.plan, plan.replace(b'"batch"', b'"heap"'), "another version", "0123abcd"),
    ):
        folder.passport.write_bytes(passport)
        folder.plan.write_bytes(plan)
        if content is None:
            name.unlink()
        else:
            name.write_bytes(content)
        with pytest.raises(RequestError) as caught:
            record.read(folder)
        assert problem in caught.value.problem, problem
        assert step in caught.value.next_step, step
