"""The plan of a bench: what it takes from a recipe, what it needs, what a step must do."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from tanren.config.errors import RequestError
from tanren.config.load import read_model, read_recipe
from tanren.config.training import Midtrain, Training
from tanren.launch import reading, submit
from tanren.launch.orders import Order
from tanren.plan.bench import Bench, bench_recipe, least_work
from tanren.plan.cost import peak_tflops
from tanren.plan.make import make_plan
from tanren.plan.plan import MidtrainPlan, TrainingPlan, TuningPlan, read_plan
from tests.conftest import REPOSITORY


def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: Order) -> TrainingPlan:
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("RUNTIME", "native")
    request = reading.read_request(order)
    reading.refuse_missing(order, request)
    plan = make_plan(request)
    assert isinstance(plan, TrainingPlan)
    return plan


def test_the_steps_of_a_bench_are_warm_up_timed_and_two_for_the_profile() -> None:
    assert (Bench().warm_up, list(Bench().timed)) == (4, [5, 6, 7, 8, 9, 10])
    assert (Bench(steps=4).warm_up, list(Bench(steps=4).timed)) == (1, [2])
    with pytest.raises(ValidationError, match="steps"):
        Bench(steps=3)


@pytest.mark.parametrize("stage", ["midtrain", "sft", "dpo"])
def test_a_bench_stands_on_nothing_and_has_a_folder_of_its_own(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = REPOSITORY / "recipes" / "llmjp4-8b" / f"{stage}.yaml"
    order = Order(recipe, name="a", assignments=("global_batch=16",), bench=Bench(steps=8))
    plan = planned(tmp_path, monkeypatch, order)
    assert plan.folder.root == tmp_path / "runs" / "llmjp4-8b" / f"bench.{stage}-a"
    assert (plan.recipe.steps, plan.recipe.global_batch, plan.start) == (8, 16, "scratch")
    assert plan.recipe.sequence_length == 4096
    assert plan.made_up
    assert not submit.look(plan).done
    if isinstance(plan, MidtrainPlan):
        assert plan.mix is not None
        (source,) = plan.mix.sources
        assert Path(source.prefix).is_relative_to(plan.folder.root)
        assert source.used == 8 * 16 * 4096
        assert plan.recipe.evaluation is None
    if isinstance(plan, TuningPlan):
        assert (plan.steps, plan.recipe.max_dev_samples, plan.recipe.epochs) == (8, 0, None)
        assert [one.path for one in plan.recipe.datasets] == [None]
    plan.folder.root.mkdir(parents=True)
    plan.folder.plan.write_text(plan.model_dump_json())
    assert read_plan(plan.folder.plan) == plan


def test_a_real_bench_stands_on_what_its_stage_stands_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = Order(REPOSITORY / "recipes" / "tiny" / "midtrain.yaml", bench=Bench(real=True))
    with pytest.raises(RequestError, match="stands on preprocess"):
        planned(tmp_path, monkeypatch, order)


def test_adapters_may_be_measured_beside_random_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = ("lora.rank=8",)
    order = Order(REPOSITORY / "recipes" / "tiny" / "sft.yaml", assignments=sets, bench=Bench())
    assert planned(tmp_path, monkeypatch, order).start == "scratch"


def test_a_stage_that_trains_nothing_has_no_bench() -> None:
    path = REPOSITORY / "recipes" / "tiny" / "convert.yaml"
    _, recipe = read_recipe(path, None, [])
    with pytest.raises(RequestError, match="trains nothing"):
        bench_recipe(recipe, Bench(), path)


def test_the_least_work_of_a_step_adds_up_to_the_models_flops() -> None:
    model = read_model("llmjp4-8b")
    path = REPOSITORY / "recipes" / "llmjp4-8b" / "midtrain.yaml"
    _, recipe = read_recipe(path, None, ["layout.tensor=2"])
    assert isinstance(recipe, Midtrain)
    tokens = 16 * 4096
    flops = tokens * model.flops_per_token(4096)
    least = least_work(
        model, recipe, precision="bf16", data_parallel=4, tokens=tokens, predicted=tokens,
        flops=flops,
    )  # fmt: skip
    kinds = [least["layer_flop"], least["head_flop"], least["attention_flop"]]
    assert sum(kinds) == pytest.approx(flops / 8)
    # 32 layers x 4096 x 32 heads x 128 channels, forward and backward, the causal half.
    assert least["attention_flop"] == pytest.approx(6 * 32 * 4096 * 4096 * tokens / 8)
    assert least["head_flop"] == pytest.approx(6 * 196_608 * 4096 * tokens / 8)
    # Two norms with their sums (8 of the stream each), SwiGLU, rotations of 32 + 8 heads; logits.
    moved = 32 * (2 * 8 * 4096 + 8 * 14336 + 4 * 40 * 128) + 2 * 196_608
    assert least["elementwise_bytes"] == pytest.approx(2 * moved * tokens / 8)
    inside = least_work(
        model, recipe, precision="bf16", data_parallel=4, tokens=tokens, predicted=tokens,
        flops=flops, swiglu_inside=True,
    )  # fmt: skip
    less = {"elementwise_bytes": 2 * (moved - 32 * 8 * 14336) * tokens / 8}
    assert inside == pytest.approx(least | less)
    # 4 bytes of each of a GPU's parameters are zeroed, and 34 of a data-parallel part of them.
    assert least["optimizer_bytes"] == pytest.approx(model.parameters / 2 * (4 + 38 / 4 - 1))


def test_the_peak_in_fp8_is_twice_that_in_bf16() -> None:
    assert peak_tflops("NVIDIA H200") == 989
    assert peak_tflops("NVIDIA H200", "delayed") == 1978
    assert peak_tflops("cpu") is None


def test_a_bench_changes_no_field_that_the_speed_depends_on() -> None:
    path = REPOSITORY / "recipes" / "llmjp4-8b" / "midtrain.yaml"
    _, recipe = read_recipe(path, None, ["fp8=delayed", "micro_batch=2"])
    changed = bench_recipe(recipe, Bench(), path)
    assert isinstance(recipe, Training)
    assert isinstance(changed, Training)
    differing = {
        key for key, value in changed if value != getattr(recipe, key)
    }  # fmt: skip
    assert differing == {"steps", "schedule", "job", "checkpoints", "measured", "init", "mix",
                         "evaluation"}  # fmt: skip
