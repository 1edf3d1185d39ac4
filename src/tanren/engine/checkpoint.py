"""What a checkpoint holds, and how it is loaded, whatever layout saved it.

The format is megatron-core's torch_dist, with the optimizer's state laid out like the weights
(`fully_reshardable`), so that Megatron's own loaders read it. It is written by
`tanren.engine.saver`.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import unwrap_model

from tanren.config.errors import RequestError
from tanren.config.model import Model
from tanren.config.training import Lora
from tanren.convert import lora, mcore
from tanren.engine import shards
from tanren.engine.lora import adapter_keys
from tanren.engine.model import Llama
from tanren.engine.shards import Shard
from tanren.engine.stored import Stored

# What fresh files of Transformer Engine hold beside the weights: FP8 scales. A base that was
# converted, or saved without FP8, has none.
_OPTIONAL = "_extra_state"
# What the content is called in megatron-core, and how its loaders know it.
_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}
# Shards that are read at a time.
_THREADS = 8


@dataclass
class TrainingState:
    """Everything that a resumed run needs, and nothing else."""

    model: DistributedDataParallel
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler
    shape: Model
    iteration: int = 0


def _layout() -> dict[str, int]:
    return {
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "data": parallel_state.get_data_parallel_world_size(with_context_parallel=True),
    }


def random_state() -> ShardedObject:
    """This rank's random state, keyed as Megatron-LM keys it."""
    pipeline = parallel_state.get_pipeline_model_parallel_rank()
    tensor = parallel_state.get_tensor_model_parallel_rank()
    state = {
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.cuda.get_rng_state(),
        "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    return ShardedObject(
        "rng_state",
        [state],
        (
            parallel_state.get_pipeline_model_parallel_world_size(),
            parallel_state.get_tensor_model_parallel_world_size(),
        ),
        (pipeline, tensor),
        replica_id=parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )


def common_state(state: TrainingState) -> dict[str, Any]:
    """What is the same on every rank, and no tensor: `common.pt`."""
    layout = _layout()
    result: dict[str, Any] = {
        "optimizer": {
            "optimizer": {"param_groups": shards.groups(state.optimizer)},
            "param_state_sharding_type": _SHARDING["distrib_optim_sharding_type"],
        },
        "opt_param_scheduler": state.schedule.state_dict(),
        "iteration": state.iteration,
        "checkpoint_version": 3.0,
        "layout": layout,
        "args": mcore.arguments(
            state.shape, weights_only=False, tensor=layout["tensor"], pipeline=layout["pipeline"]
        ),
        "content_metadata": _SHARDING,
    }
    model = unwrap_model(state.model)
    if model.lora is not None:
        result["lora"] = model.lora.model_dump(mode="json")
    return result


def trained_weights(model: Llama) -> dict[str, Any]:
    """Where the weights that a run's checkpoints hold lie in them: all, or the adapters alone."""
    weights: dict[str, Any] = model.sharded_state_dict(metadata=dict(_SHARDING))
    adapters = adapter_keys(model)
    if not adapters:
        return weights
    # Frozen or not, FP8's scales move with what the run sees.
    kept = _OPTIONAL if model.config.fp8 else None
    return {
        key: value
        for key, value in weights.items()
        if key in adapters or (kept is not None and key.endswith(kept))
    }


def load_base(model: torch.nn.Module, checkpoint: Path, recipe_file: str) -> None:
    """Load weights alone, from a checkpoint of any layout, NeMo's too. Adapters stay as they are.

    Raises:
        RequestError: a tensor is missing or has another shape; each is named with both shapes.
    """
    llama = _gpt_in(model)
    adapters = adapter_keys(llama)
    weights = llama.sharded_state_dict()
    wanted = {"model": {key: value for key, value in weights.items() if key not in adapters}}
    folder, prefix = mcore.weights_of(checkpoint)
    add_prefix_for_sharding(wanted, prefix)
    _check_shapes(wanted, folder, recipe_file)
    loaded = _load(wanted, folder)
    _load_model(llama, loaded["model"], without=adapters)


def _gpt_in(model: torch.nn.Module) -> Any:
    """The GPTModel itself, whatever is around it: NeMo's module is one layer more."""
    inner: Any = model
    while not isinstance(inner, GPTModel):
        inner = inner.module
    return inner


