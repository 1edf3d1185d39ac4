"""megatron-core without torch's compiler."""

from __future__ import annotations

import torch


def import_megatron() -> None:
    """Import megatron-core so that its fused functions stay plain ones; call it before its others.

    It hands each of them to torch.compile when it is imported, which imports the compiler: 4 of the
    8 seconds that a training process needs to start. None of them is used: what they fuse has
    kernels of ours (engine/kernels.py, norm_kernels.py, head_kernels.py).
    """
    compiler = torch.compile
    torch.compile = lambda function: function  # type: ignore[assignment]
    try:
        import megatron.core.jit  # noqa: F401
    finally:
        torch.compile = compiler
