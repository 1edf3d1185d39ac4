"""The gate that every conversion goes through before its result gets its final name.

Names, shapes and types of all tensors, every element finite, the padding of the vocabulary gone (in
a Hugging Face folder) or zero (under megatron-core's names), config.json and the tokenizer true of
the tensors. A converter hands each tensor to a `Check` on its way, so that values are read once;
`check_hf` and `check_tensors` read a result that is there.
"""

from __future__ import annotations

import itertools
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import torch
from safetensors import safe_open

from tanren.config.errors import RequestError
from tanren.config.model import Model
from tanren.convert import hf, llama
from tanren.convert.tensors import Stored, Tensors
from tanren.data import tokenizer as tokenizers

Shapes = Mapping[str, tuple[int, ...]]
Named = tuple[str, torch.Tensor]
# Elements looked at a time: in a core's cache, so that the second look costs no memory traffic.
_CHUNK = 2**20
# The bits of infinity. All that is above it is no number, with the sign bit as without.
_INFINITY: dict[torch.dtype, tuple[Any, Any, int]] = {
    torch.bfloat16: (np.int16, np.uint16, 0x7F80),
    torch.float16: (np.int16, np.uint16, 0x7C00),
    torch.float32: (np.int32, np.uint32, 0x7F800000),
    torch.float64: (np.int64, np.uint64, 0x7FF0000000000000),
}
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_LAYER = re.compile(r"(?<=layers\.)\d+(?=\.)")
_PADDED = frozenset({"embedding.word_embeddings.weight", "output_layer.weight"})
_NOT_TOGETHER = "the config.json and the tensors of the model do not belong together"


def hf_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Every tensor of the Hugging Face model, without the padding of the vocabulary."""
    found: dict[str, tuple[int, ...]] = {}
    for entry in llama.table(model):
        parts = entry.split(model, torch.empty(entry.shape, device="meta"))
        for layer in range(model.layers) if entry.stacked else range(1):
            for name, part in zip(entry.hf, parts, strict=True):
                found[name.format(layer=layer)] = tuple(part.shape)
    return found


def mcore_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Every tensor under megatron-core's names, those of the decoder's layers stacked."""
    return {
        entry.mcore: (model.layers, *entry.shape) if entry.stacked else entry.shape
        for entry in llama.table(model)
    }


def check_names(wanted: Shapes, there: Shapes, place: object) -> None:
    """Refuse tensors that lack, are too many or have another shape; all of them are named."""
    problems = []
    if missing := wanted.keys() - there.keys():
        problems.append(f"lacks {listed(missing)}")
    if surplus := there.keys() - wanted.keys():
        problems.append(f"has {listed(surplus)}, which a model of this shape has not")
    problems += [
        f"{name} has the shape {list(there[name])}, and the model's is {list(wanted[name])}"
        for name in wanted
        if name in there and tuple(there[name]) != tuple(wanted[name])
    ][:5]
    if problems:
        raise RequestError(place, "; ".join(problems), _NOT_TOGETHER)


