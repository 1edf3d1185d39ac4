"""Who computes attention, and FlashAttention 4 beside Transformer Engine where both are there."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tanren.config.errors import RequestError
from tanren.config.load import read_model
from tanren.config.model import Model
from tanren.engine import flash4
from tanren.engine.packed import sequence_params
from tanren.images.definition import IMAGES, read_versions
from tests.conftest import REPOSITORY
from tests.engine.hopper import on_hopper_with, pretend
from tests.engine.processes import check

Patch = pytest.MonkeyPatch


def installed(
    monkeypatch: Patch, version: str | None, capability: tuple[int, int] = (9, 0)
) -> None:
    """A GPU with that package, or without."""
    pretend(monkeypatch, "flash-attn-4", version, capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)


EIGHT = read_model("llmjp4-8b")
NARROW = EIGHT.model_copy(update={"head_size": 96})
UNGROUPED = EIGHT.model_copy(update={"kv_groups": EIGHT.attention_heads})


def test_it_is_taken_where_it_is_installed_and_fits(monkeypatch: Patch) -> None:
    installed(monkeypatch, flash4.VERSION)
    assert flash4.wanted("auto", "bf16", EIGHT, 1)
    assert flash4.wanted("flash4", "bf16", EIGHT.model_copy(update={"head_size": 64}), 1)
    assert not flash4.wanted("te", "bf16", EIGHT, 1)


@pytest.mark.parametrize(
    ("version", "capability", "precision", "shape", "context", "why"),
    [
        (None, (9, 0), "bf16", EIGHT, 1, "flash-attn-4 is not installed"),
        ("4.0.0", (9, 0), "bf16", EIGHT, 1, "flash-attn-4 4.0.0 is installed, and 4.0.0b36"),
        (flash4.VERSION, (8, 0), "bf16", EIGHT, 1, "it was tried on Hopper, and this is a GPU"),
        (flash4.VERSION, (9, 0), "bf16", NARROW, 1, "heads of (64, 128), not of 96"),
        (flash4.VERSION, (9, 0), "bf16", UNGROUPED, 1, "with grouped heads alone"),
        (flash4.VERSION, (9, 0), "fp32", EIGHT, 1, "it computes in bf16, and the run is in fp32"),
        (flash4.VERSION, (9, 0), "bf16", EIGHT, 2, "with context parallelism"),
    ],
)
def test_auto_goes_without_it_and_flash4_says_why_not(
    monkeypatch: Patch, version: str | None, capability: tuple[int, int], precision: str,
    shape: Model, context: int, why: str,
) -> None:  # fmt: skip
    installed(monkeypatch, version, capability)
    assert not flash4.wanted("auto", precision, shape, context)
    with pytest.raises(RequestError) as error:
        flash4.wanted("flash4", precision, shape, context)
    assert why in str(error.value)
    assert "--set attention=auto" in str(error.value)


@pytest.mark.parametrize("spec", [None, ImportError("libcuda")])
def test_a_flash_attn_that_hides_it_is_named(monkeypatch: Patch, spec: Any) -> None:
    """That of an image, beside a .venv's: the folder is one, and it is in another place."""
    installed(monkeypatch, flash4.VERSION)

    def find(_: str) -> Any:
        if spec is not None:
            raise spec

    monkeypatch.setattr(importlib.util, "find_spec", find)
    assert not flash4.wanted("auto", "bf16", EIGHT, 1)
    with pytest.raises(RequestError, match="another flash_attn hides it"):
        flash4.wanted("flash4", "bf16", EIGHT, 1)


@pytest.mark.parametrize(
    ("segments", "longest", "taken"),
    [(256, 129, True), (257, 4096, False), (2, 1, True), (1, 4096, True)],
)
def test_packed_micro_batches_of_other_kernels_are_left_to_transformer_engine(
    segments: int, longest: int, taken: bool
) -> None:
    borders = torch.zeros(segments + 1, dtype=torch.int32)
    assert flash4.takes(sequence_params(borders, longest)) == taken
    assert flash4.takes(None)


@pytest.mark.parametrize(("longest", "told"), [(1, 129), (128, 129), (129, 129), (4096, 4096)])
def test_short_segments_take_the_kernels_of_long_ones(
    monkeypatch: Patch, longest: int, told: int
) -> None:
    """Other kernels would be compiled at the first micro batch without a long segment."""
    seen = []

    def forward(query: Any, *_: Any, **options: Any) -> Any:
        seen.append((options["max_seqlen_q"], options["max_seqlen_k"]))
        return query, None

    monkeypatch.setattr(flash4, "_interface", lambda: SimpleNamespace(_flash_attn_fwd=forward))
    heads = torch.zeros(3, 1, 8)
    flash4.attend(heads, heads, heads, sequence_params(torch.tensor([0, 1, 3]), longest))
    assert seen == [(told, told)]


def test_a_cpu_has_megatrons_own() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert not flash4.wanted("auto", "bf16", EIGHT, 1)


@pytest.mark.skipif(
    not on_hopper_with(flash4.PACKAGE, flash4.VERSION), reason="no GPU, or no flash-attn-4"
)
def test_its_errors_are_transformer_engines_on_a_gpu() -> None:
    assert flash4.wanted("auto", "bf16", EIGHT, 1)
    assert check("flash4_check").endswith("checked 6\n")


def test_the_image_has_the_version_that_was_tried() -> None:
    pins = read_versions(IMAGES["train"], REPOSITORY).pins
    assert pins[flash4.PACKAGE] == flash4.VERSION
