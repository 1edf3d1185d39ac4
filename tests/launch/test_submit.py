"""What a request finds: new, done, to go on, changed, or standing on what is not there."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from tanren import runs
from tanren.cli.run import run_stage
from tanren.config.errors import RequestError
from tanren.config.load import read_model
from tanren.launch import changes, orders, origins, reading, submit
from tanren.launch.orders import Order
from tanren.launch.preview import preview
from tanren.plan.make import make_plan
from tanren.plan.paths import RunFolder
from tanren.plan.plan import SftPlan, read_plan
from tanren.report import terminal
from tests.conftest import RECIPES, REPOSITORY

SHAPE = read_model("tiny").model_dump(mode="json")


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny recipes in a folder of their own, and nothing run yet."""
    shutil.copytree(RECIPES, tmp_path / "tiny")
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path / "tiny"


def finish(task: Path, stage: str, result: dict[str, object], *products: str) -> RunFolder:
    """Leave what a finished stage leaves."""
    plan = make_plan(reading.read_request(Order(task / f"{stage}.yaml")))
    for product in products:
        (plan.folder.root / product).mkdir(parents=True)
    plan.folder.root.mkdir(parents=True, exist_ok=True)
    runs.write_json(plan.folder.plan, json.loads(plan.model_dump_json()))
    runs.mark_done(plan.folder, {"identity": stage, **result})
    return plan.folder


def finish_preprocess(task: Path) -> RunFolder:
    sources = [
        {"name": "reference", "tokens": 900_000, "documents": 90},
        {"name": "docstrings", "tokens": 900_000, "documents": 90},
    ]
    result: dict[str, object] = {"sources": sources, "tokens": 1_800_000, "vocabulary_size": 2048}
    return finish(task, "preprocess", result, "tokens", "tokenizer")


def look(task: Path, stage: str) -> submit.Start:
    return submit.look(make_plan(reading.read_request(Order(task / f"{stage}.yaml"))))


def test_missing_stages_are_named_in_the_order_to_make_them(task: Path) -> None:
    order = Order(task / "midtrain.yaml", variant=None, name="a", assignments=("steps=400",))
    found = reading.missing(order, reading.read_request(order))
    assert [needed.recipe_file.stem for needed in found] == ["preprocess", "convert"]
    assert all(needed.name is None and needed.assignments == () for needed in found)
    finish_preprocess(task)
    found = reading.missing(order, reading.read_request(order))
    assert [needed.recipe_file.stem for needed in found] == ["convert"]
    export = Order(task / "export.yaml")
    (wanted,) = reading.missing(export, reading.read_request(export))
    assert wanted.command("midtrain").endswith("tiny/midtrain.yaml")


@pytest.mark.parametrize("stage", ["export", "eval"])
def test_an_export_of_a_name_that_was_never_trained_trains_nothing(task: Path, stage: str) -> None:
    """It may be a mistake; but what was begun, or only submitted, is waited for."""
    named, bare = Order(task / f"{stage}.yaml", name="typo"), Order(task / f"{stage}.yaml")
    with pytest.raises(RequestError, match="midtrain-typo: there is no such run") as refused:
        reading.missing(named, reading.read_request(named))
    assert str(refused.value.next_step).endswith("tiny/midtrain.yaml --name typo --needs")
    assert "midtrain-typo: there is no such run" in preview(named).refused[0]
    runs_folder = orders.runs_root() / "tiny"
    for name in ("midtrain-gate-bf16", "midtrain_old", "midtrain-a"):
        if name == "midtrain-a":
            # A gate's runs are none to export, and what is no run's folder is none.
            assert reading.missing(bare, reading.read_request(bare))
        RunFolder(runs_folder / name).root.mkdir(parents=True)
        RunFolder(runs_folder / name).order.write_text("{}")
    for order in (named, bare):
        with pytest.raises(RequestError, match=r"there is no such run \(there is midtrain-a\)"):
            reading.missing(order, reading.read_request(order))
    (wanted, *_) = reading.missing(
        replace(named, name="a"), reading.read_request(replace(named, name="a"))
    )
    assert wanted.name == "a"
    # A pipeline's is made with all that it stands on.
    derived = replace(named, plain_if_absent=True)
    assert reading.missing(derived, reading.read_request(derived))


