"""Run folders as trainings leave them, made in milliseconds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import orjson

from tanren import runs
from tanren.launch import reading
from tanren.launch.orders import Order
from tanren.plan.bench import Bench
from tanren.plan.make import make_plan
from tanren.plan.paths import RunFolder
from tests.conftest import RECIPES

BEGAN = 1_790_000_000.0


def stamp(seconds: float) -> str:
    """As a passport has it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S+0000", time.gmtime(BEGAN + seconds))


def make_run(
    root: Path, name: str = "sft", *, stage: str = "sft", steps: int = 120,
    starts: tuple[int, ...] = (1,), done: bool = True, **metrics: Any,
) -> RunFolder:  # fmt: skip
    """A run of a second a step; each attempt but the first begins at its step of `starts`.

    Args:
        metrics: more of each step's.
    """
    # What a bench stands on is made up, so that its plan needs no other run.
    order = Order(RECIPES / f"{stage}.yaml", None, None, site="local", bench=Bench())
    folder = RunFolder(root / "tiny" / name)
    planned = make_plan(reading.read_request(order)).model_copy(
        update={"bench": None, "run": str(folder.root)}
    )
    folder.log(1).parent.mkdir(parents=True)
    plan = orjson.loads(planned.model_dump_json())
    runs.write_json(folder.plan, plan)
    ends = [*(start - 1 for start in starts[1:]), steps]
    attempts = []
    with folder.metrics.open("wb") as file:
        for number, (start, end) in enumerate(zip(starts, ends, strict=True), 1):
            for step in range(start, end + 1):
                line = {
                    "step": step, "loss": 5.0 - 2.0 * step / steps, "lr": 1e-3, "grad_norm": 1.0,
                    "tokens": 1000 * step, "seconds": 1.0, "tokens_per_second": 1000.0, **metrics,
                    "attempt": number, "time": BEGAN + 100 * number + step,
                }  # fmt: skip
                file.write(orjson.dumps(line) + b"\n")
            entry = {"attempt": number, "started": stamp(100 * number + start), "host": "node1",
                     "commit": {"id": "0123abcd", "dirty": False}, "plan": plan}  # fmt: skip
            if done or number < len(starts):
                entry |= {"ended": stamp(100 * number + end), "ending": "done"}
            attempts.append(entry)
    runs.write_json(folder.passport, {"format": 1, "attempts": attempts})
    if done:
        runs.mark_done(folder, {"identity": "1", "iteration": steps, "device": "cpu"})
    return folder
