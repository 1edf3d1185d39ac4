"""The learning rate at every step, and Adam's stand-in on a CPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tanren.config.training import Optimizer, Schedule
from tanren.engine.cpu import FusedAdam
from tanren.engine.optimizer import build_schedule

STEPS, WARMUP, DECAY, BATCH = 100, 10, 40, 8
PEAK, FLOOR = 1e-3, 1e-4


def rates(schedule: Schedule) -> list[float]:
    """The rate that each step of a run is taken with."""
    optimizer: Any = SimpleNamespace(param_groups=[{"lr": 0.0, "weight_decay": 0.0}])
    settings = Optimizer(lr=PEAK, min_lr=FLOOR)
    moving = build_schedule(schedule, settings, optimizer, steps=STEPS, global_batch=BATCH)
    found = []
    for _ in range(STEPS):
        found.append(optimizer.param_groups[0]["lr"])
        moving.step(increment=BATCH)
    return found


def after_warmup(step: int) -> float:
    return (step - WARMUP) / (STEPS - WARMUP)


def decayed(step: int) -> float:
    return max(0.0, (step - (STEPS - DECAY)) / DECAY)


STYLES: dict[str, tuple[Schedule, Callable[[int], float]]] = {
    "constant": (Schedule(style="constant", warmup_steps=WARMUP), lambda step: 1.0),
    "linear": (Schedule(style="linear", warmup_steps=WARMUP), lambda step: 1 - after_warmup(step)),
    "cosine": (
        Schedule(style="cosine", warmup_steps=WARMUP),
        lambda step: 0.5 * (1 + math.cos(math.pi * after_warmup(step))),
    ),
    "linear, shorter than the run": (
        Schedule(style="linear", warmup_steps=WARMUP, decay_steps=DECAY),
        lambda step: max(0.0, 1 - (step - WARMUP) / DECAY),
    ),
    "cosine, shorter than the run": (
        Schedule(style="cosine", warmup_steps=WARMUP, decay_steps=DECAY),
        lambda step: 0.5 * (1 + math.cos(math.pi * min(1.0, (step - WARMUP) / DECAY))),
    ),
    "cosine, constant at the end": (
        Schedule(style="cosine", warmup_steps=WARMUP, constant_steps=STEPS - WARMUP - DECAY),
        lambda step: 0.5 * (1 + math.cos(math.pi * min(1.0, (step - WARMUP) / DECAY))),
    ),
    "WSD minus_sqrt": (
        Schedule(style="WSD", warmup_steps=WARMUP, decay_steps=DECAY, decay_style="minus_sqrt"),
        lambda step: 1 - math.sqrt(decayed(step)),
    ),
    "WSD linear": (
        Schedule(style="WSD", warmup_steps=WARMUP, decay_steps=DECAY, decay_style="linear"),
        lambda step: 1 - decayed(step),
    ),
    "WSD cosine": (
        Schedule(style="WSD", warmup_steps=WARMUP, decay_steps=DECAY, decay_style="cosine"),
        lambda step: 0.5 * (1 + math.cos(math.pi * decayed(step))),
    ),
    "WSD exponential": (
        Schedule(style="WSD", warmup_steps=WARMUP, decay_steps=DECAY, decay_style="exponential"),
        lambda step: 2 * 0.5 ** decayed(step) - 1,
    ),
}


@pytest.mark.parametrize("style", STYLES)
def test_the_rate_of_each_step(style: str) -> None:
    schedule, share = STYLES[style]
    found = rates(schedule)
    for step, rate in enumerate(found):
        expected = PEAK * step / WARMUP if step <= WARMUP else FLOOR + (PEAK - FLOOR) * share(step)
        assert rate == pytest.approx(expected, rel=1e-9), step


def test_adam_is_adamw_with_its_step_in_the_group() -> None:
    torch.manual_seed(0)
    mine = [torch.nn.Parameter(torch.randn(7, 3)), torch.nn.Parameter(torch.randn(5))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in mine]
    ours = FusedAdam(mine, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    reference = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    for _ in range(5):
        for a, b in zip(mine, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        ours.step()
        reference.step()
    # Transformer Engine's FusedAdam 2.11: what its groups hold, and each tensor's state does not.
    keys = {"params", "lr", "bias_correction", "betas", "eps", "weight_decay", "step"}
    assert set(ours.param_groups[0]) == keys
    assert ours.param_groups[0]["step"] == 5
    assert all("step" not in state for state in ours.state.values())
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
