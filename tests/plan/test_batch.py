"""Batch arithmetic."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tanren.config.errors import RequestError
from tanren.config.training import Checkpointing, Evaluation, Layout, Midtrain, Optimizer
from tanren.plan.batch import (
    ceil_div,
    check_divides,
    data_parallel_size,
    make_batch,
    stated_steps,
)

RECIPE = Midtrain(
    model="tiny", init="scratch", data="stage:preprocess", sequence_length=4096, global_batch=512,
    micro_batch=1, steps=500, optimizer=Optimizer(lr=3e-4),
    checkpoints=Checkpointing(every_steps=100), evaluation=Evaluation(sequences=64),
)  # fmt: skip


def changed(**fields: object) -> Midtrain:
    return RECIPE.model_copy(update=fields)


def test_a_published_run_has_its_published_tokens() -> None:
    batch = make_batch(RECIPE, 8, "r", steps=500)
    assert (batch.accumulation, batch.tokens_per_step, batch.tokens) == (
        64,
        2_097_152,
        1_048_576_000,
    )


@pytest.mark.parametrize(
    ("tokens", "iterations"),
    [(55_797_411_281, 6_652), (113_460_356_693, 13_526), (337_681_167_151, 40_255)],
)
def test_tokens_become_steps_rounded_up(tokens: int, iterations: int) -> None:
    """The budgets of the v4 midtraining: 8192 x 1024 tokens a step."""
    recipe = changed(tokens=tokens, steps=None, sequence_length=8192, global_batch=1024)
    assert stated_steps(recipe) == iterations


@given(a=st.integers(0, 10**15), b=st.integers(1, 10**9))
def test_ceil_div_is_the_smallest_that_covers(a: int, b: int) -> None:
    assert (ceil_div(a, b) - 1) * b < a <= ceil_div(a, b) * b


@pytest.mark.parametrize(
    ("batch", "data", "micro", "advice"),
    [(100, 16, 1, "use 96 or 112"), (3, 4, 2, "use 8"), (33, 8, 4, "use 32 or 64")],
)
def test_a_batch_that_does_not_divide_names_the_nearest(
    batch: int, data: int, micro: int, advice: str
) -> None:
    with pytest.raises(RequestError) as refused:
        make_batch(changed(global_batch=batch, micro_batch=micro), data, "dpo.yaml", steps=1)
    assert refused.value.text() == (
        f"dpo.yaml: global_batch: {batch} is not a multiple of {data * micro} "
        f"(data parallel {data} x micro_batch {micro}).\n  next: {advice}"
    )


@given(sequences=st.integers(1, 999), data=st.integers(1, 16), micro=st.integers(1, 8))
def test_the_advice_divides(sequences: int, data: int, micro: int) -> None:
    recipe = changed(micro_batch=micro)
    try:
        check_divides("r", sequences, recipe, data)
    except RequestError as error:
        for word in error.next_step.removeprefix("use ").split(" or "):
            assert int(word) > 0
            check_divides("r", int(word), recipe, data)
    else:
        assert sequences % (data * micro) == 0


@pytest.mark.parametrize(
    ("layout", "gpus", "size"),
    [
        (Layout(), 0, 1), (Layout(), 8, 8), (Layout(tensor=2, pipeline=2), 8, 2),
        (Layout(tensor=2, context=2), 4, 1), (Layout(data=2), 0, 2), (Layout(data=1), 8, 1),
    ],
)  # fmt: skip
def test_data_parallel_takes_what_is_left(layout: Layout, gpus: int, size: int) -> None:
    assert data_parallel_size(layout, gpus, "r") == size


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(tensor=3), "r: layout: 8 GPUs are not a multiple of 3 (tensor 3 x pipeline 1"),
        (Layout(tensor=4, data=4), "r: layout: needs 16 processes, and there are 8 GPUs"),
    ],
)
def test_a_layout_that_the_gpus_cannot_hold_is_refused(layout: Layout, message: str) -> None:
    with pytest.raises(RequestError) as refused:
        data_parallel_size(layout, 8, "r")
    assert message in refused.value.text()
