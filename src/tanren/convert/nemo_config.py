"""What NeMo states of a model: its files to our shape, and our shape to its files.

NeMo 1 has model_config.yaml. NeMo 2 has context/model.yaml, every field of the model with its
value, and context/io.json, from which NeMo builds the model again: a graph of calls with the
arguments that were given, as fiddle writes it. Both are read as data; nothing of them is called,
and pickles that lie beside them are left alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import torch
import yaml
from pydantic import ValidationError

from tanren.config.errors import RequestError
from tanren.config.model import Model, RopeScaling

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
_CALL = "fiddle._src.config"
_LLAMA = "nemo.collections.llm.gpt.model.llama"


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
            raise RequestError(place, "states no config of a model")
        kind = str(config.get("_target_", ""))
        activation = config.get("activation_func")
        name = activation.get("_target_") if isinstance(activation, dict) else activation
    else:
        place = context / "io.json"
        kind, config = _read_graph(place)
        name = None
    _refuse(config, _LLAMA_2, place)
    if name is not None and str(name).rpartition(".")[2] != "silu":
        raise RequestError(place, f"activation_func is {name}, and the engine's silu")
    scaled = None
    if "scale_factor" in config:
        scaled = {
            "factor": config["scale_factor"],
            "low_frequency_factor": config["low_freq_factor"],
            "high_frequency_factor": config["high_freq_factor"],
            "original_max_positions": config["old_context_len"],
        }
    elif "Llama31" in kind or "Llama32" in kind:
        raise RequestError(place, f"{kind} without a scale_factor")
    return _model(
        place,
        layers=config.get("num_layers"),
        hidden_size=config.get("hidden_size"),
        ffn_hidden_size=config.get("ffn_hidden_size"),
        attention_heads=config.get("num_attention_heads"),
        kv_groups=config.get("num_query_groups") or config.get("num_attention_heads"),
        head_size=config.get("kv_channels"),
        vocabulary_size=config.get("vocab_size") or vocabulary,
        max_positions=config.get("seq_length"),
        rotary_base=config.get("rotary_base"),
        rope_scaling=scaled,
        norm_epsilon=config.get("layernorm_epsilon"),
        tied_embeddings=config.get("share_embeddings_and_output_weights", False),
        init_std=config.get("init_method_std", 0.02),
    )


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
        layers=config.get("num_layers"),
        hidden_size=config.get("hidden_size"),
        ffn_hidden_size=config.get("ffn_hidden_size"),
        attention_heads=config.get("num_attention_heads"),
        kv_groups=config.get("num_query_groups") or config.get("num_attention_heads"),
        head_size=config.get("kv_channels"),
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
        raise RequestError(place, f"is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise RequestError(place, "states no fields of a model")
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
        raise RequestError(place, f"is not JSON: {error}") from None
    except (KeyError, TypeError, IndexError, AttributeError, StopIteration):
        raise RequestError(place, "describes no model as NeMo writes one") from None
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
            "name the tokenizer: --tokenizer FOLDER",
        )  # fmt: skip
    if any(name != "head_size" for name in missing):
        raise RequestError(
            place, f"states no {next(name for name in missing if name != 'head_size')}"
        )
    for name in ("rotary_base", "norm_epsilon", "init_std"):
        # YAML 1.1 reads 1e-05 as text.
        fields[name] = float(fields[name])
    try:
        return Model(**fields, rope_scaling=RopeScaling(**scaling) if scaling else None)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise RequestError(
            place, f"{field}: {first['msg'].removeprefix('Value error, ')}"
        ) from None


def _fields(model: Model, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of NeMo's LlamaConfig, with the values that its own importer gives them."""
    fields: dict[str, Any] = {
        "num_layers": model.layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.attention_heads,
        "num_query_groups": model.kv_groups,
        "kv_channels": model.head_width,
        "init_method_std": model.init_std,
        "layernorm_epsilon": model.norm_epsilon,
        "seq_length": model.max_positions,
        "rotary_base": model.rotary_base,
        "gated_linear_unit": True,
        "share_embeddings_and_output_weights": model.tied_embeddings,
        "make_vocab_size_divisible_by": divisor(model.vocabulary_size),
        "vocab_size": model.vocabulary_size,
        "fp16": False,
        "bf16": dtype == torch.bfloat16,
    }
    if model.rope_scaling is not None:
        fields |= {
            "scale_factor": model.rope_scaling.factor,
            "low_freq_factor": model.rope_scaling.low_frequency_factor,
            "high_freq_factor": model.rope_scaling.high_frequency_factor,
            "old_context_len": model.rope_scaling.original_max_positions,
        }
    return fields


