"""Run by test_layers.py on a GPU, `python -m tests.engine.joined_check`: layers that add, norm and
measure in one pass, beside the same layers one after the other.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch

from tanren.config.model import Model
from tanren.config.training import Layout, Lora
from tanren.engine import distributed, main_grad, products

SHAPE = Model(
    layers=3, hidden_size=256, ffn_hidden_size=512, attention_heads=4, kv_groups=2, head_size=64,
    vocabulary_size=1000, max_positions=64, rotary_base=10000.0, norm_epsilon=1e-5, init_std=0.08,
)  # fmt: skip
ROWS, LENGTH = 4, 64
# Of other tokens each. With the second a layer has quantizers to tell what was measured.
PASSES = 3
# The linear layers of a layer; what is before each is known, and what is behind.
QKV, PROJ, FC1, FC2 = (
    "self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2",
)  # fmt: skip


class Watch:
    """What was called, and whether each largest value that a cast is told is that of its tensor."""

    def __init__(self, llama: Any) -> None:
        self.added = self.normed = 0
        # Of the last pass: (number of the layer, linear layer) whose input or gradient was told.
        self.inputs: set[tuple[int, str]] = set()
        self.gradients: set[tuple[int, str]] = set()
        for number, layer in enumerate(llama.decoder.layers):
            for name in (QKV, PROJ, FC1, FC2):
                self._look_at(layer.get_submodule(name), (number, name))

    def _look_at(self, linear: Any, place: tuple[int, str]) -> None:
        def told(way: str, tensor: torch.Tensor) -> bool:
            quantizer = linear.quantizers[way][0] if linear.fp8_initialized else None
            if not getattr(quantizer, "use_existing_amax", False):
                return False
            largest = float(tensor.detach().abs().max())
            assert float(quantizer.amax) == largest, (place, way, float(quantizer.amax), largest)
            return True

        def on_gradient(gradient: torch.Tensor) -> None:
            if told("scaling_bwd", gradient):
                self.gradients.add(place)

        def before(_: Any, inputs: tuple[torch.Tensor]) -> None:
            if told("scaling_fwd", inputs[0]):
                self.inputs.add(place)

        def after(_: Any, __: Any, output: tuple[Any, Any]) -> None:
            result = output[0]
            # Inside products SwiGLU's result comes along, and no gradient goes back by it.
            result = result[0] if isinstance(result, tuple) else result
            if result.requires_grad:
                result.register_hook(on_gradient)

        linear.register_forward_pre_hook(before)
        linear.register_forward_hook(after)

    def add_and_norm(self, made: Any, *given: Any) -> Any:
        self.added += 1
        found = made(*given)
        # An evaluation that made a graph would keep every layer's stream.
        assert found[0].requires_grad == torch.is_grad_enabled()
        return found

    def norm(self, made: Any, *given: Any) -> Any:
        self.normed += 1
        return made(*given)


def trained(
    *, fp8: str, recompute: Any, lora: Lora | None, joined: bool, quack: bool, main: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor], Watch]:
    """Of the last pass the losses and the gradients by name."""
    from tanren.engine import layers, model
    from tanren.engine.lora import add_adapters

    config = model.transformer_config(SHAPE, Layout(recompute=recompute), precision="bf16", fp8=fp8)
    apart = mock.patch.object(layers, "join", lambda *_, **__: None)
    with nullcontext() if joined else apart:
        llama = model.build(SHAPE, config, quack=quack)
    add: Any = llama.output_layer._add
    assert add is (products.add_weight_gradient if quack else main_grad.add_product)
    if lora is not None:
        add_adapters(llama, lora, seed=1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in llama.named_parameters():
            drawn = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + drawn / 4 if "norm" in name else drawn / 16)
    wrapped = model.wrap_for_training(llama, main)
    tokens = torch.randint(1000, (PASSES, ROWS, LENGTH + 1), generator=generator).cuda()
    positions = torch.arange(LENGTH, device=tokens.device).expand(ROWS, -1)
    watch = Watch(llama)

    def losses_of(rows: torch.Tensor) -> torch.Tensor:
        losses: torch.Tensor = wrapped(rows[:, :-1], positions, None, labels=rows[:, 1:])
        return losses

    def by_way_of(name: str) -> Any:
        made, looked = getattr(layers, name), getattr(watch, name)
        return mock.patch.object(layers, name, lambda *given: looked(made, *given))

    with by_way_of("add_and_norm"), by_way_of("norm"):
        for rows in tokens:
            wrapped.zero_grad_buffer()
            watch.inputs.clear()
            watch.gradients.clear()
            losses = losses_of(rows)
            losses.sum().backward()
        gradients = {
            name: weight.main_grad.clone()
            for name, weight in llama.named_parameters()
            if weight.requires_grad
        }
        calls = watch.added, watch.normed
        with torch.no_grad():
            again = losses_of(rows)
    # What the last pass saw scales the next one with delayed scaling.
    assert fp8 == "delayed" or torch.equal(again, losses)
    assert not again.requires_grad
    norms = [module for module in llama.modules() if isinstance(module, layers.Norm)]
    assert len(norms) == 2 * SHAPE.layers and all(one._ready is None for one in norms)
    watch.added, watch.normed = calls
    return losses.detach(), gradients, watch


def check(
    fp8: str = "none", recompute: str = "none", lora: Lora | None = None, quack: bool = False,
    main: str = "fp32",
) -> None:  # fmt: skip
    """The same losses to the last bit, gradients to bf16's roundings; all is told that can be."""
    setting: Any = {
        "fp8": fp8, "recompute": recompute, "lora": lora, "quack": quack, "main": main,
    }  # fmt: skip
    losses, gradients, watch = trained(**setting, joined=True)
    plain_losses, plain, apart = trained(**setting, joined=False)
    every = range(SHAPE.layers)
    look_at_calls(watch, apart, again=recompute == "full")
    assert torch.equal(losses, plain_losses), (losses - plain_losses).abs().max()
    told, of_gradient = set(), set()
    if fp8 == "tensorwise":
        told = {(number, name) for number in every for name in (QKV, FC1, FC2)}
        of_gradient = {(number, name) for number in every for name in (PROJ, FC1)}
        # The sum behind an MLP is the next layer's to make, if there is one.
        joined = [] if recompute == "full" else every[:-1]
        of_gradient |= {(number, FC2) for number in joined}
    assert watch.inputs == told, watch.inputs ^ told
    assert watch.gradients == of_gradient, watch.gradients ^ of_gradient
    assert not apart.inputs and not apart.gradients
    _, true, _ = trained(**setting | {"fp8": "none", "quack": False}, joined=False)
    worst, by_it, by_fp8 = (
        off(*pair) for pair in ((gradients, plain), (gradients, true), (plain, true))
    )
    what = "lora" if lora else f"quack {main}" if quack else ""
    print(fp8, recompute, what, f"{worst:.4f}, off bf16 {by_it:.4f} {by_fp8:.4f}")
    # FP8 has so few numbers that one rounding in bf16 leads to others.
    assert max(worst, by_it) < 0.02 if fp8 == "none" else by_it < 1.2 * by_fp8


def look_at_calls(joined: Watch, apart: Watch, *, again: bool) -> None:
    """Of a layer the sum behind attention is joined, and that behind its MLP if a layer comes next;
    a layer that is computed again is joined to no other. What is joined is never normed apart.
    """
    layers = SHAPE.layers
    times = 2 * PASSES if again else PASSES
    added, normed = (layers, layers) if again else (2 * layers - 1, 1)
    assert (joined.added, joined.normed) == (times * added, times * normed)
    assert (apart.added, apart.normed) == (0, times * 2 * layers)


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
    checked = 8
    # As a run of this model would take it here; its matrices are too small for these tiles.
    if products.wanted("auto", "bf16", "none", SHAPE, 1, lora=False):
        with mock.patch.object(products, "_fills", lambda *_: True):
            check(quack=True)
            check(quack=True, recompute="full")
            check(quack=True, main="bf16")
        checked += 3
    distributed.finalize()
    print("checked", checked)
