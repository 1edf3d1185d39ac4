"""Tuning on preferences: the same curve in any layout, from the reference's numbers, kept once."""

from __future__ import annotations

import math
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from tanren import runs
from tanren.plan.paths import RunFolder
from tests.conftest import RECIPES, SHORT_DPO, Tanren, wait_for
from tests.stages.compared import assert_same_run, curve
from tests.stages.conftest import beside, take
from tests.stages.warm import Server, Warm

LAYOUTS = {
    "tensor": ("layout.tensor=2", "layout.sequence_parallel=true"),
    "pipeline": ("layout.pipeline=2",),
    "data": ("layout.data=2", "micro_batch=1"),
}
COMPUTED = "computing the reference's log-probabilities of 80 pairs"
THERE = "the reference's log-probabilities of 80 pairs are there"


@pytest.fixture
def warm(once_tuned: Path, server: Server, tmp_path: Path) -> Warm:
    """A command with a runs folder of its own, with what dpo stands on and an empty cache."""
    return beside(once_tuned, server, tmp_path / "runs", "convert", "preprocess", "midtrain", "sft")


def reference(tanren: Tanren) -> Path:
    """The one file of log-probabilities."""
    [path] = (tanren.folder("cache") / "reference").iterdir()
    return path


def log(tanren: Tanren, attempt: int = 1) -> str:
    return (tanren.folder("dpo") / "log" / f"{attempt}.log").read_text()


def assert_same_curve(mine: Tanren, theirs: Tanren) -> None:
    for key in ("loss", "margin", "kl", "held_out_loss", "held_out_margin", "grad_norm"):
        found = curve(mine, "dpo", key)
        assert len(found) == (3 if key.startswith("held_out") else 6)
        # The margin begins at 0, to the last digits.
        assert found == pytest.approx(curve(theirs, "dpo", key), rel=2e-5, abs=2e-6), key


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_train_what_one_does(warm: Warm, once_tuned: Path, layout: str) -> None:
    """Also the reference: each layout knows the same weights by the same name, and reads theirs."""
    single, known = Tanren(once_tuned), layout == "data"
    if known:
        shutil.copytree(once_tuned / "tiny" / "cache", warm.folder("cache"))
    done = warm.dpo(sets=(*LAYOUTS[layout], "checkpoints.every_steps=9"))
    assert done.code == 0, done.text
    assert_same_curve(warm, single)
    assert (THERE in log(warm), COMPUTED in log(warm)) == (known, not known)
    assert reference(warm).name == reference(single).name
    mine, theirs = np.load(reference(warm)), np.load(reference(single))
    assert len(mine) == len(theirs) == 160
    np.testing.assert_allclose(mine, theirs, rtol=1e-5)


