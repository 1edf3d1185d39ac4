"""Process groups: torch.distributed and megatron-core's model-parallel groups over it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from tanren.config.training import Layout


@dataclass(frozen=True)
class Ranks:
    """Where this process stands."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def initialize(layout: Layout, device_kind: str, seed: int, timeout_minutes: int = 30) -> Ranks:
    """Join the process group, and lay the model-parallel groups over it.

    Args:
        device_kind: `cpu` (gloo) or `cuda` (NCCL).
        seed: of the weights' initialisation; model-parallel ranks draw different numbers from it.
    """
    if device_kind == "cpu":
        from tanren.engine import cpu

        cpu.install()
        device = torch.device("cpu")
    else:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # torchrun says by the environment who meets where; one process has only itself.
        alone = "RANK" not in os.environ
        dist.init_process_group(
            backend="gloo" if device_kind == "cpu" else "nccl",
            timeout=timedelta(minutes=timeout_minutes),
            device_id=device if device_kind == "cuda" else None,
            store=torch._C._distributed_c10d.HashStore() if alone else None,
            rank=0 if alone else -1,
            world_size=1 if alone else -1,
        )

    from megatron.core import parallel_state, tensor_parallel

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            context_parallel_size=layout.context,
            create_gloo_process_groups=device_kind == "cuda",
            distributed_timeout_minutes=timeout_minutes,
        )
    # As in Megatron-LM: pipeline stages must not start with the same weights.
    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def finalize() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
