"""The memory formula against peaks that were measured, and what it refuses."""

from __future__ import annotations

import re

import pytest

from tanren.config.errors import RequestError
from tanren.config.load import read_model, read_recipe
from tanren.config.training import Midtrain
from tanren.plan.batch import make_batch
from tanren.plan.cost import Gpu, check_memory, estimated_hours, fitted
from tanren.plan.memory import GIB, training_memory
from tests.conftest import REPOSITORY

H200 = Gpu("NVIDIA H200", 140.4)
EIGHT, FOUR_LAYERS = read_model("llmjp4-8b"), read_model("llmjp4-8b-4layers")


def recipe(*sets: str) -> Midtrain:
    path = REPOSITORY / "recipes" / "llmjp4-8b-4layers" / "midtrain.yaml"
    _, value = read_recipe(path, None, list(sets))
    assert isinstance(value, Midtrain)
    return value


# tanren on H200, sequence 4096, torch 2.11, Transformer Engine 2.11: torch's peak of the first
# rank in GiB.
MEASURED = [
    ("4 layers, 1 GPU", 1, ["micro_batch=1"], 46.94),
    ("4 layers, 1 GPU", 1, ["micro_batch=2"], 50.66),
    ("4 layers, 1 GPU", 1, ["micro_batch=4"], 58.10),
    ("4 layers, 1 GPU", 1, ["micro_batch=16"], 102.76),
    ("4 layers, 1 GPU", 1, ["micro_batch=4", "layout.recompute=full"], 50.10),
    ("4 layers, 1 GPU", 1, ["micro_batch=2", "fp8=delayed"], 51.73),
    ("4 layers, 2 GPUs", 1, ["micro_batch=4", "layout.tensor=2"], 30.29),
    ("4 layers, 2 GPUs", 1,
     ["micro_batch=4", "layout.tensor=2", "layout.sequence_parallel=true"], 29.35),
    ("8.59 B, 2 GPUs", 2, ["micro_batch=1"], 116.21),
]  # fmt: skip
# Megatron-core in other settings on 4 H200, peak in GB: (micro batch, fp8, bytes of main
# gradients), with bf16 moments and wgrad fusion.
ELSEWHERE = [
    (1, "none", "fp32", 86.6), (2, "none", "fp32", 106.5), (2, "none", "bf16", 89.4),
    (1, "delayed", "fp32", 98.1), (2, "delayed", "fp32", 115.7), (2, "delayed", "bf16", 98.5),
]  # fmt: skip


@pytest.mark.parametrize(("what", "data_parallel", "sets", "peak"), MEASURED)
def test_the_formula_meets_what_the_engine_used(
    what: str, data_parallel: int, sets: list[str], peak: float
) -> None:
    model = EIGHT if what.startswith("8.59") else FOUR_LAYERS
    needed = training_memory(
        model, recipe(*sets), precision="bf16", data_parallel=data_parallel, accumulation=4
    )
    assert needed.total == pytest.approx(peak, rel=0.04)


def test_the_first_stage_of_a_pipeline_keeps_more_and_the_last_one_has_the_logits() -> None:
    """Measured on the first of two: 25.60 GiB. The last one, with the logits, needs more."""
    two = recipe("micro_batch=2", "layout.pipeline=2")
    needed = training_memory(FOUR_LAYERS, two, precision="bf16", data_parallel=1, accumulation=8)
    assert needed.logits > 0
    without = needed.total - needed.logits + needed.activations  # as the first: two in flight
    assert without == pytest.approx(25.60, rel=0.04)
    assert needed.total > without


@pytest.mark.parametrize(("micro_batch", "fp8", "gradient", "peak"), ELSEWHERE)
def test_the_formula_meets_what_megatron_used_elsewhere(
    micro_batch: int, fp8: str, gradient: str, peak: float
) -> None:
    wanted = recipe(
        f"micro_batch={micro_batch}", f"fp8={fp8}", f"main_gradients={gradient}",
        "optimizer.moments=bf16",
    )  # fmt: skip
    needed = training_memory(EIGHT, wanted, precision="bf16", data_parallel=4, accumulation=16)
    assert needed.total * GIB / 1e9 == pytest.approx(peak, rel=0.04)


