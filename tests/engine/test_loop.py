"""When a step updates, and when a checkpoint is due."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tanren.config.errors import WorkError
from tanren.engine import loop, step
from tanren.engine.step import Budget, Objective, Total
from tanren.engine.stop import Rhythm, StopRequest
from tanren.engine.timing import StepTimer


class Recorded:
    """A training state and its saver, which write down what is asked of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, total: float = 6.0) -> None:
        self.asked: list[str] = []
        monkeypatch.setattr(loop, "run_pass", lambda *_, timer: [torch.tensor([total, 2.0])])
        monkeypatch.setattr(step.parallel_state, "get_tensor_model_parallel_rank", lambda: 0)

    def __getattr__(self, name: str) -> Any:
        def asked(**_: object) -> tuple[bool, float, int]:
            self.asked.append(name)
            return True, 0.5, 0

        return asked

    def step(self, **options: object) -> Any:
        """Of a training: one step; of its optimizer and its schedule: what they are asked."""
        self.asked.append("schedule" if options else "update")
        return True, 0.5, 0

    def train(self, rhythm: Rhythm, stop: StopRequest) -> Any:
        state: Any = SimpleNamespace(iteration=1, model=self, optimizer=self, schedule=self)
        saver: Any = self
        objective = Objective(
            lambda *_: None,  # type: ignore[arg-type, return-value]
            2,
            lambda sums: {"loss": sums[0] / sums[1]},
        )
        feed: Any = None
        cpu = torch.device("cpu")
        means, norm, total = loop._step(
            state, objective, feed, iter(()), Budget(4, 1), cpu, stop, saver, rhythm,
            StepTimer(cpu),
        )  # fmt: skip
        return means, norm, total.stop, total.late


def test_a_step_waits_for_the_copy_before_it_updates(
    alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Recorded(monkeypatch)
    means, norm, asked, late = training.train(Rhythm(5), StopRequest())
    assert (means, norm, asked, late) == ({"loss": 3.0}, 0.5, False, False)
    assert training.asked == [
        "zero_grad_buffer",
        "zero_grad",
        "before_update",
        "update",
        "schedule",
    ]


def test_a_loss_that_is_no_number_updates_nothing(
    alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Recorded(monkeypatch, float("nan"))
    with pytest.raises(WorkError, match="the loss is nan"):
        training.train(Rhythm(5), StopRequest())
    assert "update" not in training.asked


def test_the_clock_goes_round_with_the_loss(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(loop.time, "monotonic", lambda: now)
    training, stop, rhythm = Recorded(monkeypatch), StopRequest(), Rhythm(None, 2, now)
    now += 119
    assert training.train(rhythm, stop)[2:] == (False, False)
    now += 2
    assert training.train(rhythm, stop)[2:] == (False, True)
    stop.signal = "SIGTERM"
    rhythm.since = now
    assert training.train(rhythm, stop)[2:] == (True, False)


def test_another_ranks_flag_counts_here(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def reduce(total: torch.Tensor) -> None:
        total += torch.tensor([4.0, 2.0, 0.0, 1.0, 0.0], dtype=torch.float64)

    monkeypatch.setattr(dist, "all_reduce", reduce)
    means, _, asked, late = Recorded(monkeypatch).train(Rhythm(None, minutes=2), StopRequest())
    assert (means, asked, late) == ({"loss": 2.5}, False, True)


def test_a_checkpoint_is_due_by_steps_or_by_some_clock() -> None:
    assert [n for n in range(1, 9) if Rhythm(3).due(n, False)] == [3, 6]
    assert Rhythm(3).due(4, True)
    assert Rhythm(None, minutes=1).due(4, True)
    assert not Rhythm(None, minutes=1).due(3, False)


def test_what_a_training_found_is_not_collected_again(
    alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A collection of all that torch and megatron-core import takes 0.3 s, every 50 steps."""
    frozen: list[int] = []

    def one_step(*_: object) -> tuple[dict[str, float], float, Total]:
        frozen.append(gc.get_freeze_count())
        assert not gc.isenabled()
        return {"loss": 3.0}, 0.5, Total([6.0, 2.0], stop=False, late=False, forward=[0.0])

    monkeypatch.setattr(loop, "_connect", lambda _: None)
    monkeypatch.setattr(loop, "_step", one_step)
    monkeypatch.setattr(loop, "record", lambda *_: None)
    monkeypatch.setattr(loop.timing, "Ranks", lambda _: SimpleNamespace(look=lambda *_: {}))
    nothing = SimpleNamespace(**dict.fromkeys(("poll", "save", "close", "abort"), lambda *_: None))
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.1}])
    state: Any = SimpleNamespace(iteration=0, optimizer=optimizer,
                                 model=SimpleNamespace(train=lambda: None))  # fmt: skip
    feed: Any = SimpleNamespace(batches=lambda *_, workers: iter(()))
    saver: Any = nothing
    metrics: Any = None
    objective: Any = None
    outcome = loop.train(
        state, objective, feed, None, Budget(2, 1), device=torch.device("cpu"), saver=saver,
        rhythm=Rhythm(1), metrics=metrics, stop=StopRequest(),
    )  # fmt: skip
    assert outcome.iteration == 2
    assert len(frozen) == 2
    assert min(frozen) > 10_000
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
