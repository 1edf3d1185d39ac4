"""Weights & Biases has what metrics.jsonl has, once, and nobody waits for it or dies of it."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tanren import runs, tracking
from tanren.config.errors import RequestError, WorkError
from tanren.launch import local
from tanren.plan.paths import RunFolder
from tanren.plan.plan import TrainingPlan, read_plan
from tests.conftest import REPOSITORY, Tanren
from tests.report.folders import make_run

FAKE = REPOSITORY / "tests" / "fake_wandb"
KEY = "planted-key-0123456789"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a file for each run that the stand-in for wandb was given."""
    folder = tmp_path / "server"
    folder.mkdir()
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_BASE_URL", "FAKE_WANDB"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FAKE_WANDB_SERVER", str(folder))
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("PYTHONPATH", f"{FAKE}:{REPOSITORY / 'src'}")
    monkeypatch.syspath_prepend(str(FAKE))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    yield folder
    sys.modules.pop("wandb", None)


def there(server: Path) -> list[int]:
    """The steps that the server has, in their order."""
    files = [path for path in server.iterdir() if not path.suffix]
    assert len(files) <= 1
    return [json.loads(line)["step"] for path in files for line in path.read_text().splitlines()]


def plan_of(folder: RunFolder, **tracked: str) -> TrainingPlan:
    plan = read_plan(folder.plan)
    assert isinstance(plan, TrainingPlan)
    if not tracked:
        return plan
    stated = {"tracking": {"wandb": tracked}}
    return plan.model_copy(update={"recipe": type(plan.recipe).model_validate_json(
        json.dumps(json.loads(plan.recipe.model_dump_json()) | stated))})  # fmt: skip


def test_a_sync_sends_every_line_once(tmp_path: Path, server: Path) -> None:
    folder = make_run(tmp_path, steps=20)
    assert tracking.sync(folder).lines == 20
    assert there(server) == list(range(1, 21))
    again = tracking.sync(folder)
    assert (again.lines, again.there) == (0, 20)
    # The run goes on after a kill: two of its steps come again, and one line is torn.
    for step in (19, 20, 21):
        runs.append_line(folder.metrics, {"step": step, "loss": 1.0, "attempt": 2})
    with folder.metrics.open("ab") as file:
        file.write(b'{"step": 22')
    assert tracking.sync(folder).lines == 3
    assert there(server) == [*range(1, 21), 19, 20, 21]
    # The note in the run folder may be lost: the server knows what it has.
    folder.wandb.unlink()
    assert tracking.sync(folder).lines == 0
    assert len(there(server)) == 23


def test_a_run_is_filed_under_its_task_and_stage_with_its_plan_and_no_key(
    tmp_path: Path, server: Path
) -> None:
    folder = make_run(tmp_path, steps=3)
    tracking.sync(folder)
    asked = json.loads(next(server.glob("*.asked")).read_text())
    assert (asked["group"], asked["job_type"], asked["name"]) == ("tiny", "sft", "tiny/sft")
    assert (asked["project"], asked["resume"]) == ("tanren", "allow")
    assert asked["config"]["plan"]["recipe"]["optimizer"]["lr"] == 1e-3
    assert asked["config"]["passport"]["commit"]["id"] == "0123abcd"
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 5
    assert [path for path in written if KEY.encode() in path.read_bytes()] == []


def test_attempts_are_one_run_and_a_run_begun_anew_is_another(tmp_path: Path, server: Path) -> None:
    first = tracking.target_of(make_run(tmp_path / "a", starts=(1,))).id
    assert tracking.target_of(make_run(tmp_path / "b", starts=(1, 50))).id == first
    assert tracking.target_of(make_run(tmp_path / "c", "sft-c")).id != first
    anew = make_run(tmp_path / "d")
    passport = runs.read_json(anew.passport)
    passport["attempts"][0]["started"] = "2027-01-01T00:00:00+0000"
    runs.write_json(anew.passport, passport)
    assert tracking.target_of(anew).id != first


def test_a_training_is_followed_to_its_end(tmp_path: Path, server: Path) -> None:
    folder = make_run(tmp_path, steps=5)
    follower = tracking.follow(plan_of(folder))
    assert follower is not None
    for step in (6, 7):
        follower.look()
        runs.append_line(folder.metrics, {"step": step, "loss": 1.0})
    follower.end(20)
    assert there(server) == [1, 2, 3, 4, 5, 6, 7], folder.wandb_log.read_text()
    assert runs.read_json(folder.wandb)["lines"] == 7


