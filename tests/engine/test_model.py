"""megatron-core is configured as the recipe's words mean."""

from __future__ import annotations

from tanren.config.load import read_model
from tanren.config.training import Layout
from tanren.engine.model import transformer_config


def test_delayed_fp8_looks_back_over_1024_steps() -> None:
    config = transformer_config(read_model("tiny"), Layout(), precision="bf16", fp8="delayed")
    assert (config.fp8, config.fp8_recipe) == ("hybrid", "delayed")
    assert (config.fp8_amax_history_len, config.fp8_amax_compute_algo) == (1024, "max")


def test_selective_recomputation_is_of_attention_alone() -> None:
    config = transformer_config(read_model("tiny"), Layout(recompute="selective"), precision="bf16")
    assert config.recompute_granularity == "selective"
    assert config.recompute_modules == ["core_attn"]


def test_weights_are_drawn_with_the_shapes_own_deviation() -> None:
    config = transformer_config(read_model("tanuki-debug"), Layout(), precision="bf16")
    assert config.init_method_std == 0.008
