"""What a run folder says of a run, read for its page. Nothing in the folder is changed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from tanren import runs
from tanren.config.errors import RequestError, TanrenError
from tanren.config.load import read_site
from tanren.launch import clusters
from tanren.launch.clusters import GOING
from tanren.launch.orders import shown
from tanren.plan.cost import peak_tflops
from tanren.plan.paths import RunFolder
from tanren.plan.plan import Plan, TrainingPlan, read_plan
from tanren.report.thin import Curve


@dataclass(frozen=True)
class Attempt:
    """One start of a run, with the steps that count as its own. Without steps both are None."""

    number: int
    first: int | None
    last: int | None
    started: str
    ended: str
    ending: str
    host: str
    seconds: float
    nodes: int

    @property
    def node_hours(self) -> float:
        return self.seconds * self.nodes / 3600


@dataclass(frozen=True)
class Clock:
    """Tokens read and hours of training by step; what lies between two attempts counts for none."""

    steps: list[int]
    tokens: list[float]
    hours: list[float]


@dataclass(frozen=True)
class Record:
    """A run as its folder shows it now."""

    folder: RunFolder
    plan: Plan
    state: str
    passport: Mapping[str, Any]
    result: Mapping[str, Any] | None
    curves: Mapping[str, Curve]
    clock: Clock
    attempts: tuple[Attempt, ...]
    total_steps: int | None
    # An hour of one node on the run's site; None where it is not known, and why.
    points_per_hour: float | None
    points_note: str
    gpu: str | None

    @property
    def name(self) -> str:
        """`tiny/midtrain`."""
        return f"{self.folder.root.parent.name}/{self.folder.root.name}"

    @property
    def trains(self) -> bool:
        return isinstance(self.plan, TrainingPlan)

    @property
    def going(self) -> bool:
        return self.state in GOING

    @property
    def node_hours(self) -> float:
        return sum(attempt.node_hours for attempt in self.attempts)

    @property
    def points(self) -> float | None:
        rate = self.points_per_hour
        return None if rate is None else rate * self.node_hours

    @property
    def peak_tflops(self) -> float | None:
        """Of one GPU, in the run's number format; None where the GPU is not known."""
        if self.gpu is None or not isinstance(self.plan, TrainingPlan):
            return None
        return peak_tflops(self.gpu, self.plan.recipe.fp8)


def read(folder: RunFolder) -> Record:
    """Read a run folder, of a run that goes on or has ended.

    Raises:
        RequestError: it has not begun, has no passport, or is of another version.
    """
    here = shown(folder.root)
    if not folder.plan.exists():
        raise RequestError(here, "has not begun: it has no plan.json yet", "make status")
    passport = runs.read_json(folder.passport)
    if passport is None:
        raise RequestError(
            here, "has no passport.json, so that nobody can say what it was made from",
            "bring the whole run folder; of a run without one only metrics.jsonl can be read",
        )  # fmt: skip
    entries = passport.get("attempts") if isinstance(passport, dict) else None
    if not isinstance(entries, list) or not all(isinstance(one, dict) for one in entries):
        raise RequestError(
            folder.passport, "was written by another version of tanren",
            "check out the version that wrote it, and make the report there",
        )  # fmt: skip
    try:
        plan = read_plan(folder.plan)
    except RequestError as error:
        commit = _commit(entries)
        raise RequestError(
            error.place, error.problem,
            "make the report with the version that the run was made with: "
            f"git worktree add ../tanren-then {commit}, and there make report"
            if commit else "make the report with the version that the run was made with",
        ) from None  # fmt: skip
    lines = runs.read_lines(folder.metrics)
    state, _ = clusters.state_of(folder)
    rate, note, gpu = _site(folder)
    result = runs.result_of(folder)
    device = (result or {}).get("device")
    return Record(
        folder=folder, plan=plan, state=state, passport=passport, result=result,
        curves=curves_of(lines), clock=_clock(lines),
        attempts=_attempts(entries, lines, going=state == "running"),
        total_steps=runs.total_steps(plan), points_per_hour=rate, points_note=note,
        gpu=device if device not in (None, "cpu") else gpu,
    )  # fmt: skip


