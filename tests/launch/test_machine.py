"""What this machine is said to have."""

from __future__ import annotations

import pytest

from tanren.launch import machine
from tanren.plan.cost import Gpu

H200 = Gpu("NVIDIA H200", 140.4)


def with_a_gpu(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    monkeypatch.setattr(machine, "visible_gpus", lambda: 1)
    monkeypatch.setattr(machine, "_smallest_gpu", lambda: H200)
    monkeypatch.setattr(machine, "find_spec", lambda name: name if name in packages else None)


def test_a_gpu_has_quack_in_an_image_or_where_python_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_a_gpu(monkeypatch, "transformer_engine")
    assert machine.this_machine().gpu == H200
    assert machine.this_machine(in_image=True).gpu == Gpu("NVIDIA H200", 140.4, quack=True)
    with_a_gpu(monkeypatch, "transformer_engine", "quack")
    assert machine.this_machine().gpu == Gpu("NVIDIA H200", 140.4, quack=True)


def test_a_gpu_that_the_engine_cannot_use_stays_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    with_a_gpu(monkeypatch, "quack")
    found = machine.this_machine()
    assert (found.gpus, found.idle_gpus, found.gpu) == (0, 1, None)


def test_a_gpu_whose_driver_has_no_tool_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    with_a_gpu(monkeypatch, "transformer_engine")
    monkeypatch.setattr(machine, "_smallest_gpu", lambda: None)
    found = machine.this_machine(in_image=True)
    assert (found.gpus, found.gpu) == (1, None)
