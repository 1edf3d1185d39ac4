"""Optimizer and learning-rate schedule: megatron-core's, from a recipe's fields."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core import optimizer as optimizers
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from tanren.config.training import Optimizer, Schedule


def optimizer_config(
    settings: Optimizer, *, precision: str, overlap_param_gather: bool, **kept: Any
) -> OptimizerConfig:
    """megatron-core's configuration of AdamW with its state sharded over the ranks.

    Args:
        kept: in which types the optimizer keeps what it keeps.
    """
    bf16 = precision == "bf16"
    return OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.epsilon,
        # Without a limit megatron-core computes no norm, and the norm is what tells of a gradient
        # that is not a number.
        clip_grad=settings.clip_grad or math.inf,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=True,
        overlap_param_gather=overlap_param_gather,
        **kept,
    )


def build_optimizer(
    settings: Optimizer, model: DistributedDataParallel, *, precision: str
) -> MegatronOptimizer:
    """AdamW with its state sharded over the data-parallel ranks.

    Norm weights are not decayed (megatron-core's rule: no decay for one-dimensional parameters).

    On a GPU in bf16 `tanren.engine.adam` reads gradients in the type that they are in, keeps
    the moments in theirs, and of the fp32 master weights the 16 bits that bf16 has not.
    """
    kept: dict[str, Any] = {}
    if precision == "bf16" and torch.cuda.is_available():
        from tanren.engine.adam import Adam

        optimizers.Adam = Adam
        moments = torch.bfloat16 if settings.moments == "bf16" else torch.float32
        in_fp32 = model.ddp_config.grad_reduce_in_fp32
        kept = {
            "use_precision_aware_optimizer": True,
            "main_grads_dtype": torch.float32 if in_fp32 else torch.bfloat16,
            "exp_avg_dtype": moments,
            "exp_avg_sq_dtype": moments,
        }
    config = optimizer_config(
        settings,
        precision=precision,
        overlap_param_gather=model.ddp_config.overlap_param_gather,
        **kept,
    )
    return get_megatron_optimizer(
        config, [model], use_gloo_process_groups=torch.cuda.is_available()
    )


def build_schedule(
    settings: Schedule,
    optimizer_settings: Optimizer,
    optimizer: MegatronOptimizer,
    *,
    steps: int,
    global_batch: int,
) -> OptimizerParamScheduler:
    """The learning rate over the run, counted in samples as Megatron-LM counts it."""
    decay = settings.decay_steps
    wsd = settings.style == "WSD"
    # megatron-core counts the steps of a decay from the first step of the run.
    end = settings.warmup_steps + decay if decay and not wsd else steps - settings.constant_steps
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optimizer_settings.lr,
        min_lr=optimizer_settings.min_lr,
        lr_warmup_steps=settings.warmup_steps * global_batch,
        lr_decay_steps=end * global_batch,
        lr_decay_style=settings.style,
        start_wd=optimizer_settings.weight_decay,
        end_wd=optimizer_settings.weight_decay,
        wd_incr_steps=steps * global_batch,
        wd_incr_style="constant",
        wsd_decay_steps=decay * global_batch if decay and wsd else None,
        lr_wsd_decay_style=settings.decay_style,
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
