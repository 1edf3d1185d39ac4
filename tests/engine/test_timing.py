"""What a training measures of itself: the slow rank, forward passes, waits, its start."""

from __future__ import annotations

import time

import pytest
import torch

from tanren.engine.timing import SLOW_STEPS, Slowest, SlowRank, Startup, StepTimer, slowest


def test_a_rank_is_slow_beside_the_median_of_its_own_stage() -> None:
    stages = [0, 0, 0, 1, 1, 1]
    assert slowest([10, 10, 12, 20, 20, 21], stages) == Slowest(2, 1.2)
    assert slowest([10, 10, 10, 20, 30, 20], stages) == Slowest(4, 1.5)
    # The last stage takes twice as long, and is not slow for it.
    even = slowest([10, 10, 10, 20, 20, 20], stages)
    assert even is not None
    assert even.over_median == 1.0


def test_of_two_ranks_the_slow_one_is_compared_with_the_fast_one() -> None:
    assert slowest([10, 11], [0, 0]) == Slowest(1, 1.1)


def test_a_rank_that_has_timed_nothing_is_no_rank_to_compare_with() -> None:
    assert slowest([10, 0, 0, 12], [0, 0, 1, 1]) is None
    assert slowest([0, 0], [0, 0]) is None
    assert slowest([10], [0]) is None


def test_a_word_comes_after_three_slow_steps_and_then_not_for_a_hundred() -> None:
    slow, other, fine = Slowest(3, 1.06), Slowest(4, 1.2), Slowest(3, 1.04)
    watch = SlowRank()
    assert [watch.look(step, slow) for step in (1, 2)] == [False, False]
    assert watch.look(3, slow)
    assert not any(watch.look(step, slow) for step in range(4, 103))
    assert watch.look(103, slow)
    again = SlowRank()
    found = [slow, slow, fine, slow, slow, other, slow, None, slow, slow, slow]
    said = [again.look(step, one) for step, one in enumerate(found, start=1)]
    assert said == [False] * 10 + [True]
    assert SLOW_STEPS == 3


def test_forward_passes_are_timed_but_the_first_and_read_a_step_later() -> None:
    timer = StepTimer(torch.device("cpu"))

    def step(passes: int, seconds: float) -> None:
        def forward(data: object, model: object) -> None:
            next(data)  # type: ignore[call-overload]
            timed.append(len(timed))
            time.sleep(0.2 if len(timed) == 1 else seconds)

        timed: list[int] = []
        timer.begin_step()
        wrapped = timer.forward(forward)
        for _ in range(passes):
            wrapped(data, torch.nn.Identity())

    def slow_batches() -> object:
        while True:
            time.sleep(0.03)
            yield {}

    data = timer.batches(slow_batches())  # type: ignore[arg-type]
    step(3, 0.02)
    assert 0.09 <= timer.data_seconds < 0.15
    assert timer.forward_milliseconds() == 0.0
    step(1, 0.0)
    # Neither the first pass nor the waits for data are in it.
    assert 20 <= timer.forward_milliseconds() < 30
    assert timer.forward_milliseconds() == 0.0


def test_the_end_of_the_data_is_passed_on() -> None:
    timer = StepTimer(torch.device("cpu"))
    assert len(list(timer.batches(iter([{}, {}])))) == 2


def test_the_phases_of_a_start_add_up_to_it() -> None:
    startup = Startup()
    startup.reached("imports")
    time.sleep(0.02)
    startup.reached("data")
    assert list(startup.phases) == ["imports", "data"]
    assert startup.phases["data"] >= 0.02
    # This process began long before.
    assert startup.phases["imports"] > 0.05
    assert sum(startup.phases.values()) == pytest.approx(startup.seconds)
