"""A rank's flat share of a parameter, read from the boxes of a torch_dist checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from tanren.config.errors import RequestError
from tanren.convert.torch_dist import Boxes
from tanren.engine.boxes import Chunk, Part


class Stored:
    """The tensors of a checkpoint, whatever layout saved them.

    Of each box that a range asks for, what it asks for is read, once.
    """

    def __init__(self, checkpoint: Path) -> None:
        """Read what is where.

        Raises:
            RequestError: `.metadata` is missing or broken.
        """
        self.checkpoint = checkpoint
        self._boxes = Boxes(checkpoint)

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
        filled = 0
        for part in parts:
            for chunk in part.chunks(start, end):
                key = name.format(part.name)
                self._check(key, chunk)
                mine = found[chunk.first - start :][: chunk.numel].view(chunk.sizes)
                for low, values in self._boxes.cuts(key, chunk.offsets, chunk.sizes):
                    window = zip(low, chunk.offsets, values.shape, strict=True)
                    mine[tuple(slice(at - o, at - o + n) for at, o, n in window)].copy_(values)
                    filled += values.numel()
        assert filled == end - start, f"{self.checkpoint}: {name} has holes"
        return found

    def _check(self, name: str, chunk: Chunk) -> None:
        stored = self._boxes.stored.get(name)
        if stored is None:
            raise RequestError(
                self.checkpoint, f"holds no tensor {name}", "is it a checkpoint of this run?"
            )
        if stored.shape != chunk.shape:
            raise RequestError(
                self.checkpoint,
                f"{name} is {list(stored.shape)} there and {list(chunk.shape)} here",
                "is it a checkpoint of this run?",
            )
