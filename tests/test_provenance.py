"""What a passport says of the code, of files and of attempts, and what it never says."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from tanren import provenance, runs
from tanren.config.errors import RequestError
from tanren.config.load import changed_fields
from tanren.config.site import Site
from tanren.plan.paths import RunFolder


def git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b.example", *words],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with a file of code, one of text, and a .gitignore."""
    root = tmp_path / "checkout"
    (root / "src").mkdir(parents=True)
    (root / "src" / "a.py").write_text("one = 1\n")
    (root / "README").write_text("read me\n")
    (root / ".gitignore").write_text("*.sif\n")
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "-m", "one")
    return root


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    (tmp_path / "run").mkdir()
    return RunFolder(tmp_path / "run")


def test_a_checkout_is_clean_with_touched_ignored_and_foreign_files(
    checkout: Path, folder: RunFolder
) -> None:
    (checkout / "src" / "a.py").touch()
    (checkout / "src" / "x.sif").write_text("ignored")
    (checkout / "mine.yaml").write_text("a recipe of one's own is in the plan, resolved")
    found = provenance.git_commit(checkout, folder.diff(1))
    assert found == {"id": git(checkout, "rev-parse", "HEAD"), "dirty": False}
    assert not folder.diff(1).exists()
    provenance.refuse_dirty(checkout, allowed=False)


def test_the_diff_of_a_changed_checkout_makes_another_like_it(
    checkout: Path, folder: RunFolder, tmp_path: Path
) -> None:
    (checkout / "README").write_bytes(bytes(range(256)))
    (checkout / "src" / "a.py").write_text("one = 2\n")
    (checkout / "src" / "new file.py").write_text("new = 1\n")
    git(checkout, "add", "src/a.py")
    found = provenance.git_commit(checkout, folder.diff(1))
    assert found["changed"] == ["README", "src/a.py", "src/new file.py"]
    assert (found["dirty"], found["diff"]["whole"]) == (True, True)
    git(tmp_path, "clone", "--quiet", str(checkout), "other")
    git(tmp_path / "other", "apply", "--binary", str(folder.diff(1)))
    for name in found["changed"]:
        assert (tmp_path / "other" / name).read_bytes() == (checkout / name).read_bytes()
    again = provenance.git_commit(tmp_path / "other", folder.diff(2))
    assert again["diff"]["sha256"] == found["diff"]["sha256"]
    with pytest.raises(RequestError, match=r"no commit holds: README, src/a.py, src/new file.py"):
        provenance.refuse_dirty(checkout, allowed=False)
    provenance.refuse_dirty(checkout, allowed=True)


def test_a_large_diff_is_cut_and_says_so(
    checkout: Path, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "DIFF_BYTES", 100)
    (checkout / "README").write_text("line\n" * 100)
    diff = provenance.git_commit(checkout, folder.diff(1))["diff"]
    assert diff["whole"] is False
    assert diff["bytes"] > 500
    assert folder.diff(1).stat().st_size == 100


def test_a_folder_that_is_no_checkout_is_neither_clean_nor_dirty(tmp_path: Path) -> None:
    assert provenance.git_commit(tmp_path) == {"id": None, "dirty": None}
    provenance.refuse_dirty(tmp_path, allowed=False)


