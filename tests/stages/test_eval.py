"""An export's scores: what the harness is asked, what becomes of its answer, what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest

from tanren.config.errors import RequestError
from tanren.config.load import read_site
from tanren.launch import queue
from tanren.launch.orders import Order
from tanren.launch.reading import read_request
from tanren.launch.submit import container_for
from tanren.plan.make import make_plan
from tanren.plan.plan import EvaluationPlan
from tanren.plan.site import Wish
from tests.conftest import RECIPES, REPOSITORY, Tanren
from tests.stages.test_bad_input import refused

RECIPE = RECIPES / "eval.yaml"
GSM8K = REPOSITORY.parent / "shared" / "data" / "gsm8k" / "test.jsonl"
OF_SFT = ("of=stage:sft",)
SCORES = {"python-library": {"acc,none": 0.25, "acc_stderr,none": 0.1306, "acc_norm,none": 0.5,
                             "acc_norm_stderr,none": "N/A"},
          "sums": {"acc,strict": 1.0}}  # fmt: skip


def leave(root: Path, stage: str, iteration: int, name: str = "") -> None:
    """The folders of a training and its export, as far as an evaluation looks at them."""
    trained, suffix = root / "tiny" / f"{stage}{name}", f".{stage}" if stage != "midtrain" else ""
    (trained / "checkpoints" / f"iter_{iteration:07d}").mkdir(parents=True)
    hf = trained / "hf" / f"iter_{iteration:07d}"
    hf.mkdir(parents=True)
    (trained / "DONE").write_text(json.dumps({"identity": "t", "iteration": iteration}))
    exported = root / "tiny" / f"export{suffix}{name}"
    exported.mkdir()
    (exported / "DONE").write_text(
        json.dumps({"identity": f"e{iteration}", "iteration": iteration, "hf": str(hf)})
    )


@pytest.fixture
def tanren(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tanren:
    """A command with two exports, and a harness that scores as SCORES says."""
    for stage in ("midtrain", "sft"):
        leave(tmp_path / "runs", stage, 6)
    python = tmp_path / "python"
    fake = REPOSITORY / "tests" / "stages" / "fake_harness.py"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {fake} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    return Tanren(
        tmp_path / "runs",
        {"TANREN_EVAL_PYTHON": str(python), "FAKE_SCORES": json.dumps(SCORES), "HF_TOKEN": "t0ken"},
    )


def read(path: Path) -> Any:
    return orjson.loads(path.read_bytes())


def test_scores_come_into_the_run_folder_and_once(tanren: Tanren) -> None:
    done = tanren("eval", str(RECIPE), sets=(*OF_SFT, "limit=5"))
    assert (done.code, done.err) == (0, ""), done.text
    assert "python-library  acc  0.2500 ± 0.1306\n" in done.out
    assert "python-library  acc_norm  0.5000\n" in done.out
    folder = tanren.folder("eval.sft")
    written = read(folder / "scores.json")
    scores = written.pop("scores")
    assert written == {
        "format": 1, "model": str(tanren.folder("sft") / "hf" / "iter_0000006"), "iteration": 6,
        "export": "e6", "harness": "0.4.13", "transformers": "5",
    }  # fmt: skip
    assert scores[0] == {
        "task": "python-library", "metric": "acc", "filter": "none", "value": 0.25,
        "stderr": 0.1306, "higher_is_better": True, "examples": 5, "shots": 0, "task_version": 1.0,
        "limit": 5, "chat": True,
    }  # fmt: skip
    assert [(one["metric"], one["stderr"]) for one in scores[1:]] == [("acc_norm", None)]
    assert len(read(folder / "passport.json")["attempts"]) == 1
    assert "t0ken" not in "".join(
        path.read_text() for path in folder.rglob("*.json") if path.name != "world.json"
    )
    done = tanren("eval", str(RECIPE), sets=(*OF_SFT, "limit=5"))
    assert done.code == 0
    assert done.out.startswith("eval is done: ")
    assert "acc_norm  0.5000" in done.out
    assert len(read(folder / "passport.json")["attempts"]) == 1


def test_what_the_harness_is_asked(tanren: Tanren) -> None:
    """Settings under its own names, no package of ours, the hub shut, paths from the task's."""
    assert tanren("eval", str(RECIPE), sets=("shots=2",)).code == 0
    harness = tanren.folder("eval") / "harness"
    assert read(harness / "settings.yaml") == {
        "model": "hf",
        "model_args": {"pretrained": str(tanren.folder() / "hf" / "iter_0000006"),
                       "dtype": "auto"},
        "tasks": ["python-library"], "include_path": str(RECIPES / "tasks"), "num_fewshot": 2,
        "batch_size": 8, "apply_chat_template": False, "device": "cpu", "seed": [1234] * 4,
        "output_path": str(harness), "log_samples": True,
    }  # fmt: skip
    world = read(harness / "world.json")
    assert world["cwd"] == str(RECIPES / "tasks")
    assert world["environment"]["HF_HUB_OFFLINE"] == "1"
    assert "PYTHONPATH" not in world["environment"]
    (tanren.folder() / "hf" / "iter_0000006" / "adapter_config.json").write_text(
        '{"base_model_name_or_path": "/base"}'
    )
    assert tanren("eval", str(RECIPE), sets=("offline=false",)).code == 0
    asked = read(harness / "settings.yaml")
    assert asked["model_args"]["pretrained"] == "/base"
    assert asked["model_args"]["peft"].endswith("iter_0000006")
    assert "HF_HUB_OFFLINE" not in read(harness / "world.json")["environment"]


