"""Shared pieces: a tanren command to call, and a preprocessed text with a converted base."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from tanren import runs
from tanren.plan.paths import RunFolder
from tests.data.fake_hub import Hub, serve

REPOSITORY = Path(__file__).resolve().parents[1]


def tracked(*patterns: str) -> list[str]:
    """Files that git knows, relative to the repository."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", *patterns],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [name for name in listed.stdout.split("\0") if name]


RECIPES = REPOSITORY / "recipes" / "tiny"
# A run of seconds: every test that trains uses these unless it says otherwise.
SHORT = (
    "steps=8", "sequence_length=64", "global_batch=8", "micro_batch=4", "schedule.warmup_steps=2",
    "schedule.decay_steps=4", "checkpoints.every_steps=3", "evaluation.sequences=16",
    "precision=fp32",
)  # fmt: skip

# Sixty conversations and eighty preferences, about the order of numbers.
CHATS = REPOSITORY / "tests" / "stages" / "chats"
# A little more than an epoch of each.
_SHORT_TUNING = (
    "steps=6", "schedule.warmup_steps=1", "checkpoints.every_steps=2", "checkpoints.keep_last=9",
    "evaluation.every_steps=3", "precision=fp32", "micro_batch=2",
)  # fmt: skip
SHORT_SFT = (
    *_SHORT_TUNING, f"datasets=[{{name: questions, path: {CHATS}/questions.jsonl}}]",
    "sequence_length=128", "global_batch=4", "schedule.constant_steps=1",
)  # fmt: skip
SHORT_DPO = (
    *_SHORT_TUNING, f"datasets=[{{name: answers, path: {CHATS}/answers.jsonl}}]",
    "sequence_length=96", "global_batch=15",
)  # fmt: skip


def pytest_xdist_auto_num_workers() -> int:
    """Three for two cores: a third of the time tests wait for processes that they started."""
    return max(1, len(os.sched_getaffinity(0)) * 3 // 2)


@dataclass
class Finished:
    """A command that ended."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err


@dataclass
class Tanren:
    """bin/tanren with its own runs folder."""

    runs: Path
    environment: dict[str, str] = field(default_factory=dict)

    def start(
        self, *words: str, sets: tuple[str, ...] = (), **options: object
    ) -> subprocess.Popen[str]:
        command = [str(REPOSITORY / "bin" / "tanren"), *words]
        for assignment in sets:
            command += ["--set", assignment]
        environment = os.environ | {
            "RUNS": str(self.runs), "TANREN_PYTHON": sys.executable, "OMP_NUM_THREADS": "1",
            # Whether an image lies about must not decide where a test runs.
            "CUDA_VISIBLE_DEVICES": "", "RUNTIME": "native",
            # Nor whether what is tested is committed yet.
            "ALLOW_DIRTY": "1",
            # Nor may a developer's key send tiny runs anywhere.
            "WANDB_MODE": "disabled", **self.environment,
        }  # fmt: skip
        return subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            **options,
        )  # fmt: skip

    def __call__(self, *words: str, sets: tuple[str, ...] = (), **options: object) -> Finished:
        process = self.start(*words, sets=sets, **options)
        out, err = process.communicate(timeout=240)
        return Finished(process.returncode, out, err)

    def midtrain(self, *words: str, sets: tuple[str, ...] = (), **options: object) -> Finished:
        return self(
            "midtrain", str(RECIPES / "midtrain.yaml"), *words, sets=(*SHORT, *sets), **options
        )

    def sft(self, *words: str, sets: tuple[str, ...] = ()) -> Finished:
        return self("sft", str(RECIPES / "sft.yaml"), *words, sets=(*SHORT_SFT, *sets))

    def dpo(self, *words: str, sets: tuple[str, ...] = ()) -> Finished:
        return self("dpo", str(RECIPES / "dpo.yaml"), *words, sets=(*SHORT_DPO, *sets))

    def folder(self, name: str = "midtrain") -> Path:
        return self.runs / "tiny" / name


def told_apart(module: str, folder: Path) -> dict[str, Any]:
    """What a module prints last, as JSON, in a process of its own: engine/cpu.py changes torch."""
    path = os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY)])
    done = subprocess.run(
        [sys.executable, "-m", module, str(folder)],
        env=os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def trainer_of(command: int) -> psutil.Process:
    """The one process that trains, of those that a command started."""
    family = psutil.Process(command).children(recursive=True)
    [trainer] = [one for one in family
                 if "tanren.stages" in one.cmdline() and one.name() != "tanren-writer"]  # fmt: skip
    return trainer


def wait_for(condition: Callable[[], bool], seconds: float = 180.0) -> None:
    """Wait until a condition holds; fail the test when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def end_group(process: subprocess.Popen[str]) -> None:
    """Kill a command and everything it started, as a power cut would."""
    family = psutil.Process(process.pid).children(recursive=True)
    for member in [*family, psutil.Process(process.pid)]:
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    process.communicate()


def _made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Tanren], None]) -> Path:
    """A runs folder that is made by the first test worker that asks for it."""
    root = factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        root = root.parent
    shared = root / name
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not shared.exists():
            partial = root / f"{name}.partial"
            make(Tanren(partial))
            # The base's path is written down in its result, so the folder keeps its place.
            shared.symlink_to(partial)
    return shared


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/ with preprocess and convert of the tiny recipe."""

    def make(tanren: Tanren) -> None:
        for stage in ("preprocess", "convert"):
            done = tanren(stage, str(RECIPES / f"{stage}.yaml"))
            assert done.code == 0, done.text

    return _made_once(tmp_path_factory, "prepared", make)


@pytest.fixture(scope="session")
def once_trained(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/ with a short training of one process besides, its checkpoints 3, 6 and 8 kept."""

    def make(tanren: Tanren) -> None:
        shutil.copytree(prepared / "tiny", tanren.runs / "tiny")
        done = tanren.midtrain(sets=("checkpoints.keep_last=9",))
        assert done.code == 0, done.text

    return _made_once(tmp_path_factory, "once-trained", make)


