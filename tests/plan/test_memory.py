"""The memory formula against peaks that were measured, and what it refuses."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from tanren.config.errors import RequestError
from tanren.config.load import read_model, read_recipe
from tanren.config.training import Midtrain, Training
from tanren.plan.batch import make_batch
from tanren.plan.cost import Gpu, check_memory, estimated_hours, fitted
from tanren.plan.memory import GIB, Memory, training_memory
from tests.conftest import REPOSITORY

H200 = Gpu("NVIDIA H200", 140.4)
EIGHT, FOUR_LAYERS = read_model("llmjp4-8b"), read_model("llmjp4-8b-4layers")


def recipe(*sets: str) -> Midtrain:
    path = REPOSITORY / "recipes" / "llmjp4-8b-4layers" / "midtrain.yaml"
    _, value = read_recipe(path, None, list(sets))
    assert isinstance(value, Midtrain)
    return value


# tanren on H200, 8.59 B, torch 2.11, Transformer Engine 2.11: torch's peak of the fullest rank in
# GiB, with bf16 moments and fp32 main gradients.
MEASURED = [
    ("midtrain", 1, ["micro_batch=1"], 115.12),
    ("midtrain", 2, ["micro_batch=2"], 108.26),
    ("midtrain", 2, ["micro_batch=2", "fp8=tensorwise"], 118.03),
    ("sft", 2, ["micro_batch=2"], 108.11),
    ("sft", 2, ["micro_batch=2", "fp8=tensorwise"], 117.41),
    ("dpo", 2, ["micro_batch=1"], 109.86),
    ("midtrain", 1, ["micro_batch=1", "linear=quack"], 111.32),
    ("midtrain", 2, ["micro_batch=2", "linear=quack"], 100.96),
    ("midtrain", 1, ["micro_batch=2", "linear=quack"], 124.85),
    ("sft", 1, ["micro_batch=2", "linear=quack"], 124.7),
]


def needed_by(stage: str, data_parallel: int, sets: list[str]) -> float:
    path = REPOSITORY / "recipes" / "llmjp4-8b" / f"{stage}.yaml"
    _, value = read_recipe(path, None, [*sets, "main_gradients=fp32"])
    assert isinstance(value, Training)
    return training_memory(
        EIGHT, value, precision="bf16", data_parallel=data_parallel, accumulation=4
    ).total


@pytest.mark.parametrize(("stage", "gpus", "sets", "peak"), MEASURED)
def test_the_formula_meets_what_the_engine_used(
    stage: str, gpus: int, sets: list[str], peak: float
) -> None:
    assert needed_by(stage, gpus, sets) == pytest.approx(peak, rel=0.01)


def test_the_first_stage_of_a_pipeline_keeps_more_and_the_last_one_has_the_logits() -> None:
    """Of two stages the first keeps two micro batches, of half the layers each; the last one has
    logits, which are the more where layers are few.
    """

    def of(layers: int, pipeline: int) -> Memory:
        wanted = recipe("micro_batch=1", f"layout.pipeline={pipeline}", "main_gradients=fp32")
        model = FOUR_LAYERS.model_copy(update={"layers": layers})
        return training_memory(model, wanted, precision="bf16", data_parallel=1, accumulation=8)

    assert of(8, 2).logits == 0
    assert of(8, 2).activations == of(8, 1).activations
    assert of(4, 2).logits == of(4, 1).logits > 0
    assert of(4, 2).activations == of(4, 1).activations / 2


def test_gradients_and_moments_take_the_bytes_that_are_stated() -> None:
    parameters = EIGHT.parameters / GIB
    for sets, gradient, state in (
        (["main_gradients=fp32", "optimizer.moments=fp32"], 4, 10),
        (["main_gradients=bf16", "optimizer.moments=bf16"], 2, 6),
    ):
        needed = training_memory(
            EIGHT, recipe("micro_batch=1", *sets), precision="bf16", data_parallel=4,
            accumulation=1,
        )  # fmt: skip
        assert needed.gradients == pytest.approx(parameters * gradient, rel=1e-3)
        assert needed.optimizer == pytest.approx(parameters * state / 4, rel=1e-3)


def test_the_table_in_the_docs_is_the_formulas() -> None:
    text = (REPOSITORY / "docs" / "memory.md").read_text()
    rows = re.findall(r"^\| (\w+) \| (\d) \| .* \| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE)
    assert rows == [
        (stage, str(gpus), f"{needed_by(stage, gpus, sets):.1f}", f"{peak:.1f}")
        for stage, gpus, sets, peak in MEASURED
    ]


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
    error = refused("micro_batch=5", "global_batch=80", gpus=4)
    assert str(error).startswith(
        "recipes/x/midtrain.yaml: micro_batch 5: needs about 147 GiB a GPU (weights 16.0, "
        "gradients 32.0, optimizer 12.0, activations 85.0, logits 1.5), and a NVIDIA H200 has "
        "136 GiB for it."
    )
    assert error.next_step == "--set micro_batch=4"


def test_recomputation_is_named_where_no_smaller_batch_fits() -> None:
    error = refused("micro_batch=1", gpu=Gpu("NVIDIA H100", 90.0), gpus=2)
    assert error.next_step == ("--set layout.recompute=full --set micro_batch=1 or 4 GPUs")


def test_a_model_that_fits_nowhere_is_said_so() -> None:
    error = refused("micro_batch=1", gpu=Gpu("NVIDIA A100", 39.5))
    assert error.next_step == "use more GPUs or a larger tensor or pipeline size"


def test_a_larger_tensor_size_is_named_where_more_gpus_would_not_help() -> None:
    a100 = Gpu("NVIDIA A100", 39.5)
    error = refused("micro_batch=1", gpu=a100, gpus=4)
    assert error.next_step == "--set layout.tensor=4"
    fits = recipe("micro_batch=1", "layout.tensor=4")
    assert check_memory(EIGHT, fits, 1, 64, "bf16", a100, "here").total < 35.5
    # Eight of them: smaller optimizer shares, and half of them hold a layer's other half.
    error = refused("micro_batch=1", gpu=a100, gpus=8)
    assert error.next_step == "--set layout.tensor=2 --set layout.recompute=full"
    for stated in ("layout.data=4", "linear=quack"):
        error = refused("micro_batch=1", stated, gpu=a100, gpus=4)
        assert error.next_step == "use more GPUs or a larger tensor or pipeline size"


@pytest.mark.parametrize("gpus", [2, 4, 8])
@pytest.mark.parametrize("gib", range(24, 60, 3))
def test_the_tensor_size_that_is_named_fits(gpus: int, gib: int) -> None:
    """Transformer Engine's layers, which keep more, are what runs with it."""
    gpu, asked = Gpu("NVIDIA H100", gib, quack=True), ("micro_batch=2", "optimizer.moments=bf16")
    try:
        check_memory(EIGHT, recipe(*asked), gpus, 8, "bf16", gpu, "here")
    except RequestError as error:
        if not error.next_step.startswith("--set layout.tensor"):
            return
        sets = error.next_step.removeprefix("--set ").split(" --set ")
        changed = recipe(*asked, *sets)
        ranks = gpus // changed.layout.tensor
        check_memory(EIGHT, changed, ranks, 8, "bf16", gpu, "here")


