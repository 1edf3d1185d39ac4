"""The command of the FP8 gate: its runs, what it refuses, and what it says of finished runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tanren import runs
from tanren.cli import app, chains
from tanren.config.errors import RequestError, WorkError
from tanren.launch import gate, reading
from tanren.launch.gate import Trial
from tanren.launch.orders import Order
from tanren.plan.make import make_plan
from tanren.plan.paths import RunFolder
from tanren.plan.plan import Machine, MidtrainPlan
from tests.conftest import RECIPES, Tanren

STEPS = 80
TWO_GPUS = Machine(gpus=2)


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny recipes in a folder of their own."""
    shutil.copytree(RECIPES, tmp_path / "tiny")
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("RUNTIME", "native")
    return tmp_path / "tiny"


def trials(
    task: Path, *stated: str, stage: str = "midtrain", control: bool = False, **fields: Any
) -> list[Trial]:
    # On two GPUs, as `finish` has it.
    sets = ("layout.data=2", "micro_batch=4", *fields.pop("sets", ()))
    order = Order(task / f"{stage}.yaml", assignments=sets, **fields)
    return gate.trials(order, stated, STEPS, control=control)


def finish(trial: Trial, *, factor: float = 1.0, steps: int = STEPS) -> RunFolder:
    """Leave what a finished run on two GPUs leaves, its losses multiplied."""
    plan = make_plan(reading.read_request(trial.order, TWO_GPUS))
    assert plan.folder == trial.folder
    plan.folder.root.mkdir(parents=True)
    runs.write_json(plan.folder.plan, json.loads(plan.model_dump_json()))
    for step in range(1, steps + 1):
        loss = (2 + 10 / step) * factor
        line = {"step": step, "loss": loss, "grad_norm": 1.0, "tokens_per_second": 9.0 * factor}
        runs.append_line(plan.folder.metrics, line)
    runs.append_line(plan.folder.metrics, {"step": steps, "held_out_loss": 2.0 * factor})
    runs.mark_done(plan.folder, {"identity": trial.scaling, "device": "NVIDIA H200"})
    return plan.folder


def command(task: Path, *words: str) -> tuple[str, ...]:
    return ("gate", str(task / "midtrain.yaml"), "--steps", str(STEPS), "--set", "layout.data=2",
            "--set", "micro_batch=4", *words)  # fmt: skip


def test_its_runs_differ_in_precision_and_in_name_alone(task: Path) -> None:
    found = trials(task, "delayed", "blockwise")
    assert [one.folder.root.name for one in found] == [
        "midtrain-gate-bf16", "midtrain-gate-delayed", "midtrain-gate-blockwise",
    ]  # fmt: skip
    plans = [make_plan(reading.read_request(one.order, TWO_GPUS)) for one in found]
    settings = [{**plan.settings, "fp8": None} for plan in plans]
    assert settings[0] == settings[1] == settings[2]
    assert [plan.settings["fp8"] for plan in plans] == ["none", "delayed", "blockwise"]
    for plan in plans:
        assert isinstance(plan, MidtrainPlan)
        assert plan.batch.steps == STEPS
        # The data and the base are those of every run of the task.
        assert Path(plan.data).name == "preprocess"
        assert plan.start == "stage:convert"
    named = trials(task, variant=None, name="hot")
    assert named[1].folder.root.name == "midtrain-hot-gate-tensorwise"


def test_a_finished_run_is_done_wherever_one_looks(task: Path) -> None:
    bf16, fp8 = trials(task, "delayed")
    assert not bf16.is_done
    finish(bf16)
    finish(fp8)
    assert bf16.is_done
    assert fp8.is_done
    other = trials(task, "delayed", sets=("optimizer.lr=1.0e-3",))
    with pytest.raises(RequestError, match=r"optimizer\.lr 0\.003 there, 0\.001 here"):
        _ = other[0].is_done
    # A later gate with another recipe of FP8 takes the same run in bf16.
    assert [one.is_done for one in trials(task, "blockwise")] == [True, False]


