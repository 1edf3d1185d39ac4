"""The one table of names and layouts between Hugging Face's LLaMA and megatron-core's GPTModel.

megatron-core stacks the layers: the checkpoint's tensor `decoder.layers.mlp.linear_fc2.weight` has
the shape [layers, hidden, ffn]. Its query, key and value rows are interleaved by key-value group,
gate and up projection are one matrix, and the vocabulary is padded.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError

from tanren.config.errors import RequestError
from tanren.config.model import Model, RopeScaling

Read = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class Entry:
    """One tensor of a megatron-core checkpoint and the Hugging Face tensors it is made of.

    `hf` names hold `{layer}` where the tensor is stacked over the layers. `join` makes one layer's
    tensor from them and `split` takes it apart again.
    """

    mcore: str
    hf: tuple[str, ...]
    shape: tuple[int, ...]
    join: Callable[[Model, list[torch.Tensor]], torch.Tensor]
    split: Callable[[Model, torch.Tensor], list[torch.Tensor]]

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.hf[0]


def _same(model: Model, parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0]


def _same_split(model: Model, tensor: torch.Tensor) -> list[torch.Tensor]:
    return [tensor]


def _join_qkv(model: Model, parts: list[torch.Tensor]) -> torch.Tensor:
    """[heads x d, h], [groups x d, h], [groups x d, h] → [groups x (heads/groups + 2) x d, h]."""
    groups, width = model.kv_groups, model.head_width
    by_group = [part.reshape(groups, -1, width, part.shape[-1]) for part in parts]
    return torch.cat(by_group, dim=1).reshape(-1, parts[0].shape[-1])


def _split_qkv(model: Model, tensor: torch.Tensor) -> list[torch.Tensor]:
    groups, width = model.kv_groups, model.head_width
    queries = model.attention_heads // groups
    by_group = tensor.reshape(groups, queries + 2, width, tensor.shape[-1])
    parts = torch.split(by_group, [queries, 1, 1], dim=1)
    return [part.reshape(-1, tensor.shape[-1]) for part in parts]


def _join_rows(model: Model, parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(parts)


def _split_rows(model: Model, tensor: torch.Tensor) -> list[torch.Tensor]:
    return list(tensor.chunk(2))


def _pad(model: Model, parts: list[torch.Tensor]) -> torch.Tensor:
    (tensor,) = parts
    padding = model.padded_vocabulary - model.vocabulary_size
    return torch.cat([tensor, tensor.new_zeros(padding, tensor.shape[1])]) if padding else tensor


def _unpad(model: Model, tensor: torch.Tensor) -> list[torch.Tensor]:
    return [tensor[: model.vocabulary_size]]


def table(model: Model) -> list[Entry]:
    """Every tensor of a LLaMA of this shape, in the order of the forward pass."""
    h, ffn, width = model.hidden_size, model.ffn_hidden_size, model.head_width
    heads, groups, vocabulary = model.attention_heads, model.kv_groups, model.padded_vocabulary
    hf, mcore = "model.layers.{layer}.", "decoder.layers."
    attention, mlp = hf + "self_attn.", hf + "mlp."
    entries = [
        Entry("embedding.word_embeddings.weight", ("model.embed_tokens.weight",),
              (vocabulary, h), _pad, _unpad),
        Entry(mcore + "self_attention.linear_qkv.layer_norm_weight",
              (hf + "input_layernorm.weight",), (h,), _same, _same_split),
        Entry(mcore + "self_attention.linear_qkv.weight",
              tuple(f"{attention}{name}_proj.weight" for name in "qkv"),
              ((heads + 2 * groups) * width, h), _join_qkv, _split_qkv),
        Entry(mcore + "self_attention.linear_proj.weight", (attention + "o_proj.weight",),
              (h, heads * width), _same, _same_split),
        Entry(mcore + "mlp.linear_fc1.layer_norm_weight",
              (hf + "post_attention_layernorm.weight",), (h,), _same, _same_split),
        Entry(mcore + "mlp.linear_fc1.weight", (mlp + "gate_proj.weight", mlp + "up_proj.weight"),
              (2 * ffn, h), _join_rows, _split_rows),
        Entry(mcore + "mlp.linear_fc2.weight", (mlp + "down_proj.weight",),
              (h, ffn), _same, _same_split),
        Entry("decoder.final_layernorm.weight", ("model.norm.weight",), (h,), _same, _same_split),
    ]  # fmt: skip
    if not model.tied_embeddings:
        entries.append(
            Entry("output_layer.weight", ("lm_head.weight",), (vocabulary, h), _pad, _unpad)
        )
    return entries


def hf_names(model: Model) -> list[str]:
    """Every tensor name of the Hugging Face model."""
    return [
        name.format(layer=layer)
        for entry in table(model)
        for layer in (range(model.layers) if entry.stacked else range(1))
        for name in entry.hf
    ]


def to_mcore(model: Model, read: Read) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of each megatron-core entry, made from Hugging Face tensors.

    Args:
        read: gives a Hugging Face tensor by its name.
    """
    for entry in table(model):
        layers = range(model.layers) if entry.stacked else range(1)
        joined = [
            entry.join(model, [read(name.format(layer=layer)) for name in entry.hf])
            for layer in layers
        ]
        for tensor in joined:
            if tuple(tensor.shape) != entry.shape:
                raise RequestError(
                    entry.hf[0].format(layer=0),
                    f"gives {entry.mcore} the shape {list(tensor.shape)}, and the model's is "
                    f"{list(entry.shape)}",
                    "the config.json and the tensors of the model do not belong together",
                )
        yield entry.mcore, torch.stack(joined) if entry.stacked else joined[0]