def test_other_tasks_are_added_and_another_export_begins_anew(tanren: Tanren) -> None:
    def tasks() -> list[str]:
        return [one["task"] for one in read(tanren.folder("eval") / "scores.json")["scores"]]

    assert tanren("eval", str(RECIPE)).code == 0
    assert tanren("eval", str(RECIPE), sets=("tasks=sums",)).code == 0
    assert tasks() == ["python-library", "python-library", "sums"]
    assert tanren("eval", str(RECIPE), sets=("tasks=sums", "limit=3")).code == 0
    assert tasks() == ["python-library", "python-library", "sums"]
    (tanren.folder() / "checkpoints" / "iter_0000008").mkdir()
    done = tanren("eval", str(RECIPE), sets=("tasks=sums",))
    err = refused(done, 2, "eval", "stands on export, which has not been made")
    assert "bin/tanren export" in err
    hf = tanren.folder() / "hf" / "iter_0000008"
    hf.mkdir()
    (tanren.folder("export") / "DONE").write_text(
        json.dumps({"identity": "e8", "iteration": 8, "hf": str(hf)})
    )
    assert tanren("eval", str(RECIPE), sets=("tasks=sums",)).code == 0
    assert tasks() == ["sums"]
    assert read(tanren.folder("eval") / "scores.json")["iteration"] == 8


