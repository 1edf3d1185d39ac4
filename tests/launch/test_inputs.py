"""Paths of a recipe, and the marks that change when a file does."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tanren.config.data import Preprocess
from tanren.config.errors import RequestError
from tanren.config.load import read_recipe
from tanren.config.schema import Convert
from tanren.config.training import Midtrain
from tanren.launch.inputs import counts, marks, read_counts, with_absolute_paths
from tests.conftest import RECIPES


def preprocess(path: str, tokenizer: str | None = None) -> Preprocess:
    trained = {"train": {"vocabulary_size": 300}}
    recipe = {
        "tokenizer": {"path": tokenizer} if tokenizer else trained,
        "sources": [{"name": "web", "path": path}],
    }
    return Preprocess.model_validate_json(json.dumps(recipe))


def midtrain(init: str) -> Midtrain:
    _, recipe = read_recipe(RECIPES / "midtrain.yaml", None, [f"init={init}"])
    assert isinstance(recipe, Midtrain)
    return recipe


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("hf:base", "hf:{folder}/base"),
        ("hf:./new", "hf:{folder}/new"),
        ("hf:~/base", "hf:{home}/base"),
        ("hf:llm-jp/llm-jp-4-8b", "hf:llm-jp/llm-jp-4-8b"),
        ("hf:llm-jp/llm-jp-4-8b@v1", "hf:llm-jp/llm-jp-4-8b@v1"),
        ("checkpoint:iter_0000500", "checkpoint:{folder}/iter_0000500"),
        ("checkpoint:/a/iter_0000500", "checkpoint:/a/iter_0000500"),
        ("checkpoint:~/iter_0000500", "checkpoint:{home}/iter_0000500"),
        ("stage:convert", "stage:convert"),
        ("scratch", "scratch"),
        ("given", "given"),
    ],
)
def test_paths_begin_at_the_recipes_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str, meant: str
) -> None:
    (tmp_path / "base").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    found = with_absolute_paths(midtrain(written), tmp_path).init
    assert found == meant.format(folder=tmp_path, home=tmp_path / "home")
    convert = Convert(model="tiny", source="hf:base")
    assert with_absolute_paths(convert, tmp_path).source == f"hf:{tmp_path}/base"


def test_a_glob_is_the_recipes_and_not_its_folders(tmp_path: Path) -> None:
    folder = tmp_path / "task[1]"
    folder.mkdir()
    for name in ("a.jsonl", "b.jsonl", "c.txt"):
        (folder / name).write_text("{}")
    found = marks(with_absolute_paths(preprocess("*.jsonl"), folder))
    assert found["web"].startswith("2 files of 4 bytes (")


def test_a_mark_changes_with_the_file(tmp_path: Path) -> None:
    file = tmp_path / "web.jsonl"
    file.write_text('{"text": "a"}\n')
    recipe = with_absolute_paths(preprocess("web.jsonl"), tmp_path)
    before = marks(recipe)
    assert marks(recipe) == before
    facts = file.stat()
    file.write_text('{"text": "b"}\n')
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    assert marks(recipe) != before


def test_a_tokenizer_and_a_base_have_marks(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    (tmp_path / "web.jsonl").write_text("")
    recipe = with_absolute_paths(preprocess("web.jsonl", "model"), tmp_path)
    assert set(marks(recipe)) == {"tokenizer", "web"}
    assert set(marks(with_absolute_paths(midtrain("hf:model"), tmp_path))) == {"base"}
    assert marks(midtrain("stage:convert")) == {}


@pytest.mark.parametrize("init", ["hf:/nothing/there", "hf:./nothing"])
def test_a_base_that_is_not_there_is_refused_at_once(tmp_path: Path, init: str) -> None:
    with pytest.raises(RequestError, match="there is no such folder"):
        marks(with_absolute_paths(midtrain(init), tmp_path))


def test_a_table_of_counts_lies_beside_its_recipe(tmp_path: Path) -> None:
    text = "# tokens by source\n\nweb\t1000\ndclm/dclm-0000\t33257644821\n"
    (tmp_path / "counts.tsv").write_text(text)
    _, recipe = read_recipe(RECIPES / "midtrain.yaml", None, ["mix.counts=counts.tsv"])
    found = with_absolute_paths(recipe, tmp_path)
    assert counts(found) == {"web": 1_000, "dclm/dclm-0000": 33_257_644_821}
    assert counts(with_absolute_paths(midtrain("scratch"), tmp_path)) is None


@pytest.mark.parametrize(
    ("text", "place", "problem"),
    [
        ("web 1000\n", ":1", "'web 1000' is not NAME<TAB>TOKENS"),
        ("# a\nweb\t1,000\n", ":2", "'web\\t1,000' is not NAME<TAB>TOKENS"),
        ("web\t-1\n", ":1", "'web\\t-1' is not NAME<TAB>TOKENS"),
        ("web\t\n", ":1", "'web\\t' is not NAME<TAB>TOKENS"),
        ("../web\t1\n", ":1", "'../web\\t1' is not NAME<TAB>TOKENS"),
        ("web\t1\nmath\t2\n\nweb\t3\n", ":4", "counts web twice"),
        ("# nothing\n", "", "counts nothing"),
        (None, "", "cannot be read: No such file or directory"),
    ],
)
def test_a_mistake_in_a_table_is_named_by_its_line(
    tmp_path: Path, text: str | None, place: str, problem: str
) -> None:
    table = tmp_path / "counts.tsv"
    if text is not None:
        table.write_text(text)
    with pytest.raises(RequestError) as refused:
        read_counts(table)
    assert (refused.value.place, refused.value.problem) == (f"{table}{place}", problem)
    assert refused.value.next_step