def to_hf(model: Model, read: Read) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of each Hugging Face tensor, made from megatron-core entries."""
    for entry in table(model):
        tensor = read(entry.mcore)
        for layer in range(model.layers) if entry.stacked else range(1):
            parts = entry.split(model, tensor[layer] if entry.stacked else tensor)
            for name, part in zip(entry.hf, parts, strict=True):
                yield name.format(layer=layer), part.contiguous()


def model_of(config: dict[str, Any], place: object) -> Model:
    """The shape that a Hugging Face config.json states.

    Raises:
        RequestError: the architecture is not a LLaMA, or uses what the engine has not.
    """
    kind = config.get("model_type")
    if kind not in ("llama", "mistral"):
        raise RequestError(place, f"model_type is {kind!r}", "llama and mistral are known")
    for key in ("attention_bias", "mlp_bias", "sliding_window"):
        if config.get(key):
            raise RequestError(place, f"{key} is {config[key]!r}, which the engine has not")
    if config.get("hidden_act", "silu") != "silu":
        raise RequestError(place, f"hidden_act is {config['hidden_act']!r}, and the engine's silu")
    # transformers 5 writes rope_parameters, transformers 4 rope_theta and rope_scaling.
    rope = {
        "rope_theta": config.get("rope_theta", 10000.0),
        **(config.get("rope_parameters") or config.get("rope_scaling") or {}),
    }
    try:
        return Model(
            layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            ffn_hidden_size=config["intermediate_size"],
            attention_heads=config["num_attention_heads"],
            kv_groups=config.get("num_key_value_heads") or config["num_attention_heads"],
            head_size=config.get("head_dim"),
            vocabulary_size=config["vocab_size"],
            max_positions=config["max_position_embeddings"],
            rotary_base=float(rope["rope_theta"]),
            rope_scaling=_rope_scaling(rope, place),
            norm_epsilon=config["rms_norm_eps"],
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        )
    except KeyError as error:
        raise RequestError(place, f"states no {error.args[0]}") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        what = first["msg"].removeprefix("Value error, ")
        raise RequestError(place, f"{field}: {what}" if field else what) from None


def _rope_scaling(rope: dict[str, Any], place: object) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise RequestError(place, f"rope_type is {kind!r}", "default and llama3 are known")
    return RopeScaling(
        factor=float(rope["factor"]),
        low_frequency_factor=float(rope["low_freq_factor"]),
        high_frequency_factor=float(rope["high_freq_factor"]),
        original_max_positions=int(rope["original_max_position_embeddings"]),
    )


def config_of(model: Model) -> dict[str, Any]:
    """config.json for a shape, in the keys that transformers 4 and 5 both read."""
    scaling = model.rope_scaling
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "num_hidden_layers": model.layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_attention_heads": model.attention_heads,
        "num_key_value_heads": model.kv_groups,
        "head_dim": model.head_width,
        "vocab_size": model.vocabulary_size,
        "max_position_embeddings": model.max_positions,
        "rope_theta": model.rotary_base,
        "rope_scaling": None
        if scaling is None
        else {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        },
        "rms_norm_eps": model.norm_epsilon,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tied_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "use_cache": True,
    }


def megatron_arguments(shape: Model) -> argparse.Namespace:
    """The shape under Megatron-LM's argument names, as its checkpoints carry it in `args`."""
    return argparse.Namespace(
        num_layers=shape.layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.attention_heads,
        num_query_groups=shape.kv_groups,
        kv_channels=shape.head_width,
        max_position_embeddings=shape.max_positions,
        padded_vocab_size=shape.padded_vocabulary,
        rotary_base=shape.rotary_base,
        norm_epsilon=shape.norm_epsilon,
        untie_embeddings_and_output_weights=not shape.tied_embeddings,
    )


def check_same_shape(here: Model, there: Model, place: object, base: object) -> None:
    """Refuse a base whose shape is not the recipe's, naming each field with both values."""
    ignored = {"init_std", "head_size"}
    differing = [
        f"{name} {getattr(there, name)} there, {getattr(here, name)} here"
        for name in [*Model.model_fields, "head_width"]
        if name not in ignored and getattr(there, name) != getattr(here, name)
    ]
    if differing:
        raise RequestError(
            place,
            f"the base {base} has another shape: {'; '.join(differing)}",
            "make the recipe's model the base's, or name another base",
        )
