"""Weights & Biases: a copy of metrics.jsonl, line by line, made by a process that nobody waits for.

metrics.jsonl is the record. A line of it is one step of the run over there, so that the number of
steps which that run has says where to go on: after a crash, a resume, or a day without a network.
Training only starts the process (`python -m tanren.tracking RUN`) and closes its standard input at
the end; `make wandb-sync` does the same work from a login node. Keys are taken from the environment
or from ~/.netrc, and stand in no file here.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import netrc
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import orjson

from tanren import runs
from tanren.config.errors import RequestError, TanrenError, WorkError
from tanren.config.training import Wandb
from tanren.plan.paths import RunFolder
from tanren.plan.plan import TrainingPlan, read_plan

logger = logging.getLogger("tanren")
KEY, PROJECT, ENTITY, MODE = "WANDB_API_KEY", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_MODE"
# Between two looks at the metrics, and what the end of a training grants the last lines.
POLL_SECONDS, GRACE_SECONDS = 2.0, 10.0


def key_of_this_machine() -> str | None:
    """The key in the environment, else in ~/.netrc (or $NETRC); None where there is none."""
    stated = os.environ.get(KEY)
    if stated:
        return stated
    host = urlparse(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        found = netrc.netrc(path).authenticators(host or "")
    except (OSError, netrc.NetrcParseError):
        return None
    return (found[2] or None) if found else None


@dataclass(frozen=True)
class Target:
    """The run over there that belongs to a run folder."""

    id: str
    project: str
    entity: str | None
    name: str
    group: str
    job_type: str
    config: Mapping[str, Any]


def target_of(folder: RunFolder) -> Target:
    """Where a run folder's metrics go. Every attempt of a run goes to the same.

    Raises:
        RequestError: the run trains nothing, or has not begun.
    """
    plan, passport = read_plan(folder.plan), runs.read_json(folder.passport) or {}
    if not isinstance(plan, TrainingPlan):
        raise RequestError(folder.root, f"is a {plan.stage} run, which has no curves",
                           "name a run of midtrain, sft or dpo")  # fmt: skip
    attempts = passport.get("attempts") or [{}]
    # The folder's name, and when it began: a run that was removed and begun anew is another.
    name = f"{folder.root.parent.name}/{folder.root.name}"
    began = f"{attempts[0].get('started')} {attempts[0].get('host')}"
    stated = plan.recipe.tracking.wandb or Wandb()
    last = {key: value for key, value in attempts[-1].items() if key != "plan"}
    return Target(
        id=hashlib.sha256(f"{name} {began}".encode()).hexdigest()[:16],
        project=stated.project or os.environ.get(PROJECT) or "tanren",
        entity=stated.entity or os.environ.get(ENTITY),
        name=name, group=plan.task, job_type=plan.stage,
        config={"plan": orjson.loads(plan.model_dump_json()), "passport": last},
    )  # fmt: skip


@dataclass(frozen=True)
class Sent:
    """What a copy came to: lines that were sent now, lines that are there, and where."""

    lines: int
    there: int
    url: str


def sync(folder: RunFolder) -> Sent:
    """Send what is not there yet, and wait until it is.

    Raises:
        RequestError: there is no key, no wandb, or another process is at it.
        WorkError: Weights & Biases cannot be reached, or does not take the key.
    """
    if key_of_this_machine() is None:
        raise RequestError(
            KEY, "is not set, and ~/.netrc has no key of Weights & Biases",
            f"export {KEY}=... (or wandb login), and the same command again",
        )  # fmt: skip
    if importlib.util.find_spec("wandb") is None:
        raise RequestError(
            "wandb", "is not installed in this Python",
            f"{sys.executable} -m pip install -c containers/locks/native.txt wandb",
        )  # fmt: skip
    target = target_of(folder)
    known = runs.read_json(folder.wandb) or {}
    if known.get("id") == target.id and known["lines"] == len(runs.read_lines(folder.metrics)):
        return Sent(0, known["lines"], known["url"])
    try:
        return _copy(folder, target, lambda: False)
    except TanrenError:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WorkError(
            "wandb", f"did not take the metrics: {first}",
            f"check the key ({KEY}, ~/.netrc), the entity and the network, and run the same "
            "command again: it goes on where it stopped",
        ) from error  # fmt: skip


def _copy(folder: RunFolder, target: Target, more: Callable[[], bool]) -> Sent:
    """Copy the lines that are not there, while more may come.

    Args:
        more: waits a little; false when no more lines come.
    """
    with (
        runs.locked(folder.root / ".wandb", wait_seconds=5),
        tempfile.TemporaryDirectory(prefix="tanren-wandb-") as scratch,
    ):
        key = key_of_this_machine()
        if key is not None:
            os.environ[KEY] = key
        import wandb

        run = wandb.init(
            id=target.id, resume="allow", project=target.project, entity=target.entity,
            name=target.name, group=target.group, job_type=target.job_type,
            config=dict(target.config), dir=scratch, mode="online", save_code=False,
            settings=wandb.Settings(silent=True, console="off", disable_git=True),
        )  # fmt: skip
        # The attempts of a run and the lines that a save adds later are no rising series of steps.
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        there = before = int(run.step)
        tail = Lines(folder.metrics)
        seen = 0
        while True:
            coming = more()
            for line in tail.read():
                seen += 1
                if seen > there:
                    run.log(line)
                    there += 1
            if not coming:
                break
        run.finish()
        sent = Sent(there - before, there, str(run.url or ""))
        place = {"id": target.id, "project": target.project, "entity": target.entity,
                 "url": sent.url, "lines": there}  # fmt: skip
        runs.write_json(folder.wandb, place)
        return sent


class Lines:
    """The whole lines of a growing file, each once: those that `runs.read_lines` would give."""

    def __init__(self, path: Path) -> None:
        self.path, self.offset = path, 0

    def read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self.offset)
            block = file.read()
        end = block.rfind(b"\n") + 1
        self.offset += end
        return runs.json_lines(block[:end])


class Follower:
    """The process that copies the metrics of a training, as the training sees it."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process: subprocess.Popen[bytes] | None = process
        self._log = log

    def look(self) -> None:
        """Say once when it is gone."""
        if self._process is not None and self._process.poll() is not None:
            _warn(f"it ended with code {self._process.returncode} ({self._log})")
            self._process = None

    def end(self, seconds: float = GRACE_SECONDS) -> None:
        """No more lines come: give it a moment for the last ones, and end it."""
        self.look()
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            if process.wait(seconds):
                _warn(f"it ended with code {process.returncode} ({self._log})")
        except subprocess.TimeoutExpired:
            # Of a session of its own: what wandb has started goes as well.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            _warn(f"it had not sent everything {seconds:g} s after the end")