def test_figures_that_are_near_each_other_are_told_apart() -> None:
    needed = check_memory(EIGHT, recipe("micro_batch=1"), 2, 4, "bf16", H200, "here").total
    error = refused("micro_batch=1", gpu=Gpu("NVIDIA H200", needed + 3.9), gpus=2)
    assert f"needs about {needed:.1f} GiB" in str(error)
    assert f"has {needed - 0.1:.1f} GiB" in str(error)


def test_the_hours_are_an_assumption_about_a_known_gpu() -> None:
    wanted = recipe("steps=500", "global_batch=512", "measured=null", "micro_batch=1")
    batch = make_batch(wanted, 8, "here", steps=500)
    found = estimated_hours(EIGHT, wanted, batch.tokens, H200, 8)
    assert found is not None
    hours, assumption = found
    # 1.049 B tokens of 49.93 GFLOP at 8 x 494.5 TFLOP/s.
    assert hours == pytest.approx(3.68, rel=0.01)
    assert assumption == "at 50% of 8 x 989 TFLOP/s, an assumption"
    assert estimated_hours(EIGHT, wanted, batch.tokens, Gpu("Other", 80.0), 8) is None


def test_the_hours_of_a_recipe_that_was_measured_are_from_that() -> None:
    wanted = recipe("steps=3600", "global_batch=16", "micro_batch=1")
    assert wanted.measured is not None
    batch = make_batch(wanted, 2, "here", steps=3600)
    found = estimated_hours(EIGHT, wanted, batch.tokens, Gpu("NVIDIA H200 NVL", 139.8), 2)
    # 3600 x 16 x 4096 tokens at 2 x 50,972 a second.
    assert found == (
        pytest.approx(0.6429, rel=0.001),
        "at 50,972 tokens/s a GPU, measured on 1 x H200",
    )


