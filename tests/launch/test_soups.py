"""What a soup's models mean on disk, what makes them, and what stands on a soup."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tanren.config.errors import RequestError
from tanren.launch import inputs, orders, queue, reading, tools
from tanren.launch.orders import Order
from tanren.launch.reading import missing, read_request
from tanren.launch.submit import container_for
from tanren.plan.make import make_plan
from tanren.plan.paths import RunFolder
from tanren.plan.plan import EvaluationPlan, MergePlan, SftPlan, read_plan
from tests.conftest import RECIPES, REPOSITORY, Tanren
from tests.data.fake_hub import Hub
from tests.launch.test_queue import Cluster
from tests.stages.test_bad_input import refused

RECIPE = RECIPES / "merge.yaml"
FAKE = REPOSITORY / "tests" / "stages" / "fake_mergekit"


def soup(*models: str, **fields: str) -> tuple[str, ...]:
    """--set for a soup of these."""
    listed = ", ".join(f"{{model: '{model}'}}" for model in models)
    return (f"models=[{listed}]", *(f"{key}={value}" for key, value in fields.items()))


def leave(
    runs: Path, run: str, *exported: int, saved: tuple[int, ...] = (), task: str = "tiny"
) -> RunFolder:
    """A training's folder with checkpoints and exports, as far as a soup looks at them."""
    folder = RunFolder(runs / task / run)
    for iteration in saved:
        folder.checkpoint(iteration).mkdir(parents=True)
    for iteration in exported:
        hf = folder.export(iteration)
        hf.mkdir(parents=True)
        (hf / "config.json").write_text(json.dumps({"of": run, "iteration": iteration}))
    return folder


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in (
        ("RUNS", tmp_path / "runs"),
        ("RUNTIME", "native"),
        ("DATA", tmp_path),
        ("CUDA_VISIBLE_DEVICES", ""),
        ("TANREN_USER", tmp_path / "user.toml"),
    ):
        monkeypatch.setenv(name, str(value))
    (tmp_path / "user.toml").write_text('group = "g"\n')
    return tmp_path / "runs"


def planned(*sets: str, **order: str) -> MergePlan:
    plan = make_plan(read_request(Order(RECIPE, assignments=sets, **order)))
    assert isinstance(plan, MergePlan)
    return plan


def test_the_newest_export_is_meant_and_a_stated_one_when_it_is_said(runs: Path) -> None:
    midtrain = leave(runs, "midtrain", 80, 160, saved=(80, 160))
    sft = leave(runs, "sft.B-c", 40, 120)
    other = leave(runs, "sft", 7, task="mine")
    refs = ("stage:midtrain", "stage:midtrain@80", "stage:sft.B-c", "mine/stage:sft")
    plan = planned(*soup(*refs))
    folders = (midtrain.export(160), midtrain.export(80), sft.export(120), other.export(7))
    assert plan.folders == dict(zip(refs, map(str, folders), strict=True))
    assert list(plan.settings["inputs"]) == list(refs)
    assert plan.settings["inputs"]["stage:midtrain@80"].startswith("iteration 80, 1 files of ")
    # A newer checkpoint is what is meant from now on, and its export is not there.
    midtrain.checkpoint(240).mkdir()
    assert planned(*soup(*refs)).folders["stage:midtrain"] is None
    # The soup's own variant and name change nothing in the runs that it names.
    assert planned(*soup("stage:midtrain@80"), name="try").folders == {
        "stage:midtrain@80": str(midtrain.export(80))
    }
    assert planned(*soup("stage:midtrain@80"), name="try").run.endswith("merge-try")


def test_a_base_a_soup_and_a_folder_are_models_too(runs: Path) -> None:
    for run, hf in (("convert", "base"), ("merge-a", "merged")):
        folder = RunFolder(runs / "tiny" / run)
        (folder.hf / hf).mkdir(parents=True)
        (folder.root / "DONE").write_text(json.dumps({"identity": "x", "hf": str(folder.hf / hf)}))
    own = runs / "own"
    own.mkdir()
    (own / "config.json").write_text("{}")
    refs = ("stage:convert", "stage:merge-a", f"hf:{own}", "owner/name@v1")
    plan = planned(*soup(*refs))
    assert plan.folders == {
        "stage:convert": str(runs / "tiny" / "convert" / "hf" / "base"),
        "stage:merge-a": str(runs / "tiny" / "merge-a" / "hf" / "merged"),
        str(own): str(own),
        "owner/name@v1": "owner/name@v1",
    }
    assert plan.settings["inputs"][f"model {own}"].startswith("1 files of 2 bytes")
    assert plan.settings["inputs"]["model owner/name@v1"] is None, "it is not fetched yet"
    recipe = plan.recipe
    assert list(inputs.hub_parts(recipe)) == ["model owner/name@v1"]
    assert inputs.paths(recipe) == [str(own)]
    # A base that is gone is made again.
    shutil.rmtree(runs / "tiny" / "convert" / "hf")
    (needed,) = missing(Order(RECIPE), read_request(Order(RECIPE, assignments=soup(*refs[:2]))))
    assert needed.recipe_file.name == "convert.yaml"


