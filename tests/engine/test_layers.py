"""The kernels between matrix products, against torch in fp64."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from tests.conftest import REPOSITORY

has_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")


def check(device: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.layers_check", device],
        cwd=REPOSITORY, env=os.environ | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "checked 8\n"


@has_triton
def test_the_kernels_compute_what_torch_does() -> None:
    check("cpu", TRITON_INTERPRET="1")


@has_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_kernels_compute_it_on_a_gpu() -> None:
    check("cuda")
