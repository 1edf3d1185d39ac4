"""Every shape in recipes/models has the parameters that its model is known to have."""

from __future__ import annotations

import pytest

from tanren.config.load import read_model
from tanren.plan.memory import RESERVED_GIB, training_memory
from tests.conftest import REPOSITORY
from tests.plan.test_memory import recipe

# Parameters, and how closely they are known: what model cards and weight files say, and for the
# shapes of our own what they should be.
PARAMETERS = {
    "llmjp4-8b": (8_590_200_832, 0),
    "llmjp4-8b-4layers": (2.48e9, 5e-3),
    "swallow-8b": (8_030_261_248, 0),
    "tanuki-8b": (7.51e9, 1e-3),
    "tanuki-debug": (41.7e6, 1e-3),
    "tiny": (2.4e6, 2e-2),
    "tiny-llmjp4": (12.7e6, 5e-3),
    "v4-7.7b": (7.8e9, 2e-3),
    "v4-7.7b-v3.1": (7.79e9, 2e-3),
}


def test_every_shape_is_known() -> None:
    files = {path.stem for path in (REPOSITORY / "recipes" / "models").glob("*.yaml")}
    assert files == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_shape_has_its_parameters(name: str) -> None:
    known, near = PARAMETERS[name]
    assert read_model(name).parameters == pytest.approx(known, rel=near, abs=0)


def test_only_llama_3_1_has_a_scaled_rope() -> None:
    scaled = {name: read_model(name).rope_scaling for name in PARAMETERS}
    found = {name: scaling.factor for name, scaling in scaled.items() if scaling is not None}
    assert found == {"swallow-8b": 8.0}


def test_the_debug_shape_fits_a_gpu_of_24_gb() -> None:
    needed = training_memory(
        read_model("tanuki-debug"), recipe("sequence_length=2048", "micro_batch=8"),
        precision="bf16", data_parallel=1, accumulation=1,
    )  # fmt: skip
    assert needed.total < 24e9 / 2**30 - RESERVED_GIB
