"""Recipes that take something from the hub: planned, refused, fetched, marked."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tanren import runs
from tanren.config.data import Source
from tanren.config.errors import RequestError
from tanren.config.load import read_recipe
from tanren.convert import hf
from tanren.data import fetch, hub
from tanren.data.sources import files_of
from tanren.launch import changes, container, fetching, inputs, reading
from tanren.launch.orders import Order
from tanren.plan.make import make_plan
from tanren.plan.paths import RunFolder
from tanren.plan.plan import read_plan
from tests.conftest import RECIPES, REPOSITORY, Tanren
from tests.data.fake_hub import Hub

LINE = (
    b'{"text": "%s, and what else a sentence, a page and a whole book need, from its first word '
    b'over every name, number and quotation to the last full stop, to be learned from."}\n'
)
WEB = {f"ja/{name}.jsonl": LINE % name.encode() * 40 for name in "abc"} | {"README.md": b"hi\n"}


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A task whose text and base are on the hub."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "preprocess.yaml").write_text(
        "tokenizer: {train: {vocabulary_size: 300}}\n"
        'sources: [{name: web, hf: o/corpus, files: ["ja/[ab].jsonl", "ja/c*"]}]\n'
    )
    (folder / "convert.yaml").write_text(
        "model: tiny\nsource: hf:o/base@v1\ntokenizer: stage:preprocess\n"
    )
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return folder


def order(task: Path, stage: str = "preprocess") -> Order:
    return Order(task / f"{stage}.yaml", runtime="native")


def make_hub(fake_hub: Hub) -> tuple[str, str]:
    base = fake_hub.repository("models/o/base").commit({"config.json": b"{}"}, "v1")
    return fake_hub.repository("datasets/o/corpus").commit(WEB), base


def test_a_recipes_parts_by_name(task: Path) -> None:
    (task / "preprocess.yaml").write_text(
        "tokenizer: {hf: o/base@v1}\n"
        "sources: [{name: web, hf: o/corpus, files: [a.jsonl]}, {name: own, path: b.jsonl}]\n"
    )
    _, recipe = read_recipe(task / "preprocess.yaml", None, [])
    assert inputs.hub_parts(recipe) == {
        "tokenizer": hub.tokenizer_of("o/base@v1"),
        "web": hub.Wanted(hub.Reference("dataset", "o/corpus"), ("a.jsonl",)),
    }
    _, recipe = read_recipe(task / "convert.yaml", None, [])
    assert inputs.hub_parts(recipe) == {"base": hub.model_of("o/base@v1")}
    for base in ("hf:/models/base", "random"):
        _, recipe = read_recipe(task / "convert.yaml", None, [f"source={base}"])
        assert inputs.hub_parts(recipe) == {}
    _, recipe = read_recipe(task / "convert.yaml", None, ["source=hf:nothing"])
    with pytest.raises(RequestError, match="neither a folder here nor a repository"):
        inputs.hub_parts(recipe)


def test_a_plan_is_there_before_its_files(fake_hub: Hub, bare: Tanren, task: Path) -> None:
    corpus, _ = make_hub(fake_hub)
    before = bare("plan", str(task / "preprocess.yaml"))
    assert before.code == 0, before.text
    assert "source web  hf:o/corpus ja/[ab].jsonl ja/c*" in before.out
    assert "hf:o/corpus@main (web) is not fetched yet: make fetch TASK=mine" in before.out
    assert "hf:o/corpus@main (web) is not pinned; the first fetch remembers" in before.out
    assert fake_hub.asked == []
    fetched = bare("fetch", str(task))
    assert fetched.code == 0, fetched.text
    assert "3 files of" in fetched.out
    assert "hf:o/base@v1 is there" in fetched.out
    after = bare("plan", str(task / "preprocess.yaml"))
    assert "not fetched" not in after.out
    assert f"write o/corpus@{corpus}" in after.out


def test_a_pinned_reference_needs_no_note(fake_hub: Hub, task: Path) -> None:
    commit, _ = make_hub(fake_hub)
    fetch.fetch(hub.Wanted(hub.parse(f"o/corpus@{commit}", "dataset"), ("ja/*",)))
    source = f'[{{name: web, hf: o/corpus@{commit}, files: ["ja/*"]}}]'
    _, recipe = read_recipe(task / "preprocess.yaml", None, [f"sources={source}"])
    assert fetching.notes(recipe, "mine") == []


def test_a_mark_is_the_commit_and_the_files(fake_hub: Hub, task: Path) -> None:
    first, _ = make_hub(fake_hub)
    request = reading.read_request(order(task))
    assert request.inputs == {"web": None}
    fetching.fetch_missing(request.recipe, quiet, lambda _: None)
    mark = reading.read_request(order(task)).inputs["web"]
    assert mark is not None
    assert mark.startswith(f"{first}: 3 files of ")
    # Other files of the same repository change nothing.
    fetch.fetch(hub.Wanted(hub.parse("o/corpus", "dataset"), ("**",)))
    assert reading.read_request(order(task)).inputs["web"] == mark
    second = fake_hub.repositories["datasets/o/corpus"].commit({**WEB, "ja/cc.jsonl": LINE % b"d"})
    wanted = inputs.hub_parts(request.recipe)["web"]
    fetch.fetch(wanted, update=True)
    moved = reading.read_request(order(task)).inputs["web"]
    assert moved is not None
    assert moved.startswith(f"{second}: 4 files of ")


class quiet:  # noqa: N801
    """A screen that shows nothing."""

    def __enter__(self) -> fetch.Report:
        return lambda _: None

    def __exit__(self, *_: object) -> None: ...


def test_a_run_fetches_and_knows_when_its_text_moved(
    fake_hub: Hub, bare: Tanren, task: Path
) -> None:
    """The whole stage: fetched, made, done; an update makes it another one; text may be removed."""
    make_hub(fake_hub)
    recipe = str(task / "preprocess.yaml")
    done = bare("preprocess", recipe)
    assert done.code == 0, done.text
    assert "hf:o/corpus@main is there" in done.out
    folder = RunFolder(bare.runs / "mine" / "preprocess")
    result = runs.result_of(folder)
    assert result is not None
    assert result["sources"][0]["documents"] == 120
    assert read_plan(folder.plan).settings["inputs"]["web"].endswith(")")
    fake_hub.asked.clear()
    assert "is done" in bare("preprocess", recipe).out
    assert fake_hub.asked == []
    data = Path(os.environ["DATA"])
    data.rename(data.with_name("away"))
    assert "is done" in bare("preprocess", recipe).out
    assert changes.below(order(task, "convert"), reading.read_request(order(task, "convert"))) == []
    data.with_name("away").rename(data)
    fake_hub.repositories["datasets/o/corpus"].commit({**WEB, "ja/c.jsonl": LINE % b"other"})
    moved = bare("fetch", recipe, "--update")
    assert "moved from" in moved.out
    again = bare("preprocess", recipe)
    assert again.code == 2
    assert "was made with other settings: inputs.web" in again.err
    noticed = changes.below(order(task, "convert"), reading.read_request(order(task, "convert")))
    assert ["was made from other files" in change.problem for change in noticed] == [True]


def test_a_cluster_is_given_no_job_whose_files_are_not_here(
    fake_hub: Hub, bare: Tanren, task: Path, tmp_path: Path
) -> None:
    """Also where what is missing is another stage's, and before that one is submitted."""
    make_hub(fake_hub)
    calls = tmp_path / "calls"
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("sbatch", "squeue"):
        (tools / name).write_text(f'#!/bin/sh\necho {name} >>{calls}\necho "Submitted 5"\n')
        (tools / name).chmod(0o755)
    site = tmp_path / "site.yaml"
    site.write_text((REPOSITORY / "recipes" / "sites" / "slurm.yaml").read_text())
    bare.environment["PATH"] = f"{tools}:{os.environ['PATH']}"
    shutil.copy(RECIPES / "midtrain.yaml", task)
    words = ("midtrain", str(task / "midtrain.yaml"), "--site", str(site), "--type", "cpu")
    for part in ("hf:o/corpus@main: (web)", "hf:o/base@v1: (base)"):
        refused = bare(*words, "--needs")
        assert refused.code == 2
        assert f"{part} is not fetched yet" in refused.err
        assert "next: make fetch TASK=mine" in refused.err
        _, recipe = read_recipe(task / "preprocess.yaml", None, [])
        fetch.fetch(inputs.hub_parts(recipe)["web"])
    assert not calls.exists()


