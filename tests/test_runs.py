"""What a run folder says, also after a crash at a bad moment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tanren import runs
from tanren.config.errors import RequestError
from tanren.plan.paths import Part, RunFolder
from tests.conftest import REPOSITORY


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def checkpoint(folder: RunFolder, iteration: int) -> Path:
    made = folder.checkpoint(iteration)
    (made / "inner").mkdir(parents=True)
    (made / "a.distcp").write_bytes(b"12345")
    (made / "inner" / "b").write_bytes(b"1")
    runs.write_file_list(made)
    return made


def test_parts_come_in_their_order_and_know_their_run(folder: RunFolder) -> None:
    assert runs.parts(folder) == []
    for name in ("10of10", "2of10", "1of2", "notes"):
        (folder.parts / name).mkdir(parents=True)
    parts = [Part(1, 2), Part(2, 10), Part(10, 10)]
    assert runs.parts(folder) == [(part, folder.part(part)) for part in parts]
    assert {one.whole for _, one in runs.parts(folder)} == {folder} == {folder.whole}
    assert {one.shards for _, one in runs.parts(folder)} == {folder.root / "shards"}


def test_a_whole_checkpoint_has_no_problem(folder: RunFolder) -> None:
    assert runs.checkpoint_problem(checkpoint(folder, 5)) is None
    assert json.loads((folder.checkpoint(5) / "files.json").read_bytes()) == {
        "a.distcp": 5, "inner/b": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (lambda made: (made / "inner" / "b").unlink(), "the file inner/b is missing"),
        (lambda made: (made / "a.distcp").write_bytes(b"123"), "a.distcp has 3 bytes of 5"),
        (lambda made: (made / "files.json").unlink(), "the file files.json is missing"),
        (lambda made: (made / "files.json").write_text("{"), "is not JSON"),
    ],
)
def test_a_broken_checkpoint_is_refused_and_the_whole_one_named(
    folder: RunFolder, harm: object, problem: str
) -> None:
    checkpoint(folder, 5)
    harm(checkpoint(folder, 10))  # type: ignore[operator]
    with pytest.raises(RequestError) as refused:
        runs.latest_checkpoint(folder)
    assert problem in str(refused.value)


def test_half_written_and_half_removed_checkpoints_do_not_count(folder: RunFolder) -> None:
    checkpoint(folder, 5)
    for name in ("iter_0000010.partial", "iter_0000003.old.partial", "iter_x", "latest"):
        (folder.checkpoints / name).mkdir()
    assert runs.iterations(folder) == (5,)
    assert runs.latest_checkpoint(folder) == 5


def test_a_checkpoint_of_megatron_lm_is_judged_by_the_files_it_has(tmp_path: Path) -> None:
    made = tmp_path / "release"
    made.mkdir()
    (made / "metadata.json").write_text("{}")
    assert runs.checkpoint_problem(made, foreign=True) == "the file .metadata is missing"
    (made / ".metadata").write_bytes(b"")
    assert runs.checkpoint_problem(made, foreign=True) is None
    assert runs.checkpoint_problem(made) == "the file files.json is missing"


def test_lines_after_a_torn_one_are_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    runs.append_line(path, {"step": 1, "loss": 3.0})
    with path.open("ab") as file:
        file.write(b'{"step": 2, "lo')
    runs.append_line(path, {"step": 2, "loss": 2.5})
    for loss in (2.0, 1.5):
        runs.append_line(path, {"step": 3, "loss": loss})
    assert runs.curve(path, "loss") == {1: 3.0, 2: 2.5, 3: 1.5}


def test_an_interrupted_write_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "DONE"
    runs.write_atomic(path, b"old")

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        runs.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"


def test_a_lock_lasts_as_long_as_the_process_that_inherited_it(folder: RunFolder) -> None:
    with runs.locked(folder.lock) as lock:
        child = subprocess.Popen(["sleep", "60"], pass_fds=(lock,))
    held = f"is being worked on by process {os.getpid()} on"
    with pytest.raises(RequestError, match=held), runs.locked(folder.lock):
        pass
    child.kill()
    child.wait()
    with runs.locked(folder.lock):
        pass


def test_every_run_says_what_it_was_made_from(tmp_path: Path) -> None:
    from tanren import provenance

    folder = RunFolder(tmp_path)
    first = provenance.open_attempt(folder, REPOSITORY, {"steps": 3})
    provenance.close_attempt(folder, first, "stopped")
    second = provenance.open_attempt(folder, REPOSITORY, {"steps": 3})
    assert (first, second) == (1, 2)
    passport = json.loads(folder.passport.read_bytes())
    before, now = passport["attempts"]
    assert before["ending"] == "stopped"
    assert "ending" not in now
    assert now["plan"] == {"steps": 3}
    assert now["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "megatron-core", "transformers"} <= set(now["packages"])
    head = subprocess.run(
        ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert now["commit"]["id"] == (head.stdout.strip() or None)
