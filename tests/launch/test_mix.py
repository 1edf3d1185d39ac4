"""A recipe's mix on its own: from data, from a table, and when they do not agree."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tanren import runs
from tanren.config.errors import RequestError
from tanren.data import indexed
from tanren.launch import reading
from tanren.launch.mix import compile_mix
from tanren.launch.orders import Order
from tanren.plan.make import make_plan
from tests.conftest import RECIPES

TOKENS = {"reference": 300, "docstrings": 200}
SMALL = ("steps=null", "sequence_length=10", "global_batch=5", "evaluation=null")


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny recipes in a folder of their own, and nothing run yet."""
    shutil.copytree(RECIPES, tmp_path / "tiny")
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "tiny"


def preprocess(task: Path, counted: dict[str, int]) -> None:
    """Leave what preprocess leaves: token files, and the counts that it wrote down."""
    plan = make_plan(reading.read_request(Order(task / "preprocess.yaml")))
    plan.folder.tokenizer.mkdir(parents=True)
    sources = []
    for name, tokens in TOKENS.items():
        indexed.write(plan.folder.tokens_of(name), [[1] * 10] * (tokens // 10), 300)
        sources.append({"name": name, "tokens": counted[name], "documents": tokens // 10})
    runs.write_json(plan.folder.plan, json.loads(plan.model_dump_json()))
    result = {"identity": "d", "sources": sources, "vocabulary_size": 300}
    runs.mark_done(plan.folder, result)


def order(task: Path, *sets: str) -> Order:
    return Order(task / "midtrain.yaml", assignments=(*SMALL, *sets))


def test_the_datas_counts_are_taken_where_the_token_files_have_them(task: Path) -> None:
    preprocess(task, TOKENS)
    _, mixture, notes = compile_mix(order(task, "mix.ratios={docstrings: 0.5}"), None)
    assert {source.name: source.used for source in mixture.sources} == {
        "reference": 300, "docstrings": 100,
    }  # fmt: skip
    assert mixture.steps == 8
    assert notes == ("counts of runs/tiny/preprocess",)


def test_counts_that_the_token_files_have_not_are_refused_with_both(task: Path) -> None:
    preprocess(task, {**TOKENS, "docstrings": 12_345})
    with pytest.raises(RequestError) as refused:
        compile_mix(order(task), None)
    assert refused.value.place.endswith("runs/tiny/preprocess/tokens/docstrings.idx")
    assert refused.value.problem == "counts 200 tokens, and preprocess wrote down 12,345"


def test_a_table_takes_the_datas_place_and_the_recipes_table_does_not(task: Path) -> None:
    (task / "counts.tsv").write_text("web\t1000\n")
    stated = order(task, "mix.counts=counts.tsv")
    _, mixture, notes = compile_mix(stated, None)
    assert (mixture.steps, notes) == (20, ("counts of tiny/counts.tsv: preprocess has not run",))
    preprocess(task, TOKENS)
    _, mixture, notes = compile_mix(stated, None)
    assert mixture.steps == 10
    assert notes[0] == "counts of runs/tiny/preprocess"
    assert notes[1].startswith("tiny/counts.tsv is not what preprocess counted: reference 0 there")
    _, mixture, notes = compile_mix(stated, task / "counts.tsv")
    assert mixture.steps == 20


def test_without_counts_the_ways_to_them_are_named(task: Path) -> None:
    with pytest.raises(RequestError) as refused:
        compile_mix(Order(task / "midtrain.yaml"), None)
    assert refused.value.place.endswith("runs/tiny/preprocess")
    assert refused.value.next_step == (
        "make preprocess, or bin/tanren mix tiny/midtrain.yaml --counts TABLE.tsv"
    )
    with pytest.raises(RequestError, match="stage:convert is a convert stage"):
        compile_mix(Order(task / "midtrain.yaml", assignments=("data=stage:convert",)), None)
    with pytest.raises(RequestError, match="has no mix"):
        compile_mix(Order(task / "convert.yaml"), None)
