"""A number that tells weights apart: what was computed with them is known by it."""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

# Elements that are in int64 at a time: 512 MiB of them.
_CHUNK = 2**26


def fingerprint(model: torch.nn.Module) -> str:
    """A digest of all weights, the same in every layout; every rank calls this.

    It is made of sums over the bits of all elements, so that it does not see their order: no
    training and no conversion gives others with the same sums.
    """
    sums = torch.zeros(3, dtype=torch.int64, device=next(model.parameters()).device)
    if parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0:
        for weights in model.parameters():
            if param_is_not_shared(weights) and param_is_not_tensor_parallel_duplicate(weights):
                sums += _sums(weights.detach())
    dist.all_reduce(sums)
    return hashlib.sha256(repr(sums.tolist()).encode()).hexdigest()[:16]


def _sums(weights: torch.Tensor) -> torch.Tensor:
    """Sum, sum of squares and of cubes of the elements' bits, modulo 2^64."""
    kind = {2: torch.int16, 4: torch.int32}[weights.element_size()]
    total = torch.zeros(3, dtype=torch.int64, device=weights.device)
    flat = weights.contiguous().view(kind).view(-1)
    for first in range(0, len(flat), _CHUNK):
        bits = flat[first : first + _CHUNK].long()
        total += torch.stack([bits.sum(), (bits * bits).sum(), (bits * bits * bits).sum()])
    return total