@pytest.mark.parametrize(
    ("sets", "environment", "code", "place", "problem", "step"),
    [
        (("tasks=[nothing]",), {}, 2, "tasks: nothing", "Tasks not found: nothing",
         "lm_eval ls tasks"),
        ((), {"FAKE_ERROR": "requests.ConnectionError: Couldn't reach 'gsm8k' on the Hub"}, 2,
         "tasks: python-library", "their data is not here", "offline=false"),
        ((), {"FAKE_ERROR": "OutOfMemoryError: 3 GiB"}, 1, "1.log",
         "lm-evaluation-harness ended with code 1: OutOfMemoryError: 3 GiB", "log"),
        ((), {"FAKE_SCORES": '{"python-library": {"acc,none": NaN}}'}, 1, "results_now.json",
         "acc is nan, which is no score", "LIMIT"),
        ((), {"FAKE_SCORES": '{"python-library": {}}'}, 1, "results_now.json",
         "python-library has no score", "metric"),
        ((), {"TANREN_EVAL_PYTHON": "/nowhere/python"}, 2, "/nowhere/python", "is not there",
         "make env-eval"),
        (("task_folder=nothing",), {}, 2, "nothing", "there is no such folder of tasks",
         "task_folder"),
        (("of=stage:dpo",), {}, 2, "eval.dpo", "stands on dpo, which has not been made",
         "bin/tanren dpo"),
        (("tasks=[]",), {}, 2, "tasks", "at least 1 item", ""),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_is_said(
    tanren: Tanren, sets: tuple[str, ...], environment: dict[str, str], code: int, place: str,
    problem: str, step: str,
) -> None:  # fmt: skip
    tanren.environment |= environment
    done = tanren("eval", str(RECIPE), sets=sets)
    assert done.code == code, done.text
    assert "Traceback" not in done.err
    assert problem in done.err
    assert place in done.err
    assert step in done.err
    assert not any(tanren.runs.glob("tiny/eval*/DONE"))
    assert not any(tanren.runs.glob("tiny/eval*/scores.json"))


def test_the_export_of_another_run_is_refused(tanren: Tanren) -> None:
    """`of` names a run by its whole name, and the export beside it is of the plain one."""
    (tanren.folder("sft-b") / "checkpoints" / "iter_0000006").mkdir(parents=True)
    (tanren.folder("sft-b") / "DONE").write_text('{"identity": "b", "iteration": 6}')
    done = tanren("eval", str(RECIPE), sets=("of=stage:sft-b",))
    err = refused(done, 2, "export.sft", "is the export of")
    assert "NAME=" in err


def test_a_variant_and_a_name_are_those_of_the_training(tanren: Tanren) -> None:
    leave(tanren.runs, "sft", 4, name="-b")
    done = tanren("eval", str(RECIPE), "--name", "b", sets=OF_SFT)
    assert (done.code, done.err) == (0, ""), done.text
    written = read(tanren.folder("eval.sft-b") / "scores.json")
    assert (written["iteration"], len(written["scores"])) == (4, 2)
    assert not tanren.folder("eval.sft").exists()


def test_a_cluster_gives_it_a_gpu_and_no_image(
    tanren: Tanren, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "user.toml").write_text('group = "g"\n')
    monkeypatch.setenv("TANREN_USER", str(tmp_path / "user.toml"))
    done = tanren("plan", str(RECIPE), "--site", "abci3", "--type", "rt_HG", sets=OF_SFT)
    assert done.code == 0, done.text
    assert "select=1" in done.out
    assert "#PBS -q rt_HG" in done.out
    order = Order(RECIPE, assignments=OF_SFT, site="abci3", wish=Wish(nodes=2))
    request = read_request(order, queue.machine_of(queue.place_of(
        "abci3", read_request(order).recipe, "eval", Wish(), queue.User(group="g"))))  # fmt: skip
    plan = make_plan(request)
    assert isinstance(plan, EvaluationPlan)
    assert (plan.launch.device, plan.launch.processes, plan.chat) == ("cuda", 1, True)
    assert container_for(order, request, 8) is None
    two = queue.place_of(
        "abci3", request.recipe, "eval", Wish(nodes=2), queue.User(group="g")
    )  # fmt: skip
    with pytest.raises(RequestError, match="runs on one node"):
        make_plan(read_request(order, queue.machine_of(two)))
    assert read_site("abci3").gpu_type == two.type_name


@pytest.mark.harness
def test_the_real_harness_scores_a_tiny_export(trained: Tanren, tmp_path: Path) -> None:
    """From a training without an export to scores, with nothing fetched from anywhere."""
    trained.environment |= {"HF_HOME": str(tmp_path / "hf")}
    done = trained("eval", str(RECIPE), "--needs")
    assert done.code == 0, done.text
    scores = read(trained.folder("eval") / "scores.json")
    assert scores["harness"] == "0.4.13"
    assert [(one["metric"], one["examples"]) for one in scores["scores"]] == [
        ("acc", 12), ("acc_norm", 12)]  # fmt: skip
    for one in scores["scores"]:
        assert round(one["value"] * 12, 6) == round(one["value"] * 12)
        assert one["stderr"] > 0
    sampled = list((trained.folder("eval") / "harness").rglob("samples_*.jsonl"))
    assert len(sampled) == 1
    assert len(sampled[0].read_text().splitlines()) == 12


@pytest.mark.harness
@pytest.mark.skipif(not GSM8K.exists(), reason="GSM8K is not beside the repository")
def test_the_real_harness_reads_a_local_gsm8k(trained: Tanren, tmp_path: Path) -> None:
    """Six of its questions, answered with eight tokens each, by a task of one's own."""
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    lines = GSM8K.read_text().splitlines()[:6]
    (tasks / "gsm8k.jsonl").write_text("".join(f"{line}\n" for line in lines))
    text = (REPOSITORY / "tests" / "stages" / "gsm8k.harness.yaml").read_text()
    (tasks / "gsm8k.yaml").write_text(text)
    trained.environment |= {"HF_HOME": str(tmp_path / "hf")}
    sets = ("tasks=gsm8k-local", f"task_folder={tasks}", "limit=4", "batch_size=2")
    done = trained("eval", str(RECIPE), "--needs", sets=sets)
    assert done.code == 0, done.text
    (score,) = read(trained.folder("eval") / "scores.json")["scores"]
    assert (score["task"], score["metric"], score["filter"]) == (
        "gsm8k-local", "exact_match", "last-number")  # fmt: skip
    assert (score["examples"], score["limit"]) == (4, 4)
    assert 0 <= score["value"] <= 1
    done = trained("eval", str(RECIPE), sets=("tasks=no-such-task",))
    refused(done, 2, "tasks: no-such-task", "not found")
    assert (trained.folder("eval") / "scores.json").exists(), "what was found stays"
