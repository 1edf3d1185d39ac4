"""--verify: two forms of one model agree, and whatever is wrong with one is found where it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tanren.config.errors import WorkError
from tanren.data import tokenizer as tokenizers
from tanren.stages import verify
from tests.conftest import Tanren, told_apart
from tests.convert import models
from tests.stages.verify_runs import SHAPE


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return told_apart("tests.stages.verify_runs", tmp_path_factory.mktemp("verify"))


@pytest.mark.parametrize("case", ["right", "right-tied", "right-scaled", "right-mistral"])
def test_two_forms_of_a_model_agree_in_every_layer(results: dict[str, Any], case: str) -> None:
    assert results[case]["failed"] is None
    assert results[case]["places"] == [
        "embedding",
        *(f"layer {n} {part}" for n in range(SHAPE.layers) for part in ("attention", "MLP")),
        "final norm",
        "logits",
    ]
    assert results[case]["largest"] < 5e-6
    assert results[case]["tokens"] == 48


@pytest.mark.parametrize(
    ("case", "where"),
    [
        ("by-projection", "layer 0 attention"),
        ("rotary-pairs", "layer 0 attention"),
        ("theta", "layer 0 attention"),
        ("no-scaling", "layer 0 attention"),
        ("scaling-factor", "layer 0 attention"),
        ("epsilon", "layer 0 attention"),
        ("gate-and-up", "layer 0 MLP"),
        ("one-layer", "layer 1 MLP"),
        ("two-layers", "layer 1 attention"),
        ("nan", "layer 2 MLP"),
        ("tied", "logits"),
    ],
)
def test_what_is_wrong_is_found_in_the_layer_where_it_is(
    results: dict[str, Any], case: str, where: str
) -> None:
    assert results[case]["failed"] == where
    # It ends there: what comes after differs because of it.
    assert results[case]["places"][-1] == where


def test_two_folders_are_compared_as_well(results: dict[str, Any]) -> None:
    assert results["hf-right"] is None
    assert results["hf-theta"] == "layer 0 attention"
    assert results["fewer"] == "the two models have 3 and 2 layers"


def test_a_conversion_compares_before_its_result_gets_its_name(results: dict[str, Any]) -> None:
    # Of what is rounded, what it is compared with is rounded, too.
    right = ("in", "out", "in-bf16", "out-bf16", "nemo1", "nemo2", "of-nemo1", "of-nemo2")
    for name in right:
        assert results[name] == [True, 2 * SHAPE.layers + 3, True], name
    for name in ("bug-in", "bug-nemo", "bug-out"):
        place, problem, left = results[name]
        assert Path(place).name == name
        assert problem.startswith("layer 0 attention computes something else")
        assert sorted(left) == sorted(right)


def test_the_command_prints_the_table(bare: Tanren, tmp_path: Path) -> None:
    models.write(tmp_path / "hf")
    done = bare("convert", "hf-to-mcore", str(tmp_path / "hf"), str(tmp_path / "mcore"), "--verify")
    assert done.code == 0, done.text
    assert done.err == ""
    words = [line.split()[:2] for line in done.out.splitlines()]
    for row in (["layer", "0"], ["layer", "2"], ["final", "norm"]):
        assert row in words, done.out
    assert "48 tokens, fp32" in done.out
    assert (tmp_path / "mcore" / "release").is_dir()


def test_a_failure_names_the_first_place_that_differs() -> None:
    rows = (verify.Difference("embedding", 0.0, 0.0), verify.Difference("layer 0 MLP", 0.3, 2e-2))
    with pytest.raises(WorkError, match=r"layer 0 MLP computes something else.* by 2\.0e-02 of"):
        verify.check(verify.Report(rows, 1e-4, 48, 1.0), "/hf")
    verify.check(verify.Report(rows[:1], 1e-4, 48, 1.0), "/hf")


def test_tokens_are_of_a_fixed_text_and_within_the_vocabulary(tmp_path: Path) -> None:
    tokenizer = tokenizers.train(["folds the steel"] * 9, 265, tmp_path)
    ids = verify.ids_for(tmp_path, SHAPE)
    assert len(ids) == 48
    assert ids[0] == tokenizer.bos
    assert max(ids) < SHAPE.vocabulary_size < tokenizer.size
    drawn = verify.ids_for(None, SHAPE)
    assert drawn == verify.ids_for(None, SHAPE)
    assert len(set(drawn)) > 30


def test_positions_reach_to_the_end_of_what_the_model_knows() -> None:
    for longest, last in ((256, 255 - 1), (8192, 8190), (131072, 8190)):
        model = SHAPE.model_copy(update={"max_positions": longest})
        at = verify.positions(48, model)
        assert at[0] == 0
        assert (at.diff() >= 1).all()
        assert at[-1] == last
    short = verify.positions(48, SHAPE.model_copy(update={"max_positions": 20}))
    assert torch.equal(short, torch.arange(48))
