"""What makes megatron-core 0.16.1 train on a CPU. GPU runs never import this file.

megatron-core is written for CUDA devices, but only in its outer layers: it asks torch.cuda for the
current device, for random state and for tensor type names. `install` answers those questions for
the CPU, and gives the optimizer a stand-in for Transformer Engine's FusedAdam with the same state
layout, so that a checkpoint moves between CPU and GPU. Drop what megatron-core learns to do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.adamw import adamw
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

_CPU = torch.device("cpu")
_mode: TorchFunctionMode | None = None


class _CudaMeansCpu(TorchFunctionMode):
    """Turns `device="cuda"`, `.cuda()` and CUDA type names into their CPU counterparts."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if kwargs:
            device = kwargs.get("device")
            if device is not None and str(device).startswith("cuda"):
                kwargs = {**kwargs, "device": _CPU}
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.type and isinstance(result, str):
            # The optimizers sort parameters by names such as torch.cuda.BFloat16Tensor.
            return result.replace("torch.", "torch.cuda.", 1)
        return result


class FusedAdam(torch.optim.Optimizer):
    """Adam as Transformer Engine's FusedAdam keeps it: the step count in the group, not per tensor.

    With torch's own AdamW, megatron-core 0.16.1 cannot load a distributed optimizer
    (KeyError 'step').
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        adam_w_mode: bool = True,
    ) -> None:
        assert adam_w_mode, "only decoupled weight decay is used"
        # The keys of the original's groups, so that each reads the other's checkpoint.
        defaults = {"lr": lr, "bias_correction": True, "betas": betas, "eps": eps}
        super().__init__(params, {**defaults, "weight_decay": weight_decay})

    def initialize_state(self, param: torch.Tensor, store_param_remainders: bool) -> None:
        """Allocate the state of one parameter."""
        assert not store_param_remainders
        for name in ("exp_avg", "exp_avg_sq"):
            self.state[param][name] = torch.zeros_like(param)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient (AdamW, Loshchilov & Hutter 2019)."""
        assert closure is None
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.initialize_state(p, False)
            if not params:
                continue
            beta1, beta2 = group["betas"]
            adamw(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                [torch.tensor(group["step"] - 1.0) for _ in params],
                foreach=False,
                fused=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


class RMSNorm(torch.nn.RMSNorm):
    """megatron-core's local norm refuses sequence parallelism; all it takes is this mark.

    The gradients of a marked weight are summed over the tensor-parallel ranks, each of which saw
    its own part of the sequence.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        weight: Any = self.weight
        weight.sequence_parallel = config.sequence_parallel


def _l2_norm(
    chunk_size: int, overflow: torch.Tensor, lists: list[list[torch.Tensor]], per_tensor: bool
) -> tuple[torch.Tensor, None]:
    """Stands for megatron-core's local norm of the gradients, which takes torch's in fp32.

    On a CPU that loses up to 1e-4 of a large tensor's norm, and less where a layout cuts it.
    """
    assert not per_tensor
    norms = [
        torch.linalg.vector_norm(one, dtype=torch.float64) for tensors in lists for one in tensors
    ]
    return torch.linalg.vector_norm(torch.stack(norms)).float()[None], None


def block_spec(config: TransformerConfig) -> TransformerBlockSubmodules:
    """The local layers of this pipeline stage."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import (
        TransformerBlockSubmodules,
        get_num_layers_to_build,
    )

    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    submodules: Any = layer.submodules
    submodules.input_layernorm = RMSNorm
    submodules.pre_mlp_layernorm = RMSNorm
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=RMSNorm
    )


def hide_gpu_libraries() -> None:
    """Make Transformer Engine and Apex look absent. Call before megatron-core is imported.

    Where they are installed, megatron-core takes their kernels for the gradient norm and the
    optimizer, and those know no CPU tensors.
    """
    for name in ("transformer_engine", "transformer_engine_torch", "apex", "flash_attn"):
        assert name not in sys.modules, name
        # What the import system finds as None, it reports as not installed.
        sys.modules[name] = None  # type: ignore[assignment]


def install() -> None:
    """Make this process run megatron-core on the CPU. Call once, before importing its models."""
    global _mode
    if _mode is not None:
        return
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    cuda.set_device = lambda device: None
    cuda.synchronize = lambda device=None: None
    cuda.empty_cache = lambda: None
    cuda.manual_seed = torch.manual_seed
    cuda.default_generators = (torch.default_generator,)
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda device=None: torch.default_generator.get_state()
        module.set_rng_state = lambda state, device=None: torch.default_generator.set_state(state)
    cuda.FloatTensor, cuda.HalfTensor = torch.FloatTensor, torch.HalfTensor
    cuda.BFloat16Tensor = torch.BFloat16Tensor

    from megatron.core import optimizer, tensor_parallel
    from megatron.core.optimizer import clip_grads, distrib_optimizer
    from megatron.core.tensor_parallel import random as tensor_parallel_random

    def set_state(state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
        torch.default_generator.set_state(state)

    patched_random: Any = tensor_parallel_random
    patched_random._set_cuda_rng_state = set_state
    assert tensor_parallel.get_cuda_rng_tracker is tensor_parallel_random.get_cuda_rng_tracker

    patched_optimizer: Any = optimizer
    patched_optimizer.Adam = FusedAdam
    patched_optimizer.USING_PYTORCH_OPTIMIZER = False
    patched_norm: Any = clip_grads
    patched_norm.l2_norm_impl = _l2_norm
    patched_distributed: Any = distrib_optimizer
    patched_distributed.Adam = FusedAdam
    patched_distributed.HAVE_APEX_OR_TE = True
    patched_distributed.USING_TE_OPTIMIZER = False
    patched_distributed.USING_APEX_OPTIMIZER = True

    _mode = _CudaMeansCpu()
    _mode.__enter__()  # type: ignore[no-untyped-call]