def divisor(vocabulary: int) -> int:
    """The largest power of two up to 128 that divides the vocabulary: nothing is padded by it."""
    return min(vocabulary & -vocabulary, 128)


def write_nemo2(
    context: Path, model: Model, dtype: torch.dtype, *, tokenizer: str | None, generation: bool
) -> None:
    """io.json and model.yaml of a NeMo 2 checkpoint.

    Args:
        tokenizer: the folder within the context that holds the tokenizer.
        generation: whether `artifacts` holds a generation_config.json.
    """
    graph = _Graph()
    kind = "LlamaConfig" if model.rope_scaling is None else "Llama31Config"
    name = str(dtype).removeprefix("torch.")
    arguments: dict[str, Any] = {
        key: _leaf(value) for key, value in _fields(model, dtype).items()
    } | {"params_dtype": _name("torch", name)}
    if generation:
        arguments["generation_config"] = graph.call(
            "<root>.model.config.generation_config",
            "nemo.lightning.io.artifact.hf_auto", "from_pretrained",
            auto_cls=_name("transformers.generation.configuration_utils", "GenerationConfig"),
            pretrained_model_name_or_path=_leaf("./artifacts"),
        )  # fmt: skip
    parts = {"config": graph.call("<root>.model.config", _LLAMA, kind, **arguments)}
    if tokenizer is not None:
        parts["tokenizer"] = graph.call(
            "<root>.model.tokenizer",
            "nemo.collections.common.tokenizers.huggingface.auto_tokenizer", "AutoTokenizer",
            pretrained_model_name=_leaf(tokenizer),
        )  # fmt: skip
    built = graph.call("<root>.model", _LLAMA, "LlamaModel", **parts)
    # A trainer is part of every context. Whoever trains on names one of their own.
    strategy = graph.call(
        "<root>.trainer.strategy", "nemo.lightning.pytorch.strategies.megatron_strategy",
        "MegatronStrategy", ckpt_save_optimizer=_leaf(False),
    )  # fmt: skip
    trainer = graph.call(
        "<root>.trainer", "nemo.lightning.pytorch.trainer", "Trainer",
        accelerator=_leaf("cpu"), strategy=strategy, devices=_leaf(1),
    )  # fmt: skip
    root = graph.call("<root>", "nemo.lightning.io.pl", "TrainerContext", model=built,
                      trainer=trainer, extra=graph.mapping("<root>.extra"))  # fmt: skip
    (context / "io.json").write_bytes(graph.document(root))
    fields = _fields(model, dtype) | {
        "_target_": f"{_LLAMA}.{kind}",
        "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
        "params_dtype": {"_target_": f"torch.{name}", "_call_": False},
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "rotary_percent": 1.0,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }
    described: dict[str, Any] = {"_target_": f"{_LLAMA}.LlamaModel", "config": fields}
    if tokenizer is not None:
        described["tokenizer"] = {
            "_target_": "nemo.collections.common.tokenizers.huggingface.auto_tokenizer."
            "AutoTokenizer",
            "pretrained_model_name": tokenizer,
        }
    (context / "model.yaml").write_text(yaml.safe_dump(described))


