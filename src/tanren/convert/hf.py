"""Hugging Face folders: read tensors by name, write a whole folder or nothing."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import torch

from tanren.config.errors import RequestError
from tanren.config.model import Model
from tanren.convert import llama, llama_config, safetensors
from tanren.convert.tensors import Stored, Tensors
from tanren.data import hub, template
from tanren.data import tokenizer as tokenizers
from tanren.data.fetch import fetch
from tanren.runs import whole_folder

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# As config.json calls them.
_KINDS = {
    torch.bfloat16: "bfloat16", torch.float32: "float32", torch.float16: "float16",
}  # fmt: skip
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# Tensors a file: what one file of a large model usually holds.
MAX_SHARD_BYTES = 5 * 10**9
# Rows of a random matrix that are drawn together.
_BLOCK = 4096


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


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """config.json of a Hugging Face folder, or another of its settings."""
    path = folder / name
    try:
        value = json.loads(
            path.read_bytes(),
            object_pairs_hook=lambda pairs: safetensors.no_duplicates(pairs, path),
        )
    except FileNotFoundError:
        raise RequestError(path, "is missing", "name a folder that holds a model") from None
    except OSError as error:
        raise RequestError(path, f"cannot be read: {error.strerror}", "check its rights") from None
    except ValueError as error:
        raise RequestError(path, f"is not JSON: {error}", "fetch the model again") from None
    if not isinstance(value, dict):
        raise RequestError(path, "is not a JSON object", "fetch the model again")
    return value


class Weights:
    """The tensors of a Hugging Face folder."""

    def __init__(self, folder: Path, places: Mapping[str, safetensors.Place]) -> None:
        self.folder, self._places = folder, places
        self.stored = {name: place.stored for name, place in places.items()}

    def read(self, name: str, layer: int | None = None) -> torch.Tensor:
        return self._places[name].read()

    def rows(self, name: str, layer: int | None, start: int, stop: int) -> torch.Tensor:
        return self._places[name].read(start, stop)


@contextmanager
def open_model(folder: Path) -> Iterator[Tensors]:
    """The tensors of a folder's safetensors, one file or many with an index.

    Raises:
        RequestError: a file is missing or not whole, or a tensor is in two of them.
    """
    index, single = folder / _INDEX, folder / _SINGLE
    if not index.exists() and not single.exists():
        lost = any(folder.glob("model-*-of-*.safetensors"))
        raise RequestError(
            folder,
            f"holds neither {_SINGLE} nor {_INDEX}",
            "fetch the model again: its files are not known without the index"
            if lost
            else "only safetensors are read; save the model with safe_serialization=True",
        )
    if not index.exists():
        yield Weights(folder, safetensors.read_header(single))
        return
    wanted = read_index(index)
    found: dict[str, safetensors.Place] = {}
    # A single file beside the index is what many read instead of it.
    beside = {_SINGLE} if single.exists() else set()
    for file in sorted({*wanted.values(), *beside}):
        for name, place in safetensors.read_header(folder / file).items():
            if name in found:
                raise RequestError(
                    folder,
                    f"{found[name].file.name} and {file} both hold {name}",
                    "remove the files that the model is not made of",
                )
            found[name] = place
    for name, file in wanted.items():
        if name not in found or found[name].file != folder / file:
            raise RequestError(
                index, f"says that {name} is in {file}, and it is not", "fetch the model again"
            )
    surplus = [name for name in found if name not in wanted]
    if surplus:
        raise RequestError(
            index, f"does not name {surplus[0]}, which {found[surplus[0]].file.name} holds",
            "fetch the model again",
        )  # fmt: skip
    yield Weights(folder, found)


def read_index(index: Path) -> dict[str, str]:
    """Which file each tensor is in, as the index of a model in several files says."""
    again = "fetch the model again"
    try:
        value = json.loads(
            index.read_bytes(),
            object_pairs_hook=lambda pairs: safetensors.no_duplicates(pairs, index),
        )
        files = dict(value["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise RequestError(index, f"is not an index of tensors: {error!r}", again) from None
    except OSError as error:
        raise RequestError(index, f"cannot be read: {error.strerror}", again) from None
    for name, file in files.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise RequestError(index, f"{name} is in {file!r}, which is no file beside it", again)
    return files


def write_tensors(
    folder: Path, tensors: Tensors, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write tensors as safetensors: one file, or numbered ones with an index."""
    shards: list[list[str]] = [[]]
    size = total = 0
    for name, stored in tensors.stored.items():
        if shards[-1] and size + stored.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += stored.nbytes
        total += stored.nbytes
    if len(shards) == 1:
        safetensors.write({folder / _SINGLE: shards[0]}, tensors)
        return
    files = {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": names
        for number, names in enumerate(shards, 1)
    }
    safetensors.write({folder / file: names for file, names in files.items()}, tensors)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: file for file, names in files.items() for name in names},
    }
    (folder / _INDEX).write_bytes(orjson.dumps(index, option=orjson.OPT_INDENT_2))


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
    config = read_config(source) if source else llama_config.config_of(model)
    # What the base says of its own weights, or of code that lies beside them, is not true of these.
    for key in ("dtype", "torch_dtype", "quantization_config", "auto_map"):
        config.pop(key, None)
    config["torch_dtype"] = _KINDS[dtype]
    generation: dict[str, Any] = {}
    if source and (source / "generation_config.json").exists():
        generation = read_config(source, "generation_config.json")
    if tokenizer is not None:
        # That of the source, so that what is wrong with it is named by its place.
        read = tokenizers.read(tokenizer)
        tokenizers.copy(tokenizer, folder)
        for target in (config, generation):
            target.setdefault("eos_token_id", read.eod)
            if read.bos is not None:
                target.setdefault("bos_token_id", read.bos)
    if end_ids:
        own = generation.get("eos_token_id", [])
        generation["eos_token_id"] = sorted({*end_ids, *(own if isinstance(own, list) else [own])})
    for file, value in (("config.json", config), ("generation_config.json", generation)):
        (folder / file).write_bytes(orjson.dumps(value, option=orjson.OPT_INDENT_2))


