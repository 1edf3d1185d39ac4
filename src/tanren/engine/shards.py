"""What a rank owns of the weights and of the optimizer's state: megatron-core's distributed one.

Three kinds of state are known, by the types of their tensors: fp32 master weights and moments; the
precision-aware optimizer's moments in bf16; and its masters as 16 bits beside a bf16 weight
(`tanren.engine.boxes.join`). A checkpoint holds the same fp32 tensors for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import param_group_identifier_keys

from tanren.engine.boxes import Part, split

MOMENTS = ("exp_avg", "exp_avg_sq")
# As `fully_reshardable` checkpoints name them.
STATE_NAME = "optimizer.state.{kind}.{name}"


@dataclass(frozen=True)
class Shard:
    """The contiguous range [start, end) of a flat parameter that this rank updates.

    `first` is false where another tensor-parallel rank, or the other end of tied embeddings, has
    the same and writes it.
    """

    parameter: torch.nn.Parameter
    start: int
    end: int
    parts: tuple[Part, ...]
    first: bool


def distributed(optimizer: MegatronOptimizer) -> DistributedOptimizer:
    """The one distributed optimizer that megatron-core may have wrapped."""
    (one,) = getattr(optimizer, "chained_optimizers", [optimizer])
    assert isinstance(one, DistributedOptimizer)
    assert one.grad_scaler is None
    return one


def objects(weights: dict[str, Any]) -> dict[str, ShardedObject]:
    """Of a model's sharded state what is no tensor: Transformer Engine's FP8 scales."""
    return {key: one for key, one in weights.items() if isinstance(one, ShardedObject)}


def shards(optimizer: MegatronOptimizer, weights: dict[str, Any]) -> list[Shard]:
    """This rank's shards.

    Args:
        weights: the model's sharded_state_dict, which knows where its tensors lie in a checkpoint.
    """
    known = {
        id(one.data): one
        for one in nested_values(weights)
        if isinstance(one, ShardedTensor | ShardedTensorFactory)
    }
    found = []
    for parameter, owned in _ranges(distributed(optimizer)):
        sharded = known[id(parameter)]
        # The last number of a replica's is its data-parallel rank: these share each parameter.
        first = not any(sharded.replica_id[:-1])
        found.append(Shard(parameter, owned.start, owned.end, _parts(parameter, sharded), first))
    return found


def _ranges(optimizer: DistributedOptimizer) -> Iterator[tuple[torch.nn.Parameter, Any]]:
    if optimizer.is_stub_optimizer:
        return
    for buffer in optimizer.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"]


def _parts(
    parameter: torch.nn.Parameter, sharded: ShardedTensor | ShardedTensorFactory
) -> tuple[Part, ...]:
    assert parameter.is_contiguous()
    pieces = sharded.build() if isinstance(sharded, ShardedTensorFactory) else [sharded]
    parts = []
    for piece in pieces:
        # Gate and up are views of one weight, along its first axis.
        assert piece.data.is_contiguous()
        first = piece.data.storage_offset() - parameter.storage_offset()
        parts.append(
            Part(
                piece.key,
                tuple(piece.global_shape),
                tuple(piece.global_offset),
                tuple(piece.local_shape),
                first,
            )
        )
    return tuple(parts)


def weight(shard: Shard) -> torch.Tensor:
    """The shard of the weight itself, flat. Between an update and the gather after it this rank's
    own shard is already the new one.
    """
    return shard.parameter.data.view(-1)[shard.start : shard.end]


def state(optimizer: MegatronOptimizer, shard: Shard) -> dict[str, torch.Tensor]:
    """The tensors that the optimizer keeps of a shard, flat and as they are, made when they are not
    there yet: `param` (fp32, or an int16 remainder), `exp_avg`, `exp_avg_sq` (fp32 or bf16).
    """
    one = distributed(optimizer)
    inner: Any = one.optimizer
    group, order = one.model_param_group_index_map[shard.parameter]
    own = inner.param_groups[group]["params"][order]
    if not inner.state[own]:
        remainders = getattr(inner, "store_param_remainders", False)
        inner.initialize_state(own, remainders and own.dtype == torch.bfloat16)
    kept = inner.state[own]
    master = kept["master_param"] if "master_param" in kept else own.detach()
    found = {"param": master, **{kind: kept[kind] for kind in MOMENTS}}
    assert found["param"].dtype in (torch.float32, torch.int16)
    assert all(found[kind].dtype in (torch.float32, torch.bfloat16) for kind in MOMENTS)
    return found


def put(optimizer: MegatronOptimizer, shard: Shard, read: dict[str, torch.Tensor]) -> None:
    """Take over a shard from a checkpoint.

    The other ranks' shards of the weights come with the next gather.

    Args:
        read: flat: `weight`, and in fp32 `param` and the moments.
    """
    kept, own = state(optimizer, shard), weight(shard)
    with torch.no_grad():
        for kind in MOMENTS:
            kept[kind].copy_(read[kind])
        if kept["param"].dtype == torch.int16:
            # Of a tie this rounding makes another weight than fp32 masters do: the pair is one.
            rounded, remainder = split(read["param"])
            own.copy_(rounded)
            kept["param"].copy_(remainder)
        else:
            own.copy_(read["weight"])
            kept["param"].copy_(read["param"])


def groups(optimizer: MegatronOptimizer) -> list[dict[str, Any]]:
    """The settings of the optimizer's groups of parameters, with the steps taken.

    Not by its state_dict: Transformer Engine's makes fp32 copies of all that it keeps.
    """
    inner: Any = distributed(optimizer).optimizer
    taken = {group["step"] for group in inner.param_groups if group["params"] and "step" in group}
    assert len(taken) <= 1
    # A group without parameters on this rank counts no steps.
    step = {"step": int(one) for one in taken}  # noqa: B035  (one at most)
    return [
        {key: value for key, value in group.items() if key != "params"} | step
        for group in inner.param_groups
    ]


def put_groups(optimizer: MegatronOptimizer, saved: list[dict[str, Any]]) -> None:
    """Take over the settings of the groups of parameters from a checkpoint."""
    inner: Any = distributed(optimizer).optimizer
    by_kind = {_kind(group): group for group in saved}
    for group in inner.param_groups:
        group.update(by_kind[_kind(group)])


def _kind(group: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(group[key] for key in param_group_identifier_keys)
