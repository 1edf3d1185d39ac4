"""Environments of their own: their locks, and when one counts as made from them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tanren import environments
from tanren.config.errors import RequestError
from tanren.environments import HARNESS, NEMO, Environment
from tanren.images.definition import IMAGES, read_versions
from tests.conftest import REPOSITORY

LOCKS = REPOSITORY / "containers" / "locks"


def locked(name: str) -> dict[str, str]:
    found = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", (LOCKS / name).read_text(), re.MULTILINE)
    return dict(found)


def test_the_lock_pins_the_harness_and_leaves_torch_to_the_engines() -> None:
    own, engine = locked("eval.txt"), locked("native.txt")
    assert (LOCKS / "eval.in").read_text().split() == ["lm-eval[hf]"]
    assert HARNESS.pinned() == f"lm-eval {own['lm-eval']}"
    assert {"evaluate", "accelerate", "datasets"} <= own.keys()
    assert not any(name == "torch" or name.startswith("nvidia") for name in own)
    assert "torch" in engine
    both = own.keys() & engine.keys()
    assert len(both) > 20
    # native.txt may have a version for each Python; the last one is the newest Python's.
    assert {name for name in both if own[name] != engine[name]} == set()


def test_nemo_on_a_cpu_has_the_versions_of_the_image_and_the_engines_torch() -> None:
    own, engine = locked("nemo-cpu.txt"), locked("native.txt")
    pins = read_versions(IMAGES["nemo"]).pins
    assert len(pins) == 10
    assert {name: own[name] for name in pins} == pins
    assert NEMO.pinned() == f"nemo-toolkit {pins['nemo-toolkit']}"
    assert own["torch"] == engine["torch"]
    assert not any(name.startswith(("nvidia-c", "cuda", "triton", "nvidia-res")) for name in own)


@pytest.fixture(params=[HARNESS, NEMO], ids=["eval", "nemo"])
def made(request: pytest.FixtureRequest) -> Environment:
    environment: Environment = request.param
    return environment


@pytest.fixture
def checkout(tmp_path: Path, made: Environment, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with these locks and an installed environment, whose Python does nothing."""
    venv = tmp_path / f".venv-{made.part}"
    (tmp_path / "containers").mkdir()
    (tmp_path / "containers" / "locks").symlink_to(LOCKS)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "setup").write_text((REPOSITORY / "bin" / "setup").read_text())
    (venv / "bin").mkdir(parents=True)
    for name in ("python", "pip"):
        (venv / "bin" / name).write_text("#!/bin/sh\n")
        (venv / "bin" / name).chmod(0o755)
    monkeypatch.setattr(environments, "repository", lambda: tmp_path)
    monkeypatch.delenv(made.variable, raising=False)
    return tmp_path


def setup(checkout: Path, made: Environment) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "bin/setup", made.part], cwd=checkout, capture_output=True, text=True, check=False
    )


def test_what_setup_installed_is_current_until_the_lock_changes(
    checkout: Path, made: Environment
) -> None:
    """The script writes the mark and the package reads it: both must mean the same files."""
    with pytest.raises(RequestError, match="other locks"):
        made.require()
    done = setup(checkout, made)
    assert done.returncode == 0, done.stderr
    assert made.require() == checkout / f".venv-{made.part}" / "bin" / "python"
    assert setup(checkout, made).stdout == "", "a second call is free"
    locks = checkout / "containers" / "locks"
    locks.unlink()
    locks.mkdir()
    for name in made.locks:
        (locks / name).write_text(
            (LOCKS / name).read_text() + ("#\n" if name == "native.txt" else "")
        )
    with pytest.raises(RequestError, match="other locks") as error:
        made.require()
    assert error.value.next_step == f"make env-{made.part}"


def test_one_of_your_own_is_taken_as_it_is(
    checkout: Path, made: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(made.variable, "/bin/sh")
    assert made.require() == Path("/bin/sh")
    assert setup(checkout, made).stdout == "", "nothing is installed beside it"
    assert not (checkout / f".venv-{made.part}" / f".{made.part}").exists()


def test_one_that_is_not_there_is_said_with_how_to_make_it(
    checkout: Path, made: Environment
) -> None:
    (checkout / f".venv-{made.part}" / "bin" / "python").unlink()
    with pytest.raises(RequestError, match="environment of its own") as error:
        made.require()
    assert error.value.next_step == f"make env-{made.part}"
