"""What makes nemo-toolkit 2.7.3 train on a CPU, beside engine/cpu.py. GPU runs never import this.

Its strategy puts what it logs into page-locked memory and from there on the GPU, and wraps the
model on a stream of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from tanren.engine import cpu

_mode: TorchFunctionMode | None = None


class _NoGpuMemory(TorchFunctionMode):
    """Page-locked memory is memory, and what is moved to a GPU stays where it is."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = {key: value for key, value in (kwargs or {}).items() if key != "pin_memory"}
        if func is torch.Tensor.to and len(args) > 1 and str(args[1]).startswith("cuda"):
            args = (args[0], torch.device("cpu"), *args[2:])
        return func(*args, **given)


def install() -> None:
    """Make this process run NeMo on the CPU. Call once, before importing it."""
    global _mode
    cpu.install()
    if _mode is not None:
        return
    cuda: Any = torch.cuda
    cuda.Stream = lambda *given, **named: None
    cuda.stream = lambda stream: nullcontext()
    _mode = _NoGpuMemory()
    _mode.__enter__()  # type: ignore[no-untyped-call]

    from nemo.lightning.io import pl

    # It asks which GPU the tensors of a checkpoint are on.
    pl._fix_tensors_device = lambda checkpoint: checkpoint
