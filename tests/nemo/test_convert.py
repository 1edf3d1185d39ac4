"""NeMo itself and our conversions to and from it: the same weights, the same model."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tanren.convert import llama_config, mcore, nemo, nemo_config
from tanren.convert.interchange import Options
from tanren.environments import NEMO
from tests.conftest import REPOSITORY
from tests.convert.compare import SCALING
from tests.convert.nemo_fixtures import SHAPE, write_hf

pytestmark = pytest.mark.nemo
CASES: dict[str, dict[str, Any]] = {
    "grouped": {},
    "tied": {"tied_embeddings": True, "dtype": torch.bfloat16},
    "head-size": {"head_size": 24, "kv_groups": 4, "vocabulary_size": 203},
    "scaled-rope": {"rope_scaling": SCALING, "rotary_base": 500000.0},
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder a case, with what NeMo made of it."""
    python = NEMO.python()
    if not os.access(python, os.X_OK):
        pytest.skip("NeMo is not installed: make env-nemo")
    folder = tmp_path_factory.mktemp("nemo")
    for name, changes in CASES.items():
        write_hf(folder / name / "hf", **changes)
        nemo.hf_to_nemo(folder / name / "hf", folder / name / "ours", Options(), print)
    done = subprocess.run(
        [str(python), "-m", "tests.nemo.convert", str(folder)],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": "",
                          "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("case", CASES)
def test_its_importer_and_ours_write_the_same_tensors(cases: Path, case: str) -> None:
    ours = mcore.Checkpoint(cases / case / "ours" / "weights")
    theirs = mcore.Checkpoint(cases / case / "imported" / "weights")
    assert ours.stored == theirs.stored
    assert len(ours.stored) == (8 if case == "tied" else 9)
    for name in ours.stored:
        assert torch.equal(ours.read(name), theirs.read(name)), name


@pytest.mark.parametrize("case", CASES)
def test_it_builds_the_same_model_from_our_context_as_from_its_own(cases: Path, case: str) -> None:
    built = json.loads((cases / case / "built.json").read_text())
    ours, theirs = built["ours"], built["imported"]
    assert ours["activation_func"] == "silu"
    assert len(ours) > 200
    if case == "scaled-rope":
        # Its importer carries the factor alone; the others are what Llama 3.1 has.
        for field in ("low_freq_factor", "high_freq_factor", "old_context_len"):
            ours.pop(field), theirs.pop(field)
    assert ours == theirs
    assert ours["class"] == ("Llama31Config" if case == "scaled-rope" else "LlamaConfig")


@pytest.mark.parametrize("case", CASES)
def test_its_exporter_and_ours_agree_bit_for_bit(cases: Path, case: str) -> None:
    nemo.nemo_to_hf(cases / case / "imported", cases / case / "back", Options(), print)
    ours = load_file(cases / case / "back" / "model.safetensors")
    theirs = load_file(cases / case / "exported" / "model.safetensors")
    base = load_file(cases / case / "hf" / "model.safetensors")
    assert ours.keys() == theirs.keys() == base.keys()
    for name, tensor in base.items():
        assert tensor.dtype == ours[name].dtype == theirs[name].dtype
        assert torch.equal(ours[name], tensor), name
        assert torch.equal(theirs[name], tensor), name
    configs = [json.loads((cases / case / name / "config.json").read_text())
               for name in ("back", "exported", "hf")]  # fmt: skip
    shapes = [llama_config.model_of(config, case) for config in configs]
    # Its importer leaves out the scaled rope's other factors, and the way back has the defaults.
    if case == "scaled-rope":
        assert shapes[1] == shapes[2]
        shapes[0] = shapes[0].model_copy(update={"rope_scaling": SCALING})
    assert shapes[0] == shapes[1] == shapes[2]


@pytest.mark.parametrize("case", CASES)
def test_its_model_answers_as_transformers_does(cases: Path, case: str) -> None:
    from transformers import AutoModelForCausalLM

    found = torch.load(cases / case / "logits.pt")
    wide = CASES[case].get("dtype", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(cases / case / "hf", dtype=wide).eval()
    tokens = torch.arange(24).reshape(2, 12) * 7 % 200
    with torch.no_grad():
        wanted = model(tokens).logits.float()
    assert found.shape == wanted.shape
    spread = wanted.std().item()
    assert spread > 0.1, "logits this small would agree whatever the weights"
    assert (found - wanted).abs().max().item() < (1e-5 if wide == torch.float32 else 0.05) * spread


@pytest.mark.parametrize("case", CASES)
def test_both_files_of_its_context_state_the_same_shape(cases: Path, case: str) -> None:
    context = cases / case / "imported" / "context"
    by_fields = nemo_config.read_nemo2(context, 0)
    assert by_fields.vocabulary_size == CASES[case].get("vocabulary_size", 256)
    (context / "model.yaml").rename(context / "model.yaml.away")
    assert nemo_config.read_nemo2(context, 0) == by_fields
    (context / "model.yaml.away").rename(context / "model.yaml")


def test_the_fixture_is_what_the_shape_says(cases: Path) -> None:
    config = json.loads((cases / "grouped" / "hf" / "config.json").read_text())
    assert llama_config.model_of(config, "grouped").layers == SHAPE["layers"]
