"""Weights' gradients that join megatron-core's main gradients where they are made."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.tensor_parallel import layers


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += leftᵀ right, in one pass, also where the total is in fp32 and they are in bf16."""
    if total.dtype == left.dtype:
        total.addmm_(left.t(), right)
    elif total.is_cuda:
        torch.addmm(total, left.t(), right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.t().to(total.dtype), right.to(total.dtype))


def fuse_without_apex() -> None:
    """Let megatron-core's own linear layer add a weight's gradient to its main_grad: it wants
    Apex's extension for that, and `add_product` is what it does with it.
    """
    layers._grad_accum_fusion_available = True

    def add(inputs: torch.Tensor, gradients: torch.Tensor, main_grad: torch.Tensor) -> None:
        add_product(main_grad, gradients, inputs)

    layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(
        wgrad_gemm_accum_fp32=add, wgrad_gemm_accum_fp16=add
    )


def already_in_main_grad(weight: Any) -> torch.Tensor:
    """What to return as a weight's gradient when it is in main_grad; marks the weight so.

    megatron-core's hook on the gradient counts the weight as ready. It wants a tensor, of any
    content; but of noughts where the embedding is tied, whose own gradient autograd adds to it.
    """
    weight.grad_added_to_main_grad = True
    fill = torch.zeros_like if getattr(weight, "zero_out_wgrad", False) else torch.empty_like
    return fill(weight.detach())
