"""Low-rank adapters between megatron-core checkpoints, merged weights and PEFT folders.

An adapter is two matrices beside a linear layer W: A, which megatron-core and NeMo call linear_in,
and B, linear_out (LoRA, Hu et al. 2021). A checkpoint stacks them over the layers, as it stacks W:
A [layers, rank, in], B [layers, out, rank]. Their rows and columns lie as those of W do, so that
llama's table says how they come apart: query, key and value share A and split B, and so do gate
and up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import torch

from tanren import runs
from tanren.config.model import Model
from tanren.config.training import Lora, LoraLinear
from tanren.convert import audit, llama, mcore, safetensors
from tanren.convert.tensors import Held, Tensors, rows
from tanren.data import tokenizer as tokenizers

# Where a decoder layer has its linear layers.
MODULES: dict[LoraLinear, str] = {
    "attention_qkv": "self_attention.linear_qkv",
    "attention_dense": "self_attention.linear_proj",
    "mlp_fc1": "mlp.linear_fc1",
    "mlp_fc2": "mlp.linear_fc2",
}
# What an adapter's tensors are called, after the name of its linear layer; as NeMo calls them.
LINEAR_IN, LINEAR_OUT = "adapter.linear_in.weight", "adapter.linear_out.weight"


@dataclass(frozen=True)
class Adapter:
    """One linear layer's row of the table: its weight, and the names of A and B."""

    weight: llama.Entry
    linear_in: str
    linear_out: str


def table(model: Model, lora: Lora) -> list[Adapter]:
    """The adapters of a model of this shape, in the order of the forward pass."""
    entries = {entry.mcore: entry for entry in llama.table(model)}
    places = [f"decoder.layers.{MODULES[name]}." for name in lora.linears]
    return [
        Adapter(entries[place + "weight"], place + LINEAR_IN, place + LINEAR_OUT)
        for place in places
    ]


def settings_of(checkpoint: Path) -> Lora | None:
    """What a checkpoint of adapters says of them; None for a checkpoint of whole weights."""
    if mcore.weights_of(checkpoint) != (checkpoint, ""):
        return None  # NeMo's, with whole weights
    return settings_in(mcore.common_of(checkpoint))


def settings_in(common: dict[str, Any]) -> Lora | None:
    """The same, of a checkpoint's plain values."""
    settings = common.get("lora")
    return None if settings is None else Lora.model_validate(settings)


def merged(model: Model, base: Tensors, adapters: Tensors, lora: Lora) -> Tensors:
    """The base's tensors with alpha/rank B A added to the weights that have an adapter.

    Returns:
        tensors in the base's types; the sum is taken in fp32, a layer at a time when it is read.
    """
    return _Merged(model, base, adapters, lora)


class _Merged:
    def __init__(self, model: Model, base: Tensors, adapters: Tensors, lora: Lora) -> None:
        self._model, self._base, self._beside, self._lora = model, base, adapters, lora
        self._adapters = {adapter.weight.mcore: adapter for adapter in table(model, lora)}
        self.stored = base.stored

    def read(self, name: str, layer: int | None = None) -> torch.Tensor:
        adapter = self._adapters.get(name)
        if adapter is None:
            return self._base.read(name, layer)
        if layer is None:
            return torch.stack([self.read(name, one) for one in range(self._model.layers)])
        weight = self._base.read(name, layer)
        down = self._beside.read(adapter.linear_in, layer).float()
        up = self._beside.read(adapter.linear_out, layer).float()
        return (weight.float() + self._lora.scale * (up @ down)).to(weight.dtype)

    def rows(self, name: str, layer: int | None, start: int, stop: int) -> torch.Tensor:
        if name in self._adapters:
            return self.read(name, layer)[start:stop]
        return rows(self._base, name, layer, start, stop)


def to_peft(model: Model, adapters: Tensors, lora: Lora) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of each matrix as PEFT keeps it beside the Hugging Face model."""
    for adapter in table(model, lora):
        for layer in range(model.layers):
            down = adapters.read(adapter.linear_in, layer)
            parts = adapter.weight.split(model, adapters.read(adapter.linear_out, layer))
            for name, part in zip(adapter.weight.hf, parts, strict=True):
                linear = "base_model.model." + name.format(layer=layer).removesuffix(".weight")
                yield f"{linear}.lora_A.weight", down
                yield f"{linear}.lora_B.weight", part


def write_peft(
    folder: Path, model: Model, tensors: Tensors, lora: Lora, base: str,
    tokenizer: Path | None = None,
) -> None:  # fmt: skip
    """Write a folder that peft.PeftModel.from_pretrained loads; it appears when it is whole.

    Args:
        tensors: the adapters', under their names in a checkpoint.
        base: the Hugging Face model that the adapters were trained beside, a path or a repository.
        tokenizer: a folder whose tokenizer is copied beside them.
    """
    linears = [name.split(".")[-2] for adapter in table(model, lora) for name in adapter.weight.hf]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        # An int to most who read it, PEFT itself included.
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": linears,
        "bias": "none",
        "inference_mode": True,
    }
    with runs.whole_folder(folder) as partial:
        matrices = Held(dict(to_peft(model, tensors, lora)))
        for name in matrices.stored:
            audit.check_finite(name, matrices.read(name), folder)
        safetensors.write({partial / "adapter_model.safetensors": list(matrices.stored)}, matrices)
        (partial / "adapter_config.json").write_bytes(
            orjson.dumps(config, option=orjson.OPT_INDENT_2)
        )
        if tokenizer is not None:
            tokenizers.copy(tokenizer, partial)
