"""A model's shape in the words of others: Hugging Face's config.json, Megatron-LM's arguments."""

from __future__ import annotations

import argparse
from typing import Any

from pydantic import ValidationError

from tanren.config.errors import RequestError
from tanren.config.model import Model, RopeScaling


def model_of(config: dict[str, Any], place: object) -> Model:
    """The shape that a Hugging Face config.json states.

    Raises:
        RequestError: the architecture is not a LLaMA, or uses what the engine has not.
    """
    kind = config.get("model_type")
    if kind not in ("llama", "mistral"):
        raise RequestError(place, f"model_type is {kind!r}", "llama and mistral are known")
    without = "llama and mistral without it are known"
    again = "mend it, or fetch the model again"
    for key in ("attention_bias", "mlp_bias", "sliding_window"):
        if config.get(key):
            raise RequestError(
                place, f"{key} is {config[key]!r}, which the engine has not", without
            )
    if config.get("hidden_act", "silu") != "silu":
        raise RequestError(
            place, f"hidden_act is {config['hidden_act']!r}, and the engine's silu", without
        )
    # transformers 5 writes rope_parameters, transformers 4 rope_theta and rope_scaling.
    try:
        rope = {
            "rope_theta": config.get("rope_theta", 10000.0),
            **(config.get("rope_parameters") or config.get("rope_scaling") or {}),
        }
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
        raise RequestError(place, f"states no {error.args[0]}", again) from None
    except TypeError as error:
        raise RequestError(place, f"is not a LLaMA's: {error}", again) from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        what = first["msg"].removeprefix("Value error, ")
        raise RequestError(place, f"{field}: {what}" if field else what, again) from None


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
        vocab_size=shape.vocabulary_size,
        use_rope_scaling=shape.rope_scaling is not None,
        rope_scaling_factor=shape.rope_scaling.factor if shape.rope_scaling else 8.0,
        position_embedding_type="rope",
        normalization="RMSNorm",
        swiglu=True,
        add_bias_linear=False,
        group_query_attention=shape.kv_groups != shape.attention_heads,
    )


def differences(here: Model, there: Model) -> list[str]:
    """Each field in which two shapes differ, with both values."""
    ignored = {"init_std", "head_size"}
    return [
        f"{name} {getattr(there, name)} there, {getattr(here, name)} here"
        for name in [*Model.model_fields, "head_width"]
        if name not in ignored and getattr(there, name) != getattr(here, name)
    ]


def check_same_shape(here: Model, there: Model, place: object, base: object) -> None:
    """Refuse a base whose shape is not the recipe's, naming each field with both values."""
    differing = differences(here, there)
    if differing:
        raise RequestError(
            place,
            f"the base {base} has another shape: {'; '.join(differing)}",
            "make the recipe's model the base's, or name another base",
        )