def curves_of(lines: list[dict[str, Any]]) -> dict[str, Curve]:
    """Every metric by step. Steps that were run again after a resume count once, the last time."""
    found: dict[str, dict[int, float]] = {}
    for line in lines:
        step = line.get("step")
        if not isinstance(step, int):
            continue
        for key, value in line.items():
            if key not in ("step", "attempt", "time") and isinstance(value, int | float):
                found.setdefault(key, {})[step] = value
    curves = {}
    for key, by_step in found.items():
        steps = sorted(by_step)
        curves[key] = Curve(steps, [by_step[step] for step in steps])
    return curves


def _commit(entries: list[dict[str, Any]]) -> str | None:
    commit = entries[-1].get("commit") if entries else None
    return commit.get("id") if isinstance(commit, dict) else None


def _clock(lines: list[dict[str, Any]]) -> Clock:
    by_step: dict[int, tuple[float, float]] = {}
    elapsed, before = 0.0, None
    for line in lines:
        if "loss" not in line or "time" not in line:
            continue
        now = (line.get("attempt"), line["time"])
        gap = now[1] - before[1] if before and before[0] == now[0] else line.get("seconds", 0.0)
        elapsed, before = elapsed + max(gap, 0.0), now
        by_step[line["step"]] = (line.get("tokens", 0), elapsed / 3600)
    steps = sorted(by_step)
    return Clock(steps, [by_step[s][0] for s in steps], [by_step[s][1] for s in steps])


def _attempts(
    entries: list[dict[str, Any]], lines: list[dict[str, Any]], *, going: bool
) -> tuple[Attempt, ...]:
    reached: dict[int, list[int]] = {}
    last_seen: dict[int, float] = {}
    for line in lines:
        number = line.get("attempt")
        if not isinstance(number, int):
            continue
        last_seen[number] = line.get("time", 0.0)
        if "loss" in line:
            span = reached.setdefault(number, [line["step"], line["step"]])
            span[1] = line["step"]
    found: list[Attempt] = []
    for entry in entries:
        number = int(entry.get("attempt", len(found) + 1))
        begin, end = _seconds(entry.get("started")), _seconds(entry.get("ended"))
        newest = entry is entries[-1]
        if end is None:
            # It goes on, or was killed: then its last word is the last that is known of it.
            end = time.time() if going and newest else last_seen.get(number)
        first, last = reached.get(number, (None, None))
        ending = entry.get("ending")
        if not ending:
            ending = "goes on" if going and newest else "ended without a word"
        found.append(
            Attempt(
                number=number,
                first=first,
                last=last,
                started=str(entry.get("started", "")),
                ended=str(entry.get("ended", "")),
                ending=str(ending),
                host=str(entry.get("host", "")),
                seconds=max(end - begin, 0.0) if begin is not None and end is not None else 0.0,
                nodes=_nodes(entry),
            )
        )
    return tuple(found)


def _nodes(entry: Mapping[str, Any]) -> int:
    plan = entry.get("plan")
    launch = plan.get("launch") if isinstance(plan, dict) else None
    return int(launch.get("nodes", 1)) if isinstance(launch, dict) else 1


def _seconds(stamp: object) -> float | None:
    """Seconds since 1970 of `2026-11-21T23:16:46+0900`."""
    try:
        return datetime.strptime(str(stamp), "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except ValueError:
        return None


def _site(folder: RunFolder) -> tuple[float | None, str, str | None]:
    """Points of a node's hour, a word on them, and the GPU, from the site's file of today."""
    order = runs.read_json(folder.order)
    if not isinstance(order, dict) or "site" not in order:
        return None, "", None
    try:
        site = read_site(order["site"])
        kind = site.types[order["type"]]
    except (TanrenError, KeyError):
        return None, f"the site {order['site']} is not known here", None
    gpu = site.gpu.name if site.gpu and kind.gpus else None
    where = f"{order['type']} on {order['site']}"
    if kind.points_per_hour is None:
        return None, f"the site's file states no points ({where})", gpu
    return kind.points_per_hour, f"{kind.points_per_hour:g} an hour of a node, {where}", gpu
