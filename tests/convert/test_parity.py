"""The same weights give the same logits and the same loss in transformers and in megatron-core."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from tests.convert.compare import CASES, SHAPE


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY)])
    done = subprocess.run(
        [sys.executable, "-m", "tests.convert.compare", str(tmp_path_factory.mktemp("parity"))],
        env=os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


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
