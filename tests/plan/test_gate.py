"""The FP8 gate decides by curves: what it changes in a recipe, and what passes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tanren.config.errors import RequestError
from tanren.config.load import read_recipe
from tanren.config.training import Midtrain, Sft, Training
from tanren.plan.gate import (
    END,
    FEWEST_STEPS,
    SKIPPED,
    WINDOW,
    Curves,
    changes,
    compare,
    means,
    scalings,
)
from tests.conftest import RECIPES, REPOSITORY

STEPS = range(1, 201)
BF16 = Curves(
    loss={step: 2.0 + 10.0 / step for step in STEPS},
    grad_norm=dict.fromkeys(STEPS, 2.0),
    rate=dict.fromkeys(STEPS, 1000.0),
    held_out={0: 12.0, 100: 2.2, 200: 2.1},
)


def scaled(**factors: dict[int, float]) -> Curves:
    """The curves of bf16, some steps' values multiplied."""
    changed = {
        name: {step: value * by.get(step, 1.0) for step, value in getattr(BF16, name).items()}
        for name, by in factors.items()
    }
    return replace(BF16, **changed)


def test_equal_curves_pass_with_no_difference() -> None:
    found = compare(BF16, BF16)
    assert (found.first, found.largest, found.end, found.held_out) == (0, 0, 0, 0)
    assert (found.grad_norm, found.speed) == (1, 1)
    assert found.passes(1e-9)
    assert sorted(found.by_step) == list(range(SKIPPED + WINDOW, 201))


def test_a_single_batch_does_not_decide_and_ten_do() -> None:
    one = compare(BF16, scaled(loss={100: 1.04}))
    assert one.largest == pytest.approx(0.004, rel=0.02)
    assert 100 <= one.at < 110
    assert one.passes(0.005)
    ten = compare(BF16, scaled(loss=dict.fromkeys(range(91, 101), 1.04)))
    assert ten.largest == pytest.approx(0.04)
    assert ten.at == 100
    assert not ten.passes(0.005)
    # Neither is in the last fifty.
    assert one.end == ten.end == 0


def test_a_lower_loss_is_a_difference_too() -> None:
    found = compare(BF16, scaled(loss=dict.fromkeys(STEPS, 0.99)))
    assert found.largest == pytest.approx(-0.01)
    assert found.end == pytest.approx(-0.01)
    assert not found.passes(0.005)
    assert found.passes(0.011)


def test_the_first_twenty_steps_are_shown_and_do_not_decide() -> None:
    found = compare(BF16, scaled(loss=dict.fromkeys(range(1, SKIPPED + 1), 1.5)))
    assert found.first == pytest.approx(0.5)
    assert found.largest == 0
    assert found.passes(0.005)
    found = compare(BF16, scaled(loss={SKIPPED + 1: 1.5}))
    assert found.at == SKIPPED + WINDOW
    assert not found.passes(0.005)


def test_the_end_is_the_last_fifty_steps() -> None:
    last = dict.fromkeys(range(201 - END, 201), 1.004)
    found = compare(BF16, scaled(loss=last))
    assert found.end == pytest.approx(0.004)
    found = compare(BF16, scaled(loss={200 - END: 1.04}))
    assert found.end == 0


def test_the_held_out_loss_decides_as_well() -> None:
    found = compare(BF16, scaled(held_out={100: 0.992, 200: 1.001}))
    assert found.held_out == pytest.approx(-0.008)
    assert (found.largest, found.end) == (0, 0)
    assert not found.passes(0.005)
    # What was measured before the first step says nothing of training in FP8.
    assert compare(BF16, scaled(held_out={0: 2.0})).held_out == 0
    assert compare(replace(BF16, held_out={}), replace(BF16, held_out={})).held_out is None


def test_gradient_norms_and_speed_are_ratios_that_do_not_decide() -> None:
    every = dict.fromkeys(STEPS, 1.5)
    found = compare(BF16, scaled(grad_norm=every, rate=every))
    assert (found.grad_norm, found.speed) == (1.5, 1.5)
    assert found.passes(0.005)


def test_means_are_of_the_ten_steps_that_end_there() -> None:
    found = means({step: float(step) for step in range(1, 41)})
    assert found == {step: step - 4.5 for step in range(30, 41)}


def recipe_of(stage: str, *sets: str) -> Training:
    _, recipe = read_recipe(RECIPES / f"{stage}.yaml", None, list(sets))
    assert isinstance(recipe, Midtrain | Sft)
    return recipe


@pytest.mark.parametrize(
    "file", ["tiny/midtrain", "tiny/sft", "llmjp4-8b/midtrain", "llmjp4-8b/sft",
             "tanuki-8b/midtrain", "v4-megamath/midtrain", "swallow-8b/sft"],
)  # fmt: skip
def test_every_kind_of_recipe_becomes_a_run_of_so_many_steps(file: str) -> None:
    path = REPOSITORY / "recipes" / f"{file}.yaml"
    _, recipe = read_recipe(path, None, [])
    assert isinstance(recipe, Training)
    _, changed = read_recipe(path, None, list(changes(recipe, "delayed", 120)))
    assert isinstance(changed, Training)
    assert (changed.steps, changed.fp8, changed.precision) == (120, "delayed", "bf16")
    assert changed.schedule.style == "constant"
    assert changed.schedule.warmup_steps == min(30, recipe.schedule.warmup_steps)
    kept = {"steps", "tokens", "epochs", "fp8", "precision", "schedule", "checkpoints"}
    before, after = (one.model_dump(exclude=kept) for one in (recipe, changed))
    assert before == after
    _, bf16 = read_recipe(path, None, list(changes(recipe, "bf16", 120)))
    assert isinstance(bf16, Training)
    assert bf16 == changed.model_copy(update={"fp8": "none"})


def test_products_that_are_of_bf16_alone_are_left_in_fp8() -> None:
    recipe = recipe_of("midtrain", "linear=quack")
    assert "linear=auto" in changes(recipe, "tensorwise", 120)
    assert not any(one.startswith("linear") for one in changes(recipe, "bf16", 120))


def test_the_recipes_own_fp8_is_tried_where_none_is_stated() -> None:
    recipe = recipe_of("midtrain")
    assert scalings((), recipe) == ("tensorwise",)
    assert scalings((), recipe_of("midtrain", "fp8=blockwise")) == ("blockwise",)
    assert scalings(("delayed", "blockwise", "delayed"), recipe) == ("delayed", "blockwise")
    with pytest.raises(RequestError, match="--fp8 hybrid: is no FP8 recipe"):
        scalings(("hybrid",), recipe)


def test_the_fewest_steps_are_enough_to_compare() -> None:
    short = replace(
        BF16, loss={k: v for k, v in BF16.loss.items() if k <= FEWEST_STEPS}, held_out={}
    )
    assert len(compare(short, short).by_step) == END - WINDOW + 1
