"""Where kernels that are not in every run are taken, as far as it is known before one starts."""

from __future__ import annotations

from tanren.config.model import Model

# A package of matrix products, and the version that was tried.
QUACK, QUACK_VERSION = "quack-kernels", "0.6.5"
# Widths that quack-kernels was tried with are multiples of it.
WIDTH = 64
# How the names of Hopper GPUs begin, on which it was tried.
HOPPER = ("NVIDIA H100", "NVIDIA H200", "NVIDIA GH200")


def quack_obstacle(
    precision: str, fp8: str, shape: Model, tensor: int, *, lora: bool
) -> str | None:  # fmt: skip
    """Why a run's linear layers cannot be quack-kernels'; None where they can.

    Args:
        precision: `bf16` or `fp32`.
        fp8: the scaling of FP8, or `none`.
        tensor: the tensor-parallel size.
        lora: whether adapters stand beside linear layers.
    """
    if precision != "bf16":
        return f"it computes in bf16, and the run is in {precision}"
    if fp8 != "none":
        return f"it computes in bf16, and the run in FP8 ({fp8})"
    if tensor > 1:
        return "with tensor parallelism Transformer Engine's layers are taken"
    if lora:
        return "adapters stand beside Transformer Engine's layers"
    if any(size % WIDTH for size in (shape.hidden_size, shape.ffn_hidden_size, shape.head_width)):
        return f"it was tried with widths that are multiples of {WIDTH}"
    return None