def test_the_table_in_the_docs_is_the_formulas() -> None:
    text = (REPOSITORY / "docs" / "memory.md").read_text()
    rows = re.findall(r"^\| .* \| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE)
    assert len(rows) == len(MEASURED) + len(ELSEWHERE)
    shown = []
    for what, data_parallel, sets, peak in MEASURED:
        model = EIGHT if what.startswith("8.59") else FOUR_LAYERS
        needed = training_memory(
            model, recipe(*sets), precision="bf16", data_parallel=data_parallel, accumulation=4
        )
        shown.append((f"{needed.total:.1f}", f"{peak:.1f}"))
    assert rows[: len(shown)] == shown


def refused(*sets: str, gpu: Gpu = H200, gpus: int = 1) -> RequestError:
    wanted = recipe(*sets)
    batch = make_batch(wanted, gpus // wanted.layout.model_parallel, "here", steps=1)
    with pytest.raises(RequestError) as error:
        check_memory(
            EIGHT,
            wanted,
            batch.data_parallel,
            batch.accumulation,
            "bf16",
            gpu,
            "recipes/x/midtrain.yaml",
        )
    return error.value


def test_what_does_not_fit_is_refused_with_what_does() -> None:
    error = refused("micro_batch=4", "global_batch=64", gpus=4)
    assert str(error).startswith(
        "recipes/x/midtrain.yaml: micro_batch 4: needs about 148 GiB a GPU (weights 16.0, "
        "gradients 32.0, optimizer 24.0, activations 68.0, logits 7.5), and a NVIDIA H200 has "
        "136 GiB for it."
    )
    assert error.next_step == "--set micro_batch=2 or 8 GPUs"


def test_recomputation_is_named_where_no_smaller_batch_fits() -> None:
    error = refused("micro_batch=1", gpu=Gpu("NVIDIA H100", 105.0), gpus=2)
    assert error.next_step == ("--set layout.recompute=full --set micro_batch=1 or 4 GPUs")


def test_a_model_that_fits_nowhere_is_said_so() -> None:
    error = refused("micro_batch=1", gpu=Gpu("NVIDIA A100", 39.5))
    assert error.next_step == "use more GPUs or a larger tensor or pipeline size"


def test_the_hours_are_an_assumption_about_a_known_gpu() -> None:
    wanted = recipe("steps=500", "global_batch=512", "measured=null")
    batch = make_batch(wanted, 8, "here", steps=500)
    found = estimated_hours(EIGHT, wanted, batch.tokens, H200, 8)
    assert found is not None
    hours, assumption = found
    # 1.049 B tokens of 49.93 GFLOP at 8 x 494.5 TFLOP/s.
    assert hours == pytest.approx(3.68, rel=0.01)
    assert assumption == "at 50% of 8 x 989 TFLOP/s, an assumption"
    assert estimated_hours(EIGHT, wanted, batch.tokens, Gpu("Other", 80.0), 8) is None


def test_the_hours_of_a_recipe_that_was_measured_are_from_that() -> None:
    wanted = recipe("steps=3600", "global_batch=16")
    assert wanted.measured is not None
    batch = make_batch(wanted, 2, "here", steps=3600)
    found = estimated_hours(EIGHT, wanted, batch.tokens, Gpu("Other", 80.0), 2)
    # 3600 x 16 x 4096 tokens at 2 x 50,972 a second.
    assert found == (
        pytest.approx(0.6429, rel=0.001),
        "at 50,972 tokens/s a GPU, measured on 1 x H200",
    )


def chosen(gpus: int, *sets: str, gpu: Gpu = H200) -> tuple[object, object]:
    wanted = recipe("micro_batch=auto", "optimizer.moments=bf16", "global_batch=512", *sets)
    found = fitted(EIGHT, wanted, gpus, (512,), "bf16", gpu)
    return found.micro_batch, found.main_gradients


def test_the_plan_takes_the_largest_micro_batch_that_fits_with_fp32_gradients() -> None:
    assert chosen(1) == (1, "fp32")
    assert chosen(2) == chosen(4) == chosen(64) == (2, "fp32")
    assert chosen(4, "micro_batch=1") == (1, "fp32")
    assert chosen(4, "main_gradients=bf16") == (2, "bf16")


def test_gradients_in_bf16_come_before_nothing() -> None:
    h100 = Gpu("NVIDIA H100", 93.6)
    assert chosen(2, gpu=h100) == (1, "bf16")
    assert chosen(8, gpu=h100) == (1, "fp32")
    # Nothing fits: the smallest, of which the refusal speaks.
    assert chosen(1, gpu=h100) == (1, "bf16")
