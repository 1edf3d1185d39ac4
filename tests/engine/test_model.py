"""megatron-core is configured as the recipe's words mean."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tanren.config.load import read_model
from tanren.config.training import Layout
from tanren.engine.model import ShardedGradients, transformer_config


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rank_scales_the_gradients_that_its_optimizer_reads(dtype: torch.dtype) -> None:
    """Of three ranks, and buckets of several sizes, each its third."""
    buffers = [torch.arange(12.0).to(dtype), torch.arange(3.0).to(dtype)]
    for rank in range(3):
        group = SimpleNamespace(
            buckets=[SimpleNamespace(grad_data=buffer) for buffer in buffers],
            intra_distributed_optimizer_instance_size=3,
            intra_distributed_optimizer_instance_rank=rank,
        )
        mine: Any = SimpleNamespace(bucket_groups=[group], expert_parallel_bucket_groups=[])
        ShardedGradients.scale_gradients(mine, torch.tensor(2.0 ** (rank + 1)))
    expected = [0, 2, 4, 6, 16, 20, 24, 28, 64, 72, 80, 88], [0, 4, 16]
    assert [buffer.tolist() for buffer in buffers] == list(expected)