def test_it_begins_at_ln_2_and_says_how_it_goes(once_tuned: Path) -> None:
    tanren = Tanren(once_tuned)
    lines = runs.read_lines(tanren.folder("dpo") / "metrics.jsonl")
    names = {"loss", "margin", "accuracy", "chosen_reward", "rejected_reward", "chosen_log_prob",
             "rejected_log_prob", "kl", "sft_loss"}  # fmt: skip
    steps = [line for line in lines if "loss" in line]
    held_out = [line for line in lines if "held_out_loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in held_out] == [0, 3, 6]
    assert all(names <= line.keys() for line in steps)
    assert all({f"held_out_{name}" for name in names} <= line.keys() for line in held_out)
    first, last = steps[0], steps[-1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert (first["margin"], first["kl"]) == pytest.approx((0, 0), abs=1e-4)
    assert last["loss"] < first["loss"] - 0.05
    assert last["accuracy"] > 0.9
    for line in steps:
        assert line["margin"] == pytest.approx(
            line["chosen_reward"] - line["rejected_reward"], abs=1e-6
        )
    assert runs.result_of(RunFolder(tanren.folder("dpo")))["template"] == "llmjp-instruct"


def test_a_stop_after_any_step_and_the_same_command_goes_on(warm: Warm, once_tuned: Path) -> None:
    """Within the reference, too: what was computed of it is kept."""
    warm.environment["TANREN_DEADLINE"] = "1"  # long ago: an attempt stops when it first looks
    for attempt, step in enumerate((0, 1, 2), 1):
        stopped = warm.dpo()
        assert stopped.code == 75, stopped.text
        assert f"stopped by the end of its walltime after step {step}, saved" in stopped.err
        if attempt == 1:
            assert "64 of 80 pairs" in log(warm)
            assert np.isfinite(np.load(reference(warm))).sum() == 128
    assert "computing the reference's log-probabilities of 16 pairs" in log(warm, 2)
    del warm.environment["TANREN_DEADLINE"]
    done = warm.dpo()
    assert done.code == 0, done.text
    assert "goes on from iteration 2" in done.out
    assert_same_run(warm, Tanren(once_tuned), "dpo", 6)
    assert np.array_equal(np.load(reference(warm)), np.load(reference(Tanren(once_tuned))))


def test_a_resume_reads_the_reference_and_computes_it_again_where_it_is_gone(
    warm: Warm, once_tuned: Path
) -> None:
    """From the base: the policy has moved on by then. The weights are not what they were."""
    shutil.copytree(once_tuned / "tiny" / "cache", warm.folder("cache"))
    take(once_tuned, warm, "dpo", 4)
    done = warm.dpo()
    assert done.code == 0, done.text
    assert "goes on from iteration 4" in done.out
    assert "log-probabilities" not in log(warm, 2)
    assert "starting from" not in log(warm, 2), "the base is not read"
    shutil.rmtree(warm.folder("cache") / "reference")
    shutil.rmtree(warm.folder("dpo"))

    take(once_tuned, warm, "dpo", 2)
    done = warm.dpo()
    assert done.code == 0, done.text
    assert "goes on from iteration 2" in done.out
    assert COMPUTED in log(warm, 2)
    assert_same_run(warm, Tanren(once_tuned), "dpo", 6)


def test_a_reference_that_does_not_fit_ends_the_run_before_the_first_update(
    warm: Warm, once_tuned: Path
) -> None:
    shutil.copytree(once_tuned / "tiny" / "cache", warm.folder("cache"))
    values = np.load(reference(warm))
    values[1::2] += 5
    np.save(reference(warm), values)
    done = warm.dpo()
    assert done.code == 1, done.text
    assert "Traceback" not in done.text
    # Of a margin of 5, beta 0.1.
    loss = math.log1p(math.exp(-0.5))
    assert f"step 1: the loss is {loss:.5f}, and a policy that is its own reference has" in done.err
    assert "remove the folder cache/reference beside the run" in done.err
    assert runs.iterations(RunFolder(warm.folder("dpo"))) == ()

    shutil.rmtree(warm.folder("cache") / "reference")
    done = warm.dpo(sets=("steps=2",))
    assert done.code == 0, done.text
    assert curve(warm, "dpo", "loss")[0] == pytest.approx(math.log(2), abs=1e-6)


def test_simpo_has_no_reference(warm: Warm) -> None:
    simpo = "preference={loss: simpo, beta: 2.0, gamma: 4.0}"
    done = warm.dpo(sets=(simpo, "steps=4"))
    assert done.code == 0, done.text
    assert not (warm.folder("cache") / "reference").exists()
    assert "log-probabilities" not in log(warm)
    assert curve(warm, "dpo", "kl") == []
    losses = curve(warm, "dpo", "loss")
    assert len(losses) == 4
    assert losses[0] != pytest.approx(math.log(2), abs=0.01)
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.long
def test_ctrl_c_saves_and_the_same_command_goes_on(tanren: Tanren, once_tuned: Path) -> None:
    """By the real command."""
    for stage in ("midtrain", "sft"):
        (tanren.runs / "tiny" / stage).symlink_to(once_tuned / "tiny" / stage)
    process = tanren.start("dpo", str(RECIPES / "dpo.yaml"), sets=SHORT_DPO)
    metrics = tanren.folder("dpo") / "metrics.jsonl"
    wait_for(lambda: max(runs.curve(metrics, "loss"), default=0) >= 2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=90)
    assert process.returncode == 75, out + err
    assert "the same command goes on from there" in err
    stopped_at = runs.latest_checkpoint(RunFolder(tanren.folder("dpo")))
    assert stopped_at == max(runs.curve(metrics, "loss")) < 6

    done = tanren.dpo()
    assert done.code == 0, done.text
    assert f"goes on from iteration {stopped_at}" in done.out
    assert_same_run(tanren, Tanren(once_tuned), "dpo", 6)
