"""A save that cannot end well ends with one message, and soon."""

from __future__ import annotations

import subprocess
import sys
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from torch.distributed.checkpoint.api import CheckpointException

from tanren.config.errors import WorkError
from tanren.engine import checkpoint
from tanren.engine.checkpoint import Saver
from tanren.plan.paths import RunFolder
from tests.conftest import wait_for


class Process:
    """A process as multiprocessing shows it."""

    def __init__(self, code: str) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", code])
        self.pid = self.process.pid

    def is_alive(self) -> bool:
        return self.process.poll() is None


def saver(tmp_path: Path, process: Any, *, persistent: bool) -> Saver:
    """A saver in the middle of iteration 5, its writer being this process."""
    made = Saver.__new__(Saver)
    made.folder, made.writing, made._idle_since = RunFolder(tmp_path), 5, None
    call = SimpleNamespace(async_caller=SimpleNamespace(process=process))
    queue = SimpleNamespace(
        async_calls=deque([call]), persistent=persistent,
        maybe_finalize_async_calls=lambda blocking: [],
    )  # fmt: skip
    made.queue = queue  # type: ignore[assignment]
    (tmp_path / "checkpoints" / "iter_0000005.partial").mkdir(parents=True)
    return made


def test_a_killed_writer_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parent waits for a word from it; nobody reaps it, so it stays a zombie."""
    parent = Process(
        "import os, time\npid = os.fork()\nos.kill(os.getpid(), 9) if pid == 0 else time.sleep(60)"
    )
    wait_for(
        lambda: any(
            child.status() == psutil.STATUS_ZOMBIE
            for child in psutil.Process(parent.pid).children()
        )
    )
    now = 100.0
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now)
    writing = saver(tmp_path, parent, persistent=False)
    writing.poll()
    now += 19
    writing.poll()
    now += 2
    with pytest.raises(WorkError) as failed:
        writing.poll()
    parent.process.kill()
    assert failed.value.place == str(tmp_path / "checkpoints" / "iter_0000005")
    assert "a writer process was killed (is the node out of memory?)" in failed.value.problem
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_dead_persistent_writer_is_noticed_at_once(tmp_path: Path) -> None:
    process = Process("")
    process.process.wait()
    with pytest.raises(WorkError, match="a writer process was killed"):
        saver(tmp_path, process, persistent=True).poll()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (RuntimeError("Worker failure: [Errno 122] Disk quota exceeded"), "Disk quota exceeded"),
        (RuntimeError("[enforce fail] . unexpected pos 704 vs 598"), "it is full, or over its"),
        (CheckpointException("write", {}), "another rank could not write its part"),
        (
            CheckpointException("write", {0: (OSError(28, "No space left on device"), None)}),  # type: ignore[dict-item]
            "No space left on device",
        ),
        (RuntimeError("first line\nthe reason\n"), "the reason"),
    ],
)
def test_the_reason_of_a_failed_save_is_said_plainly(
    tmp_path: Path, error: BaseException, reason: str
) -> None:
    writing = saver(tmp_path, None, persistent=False)
    (tmp_path / "checkpoints" / "iter_0000003").mkdir()
    with pytest.raises(WorkError) as failed, writing._errors(5):
        raise error
    assert reason in failed.value.problem
    assert "it goes on from iteration 3" in failed.value.next_step


def test_an_error_in_our_own_code_keeps_its_trace(tmp_path: Path) -> None:
    with pytest.raises(TypeError), saver(tmp_path, None, persistent=False)._errors(5):
        raise TypeError("ours")


def test_a_removed_checkpoint_never_lies_half_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    folder.checkpoint(5).mkdir(parents=True)
    seen = []
    monkeypatch.setattr(
        checkpoint.shutil, "rmtree", lambda path, **_: seen.append((path.name, path.exists()))
    )
    checkpoint._remove(folder.checkpoint(5))
    assert ("iter_0000005.old.partial", True) in seen
    assert not folder.checkpoint(5).exists()
