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
from tanren.convert import audit, llama, llama_config, torch_dist, unpickle
from tanren.convert.tensors import Tensors

FORMAT = b'{"sharded_backend": "torch_dist", "sharded_backend_version": 1, '
FORMAT += b'"common_backend": "torch", "common_backend_version": 1}'
# What a checkpoint of a training holds beside the weights.
_OPTIMIZER = ("optimizer.", "chained_")

# What Megatron-LM takes from a checkpoint's arguments with --use-checkpoint-args, where it would
# have the defaults of a GPT of 2019 otherwise.
_OF_ANY_LLAMA = {
    "add_qkv_bias": False, "apply_layernorm_1p": False, "rotary_interleaved": False,
    "rotary_percent": 1.0, "squared_relu": False, "attention_dropout": 0.0, "hidden_dropout": 0.0,
}  # fmt: skip
# Parts of a layer of which Transformer Engine keeps FP8 scales beside the weights. Megatron-LM asks
# for those of each layer, and does not load without. Of weights that are not FP8 they are None.
_WITH_SCALES = ("self_attention.linear_qkv", "self_attention.core_attention",
                "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")  # fmt: skip


def arguments(
    model: Model, *, weights_only: bool, tensor: int = 1, pipeline: int = 1
) -> argparse.Namespace:
    """What Megatron-LM finds as `args` in a checkpoint.

    Args:
        tensor, pipeline: the layout that saved it.
        weights_only: there is no optimizer's state for it to load. Of random states it wants more
            than ours, and is told that there are none.
    """
    said = {
        "seq_length": model.max_positions,
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "ckpt_format": "torch_dist",
        "no_save_rng": True,
        "no_save_optim": weights_only,
    }
    return argparse.Namespace(
        **_OF_ANY_LLAMA, **said, **vars(llama_config.megatron_arguments(model))
    )


def _scales(model: Model) -> Iterator[str]:
    for part in _WITH_SCALES:
        for layer in range(model.layers):
            yield f"{torch_dist.STACKED}{part}._extra_state/shard_{layer}_{model.layers}"
    yield "decoder.final_layernorm._extra_state/shard_0_1"


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
            torch_dist.write(partial, passed, empty=_scales(model))
        common = {
            "iteration": iteration,
            "checkpoint_version": 3.0,
            "args": arguments(model, weights_only=True),
        }
        torch.save(common, partial / "common.pt")
        (partial / "metadata.json").write_bytes(FORMAT)
        runs.write_file_list(partial)


def common_of(checkpoint: Path, *, trust: bool = False) -> dict[str, Any]:
    """What a checkpoint holds that is no tensor: `common.pt`.

    Raises:
        RequestError: it is missing, broken, or names what could run code.
    """
    path = checkpoint / "common.pt"
    common = unpickle.load(path, trust=trust)
    if not isinstance(common, dict):
        raise RequestError(path, f"holds a {type(common).__name__}", "is it a checkpoint's?")
    return common


def weights_of(checkpoint: Path) -> tuple[Path, str]:
    """Where the tensors of a checkpoint lie, and what stands before their names.

    NeMo 2 keeps a torch_dist checkpoint in `weights`, with names that begin with `module.`.
    """
    weights = checkpoint / "weights"
    return (weights, "module.") if (weights / ".metadata").exists() else (checkpoint, "")


@contextmanager
def open_checkpoint(checkpoint: Path) -> Iterator[Tensors]:
    """A checkpoint's weights, whatever layout saved them, in NeMo's folders, too; those of an
    optimizer are left out.
    """
    yield Checkpoint(checkpoint)


class Checkpoint:
    """The weights of a torch_dist checkpoint."""

    def __init__(self, checkpoint: Path, *, trust: bool = False) -> None:
        folder, self._prefix = weights_of(checkpoint)
        self._boxes = torch_dist.Boxes(folder, trust=trust)
        self.stored = {
            name.removeprefix(self._prefix): stored
            for name, stored in self._boxes.stored.items()
            if not name.startswith(_OPTIMIZER)
        }

    def read(self, name: str, layer: int | None = None) -> torch.Tensor:
        shape = self._shape(name)
        if layer is None:
            return self._boxes.read(self._prefix + name, (0,) * len(shape), shape)
        return self.rows(name, layer, 0, shape[1])

    def rows(self, name: str, layer: int | None, start: int, stop: int) -> torch.Tensor:
        shape = self._shape(name)
        if layer is None:
            offsets = (start, *(0 for _ in shape[1:]))
            return self._boxes.read(self._prefix + name, offsets, (stop - start, *shape[1:]))
        offsets = (layer, start, *(0 for _ in shape[2:]))
        return self._boxes.read(self._prefix + name, offsets, (1, stop - start, *shape[2:]))[0]

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self.stored:
            raise RequestError(
                self._boxes.checkpoint, f"holds no tensor {name}",
                "is it a checkpoint of this model?",
            )  # fmt: skip
        return self.stored[name].shape