@pytest.mark.parametrize(
    ("sets", "gpu"),
    [
        ((), "NVIDIA H100"),
        (("fp8=delayed",), "NVIDIA H200"),
        (("sequence_length=8192",), "NVIDIA H200"),
        (("layout.tensor=2",), "NVIDIA H200"),
        (("layout.recompute=full",), "NVIDIA H200"),
    ],
)
def test_what_was_measured_says_nothing_of_other_runs(sets: tuple[str, ...], gpu: str) -> None:
    wanted = recipe("steps=3600", "global_batch=16", "micro_batch=1", *sets)
    found = estimated_hours(EIGHT, wanted, 3600 * 16 * 4096, Gpu(gpu, 139.8), 2)
    assert found is not None
    assert found[1].endswith("an assumption")


def chosen(gpus: int, *sets: str, gpu: Gpu = H200) -> tuple[object, object]:
    wanted = recipe("micro_batch=auto", "optimizer.moments=bf16", "global_batch=512", *sets)
    found = fitted(EIGHT, wanted, gpus, (512,), "bf16", gpu)
    return found.micro_batch, found.main_gradients


def test_the_plan_takes_the_largest_micro_batch_that_fits_with_fp32_gradients() -> None:
    assert chosen(1) == (1, "fp32")
    assert chosen(2) == chosen(4) == chosen(64) == (2, "fp32")
    assert chosen(4, "micro_batch=1") == (1, "fp32")
    assert chosen(4, "main_gradients=bf16") == (2, "bf16")


def test_what_quack_keeps_is_counted_where_a_run_will_take_it() -> None:
    there, a100 = replace(H200, quack=True), Gpu("NVIDIA A100", H200.memory_gib, quack=True)
    assert chosen(1, gpu=there) == (2, "fp32")
    assert chosen(1, "linear=te", gpu=there) == (1, "fp32")
    in_fp8 = recipe("micro_batch=1", "main_gradients=fp32", "fp8=tensorwise")
    assert check_memory(EIGHT, in_fp8, 2, 4, "bf16", there, "here") == check_memory(
        EIGHT, in_fp8, 2, 4, "bf16", H200, "here"
    )
    assert chosen(1, gpu=a100) == (1, "fp32")
    # The recipe still leaves it to the run, and its figure is that of what was counted.
    wanted = recipe("micro_batch=2", "optimizer.moments=bf16", "main_gradients=fp32")
    found = fitted(EIGHT, wanted, 1, (512,), "bf16", there)
    assert found.linear == "auto"
    needed = check_memory(EIGHT, found, 1, 4, "bf16", there, "here")
    assert needed == check_memory(
        EIGHT, wanted.model_copy(update={"linear": "quack"}), 1, 4, "bf16", H200, "here"
    )
    assert needed.total < check_memory(EIGHT, found, 1, 4, "bf16", H200, "here").total - 6


@pytest.mark.parametrize("how", ["lora.rank=32", "engine=nemo"])
def test_what_never_takes_quack_is_counted_without(how: str) -> None:
    path = REPOSITORY / "recipes" / "llmjp4-8b" / "sft.yaml"
    _, value = read_recipe(path, None, [how, "micro_batch=1", "main_gradients=fp32"])
    assert isinstance(value, Training)
    there = replace(H200, quack=True)
    assert check_memory(EIGHT, value, 1, 4, "bf16", there, "here") == check_memory(
        EIGHT, value, 1, 4, "bf16", H200, "here"
    )


def test_gradients_in_bf16_come_before_nothing() -> None:
    h100 = Gpu("NVIDIA H100", 93.6)
    assert chosen(2, gpu=h100) == (1, "bf16")
    assert chosen(8, gpu=h100) == (1, "fp32")
    # Nothing fits: the smallest, of which the refusal speaks.
    assert chosen(1, gpu=h100) == (1, "bf16")
