"""What is wrong gives one message with place, problem and next step, and loses nothing."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import pytest

from tanren import runs
from tanren.plan.paths import RunFolder
from tests.conftest import RECIPES, Finished, Tanren, set_back


def refused(done: Finished, code: int, place: str, problem: str) -> str:
    """Check the one message of a refusal and return it."""
    assert done.code == code, done.text
    assert "Traceback" not in done.text
    assert done.err.startswith("tanren: "), done.err
    assert done.err.count("tanren: ") == 1
    first, *rest = done.err.removeprefix("tanren: ").splitlines()
    assert place in first.split(": ")[0] or first.startswith(place), first
    assert problem in first, first
    assert rest, f"no next step: {first}"
    assert rest[0].startswith("  next: "), rest
    return done.err


@pytest.mark.parametrize(
    ("assignment", "problem"),
    [
        (
            "stepps=3",
            "is not a field here (did you mean steps?); the fields are model, init, ",
        ),
        ("optimizer.lr=fast", "'fast': input should be a valid number"),
        ("optimizer.lr=5e-5", "YAML reads a number such as 5e-5 as text: write 5.0e-5"),
        ("steps=1:30:00", "YAML reads 1:30:00 as 5400"),
        ("global_batch=9", "is not a multiple of"),
    ],
)
def test_a_recipe_that_is_wrong(bare: Tanren, assignment: str, problem: str) -> None:
    done = bare("midtrain", str(RECIPES / "midtrain.yaml"), sets=(assignment,))
    assert done.code == 2
    assert problem in done.err.splitlines()[0]
    assert assignment.split("=")[0] in done.err
    assert not bare.runs.exists(), "a refused request leaves nothing behind"


def test_a_recipe_that_is_not_there_names_those_that_are(bare: Tanren) -> None:
    done = bare("midtrain", str(RECIPES / "midtrain.yml"))
    err = refused(done, 2, "midtrain.yml", "there is no such file")
    assert "midtrain.yaml" in err


def test_a_stage_that_is_missing_is_named_by_its_command(bare: Tanren) -> None:
    done = bare.midtrain()
    err = refused(done, 2, str(bare.folder()), "stands on preprocess, which has not been made")
    assert "bin/tanren preprocess" in err
    assert not bare.folder("preprocess").exists()
    assert not bare.folder().exists()


def test_tanren_debug_shows_the_trace(tanren: Tanren) -> None:
    tanren.environment["TANREN_DEBUG"] = "1"
    done = tanren.midtrain(sets=("global_batch=9",))
    assert done.code == 2
    assert "Traceback" in done.err
    assert "is not a multiple of" in done.err


CORPORA = {
    "not JSON": ('{"text": "a"}\n{"text": \n', ":2", "not JSON"),
    "no text": ('{"text": "a"}\n\n{"body": "b"}\n', ":3", "text"),
    "text is a number": ('{"text": 5}\n', ":1", "text"),
    "empty": ("", "", "no text"),
    "blank documents": ('{"text": ""}\n', "", "no text"),
    "missing": (None, "", "no file of source corpus is there"),
}


@pytest.mark.parametrize("kind", CORPORA)
def test_a_corpus_that_is_wrong(bare: Tanren, tmp_path: Path, kind: str) -> None:
    text, line, problem = CORPORA[kind]
    task = tmp_path / "mine"
    task.mkdir()
    if text is not None:
        (task / "corpus.jsonl").write_text(text)
    (task / "preprocess.yaml").write_text(
        "tokenizer: {train: {vocabulary_size: 300}}\n"
        "sources: [{name: corpus, path: corpus.jsonl}]\n"
    )
    done = bare("preprocess", str(task / "preprocess.yaml"))
    assert done.code == 2, done.text
    assert "Traceback" not in done.text
    assert "next: " in done.err
    assert f"corpus.jsonl{line}" in done.err
    assert problem in done.err
    assert not (bare.runs / "mine" / "preprocess" / "DONE").exists()


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_truncated_tokens(tanren: Tanren, suffix: str) -> None:
    file = tanren.folder("preprocess") / "tokens" / f"docstrings.{suffix}"
    file.write_bytes(file.read_bytes()[:-5000])
    done = tanren.midtrain()
    refused(done, 2, str(file), "bytes")


def test_a_base_with_a_missing_file(tanren: Tanren) -> None:
    base = RunFolder(tanren.folder("convert")).checkpoint(0)
    lost = next(base.glob("*.distcp"))
    lost.unlink()
    refused(tanren.midtrain(), 2, str(base), f"the file {lost.name} is missing")


def test_following_the_advice_on_a_broken_checkpoint_loses_only_that_one(trained: Tanren) -> None:
    folder = set_back(trained, 8)
    curve = runs.curve(folder.metrics, "loss")
    broken = folder.checkpoint(8)
    lost = next(broken.glob("*.distcp"))
    lost.unlink()
    err = refused(trained.midtrain(), 2, str(broken), f"the file {lost.name} is missing")
    assert f"rm -r {broken}   (the run then goes on from iteration 6, which is whole)" in err

    shutil.rmtree(broken)
    done = trained.midtrain()
    assert done.code == 0, done.text
    assert "goes on from iteration 6" in done.out
    assert runs.curve(folder.metrics, "loss") == curve


def _small_files() -> None:
    """Let no file grow beyond 3 MB: to a program that is a disk that is full."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, hard))


def test_a_full_disk_while_saving(trained: Tanren) -> None:
    folder = set_back(trained, 6)
    done = trained.midtrain(preexec_fn=_small_files)
    assert done.code == 1, done.text
    assert "Traceback" not in done.text
    assert "the checkpoint could not be written: " in done.err
    assert "File too large" in done.err or "it is full, or over its quota" in done.err
    assert "it goes on from iteration 6" in done.err
    assert json.loads(folder.failed.read_bytes())["exit_code"] == 1
    assert runs.iterations(folder)[-1] == 6
    assert not list(folder.checkpoints.glob("*.partial"))
    assert runs.checkpoint_problem(folder.checkpoint(6)) is None

    done = trained.midtrain()
    assert done.code == 0, done.text
    assert "goes on from iteration 6" in done.out
