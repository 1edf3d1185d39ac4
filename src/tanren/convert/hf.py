"""Hugging Face folders: read tensors by name, write a whole folder or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import orjson
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tanren.config.errors import RequestError
from tanren.config.model import Model
from tanren.convert import llama
from tanren.data import hub
from tanren.data import tokenizer as tokenizers
from tanren.data.fetch import fetch
from tanren.runs import whole_folder

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# Tensors a file: what one file of a large model usually holds.
MAX_SHARD_BYTES = 5 * 10**9


def locate(source: str) -> Path:
    """The local folder of a Hugging Face model: a path as it is, a repository from the hub.

    Args:
        source: a path, `owner/name`, or `owner/name@revision`.
    Raises:
        RequestError: there is no such folder, and the hub does not give it either.
        WorkError: the hub does not answer.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.is_absolute() or source.startswith("."):
        raise RequestError(path, "there is no such folder", "check the path of the base model")
    return fetch(hub.model_of(source)).folder


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a Hugging Face folder."""
    path = folder / "config.json"
    try:
        value = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        raise RequestError(path, "is missing", "name a folder that holds a model") from None
    except orjson.JSONDecodeError as error:
        raise RequestError(path, f"is not JSON: {error}") from None
    assert isinstance(value, dict), path
    return value


class Reader:
    """Tensors of a Hugging Face folder by name, memory-mapped."""

    def __init__(self, folder: Path, files: dict[str, Path], stack: ExitStack) -> None:
        self.folder, self.files, self._stack = folder, files, stack
        self._open: dict[Path, Any] = {}

    def __call__(self, name: str) -> torch.Tensor:
        path = self.files.get(name)
        if path is None:
            raise RequestError(
                self.folder,
                f"holds no tensor {name}",
                "the config.json and the tensors of the model do not belong together",
            )
        return self._handle(path).get_tensor(name)  # type: ignore[no-any-return]

    def _handle(self, path: Path) -> Any:
        if path not in self._open:
            try:
                self._open[path] = self._stack.enter_context(safe_open(path, framework="pt"))
            except FileNotFoundError:
                raise RequestError(path, "is missing", "fetch the model again") from None
            except SafetensorError as error:
                raise RequestError(
                    path, f"is not whole: {error}", "fetch the model again"
                ) from None
        return self._open[path]


@contextmanager
def reader(folder: Path) -> Iterator[Reader]:
    """Open a folder's safetensors, one file or many with an index."""
    with ExitStack() as stack:
        index = folder / _INDEX
        if index.exists():
            names = orjson.loads(index.read_bytes())["weight_map"]
            yield Reader(folder, {name: folder / file for name, file in names.items()}, stack)
        elif (folder / _SINGLE).exists():
            result = Reader(folder, {}, stack)
            result.files.update(
                dict.fromkeys(result._handle(folder / _SINGLE).keys(), folder / _SINGLE)
            )
            yield result
        else:
            raise RequestError(
                folder,
                f"holds neither {_SINGLE} nor {_INDEX}",
                "only safetensors are read; save the model with safe_serialization=True",
            )


def write_tensors(
    folder: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write tensors as safetensors: one file, or numbered ones with an index."""
    shards: list[list[str]] = []
    held: dict[str, torch.Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal held, size
        if held:
            save(held, folder / f"shard-{len(shards)}.safetensors")
            shards.append(list(held))
            held, size = {}, 0

    for name, tensor in tensors:
        if size + tensor.nbytes > max_shard_bytes:
            flush()
        held[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        (folder / "shard-0.safetensors").rename(folder / _SINGLE)
        return
    names: dict[str, str] = {}
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}.safetensors").rename(folder / file)
        names |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (folder / _INDEX).write_bytes(orjson.dumps(index, option=orjson.OPT_INDENT_2))


def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write one safetensors file; what goes wrong is an OSError, as for any other file."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(0, str(error)) from error


def write_settings(
    folder: Path, model: Model, dtype: torch.dtype, tokenizer: Path | None, source: Path | None,
    end_ids: tuple[int, ...] = (),
) -> None:  # fmt: skip
    """config.json, generation_config.json and the tokenizer's files.

    Args:
        tokenizer: the folder that the tokenizer is copied from.
        source: the base model's folder: what its config.json says beyond the shape is carried on.
        end_ids: the tokens that end an answer. A generation stops at them and at the base's own.
    """
    name = {torch.bfloat16: "bfloat16", torch.float32: "float32"}[dtype]
    config = read_config(source) if source else llama.config_of(model)
    # What the base says of its own weights, or of code that lies beside them, is not true of these.
    for key in ("dtype", "torch_dtype", "quantization_config", "auto_map"):
        config.pop(key, None)
    config["torch_dtype"] = name
    generation: dict[str, Any] = {}
    if source and (source / "generation_config.json").exists():
        generation = orjson.loads((source / "generation_config.json").read_bytes())
    if tokenizer is not None:
        tokenizers.copy(tokenizer, folder)
        read = tokenizers.read(folder)
        for target in (config, generation):
            target.setdefault("eos_token_id", read.eod)
            if read.bos is not None:
                target.setdefault("bos_token_id", read.bos)
    if end_ids:
        own = generation.get("eos_token_id", [])
        generation["eos_token_id"] = sorted({*end_ids, *(own if isinstance(own, list) else [own])})
    for file, value in (("config.json", config), ("generation_config.json", generation)):
        (folder / file).write_bytes(orjson.dumps(value, option=orjson.OPT_INDENT_2))


def write_random(folder: Path, model: Model, tokenizer: Path, seed: int) -> None:
    """A base model with random weights: matrices from N(0, init_std), norms one."""
    generator = torch.Generator().manual_seed(seed)
    width = model.head_width
    shapes = {
        "embed_tokens": (model.vocabulary_size, model.hidden_size),
        "lm_head": (model.vocabulary_size, model.hidden_size),
        "q_proj": (model.attention_heads * width, model.hidden_size),
        "k_proj": (model.kv_groups * width, model.hidden_size),
        "v_proj": (model.kv_groups * width, model.hidden_size),
        "o_proj": (model.hidden_size, model.attention_heads * width),
        "gate_proj": (model.ffn_hidden_size, model.hidden_size),
        "up_proj": (model.ffn_hidden_size, model.hidden_size),
        "down_proj": (model.hidden_size, model.ffn_hidden_size),
    }

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name in llama.hf_names(model):
            shape = shapes.get(name.split(".")[-2])
            if shape is None:
                yield name, torch.ones(model.hidden_size, dtype=torch.bfloat16)
            else:
                drawn = torch.randn(shape, generator=generator) * model.init_std
                yield name, drawn.to(torch.bfloat16)

    with whole_folder(folder) as partial:
        write_tensors(partial, tensors())
        write_settings(partial, model, torch.bfloat16, tokenizer, None)