def test_what_is_missing_is_exported_of_the_run_that_is_named(runs: Path) -> None:
    leave(runs, "midtrain", saved=(80, 160))
    refs = ("stage:midtrain@80", "stage:sft.B-c", "mine/stage:dpo")
    order = Order(RECIPE, name="try", assignments=soup(*refs))
    found = missing(order, read_request(order))
    assert [(one.recipe_file.relative_to(RECIPES.parent), one.variant, one.name, one.assignments)
            for one in found] == [
        (Path("tiny/export.yaml"), None, None, ("of=stage:midtrain", "iteration=80")),
        (Path("tiny/export.yaml"), "B", "c", ("of=stage:sft",)),
        (Path("mine/export.yaml"), None, None, ("of=stage:dpo",)),
    ]  # fmt: skip
    with pytest.raises(RequestError, match="stands on export, which has not been made"):
        reading.refuse_missing(order, read_request(order))


@pytest.mark.parametrize(
    ("models", "place", "problem", "step"),
    [
        (("stage:midtrain@90",), "stage:midtrain@90", "has no checkpoint 90", "it has 80, 160"),
        (("stage:export",), "stage:export", "export makes no model", "stage:sft"),
        (("stage:convert@8",), "stage:convert@8", "convert has no iterations", "stage:convert"),
        (("stage:merge",), "stage:merge", "is this run itself", "stage:merge-NAME"),
        (("stage:stf",), "stage:stf", "names no stage", "the stages are"),
        (("stage:sft",), "iter_0000004", "holds adapters beside a base", "adapters: merged"),
        (("./nothing",), "nothing", "there is no such folder", "the model's path"),
        (("a b c",), "a b c", "is neither a folder here nor a repository", "owner/name"),
    ],
)
def test_what_is_no_model_is_said_before_anything_runs(
    runs: Path, models: tuple[str, ...], place: str, problem: str, step: str
) -> None:
    leave(runs, "midtrain", saved=(80, 160))
    peft = leave(runs, "sft", saved=(4,)).export(4)
    peft.mkdir(parents=True)
    (peft / "adapter_config.json").write_text("{}")
    with pytest.raises(RequestError) as caught:
        planned(*soup(*models))
    assert place in caught.value.place
    assert problem in caught.value.problem
    assert step in caught.value.next_step


