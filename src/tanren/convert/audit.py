"""The gate that every conversion goes through before its result gets its final name.

Names, shapes and types of all tensors, every element finite, the padding of the vocabulary gone (in
a Hugging Face folder) or zero (under megatron-core's names), config.json and the tokenizer true of
the tensors. What a writer reads it reads through `passing`, so that values are looked at once, on
their way; `check_hf` and `check_tensors` read a result that is there.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tanren.config.errors import RequestError
from tanren.config.model import Model
from tanren.convert import hf, llama, llama_config
from tanren.convert.tensors import Stored, Tensors, each, listed, rows
from tanren.data import tokenizer as tokenizers

# Threads that look through a result; numpy and page faults let go of Python's lock.
THREADS = 4
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
_PADDED = frozenset({"embedding.word_embeddings.weight", "output_layer.weight"})
_NOT_TOGETHER = "the config.json and the tensors of the model do not belong together"


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


def check_finite(name: str, values: torch.Tensor, place: object, start: int = 0) -> None:
    """Refuse a tensor that holds a NaN or an infinity, and say where.

    Args:
        start: of the whole tensor, the row that these begin with.
    """
    where = first_not_finite(values)
    if where is not None:
        index = [where[0] + start, *where[1:]]
        raise RequestError(
            place,
            f"{name} holds {float(values[where])} at {index}",
            "the weights are damaged, or their training had diverged: take a checkpoint from "
            "before that",
        )


@contextmanager
def passing(
    tensors: Tensors, wanted: Mapping[str, tuple[int, ...]], place: object,
    *, vocabulary: int | None = None,
) -> Iterator[Tensors]:  # fmt: skip
    """Tensors for a writer, who takes each of them once, whole or by rows; they are looked at then.

    Args:
        wanted: what there has to be, `llama.hf_shapes` or `llama.mcore_shapes`.
        place: the file or folder that a person would look into.
        vocabulary: rows of embedding and head from here on are padding.
    Raises:
        RequestError: there are other tensors, or one holds what is not finite, or padding that is
            not zero.
    """
    llama.check_tensors(tensors.stored, wanted, place, strict=True)
    passed = _Passing(tensors, place, vocabulary)
    yield passed
    passed.finish()


class _Passing:
    def __init__(self, tensors: Tensors, place: object, vocabulary: int | None) -> None:
        self._tensors, self._place, self._vocabulary = tensors, place, vocabulary
        self.stored = tensors.stored
        self._seen: Counter[tuple[str, int | None]] = Counter()
        self._lock = threading.Lock()

    def read(self, name: str, layer: int | None = None) -> torch.Tensor:
        return self._look(name, layer, 0, self._tensors.read(name, layer))

    def rows(self, name: str, layer: int | None, start: int, stop: int) -> torch.Tensor:
        return self._look(name, layer, start, rows(self._tensors, name, layer, start, stop))

    def _look(self, name: str, layer: int | None, start: int, values: torch.Tensor) -> torch.Tensor:
        shown = name if layer is None else f"{name} of layer {layer}"
        values = values.contiguous()
        check_finite(shown, values, self._place, start)
        if self._vocabulary is not None and name in _PADDED:
            padding = values[max(self._vocabulary - start, 0) :]
            if padding.count_nonzero():
                raise RequestError(
                    self._place,
                    f"{shown} is not zero in its rows from {self._vocabulary} on, which pad the "
                    "vocabulary",
                    "the vocabulary is larger than is stated, or rows were mixed up",
                )
        with self._lock:
            self._seen[name, layer] += values.numel()
        return values

    def finish(self) -> None:
        """Make sure that the writer took all there is."""
        for name, stored in self.stored.items():
            elements = torch.Size(stored.shape).numel()
            if self._seen[name, None] == elements:
                continue
            layers = {self._seen[name, layer] * stored.shape[0] for layer in range(stored.shape[0])}
            assert layers == {elements}, f"{name} was not written whole"


def check_tensors(
    model: Model, tensors: Tensors, place: object, *, tokenizer: Path | None = None
) -> None:
    """Read a whole checkpoint under megatron-core's names and refuse what is not right with it.

    Args:
        tokenizer: the tokenizer that goes with it, a folder or a SentencePiece model.
    """
    shapes = llama.mcore_shapes(model)
    with passing(tensors, shapes, place, vocabulary=model.vocabulary_size) as passed:
        parts = [
            (entry.mcore, layer)
            for entry in llama.table(model)
            for layer in (range(model.layers) if entry.stacked else (None,))
        ]
        each(lambda part: _drop(passed.read(*part)), parts, THREADS)
    if tokenizer is not None:
        check_tokenizer(tokenizer, model.vocabulary_size, place)


def _drop(tensor: torch.Tensor) -> None:
    """What was looked at is not kept until the others have been."""


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
    there = llama_config.model_of(config, config_place)
    if model is not None and (differing := llama_config.differences(model, there)):
        raise RequestError(
            config_place, f"does not state the shape of the tensors: {'; '.join(differing)}",
            "mend the config.json of the model that it was taken from",
        )  # fmt: skip
    wanted = llama.hf_shapes(there)
    with hf.open_model(folder) as tensors:
        # Some programs write the tied head as well; then it has to be the embedding.
        if there.tied_embeddings and "lm_head.weight" in tensors.stored:
            check_tied(tensors, place)
            wanted["lm_head.weight"] = wanted["model.embed_tokens.weight"]
        _check_types(config, tensors.stored, config_place)
        if values:
            with passing(tensors, wanted, place) as passed:
                each(lambda name: _drop(passed.read(name)), wanted, THREADS)
        else:
            llama.check_tensors(tensors.stored, wanted, place, strict=True)
    _check_ids(config, there.vocabulary_size, config_place)
    name = "generation_config.json"
    if (folder / name).exists():
        _check_ids(hf.read_config(folder, name), there.vocabulary_size, f"{place}/{name}")
    if tokenizers.is_there(folder):
        check_tokenizer(folder, there.vocabulary_size, place)
    return there


def check_base(folder: Path, tensors: Tensors, model: Model) -> None:
    """Refuse a Hugging Face folder before anything is made of it.

    Args:
        tensors: the folder's.
    """
    if model.tied_embeddings and "lm_head.weight" in tensors.stored:
        check_tied(tensors, folder)
    if tokenizers.is_there(folder):
        check_tokenizer(folder, model.vocabulary_size, folder)


def check_tied(tensors: Tensors, place: object) -> None:
    """Refuse a head of its own in a folder whose config.json says that it is the embedding."""
    head, embedding = tensors.read("lm_head.weight"), tensors.read("model.embed_tokens.weight")
    same = head.shape == embedding.shape and head.dtype == embedding.dtype
    # Of bits, so that a NaN is not what they differ in.
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


def _check_ids(settings: dict[str, Any], rows: int, place: object) -> None:
    """Special tokens that a settings file names have to have a row of the embedding."""
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
