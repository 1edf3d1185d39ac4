"""Checkpoints of others: what a folder is, which model it holds, its tensors under our names.

Megatron-LM's `torch_dist` (megatron-core 0.9 to 0.16) and `torch` formats are read, from their
tensors alone: neither Transformer Engine nor Megatron is needed, and no scales of FP8.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from pydantic import ValidationError

from tanren import runs
from tanren.config.errors import RequestError
from tanren.config.model import Model, RopeScaling
from tanren.convert import hf, legacy, llama, llama_config, mcore, named
from tanren.convert.tensors import Tensors
from tanren.data import tokenizer as tokenizers
from tanren.plan.paths import RunFolder

TRACKER = "latest_checkpointed_iteration.txt"
# Arguments of Megatron-LM, and what each is in a model of ours. What an older version does not
# know has its default.
_WANTED: dict[str, tuple[Any, ...]] = {
    "swiglu": (True,),
    "normalization": ("RMSNorm",),
    "add_bias_linear": (False,),
    "position_embedding_type": ("rope",),
}
_REFUSED: dict[str, tuple[Any, ...]] = {
    "add_qkv_bias": (False,),
    "apply_layernorm_1p": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "attention_output_gate": (False,),
    "glu_linear_offset": (0, 0.0),
    "heterogeneous_layers_config_path": (),
    "is_hybrid_model": (False,),
    "mtp_num_layers": (0,),
    "multi_latent_attention": (False,),
    "no_rope_freq": (),
    "num_experts": (),
    "qk_l2_norm": (False,),
    "qk_layernorm": (False,),
    "rope_type": ("rope",),
    "rotary_interleaved": (False,),
    "rotary_percent": (1.0,),
    "rotary_seq_len_interpolation_factor": (1,),
    "softmax_type": ("vanilla",),
    "squared_relu": (False,),
    "window_size": (),
}


@dataclass(frozen=True)
class Opened:
    """A checkpoint of any kind, ready to be read.

    Attributes:
        kind: in words, such as `a torch_dist checkpoint of Megatron-LM`.
        tensors: under megatron-core's names, in the shapes of `llama.mcore_shapes(model)`.
        tokenizer: a folder with the model's tokenizer, where the checkpoint leads to one.
    """

    kind: str
    folder: Path
    tensors: Tensors
    model: Model
    iteration: int
    tokenizer: Path | None


@dataclass(frozen=True)
class Found:
    """What a folder is: its kind, and where its tensors are."""

    kind: str
    folder: Path


TORCH_DIST, TORCH, HF = "torch_dist", "torch", "hf"
NEMO_1, NEMO_2, RUN = "nemo-1", "nemo-2", "run"
WORDS = {
    TORCH_DIST: "a torch_dist checkpoint of megatron-core",
    TORCH: "a checkpoint of Megatron-LM in its torch format",
    HF: "a Hugging Face folder",
    NEMO_1: "a NeMo 1 checkpoint",
    NEMO_2: "a NeMo 2 checkpoint",
    RUN: "a run folder of tanren",
}


def identify(path: Path) -> Found:
    """What lies at a path.

    Raises:
        RequestError: nothing does, or nothing that is known.
    """
    if path.suffix == ".nemo" and path.is_file():
        return Found(NEMO_1, path)
    if not path.is_dir():
        raise RequestError(path, "there is no such folder", "check the path of the checkpoint")
    if (path / "weights").is_dir() and (path / "context").is_dir():
        return Found(NEMO_2, path)
    if (path / "model_config.yaml").is_file():
        return Found(NEMO_1, path)
    if (path / "plan.json").is_file() and (path / "checkpoints").is_dir():
        return Found(RUN, _tracked(path / "checkpoints"))
    if legacy.is_legacy(path):
        return Found(TORCH, path)
    if (path / "metadata.json").is_file() or (path / ".metadata").is_file():
        check_backend(path)
        return Found(TORCH_DIST, path)
    if (path / "config.json").is_file():
        return Found(HF, path)
    if (path / TRACKER).is_file():
        return identify(_tracked(path))
    inside = sorted(one.name for one in path.glob("iter_*") if one.is_dir())
    raise RequestError(
        path,
        "holds no checkpoint that is known: of Megatron-LM (.metadata or mp_rank_00), NeMo "
        "(model_config.yaml or weights), Hugging Face (config.json) or tanren (plan.json)",
        f"name one of the folders in it: {', '.join(inside[-3:])}" if inside else "",
    )


def _tracked(root: Path) -> Path:
    """The checkpoint that Megatron's tracker file names."""
    tracker = root / TRACKER
    try:
        word = tracker.read_text().strip()
    except FileNotFoundError:
        raise RequestError(tracker, "is missing", "name a checkpoint's own folder") from None
    if word != "release" and not word.isdecimal():
        raise RequestError(tracker, f"holds {word[:40]!r}, and no iteration",
                           "name a checkpoint's own folder")  # fmt: skip
    folder = root / (word if word == "release" else f"iter_{int(word):07d}")
    if not folder.is_dir():
        raise RequestError(tracker, f"names {folder.name}, which is not there",
                           "name a checkpoint's own folder")  # fmt: skip
    return folder