def test_it_runs_in_its_own_environment_or_its_own_image(
    runs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tanren = Tanren(runs, {"TANREN_MERGE_PYTHON": "/nowhere/python"})
    leave(runs, "midtrain", 8)
    done = tanren("plan", str(RECIPE), sets=soup("stage:midtrain"))
    assert done.code == 0, done.text
    assert "exec /nowhere/python -m tanren.stages" in done.out
    assert "method                linear" in done.out
    done = tanren("merge", str(RECIPE), sets=soup("stage:midtrain"))
    refused(done, 2, "/nowhere/python", "merging needs an environment of its own")
    assert "make env-merge" in done.err
    tool = tmp_path / "apptainer"
    tool.write_text("#!/bin/sh\necho apptainer version 1.4.5\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("IMAGES", str(tmp_path / "images"))
    order = Order(RECIPE, assignments=soup("stage:midtrain"), runtime="apptainer")
    with pytest.raises(RequestError, match=r"merge\.sif"):
        container_for(order, read_request(Order(RECIPE, assignments=order.assignments)), 8)


def test_a_cluster_makes_the_exports_first_and_takes_no_gpu(tmp_path: Path) -> None:
    empty = Cluster(tmp_path, None)
    empty.tanren.environment["TANREN_MERGE_PYTHON"] = sys.executable
    leave(empty.runs, "midtrain", saved=(80, 160))
    done = empty.stage("merge", "--needs", sets=soup("stage:midtrain", "stage:midtrain@80"))
    assert done.code == 2
    assert "stage:midtrain@80: and stage:midtrain are exports of one run" in done.err
    assert not empty.queue.exists()
    done = empty.stage("merge", "--needs", "--runtime", "native",
                       sets=soup("stage:midtrain@80", "stage:midtrain-b"))  # fmt: skip
    assert done.code == 0, done.text
    folders = [Path(job["words"][-1]).parent.name for job in empty.jobs]
    assert folders == ["export", "preprocess", "convert", "midtrain-b", "export-b", "merge"]
    ids = [job["id"] for job in empty.jobs]
    assert f"--dependency=afterok:{ids[0]}:{ids[4]}" in empty.jobs[-1]["words"]
    assert "export TANREN_MERGE_PYTHON=" in (empty.runs / "tiny" / "merge" / "job.sh").read_text()
    order = Order(RECIPE, site="abci3")
    _, recipe = orders.recipe_of(order)
    place = queue.place_of("abci3", recipe, "merge", order.wish, queue.User(group="g"))
    assert place.type.gpus == 0


# Both are Hugging Face folders already.
BASE_AND_SFT = soup("stage:convert", "stage:sft")


@pytest.fixture
def poured(prepared: Path, tmp_path: Path) -> Tanren:
    """A command with a base and the export of a tuned model, and a mergekit that takes means."""
    shutil.copytree(prepared / "tiny", tmp_path / "runs" / "tiny")
    tiny = tmp_path / "runs" / "tiny"
    tuned = Path(shutil.copytree(tiny / "convert" / "hf" / "base", tiny / "sft/hf/iter_0000006"))
    (tuned / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    return Tanren(
        tmp_path / "runs", {"TANREN_MERGE_PYTHON": sys.executable, "PYTHONPATH": str(FAKE)}
    )


def test_the_whole_road_and_what_stands_on_a_soup(
    poured: Tanren, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = poured("merge", str(RECIPE), sets=BASE_AND_SFT)
    assert done.code == 0, done.text
    assert "soup       linear of 2 models" in done.out
    folder = RunFolder(poured.folder("merge"))
    merged = folder.hf_merged
    passport = json.loads(folder.passport.read_bytes())["attempts"][-1]
    assert sorted(passport["inputs"]) == ["model stage:convert", "model stage:sft"]
    assert sorted(passport["made"]) == ["export", "weights"]
    assert [(Path(one["run"]).name, one["stage"]) for one in passport["from"]] == [
        ("convert", "convert")
    ]
    # Done is done; another soup is another run.
    done = poured("merge", str(RECIPE), sets=BASE_AND_SFT)
    assert (done.code, done.out.splitlines()[0][:14]) == (0, "merge is done:"), done.text
    done = poured("merge", str(RECIPE), sets=(*BASE_AND_SFT, "seed=7"))
    refused(done, 2, "merge", "was made with other settings: seed 1234 there, 7 here")
    # An export that was removed since does not undo it.
    before = (merged / "model.safetensors").stat().st_mtime_ns
    shutil.rmtree(poured.folder("sft") / "hf")
    done = poured("merge", str(RECIPE), sets=BASE_AND_SFT)
    assert done.code == 0, done.text
    assert (merged / "model.safetensors").stat().st_mtime_ns == before
    monkeypatch.setenv("RUNS", str(poured.runs))
    monkeypatch.setenv("RUNTIME", "native")
    order = Order(RECIPE)
    assert tools.newest_export(order) == merged
    assert tools.asks_by_template("merge", merged)
    scored = make_plan(read_request(Order(RECIPES / "eval.yaml", assignments=("of=stage:merge",))))
    assert isinstance(scored, EvaluationPlan)
    assert (scored.model, scored.iteration, scored.chat) == (str(merged), None, True)
    assert scored.run == str(poured.folder("eval.merge"))


def test_a_model_of_the_hub_is_fetched_first(poured: Tanren, fake_hub: Hub) -> None:
    base = poured.folder("convert") / "hf" / "base"
    fake_hub.repository("models/owner/base").commit(
        {path.name: path.read_bytes() for path in base.iterdir()}, "v1"
    )
    sets = soup("owner/base@v1", "stage:sft", dtype="float32")
    done = poured("merge", str(RECIPE), sets=sets)
    assert done.code == 0, done.text
    assert "hf:owner/base@v1 is there: " in done.out
    passport = json.loads((poured.folder("merge") / "passport.json").read_bytes())
    assert passport["attempts"][-1]["inputs"]["model owner/base@v1"]["revision"]
    # The export is a copy of the base, so the mean is the base.
    merged = poured.folder("merge") / "hf" / "merged" / "model.safetensors"
    assert load_file(merged).keys() == load_file(base / "model.safetensors").keys()
    for name, tensor in load_file(merged).items():
        assert tensor.equal(load_file(base / "model.safetensors")[name]), name


@pytest.mark.long
def test_training_goes_on_from_a_soup(poured: Tanren) -> None:
    done = poured("merge", str(RECIPE), "--name", "b", sets=BASE_AND_SFT)
    assert done.code == 0, done.text
    done = poured.sft("--name", "b", sets=("init=stage:merge",))
    assert done.code == 0, done.text
    plan = read_plan(RunFolder(poured.folder("sft-b")).plan)
    assert isinstance(plan, SftPlan)
    merged = RunFolder(poured.folder("merge-b")).hf_merged
    assert (plan.start, plan.tokenizer) == (f"hf:{merged}", str(merged))
    done = poured.sft("--name", "c", sets=("init=stage:merge",))
    refused(done, 2, "sft-c", "stands on merge-c, which has not been made")
