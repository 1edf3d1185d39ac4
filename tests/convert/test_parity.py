"""The same weights give the same logits and the same loss in transformers and in megatron-core."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import told_apart
from tests.convert.compare import CASES, SHAPE


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return told_apart("tests.convert.compare", tmp_path_factory.mktemp("parity"))


@pytest.mark.parametrize("case", CASES)
def test_logits_and_loss_agree_and_the_way_back_is_exact(
    results: dict[str, Any], case: str
) -> None:
    result = results[case]
    assert result["spread"] > 0.1, "logits this small would agree whatever the weights"
    assert result["logits"] < 1e-4
    assert result["loss"] < 1e-5
    assert result["exact"]
    assert result["sharded"]


@pytest.mark.parametrize("case", ["padded-vocabulary", "tied-and-padded"])
def test_the_padding_never_reaches_the_export(results: dict[str, Any], case: str) -> None:
    assert results[case]["padding"] == 256
    assert results[case]["rows"] == CASES[case]["vocabulary_size"] != SHAPE["vocabulary_size"]
