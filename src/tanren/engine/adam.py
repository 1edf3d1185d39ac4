"""Adam on a GPU in bf16, one pass over what it keeps. GPU runs alone import this file.

Transformer Engine's FusedAdam holds the state, and its checkpoints stay the same. Its own step
copies bf16 moments to fp32 and back: 52 bytes a parameter move instead of 20, and the copies of all
parameters lie in memory at once, 8 bytes of each; on one GPU 8.59 B do not fit beside them.
"""

from __future__ import annotations

import torch
from transformer_engine.pytorch.optimizers import FusedAdam

from tanren.engine.kernels import adam_step


class Adam(FusedAdam):
    """FusedAdam whose step reads and writes its state as it is kept."""

    @torch.no_grad()
    def step(self, closure: None = None, grad_scaler: None = None) -> None:
        """One update of every parameter that has a gradient."""
        if not self.store_param_remainders:
            super().step(closure, grad_scaler)
            return
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for weight in group["params"]:
                gradient = getattr(weight, "decoupled_grad", None)
                if gradient is None:
                    continue
                assert weight.dtype == torch.bfloat16 and group["bias_correction"]
                state = self.state[weight]
                if not state:
                    self.initialize_state(weight, True)
                adam_step(
                    weight.data, state["master_param"], gradient, state["exp_avg"],
                    state["exp_avg_sq"], rate=group["lr"], betas=group["betas"],
                    epsilon=group["eps"], decay=group["weight_decay"], step=group["step"],
                )  # fmt: skip
