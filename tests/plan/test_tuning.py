"""Plans of sft and dpo: where they begin, whose tokenizer they take, what does not fit."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tanren.config.errors import RequestError
from tanren.config.load import read_model, read_recipe
from tanren.config.training import Sft
from tanren.launch.preview import Preview
from tanren.plan.bench import Bench
from tanren.plan.cost import Gpu
from tanren.plan.make import make_plan
from tanren.plan.paths import RunFolder
from tanren.plan.plan import (
    DpoPlan,
    ExportPlan,
    Machine,
    Product,
    Request,
    SftPlan,
    digest,
    read_plan,
)
from tanren.report.plan import print_plan
from tests.conftest import RECIPES

SHAPE = read_model("tiny").model_dump(mode="json")


def product(stage: str, **result: Any) -> Product:
    made = {"identity": stage, "iteration": 8, "hf": "/base", "model": SHAPE, **result}
    return Product(stage, RunFolder(Path("/runs/tiny") / stage), made, iterations=(8,))


MADE = {
    "preprocess": product("preprocess", vocabulary_size=2048),
    "convert": product("convert", iteration=0),
    "midtrain": product("midtrain", tokenizer="/runs/tiny/preprocess/tokenizer"),
    "sft": product("sft", tokenizer="/runs/tiny/sft/tokenizer", template="llmjp-instruct"),
}


def planned(stage: str, *sets: str, made: dict[str, Product] | None = None, **fields: Any) -> Any:
    path = RECIPES / f"{stage}.yaml"
    _, recipe = read_recipe(path, None, list(sets))
    request = Request(
        task="tiny", stage=stage, recipe=recipe, recipe_file=path, runs=Path("/runs"),
        machine=Machine(cores=2), model=read_model("tiny"), products={**MADE, **(made or {})},
    )  # fmt: skip
    return make_plan(replace(request, **fields))


def refusal(stage: str, *sets: str, **fields: Any) -> str:
    with pytest.raises(RequestError) as refused:
        planned(stage, *sets, **fields)
    return refused.value.text()


def test_sft_begins_where_midtraining_ended_with_its_tokenizer() -> None:
    plan = planned("sft")
    assert isinstance(plan, SftPlan)
    assert plan.start == "checkpoint:/runs/tiny/midtrain/checkpoints/iter_0000008"
    assert plan.tokenizer == "/runs/tiny/preprocess/tokenizer"
    assert plan.settings["inputs"]["init"] == "midtrain"
    assert plan.cache == "/runs/tiny/cache"
    assert plan.steps == 120


def test_dpo_begins_where_sft_ended_and_takes_its_template() -> None:
    plan = planned("dpo")
    assert isinstance(plan, DpoPlan)
    assert plan.start == "checkpoint:/runs/tiny/sft/checkpoints/iter_0000008"
    assert plan.tokenizer == "/runs/tiny/sft/tokenizer"
    assert "sft was trained with llmjp-instruct" in refusal("dpo", "template=model")


@pytest.mark.parametrize(
    ("init", "tokenizer"),
    [
        ("stage:convert", "/base"),
        ("hf:/a/model", "hf:/a/model"),
        ("given", None),
    ],
)
def test_any_base_brings_its_tokenizer(init: str, tokenizer: str | None) -> None:
    assert planned("sft", f"init={init}").tokenizer == tokenizer


def test_a_checkpoint_has_no_tokenizer_and_the_recipe_names_it() -> None:
    text = refusal("sft", "init=checkpoint:/c/iter_0000001")
    assert "sft.yaml: tokenizer: is not stated, and the base (checkpoint:/c/iter_0000001)" in text
    assert "next: tokenizer: stage:preprocess, or the path" in text
    named = planned("sft", "init=checkpoint:/c/iter_0000001", "tokenizer=stage:preprocess")
    assert named.tokenizer == "/runs/tiny/preprocess/tokenizer"
    assert named.settings["inputs"]["tokenizer"] == "preprocess"


def test_a_base_that_was_tuned_by_adapters_is_its_base_and_the_adapters() -> None:
    adapted = product(
        "sft", start="checkpoint:/b", lora={"rank": 4}, tokenizer="/t", template="llmjp-instruct"
    )
    plan = planned("dpo", made={"sft": adapted})
    assert plan.start == "checkpoint:/b"
    assert plan.adapters == ("/runs/tiny/sft/checkpoints/iter_0000008",)
    twice = product("sft", start="/b", adapters=["/a/iter_0000001"], lora={"rank": 4},
                    tokenizer="/t", template="llmjp-instruct")  # fmt: skip
    assert planned("dpo", made={"sft": twice}).adapters == ("/a/iter_0000001", *plan.adapters)


def test_a_base_that_is_not_made_yet_plans() -> None:
    empty = Product("midtrain", RunFolder(Path("/runs/tiny/midtrain")))
    plan = planned("sft", made={"midtrain": empty})
    assert (plan.start, plan.tokenizer) == ("stage:midtrain", None)


GPU: dict[str, Any] = {"machine": Machine(gpus=2, gpu=Gpu("NVIDIA H200", 139.0))}


@pytest.mark.parametrize(
    ("stage", "sets", "message"),
    [
        ("sft", ["global_batch=6"], "global_batch: 6 is not a multiple of 4"),
        ("sft", ["sequence_length=1024"], "1024 is over the model's max_positions 512"),
        ("sft", ["schedule.warmup_steps=110"], "10 and 110 of warm-up leave none of the run's 120"),
        ("sft", ["epochs=2"], "state exactly one of steps, epochs"),
        ("sft", ["steps=null"], "state exactly one of steps, epochs"),
        ("sft", ["init=stage:preprocess"], "stage:preprocess is a preprocess stage"),
        ("sft", ["init=scratch", "lora={rank: 4}"], "lora: trains adapters beside a base, and"),
        ("dpo", ["preference.label_smoothing=0.1", "preference.loss=ipo"], "belongs to dpo and"),
    ],
)
def test_what_does_not_fit_is_refused(stage: str, sets: list[str], message: str) -> None:
    assert message in refusal(stage, *sets)


def test_adapters_stand_beside_transformer_engines_layers() -> None:
    sets = ["precision=bf16", "linear=quack"]
    planned("sft", *sets, **GPU)
    text = refusal("sft", *sets, "lora={rank: 4}", **GPU)
    assert "linear: quack knows no adapters (lora)" in text


def test_context_parallelism_is_refused_on_gpus() -> None:
    gpus = Machine(gpus=2, gpu=Gpu("NVIDIA H200", 139.0))
    text = refusal("sft", "layout={context: 2, data: 1}", machine=gpus)
    assert "layout.context: 2 would cut conversations" in text


def test_dpo_in_fp8_is_refused() -> None:
    gpu = Machine(gpus=1, gpu=Gpu("NVIDIA H200", 139.0))
    text = refusal("dpo", "fp8=tensorwise", "precision=bf16", machine=gpu)
    assert "fp8: tensorwise scales by what else is in a micro batch" in text
    simpo = ("preference.loss=simpo", "fp8=tensorwise", "precision=bf16")
    assert planned("dpo", *simpo, machine=gpu).recipe.fp8 == "tensorwise"


def test_adapters_need_memory_and_disk_for_themselves_alone() -> None:
    """Rank 32 beside every linear layer of 8.59 B: 71 M parameters."""
    fields = {
        "machine": Machine(gpus=1, gpu=Gpu("NVIDIA H200", 139.0)),
        "model": read_model("llmjp4-8b"),
    }
    base = ("init=hf:/m", "model=llmjp4-8b", "precision=bf16", "sequence_length=4096")
    with pytest.raises(RequestError, match=r"needs about 1\d\d GiB a GPU"):
        planned("sft", *base, "micro_batch=1", "main_gradients=fp32", **fields)
    plan = planned("sft", *base, "micro_batch=1", "lora={rank: 32}", **fields)
    assert plan.checkpoint_gib == pytest.approx(71_303_168 * 14 / 2**30)
    assert plan.memory.total < 45
    assert plan.memory.gradients == pytest.approx(71_303_168 * 4 / 2**30)


def test_another_shape_is_refused() -> None:
    wide = product("midtrain", model={**SHAPE, "hidden_size": 256}, tokenizer="/t")
    assert "hidden_size 256 there, 192 here" in refusal("sft", made={"midtrain": wide})


def test_steps_of_epochs_are_known_once_the_data_was_read() -> None:
    epochs = ("steps=null", "epochs=2.0")
    assert planned("sft", *epochs).steps is None
    settings = planned("sft", *epochs).settings
    found = {"steps": 77, "steps_of": digest(settings)}
    assert planned("sft", *epochs, **found).steps == 77
    assert planned("sft", *epochs, **found).settings == settings


def test_steps_of_other_settings_say_nothing() -> None:
    """Of a run that was given up: its folder knows the steps that its data made."""
    epochs = ("steps=null", "epochs=2.0", "schedule.warmup_steps=50")
    found = {"steps": 7, "steps_of": digest(planned("sft", *epochs).settings)}
    assert "50 are not fewer than the run's 7 steps" in refusal("sft", *epochs, **found)
    assert planned("sft", *epochs, "epochs=9.0", **found).steps is None


def test_a_run_may_change_its_layout_and_not_its_packing() -> None:
    plan = planned("sft")
    assert planned("sft", "micro_batch=2", "checkpoints.every_steps=7").settings == plan.settings
    assert planned("sft", "packing=false").settings != plan.settings
    assert planned("dpo", "preference.beta=0.2").settings != planned("dpo").settings


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    for stage in ("sft", "dpo"):
        plan = planned(stage, "lora={rank: 4, targets: [mlp]}")
        (tmp_path / "plan.json").write_text(plan.model_dump_json())
        assert read_plan(tmp_path / "plan.json") == plan


def test_exports_of_other_stages_have_folders_of_their_own() -> None:
    runs = {
        of: planned("export", f"of=stage:{of}").run
        for of in ("midtrain", "sft")
    }  # fmt: skip
    assert runs == {"midtrain": "/runs/tiny/export", "sft": "/runs/tiny/export.sft"}
    plan = planned("export", "of=stage:sft")
    assert isinstance(plan, ExportPlan)
    assert (plan.source, plan.iteration) == ("/runs/tiny/sft", 8)


def test_memory_counts_the_rows_of_a_pair() -> None:
    machine = Machine(gpus=1, gpu=Gpu("NVIDIA H200", 139.0))
    path = RECIPES.parent / "llmjp4-8b-4layers"
    shape = read_model("llmjp4-8b-4layers")
    base = ("init=hf:/m", "model=llmjp4-8b-4layers", "precision=bf16", "sequence_length=4096")
    fields = {"machine": machine, "model": shape, "recipe_file": path / "sft.yaml"}
    sft = planned("sft", *base, "micro_batch=2", **fields)
    dpo = planned("dpo", *base, "micro_batch=1", **fields)
    assert sft.memory.activations == pytest.approx(dpo.memory.activations)
    assert sft.hours is not None
    assert dpo.hours is None


def test_a_person_reads_the_plan() -> None:
    text = io.StringIO()
    plan = planned("dpo", "lora={rank: 8, targets: [attention]}", "steps=null", "epochs=1.5")
    print_plan(Preview(plan), Console(file=text, soft_wrap=True))
    for line in (
        "steps          known once the data is read (1.5 epochs)",
        "batch          32 pairs, packed into rows of 256 tokens",
        "loss           dpo, beta 0.1",
        "LoRA           rank 8, alpha 32, on attention",
        "tokenizer      /runs/tiny/sft/tokenizer, template llmjp-instruct",
        "too long       drop what is over 128 tokens",
        "data answers   Python's docstrings",
    ):
        assert line in text.getvalue()


def test_rows_of_sft_are_as_long_as_its_sequences() -> None:
    _, recipe = read_recipe(RECIPES / "sft.yaml", None, [])
    assert isinstance(recipe, Sft)
    assert recipe.row_length == 256


def test_nemo_trains_the_same_plan_in_its_own_environment() -> None:
    plain, nemo = planned("sft"), planned("sft", "engine=nemo")
    assert (nemo.launch.own, plain.launch.own) == ("nemo", None)
    assert nemo.settings == plain.settings | {"engine": "nemo"}
    assert nemo.start == plain.start


def test_a_run_that_began_before_there_was_a_choice_of_engines_goes_on() -> None:
    assert "engine" not in planned("sft").settings
    assert "engine" not in planned("dpo").settings


ADAPTED = product("sft", start="checkpoint:/b", lora={"rank": 4}, template="llmjp-instruct")


@pytest.mark.parametrize(
    ("stage", "sets", "fields", "problem"),
    [
        ("sft", ["lora={rank: 4}"], {}, "sft.yaml: lora: adapters are trained by engine: megatron"),
        ("dpo", [], {"made": {"sft": ADAPTED}}, "dpo.yaml: init: stage:sft was tuned by LoRA"),
        ("sft", ["precision=bf16", "fp8=delayed"], GPU, "sft.yaml: fp8: delayed is offered by"),
        (
            "sft",
            ["precision=bf16", "attention=flash4"],
            GPU,
            "sft.yaml: attention: flash4 is offer",
        ),
        ("sft", ["precision=bf16", "linear=quack"], GPU, "sft.yaml: linear: quack is offered by"),
        ("sft", ["layout.tensor=2", "layout.data=null"], GPU, "layout.tensor: engine: nemo spread"),
        ("sft", ["layout.pipeline=2", "layout.data=null"], GPU, "layout.pipeline: engine: nemo"),
        ("sft", ["precision=bf16", "optimizer.moments=bf16"], {}, "optimizer.moments: bf16 is off"),
        ("sft", [], {"bench": Bench()}, "sft.yaml: engine: a bench measures engine: megatron"),
    ],
)
def test_what_nemo_does_not_do_is_refused(
    stage: str, sets: list[str], fields: dict[str, Any], problem: str
) -> None:
    planned(stage, *sets, **fields)  # the other engine does
    text = refusal(stage, *sets, "engine=nemo", **fields)
    assert problem in text
    assert "next: " in text and "--set engine=megatron" in text
