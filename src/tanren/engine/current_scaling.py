"""What Transformer Engine's casts to FP8 need to know, from where a tensor is written.

With scaling by the present tensor (`fp8: tensorwise`) a cast reads it twice, at first for its
largest absolute value. What made the tensor has that for nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import transformer_engine_torch as tex
from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer


def of_input(linear: Any) -> torch.Tensor | None:
    """Where the largest absolute value of a linear layer's input goes, [1] in fp32; None where the
    layer does not ask for it. Who gets a place must write there before each of its casts.

    Args:
        linear: Transformer Engine's.
    """
    return _place(linear, "scaling_fwd", tex.FP8FwdTensors.GEMM1_INPUT)


def of_gradient(linear: Any) -> torch.Tensor | None:
    """The same of the gradient of its output; see `of_input`."""
    return _place(linear, "scaling_bwd", tex.FP8BwdTensors.GRAD_OUTPUT1)


def _place(linear: Any, way: str, which: int) -> torch.Tensor | None:
    # A checkpoint's state makes quantizers as well, in bf16 too, and they do not know yet whether
    # ranks share their largest value (sequence parallelism): the first pass tells them.
    if not linear.fp8_initialized:
        return None
    quantizer = linear.quantizers[way][which]
    if not isinstance(quantizer, Float8CurrentScalingQuantizer):
        return None
    told = not quantizer.with_amax_reduction
    quantizer.use_existing_amax = told
    amax: torch.Tensor = quantizer.amax
    return amax if told else None
