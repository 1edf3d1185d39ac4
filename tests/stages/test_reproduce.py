"""A replay is the run once more, bit for bit, and what is not the same is said before."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tanren import runs
from tanren.config.errors import RequestError
from tanren.launch import compare as comparing
from tanren.launch import reproduce
from tanren.plan.paths import RunFolder
from tests.conftest import REPOSITORY, Tanren
from tests.stages.test_bad_input import refused
from tests.stages.warm import Server, Warm

KEYS = {
    "HF_TOKEN": "hf_plantedAAAABBBBCCCC",
    "WANDB_API_KEY": "plantedddddd0123456789",
    "MY_OWN_SECRET": "planted-other-secret",
    "AWS_SECRET_ACCESS_KEY": "planted/aws/123456",
}


@pytest.fixture
def tuned(once_tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A runs folder with the short runs of all stages, and this process as their command."""
    shutil.copytree(once_tuned / "tiny", tmp_path / "runs" / "tiny", symlinks=True)
    for name, value in (("RUNS", str(tmp_path / "runs")), ("CUDA_VISIBLE_DEVICES", ""),
                        ("OMP_NUM_THREADS", "1")):  # fmt: skip
        monkeypatch.setenv(name, value)
    return tmp_path / "runs"


def contents(folder: Path) -> dict[str, Any]:
    """Sizes and times of every file of a run."""
    facts = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    return {str(path): (fact.st_size, fact.st_mtime_ns) for path, fact in facts.items()}


