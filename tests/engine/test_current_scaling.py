"""Whom a cast to FP8 lets measure for it, with stand-ins for Transformer Engine's classes."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

INPUT, WEIGHT, GRADIENT = 0, 1, 0


class Quantizer:
    """Float8CurrentScalingQuantizer."""

    def __init__(self, *, shared: bool = False) -> None:
        self.amax = torch.zeros(1)
        self.with_amax_reduction, self.use_existing_amax = shared, False


class Linear:
    """A layer before its first pass, whose state a checkpoint may have brought."""

    def __init__(self, quantizers: list[Any] | None = None) -> None:
        self.fp8_initialized = False
        made: Any = {} if quantizers is None else quantizers
        self.quantizers = {"scaling_fwd": made, "scaling_bwd": made}

    def forward(self, *, shared: bool = False, kind: Any = Quantizer) -> Linear:
        """What Transformer Engine does at the first of them."""
        kept = self.quantizers["scaling_fwd"] or [kind(), kind(), kind()]
        self.quantizers = {"scaling_fwd": kept, "scaling_bwd": [kind(), kind()]}
        if kind is Quantizer:
            kept[INPUT].with_amax_reduction = shared
        self.fp8_initialized = True
        return self


@pytest.fixture
def scaling(monkeypatch: pytest.MonkeyPatch) -> Any:
    parts = ["transformer_engine", "pytorch", "tensor", "float8_tensor"]
    for number in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:number]), ModuleType(parts[number - 1]))
    sys.modules[".".join(parts)].Float8CurrentScalingQuantizer = Quantizer  # type: ignore[attr-defined]
    tex: Any = ModuleType("transformer_engine_torch")
    tex.FP8FwdTensors = SimpleNamespace(GEMM1_INPUT=INPUT, GEMM1_WEIGHT=WEIGHT)
    tex.FP8BwdTensors = SimpleNamespace(GRAD_OUTPUT1=GRADIENT)
    monkeypatch.setitem(sys.modules, "transformer_engine_torch", tex)
    monkeypatch.delitem(sys.modules, "tanren.engine.current_scaling", raising=False)
    yield importlib.import_module("tanren.engine.current_scaling")
    sys.modules.pop("tanren.engine.current_scaling", None)


def test_a_layer_is_told_after_its_first_pass(scaling: Any) -> None:
    linear = Linear()
    assert scaling.of_input(linear) is None
    linear.forward()
    quantizer = linear.quantizers["scaling_fwd"][INPUT]
    assert scaling.of_input(linear) is quantizer.amax
    assert quantizer.use_existing_amax
    assert not linear.quantizers["scaling_fwd"][WEIGHT].use_existing_amax
    assert scaling.of_gradient(linear) is linear.quantizers["scaling_bwd"][GRADIENT].amax


def test_a_state_that_was_loaded_does_not_decide(scaling: Any) -> None:
    """Made outside of a pass, it says that no rank shares its largest value."""
    loaded = [Quantizer(), Quantizer(), Quantizer()]
    linear = Linear(loaded)
    assert scaling.of_input(linear) is None
    linear.forward(shared=True)
    assert linear.quantizers["scaling_fwd"] is loaded
    assert scaling.of_input(linear) is None
    assert not loaded[INPUT].use_existing_amax


def test_a_layer_that_begins_to_share_measures_again(scaling: Any) -> None:
    linear = Linear().forward()
    assert scaling.of_input(linear) is not None
    quantizer = linear.quantizers["scaling_fwd"][INPUT]
    quantizer.with_amax_reduction = True
    assert scaling.of_input(linear) is None
    assert not quantizer.use_existing_amax


def test_other_scalings_and_bf16_are_told_nothing(scaling: Any) -> None:
    assert scaling.of_input(Linear().forward(kind=object)) is None
    in_bf16 = Linear([Quantizer()])
    assert scaling.of_input(in_bf16) is scaling.of_gradient(in_bf16) is None
    assert not in_bf16.quantizers["scaling_fwd"][INPUT].use_existing_amax