def write_nemo1(place: Path, model: Model, dtype: torch.dtype, tokenizer: str | None) -> None:
    """model_config.yaml of a NeMo 1 checkpoint, for its MegatronGPTModel.

    Raises:
        RequestError: NeMo 1 has not what the model needs.
    """
    if model.rope_scaling not in (None, RopeScaling()):
        raise RequestError(
            place, "NeMo 1 has no other factors of a scaled rope than Llama-3.1's, and the "
            "model's are others", "convert to NeMo 2",
        )  # fmt: skip
    value = {
        "target": "nemo.collections.nlp.models.language_modeling.megatron_gpt_model."
        "MegatronGPTModel",
        "mcore_gpt": True,
        "transformer_engine": True,
        "megatron_amp_O2": dtype == torch.bfloat16,
        "precision": "bf16" if dtype == torch.bfloat16 else 32,
        "micro_batch_size": 1,
        "global_batch_size": 1,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "sequence_parallel": False,
        "dist_ckpt_format": "torch_dist",
        "encoder_seq_length": model.max_positions,
        "max_position_embeddings": model.max_positions,
        "num_layers": model.layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.attention_heads,
        "num_query_groups": model.kv_groups,
        "kv_channels": model.head_width,
        "init_method_std": model.init_std,
        "use_scaled_init_method": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "ffn_dropout": 0.0,
        "apply_query_key_layer_scaling": False,
        "normalization": "rmsnorm",
        "layernorm_epsilon": model.norm_epsilon,
        "do_layer_norm_weight_decay": False,
        "make_vocab_size_divisible_by": divisor(model.vocabulary_size),
        "override_vocab_size": model.vocabulary_size,
        "pre_process": True,
        "post_process": True,
        "persist_layer_norm": True,
        "bias": False,
        "activation": "fast-swiglu",
        "transformer_block_type": "pre_ln",
        "normalize_attention_scores": True,
        "position_embedding_type": "rope",
        "rotary_percentage": 1.0,
        "rotary_base": model.rotary_base,
        "seq_len_interpolation_factor": None,
        "scale_positional_embedding": model.rope_scaling is not None,
        "attention_type": "multihead",
        "share_embeddings_and_output_weights": model.tied_embeddings,
        "tokenizer": {"library": "huggingface", "type": tokenizer, "use_fast": True},
    }
    place.write_text(yaml.safe_dump(value, sort_keys=False))


def _leaf(value: object) -> dict[str, Any]:
    return {"type": "leaf", "value": value}


def _name(module: str, name: str) -> dict[str, Any]:
    return {"type": "pyref", "module": module, "name": name}


class _Graph:
    """io.json: objects by key, each with the paths at which it hangs from the root."""

    def __init__(self) -> None:
        self._objects: dict[str, dict[str, Any]] = {}

    def _add(self, kind: str, **value: Any) -> dict[str, Any]:
        key = f"{kind}_{sum(name.startswith(f'{kind}_') for name in self._objects) + 1}"
        self._objects[key] = value
        return {"type": "ref", "key": key}

    def mapping(self, path: str | None = None) -> dict[str, Any]:
        """An empty dict."""
        keys: dict[str, Any] = {"type": _name("builtins", "tuple"), "items": [], "metadata": None}
        paths = {} if path is None else {"paths": [path]}
        return self._add("dict", type=_name("builtins", "dict"), items=[], metadata=keys, **paths)

    def call(self, path: str, module: str, name: str, **arguments: Any) -> dict[str, Any]:
        """A call of a class or function, with its arguments."""
        names = self._add(
            "tuple",
            type=_name("builtins", "tuple"),
            items=[[f"Index(index={at})", key] for at, key in enumerate(arguments)],
            metadata=None,
        )
        described = _name(_CALL, "BuildableTraverserMetadata")
        items = [
            ["Attr(name='fn_or_cls')", _name(module, name)],
            ["Attr(name='argument_names')", names],
            ["Attr(name='argument_tags')", self.mapping()],
            ["Attr(name='argument_history')", self.mapping()],
        ]
        how = self._add("call", type=described, items=items, metadata=described)
        given = [
            [f"Attr(name='{key}')", value | self._paths(value, f"{path}.{key}")]
            for key, value in arguments.items()
        ]
        return self._add(
            "config", type=_name(_CALL, "Config"), items=given, metadata=how, paths=[path]
        )

    @staticmethod
    def _paths(value: dict[str, Any], path: str) -> dict[str, Any]:
        return {} if value["type"] == "ref" else {"paths": [path]}

    def document(self, root: dict[str, Any]) -> bytes:
        counts = dict.fromkeys(self._objects, 1)
        whole = {"root": root, "objects": self._objects, "refcounts": counts, "version": "0.0.1"}
        return orjson.dumps(whole, option=orjson.OPT_INDENT_2)
