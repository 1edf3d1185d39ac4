"""Interrupted at any moment, a run goes on as if nothing had happened, bit for bit."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tanren import runs
from tanren.plan.paths import RunFolder
from tests.conftest import RECIPES, SHORT, Finished, Tanren, end_group, trainer_of, wait_for
from tests.stages.compared import weights

STEPS = 24
LONG = (*SHORT, f"steps={STEPS}", "schedule.decay_steps=10", "checkpoints.every_steps=5")


def train(tanren: Tanren) -> Finished:
    return tanren("midtrain", str(RECIPES / "midtrain.yaml"), sets=LONG)


def begin(tanren: Tanren) -> subprocess.Popen[str]:
    return tanren.start("midtrain", str(RECIPES / "midtrain.yaml"), sets=LONG)


def losses(tanren: Tanren) -> dict[int, float]:
    return runs.curve(tanren.folder() / "metrics.jsonl", "loss")


def at_step(tanren: Tanren, step: int) -> None:
    wait_for(lambda: max(losses(tanren), default=0) >= step)


@pytest.fixture(scope="module")
def uninterrupted(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The curve and the weights of a run that nothing disturbed."""
    root = tmp_path_factory.mktemp("uninterrupted")
    shutil.copytree(prepared / "tiny", root / "tiny")
    tanren = Tanren(root)
    done = train(tanren)
    assert done.code == 0, done.text
    return {
        "losses": losses(tanren),
        "weights": weights(RunFolder(tanren.folder()).checkpoint(STEPS)),
    }


def assert_same(tanren: Tanren, uninterrupted: dict[str, object]) -> None:
    assert losses(tanren) == uninterrupted["losses"]
    assert len(losses(tanren)) == STEPS
    mine, theirs = weights(RunFolder(tanren.folder()).checkpoint(STEPS)), uninterrupted["weights"]
    assert isinstance(theirs, dict)
    assert mine.keys() == theirs.keys()
    assert [key for key in mine if mine[key] != theirs[key]] == []


def test_a_signal_saves_and_the_same_command_goes_on(
    tanren: Tanren, uninterrupted: dict[str, object]
) -> None:
    """Ctrl-C; that SIGTERM is passed on in the same way is in tests/launch/test_local.py."""
    process = begin(tanren)
    at_step(tanren, 7)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=90)
    assert process.returncode == 75, out + err
    assert "the same command goes on from there" in err
    stopped_at = runs.latest_checkpoint(RunFolder(tanren.folder()))
    assert stopped_at == max(losses(tanren)) < STEPS

    done = train(tanren)
    assert done.code == 0, done.text
    assert f"goes on from iteration {stopped_at}" in done.out
    assert_same(tanren, uninterrupted)


def test_kill_9_goes_back_to_the_last_whole_checkpoint(
    tanren: Tanren, uninterrupted: dict[str, object]
) -> None:
    """The training alone is killed: what writes its checkpoints does not stay behind."""
    process = begin(tanren)
    at_step(tanren, 13)
    training = trainer_of(process.pid)
    helpers = training.children(recursive=True)
    assert any(one.name() == "tanren-writer" for one in helpers)
    training.kill()
    _, alive = psutil.wait_procs(helpers, timeout=10)
    assert not alive
    process.communicate()
    kept = runs.latest_checkpoint(RunFolder(tanren.folder()))
    assert kept in (5, 10)

    done = train(tanren)
    assert done.code == 0, done.text
    assert_same(tanren, uninterrupted)


@pytest.mark.long
def test_kill_9_in_the_middle_of_a_save(tanren: Tanren, uninterrupted: dict[str, object]) -> None:
    folder = RunFolder(tanren.folder())
    process = begin(tanren)
    partial = folder.checkpoint(10).with_name("iter_0000010.partial")
    wait_for(partial.exists)
    end_group(process)
    assert partial.exists(), "the save was over before the kill: nothing was tested"
    assert runs.iterations(folder) == (5,)
    wait_for(lambda: not runs.is_locked(folder.lock), 20)

    done = train(tanren)
    assert done.code == 0, done.text
    assert "goes on from iteration 5" in done.out
    assert_same(tanren, uninterrupted)


@pytest.mark.long
def test_killing_the_command_alone_ends_the_training_with_a_save(tanren: Tanren) -> None:
    folder = RunFolder(tanren.folder())
    process = begin(tanren)
    at_step(tanren, 6)
    process.kill()
    process.communicate()
    wait_for(folder.stopped.exists, 40)
    assert runs.latest_checkpoint(folder) == max(losses(tanren)) < STEPS
    while (done := train(tanren)).code == 2:  # the training, which holds the lock, is still ending
        assert "is being worked on" in done.err
        time.sleep(0.5)
    assert done.code == 0, done.text
    assert len(losses(tanren)) == STEPS


@pytest.mark.long
def test_the_whole_road_with_one_command_and_again(bare: Tanren) -> None:
    """What `make midtrain` does on a fresh machine, and what it says the second time."""
    words = ("--needs", "--then", "export")
    first = bare.midtrain(*words)
    assert first.code == 0, first.text
    begun = [line.split()[0] for line in first.out.splitlines() if " → " in line and "log" in line]
    assert begun == ["preprocess", "convert", "midtrain", "export"]
    for said in ("loss  ", "held out  ", "speed  ", "checkpoint ", "sample "):
        assert f"  {said}" in first.out
    model = bare.folder() / "hf" / "iter_0000008"
    assert str(model) in first.out
    files = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert files <= {path.name for path in model.iterdir()}

    before = (bare.folder() / "metrics.jsonl").read_bytes()
    again = bare.midtrain(*words)
    assert again.code == 0
    assert "midtrain is done" in again.out
    assert "export is done" in again.out
    assert (bare.folder() / "metrics.jsonl").read_bytes() == before


def test_two_commands_on_one_run_are_refused(tanren: Tanren) -> None:
    process = begin(tanren)
    at_step(tanren, 1)
    second = train(tanren)
    assert second.code == 2
    assert "is being worked on by process" in second.err
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)


def test_other_settings_on_a_started_run_are_refused(trained: Tanren) -> None:
    changed = trained.midtrain(sets=("optimizer.lr=1.0e-3",))
    assert changed.code == 2
    assert "optimizer.lr 0.003 there, 0.001 here" in changed.err
    words = ("plan", str(RECIPES / "midtrain.yaml"), "--name", "slow")
    named = trained(*words, sets=("optimizer.lr=1.0e-3",))
    assert named.code == 0, named.text
    assert named.out.splitlines()[1].split() == ["state", "new"]
