"""Tensor, pipeline and data parallelism train the same model; checkpoints move between them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import psutil
import pytest

from tanren import runs
from tanren.plan.paths import RunFolder
from tests.conftest import RECIPES, SHORT, Tanren, set_back, wait_for

LAYOUTS = {
    "tensor": ("layout.tensor=2",),
    "sequence": ("layout.tensor=2", "layout.sequence_parallel=true"),
    "pipeline": ("layout.pipeline=2", "micro_batch=2"),
    "data": ("layout.data=2",),
}


@pytest.fixture(scope="module")
def single(once_trained: Path) -> Tanren:
    return Tanren(once_trained)


def curve(tanren: Tanren, key: str) -> list[float]:
    found = runs.curve(tanren.folder() / "metrics.jsonl", key)
    return [found[step] for step in sorted(found)]


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(name, marks=() if name in ("tensor", "pipeline") else pytest.mark.long)
        for name in LAYOUTS
    ],
)
def test_two_processes_train_what_one_does(tanren: Tanren, single: Tanren, layout: str) -> None:
    done = tanren.midtrain(sets=LAYOUTS[layout])
    assert done.code == 0, done.text
    for key in ("loss", "held_out_loss", "grad_norm"):
        mine, theirs = curve(tanren, key), curve(single, key)
        assert len(mine) == len(theirs) > 1
        assert mine == pytest.approx(theirs, rel=2e-5), key
    assert curve(tanren, "loss")[-1] < curve(tanren, "loss")[0] - 0.05


Z_LOSS = "z_loss=0.1"


@pytest.fixture(scope="module")
def with_z_loss(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Tanren:
    root = tmp_path_factory.mktemp("z-loss")
    shutil.copytree(prepared / "tiny", root / "tiny")
    tanren = Tanren(root)
    done = tanren.midtrain(sets=(Z_LOSS,))
    assert done.code == 0, done.text
    return tanren


def test_the_z_loss_lowers_z_and_the_loss_stays_the_cross_entropy(
    with_z_loss: Tanren, single: Tanren
) -> None:
    losses, z_losses = curve(with_z_loss, "loss"), curve(with_z_loss, "z_loss")
    # The same weights: the first two steps (at a rate of nought, then after it) are alike.
    assert losses[:2] == pytest.approx(curve(single, "loss")[:2], rel=1e-6)
    assert losses[2:] != pytest.approx(curve(single, "loss")[2:], rel=1e-6)
    # 2,048 pieces at random weights: Z is about 2,048, and log²Z weighed with 0.1 about 5.8.
    assert 4 < z_losses[0] < 8
    assert z_losses[-1] < z_losses[0] - 0.1
    assert curve(single, "z_loss") == []
    log = (with_z_loss.folder() / "log" / "1.log").read_text()
    assert f"loss {losses[0]:.4f}  z loss {z_losses[0]:.4f}" in log


@pytest.mark.long
def test_the_z_loss_is_the_same_in_another_layout(tanren: Tanren, with_z_loss: Tanren) -> None:
    """Over parts of the vocabulary it is tested in tests/engine/test_loss.py.

    It saves by the clock as well, which the ranks agree on.
    """
    layout = ("layout.pipeline=2", "layout.data=2", "micro_batch=2")
    clock = ("checkpoints.every_minutes=0.0001", "checkpoints.keep_every=2")
    done = tanren.midtrain(sets=(*layout, *clock, "checkpoints.keep_last=1", Z_LOSS))
    assert done.code == 0, done.text
    assert runs.iterations(RunFolder(tanren.folder())) == (2, 4, 6, 8)
    for key in ("save_blocked_seconds", "save_seconds", "save_gib", "save_gib_per_second"):
        assert len(curve(tanren, key)) == 8
    # 2,361,024 parameters of 16 bytes in fp32, and what blobs have besides.
    assert curve(tanren, "save_gib") == pytest.approx([0.0352] * 8, rel=0.05)
    for key in ("loss", "z_loss", "held_out_loss", "grad_norm"):
        mine, theirs = curve(tanren, key), curve(with_z_loss, key)
        assert len(mine) == len(theirs) > 1
        assert mine == pytest.approx(theirs, rel=2e-5), key


@pytest.mark.long
def test_a_checkpoint_goes_from_layout_to_layout(trained: Tanren, single: Tanren) -> None:
    """One process, then tensor, pipeline and data parallel, each from what the one before saved."""
    every = "checkpoints.every_steps=1"
    for first, layout in ((3, "tensor"), (5, "pipeline"), (7, "data")):
        folder = set_back(trained, first)
        folder.metrics.unlink()
        done = trained.midtrain(sets=(*LAYOUTS[layout], every, "checkpoints.keep_last=9"))
        assert done.code == 0, done.text
        assert f"goes on from iteration {first}" in done.out
        assert curve(trained, "loss") == pytest.approx(curve(single, "loss")[first:], rel=2e-5)


@pytest.mark.long
def test_a_hang_ends_with_the_stacks_of_both_ranks(tanren: Tanren) -> None:
    """One rank stands still; the other one waits for it, gives up, and both say where they were."""
    long = tuple("steps=4000" if text == "steps=8" else text for text in SHORT)
    process = tanren.start("midtrain", str(RECIPES / "midtrain.yaml"),
                           sets=(*long, *LAYOUTS["data"], "job.hang_minutes=0.1"))  # fmt: skip
    wait_for(lambda: len(runs.read_lines(tanren.folder() / "metrics.jsonl")) > 4)
    family = psutil.Process(process.pid).children(recursive=True)
    (launcher,) = [member for member in family if "torch.distributed.run" in member.cmdline()]
    (worker,) = [
        member for member in launcher.children() if member.environ().get("RANK") == "1"
    ]  # fmt: skip
    worker.suspend()
    log = tanren.folder() / "log" / "1.log"
    wait_for(lambda: "Timeout (0:00:06)!" in log.read_text(), 30)
    worker.resume()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1, out + err
    text = log.read_text()
    # The launcher ends the second one as soon as the first has given up.
    assert text.count("Timeout (0:00:06)!") in (1, 2)
    assert re.search(r"engine/loop.py., line \d+ in train", text)
