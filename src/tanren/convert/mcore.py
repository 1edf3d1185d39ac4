"""megatron-core `torch_dist` checkpoints as plain tensors: no model, no GPU, no process group."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tanren import runs
from tanren.config.errors import RequestError
from tanren.config.model import Model
from tanren.convert import audit, llama, torch_dist
from tanren.convert.tensors import Tensors

FORMAT = b'{"sharded_backend": "torch_dist", "sharded_backend_version": 1, '
FORMAT += b'"common_backend": "torch", "common_backend_version": 1}'
# What a checkpoint of a training holds beside the weights.
_OPTIMIZER = ("optimizer.", "chained_")


def write_base(
    model: Model, tensors: Tensors, checkpoint: Path, *, iteration: int = 0, place: object = None
) -> None:
    """Write a weights-only checkpoint that any layout loads.

    Args:
        tensors: under megatron-core's names (`llama.to_mcore`).
        checkpoint: the final folder; it appears when it is whole, and has passed the gate.
        place: where the tensors come from, for errors; None for the checkpoint.
    """
    shapes = llama.mcore_shapes(model)
    with runs.whole_folder(checkpoint) as partial:
        with audit.passing(
            tensors, shapes, place or checkpoint, vocabulary=model.vocabulary_size
        ) as passed:
            torch_dist.write(partial, passed)
        common = {
            "iteration": iteration,
            "checkpoint_version": 3.0,
            "args": llama.megatron_arguments(model),
        }
        torch.save(common, partial / "common.pt")
        (partial / "metadata.json").write_bytes(FORMAT)
        runs.write_file_list(partial)


def common_of(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint holds that is no tensor: `common.pt`."""
    path = checkpoint / "common.pt"
    try:
        # Beside plain values it holds Megatron-LM's arguments. megatron-core allows the same once
        # for all: at the end of a `with` it would be forbidden to its own loading as well.
        torch.serialization.add_safe_globals([argparse.Namespace])
        common: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RequestError(path, "is missing", "is it a torch_dist checkpoint?") from None
    except Exception as error:  # a pickle with a wrong byte raises anything
        raise RequestError(path, f"cannot be read: {error!r}", "bring the file again") from None
    return common


@contextmanager
def open_checkpoint(checkpoint: Path) -> Iterator[Tensors]:
    """A checkpoint's weights, whatever layout saved them; those of an optimizer are left out."""
    yield Checkpoint(checkpoint)


class Checkpoint:
    """The weights of a torch_dist checkpoint."""

    def __init__(self, checkpoint: Path) -> None:
        self._boxes = torch_dist.Boxes(checkpoint)
        self.stored = {
            name: stored
            for name, stored in self._boxes.stored.items()
            if not name.startswith(_OPTIMIZER)
        }

    def read(self, name: str, layer: int | None = None) -> torch.Tensor:
        shape = self._shape(name)
        if layer is None:
            return self._boxes.read(name, (0,) * len(shape), shape)
        return self.rows(name, layer, 0, shape[1])

    def rows(self, name: str, layer: int | None, start: int, stop: int) -> torch.Tensor:
        shape = self._shape(name)
        if layer is None:
            offsets = (start, *(0 for _ in shape[1:]))
            return self._boxes.read(name, offsets, (stop - start, *shape[1:]))
        offsets = (layer, start, *(0 for _ in shape[2:]))
        return self._boxes.read(name, offsets, (1, stop - start, *shape[2:]))[0]

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self.stored:
            raise RequestError(
                self._boxes.checkpoint, f"holds no tensor {name}",
                "is it a checkpoint of this model?",
            )  # fmt: skip
        return self.stored[name].shape
