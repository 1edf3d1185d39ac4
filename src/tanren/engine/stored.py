"""Boxes read from a torch_dist checkpoint, by this process alone: whatever layout saved them."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from tanren.config.errors import RequestError
from tanren.engine.boxes import Chunk, Part


class Stored:
    """The tensors of a checkpoint.

    Each blob that a range asks for is read once and whole: the same layout reads its own share of
    the checkpoint, another one up to what its neighbours' boxes hold besides.
    """

    def __init__(self, checkpoint: Path) -> None:
        """Read what is where.

        Raises:
            RequestError: `.metadata` is missing or broken.
        """
        self.checkpoint = checkpoint
        try:
            self._metadata = FileSystemReader(checkpoint).read_metadata()
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise RequestError(checkpoint / ".metadata", f"cannot be read: {error}") from error
        self._places: dict[str, np.ndarray[Any, Any]] = {}

    def read(
        self, parts: tuple[Part, ...], start: int, end: int, name: str, dtype: torch.dtype
    ) -> torch.Tensor:
        """The range [start, end) of a flat parameter. Several threads may read at a time.

        Args:
            name: the tensor's, where `{}` stands for the part's.
        Raises:
            RequestError: the checkpoint holds no such tensor, or one of another shape.
        """
        found = torch.empty(end - start, dtype=dtype)
        wanted: dict[tuple[str, int], list[Chunk]] = {}
        for part in parts:
            for chunk in part.chunks(start, end):
                key = name.format(part.name)
                for index in self._overlapping(key, chunk):
                    wanted.setdefault((key, int(index)), []).append(chunk)
        filled = sum(self._copy(*one, chunks, found, start) for one, chunks in wanted.items())
        assert filled == end - start, f"{self.checkpoint}: {name} has holes"
        return found

    def _overlapping(self, name: str, chunk: Chunk) -> list[int]:
        """Which of the stored chunks of a tensor have something of this one."""
        stored = self._metadata.state_dict_metadata.get(name)
        if not isinstance(stored, TensorStorageMetadata):
            raise RequestError(
                self.checkpoint, f"holds no tensor {name}", "is it a checkpoint of this run?"
            )
        if tuple(stored.size) != chunk.shape:
            raise RequestError(
                self.checkpoint,
                f"{name} is {list(stored.size)} there and {list(chunk.shape)} here",
                "is it a checkpoint of this run?",
            )
        if name not in self._places:
            self._places[name] = np.array([[one.offsets, one.sizes] for one in stored.chunks])
        offsets, sizes = self._places[name][:, 0], self._places[name][:, 1]
        first = np.array(chunk.offsets)
        inside = (offsets < first + chunk.sizes) & (offsets + sizes > first)
        found: list[int] = np.flatnonzero(inside.all(1)).tolist()
        return found

    def _copy(
        self, name: str, index: int, chunks: list[Chunk], target: torch.Tensor, start: int
    ) -> int:
        """Copy from one stored chunk what these want of it; the number of elements."""
        there = self._metadata.state_dict_metadata[name].chunks[index]
        blob = self._blob(name, there)
        copied = 0
        for chunk in chunks:
            low = [max(a, b) for a, b in zip(chunk.offsets, there.offsets, strict=True)]
            high = [
                min(a + n, b + m)
                for a, n, b, m in zip(
                    chunk.offsets, chunk.sizes, there.offsets, there.sizes, strict=True
                )
            ]
            mine = target[chunk.first - start :][: chunk.numel].view(chunk.sizes)
            part = blob[_window(low, high, there.offsets)]
            mine[_window(low, high, chunk.offsets)].copy_(part)
            copied += part.numel()
        return copied

    def _blob(self, name: str, there: Any) -> torch.Tensor:
        place = self._metadata.storage_data[MetadataIndex(name, there.offsets)]
        file = self.checkpoint / place.relative_path
        with file.open("rb") as stream:
            stream.seek(place.offset)
            content = stream.read(place.length)
        try:
            tensor = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise RequestError(
                file, f"is broken: {error}", "remove the checkpoint: the run goes on from another"
            ) from error
        assert isinstance(tensor, torch.Tensor)
        # Some writers leave out the axes of length 1 that stand for the layer.
        return tensor.view(there.sizes)


def _window(low: list[int], high: list[int], origin: Any) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))
