"""Stands in for wandb: $FAKE_WANDB_SERVER is a folder with a file a run, $FAKE_WANDB what fails."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

_FAILS = os.environ.get("FAKE_WANDB", "")
if _FAILS == "import":
    raise ImportError("no wandb-core for this machine")


def _maybe(where: str) -> None:
    if f"raise in {where}" == _FAILS:
        raise RuntimeError(f"the server says no in {where}")
    if f"hang in {where}" == _FAILS:
        time.sleep(3600)


def Settings(**settings: Any) -> dict[str, Any]:  # noqa: N802
    return settings


class Run:
    url = "https://wandb.example/run"

    def __init__(self, id: str, **asked: Any) -> None:
        self.file = Path(os.environ["FAKE_WANDB_SERVER"]) / id
        self.pending: list[str] = []
        self.file.with_suffix(".asked").write_text(json.dumps(asked))

    @property
    def step(self) -> int:
        there = self.file.read_text().splitlines() if self.file.exists() else []
        return len(there) + len(self.pending)

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        pass

    def log(self, line: dict[str, Any]) -> None:
        _maybe("log")
        self.pending.append(json.dumps(line))

    def finish(self) -> None:
        _maybe("finish")
        with self.file.open("a") as file:
            file.writelines(f"{line}\n" for line in self.pending)
        self.pending = []


def init(**asked: Any) -> Run:
    _maybe("init")
    assert os.environ["WANDB_API_KEY"]
    assert Path(asked["dir"]).is_dir()
    return Run(**asked)
