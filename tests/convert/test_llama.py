"""Names, layouts and the config.json of a LLaMA, in both directions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tanren.config.errors import RequestError
from tanren.config.model import Model, RopeScaling
from tanren.convert import llama, llama_config
from tanren.convert.tensors import Held
from tests.convert.held import whole

SHAPE = Model(
    layers=2, hidden_size=16, ffn_hidden_size=24, attention_heads=4, kv_groups=2,
    vocabulary_size=200, max_positions=64, rotary_base=5e5, norm_epsilon=1e-6,
)  # fmt: skip
SCALED = SHAPE.model_copy(update={"rope_scaling": RopeScaling(factor=16.0)})
TIED = SHAPE.model_copy(update={"tied_embeddings": True, "head_size": 6})


@pytest.mark.parametrize("shape", [SHAPE, SCALED, TIED], ids=["plain", "scaled", "tied"])
@pytest.mark.parametrize("written_by", ["us", "transformers"])
def test_a_shape_survives_config_json(shape: Model, written_by: str) -> None:
    config = llama_config.config_of(shape)
    if written_by == "transformers":
        from transformers import LlamaConfig

        config = LlamaConfig.from_dict(config).to_dict()
    there = llama_config.model_of(config, "config.json")
    llama_config.check_same_shape(shape, there, "recipe.yaml", "base")
    assert there.rope_scaling == shape.rope_scaling


def test_keys_of_both_transformers_versions_say_the_same() -> None:
    old = llama_config.config_of(SCALED)
    new = {key: value for key, value in old.items() if key not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = {"rope_theta": 5e5, **old["rope_scaling"]}
    assert llama_config.model_of(old, "c") == llama_config.model_of(new, "c")
    assert llama_config.model_of(new, "c").rotary_base == 5e5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "config.json: model_type is 'gpt2'"),
        ({"attention_bias": True}, "attention_bias is True, which the engine has not"),
        ({"sliding_window": 4096}, "sliding_window is 4096, which the engine has not"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', and the engine's silu"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"),
    ],
)
def test_what_the_engine_has_not_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as refused:
        llama_config.model_of(llama_config.config_of(SHAPE) | changes, "config.json")
    assert message in str(refused.value)


def test_a_config_without_a_key_is_refused_by_its_name() -> None:
    config = llama_config.config_of(SHAPE)
    del config["rms_norm_eps"]
    with pytest.raises(RequestError, match=r"config\.json: states no rms_norm_eps"):
        llama_config.model_of(config, "config.json")


def test_a_base_of_another_shape_names_both_sides() -> None:
    there = SHAPE.model_copy(update={"layers": 3, "rotary_base": 1e4})
    with pytest.raises(RequestError) as refused:
        llama_config.check_same_shape(SHAPE, there, "midtrain.yaml: model", "/base")
    assert "layers 3 there, 2 here; rotary_base 10000.0 there, 500000.0 here" in str(refused.value)


def test_a_tensor_of_another_shape_is_refused_by_its_name() -> None:
    tensors = {name: torch.zeros(shape) for name, shape in llama.hf_shapes(SHAPE).items()}
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(23, 16)
    stated = r"layers\.1\.mlp\.up_proj\.weight is \[23, 16\] there, and the model's is \[24, 16\]"
    with pytest.raises(RequestError, match=stated):
        llama.to_mcore(SHAPE, Held(tensors), "base")


@settings(max_examples=25, deadline=None)
@given(
    groups=st.integers(1, 3), per_group=st.integers(1, 3), width=st.sampled_from([2, 6]),
    vocabulary=st.integers(120, 140), tied=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_there_and_back_is_bit_exact(
    groups: int, per_group: int, width: int, vocabulary: int, tied: bool, seed: int
) -> None:
    shape = Model(
        layers=2, hidden_size=10, ffn_hidden_size=6, attention_heads=groups * per_group,
        kv_groups=groups, head_size=width, vocabulary_size=vocabulary, max_positions=8,
        rotary_base=1e4, norm_epsilon=1e-5, tied_embeddings=tied,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    before = {
        name: torch.randn(size, generator=generator)
        for name, size in llama.hf_shapes(shape).items()
    }
    middle = whole(llama.to_mcore(shape, Held(before)))
    assert middle["embedding.word_embeddings.weight"].shape[0] % 128 == 0
    assert {entry.mcore for entry in llama.table(shape)} == set(middle)
    after = whole(llama.to_hf(shape, Held(middle)))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
