"""A shape written as NeMo states it: NeMo 1's model_config.yaml, NeMo 2's context.

context/io.json is a graph of calls with their arguments, as fiddle writes it, from which NeMo
builds the model; context/model.yaml is the same for people and for programs without NeMo.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import torch
import yaml

from tanren.config.errors import RequestError
from tanren.config.model import Model, RopeScaling

_CALL = "fiddle._src.config"
_LLAMA = "nemo.collections.llm.gpt.model.llama"


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