def test_a_file_where_runs_should_go_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("RUNS", str(tmp_path / "file" / "runs"))
    with pytest.raises(RequestError, match=f"{tmp_path}/file is a file"):
        orders.runs_root()
    monkeypatch.setenv("RUNS", str(tmp_path / "not" / "there"))
    assert orders.runs_root() == tmp_path / "not" / "there"


def test_a_stage_whose_product_was_removed_is_missing_again(task: Path) -> None:
    folder = finish_preprocess(task)
    assert look(task, "preprocess").done
    shutil.rmtree(folder.tokens)
    assert not look(task, "preprocess").done
    order = Order(task / "convert.yaml")
    assert reading.missing(order, reading.read_request(order))


def test_other_settings_on_a_finished_run_are_refused(task: Path) -> None:
    finish_preprocess(task)
    order = Order(task / "preprocess.yaml", assignments=("append_eod=false",))
    with pytest.raises(RequestError) as refused:
        submit.look(make_plan(reading.read_request(order)))
    assert "was made with other settings: append_eod True there, False here" in str(refused.value)
    assert refused.value.next_step == (
        "give the new run a name (NAME=... or --name; what reads it wants --set "
        "data=stage:preprocess-NAME, convert --set tokenizer=), or rm -r "
        f"{reading.read_request(order).folder.root}"
    )