@pytest.fixture(scope="session")
def once_tuned(once_trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/ with a short sft of the short training besides, exported, and a short dpo of that.

    Each of one process, with its checkpoints 2, 4 and 6.
    """

    def make(tanren: Tanren) -> None:
        shutil.copytree(once_trained / "tiny", tanren.runs / "tiny", symlinks=True)
        for done in (tanren.sft("--then", "export"), tanren.dpo()):
            assert done.code == 0, done.text

    return _made_once(tmp_path_factory, "once-tuned", make)


@pytest.fixture
def tanren(prepared: Path, tmp_path: Path) -> Tanren:
    """A command whose runs folder already holds preprocess and convert."""
    shutil.copytree(prepared / "tiny", tmp_path / "runs" / "tiny")
    return Tanren(tmp_path / "runs")


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process and its commands ask instead of the real one, and an empty DATA."""
    from huggingface_hub import constants, file_download

    from tanren.data import fetch

    # Each test has a hub of its own, and repositories of the same names.
    fetch._list.cache_clear()
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "hf").mkdir()
    with serve() as served:
        for name, value in (
            ("HF_ENDPOINT", served.endpoint), ("HF_HOME", str(tmp_path / "hf")),
            ("HF_HUB_DISABLE_XET", "1"), ("NO_PROXY", "127.0.0.1"),
            ("DATA", str(tmp_path / "data")),
        ):  # fmt: skip
            monkeypatch.setenv(name, value)
        # The same for this process, where the library is there already.
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
        # It waits a second before it takes a broken download up again.
        monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda _: None))
        yield served


@pytest.fixture
def trained(once_trained: Path, tmp_path: Path) -> Tanren:
    """A command whose runs folder holds a short training as well; see `set_back`."""
    shutil.copytree(once_trained / "tiny", tmp_path / "runs" / "tiny")
    return Tanren(tmp_path / "runs")


def set_back(tanren: Tanren, iteration: int, run: str = "midtrain") -> RunFolder:
    """Leave of a training what a kill after this checkpoint leaves."""
    folder = RunFolder(tanren.folder(run))
    folder.done.unlink()
    for later in runs.iterations(folder):
        if later > iteration:
            shutil.rmtree(folder.checkpoint(later))
    return folder


@pytest.fixture
def bare(tmp_path: Path) -> Tanren:
    """A command with an empty runs folder."""
    return Tanren(tmp_path / "runs")
