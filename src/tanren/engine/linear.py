"""Linear layers whose weights' gradients, and the products beside SwiGLU, are quack-kernels'.

A weight's gradient joins its main_grad in the product that makes it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from tanren.engine import products
from tanren.engine.main_grad import already_in_main_grad


def _go_back(
    ctx: Any, gradient: torch.Tensor, *, gated: bool = False
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradients of x and of the weight, where they are wanted."""
    x, weight = ctx.saved_tensors
    rows = gradient.flatten(0, -2)
    of_x = None
    if ctx.needs_input_grad[0]:
        of_x = products.gated_input_gradient(rows, weight) if gated else rows @ weight
        of_x = of_x.view_as(x)
    if not ctx.needs_input_grad[1]:
        return of_x, None
    return of_x, _of_weight(ctx, rows, x.flatten(0, -2), gated=gated)


def _of_weight(
    ctx: Any, rows: torch.Tensor, x: torch.Tensor, *, gated: bool = False
) -> torch.Tensor:
    products.add_weight_gradient(ctx.weight.main_grad, rows, x, gated=gated)
    return already_in_main_grad(ctx.weight)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        # The weight itself: what is saved may come back as another object, without main_grad.
        ctx.weight = weight
        return x @ weight.t()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return _go_back(ctx, gradient.contiguous())


class _GateUp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        gate_up, swiglu = products.gate_up_and_swiglu(x.flatten(0, -2), weight)
        ctx.save_for_backward(x, weight)
        ctx.weight = weight
        around = x.shape[:-1]
        swiglu = swiglu.view(*around, -1)
        ctx.mark_non_differentiable(swiglu)
        # Or the result that nothing goes back by would have a gradient of noughts made.
        ctx.set_materialize_grads(False)
        return gate_up.view(*around, -1), swiglu

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient: torch.Tensor, _: Any
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return _go_back(ctx, gradient, gated=True)


class _Down(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate_up: torch.Tensor, swiglu: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(gate_up, weight)
        ctx.weight = weight
        return swiglu @ weight.t()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, None, torch.Tensor | None]:
        gate_up, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2).contiguous()
        found, swiglu = products.swiglu_gradient(rows, weight, gate_up.flatten(0, -2))
        of_weight = _of_weight(ctx, rows, swiglu) if ctx.needs_input_grad[2] else None
        return found.view_as(gate_up), None, of_weight


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x weightᵀ, [sequence, batch, out].

    Args:
        x: [sequence, batch, in], contiguous and in bf16; as all here.
        weight: [out, in].
    """
    found: torch.Tensor = _Linear.apply(x, weight)  # type: ignore[no-untyped-call]
    return found


def gate_up(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first half of an MLP with SwiGLU, whose two results `down` takes.

    Args:
        x: [sequence, batch, hidden].
        weight: [2 x width, hidden], the gate's rows first.
    Returns:
        [sequence, batch, 2 x width], by which gradients go back, and [..., width].
    """
    found: tuple[torch.Tensor, torch.Tensor] = _GateUp.apply(  # type: ignore[no-untyped-call]
        x, weight
    )
    return found


def down(gate_up: torch.Tensor, swiglu: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The second half, [sequence, batch, hidden].

    Args:
        gate_up: what the first half made, as `swiglu`.
        weight: [hidden, width].
    """
    found: torch.Tensor = _Down.apply(  # type: ignore[no-untyped-call]
        gate_up, swiglu, weight
    )
    return found