def test_keys_of_the_environment_are_blotted_out(
    checkout: Path, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_SERVICE_TOKEN", "correct-horse-battery")
    (checkout / "README").write_text("token: correct-horse-battery\n")
    number = provenance.open_attempt(
        folder, checkout, {"note": "correct-horse-battery"}, host={"machine": {"cores": 2}}
    )
    provenance.close_attempt(folder, number, "error: correct-horse-battery was refused")
    (attempt,) = provenance.read_passport(folder)["attempts"]
    assert attempt["plan"] == {"note": "[MY_SERVICE_TOKEN]"}
    assert attempt["ending"] == "error: [MY_SERVICE_TOKEN] was refused"
    assert attempt["machine"] == {"cores": 2}
    assert b"+token: [MY_SERVICE_TOKEN]" in folder.diff(1).read_bytes()


def test_a_site_that_writes_a_key_into_job_scripts_is_refused() -> None:
    node = {"gpus": 0, "cores": 1, "memory_gib": 1.0, "nodes": 1, "walltime_hours": 1.0}
    values: dict[str, Any] = {
        "scheduler": "slurm", "types": {"a": node}, "gpu_type": "a", "cpu_type": "a",
        "environment": {"NCCL_DEBUG": "WARN"},
    }  # fmt: skip
    assert Site.model_validate(values).environment == {"NCCL_DEBUG": "WARN"}
    with pytest.raises(ValueError, match=r"environment.WANDB_API_KEY would be written"):
        Site.model_validate(values | {"environment": {"WANDB_API_KEY": "x"}})


def test_an_attempt_that_was_killed_is_closed_by_the_next(folder: RunFolder) -> None:
    for _ in range(2):
        provenance.open_attempt(folder, folder.root, {})
    provenance.note(folder, 2, {"process": {"python": "3"}})
    before, now = provenance.read_passport(folder)["attempts"]
    assert before["ending"] == "killed, and left no word"
    assert "ended" not in before
    assert "ending" not in now
    assert now["process"] == {"python": "3"}


def test_a_passport_that_cannot_be_read_is_one_message(folder: RunFolder) -> None:
    with pytest.raises(RequestError, match="has no passport"):
        provenance.read_passport(folder)
    runs.write_json(folder.passport, {"format": 99, "attempts": [{}]})
    with pytest.raises(RequestError, match=r"by another version of tanren \(format 99") as error:
        provenance.read_passport(folder)
    assert error.value.next_step == "use the version that wrote it"


def test_a_large_file_is_known_by_its_size_and_blocks(tmp_path: Path) -> None:
    file, size = tmp_path / "web.bin", 40 << 20
    with file.open("wb") as sparse:
        sparse.truncate(size)
    first = provenance.fingerprint(file)
    assert (first["bytes"], first["sampled"]) == (size, True)
    for place in (0, size - 1):
        with file.open("r+b") as changed:
            changed.seek(place)
            changed.write(b"x")
        assert provenance.fingerprint(file)["sha256"] != first["sha256"]
        with file.open("r+b") as changed:
            changed.seek(place)
            changed.write(b"\0")
    assert provenance.fingerprint(file)["sha256"] == first["sha256"]
    whole = provenance.fingerprint(file, whole=True)
    assert (whole["sampled"], whole["sha256"] != first["sha256"]) == (False, True)


def test_a_set_of_files_is_known_by_names_sizes_and_contents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / f"{number}.jsonl" for number in range(4)]
    for file in files:
        file.write_text("same")
    whole = provenance.fingerprint_of(files, tmp_path)
    assert (whole["files"], whole["bytes"], whole["sampled"]) == (4, 16, False)
    files[3].write_text("SAME")
    assert provenance.fingerprint_of(files, tmp_path)["sha256"] != whole["sha256"]
    files[3].rename(tmp_path / "4.jsonl")
    (tmp_path / "4.jsonl").write_text("same")
    renamed = [*files[:3], tmp_path / "4.jsonl"]
    assert provenance.fingerprint_of(renamed, tmp_path)["sha256"] != whole["sha256"]
    monkeypatch.setattr(provenance, "MOST_FILES", 2)
    assert provenance.fingerprint_of(renamed, tmp_path)["sampled"] is True


def test_what_variant_and_set_made_of_a_recipe(tmp_path: Path) -> None:
    plain = tmp_path / "midtrain.yaml"
    plain.write_text("steps: 8\noptimizer: {lr: 1.0e-3, beta2: 0.9}\n")
    (tmp_path / "midtrain.long.yaml").write_text("base: midtrain.yaml\nsteps: 80\n")
    assert changed_fields(plain, None, []) == {}
    assert changed_fields(plain, "long", ["optimizer.lr=1.0e-4", "seed=3"]) == {
        "steps": (8, 80), "optimizer.lr": (1.0e-3, 1.0e-4), "seed": (None, 3),
    }  # fmt: skip
