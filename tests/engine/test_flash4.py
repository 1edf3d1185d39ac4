"""Who computes attention, and FlashAttention 4 beside Transformer Engine where both are there."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest
import torch

from tanren.config.errors import RequestError
from tanren.engine import flash4
from tanren.images.definition import IMAGES, read_versions
from tests.conftest import REPOSITORY

Patch = pytest.MonkeyPatch


def installed(
    monkeypatch: Patch, version: str | None, capability: tuple[int, int] = (9, 0)
) -> None:
    """A GPU with that package, or without."""

    def found(name: str) -> str:
        assert name == "flash-attn-4"
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")


def test_it_is_taken_where_it_is_installed_and_fits(monkeypatch: Patch) -> None:
    installed(monkeypatch, flash4.VERSION)
    assert flash4.wanted("auto", "bf16", 128, 1)
    assert flash4.wanted("flash4", "bf16", 64, 1)
    assert not flash4.wanted("te", "bf16", 128, 1)


@pytest.mark.parametrize(
    ("version", "capability", "precision", "width", "context", "why"),
    [
        (None, (9, 0), "bf16", 128, 1, "flash-attn-4 is not installed"),
        ("4.0.0", (9, 0), "bf16", 128, 1, "flash-attn-4 4.0.0 is installed, and 4.0.0b36"),
        (flash4.VERSION, (8, 0), "bf16", 128, 1, "it was tried on Hopper, and this is a GPU"),
        (flash4.VERSION, (9, 0), "bf16", 96, 1, "heads of (64, 128), not of 96"),
        (flash4.VERSION, (9, 0), "fp32", 128, 1, "it computes in bf16, and the run is in fp32"),
        (flash4.VERSION, (9, 0), "bf16", 128, 2, "with context parallelism"),
    ],
)
def test_auto_goes_without_it_and_flash4_says_why_not(
    monkeypatch: Patch, version: str | None, capability: tuple[int, int], precision: str,
    width: int, context: int, why: str,
) -> None:  # fmt: skip
    installed(monkeypatch, version, capability)
    assert not flash4.wanted("auto", precision, width, context)
    with pytest.raises(RequestError) as error:
        flash4.wanted("flash4", precision, width, context)
    assert why in str(error.value)
    assert "--set attention=auto" in str(error.value)


def test_a_cpu_has_megatrons_own() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert not flash4.wanted("auto", "bf16", 128, 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_its_errors_are_transformer_engines_on_a_gpu() -> None:
    if not flash4.wanted("auto", "bf16", 128, 1):
        pytest.skip("no flash-attn-4 for this GPU")
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.flash4_check"],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("checked 4\n")


def test_the_image_has_the_version_that_was_tried() -> None:
    pins = read_versions(IMAGES["train"], REPOSITORY).pins
    assert pins[flash4.PACKAGE] == flash4.VERSION