def listed(names: Iterable[str]) -> str:
    """Names of tensors for people: `model.layers.{0-3,7}.mlp.up_proj.weight, lm_head.weight`."""
    layers: dict[str, list[int]] = {}
    for name in sorted(names):
        numbers = layers.setdefault(_LAYER.sub("{}", name, count=1), [])
        numbers += map(int, _LAYER.findall(name)[:1])
    return ", ".join(
        pattern.replace("{}", str(numbers[0]) if len(numbers) == 1 else f"{{{_ranges(numbers)}}}")
        for pattern, numbers in layers.items()
    )


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def first_not_finite(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """Where the first NaN or infinity is; None where every element is finite.

    Two maxima of the elements' bits taken as integers, with a sign and without: at the speed of
    memory (12 GB/s of bf16 on one core, a hundred times as fast as torch.isfinite there).
    """
    if tensor.dtype not in _INFINITY or not tensor.numel():
        return None
    signed, unsigned, infinity = _INFINITY[tensor.dtype]
    flat = tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
    bits: npt.NDArray[Any] = flat.numpy()
    minus_infinity = infinity | 1 << (8 * tensor.element_size() - 1)
    assert bits.dtype == signed
    for start in range(0, bits.size, _CHUNK):
        chunk = bits[start : start + _CHUNK]
        if chunk.max() >= infinity or chunk.view(unsigned).max() >= minus_infinity:
            where = start + int(np.argmax((chunk & signed(infinity)) == infinity))
            return tuple(int(i) for i in np.unravel_index(where, tuple(tensor.shape)))
    return None


def check_finite(name: str, tensor: torch.Tensor, place: object) -> None:
    """Refuse a tensor that holds a NaN or an infinity, and say where."""
    where = first_not_finite(tensor)
    if where is not None:
        raise RequestError(
            place,
            f"{name} holds {float(tensor[where])} at {list(where)}",
            "the weights are damaged, or their training had diverged: take a checkpoint from "
            "before that",
        )


@dataclass
class Check:
    """What a result's tensors have to be, held against each of them as it passes by.

    Threads may share one. Each tensor of `shapes` is added once, whole, or, where it is stacked
    over the layers, one layer at a time.

    Args:
        shapes: what there has to be, see `hf_shapes` and `mcore_shapes`.
        place: the file or folder that a person would look into.
        vocabulary: rows from here on of the tensors in `padded` have to be zero.
    """

    shapes: Shapes
    place: object
    vocabulary: int = 0
    padded: frozenset[str] = frozenset()
    _seen: dict[str, set[int]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def of_hf(cls, model: Model, place: object) -> Check:
        """For tensors on their way into a Hugging Face folder."""
        return cls(hf_shapes(model), place)

    @classmethod
    def of_mcore(cls, model: Model, place: object) -> Check:
        """For tensors on their way into a checkpoint under megatron-core's names."""
        return cls(mcore_shapes(model), place, model.vocabulary_size, _PADDED)

    def add(self, name: str, tensor: torch.Tensor, layer: int | None = None) -> None:
        """Look at one tensor, or at one layer of a stacked one.

        Raises:
            RequestError: it is not of the model, it has another shape, is there twice, or holds
                what is not finite, or padding that is not zero.
        """
        self._note(name, tensor, layer)
        shown = name if layer is None else f"{name} of layer {layer}"
        check_finite(shown, tensor, self.place)
        if name in self.padded and tensor[self.vocabulary :].any():
            raise RequestError(
                self.place,
                f"{shown} is not zero in its rows from {self.vocabulary} on, which pad the "
                "vocabulary",
                "the vocabulary is larger than the config.json states, or rows were mixed up",
            )

    def through(self, tensors: Iterable[Named]) -> Iterator[Named]:
        """The same tensors, each looked at as it passes by; at the end all have to be there."""
        for name, tensor in tensors:
            self.add(name, tensor)
            yield name, tensor
        self.finish()

    def _note(self, name: str, tensor: torch.Tensor, layer: int | None) -> None:
        wanted = self.shapes.get(name)
        if wanted is None:
            check_names(self.shapes, {**self.shapes, name: tuple(tensor.shape)}, self.place)
        assert wanted is not None
        if layer is None:
            layers, shape = {-1}, wanted
        else:
            assert 0 <= layer < wanted[0], (name, layer)
            layers, shape = {layer}, wanted[1:]
        if tuple(tensor.shape) != shape:
            shown = name if layer is None else f"{name} of layer {layer}"
            raise RequestError(
                self.place,
                f"{shown} has the shape {list(tensor.shape)}, and the model's is {list(shape)}",
                _NOT_TOGETHER,
            )
        with self._lock:
            seen = self._seen.setdefault(name, set())
            assert not layers & seen, f"{name} came twice"
            seen |= layers

    def finish(self) -> None:
        """Refuse the result when a tensor, or a layer of one, did not come."""
        missing = []
        for name, shape in self.shapes.items():
            seen = self._seen.get(name, set())
            if not seen:
                missing.append(name)
            elif -1 not in seen and len(seen) < shape[0]:
                absent = sorted(set(range(shape[0])) - seen)
                missing.append(f"{name} of layers {_ranges(absent)}")
        if missing:
            raise RequestError(self.place, f"lacks {listed(missing)}", _NOT_TOGETHER)


def check_tensors(
    model: Model, tensors: Tensors, place: object, *, tokenizer: Path | None = None
) -> None:
    """Read a whole checkpoint under megatron-core's names and refuse what is not right with it.

    Args:
        tokenizer: the folder of the tokenizer that goes with it.
    """
    check_names(
        mcore_shapes(model),
        {name: stored.shape for name, stored in tensors.stored.items()},
        place,
    )
    check = Check.of_mcore(model, place)

    def look(name: str, layer: int | None) -> None:
        check.add(name, tensors.read(name, layer), layer)

    _in_threads(
        look,
        [
            (entry.mcore, layer)
            for entry in llama.table(model)
            for layer in (range(model.layers) if entry.stacked else (None,))
        ],
    )
    check.finish()
    if tokenizer is not None:
        check_tokenizer(tokenizer, model.vocabulary_size, place)


def check_hf(
    folder: Path, model: Model | None = None, *, values: bool = True, place: object = None
) -> Model:
    """Look through a Hugging Face folder: config.json, index, tensors, tokenizer.

    Args:
        model: the shape that it has to have; None for the one that its config.json states.
        values: look at every element; False where a `Check` has seen them all on their way.
        place: what errors name instead of the folder, which may not have its final name yet.
    Returns:
        the shape.
    Raises:
        RequestError: something is not right; the message names the tensor or the field.
    """
    place = folder if place is None else place
    config_place = f"{place}/config.json"
    config = hf.read_config(folder)
    there = llama.model_of(config, config_place)
    if model is not None and (differing := llama.differences(model, there)):
        raise RequestError(
            config_place, f"does not state the shape of the tensors: {'; '.join(differing)}",
            "mend the config.json of the model that it was taken from",
        )  # fmt: skip
    files = _headers(folder, place)
    stored = {name: one for headers in files.values() for name, one in headers.items()}
    wanted = hf_shapes(there)
    # Some programs write the tied head as well; then it has to be the embedding.
    if there.tied_embeddings and "lm_head.weight" in stored:
        wanted["lm_head.weight"] = wanted["model.embed_tokens.weight"]
        check_tied(folder, place)
    check_names(wanted, {name: one.shape for name, one in stored.items()}, place)
    _check_types(config, stored, config_place)
    if values:
        check = Check(wanted, place)
        for file in files:
            # A file at a time: what is memory-mapped counts as this process's memory.
            with safe_open(file, framework="pt") as opened:
                _in_threads(
                    lambda name, opened=opened: check.add(name, opened.get_tensor(name)),
                    [(name,) for name in files[file]],
                )
        check.finish()
    for file_name in ("config.json", "generation_config.json"):
        _check_ids(folder / file_name, there.vocabulary_size, f"{place}/{file_name}")
    if tokenizers.is_there(folder):
        check_tokenizer(folder, there.vocabulary_size, place)
    return there


def check_tied(folder: Path, place: object) -> None:
    """Refuse a head of its own in a folder whose config.json says that it is the embedding."""
    with hf.reader(folder) as read:
        head, embedding = read("lm_head.weight"), read("model.embed_tokens.weight")
        # Of bits, so that a NaN is not what they differ in.
        same = head.shape == embedding.shape and head.dtype == embedding.dtype
        if not (same and torch.equal(head.view(torch.uint8), embedding.view(torch.uint8))):
            raise RequestError(
                place,
                "lm_head.weight is not model.embed_tokens.weight, and config.json states "
                "tie_word_embeddings",
                "set tie_word_embeddings to false in its config.json, or drop lm_head.weight",
            )


def check_tokenizer(tokenizer: Path, rows: int, place: object) -> None:
    """Refuse a tokenizer that has ids beyond the embedding's rows."""
    largest = tokenizers.largest_id(tokenizer)
    if largest >= rows:
        raise RequestError(
            place,
            f"the embedding has {rows} rows, and the tokenizer's largest id is {largest}",
            "use the tokenizer that the model was trained with",
        )


def _headers(folder: Path, place: object) -> dict[Path, dict[str, Stored]]:
    """What each file of tensors holds, once the index and the files agree."""
    with hf.reader(folder) as read:
        found: dict[Path, dict[str, Stored]] = {}
        for file in sorted(set(read.files.values())):
            # By way of the reader, which says what is wrong with a file that cannot be opened.
            opened = read._handle(file)
            found[file] = {}
            for name in opened.keys():  # noqa: SIM118
                one = opened.get_slice(name)
                found[file][name] = Stored(tuple(one.get_shape()), opened.get_tensor(name).dtype)
            listed_here = {name for name, where in read.files.items() if where == file}
            if lacking := listed_here - found[file].keys():
                raise RequestError(
                    f"{place}/{file.name}", f"lacks {listed(lacking)}, which the index states",
                    "the files are of two models: fetch or write the folder again",
                )  # fmt: skip
            if hidden := found[file].keys() - listed_here:
                raise RequestError(
                    f"{place}/{file.name}", f"has {listed(hidden)}, which the index does not state",
                    "the files are of two models: fetch or write the folder again",
                )  # fmt: skip
        return found


def _check_types(config: dict[str, Any], stored: Mapping[str, Stored], place: object) -> None:
    stated = config.get("dtype", config.get("torch_dtype"))
    if stated is None:
        return
    other = {name: one.dtype for name, one in stored.items() if str(one.dtype) != f"torch.{stated}"}
    if other:
        types = ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in other.values()}))
        raise RequestError(
            place, f"states the type {stated}, and {listed(other)} are in {types}", _NOT_TOGETHER
        )


def _check_ids(path: Path, rows: int, place: object) -> None:
    """Special tokens that a settings file names have to have a row of the embedding."""
    if not path.is_file():
        return
    settings = orjson.loads(path.read_bytes())
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = settings.get(key)
        for number in value if isinstance(value, list) else [value]:
            # The first LLaMAs say -1 for no padding.
            if number is None or (key == "pad_token_id" and number == -1):
                continue
            if not isinstance(number, int) or not 0 <= number < rows:
                raise RequestError(
                    place, f"{key} is {number!r}, and the embedding has {rows} rows",
                    "state an id that the tokenizer has",
                )  # fmt: skip


def _in_threads(look: Callable[..., None], given: Iterable[tuple[Any, ...]]) -> None:
    """Call for each; the first error ends it. numpy and page faults let go of Python's lock."""
    threads = min(8, len(os.sched_getaffinity(0)))
    work = iter(given)
    with ThreadPoolExecutor(threads) as pool:
        # A few at a time, so that an error is not followed by all that was asked for.
        while batch := list(itertools.islice(work, 4 * threads)):
            for done in [pool.submit(look, *one) for one in batch]:
                done.result()
