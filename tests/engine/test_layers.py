"""The kernels between matrix products, against torch in fp64."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from tanren.engine import products
from tests.engine.hopper import on_hopper_with
from tests.engine.processes import check

has_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")


has_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.kernels
@has_triton
def test_the_kernels_compute_what_torch_does() -> None:
    assert check("layers_check", "cpu", TRITON_INTERPRET="1") == "checked 14\n"


@pytest.mark.kernels
@has_triton
@has_gpu
def test_the_kernels_compute_it_on_a_gpu() -> None:
    assert check("layers_check", "cuda") == "checked 14\n"


@has_gpu
def test_layers_that_add_and_norm_in_one_pass_compute_what_they_do_apart() -> None:
    # Three more where SwiGLU may be inside its products.
    times = 11 if on_hopper_with(products.PACKAGE, products.VERSION) else 8
    assert check("joined_check").endswith(f"checked {times}\n")
