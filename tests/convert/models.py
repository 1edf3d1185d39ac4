"""Small Hugging Face folders with random weights, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import torch

from tanren.config.model import Model, RopeScaling
from tanren.convert import hf, llama, llama_config
from tanren.convert.tensors import Held

SHAPE = Model(
    layers=3, hidden_size=16, ffn_hidden_size=24, attention_heads=4, kv_groups=2,
    vocabulary_size=256, max_positions=64, rotary_base=5e5, norm_epsilon=1e-6,
)  # fmt: skip
LLAMA_3_1 = SHAPE.model_copy(update={"rope_scaling": RopeScaling(factor=8.0)})
# What differs between the families, and what each config.json says besides the shape.
FAMILIES: dict[str, tuple[Model, dict[str, Any]]] = {
    "llm-jp-4": (SHAPE, {}),
    "v4": (SHAPE.model_copy(update={"vocabulary_size": 203, "norm_epsilon": 1e-5}), {}),
    "llama-2": (SHAPE.model_copy(update={"kv_groups": 4, "rotary_base": 1e4}),
                {"pretraining_tp": 1}),
    "llama-3": (SHAPE, {"bos_token_id": 128, "eos_token_id": [129, 130]}),
    "llama-3.1": (LLAMA_3_1, {"transformers_version": "4.43.0"}),
    "llama-3.2": (LLAMA_3_1.model_copy(update={"tied_embeddings": True, "vocabulary_size": 250}),
                  {}),
    "mistral": (SHAPE.model_copy(update={"kv_groups": 1, "head_size": 6}),
                {"model_type": "mistral", "architectures": ["MistralForCausalLM"],
                 "sliding_window": None}),
}  # fmt: skip


def weights(model: Model, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape in llama.hf_shapes(model).items()
    }


def write(
    folder: Path, model: Model = SHAPE, config: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.bfloat16, max_shard_bytes: int = hf.MAX_SHARD_BYTES,
) -> Path:  # fmt: skip
    """A model as the hub has it; without a tokenizer."""
    folder.mkdir(parents=True)
    hf.write_tensors(folder, Held(weights(model, dtype)), max_shard_bytes=max_shard_bytes)
    stated = llama_config.config_of(model) | {"torch_dtype": "bfloat16"} | (config or {})
    (folder / "config.json").write_bytes(orjson.dumps(stated))
    return folder


def read(folder: Path) -> dict[str, torch.Tensor]:
    """A folder's tensors as the format's own library reads them."""
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        held = load_file(file)
        assert not found.keys() & held.keys()
        found |= held
    return found