@pytest.mark.long
def test_a_replayed_chain_has_the_losses_and_weights_of_the_first(
    tuned: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its jobs run in the warm process, whose code is this checkout's: see the test below."""
    before = contents(tuned / "tiny")

    def call(words: list[str], environment: dict[str, str]) -> int:
        answer = server.ask({"words": words[1:], "environment": environment})
        assert answer["code"] == 0, answer
        return int(answer["code"])

    for run in ("midtrain", "sft", "export.sft", "dpo"):
        replay = reproduce.look(RunFolder(tuned / "tiny" / run), "again")
        assert replay.differences == ()
        assert replay.folder.root == tuned / "replays" / "again" / "tiny" / run
        assert call(*reproduce.prepare(replay, force=False)) == 0
        compared = comparing.compare(replay.of, replay.folder)
        assert compared.groups["recipe"] == compared.groups["data"] == compared.groups["code"] == []
        assert compared.groups["result"] == [], run
        assert compared.same_result
        if run != "export.sft":
            assert len(compared.common_steps) == {"midtrain": 8, "sft": 6, "dpo": 6}[run]
            assert compared.parts_at is None
        origin = runs.read_json(replay.folder.passport)["replay"]
        assert (origin["of"], origin["forced"]) == (str(replay.of.root), False)
    weights = [tuned / where / "tiny" / "sft" / "hf" / "iter_0000006" / "model.safetensors"
               for where in ("", "replays/again")]  # fmt: skip
    assert weights[0].read_bytes() == weights[1].read_bytes()
    # sft stands on the replayed midtrain, that on the first one's preprocess and convert.
    made = tuned / "replays" / "again" / "tiny"
    assert not (made / "midtrain" / "passport.json").is_symlink()
    assert (made / "convert" / "passport.json").is_symlink()
    assert contents(tuned / "tiny") == before
    with pytest.raises(RequestError, match="is there already"):
        reproduce.look(RunFolder(tuned / "tiny" / "midtrain"), "again")


def test_reproduce_runs_the_commit_beside_this_checkout(trained: Tanren) -> None:
    done = trained("reproduce", "tiny/midtrain", "--name", "again")
    assert done.code == 0, done.text
    assert "equal bit for bit in all 8 steps" in done.out
    assert "is the same, bit for bit" in done.out
    new = trained.runs / "replays" / "again" / "tiny" / "midtrain"
    (code,) = (path for path in (trained.runs / "replays" / ".code").iterdir() if path.is_dir())
    first, again = (runs.read_json(folder / "passport.json")["attempts"][0]
                    for folder in (trained.folder(), new))  # fmt: skip
    assert again["commit"]["id"] == first["commit"]["id"]
    assert again["commit"].get("diff", {}).get("sha256") == first["commit"].get("diff", {}).get(
        "sha256"
    )
    assert f"PYTHONPATH={code}/src" in (new / "job.sh").read_text()
    assert str(REPOSITORY / "src") not in (new / "job.sh").read_text()


def test_what_is_gone_or_another_is_listed_and_force_is_written_down(
    tuned: Path, tmp_path: Path
) -> None:
    folder = RunFolder(tuned / "tiny" / "midtrain")
    passport = runs.read_json(folder.passport)
    last = passport["attempts"][-1]
    tokens = tmp_path / "docstrings"
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{last['inputs']['tokens docstrings']['path']}{suffix}", f"{tokens}{suffix}")
    with tokens.with_suffix(".bin").open("r+b") as file:
        file.write(b"\xff")
    shares = last["plan"]["mix"]["sources"]
    shares[1]["prefix"] = str(tokens)
    shares[0]["prefix"] = str(tmp_path / "gone")
    last["commit"] = {"id": "0" * 40, "dirty": False}
    last["packages"]["torch"] = "1.0"
    last["machine"]["cores"] = 999
    runs.write_json(folder.passport, passport)
    replay = reproduce.look(folder, None)
    said = "\n".join(replay.differences)
    for one in (
        "code: commit 000000000000 is not in this repository",
        "versions: torch 1.0 there",
        "machine: cores 999 there",
        "data: tokens reference is gone",
        "data: tokens docstrings is not what it was",
    ):
        assert one in said
    assert len(replay.differences) == 5
    with pytest.raises(RequestError, match=r"cannot be made again as it was") as error:
        reproduce.refuse(replay, force=False)
    assert "FORCE=1" in error.value.next_step
    assert not (tuned / "replays").exists()
    reproduce.refuse(replay, force=True)
    words, environment = reproduce.prepare(replay, force=True)
    assert words[0] == str(REPOSITORY / "bin" / "tanren")
    assert words[1:] == ["midtrain", str(tuned / "replays/1/.recipes/tiny/midtrain.yaml"),
                         "--runtime", "native", "--site", "local"]  # fmt: skip
    assert environment["RUNS"] == str(tuned / "replays" / "1")
    origin = runs.read_json(replay.folder.passport)["replay"]
    assert (origin["forced"], len(origin["differences"])) == (True, 5)


def test_runs_that_cannot_be_replayed_or_compared_are_one_message(trained: Tanren) -> None:
    run, folder = "tiny/midtrain", RunFolder(trained.folder())
    with runs.locked(folder.lock):
        refused(trained("reproduce", run), 2, "tiny/midtrain", "is still going")
        shown = trained("diff", run, run)
        assert "is still going: this is as far as it is" in shown.out
    refused(trained("diff", run, "tiny/convert"), 2, "tiny/convert", "are runs of different stages")
    refused(trained("reproduce", run, "--name", "a/b"), 2, "--name a/b", "cannot be part of a")
    folder.passport.unlink()
    refused(trained("reproduce", run), 2, "tiny/midtrain", "has no passport")
    refused(trained("diff", run, run), 2, "tiny/midtrain", "has no passport")


def test_diff_shows_where_two_runs_part(trained: Tanren) -> None:
    folder, other = trained.folder(), trained.folder("midtrain-other")
    shutil.copytree(folder, other)
    lines = runs.read_lines(other / "metrics.jsonl")
    for line in lines:
        if "loss" in line and line["step"] >= 5:
            line["loss"] += 1e-9
    (other / "metrics.jsonl").unlink()
    for line in lines:
        runs.append_line(other / "metrics.jsonl", line)
    with (other / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    passport = runs.read_json(other / "passport.json")
    last = passport["attempts"][-1]
    last["plan"]["recipe"]["optimizer"]["lr"] = 5.0
    last["process"]["packages"]["numpy"] = "1.0"
    runs.write_json(other / "passport.json", passport)
    done = trained("diff", "tiny/midtrain", "tiny/midtrain-other")
    assert done.code == 0, done.text
    assert "recipe     optimizer.lr 0.003 there, 5.0 here" in done.out
    assert "packages   numpy" in done.out
    for title in ("code", "data", "layout", "image", "machine", "made"):
        assert f"  {title:<10} the same\n" in done.out
    assert "metrics.jsonl ends in a torn line" in done.out
    assert "losses     differ from step 5 on" in done.out
    (marked,) = (line for line in done.out.splitlines() if "they part" in line)
    assert marked.split()[0] == "5"
    assert marked.split()[3] == "+1.00e-09"


def test_no_file_that_a_run_writes_holds_a_key(warm: Warm) -> None:
    warm.environment = dict(KEYS)
    done = warm.midtrain("--name", "secret", sets=("steps=4", "schedule.decay_steps=2"))
    assert done.code == 0, done.text
    folder = warm.folder("midtrain-secret")
    files = [path for path in folder.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"plan.json", "passport.json", "job.sh", "1.log", "metrics.jsonl", "DONE"} <= names
    for path in files:
        content = path.read_bytes()
        for name, value in KEYS.items():
            assert value.encode() not in content, (path, name)
    assert not any(value in done.text for value in KEYS.values())


def test_a_passport_leads_back_to_the_text(tuned: Path) -> None:
    (attempt,) = runs.read_json(tuned / "tiny" / "dpo" / "passport.json")["attempts"]
    assert attempt["ending"] == "done"
    assert (attempt["seed"], attempt["nodes"]) == (1234, 1)
    assert attempt["plan"]["changed"]["steps"] == [40, 6]
    assert {"base", "data answers", "tokenizer"} <= set(attempt["inputs"])
    assert {"checkpoint", "tokenizer", "chat template"} <= set(attempt["made"])
    assert "torch" in attempt["process"]["packages"]
    (sft,) = attempt["from"]
    # The base, which keeps the tokenizer.
    (midtrain,) = sft["from"]
    below = {one["stage"]: one for one in midtrain["from"]}
    assert (sft["stage"], midtrain["stage"], set(below)) == (
        "sft", "midtrain", {"convert", "preprocess"},
    )  # fmt: skip
    assert set(below["preprocess"]["text"]) == {"data reference", "data docstrings"}
    # What dpo read is what sft made.
    assert attempt["inputs"]["base"]["sha256"] == sft["made"]["checkpoint"]