def load(state: TrainingState, checkpoint: Path) -> None:
    """Load a run's own checkpoint, whatever layout it was saved in.

    Each rank reads what it owns; the weights are then gathered, as after an update. That of a run
    with adapters holds these alone: load its base before.
    """
    llama = unwrap_model(state.model)
    common = dist_checkpointing.load_common_state_dict(str(checkpoint))
    sharding = dist_checkpointing.serialization.load_content_metadata(preloaded_state_dict=common)
    if sharding != _SHARDING:
        raise RequestError(
            checkpoint,
            f"has its optimizer's state laid out as {sharding}, which is not read any more",
            "go on from a checkpoint that was saved with checkpoints.reshard: layout",
        )
    _check_adapters(llama, lora.settings_in(common), checkpoint)
    weights, saved_layout, here = trained_weights(llama), common["layout"], _layout()
    wanted: dict[str, Any] = {"model": shards.objects(weights)}
    if all(saved_layout[kind] == here[kind] for kind in ("tensor", "pipeline")):
        wanted["rng_state"] = random_state()
    loaded = _load(wanted, checkpoint)
    llama.load_state_dict(loaded.get("model", {}), strict=False)
    for shard, found in _read(checkpoint, shards.shards(state.optimizer, weights)):
        shards.put(state.optimizer, shard, found)
    # On every rank at once, in one piece: nothing of it is left to the first forward pass.
    state.model.start_param_sync(force_sync=True)
    shards.put_groups(state.optimizer, common["optimizer"]["optimizer"]["param_groups"])
    state.schedule.load_state_dict(common["opt_param_scheduler"])
    state.iteration = int(common["iteration"])
    (random,) = loaded.get("rng_state", [None])
    # A GPU's random state means nothing to a CPU, nor the other way round.
    if random is not None and _same_kind(random):
        torch.set_rng_state(random["torch_rng_state"])
        torch.cuda.set_rng_state(random["cuda_rng_state"])
        tensor_parallel.get_cuda_rng_tracker().set_states(random["rng_tracker_states"])


def _read(checkpoint: Path, wanted: list[Shard]) -> Iterator[tuple[Shard, dict[str, torch.Tensor]]]:
    """The tensors of each shard, flat: its weight as it is, and in fp32 what the optimizer has."""
    stored = Stored(checkpoint)

    def read(shard: Shard) -> dict[str, torch.Tensor]:
        where = shard.parts, shard.start, shard.end
        found = {"weight": stored.read(*where, "{}", shard.parameter.dtype)}
        for kind in ("param", *shards.MOMENTS):
            name = shards.STATE_NAME.format(kind=kind, name="{}")
            found[kind] = stored.read(*where, name, torch.float32)
        return found

    rest = iter(wanted)
    with ThreadPoolExecutor(_THREADS) as pool:
        while some := list(itertools.islice(rest, 2 * _THREADS)):
            yield from zip(some, pool.map(read, some), strict=True)


def _same_kind(random: dict[str, Any]) -> bool:
    """Whether a saved random state is one of this kind of device."""
    return len(random["cuda_rng_state"]) == len(torch.cuda.get_rng_state())


def _load(wanted: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    logging.getLogger("megatron.core.dist_checkpointing").setLevel(logging.ERROR)
    loaded, missing, _ = dist_checkpointing.load(
        wanted, str(checkpoint), strict=StrictHandling.RETURN_ALL
    )
    del missing  # shape and presence were checked; what is left are Transformer Engine's scales
    assert isinstance(loaded, dict)
    return loaded


def _check_adapters(model: Llama, saved: Lora | None, checkpoint: Path) -> None:
    """Refuse adapters of another kind; their dropout changes nothing that is saved."""
    there, here = (
        "no adapters"
        if each is None
        else f"adapters of rank {each.rank}, alpha {each.alpha:g}, beside {' '.join(each.linears)}"
        for each in (saved, model.lora)
    )
    if there != here:
        raise RequestError(
            checkpoint,
            f"was saved with {there}, and this run has {here}",
            "set lora back to what it was, or start the run under a new NAME=",
        )


def _load_model(model: Llama, weights: dict[str, Any], without: set[str]) -> None:
    problems = model.load_state_dict(weights, strict=False)
    wrong = [
        key
        for key in [*problems.missing_keys, *problems.unexpected_keys]
        if not key.endswith(_OPTIONAL) and key not in without
    ]
    assert not wrong, f"weights that were not loaded: {wrong}"


def _check_shapes(wanted: dict[str, Any], checkpoint: Path, recipe_file: str) -> None:
    """Compare what the model wants with what the checkpoint has, before reading a tensor."""
    there = dist_checkpointing.load_tensors_metadata(str(checkpoint))
    problems = []
    # The layers are parts of one stacked tensor, which need be named only once.
    for tensor in {tensor.key: tensor for tensor in _sharded_tensors(wanted)}.values():
        if tensor.key.endswith(_OPTIONAL):
            continue
        found = there.get(tensor.key)
        if found is None:
            problems.append(f"{tensor.key} is not in it")
        elif tuple(found.global_shape) != tuple(tensor.global_shape):
            problems.append(
                f"{tensor.key} is {list(found.global_shape)} there and "
                f"{list(tensor.global_shape)} in the recipe's model"
            )
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise RequestError(
            f"{recipe_file}: init",
            f"the checkpoint {checkpoint} does not fit: {'; '.join(problems[:3])}{more}",
            "make the recipe's model that of the checkpoint, or name another checkpoint",
        )


def _sharded_tensors(value: Any) -> list[ShardedTensor]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    found: list[ShardedTensor] = []
    for leaf in nested_values(value):
        if isinstance(leaf, ShardedTensorFactory):
            found += _sharded_tensors(leaf.build())
        elif isinstance(leaf, ShardedTensor):
            found.append(leaf)
    return found
