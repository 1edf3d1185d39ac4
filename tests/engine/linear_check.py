"""Run by test_linear.py on a Hopper GPU, `python -m tests.engine.linear_check`: linear layers by
quack-kernels with SwiGLU inside, and by torch in bf16, both beside fp64.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import torch.nn.functional as F

from tanren.engine import linear, products

# Tokens, hidden and width: of llm-jp-4-8b, and odd ones.
SIZES = ((8192, 4096, 14336), (1003, 320, 704), (1, 64, 64))


def drawn(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(*shape, device="cuda")).bfloat16()


def off(found: torch.Tensor, true: torch.Tensor) -> float:
    """Relative, by the norm."""
    return float((found.double() - true).norm() / true.norm())


def in_order(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The MLP of three tensors of one dtype."""
    gate, up = (x @ first.t()).chunk(2, -1)
    return (F.silu(gate) * up) @ second.t()


def check(tokens: int, hidden: int, width: int, main_grad: torch.dtype) -> None:
    """A linear layer and an MLP behind it: results, gradients, and gradients added twice to what
    was there.
    """
    torch.manual_seed(1)
    x = drawn(tokens, 1, hidden).requires_grad_()
    weights: Any = [
        drawn(hidden, hidden, scale=hidden**-0.5).requires_grad_(),
        drawn(2 * width, hidden, scale=hidden**-0.5).requires_grad_(),
        drawn(hidden, width, scale=width**-0.5).requires_grad_(),
    ]
    upstream = drawn(tokens, 1, hidden)
    before = [torch.randn_like(one, dtype=main_grad) for one in weights]
    for one, some in zip(weights, before, strict=True):
        one.main_grad = some.clone()

    def by_torch(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        return in_order(x @ weights[0].t(), *weights[1:])

    def by_quack() -> torch.Tensor:
        return linear.down(*linear.gate_up(linear.linear(x, weights[0]), weights[1]), weights[2])

    wide = [one.detach().double().requires_grad_() for one in (x, *weights)]
    true, plain = by_torch(*wide), by_torch(x, *weights)
    true_gradients = torch.autograd.grad(true, wide, upstream.double())
    plain_gradients = torch.autograd.grad(plain, (x, *weights), upstream)
    for times in (1, 2):
        found = by_quack()
        x.grad = None
        found.backward(upstream)
        ours = [found.detach(), x.grad]
        theirs = [plain.detach(), plain_gradients[0]]
        expected = [true.detach(), true_gradients[0]]
        for one, some, other, exact in zip(
            weights, before, plain_gradients[1:], true_gradients[1:], strict=True
        ):
            assert one.grad_added_to_main_grad
            ours.append(one.main_grad)
            theirs.append(some.double() + times * other.double())
            expected.append(some.double() + times * exact)
        errors = [
            (off(mine, exact), off(other, exact))
            for mine, other, exact in zip(ours, theirs, expected, strict=True)
        ]
        print(tokens, hidden, width, main_grad, times, [f"{a:.5f} {b:.5f}" for a, b in errors])
        # A sum in bf16 is rounded each time.
        room = 1e-4 if main_grad == torch.float32 else 3e-3
        assert all(mine < 1.1 * other + room for mine, other in errors), errors
    with torch.no_grad():
        assert torch.equal(by_quack(), found)


def check_frozen() -> None:
    """Frozen weights have no gradients, and what is before them has."""
    x, first, second = drawn(64, 1, 128).requires_grad_(), drawn(256, 128), drawn(128, 128)
    found = linear.down(*linear.gate_up(x, first), second)
    found.sum().backward()
    true = x.detach().double().requires_grad_()
    in_order(true, first.double(), second.double()).sum().backward()
    assert true.grad is not None and x.grad is not None
    assert off(x.grad, true.grad) < 0.01


def check_head() -> None:
    """The gradient of the head's weight: 1,000 tokens, 196,608 columns."""
    torch.manual_seed(1)
    gradient, x = drawn(1000, 196608), drawn(1000, 256)
    total = torch.randn(196608, 256, device="cuda")
    expected = total.double() + gradient.double().t() @ x.double()
    products.add_weight_gradient(total, gradient, x)
    assert off(total, expected) < 1e-4


if __name__ == "__main__":
    for size, dtype in product(SIZES, (torch.float32, torch.bfloat16)):
        check(*size, dtype)
    check_frozen()
    check_head()
    print("checked 8")
