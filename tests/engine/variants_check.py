"""Run by test_head.py, `python -m tests.engine.variants_check`: how often Triton would compile.

What Triton compiles a kernel for follows from the arguments alone, so this needs no GPU: launches
are looked at instead of made, and torch makes the passes.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from tanren.engine import head, head_kernels

WIDTH, REAL, COLUMNS, CHUNK = 16, 60, 64, 32
found: dict[str, set[tuple[Any, ...]]] = defaultdict(set)
hopper = make_backend(GPUTarget("cuda", 90, 32))


class Alone:
    """A group of one rank."""

    def size(self) -> int:
        return 1


def look(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
    """In the place of a launch."""
    bind = create_function_from_signature(kernel.signature, kernel.params, hopper)
    found[kernel.__name__].add(tuple(bind(*args, **options)[1]))


def main() -> None:
    """Count what each kernel would be compiled for, over many numbers of tokens."""
    in_torch = head.softmax_parts, head.to_gradient

    def softmax_parts(logits: torch.Tensor, labels: torch.Tensor, mine: Any) -> torch.Tensor:
        head_kernels.softmax_parts(logits, labels, mine.first, mine.real)
        return in_torch[0](logits, labels, mine)

    def to_gradient(logits: Any, labels: Any, mine: Any, *vectors: torch.Tensor) -> None:
        head_kernels.to_gradient(logits, labels, mine.first, mine.real, *vectors)
        in_torch[1](logits, labels, mine, *vectors)

    JITFunction.run = look
    head.softmax_parts, head.to_gradient = softmax_parts, to_gradient
    mine = head.Vocabulary(0, REAL, Alone())  # type: ignore[arg-type]
    for tokens in range(1, 3 * CHUNK + 1):
        hidden = torch.randn(tokens, WIDTH, requires_grad=True)
        head.losses_by_chunks(
            hidden, torch.randn(COLUMNS, WIDTH), torch.randint(REAL, (tokens,)), mine,
            loss_weights=torch.rand(tokens), chunk=CHUNK,
        )  # fmt: skip
    for name, variants in sorted(found.items()):
        print(name, len(variants))


if __name__ == "__main__":
    main()
