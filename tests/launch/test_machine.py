"""What this machine is said to have."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from tanren.config.load import read_recipe, read_user
from tanren.launch import machine, queue
from tanren.plan.cost import Gpu
from tanren.plan.kernels import QUACK, QUACK_VERSION
from tanren.plan.site import Wish
from tests.conftest import REPOSITORY

H200 = Gpu("NVIDIA H200", 140.4)


def with_a_gpu(
    monkeypatch: pytest.MonkeyPatch, *, engine: bool = True, quack: str | None = None
) -> None:
    """Here, and a Python that has Transformer Engine, and a version of quack-kernels."""

    def version(name: str) -> str:
        assert name == QUACK
        if quack is None:
            raise metadata.PackageNotFoundError(name)
        return quack

    monkeypatch.setattr(machine, "visible_gpus", lambda: 1)
    monkeypatch.setattr(machine, "_smallest_gpu", lambda: H200)
    monkeypatch.setattr(machine, "find_spec", lambda _: object() if engine else None)
    monkeypatch.setattr(metadata, "version", version)


def test_a_gpu_has_quack_in_an_image_or_where_python_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_a_gpu(monkeypatch)
    assert machine.this_machine().gpu == H200
    assert machine.this_machine(in_image=True).gpu == Gpu("NVIDIA H200", 140.4, quack=True)
    with_a_gpu(monkeypatch, quack=QUACK_VERSION)
    assert machine.this_machine().gpu == Gpu("NVIDIA H200", 140.4, quack=True)
    with_a_gpu(monkeypatch, quack="0.6.4")
    assert machine.this_machine().gpu == H200


def test_a_job_has_quack_but_where_its_python_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "user.toml").write_text('group = "g"\n')
    monkeypatch.setenv("TANREN_USER", str(tmp_path / "user.toml"))
    path = REPOSITORY / "recipes" / "llmjp4-8b" / "midtrain.yaml"
    _, recipe = read_recipe(path, None, [])
    place = queue.place_of("abci3", recipe, "midtrain", Wish(), read_user())
    quack = {runtime: queue.machine_of(place, runtime).gpu for runtime in (None, "native")}
    assert quack[None] is not None and quack[None].quack
    assert quack["native"] is not None and not quack["native"].quack


def test_a_gpu_that_the_engine_cannot_use_stays_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    with_a_gpu(monkeypatch, engine=False, quack=QUACK_VERSION)
    found = machine.this_machine()
    assert (found.gpus, found.idle_gpus, found.gpu) == (0, 1, None)


def test_a_gpu_whose_driver_has_no_tool_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    with_a_gpu(monkeypatch)
    monkeypatch.setattr(machine, "_smallest_gpu", lambda: None)
    found = machine.this_machine(in_image=True)
    assert (found.gpus, found.gpu) == (1, None)