@pytest.mark.parametrize(
    ("stage", "fields", "steps", "message"),
    [
        ("dpo", {}, STEPS, "is a dpo recipe, and the gate compares losses"),
        ("convert", {}, STEPS, "is a convert recipe"),
        ("sft", {}, STEPS, "init: stage:midtrain is found by the run's name"),
        ("midtrain", {"assignments": ("init=given",)}, STEPS, "init: is `given`"),
        ("midtrain", {}, 69, "--steps 69: leaves no 50 steps for the end behind the first 20"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    task: Path, stage: str, fields: dict[str, Any], steps: int, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        gate.trials(Order(task / f"{stage}.yaml", **fields), (), steps)


def test_sft_from_a_base_of_its_own_is_compared_too(task: Path) -> None:
    sets = ("init=stage:convert",)
    found = gate.trials(Order(task / "sft.yaml", assignments=sets), (), STEPS)
    assert [one.folder.root.name for one in found] == ["sft-gate-bf16", "sft-gate-tensorwise"]


@pytest.mark.parametrize(
    ("gpus", "idle", "capability", "message"),
    [
        (0, 0, None, "needs GPUs of compute capability 8.9 .* this machine has none"),
        (0, 2, 9.0, "has no Transformer Engine for its GPUs"),
        (2, 0, 8.0, "this machine has 8"),
        (2, 0, 8.9, None),
        (2, 0, None, None),
    ],
)
def test_a_machine_without_fp8_is_refused_before_anything_runs(
    task: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, idle: int, capability: float | None,
    message: str | None,
) -> None:  # fmt: skip
    machine = Machine(gpus=gpus, idle_gpus=idle)
    monkeypatch.setattr(gate, "this_machine", lambda **_: machine)
    monkeypatch.setattr(reading, "this_machine", lambda **_: machine)
    monkeypatch.setattr(gate, "compute_capability", lambda: capability)
    found = trials(task)
    if message is None:
        gate.check(found, found)
        with pytest.raises(RequestError, match="layout"):
            unfit = trials(task, sets=("layout.data=4",))
            gate.check(unfit, unfit)
        if capability:
            with pytest.raises(RequestError, match="needs GPUs of compute capability 9 "):
                gate.check(trials(task, "blockwise"), found)
        return
    with pytest.raises(RequestError, match=message):
        gate.check(found, found[:1])


def test_a_cpu_refuses_the_command_and_leaves_nothing(bare: Tanren, task: Path) -> None:
    done = bare(*command(task))
    assert done.code == 2, done.text
    assert "the FP8 gate: needs GPUs of compute capability 8.9" in done.err
    assert not bare.runs.exists()


def test_finished_runs_are_compared_on_a_cpu(bare: Tanren, task: Path) -> None:
    for trial, factor in zip(trials(task, "delayed", "blockwise"), (1, 1.002, 1.02), strict=True):
        # As jobs of a cluster leave them.
        finish(trial, factor=factor).checkpoint(STEPS).mkdir(parents=True)
    done = bare(*command(task, "--fp8", "delayed"))
    assert done.code == 0, done.text
    assert done.out.splitlines()[0] == "loss against bf16 over 80 steps, limit 0.5 %"
    title, row = (line.split() for line in done.out.splitlines()[1:3])
    there = [one.parent.name for one in bare.runs.glob("tiny/*/checkpoints")]
    assert there == ["midtrain-gate-blockwise"]
    assert title[:4] == ["fp8", "step", "1", "largest"]
    assert row[:3] == ["delayed", "+0.200", "%"]
    assert row[-1] == "passed"
    found = json.loads((bare.runs / "tiny" / "gate" / "gate.json").read_bytes())
    assert found["passed"] == {"delayed": True}
    assert found["runs"]["bf16"] == "midtrain-gate-bf16"
    assert found["device"] == "NVIDIA H200"
    assert found["compared"]["delayed"]["end"] == pytest.approx(0.002)
    assert len(found["compared"]["delayed"]["by_step"]) == STEPS - 29
    assert (bare.runs / "tiny" / "gate" / "gate.svg").read_text().startswith("<svg ")

    refused = bare(*command(task, "--fp8", "delayed,blockwise"))
    assert refused.code == 1, refused.text
    assert "refuses blockwise: the loss is not that of bf16 within 0.5 %" in refused.err
    assert [line.split()[-1] for line in refused.out.splitlines()[2:4]] == ["passed", "refused"]
    found = json.loads((bare.runs / "tiny" / "gate" / "gate.json").read_bytes())
    assert found["passed"] == {"delayed": True, "blockwise": False}

    assert bare(*command(task, "--fp8", "blockwise", "--limit", "3")).code == 0


def test_a_control_shows_what_chance_does_and_is_not_judged(bare: Tanren, task: Path) -> None:
    bf16, fp8, control = trials(task, "delayed", control=True)
    assert control.folder.root.name == "midtrain-gate-control"
    plans = [make_plan(reading.read_request(one.order, TWO_GPUS)) for one in (bf16, control)]
    rates = [plan.settings["optimizer"].pop("lr") for plan in plans]
    assert rates == [0.003, 0.00300003]
    assert plans[0].settings == plans[1].settings
    for trial, factor in ((bf16, 1.0), (fp8, 1.004), (control, 1.006)):
        finish(trial, factor=factor)
    done = bare(*command(task, "--fp8", "delayed", "--control"))
    assert done.code == 0, done.text
    assert [line.split()[-1] for line in done.out.splitlines()[2:4]] == ["passed", "chance"]
    assert "two runs in bf16 are as far apart as the limit" in done.out
    found = json.loads((bare.runs / "tiny" / "gate" / "gate.json").read_bytes())
    assert found["passed"] == {"delayed": True}
    assert found["compared"]["control"]["end"] == pytest.approx(0.006)
    assert "control" in (bare.runs / "tiny" / "gate" / "gate.svg").read_text()
    far = bare(*command(task, "--fp8", "delayed", "--control", "--limit", "1"))
    assert "two runs in bf16" not in far.out
    refused = bare(*command(task, "--fp8", "delayed", "--limit", "0.3"))
    assert refused.code == 1
    assert "--control shows how far apart two runs in bf16 are" in refused.err


def test_curves_that_lack_steps_are_not_compared(task: Path) -> None:
    bf16, fp8 = trials(task)
    finish(bf16)
    finish(fp8, steps=STEPS - 1)
    assert len(gate.read_curves(bf16).loss) == STEPS
    # As a torn line and one of another version leave it.
    for line in ({}, {"loss": 2.0, "tokens_per_second": 9.0}):
        runs.append_line(fp8.folder.metrics, {"step": STEPS, **line})
        with pytest.raises(WorkError, match="has not every step from 1 to 80"):
            gate.read_curves(fp8)


def gate_of(task: Path, *words: str) -> None:
    """The command in this process."""
    app(list(command(task, *words)), standalone_mode=False)


def test_what_is_not_done_is_run_bf16_first(task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run by an FP8 recipe that fails is refused; the others are compared all the same."""
    ran: list[str] = []

    def stage(order: Order, needs: bool, screen: object) -> tuple[str, ...]:
        assert needs
        trial = Trial(str(order.name).removeprefix("gate-"), order)
        ran.append(trial.scaling)
        if trial.scaling == "tensorwise":
            raise WorkError("step 30", "the loss is nan", "a lower rate")
        # The run before it has left its room.
        left = list(task.parent.glob("runs/tiny/*/checkpoints"))
        assert left == []
        finish(trial).checkpoint(STEPS).mkdir(parents=True)
        return ()

    monkeypatch.setattr(chains, "run_stage", stage)
    monkeypatch.setattr(gate, "check", lambda *_: None)
    with pytest.raises(WorkError, match="refuses tensorwise: the loss is not that of bf16"):
        gate_of(task, "--needs", "--fp8", "tensorwise", "--fp8", "delayed")
    assert ran == ["bf16", "tensorwise", "delayed"]
    found = json.loads((task.parent / "runs" / "tiny" / "gate" / "gate.json").read_bytes())
    assert found["failed"] == {"tensorwise": "step 30: the loss is nan"}
    assert found["passed"] == {"tensorwise": False, "delayed": True}
    ran.clear()
    gate_of(task, "--needs", "--fp8", "delayed")
    gate_of(task, "--needs", "--fp8", "blockwise")
    assert ran == ["blockwise"]


@pytest.mark.parametrize(("scaling", "code"), [("bf16", 1), ("tensorwise", 75)])
def test_a_run_that_stops_and_bf16_that_fails_end_the_command(
    task: Path, monkeypatch: pytest.MonkeyPatch, scaling: str, code: int
) -> None:
    def stage(order: Order, needs: bool, screen: object) -> tuple[str, ...]:
        trial = Trial(str(order.name).removeprefix("gate-"), order)
        if trial.scaling != scaling:
            finish(trial)
            return ()
        error = WorkError("here", "it ended", "go on")
        error.exit_code = code
        raise error

    monkeypatch.setattr(chains, "run_stage", stage)
    monkeypatch.setattr(gate, "check", lambda *_: None)
    with pytest.raises(WorkError, match="it ended") as caught:
        gate_of(task)
    assert caught.value.exit_code == code
    assert not (task.parent / "runs" / "tiny" / "gate").exists()
