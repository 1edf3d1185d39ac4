"""Run by test_layers.py on a GPU, `python -m tests.engine.joined_check`: layers that add, norm and
measure in one pass, beside the same layers one after the other.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch

from tanren.config.model import Model
from tanren.config.training import Layout, Lora
from tanren.engine import distributed

SHAPE = Model(
    layers=3, hidden_size=256, ffn_hidden_size=512, attention_heads=4, kv_groups=2, head_size=64,
    vocabulary_size=1000, max_positions=64, rotary_base=10000.0, norm_epsilon=1e-5, init_std=0.08,
)  # fmt: skip
ROWS, LENGTH = 4, 64
# With the second pass a layer has quantizers to tell what was measured.
PASSES = 3


def trained(*, fp8: str, recompute: Any, lora: Lora | None, joined: bool) -> tuple[Any, ...]:
    """Of the last pass the losses and gradients by name; the passes' calls of the fused kernel."""
    from tanren.engine import layers, model
    from tanren.engine.lora import add_adapters

    config = model.transformer_config(SHAPE, Layout(recompute=recompute), precision="bf16", fp8=fp8)
    with mock.patch.object(layers, "join", layers.join if joined else lambda *_, **__: None):
        llama = model.build(SHAPE, config)
    if lora is not None:
        add_adapters(llama, lora, seed=1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in llama.named_parameters():
            drawn = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + drawn / 4 if "norm" in name else drawn / 16)
    wrapped = model.wrap_for_training(llama)
    tokens = torch.randint(1000, (ROWS, LENGTH + 1), generator=generator).cuda()
    positions = torch.arange(LENGTH, device="cuda").expand(ROWS, -1)
    with mock.patch.object(layers, "add_and_norm", wraps=layers.add_and_norm) as fused:
        for _ in range(PASSES):
            wrapped.zero_grad_buffer()
            losses = wrapped(tokens[:, :-1], positions, None, labels=tokens[:, 1:])
            losses.sum().backward()
    gradients = {
        name: weight.main_grad.clone()
        for name, weight in llama.named_parameters()
        if weight.requires_grad
    }
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        again = wrapped(tokens[:, :-1], positions, None, labels=tokens[:, 1:])
    assert torch.equal(again, losses) and not again.requires_grad
    held = torch.cuda.memory_allocated() - before
    assert held < 2 * ROWS * LENGTH * 256 * 2, held
    return losses.detach(), gradients, fused.call_count


def check(fp8: str = "none", recompute: str = "none", lora: Lora | None = None) -> None:
    """The same losses to the last bit, gradients to bf16's roundings."""
    setting: Any = {"fp8": fp8, "recompute": recompute, "lora": lora}
    losses, gradients, fused = trained(**setting, joined=True)
    plain_losses, plain, unfused = trained(**setting, joined=False)
    # Of a layer the sum behind attention, and that behind all MLPs but the last; a layer that is
    # computed twice is joined to no other.
    each = 2 * SHAPE.layers if recompute == "full" else 2 * SHAPE.layers - 1
    assert (fused, unfused) == (PASSES * each, 0), (fused, unfused)
    assert torch.equal(losses, plain_losses), (losses - plain_losses).abs().max()
    _, true, _ = trained(**setting | {"fp8": "none"}, joined=False)
    worst, by_it, by_fp8 = (
        off(*pair) for pair in ((gradients, plain), (gradients, true), (plain, true))
    )
    print(fp8, recompute, "lora" if lora else "", f"{worst:.4f}, off bf16 {by_it:.4f} {by_fp8:.4f}")
    # FP8 has so few numbers that one rounding in bf16 leads to others.
    assert worst < 0.02 if fp8 == "none" else by_it < 1.2 * by_fp8


def off(found: dict[str, torch.Tensor], true: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of a gradient, by the norm."""
    return max(float((found[name] - one).norm() / one.norm()) for name, one in true.items())


if __name__ == "__main__":
    distributed.initialize(Layout(), "cuda", seed=1)
    check()
    check(recompute="full")
    check(lora=Lora(rank=4, alpha=8.0))
    for fp8 in ("tensorwise", "delayed", "blockwise"):
        check(fp8=fp8)
    check(fp8="tensorwise", recompute="full")
    check(fp8="tensorwise", lora=Lora(rank=16, alpha=8.0))
    distributed.finalize()
    print("checked 8")