def check_backend(folder: Path) -> None:
    """Refuse the other formats of Megatron-LM by their names."""
    path = folder / "metadata.json"
    if not path.is_file():
        return
    try:
        backend = orjson.loads(path.read_bytes())["sharded_backend"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        raise RequestError(
            path, "does not say how the tensors are stored", "bring the checkpoint again, whole"
        ) from None
    if backend != "torch_dist":
        raise RequestError(
            path,
            f"the tensors are stored as {backend}, and torch_dist is read",
            "load it with the Megatron-LM that saved it, and save it with --ckpt-format torch_dist",
        )


@contextmanager
def open_any(path: Path, *, trust: bool = False, like: Model | None = None) -> Iterator[Opened]:
    """A checkpoint of any kind that is read here.

    Args:
        path: a checkpoint's folder, or one with Megatron's tracker file, which names it.
        trust: run what the pickles in it name; see `unpickle`.
        like: the model's shape where it is known, with what a checkpoint does not say: the size of
            the vocabulary without its padding, and the positions.
    Raises:
        RequestError: it is none, it is not whole, it holds another model than a LLaMA, or a file
            names what could run code; tensors that are missing or too many are named.
    """
    found = identify(path)
    folder = found.folder
    if found.kind in (NEMO_1, NEMO_2):
        raise RequestError(
            path, f"is {WORDS[found.kind]}", f"tanren convert nemo-to-hf {path} DESTINATION"
        )
    if found.kind == HF:
        with hf.open_model(folder) as weights:
            model = llama_config.model_of(hf.read_config(folder), folder / "config.json")
            tensors = llama.to_mcore(model, weights, folder)
            tokenizer = folder if tokenizers.is_there(folder) else None
            yield Opened(WORDS[HF], folder, tensors, model, 0, tokenizer)
        return
    source: Tensors
    if found.kind == TORCH:
        old = legacy.Legacy(folder, trust=trust)
        if old.version < 2:
            raise RequestError(
                folder,
                f"has checkpoint_version {old.version:g}, when query, key and value lay otherwise",
                "load and save it with Megatron-LM of 2021 or later",
            )
        source, args, iteration = old, old.args, old.iteration
    else:
        common = mcore.common_of(folder, trust=trust)
        if common.get("lora") is not None:
            raise RequestError(
                folder, "holds adapters alone", "export the run: tanren export, or make export"
            )
        source = mcore.Checkpoint(folder, trust=trust)
        args, iteration = common.get("args"), int(common.get("iteration", 0))
    run = _run_of(folder)
    if not isinstance(args, argparse.Namespace):
        raise RequestError(
            folder, "does not say what model it holds: there are no args of Megatron-LM in it",
            "is it a checkpoint of another program?",
        )  # fmt: skip
    tokenizer = _tokenizer(args, run)
    vocabulary = like.vocabulary_size if like else _vocabulary(args, run, tokenizer)
    model = shape_of(args, folder, vocabulary, like)
    tensors = named.named(model, source, folder)
    yield Opened(WORDS[found.kind], folder, tensors, model, iteration, tokenizer)


def _run_of(folder: Path) -> RunFolder | None:
    """The run folder of ours that a checkpoint lies in."""
    run = RunFolder(folder.parent.parent)
    return run if folder.parent == run.checkpoints and run.plan.is_file() else None


def _tokenizer(args: argparse.Namespace, run: RunFolder | None) -> Path | None:
    if run is not None:
        return run.tokenizer if tokenizers.is_there(run.tokenizer) else None
    # As it was where the checkpoint was made; it need not be here.
    stated = getattr(args, "tokenizer_model", None)
    if not isinstance(stated, str):
        return None
    folder = Path(stated)
    folder = folder if folder.is_dir() else folder.parent
    return folder if folder.is_absolute() and tokenizers.is_there(folder) else None


def _vocabulary(
    args: argparse.Namespace, run: RunFolder | None, tokenizer: Path | None
) -> int | None:
    """The vocabulary's size without padding, where that can be known."""
    if run is not None:
        model = runs.read_json(run.plan).get("model") or {}
        if "vocabulary_size" in model:
            return int(model["vocabulary_size"])
    stated = getattr(args, "vocab_size", None)
    if stated is not None:
        # Its NullTokenizer adds an end of document.
        return int(stated) + (getattr(args, "tokenizer_type", None) == "NullTokenizer")
    return None if tokenizer is None else tokenizers.read(tokenizer).size


def shape_of(
    args: argparse.Namespace, place: object, vocabulary_size: int | None = None,
    like: Model | None = None,
) -> Model:  # fmt: skip
    """The shape that Megatron-LM's arguments state.

    Args:
        vocabulary_size: without padding; None for the padded one, which is all they have.
        like: what the shape has to be; it says what they do not.
    Raises:
        RequestError: the model has what the engine has not, the argument is named; or it is
            another one than `like`, which is said with both values.
    """
    said = vars(args)
    # Those of our first checkpoints do not say whether the rotary embedding is scaled.
    whole = "swiglu" in said
    if not whole and like is None:
        raise RequestError(place, "does not say all of its shape",
                           "name a Hugging Face folder of the model: --like")  # fmt: skip
    # Before the argument add_bias_linear there was disable_bias_linear.
    if "add_bias_linear" not in said and "disable_bias_linear" in said:
        said = said | {"add_bias_linear": not said["disable_bias_linear"]}
    if said.get("position_embedding_type") is None and said.get("use_rotary_position_embeddings"):
        said = said | {"position_embedding_type": "rope"}
    for known, strict in ((_WANTED, True), (_REFUSED, False)):
        for name, allowed in known.items():
            value = said.get(name)
            if value is not None and value not in allowed:
                wanted = f", and {allowed[0]} is read" if strict else ", which the engine has not"
                raise RequestError(
                    place, f"was trained with {name} {value}{wanted}",
                    "train and convert it with Megatron-LM",
                )  # fmt: skip
    padded = said.get("padded_vocab_size")
    size = vocabulary_size or padded
    if padded is not None and size is not None and size > padded:
        raise RequestError(
            place, f"has {padded} rows of embeddings, and the vocabulary has {size} pieces",
            "is it the model's own tokenizer?",
        )  # fmt: skip
    heads, hidden = said.get("num_attention_heads"), said.get("hidden_size")
    grouped = said.get("group_query_attention", True) and said.get("num_query_groups")
    channels = said.get("kv_channels")
    std = said.get("init_method_std")
    values = {
        "layers": said.get("num_layers") or said.get("encoder_num_layers"),
        "hidden_size": hidden,
        "ffn_hidden_size": said.get("ffn_hidden_size"),
        "attention_heads": heads,
        "kv_groups": grouped or heads,
        "head_size": None if heads and hidden == heads * (channels or 0) else channels,
        "vocabulary_size": size,
        "max_positions": said.get("max_position_embeddings") or said.get("seq_length"),
        "rotary_base": float(said.get("rotary_base") or 10000),
        "rope_scaling": _rope_scaling(said),
        "norm_epsilon": said.get("norm_epsilon") or said.get("layernorm_epsilon"),
        "tied_embeddings": not said.get("untie_embeddings_and_output_weights", False),
        **({"init_std": std} if std else {}),
    }
    try:
        model = Model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        what = first["msg"].removeprefix("Value error, ")
        raise RequestError(
            place, f"its args give no shape: {field}: {what}" if field else what,
            "is it a checkpoint of Megatron-LM?",
        ) from None  # fmt: skip
    if like is None:
        return model
    unsaid: dict[str, Any] = {"max_positions": like.max_positions}
    if not whole:
        unsaid["rope_scaling"] = like.rope_scaling
    differing = llama_config.differences(like, model.model_copy(update=unsaid))
    if differing:
        raise RequestError(
            place, f"is another model: {'; '.join(differing)}",
            "name the folder of its model with --like",
        )  # fmt: skip
    return like


def _rope_scaling(said: Mapping[str, Any]) -> RopeScaling | None:
    """Megatron-LM scales with Llama 3.1's numbers; the factor alone is an argument."""
    if not said.get("use_rope_scaling"):
        return None
    return RopeScaling(factor=float(said.get("rope_scaling_factor") or 8.0))
