"""A run that goes on with other data reads them from their own start, and is told to before."""

from __future__ import annotations

import pytest

from tanren import runs
from tanren.plan.paths import RunFolder
from tanren.plan.plan import MidtrainPlan, read_plan
from tests.conftest import Tanren, set_back

MIX = "mix.ratios={docstrings: 0.2}"
KEEP = "checkpoints.keep_last=5"


def losses(folder: RunFolder) -> dict[int, float]:
    return runs.curve(folder.metrics, "loss")


def newest_log(folder: RunFolder) -> str:
    attempts = runs.read_json(folder.passport)["attempts"]
    return folder.log(len(attempts)).read_text()


@pytest.mark.long
def test_new_data_are_asked_for_and_begin_where_the_run_goes_on(trained: Tanren) -> None:
    tanren, folder = trained, set_back(trained, 3)
    old = losses(folder)

    refused = tanren.midtrain(sets=(KEEP, MIX))
    assert refused.code == 2
    assert "was begun with other settings: mix.ratios.docstrings None there, 0.2" in refused.err
    assert "--set resume=new-data" in refused.err

    done = tanren.midtrain(sets=(KEEP, MIX, "resume=new-data"))
    assert done.code == 0, done.text
    assert "goes on from iteration 3" in done.out
    assert "the present data began at iteration 3; 0 of its samples are read" in newest_log(folder)
    plan = read_plan(folder.plan)
    assert isinstance(plan, MidtrainPlan)
    assert (plan.data_start, plan.batch.steps) == (3, 8)
    assert runs.read_json(folder.passport)["attempts"][-1]["plan"]["data_start"] == 3
    # (8 - 3) x 8 samples to train on, and 16 held out.
    assert "[40, 16, 0]" in (folder.index_cache / "COMPLETE.json").read_text()
    straight = losses(folder)
    assert [straight[step] == old[step] for step in range(1, 9)] == [True] * 3 + [False] * 5
    # What was held out before was of other data.
    measured = runs.curve(folder.metrics, "held_out_loss")
    assert sorted(measured) == [0, 3, 8]
    assert runs.read_json(folder.done)["held_out"]["loss"] == [measured[3], measured[8]]

    # The first batch of the new mix, whichever iteration it is read in.
    begun_there = tanren.midtrain(
        "--name", "fresh",
        sets=(MIX, f"init=checkpoint:{folder.checkpoint(3)}", "steps=5", "schedule.decay_steps=2"),
    )  # fmt: skip
    assert begun_there.code == 0, begun_there.text
    fresh = losses(RunFolder(tanren.folder("midtrain-fresh")))
    assert fresh[1] == pytest.approx(straight[4], rel=1e-6)

    # The same data again: where they began is kept, and the curve is the straight run's.
    set_back(tanren, 6)
    again = tanren.midtrain(sets=(KEEP, MIX))
    assert again.code == 0, again.text
    assert "the present data began at iteration 3; 24 of its samples are read" in newest_log(folder)
    assert losses(folder) == straight
