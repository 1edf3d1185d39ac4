"""Modules of tests that run in processes of their own, one or several of a group."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import REPOSITORY


def check(name: str, *words: str, **environment: str) -> str:
    """What `python -m tests.engine.NAME WORDS` prints: checks of kernels, by Triton or on a GPU."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.engine.{name}", *words],
        cwd=REPOSITORY, env=os.environ | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def start(module: str, root: Path, ranks: int) -> None:
    """Run `python -m module ROOT RANK RANKS` once a rank, and wait for all.

    In processes since engine/cpu.py changes torch.
    """
    path = os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY)])
    environment = os.environ | {
        "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(root), str(rank), str(ranks)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * ranks, said[0][-3000:]
