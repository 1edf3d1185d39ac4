"""The job script, and what happens to a job that is told to stop."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from threading import Event, Thread

import psutil
import pytest

from tanren import runs
from tanren.config.load import repository
from tanren.launch import local
from tanren.plan.paths import RunFolder
from tanren.plan.plan import Launch
from tests.conftest import wait_for

RUN = RunFolder(Path("/runs/with a space/midtrain"))


def test_the_whole_script_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("DATA", "/a disk/data")
    launch = Launch(engine=True, processes=2, device="cpu")
    command = f"exec {sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2"
    expected = f"""\
#!/usr/bin/env bash
# Attempt 3 of /runs/with a space/midtrain, written by tanren. Nothing here is to be edited.
set -euo pipefail
export PYTHONPATH={repository()}/src
export PYTHONNOUSERSITE=1
export PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=4
export TOKENIZERS_PARALLELISM=true
export DATA='/a disk/data'
export CUDA_VISIBLE_DEVICES=''
export TORCHDYNAMO_DISABLE=1
{command} -m tanren.stages '/runs/with a space/midtrain/plan.json' 3
"""
    assert local.script(RUN, launch, 3, 8) == expected
    stated = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "tanren0"}
    expected = expected.replace("OMP_NUM_THREADS=4", "OMP_NUM_THREADS=1")
    assert local.script(RUN, launch, 3, 8, stated=stated) == expected


def test_the_end_of_the_script_on_gpus_and_in_one_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{repository()}/src:/site")
    """One process of the engine needs no torchrun."""
    lines = local.script(RUN, Launch(engine=True, processes=1, device="cuda"), 1, 16).splitlines()
    assert lines[3] == f"export PYTHONPATH={repository()}/src:/site"
    assert lines[-2:] == [
        "export CUDA_DEVICE_MAX_CONNECTIONS=1",
        f"exec {sys.executable} -m tanren.stages '/runs/with a space/midtrain/plan.json' 1",
    ]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def job(folder: RunFolder, text: str) -> None:
    folder.job.write_text(f"set -eu\n{text}\n")


def run(folder: RunFolder, *signals: tuple[float, int]) -> object:
    """Run the job, and send signals to this process so many seconds after it listens to them."""
    before, over = signal.getsignal(signal.SIGINT), Event()

    def listens() -> bool:
        return signal.getsignal(signal.SIGINT) is not before

    def send() -> None:
        wait_for(listens)
        began = time.monotonic()
        for seconds, number in signals:
            time.sleep(max(began + seconds - time.monotonic(), 0))
            if listens() and not over.is_set():  # else it would end the tests
                signal.raise_signal(number)

    with runs.locked(folder.lock) as lock:
        if signals:
            Thread(target=send, daemon=True).start()
        try:
            return local.run(folder, folder.job, 1, lock, lambda: None)
        finally:
            over.set()


def test_a_job_that_leaves_its_mark_is_done(folder: RunFolder) -> None:
    runs.mark_stopped(folder, "SIGTERM", 3)
    job(folder, f"echo '{{}}' >{folder.done}")
    assert run(folder) is None
    assert not folder.stopped.exists()


def test_a_job_that_dies_shows_the_end_of_its_log(folder: RunFolder) -> None:
    job(folder, "for i in $(seq 20); do echo line $i; done; exit 9")
    error = run(folder)
    assert isinstance(error, Exception)
    assert "the job ended with code 9 and left no word" in str(error)
    assert "(it starts anew)" in str(error)
    assert "| line 20" in str(error)
    assert "| line 12\n" not in str(error)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_before_anything_can_be_saved_is_no_failure(folder: RunFolder, number: int) -> None:
    job(folder, "exec sleep 60")
    began = time.monotonic()
    error = run(folder, (0.6, number))
    assert time.monotonic() - began < 20
    assert getattr(error, "exit_code", None) == 75
    assert "stopped before it was done" in str(error)
    assert "it starts anew" in str(error)


def test_a_second_ctrl_c_ends_workers_of_other_process_groups(folder: RunFolder) -> None:
    """As torchrun's are: each in a session of its own, here one that ignores SIGTERM."""
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"
    mark = folder.root / "worker"
    job(
        folder,
        f"setsid {sys.executable} -c '{deaf}' & echo $! >{mark}; trap '' TERM; wait; wait; wait",
    )
    error = run(folder, (1.0, signal.SIGINT), (2.0, signal.SIGINT))
    assert getattr(error, "exit_code", None) == 75
    wait_for(lambda: not psutil.pid_exists(int(mark.read_text())), 5)