@pytest.mark.parametrize(
    "fails",
    ["import", "raise in init", "raise in log", "raise in finish",
     "hang in init", "hang in log", "hang in finish"],
)  # fmt: skip
def test_a_tracker_that_fails_costs_a_warning_and_a_moment(
    fails: str, tmp_path: Path, server: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setenv("FAKE_WANDB", fails)
    folder = make_run(tmp_path, steps=5)
    follower = tracking.follow(plan_of(folder))
    assert follower is not None
    began = time.monotonic()
    with caplog.at_level(logging.WARNING, "tanren"):
        for _ in range(3):
            follower.look()
        follower.end(1.5 if "hang" in fails else 30.0)
    assert time.monotonic() - began < 30
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1, warnings
    assert "wandb is left out" in warnings[0]
    assert "make wandb-sync sends the rest" in warnings[0]
    assert there(server) == []
    monkeypatch.delenv("FAKE_WANDB")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    assert tracking.sync(folder).lines == 5


def test_without_a_key_the_run_waits_for_a_sync(
    tmp_path: Path, server: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.delenv("WANDB_API_KEY")
    folder = make_run(tmp_path)
    with caplog.at_level(logging.INFO, "tanren"):
        assert tracking.follow(plan_of(folder)) is None
        assert caplog.records == []
        assert tracking.follow(plan_of(folder, project="mine", entity="team")) is None
    assert "make wandb-sync RUN=tiny/sft" in caplog.records[0].getMessage()
    with pytest.raises(RequestError, match="has no key") as caught:
        tracking.sync(folder)
    assert "WANDB_API_KEY" in caught.value.next_step


def test_a_key_may_be_in_netrc_and_reaches_the_job_by_its_environment(
    tmp_path: Path, server: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    assert tracking.key_of_this_machine() is None
    assert "WANDB_API_KEY" not in local._environment()
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password from-netrc\n")
    assert tracking.key_of_this_machine() == "from-netrc"
    assert local._environment()["WANDB_API_KEY"] == "from-netrc"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.mine.jp:8080")
    assert tracking.key_of_this_machine() is None
    (tmp_path / "netrc").write_text("machine wandb.mine.jp login user\npassword\n")
    assert tracking.key_of_this_machine() is None  # torn: as if it were not there


def test_the_recipe_names_the_project_before_the_environment_and_user_toml(
    tmp_path: Path, server: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "user.toml").write_text('tracking = {wandb = {project = "users", entity = "me"}}\n')
    monkeypatch.setenv("TANREN_USER", str(tmp_path / "user.toml"))
    assert local._tracking() == {"WANDB_PROJECT": "users", "WANDB_ENTITY": "me"}
    monkeypatch.setenv("WANDB_PROJECT", "shells")
    assert local._tracking() == {"WANDB_PROJECT": "shells", "WANDB_ENTITY": "me"}
    folder = make_run(tmp_path)
    assert tracking.target_of(folder).project == "shells"
    plan = plan_of(folder, project="recipes")
    runs.write_json(folder.plan, json.loads(plan.model_dump_json()))
    assert tracking.target_of(folder).project == "recipes"
    assert "tracking" not in plan.settings


def test_a_wrong_key_is_one_message_with_what_to_look_at(
    tmp_path: Path, server: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_WANDB", "raise in init")
    folder = make_run(tmp_path)
    before = folder.metrics.read_bytes()
    with pytest.raises(WorkError, match="the server says no") as caught:
        tracking.sync(folder)
    assert "check the key" in caught.value.next_step
    assert folder.metrics.read_bytes() == before
    assert not folder.wandb.exists()


@pytest.mark.long
def test_a_training_ends_well_beside_a_wandb_that_hangs(tanren: Tanren, tmp_path: Path) -> None:
    tanren.environment |= {
        "WANDB_MODE": "", "WANDB_API_KEY": KEY, "FAKE_WANDB": "hang in init",
        "FAKE_WANDB_SERVER": str(tmp_path), "PYTHONPATH": str(FAKE),
    }  # fmt: skip
    done = tanren.midtrain(sets=("steps=4", "schedule.decay_steps=2"))
    assert done.code == 0, done.text
    folder = RunFolder(tanren.folder())
    assert runs.result_of(folder) is not None
    log = folder.log(1).read_text()
    assert log.count("wandb is left out from here on") == 1, log
    assert len(runs.curve(folder.metrics, "loss")) == 4
    written = [path for path in folder.root.rglob("*") if path.is_file()]
    assert [path for path in written if KEY.encode() in path.read_bytes()] == []
    assert str(folder.report) in done.out.replace("\n", "")
    assert "<figure" in folder.report.read_text()