def write_model(
    folder: Path,
    model: Model,
    tensors: Tensors,
    *,
    tokenizer: Path | None,
    base: Path | None,
    end_ids: tuple[int, ...] = (),
    max_shard_bytes: int = MAX_SHARD_BYTES,
    generation: Path | None = None,
    place: object = None,
    verify: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write a whole Hugging Face folder; it appears when it is whole, and has passed the gate.

    Args:
        tensors: under Hugging Face's names (`llama.to_hf`).
        tokenizer, base, end_ids: see `write_settings`.
        generation: a generation_config.json to carry over as it is.
        place: where the tensors come from, for errors; None for the folder.
        verify: is given the folder before it gets its name; what it raises ends it.
    """
    from tanren.convert import audit  # which reads by this module

    with whole_folder(folder) as partial:
        with audit.passing(tensors, llama.hf_shapes(model), place or folder) as passed:
            write_tensors(partial, passed, max_shard_bytes=max_shard_bytes)
        dtype = next(iter(tensors.stored.values())).dtype
        write_settings(partial, model, dtype, tokenizer, base, end_ids)
        if generation is not None:
            shutil.copyfile(generation, partial / "generation_config.json")
        template.make_fast(partial)
        audit.check_hf(partial, model, values=False, place=folder)
        verify(partial)


class _Random:
    """Matrices from N(0, init_std), norms one: each tensor is drawn when it is read."""

    def __init__(self, model: Model, seed: int) -> None:
        self._std, self._seed = model.init_std, seed
        self.stored = {
            name: Stored(shape, torch.bfloat16) for name, shape in llama.hf_shapes(model).items()
        }

    def read(self, name: str, layer: int | None = None) -> torch.Tensor:
        return self.rows(name, layer, 0, self.stored[name].shape[0])

    def rows(self, name: str, layer: int | None, start: int, stop: int) -> torch.Tensor:
        shape = self.stored[name].shape
        if len(shape) == 1:
            return torch.ones(stop - start, dtype=torch.bfloat16)
        # A stream for each block of rows, so that they are alike however many are read at once.
        drawn = torch.empty(stop - start, shape[1], dtype=torch.bfloat16)
        for block in range(start // _BLOCK, -(-stop // _BLOCK)):
            first, last = block * _BLOCK, min((block + 1) * _BLOCK, shape[0])
            state = zlib.crc32(f"{self._seed} {name} {block}".encode())
            generator = torch.Generator().manual_seed(state)
            values = torch.randn(last - first, shape[1], generator=generator) * self._std
            low, high = max(first, start), min(last, stop)
            drawn[low - start : high - start] = values[low - first : high - first]
        return drawn


def write_random(folder: Path, model: Model, tokenizer: Path, seed: int) -> None:
    """A base model with random weights: matrices from N(0, init_std), norms one."""
    with whole_folder(folder) as partial:
        write_tensors(partial, _Random(model, seed))
        write_settings(partial, model, torch.bfloat16, tokenizer, None)
