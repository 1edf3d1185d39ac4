"""megatron-core `torch_dist` checkpoints as plain tensors: no model, no GPU, no process group."""

from __future__ import annotations

import logging
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tanren import runs
from tanren.config.errors import RequestError
from tanren.config.model import Model
from tanren.convert import llama

FORMAT = b'{"sharded_backend": "torch_dist", "sharded_backend_version": 1, '
FORMAT += b'"common_backend": "torch", "common_backend_version": 1}'


def write_base(model: Model, read: llama.Read, checkpoint: Path, *, iteration: int = 0) -> None:
    """Write Hugging Face tensors as a weights-only checkpoint that any layout loads.

    Args:
        read: gives a Hugging Face tensor by name.
        checkpoint: the final folder; it appears when it is whole.
    """
    with runs.whole_folder(checkpoint) as partial:
        tensors = dict(llama.to_mcore(model, read))
        with _quiet():
            dcp.save(
                tensors,
                storage_writer=FileSystemWriter(partial, single_file_per_rank=True),
                no_dist=True,
            )
        common = {
            "iteration": iteration,
            "checkpoint_version": 3.0,
            "args": llama.megatron_arguments(model),
        }
        torch.save(common, partial / "common.pt")
        (partial / "metadata.json").write_bytes(FORMAT)
        runs.write_file_list(partial)


@contextmanager
def reader(checkpoint: Path) -> Iterator[llama.Read]:
    """Tensors of a checkpoint by name, whole, whatever layout saved them."""
    try:
        metadata = FileSystemReader(checkpoint).read_metadata()
    except FileNotFoundError:
        raise RequestError(checkpoint / ".metadata", "is missing") from None
    except (EOFError, pickle.UnpicklingError) as error:
        raise RequestError(checkpoint / ".metadata", f"is not whole: {error}") from None

    def read(name: str) -> torch.Tensor:
        stored = metadata.state_dict_metadata.get(name)
        if not isinstance(stored, TensorStorageMetadata):
            raise RequestError(
                checkpoint, f"holds no tensor {name}", "is it a checkpoint of this model?"
            )
        target = {name: torch.empty(stored.size, dtype=stored.properties.dtype)}
        with _quiet():
            dcp.load(target, storage_reader=FileSystemReader(checkpoint), no_dist=True)
        return target[name]

    yield read


@contextmanager
def _quiet() -> Iterator[None]:
    """torch warns on every call that it saves or loads in a single process: that is the point."""
    logger = logging.getLogger("torch.distributed.checkpoint")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
