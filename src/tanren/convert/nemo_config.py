"""What NeMo states of a model, read to our shape.

NeMo 1 has model_config.yaml. NeMo 2 has context/model.yaml, every field of the model with its
value, and context/io.json, from which NeMo builds the model again: a graph of calls with the
arguments that were given, as fiddle writes it. Both are read as data; nothing of them is called,
and pickles that lie beside them are left alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import yaml
from pydantic import ValidationError

from tanren.config.errors import RequestError
from tanren.config.model import Model, RopeScaling

_AGAIN = "bring the checkpoint again, whole"
# Fields of NeMo's, each with the values that a LLaMA of the engine has.
_LLAMA_2: dict[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm",),
    "position_embedding_type": ("rope",),
    "gated_linear_unit": (True,),
    "add_bias_linear": (False,),
    "add_qkv_bias": (False,),
    "qk_layernorm": (False,),
    "rotary_percent": (1.0,),
    "rotary_interleaved": (False,),
    "seq_len_interpolation_factor": (None,),
    "num_moe_experts": (None,),
    "multi_latent_attention": (False,),
    "window_size": (None,),
    "layernorm_zero_centered_gamma": (False,),
    "apply_residual_connection_post_layernorm": (False,),
}
_LLAMA_1: dict[str, tuple[Any, ...]] = {
    "mcore_gpt": (True,),
    "normalization": ("rmsnorm",),
    "position_embedding_type": ("rope",),
    "activation": ("fast-swiglu", "swiglu"),
    "bias": (False,),
    "qk_layernorm": (False, None),
    "rotary_percentage": (1.0,),
    "rotary_interleaved": (False, None),
    "seq_len_interpolation_factor": (None,),
    "num_moe_experts": (None,),
    "window_size": (None,),
    "transformer_block_type": ("pre_ln",),
    "scale_positional_embedding": (False, None, True),
    # The only factors that its scaled rope has: Llama-3.1's own.
    "scale_factor": (None, 8, 8.0),
}
# What LlamaConfig has where io.json, which holds the arguments that were given, is silent.
_DEFAULTS: dict[str, Any] = {
    "kv_channels": None, "num_query_groups": None, "seq_length": 4096, "rotary_base": 10000,
    "layernorm_epsilon": 1e-5, "init_method_std": 0.02, "vocab_size": None,
    "share_embeddings_and_output_weights": False,
    "scale_factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 8192,
}  # fmt: skip
# Classes whose defaults these are. The others state a whole model's shape in NeMo's code alone.
_GENERAL = {"LlamaConfig", "Llama31Config"}


def read_nemo2(context: Path, vocabulary: int) -> Model:
    """The shape of a NeMo 2 checkpoint.

    Args:
        context: its folder of that name.
        vocabulary: the tokenizer's size, for a model that states none of its own.
    Raises:
        RequestError: the files are missing or broken, or it is no LLaMA.
    """
    place = context / "model.yaml"
    if place.is_file():
        model = _read_yaml(place)
        config = model.get("config")
        if not isinstance(config, dict):
            raise RequestError(place, "states no config of a model", _AGAIN)
        kind = str(config.get("_target_", ""))
        activation = config.get("activation_func")
        name = activation.get("_target_") if isinstance(activation, dict) else activation
    else:
        place = context / "io.json"
        kind, config = _read_graph(place)
        name = None
    _refuse(config, _LLAMA_2, place)
    if name is not None and str(name).rpartition(".")[2] != "silu":
        raise RequestError(place, f"activation_func is {name}, and the engine's silu", _AGAIN)
    scaled = None
    if "scale_factor" in config:
        scaled = {
            "factor": config["scale_factor"],
            "low_frequency_factor": config["low_freq_factor"],
            "high_frequency_factor": config["high_freq_factor"],
            "original_max_positions": config["old_context_len"],
        }
    elif "Llama31" in kind or "Llama32" in kind:
        raise RequestError(place, f"{kind} without a scale_factor", _AGAIN)
    return _model(
        place,
        **_named_alike(config),
        vocabulary_size=config.get("vocab_size") or vocabulary,
        max_positions=config.get("seq_length"),
        rotary_base=config.get("rotary_base"),
        rope_scaling=scaled,
        norm_epsilon=config.get("layernorm_epsilon"),
        tied_embeddings=config.get("share_embeddings_and_output_weights", False),
        init_std=config.get("init_method_std", 0.02),
    )


def _named_alike(config: dict[str, Any]) -> dict[str, Any]:
    """Of a shape what NeMo 1 and 2 state under the same names."""
    return {
        "layers": config.get("num_layers"),
        "hidden_size": config.get("hidden_size"),
        "ffn_hidden_size": config.get("ffn_hidden_size"),
        "attention_heads": config.get("num_attention_heads"),
        "kv_groups": config.get("num_query_groups") or config.get("num_attention_heads"),
        "head_size": config.get("kv_channels"),
    }


def read_nemo1(place: Path, vocabulary: int) -> Model:
    """The shape that a NeMo 1 model_config.yaml states.

    Args:
        vocabulary: the tokenizer's size; NeMo 1 states it only where it is another.
    """
    config = _read_yaml(place)
    config = config["model"] if isinstance(config.get("model"), dict) else config
    _refuse(config, _LLAMA_1, place)
    return _model(
        place,
        **_named_alike(config),
        vocabulary_size=config.get("override_vocab_size") or vocabulary,
        max_positions=_positions(config),
        rotary_base=config.get("rotary_base", 10000),
        rope_scaling=RopeScaling().model_dump()
        if config.get("scale_positional_embedding")
        else None,
        norm_epsilon=config.get("layernorm_epsilon", 1e-5),
        tied_embeddings=config.get("share_embeddings_and_output_weights", True),
        init_std=config.get("init_method_std", 0.02),
    )


def tokenizer_of_nemo1(place: Path) -> str | None:
    """The tokenizer that model_config.yaml names: a file beside it, a path, or a repository."""
    config = _read_yaml(place)
    config = config["model"] if isinstance(config.get("model"), dict) else config
    stated = config.get("tokenizer")
    if not isinstance(stated, dict):
        return None
    name = stated.get("model") if stated.get("library") == "sentencepiece" else stated.get("type")
    return None if name is None else str(name)


def _positions(config: dict[str, Any]) -> Any:
    # Some files say `${.encoder_seq_length}`, which is the other key's value.
    stated = config.get("max_position_embeddings")
    return stated if isinstance(stated, int) else config.get("encoder_seq_length")


def _read_yaml(place: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(place.read_text())
    except FileNotFoundError:
        raise RequestError(place, "is missing", "name a folder that holds a model") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        what = " ".join(str(error).split())
        raise RequestError(place, f"is no YAML: {what}", _AGAIN) from None
    if not isinstance(value, dict):
        raise RequestError(place, "states no fields of a model", _AGAIN)
    return value


def _read_graph(place: Path) -> tuple[str, dict[str, Any]]:
    """Class and arguments of the model's config in io.json, its class's defaults among them."""
    try:
        objects = orjson.loads(place.read_bytes())["objects"]
        model = next(
            one for one in objects.values() if "<root>.model.config" in one.get("paths", ())
        )
        call = objects[model["metadata"]["key"]]
        kind = next(v for key, v in call["items"] if "fn_or_cls" in key)["name"]
        given = {key.split("'")[1]: value.get("value") for key, value in model["items"]}
    except FileNotFoundError:
        raise RequestError(place, "is missing, and so is model.yaml",
                           "name a folder that NeMo has written") from None  # fmt: skip
    except orjson.JSONDecodeError as error:
        raise RequestError(place, f"is not JSON: {error}", _AGAIN) from None
    except (KeyError, TypeError, IndexError, AttributeError, StopIteration):
        raise RequestError(place, "describes no model as NeMo writes one", _AGAIN) from None
    if kind not in _GENERAL:
        raise RequestError(
            place.with_name("model.yaml"),
            f"is missing, and io.json says only that the model is a {kind}",
            "bring model.yaml, which NeMo writes beside io.json",
        )
    wanted = dict(_DEFAULTS)
    if kind == "LlamaConfig":
        for name in ("scale_factor", "low_freq_factor", "high_freq_factor", "old_context_len"):
            del wanted[name]
    return kind, wanted | given


def _refuse(config: dict[str, Any], llama: dict[str, tuple[Any, ...]], place: Path) -> None:
    for name, values in llama.items():
        if name in config and config[name] not in values:
            raise RequestError(
                place,
                f"{name} is {config[name]!r}, which a LLaMA of the engine has not",
                f"{' or '.join(repr(value) for value in values)} is known",
            )


def _model(place: Path, **fields: Any) -> Model:
    scaling, missing = fields.pop("rope_scaling"), [k for k, v in fields.items() if v is None]
    if not fields["vocabulary_size"]:
        raise RequestError(
            place, "states no size of the vocabulary, and its tokenizer is not there",
            "name a Hugging Face folder of the model: --like",
        )  # fmt: skip
    if any(name != "head_size" for name in missing):
        raise RequestError(
            place, f"states no {next(name for name in missing if name != 'head_size')}", _AGAIN
        )
    for name in ("rotary_base", "norm_epsilon", "init_std"):
        # YAML 1.1 reads 1e-05 as text.
        try:
            fields[name] = float(fields[name])
        except (TypeError, ValueError):
            raise RequestError(place, f"{name} is {fields[name]!r}", _AGAIN) from None
    try:
        return Model(**fields, rope_scaling=RopeScaling(**scaling) if scaling else None)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise RequestError(
            place, f"{field}: {first['msg'].removeprefix('Value error, ')}", _AGAIN
        ) from None
