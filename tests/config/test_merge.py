"""What a soup's recipe may say."""

from __future__ import annotations

from typing import Any

import pytest

from tanren.config.merge import ExportReference, Merge, export_named
from tests.config.test_schema import read, refusals

LINEAR: dict[str, Any] = {
    "merge_method": "linear", "models": [{"model": "stage:sft"}, {"model": "stage:dpo@500"}],
}  # fmt: skip
SLICES: dict[str, Any] = {
    "merge_method": "passthrough",
    "slices": [
        {"sources": [{"model": "a", "layer_range": [0, 4]}]},
        {"sources": [{"model": "b", "layer_range": [2, 4]}], "base_model": "c"},
    ],
}


@pytest.mark.parametrize(
    ("model", "reference"),
    [
        ("stage:sft", ExportReference(None, "sft", None)),
        ("stage:sft@500", ExportReference(None, "sft", 500)),
        ("stage:sft.100B-try2@5", ExportReference(None, "sft.100B-try2", 5)),
        ("mine/stage:merge-a", ExportReference("mine", "merge-a", None)),
        ("owner/name@v1", None),
        ("/models/stage", None),
    ],
)
def test_a_model_may_be_the_export_of_a_stage(
    model: str, reference: ExportReference | None
) -> None:
    assert export_named(model) == reference
    assert read(Merge, LINEAR | {"models": [{"model": model}]}).ingredients == (model,)


@pytest.mark.parametrize(
    "model", ["stage:", "stage:sft@", "stage:sft@0", "stage:sft@new", "a/b/stage:sft"]
)
def test_what_is_nearly_a_stage_is_no_folder(model: str) -> None:
    ((field, said),) = refusals(Merge, LINEAR | {"models": [{"model": model}]})
    assert field == "models.0.model"
    assert said.startswith(f"{model} names no export: write stage:sft,")


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (LINEAR | SLICES, "state models or slices, and not both"),
        ({"merge_method": "linear"}, "state models or slices, and not both"),
        (LINEAR | {"tokenizer_source": "base"}, "tokenizer_source: base needs base_model"),
        (LINEAR | {"tokenizer_source": "stage:midtrain"},
         "tokenizer_source stage:midtrain is none of the models"),
        (SLICES | {"slices": [{"sources": [{"model": "a", "layer_range": [3, 3]}]}]},
         "layer_range [3, 3] holds no layer"),
        (LINEAR | {"merge_method": "linaer"}, "Input should be 'arcee_fusion', "),
        (LINEAR | {"models": []}, "state models or slices, and not both"),
        (SLICES | {"slices": [{"sources": []}]}, "sources are empty"),
        (LINEAR | {"dtype": "bf16"}, "Input should be 'float32', 'bfloat16' or 'float16'"),
        (LINEAR | {"chat_template": "auto"}, "Extra inputs are not permitted"),
    ],
)  # fmt: skip
def test_what_is_no_soup_is_refused(values: dict[str, Any], problem: str) -> None:
    ((_, said),) = refusals(Merge, values)
    assert said.startswith(problem)


def test_every_model_is_found_and_renamed() -> None:
    soup = read(Merge, LINEAR | {"base_model": "stage:midtrain", "tokenizer_source": "stage:sft"})
    assert soup.ingredients == ("stage:sft", "stage:dpo@500", "stage:midtrain")
    named = soup.with_models({"stage:sft": "/sft", "stage:midtrain": "/base"})
    assert named.ingredients == ("/sft", "stage:dpo@500", "/base")
    assert (named.tokenizer_source, named.base_model) == ("/sft", "/base")
    cut = read(Merge, SLICES)
    assert cut.ingredients == ("a", "b", "c")
    assert cut.with_models({"a": "A", "c": "C"}).ingredients == ("A", "b", "C")
    assert soup.ingredients[0] == "stage:sft", "the first is as it was"
