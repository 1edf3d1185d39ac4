"""Which Python, and which image, a stage with `engine: nemo` runs in."""

from __future__ import annotations

from pathlib import Path

import pytest

from tanren.launch import container, local
from tanren.plan.paths import RunFolder
from tanren.plan.plan import Launch


def test_a_stage_of_nemo_runs_in_its_own_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANREN_NEMO_PYTHON", "/own/python")
    launch = Launch(engine=True, processes=1, device="cpu", own="nemo")
    last = local.script(RunFolder(Path("/r/sft")), launch, 1, 2).splitlines()[-1]
    assert last == "exec /own/python -m tanren.stages /r/sft/plan.json 1"
    other = launch.model_copy(update={"own": None})
    assert "/own/python" not in local.script(RunFolder(Path("/r/sft")), other, 1, 2)


def test_a_stage_of_nemo_has_an_image_of_its_own_with_and_without_gpus() -> None:
    for gpus in (0, 8):
        assert container.default_image(gpus, "nemo").name == "nemo"
        assert container.default_image(gpus).name != "nemo"