def _warn(problem: str) -> None:
    logger.warning("wandb is left out from here on: %s; make wandb-sync sends the rest", problem)


def follow(plan: TrainingPlan) -> Follower | None:
    """Start to copy a training's metrics, where there is a key; None where nothing is to be done.

    Never raises: a tracker's failure is the tracker's alone.
    """
    folder, mode = plan.folder, os.environ.get(MODE, "")
    wanted = plan.recipe.tracking.wandb is not None or PROJECT in os.environ
    if plan.bench is not None or mode == "disabled":
        return None
    key, offline = key_of_this_machine(), mode in ("offline", "dryrun")
    if key is None or offline:
        if wanted or offline:
            logger.info("wandb: %s; make wandb-sync RUN=%s/%s sends this run from where one is",
                        "no key here" if key is None else "offline is asked for",
                        folder.root.parent.name, folder.root.name)  # fmt: skip
        return None
    try:
        if importlib.util.find_spec("wandb") is None:
            _warn("there is a key, and wandb is not installed")
            return None
        with folder.wandb_log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tanren.tracking", str(folder.root)],
                stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT,
                # Schedulers and terminals signal whole groups, and the last lines come after that.
                start_new_session=True,
                env=os.environ | {KEY: key},
            )  # fmt: skip
    except Exception as error:
        _warn(str(error))
        return None
    return Follower(process, folder.wandb_log)


def main(arguments: list[str]) -> int:
    """Copy while the training lives: its end of the standard input is open as long."""
    folder = RunFolder(Path(arguments[0]))
    parent = os.getppid()
    over = threading.Event()

    def more() -> bool:
        until = time.monotonic() + POLL_SECONDS
        while time.monotonic() < until and not over.is_set():
            # Processes that the training forked hold the pipe, too.
            if os.getppid() != parent or select.select([0], [], [], 0.2)[0]:
                over.set()
        return not over.is_set()

    def watch() -> None:
        """Whatever wandb hangs in, nothing of it stays behind a training that is gone."""
        while os.getppid() == parent:
            time.sleep(1)
        over.set()
        time.sleep(2 * GRACE_SECONDS)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    _copy(folder, target_of(folder), more)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
