"""A checkpoint's tensors by name, read when they are asked for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar, runtime_checkable

import torch


@dataclass(frozen=True)
class Stored:
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Tensors(Protocol):
    """A checkpoint's weights, under megatron-core's names or under Hugging Face's.

    Under megatron-core's, as convert/llama.py's table has them, those of the decoder's layers are
    stacked: [layers, ...]. Several threads may read at a time.
    """

    @property
    def stored(self) -> Mapping[str, Stored]: ...

    def read(self, name: str, layer: int | None = None) -> torch.Tensor:
        """One tensor; of a stacked one the tensor of that layer. Memory-mapped where it can be:
        read-only, and out of memory again when nothing refers to it."""


@runtime_checkable
class ByRows(Tensors, Protocol):
    """Tensors of which a few rows are read without the rest."""

    def rows(self, name: str, layer: int | None, start: int, stop: int) -> torch.Tensor: ...


def rows(tensors: Tensors, name: str, layer: int | None, start: int, stop: int) -> torch.Tensor:
    """Rows [start, stop) of a tensor, or of one layer's.

    Of what is memory-mapped only the pages of these rows come to be in memory, either way.
    """
    if isinstance(tensors, ByRows):
        return tensors.rows(name, layer, start, stop)
    return tensors.read(name, layer)[start:stop]


class Held:
    """Tensors that are in memory already."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self.stored = {
            name: Stored(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()
        }

    def read(self, name: str, layer: int | None = None) -> torch.Tensor:
        tensor = self._tensors[name]
        return tensor if layer is None else tensor[layer]


class Cast:
    """The same tensors in another type."""

    def __init__(self, tensors: Tensors, dtype: torch.dtype) -> None:
        self._tensors, self._dtype = tensors, dtype
        self.stored = {
            name: replace(one, dtype=dtype) if one.dtype.is_floating_point else one
            for name, one in tensors.stored.items()
        }

    def read(self, name: str, layer: int | None = None) -> torch.Tensor:
        return self._tensors.read(name, layer).to(self.stored[name].dtype)

    def rows(self, name: str, layer: int | None, start: int, stop: int) -> torch.Tensor:
        return rows(self._tensors, name, layer, start, stop).to(self.stored[name].dtype)


_LAYER = re.compile(r"(?<=layers\.)\d+(?=\.)")
Item = TypeVar("Item")
Result = TypeVar("Result")


def each(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> list[Result]:
    """The function's results, by several threads; the first error ends the rest."""
    with ThreadPoolExecutor(threads) as pool:
        waiting = [pool.submit(function, item) for item in items]
        try:
            return [one.result() for one in waiting]
        finally:
            for one in waiting:
                one.cancel()


def listed(names: Iterable[str]) -> str:
    """All of these names for people: `lm_head.weight, model.layers.{0-3,7}.mlp.up_proj.weight`."""
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