def test_a_changed_file_is_another_setting(task: Path) -> None:
    (task / "web.jsonl").write_text('{"text": "a"}\n')
    with (task / "preprocess.yaml").open("a") as recipe:
        recipe.write("  - name: web\n    path: web.jsonl\n")
    finish_preprocess(task)
    assert look(task, "preprocess").done
    (task / "web.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    with pytest.raises(RequestError, match=r"inputs\.web 1 files of 14 bytes .* 1 files of 28"):
        look(task, "preprocess")


def test_files_that_changed_after_they_became_tokens_are_noticed(task: Path) -> None:
    corpus, folder = add_web(task), finish_preprocess(task)
    order = Order(task / "convert.yaml")
    assert changes.below(order, reading.read_request(order)) == []
    corpus.write_text('{"text": "a"}\n{"text": "b"}\n')
    (change,) = changes.below(order, reading.read_request(order))
    assert change.place == str(folder.root)
    assert "was made from other files: web 1 files of 14 bytes" in change.problem
    assert "1 files of 28 bytes" in change.problem
    assert f"rm -r {folder.root}" in change.next_step
    corpus.unlink()
    assert changes.below(order, reading.read_request(order)) == []


def add_web(task: Path) -> Path:
    corpus = task / "web.jsonl"
    corpus.write_text('{"text": "a"}\n')
    with (task / "preprocess.yaml").open("a") as recipe:
        recipe.write("  - name: web\n    path: web.jsonl\n")
    return corpus


def test_files_of_another_time_and_the_same_content_are_no_change(task: Path) -> None:
    corpus, order = add_web(task), Order(task / "convert.yaml")
    folder = finish_preprocess(task)
    plan = read_plan(folder.plan)
    runs.write_json(folder.passport, {"attempts": [{"inputs": origins.inputs_of(plan)}]})
    os.utime(corpus, (1, 1))
    assert look(task, "preprocess").done
    assert changes.below(order, reading.read_request(order)) == []
    # The same size, another letter.
    corpus.write_text('{"text": "b"}\n')
    with pytest.raises(RequestError, match=r"other settings: inputs\.web"):
        look(task, "preprocess")
    (change,) = changes.below(order, reading.read_request(order))
    assert "was made from other files: web" in change.problem
    # Of a file that a passport has not read as a whole, and without one, time is all there is.
    corpus.write_text('{"text": "a"}\n')
    inputs = origins.inputs_of(plan)
    inputs["data web"]["sampled"] = True
    runs.write_json(folder.passport, {"attempts": [{"inputs": inputs}]})
    with pytest.raises(RequestError, match=r"other settings: inputs\.web"):
        look(task, "preprocess")
    corpus.write_text('{"text": "a"}\n')
    folder.passport.unlink()
    with pytest.raises(RequestError, match=r"other settings: inputs\.web"):
        look(task, "preprocess")


def test_an_edited_recipe_below_is_noticed(task: Path) -> None:
    folder = finish_preprocess(task)
    finish(task, "convert", {"iteration": 0, "hf": str(task), "model": SHAPE},
           "checkpoints/iter_0000000")  # fmt: skip
    order, recipe = Order(task / "midtrain.yaml"), task / "preprocess.yaml"
    plain = recipe.read_text()
    assert changes.below(order, reading.read_request(order)) == []
    recipe.write_text(plain + "append_eod: false\n")
    (change,) = changes.below(order, reading.read_request(order))
    assert change.problem == "was made with other settings: append_eod True there, False here"
    with pytest.raises(RequestError, match="append_eod True there"):
        run_stage(replace(order, runtime="native", site="local"), True, Console())
    said: list[str] = []
    changes.refuse_below(order, reading.read_request(order), False, said.append)
    assert said[0].endswith("False here; this run has what was there before")
    # convert reads the tokenizer alone.
    convert = Order(task / "convert.yaml")
    assert changes.below(convert, reading.read_request(convert)) == []
    recipe.write_text(plain.replace("vocabulary_size: 2048", "vocabulary_size: 1024"))
    (change,) = changes.below(convert, reading.read_request(convert))
    assert "tokenizer.train.vocabulary_size 2048 there, 1024 here" in change.problem
    # A recipe that cannot be read is not what midtraining needs.
    recipe.write_text("sources: [")
    assert changes.below(order, reading.read_request(order)) == []
    recipe.write_text(plain)
    # A field that this version has and that one had not is what it is by default.
    made = runs.read_json(folder.plan)
    del made["settings"]["append_eod"]
    runs.write_json(folder.plan, made)
    assert changes.below(order, reading.read_request(order)) == []


def test_the_same_recipe_of_another_checkout_is_no_change(
    task: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for one in ("a", "b"):
        shutil.copytree(task, tmp_path / one / "recipes" / "tiny")
        add_web(tmp_path / one / "recipes" / "tiny")
        os.utime(tmp_path / one / "recipes" / "tiny" / "web.jsonl", (1, 1))
    finish_preprocess(tmp_path / "a" / "recipes" / "tiny")
    order = Order(tmp_path / "b" / "recipes" / "tiny" / "midtrain.yaml")
    assert changes.below(order, reading.read_request(order)) == []
    with (order.recipe_file.with_name("preprocess.yaml")).open("a") as recipe:
        recipe.write("prepend_bos: true\n")
    assert len(changes.below(order, reading.read_request(order))) == 1


def test_a_task_may_lie_near_the_root() -> None:
    plan = make_plan(reading.read_request(Order(RECIPES / "preprocess.yaml", site="local")))
    near = plan.model_copy(update={"recipe_file": "/t/preprocess.yaml"})
    assert changes._from_here({"path": "/t/a", "n": 1}, near) == {"path": "/t/a", "n": 1}
    assert changes._from_here({"path": str(RECIPES / "a")}, plan) == {"path": "recipes/tiny/a"}


def test_what_set_made_of_a_recipe_below_is_no_change(task: Path) -> None:
    finish_preprocess(task)
    sets = ("append_eod=false", "sources=[{name: reference, path: a.jsonl}]")
    (task / "a.jsonl").write_text('{"text": "a"}\n')
    made = make_plan(reading.read_request(Order(task / "preprocess.yaml", assignments=sets)))
    runs.write_json(made.folder.plan, json.loads(made.model_dump_json()))
    order = Order(task / "convert.yaml")
    assert changes.below(order, reading.read_request(order)) == []


def test_trials_share_a_base_that_has_no_run_of_their_name(task: Path) -> None:
    order = Order(task / "sft.yaml", name="a")

    def base() -> str:
        (product,) = (p for p in reading.read_request(order).products.values()
                      if p.stage == "midtrain")  # fmt: skip
        return product.folder.root.name

    assert base() == "midtrain-a"
    with pytest.raises(RequestError, match="stands on midtrain-a, which has not been made"):
        reading.refuse_missing(order, reading.read_request(order))
    result = {"iteration": 320, "hf": "/hf", "tokenizer": "/tokenizer", "model": SHAPE}
    finish(task, "midtrain", result, "checkpoints/iter_0000320")
    assert base() == "midtrain"
    request = reading.read_request(order)
    assert reading.missing(order, request) == []
    plan = make_plan(request)
    assert isinstance(plan, SftPlan)
    assert plan.start.endswith("runs/tiny/midtrain/checkpoints/iter_0000320")
    assert plan.notes == ("its base is midtrain: there is no midtrain-a",)
    # An export is of the run of its own name alone.
    export = reading.read_request(Order(task / "export.yaml", name="a"))
    assert list(export.products) == ["midtrain-a"]
    assert export.products["midtrain-a"].folder.root.name == "midtrain-a"
    own = RunFolder(task.parent / "runs" / "tiny" / "midtrain-a")
    own.root.mkdir()
    shutil.copy(task.parent / "runs" / "tiny" / "midtrain" / "plan.json", own.plan)
    assert base() == "midtrain-a", "as soon as it has begun"
    # A run keeps to the base that it was given.
    begun = RunFolder(task.parent / "runs" / "tiny" / "sft-a")
    begun.root.mkdir()
    assert plan.base == "midtrain"
    runs.write_json(begun.plan, json.loads(plan.model_dump_json()))
    assert base() == "midtrain"
    assert submit.look(make_plan(reading.read_request(order))).iteration is None


def test_a_plan_needs_no_text_of_the_stage_below(task: Path) -> None:
    """Where what is below cannot be planned yet, its name is said all the same."""
    with (task / "preprocess.yaml").open("a") as recipe:
        recipe.write("  - name: web\n    path: not-here.jsonl\n")
    found = preview(Order(task / "midtrain.yaml", runtime="native", site="local"))
    assert found.first == (("preprocess", None), ("convert", None))
    assert found.state.startswith("new; preprocess, convert must be made first")
    assert found.refused == []


def test_a_variant_with_a_recipe_of_its_own_takes_no_other_base(task: Path) -> None:
    order = Order(task / "sft.yaml", variant="v2", name="a")
    for name in ("midtrain", "sft"):
        (task / f"{name}.v2.yaml").write_text(f"base: {name}.yaml\n")

    def base() -> str:
        (product,) = (p for p in reading.read_request(order).products.values()
                      if p.stage == "midtrain")  # fmt: skip
        return product.folder.root.name

    result = {"iteration": 320, "hf": "/hf", "tokenizer": "/tokenizer", "model": SHAPE}
    finish(task, "midtrain", result, "checkpoints/iter_0000320")
    assert base() == "midtrain.v2-a"
    own = RunFolder(task.parent / "runs" / "tiny" / "midtrain.v2")
    own.root.mkdir()
    shutil.copy(task.parent / "runs" / "tiny" / "midtrain" / "plan.json", own.plan)
    assert base() == "midtrain.v2", "a trial of the variant shares its base"
    shutil.rmtree(own.root)
    (task / "midtrain.v2.yaml").unlink()
    assert base() == "midtrain"


def test_an_export_is_done_only_while_its_model_is_there(task: Path, tmp_path: Path) -> None:
    finish_preprocess(task)
    trained = RunFolder(tmp_path / "runs" / "tiny" / "midtrain")
    (trained.checkpoint(320)).mkdir(parents=True)
    (trained.checkpoint(320) / "files.json").write_text("{}")
    plan = make_plan(reading.read_request(Order(task / "midtrain.yaml")))
    runs.write_json(trained.plan, json.loads(plan.model_dump_json()))
    runs.mark_done(trained, {"identity": "m", "iteration": 320})
    model = trained.export(320)
    model.mkdir(parents=True)
    finish(task, "export", {"hf": str(model)})
    assert look(task, "export").done
    model.rmdir()
    assert not look(task, "export").done
    model.mkdir()
    runs.mark_done(trained, {"identity": "another", "iteration": 320})
    assert not look(task, "export").done


MIX = "mix.ratios={docstrings: 0.5}"


def begin(task: Path, iteration: int, *sets: str) -> RunFolder:
    """Leave what a training run of some steps leaves."""
    finish_preprocess(task)
    plan = make_plan(reading.read_request(Order(task / "midtrain.yaml", assignments=sets)))
    checkpoint = plan.folder.checkpoint(iteration)
    checkpoint.mkdir(parents=True)
    (checkpoint / "files.json").write_text("{}")
    runs.write_json(plan.folder.plan, json.loads(plan.model_dump_json()))
    return plan.folder


def look_on(task: Path, *sets: str) -> submit.Start:
    order = Order(task / "midtrain.yaml", assignments=sets)
    return submit.look(make_plan(reading.read_request(order)))


def test_new_data_are_refused_unless_the_recipe_allows_them(task: Path) -> None:
    begin(task, 80)
    assert look_on(task).iteration == 80
    with pytest.raises(RequestError) as refused:
        look_on(task, MIX)
    assert "was begun with other settings: mix.ratios.docstrings None" in refused.value.problem
    assert refused.value.next_step.startswith("--set resume=new-data goes on with the new data")
    start = look_on(task, MIX, "resume=new-data")
    assert start.iteration == 80
    assert start.plan.stage == "midtrain"
    assert start.plan.data_start == 80


def test_a_run_at_work_is_not_to_be_removed(task: Path) -> None:
    folder = begin(task, 80)
    with pytest.raises(RequestError, match="was begun with other settings") as refused:
        look_on(task, "seed=5")
    assert refused.value.next_step == (
        'the settings of then, SET="..." among them, go on with it; or give the new run a name '
        f"(NAME=... or --name), or rm -r {folder.root}"
    )
    with runs.locked(folder.lock), pytest.raises(RequestError) as refused:
        look_on(task, "seed=5")
    assert refused.value.next_step == (
        "it is at work now: wait for it, or give the new run a name (NAME=... or --name)"
    )


def test_a_checkpoint_that_is_not_there_is_refused_before_the_start(task: Path) -> None:
    there = task / "iter_0000500"
    order = Order(task / "midtrain.yaml", assignments=(f"init=checkpoint:{there}",))
    with pytest.raises(RequestError, match=f"init: there is no folder {there}"):
        orders.refuse_start(order, reading.read_request(order))
    there.mkdir()
    orders.refuse_start(order, reading.read_request(order))
    there.rmdir()
    begin(task, 80, f"init=checkpoint:{there}")
    # A run that has begun has all that it needs of its base.
    orders.refuse_start(order, reading.read_request(order))


def test_new_data_are_no_excuse_for_other_changes(task: Path) -> None:
    begin(task, 80)
    for other in ("optimizer.lr=1.0e-4", "steps=330", "seed=5"):
        with pytest.raises(RequestError, match="was begun with other settings") as refused:
            look_on(task, MIX, "resume=new-data", other)
        assert "resume=new-data" not in refused.value.next_step


def test_a_finished_run_takes_no_new_data(task: Path) -> None:
    runs.mark_done(begin(task, 320), {"identity": "m", "iteration": 320})
    with pytest.raises(RequestError, match="was made with other settings") as refused:
        look_on(task, MIX)
    assert "resume=new-data" not in refused.value.next_step
    with pytest.raises(RequestError, match="the run has 320 steps, and the new data would begin"):
        look_on(task, MIX, "resume=new-data")
    longer = ("steps=null", "mix.ratios={docstrings: 0.4}", "resume=new-data")
    with pytest.raises(RequestError, match="was made with other settings"):
        look_on(task, *longer)


def test_a_run_that_went_on_since_it_was_planned_is_planned_anew(task: Path) -> None:
    folder = begin(task, 80)
    order = Order(task / "midtrain.yaml", assignments=(MIX, "resume=new-data"))
    plan = make_plan(reading.read_request(order))
    folder.checkpoint(80).rename(folder.checkpoint(160))
    with pytest.raises(RequestError, match="has gone on to iteration 160 since this was planned"):
        submit.look(plan)


def test_where_the_data_began_is_kept_in_the_runs_plan(task: Path) -> None:
    folder = begin(task, 80)
    start = look_on(task, MIX, "resume=new-data")
    runs.write_json(folder.plan, json.loads(start.plan.model_dump_json()))
    folder.checkpoint(80).rename(folder.checkpoint(160))
    again = look_on(task, MIX)
    assert again.plan.stage == "midtrain"
    assert (again.iteration, again.plan.data_start) == (160, 80)
    shutil.rmtree(folder.checkpoints)
    runs.mark_done(folder, {"identity": "m", "iteration": 320})
    done = look_on(task, MIX)
    assert done.done, "its checkpoints were removed to save room"
    assert done.plan.stage == "midtrain"
    assert done.plan.data_start == 80


@pytest.mark.parametrize(
    ("stage", "assignment", "problem"),
    [
        ("midtrain", "init=stage:midtrain", "stage:midtrain is this run itself"),
        ("midtrain", "data=stage:convert", "stage:convert is a convert stage"),
        ("midtrain", "init=stage:preprocess", "stage:preprocess is a preprocess stage"),
        ("midtrain", "init=stage:cnvert", "names no stage"),
        ("export", "of=stage:convert", "stage:convert is a convert stage"),
        ("convert", "tokenizer=stage:midtrain", "stage:midtrain is a midtrain stage"),
    ],
)
def test_a_reference_to_the_wrong_stage_is_refused(
    task: Path, stage: str, assignment: str, problem: str
) -> None:
    order = Order(task / f"{stage}.yaml", assignments=(assignment,))
    with pytest.raises(RequestError) as refused:
        make_plan(reading.read_request(order))
    assert problem in str(refused.value)
    assert refused.value.next_step


@pytest.mark.parametrize(
    ("variant", "name"), [("a-b", None), (None, "a/b"), (None, "-a"), ("", None), (None, "あ")]
)
def test_a_name_that_is_no_part_of_a_folder_is_refused(
    task: Path, variant: str | None, name: str | None
) -> None:
    with pytest.raises(RequestError, match="cannot be part of a folder's name"):
        reading.read_request(Order(task / "midtrain.yaml", variant, name))


def test_a_following_stage_needs_no_variant_of_its_own(task: Path) -> None:
    (task / "midtrain.big.yaml").write_text("base: midtrain.yaml\nsteps: 400\n")
    order = Order(task / "export.yaml", "big", "a", plain_if_absent=True)
    request = reading.read_request(order)
    assert request.folder.root.name == "export.big-a"
    assert list(request.products) == ["midtrain.big-a"]
    with pytest.raises(RequestError, match="there is no such file"):
        reading.read_request(Order(task / "export.yaml", "big"))


def test_a_run_folder_that_cannot_be_made_is_no_crash(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(RequestError) as error:
        runs.make(RunFolder(tmp_path / "runs" / "tiny" / "midtrain"))
    assert "midtrain: cannot be made: Not a directory.\n  next: RUNS=" in str(error.value)


def test_too_small_a_disk_is_said_before_hours_of_preparation(
    task: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    order = Order(task / "midtrain.yaml", runtime="native", site="local")
    with pytest.raises(RequestError, match=r"has 1 MiB free, and the checkpoints of this run"):
        run_stage(order, True, Console())
    assert not (task.parent / "runs").exists()
    # A run that is done needs no more of it.
    finish(task, "midtrain", {"iteration": 320}, "checkpoints")
    monkeypatch.setattr(reading, "missing", lambda *_: [])
    monkeypatch.setattr(terminal, "summary", lambda *_: None)
    assert run_stage(order, True, Console()) == ()


def test_months_on_cpus_are_refused_but_where_the_run_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNS", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    order = Order(REPOSITORY / "recipes" / "llmjp4-8b" / "midtrain.yaml", site="local")
    with pytest.raises(RequestError, match="606 days on CPUs"):
        run_stage(order, True, Console())
    request = reading.read_request(order)
    runs.make(request.folder)
    runs.mark_done(request.folder, {"identity": "m"})
    orders.refuse_start(order, request)


def test_folders_for_a_container_are_noted_where_there_is_none(task: Path) -> None:
    order = Order(task / "midtrain.yaml", binds=("/data", "/gs"))
    assert submit.idle_binds(order, None) == [
        "BIND=/data /gs changes nothing: the stage runs in no container"
    ]
    assert submit.idle_binds(Order(task / "midtrain.yaml"), None) == []


def test_a_path_below_the_current_folder_is_shown_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert orders.shown(RECIPES / "midtrain.yaml") == "recipes/tiny/midtrain.yaml"
    assert orders.shown("/elsewhere/x") == "/elsewhere/x"