def test_a_base_is_located_where_it_was_fetched(fake_hub: Hub, tmp_path: Path) -> None:
    make_hub(fake_hub)
    folder = hf.locate("o/base@v1")
    assert hf.read_config(folder) == {}
    fake_hub.asked.clear()
    assert hf.locate("o/base@v1") == folder
    assert fake_hub.asked == []
    assert (folder.parents[3], False) in container.binds(None, tmp_path)


def test_files_of_a_source(fake_hub: Hub, tmp_path: Path) -> None:
    make_hub(fake_hub)
    source = Source(name="web", hf="o/corpus", files=("ja/c*", "ja/a*"))
    with pytest.raises(hub.NotFetchedError, match="is not fetched yet"):
        files_of(source)
    found = fetch.fetch(hub.Wanted(hub.parse("o/corpus", "dataset"), source.files))
    assert files_of(source) == [found.folder / "ja" / "a.jsonl", found.folder / "ja" / "c.jsonl"]
    for name in ("z/b.jsonl", "z/a/c.jsonl", "z/README.md", "a.jsonl"):
        (tmp_path / "text" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "text" / name).write_text("")
    below = files_of(Source(name="own", path=f"{tmp_path}/text/*"))
    assert [str(p.relative_to(tmp_path / "text")) for p in below] == [
        "a.jsonl", "z/a/c.jsonl", "z/b.jsonl",
    ]  # fmt: skip
    assert files_of(Source(name="python", python_documentation="topics")) == []
    (tmp_path / "text" / "empty").mkdir()
    with pytest.raises(RequestError, match="holds no data file"):
        files_of(Source(name="own", path=f"{tmp_path}/text/*"))


def test_what_a_command_line_names(fake_hub: Hub, task: Path) -> None:
    def named(*targets: str, kind: hub.Kind = "dataset", globs: tuple[str, ...] = ()) -> list[str]:
        found = fetching.of_targets(targets, None, kind, globs)
        return [f"{w.reference.kind} {w.reference} {' '.join(w.globs)}" for w in found]

    assert named("hf:o/a@v1") == ["dataset hf:o/a@v1 **"]
    assert named("hf:o/a", globs=("*.txt",)) == ["dataset hf:o/a@main *.txt"]
    assert named("hf:o/a", kind="model") == [f"model hf:o/a@main {' '.join(hub.MODEL_FILES)}"]
    both = named(str(task), str(task / "convert.yaml"))
    assert [line.split()[1] for line in both] == ["hf:o/corpus@main", "hf:o/base@v1"]
    with pytest.raises(RequestError, match="goes with hf:owner/name"):
        named(str(task), globs=("*",))
    with pytest.raises(RequestError, match="holds no recipe of a stage"):
        named(str(task.parent))


def test_a_plan_names_what_it_does_not_have(fake_hub: Hub, task: Path) -> None:
    plan = make_plan(reading.read_request(order(task)))
    assert plan.settings["inputs"] == {"web": None}
