"""The environment of lm-evaluation-harness: its lock, and when it counts as made from that."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tanren import harness
from tanren.config.errors import RequestError
from tests.conftest import REPOSITORY

LOCKS = REPOSITORY / "containers" / "locks"


def locked(name: str) -> dict[str, str]:
    found = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", (LOCKS / name).read_text(), re.MULTILINE)
    return dict(found)


def test_the_lock_pins_the_harness_and_leaves_torch_to_the_engines() -> None:
    own, engine = locked("eval.txt"), locked("native.txt")
    assert (LOCKS / "eval.in").read_text().split() == ["lm-eval[hf]"]
    assert harness.pinned() == f"lm-eval {own['lm-eval']}"
    assert {"evaluate", "accelerate", "datasets"} <= own.keys()
    assert not any(name == "torch" or name.startswith("nvidia") for name in own)
    assert "torch" in engine
    both = own.keys() & engine.keys()
    assert len(both) > 20
    # native.txt may have a version for each Python; the last one is the newest Python's.
    assert {name for name in both if own[name] != engine[name]} == set()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with these locks and an installed harness, whose Python does nothing."""
    (tmp_path / "containers").mkdir()
    (tmp_path / "containers" / "locks").symlink_to(LOCKS)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "setup").write_text((REPOSITORY / "bin" / "setup").read_text())
    (tmp_path / ".venv-eval" / "bin").mkdir(parents=True)
    for name in ("python", "pip"):
        (tmp_path / ".venv-eval" / "bin" / name).write_text("#!/bin/sh\n")
        (tmp_path / ".venv-eval" / "bin" / name).chmod(0o755)
    monkeypatch.setattr(harness, "repository", lambda: tmp_path)
    monkeypatch.delenv("TANREN_EVAL_PYTHON", raising=False)
    return tmp_path


def setup(checkout: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "bin/setup", "eval"], cwd=checkout, capture_output=True, text=True, check=False
    )


def test_what_setup_installed_is_current_until_the_lock_changes(checkout: Path) -> None:
    """The script writes the mark and the package reads it: both must mean the same files."""
    with pytest.raises(RequestError, match="other locks"):
        harness.require()
    done = setup(checkout)
    assert done.returncode == 0, done.stderr
    assert harness.require() == checkout / ".venv-eval" / "bin" / "python"
    assert setup(checkout).stdout == "", "a second call is free"
    locks = checkout / "containers" / "locks"
    locks.unlink()
    locks.mkdir()
    for name in ("eval.in", "eval.txt", "native.txt"):
        (locks / name).write_text((LOCKS / name).read_text() + ("#\n" if name[0] == "n" else ""))
    with pytest.raises(RequestError, match="other locks") as error:
        harness.require()
    assert error.value.next_step == "make env-eval"


def test_one_of_your_own_is_taken_as_it_is(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANREN_EVAL_PYTHON", "/bin/sh")
    assert harness.require() == Path("/bin/sh")
    assert setup(checkout).stdout == "", "nothing is installed beside it"
    assert not (checkout / ".venv-eval" / ".eval").exists()
