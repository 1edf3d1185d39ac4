"""A command whose jobs need no new processes; see warm.py."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stages.warm import Server, Warm


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.end()


@pytest.fixture
def warm(once_tuned: Path, server: Server, tmp_path: Path) -> Warm:
    """A command with a runs folder of its own, with what sft stands on."""
    return beside(once_tuned, server, tmp_path / "runs", "preprocess", "convert", "midtrain")


def beside(once: Path, server: Server, root: Path, *stages: str) -> Warm:
    """A command with a runs folder of its own, in which these stages are those of another."""
    (root / "tiny").mkdir(parents=True)
    for stage in stages:
        (root / "tiny" / stage).symlink_to(once / "tiny" / stage)
    return Warm(root, server=server)


def take(once: Path, warm: Warm, run: str, iteration: int) -> None:
    """A copy of a run, as a kill after this checkpoint leaves it."""
    other = [f"iter_{n:07d}" for n in range(100) if n != iteration]
    shutil.copytree(
        once / "tiny" / run, warm.folder(run), ignore=shutil.ignore_patterns("DONE", *other)
    )
