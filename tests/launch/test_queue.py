"""Submitting: what is refused before, what is never done twice, what a job does when it starts."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tanren import provenance, runs
from tanren.config.errors import RequestError
from tanren.config.fields import Job
from tanren.config.load import read_site, read_user
from tanren.config.site import Site, User
from tanren.launch import clusters, orders, queue, reading, submit
from tanren.launch.preview import Preview
from tanren.plan.make import make_plan
from tanren.plan.paths import RunFolder
from tanren.plan.plan import Machine, MidtrainPlan
from tanren.plan.site import Wish, make_place
from tanren.report.plan import print_plan
from tests.conftest import RECIPES, REPOSITORY, SHORT, Finished, Tanren, wait_for
from tests.plan.test_plan import midtrain

FAKE = Path(__file__).with_name("fake_slurm.py")


class Cluster:
    """A Slurm that keeps a queue and runs nothing, a site for it, and tanren before it."""

    def __init__(self, folder: Path, prepared: Path | None) -> None:
        self.queue = folder / "queue.json"
        tools = folder / "tools"
        tools.mkdir()
        for name in ("sbatch", "squeue", "scancel", "scontrol"):
            (tools / name).symlink_to(FAKE)
        self.site = folder / "mine.yaml"
        text = (REPOSITORY / "recipes" / "sites" / "slurm.yaml").read_text()
        self.site.write_text(text + "environment: {NCCL_DEBUG: WARN}\n")
        self.runs = folder / "runs"
        if prepared:
            shutil.copytree(prepared / "tiny", self.runs / "tiny")
        self.environment = {
            "PATH": f"{tools}:{os.environ['PATH']}", "FAKE_SLURM": str(self.queue),
            "TANREN_USER": str(folder / "user.toml"),
        }  # fmt: skip
        (folder / "user.toml").write_text(f'site = "{self.site}"\n')
        self.tanren = Tanren(self.runs, self.environment)

    def stage(self, stage: str, *words: str, sets: tuple[str, ...] = ()) -> Finished:
        return self.tanren(stage, str(RECIPES / f"{stage}.yaml"), "--type", "cpu", *words,
                           sets=sets)  # fmt: skip

    def midtrain(self, *words: str, sets: tuple[str, ...] = ()) -> Finished:
        return self.stage("midtrain", *words, sets=(*SHORT, *sets))

    @property
    def jobs(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.queue.read_text())["jobs"]
        return found

    def tell(self, **what: str) -> None:
        state = json.loads(self.queue.read_text()) if self.queue.exists() else {"jobs": []}
        self.queue.write_text(json.dumps(state | what))

    def mark(self, number: int, state: str) -> None:
        value = json.loads(self.queue.read_text())
        value["jobs"][number]["state"] = state
        self.queue.write_text(json.dumps(value))

    def run(self, number: int, hosts: str = "node1") -> Finished:
        """Run a job as Slurm would, with nothing of the submitter's environment."""
        self.mark(number, "RUNNING")
        job = self.jobs[number]
        environment = {
            "PATH": self.environment["PATH"], "FAKE_SLURM": str(self.queue), "HOME": "/root",
            "SLURM_JOB_ID": job["id"], "SLURM_JOB_NODELIST": hosts, "RUNTIME": "native",
            "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        done = subprocess.run([job["words"][-1]], env=environment, capture_output=True, text=True,
                              check=False, timeout=120)  # fmt: skip
        self.mark(number, "COMPLETED" if done.returncode == 0 else "FAILED")
        log = Path(job["words"][-1]).parent / "log" / "job.log"
        said = log.read_text()
        log.unlink()
        return Finished(done.returncode, said, done.stdout + done.stderr)


@pytest.fixture
def cluster(tmp_path: Path, prepared: Path) -> Cluster:
    return Cluster(tmp_path, prepared)


@pytest.fixture
def empty(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path, None)


def test_one_command_submits_the_road_with_its_dependencies(empty: Cluster) -> None:
    done = empty.stage("midtrain", "--hours", "2", "--needs", "--then", "export")
    assert done.code == 0, done.text
    folders = [Path(job["words"][-1]).parent.name for job in empty.jobs]
    assert folders == ["preprocess", "convert", "midtrain", "export"]
    dependencies = [[word for word in job["words"] if "--dependency" in word] for job in empty.jobs]
    assert dependencies == [[], ["--dependency=afterok:100"], ["--dependency=afterok:100:101"],
                            ["--dependency=afterok:102"]]  # fmt: skip
    assert "midtrain submitted: job 102 on mine, after 100, 101" in done.out
    assert "make logs RUN=tiny/midtrain" in done.out
    script = (empty.runs / "tiny" / "midtrain" / "job.sh").read_text()
    assert "#SBATCH --time=2:00:00" in script
    assert "export NCCL_DEBUG=WARN" in script


def test_nothing_is_submitted_for_a_base_that_is_still_to_be_given(empty: Cluster) -> None:
    for words in (("midtrain", str(RECIPES / "midtrain.yaml"), "--needs"),
                  ("pipeline", str(RECIPES), "--stages", "preprocess,midtrain")):  # fmt: skip
        done = empty.tanren(*words, "--type", "cpu", sets=("init=given",))
        assert done.code == 2, done.text
        assert "midtrain.yaml: init: is `given`" in done.err
        assert 'next: SET="init=hf:/FOLDER" or SET="init=checkpoint:' in done.err
    assert not empty.queue.exists()
    assert not empty.runs.exists()


def test_a_pipeline_submits_the_stages_that_are_named(empty: Cluster) -> None:
    done = empty.tanren(
        "pipeline", str(RECIPES), "--stages", "preprocess,convert,midtrain,export", "--name", "a",
        "--hours", "3", "--type", "cpu", "--chain", "2", sets=SHORT,
    )  # fmt: skip
    assert done.code == 0, done.text
    folders = [Path(job["words"][-1]).parent.name for job in empty.jobs]
    assert folders == ["preprocess", "convert", "midtrain-a", "midtrain-a", "export-a"]
    waits = [word for word in empty.jobs[-1]["words"] if "--dependency" in word]
    assert waits == ["--dependency=afterok:103"]
    assert "--time=1:00:00" in (empty.runs / "tiny" / "export-a" / "job.sh").read_text()
    assert "--time=3:00:00" in (empty.runs / "tiny" / "midtrain-a" / "job.sh").read_text()
    wrong = empty.tanren("pipeline", str(RECIPES), "--stages", "convert,midtrian")
    assert wrong.code == 2
    assert "midtrian is no stage" in wrong.err


def test_too_small_a_disk_is_said_before_anything_is_submitted(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = orders.Order(RECIPES / "midtrain.yaml", assignments=(*SHORT, "checkpoints.keep_last=9"))
    monkeypatch.setenv("RUNS", str(cluster.runs))
    monkeypatch.setenv("RUNTIME", "native")
    plan = make_plan(reading.read_request(order))
    assert isinstance(plan, MidtrainPlan)
    # 2,361,024 parameters of 12 bytes in fp32.
    assert plan.checkpoint_gib == pytest.approx(0.02639, rel=0.001)
    usage = shutil.disk_usage("/")._replace(free=int(0.1 * 2**30))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(RequestError) as error:
        submit.check_disk(plan)
    assert "has 102 MiB free, and the checkpoints of this run need 270 MiB (9 kept and" in str(
        error.value
    )
    assert error.value.next_step.startswith("--set checkpoints.keep_last=2, free some space")
    few = replace(order, assignments=(*SHORT, "checkpoints.keep_last=2"))
    submit.check_disk(make_plan(reading.read_request(few)))
    # Of 8 steps 4 more stay, and only the newest can be fewer.
    every = replace(few, assignments=(*few.assignments, "checkpoints.keep_every=2"))
    with pytest.raises(RequestError, match="6 kept and one being written") as error:
        submit.check_disk(make_plan(reading.read_request(every)))
    assert error.value.next_step.startswith("free some space")


def test_a_length_that_follows_from_the_mix_needs_counts_before_there_is_data(
    empty: Cluster, tmp_path: Path
) -> None:
    follows = ("steps=null", "mix.max_epochs=3")
    refused = empty.midtrain("--needs", sets=follows)
    assert refused.code == 2
    assert "the data that they follow from is not there" in refused.err
    assert not empty.queue.exists(), "nothing was submitted"
    (tmp_path / "counts.tsv").write_text("reference\t1000000\n")
    sent = empty.midtrain("--needs", sets=(*follows, f"mix.counts={tmp_path / 'counts.tsv'}"))
    assert sent.code == 0, sent.text
    assert "preprocess has not run" in sent.out
    assert len(empty.jobs) == 3


def test_the_same_command_again_submits_nothing(cluster: Cluster) -> None:
    assert cluster.midtrain().code == 0
    again = cluster.midtrain()
    assert again.code == 0
    assert "midtrain is in the queue already: job 100" in again.out
    assert len(cluster.jobs) == 1
    cluster.mark(0, "CANCELLED")
    assert "midtrain submitted: job 101" in cluster.midtrain().out


@pytest.mark.parametrize("answer", ["Welcome to the cluster", "broken"])
def test_an_answer_that_got_lost_does_not_submit_twice(cluster: Cluster, answer: str) -> None:
    cluster.tell(say=answer)
    first = cluster.midtrain()
    if answer == "broken":
        assert "midtrain submitted: job 100" in first.out
    else:
        assert first.code == 1
        assert "answered 'Welcome to the cluster', which holds no job id" in first.text
        assert "does not submit it twice" in first.text
    again = cluster.midtrain()
    assert "is in the queue already: job 100" in again.out
    assert len(cluster.jobs) == 1


def test_what_the_scheduler_refuses_leaves_nothing_behind(cluster: Cluster) -> None:
    cluster.tell(refuse="Invalid account or account/partition combination specified")
    done = cluster.midtrain()
    assert done.code == 2
    assert "sbatch: refused to submit a job: sbatch: error: Invalid account" in done.err
    assert queue.read_jobs(RunFolder(cluster.runs / "tiny" / "midtrain")) == []
    cluster.queue.unlink()
    assert "submitted: job 100" in cluster.midtrain().out


def test_a_job_runs_what_was_asked_for_when_it_was_submitted(cluster: Cluster) -> None:
    """Not what the recipe says when the queue has let it through."""
    recipes = cluster.runs.parent / "tiny"
    shutil.copytree(RECIPES, recipes)
    recipe = recipes / "midtrain.yaml"
    words = ("midtrain", str(recipe), "--type", "cpu")
    assert cluster.tanren(*words, sets=SHORT).code == 0
    recipe.write_text("nonsense: true\n")
    done = cluster.run(0)
    assert done.code == 0, done.text
    assert "job 100 on node1" in done.out
    folder = RunFolder(cluster.runs / "tiny" / "midtrain")
    assert runs.result_of(folder)
    assert folder.node.exists()
    assert (folder.root / "passport.json").exists()


@pytest.mark.long
def test_a_bench_is_a_job_whose_log_ends_with_its_table(empty: Cluster) -> None:
    sets = ("precision=fp32", "sequence_length=64")
    words = ("bench", str(RECIPES / "midtrain.yaml"), "--type", "cpu", "--steps", "4")
    assert "midtrain submitted: job 100" in empty.tanren(*words, sets=sets).out
    done = empty.run(0)
    assert done.code == 0, done.text
    assert "tokens/s a process" in done.out
    assert done.out.rstrip().endswith("bench.json")


@pytest.mark.long
def test_a_chain_stops_before_its_walltime_saves_and_goes_on(cluster: Cluster) -> None:
    done = cluster.midtrain("--chain", "3")
    assert done.code == 0, done.text
    assert "job 100, 101, 102 on mine" in done.out
    assert ["--dependency=afterany:100" in job["words"] for job in cluster.jobs] == [
        False, True, False,
    ]  # fmt: skip
    folder = RunFolder(cluster.runs / "tiny" / "midtrain")
    # A walltime that is over when the first step is.
    text = folder.job.read_text()
    line = next(line for line in text.splitlines() if "TANREN_DEADLINE" in line)
    folder.job.write_text(text.replace(line, "export TANREN_DEADLINE=1"))
    first = cluster.run(0)
    assert first.code == 75, first.text
    assert "stopped by the end of its walltime after step 1, saved" in first.text
    second = cluster.run(1)
    assert second.code == 0, second.text
    assert "goes on from iteration 1" in second.out
    third = cluster.run(2)
    assert third.code == 0
    assert "midtrain is done" in third.out


def test_a_chain_does_not_go_on_after_a_failure(cluster: Cluster) -> None:
    assert cluster.midtrain("--chain", "2").code == 0
    folder = RunFolder(cluster.runs / "tiny" / "midtrain")
    for file in (cluster.runs / "tiny" / "preprocess" / "tokens").glob("*.bin"):
        file.write_bytes(b"")
    first = cluster.run(0)
    assert first.code in (1, 2), first.text
    assert runs.failure_of(folder) is not None
    second = cluster.run(1)
    assert second.code == 1
    assert "the job before this one failed" in second.text
    assert len(runs.read_json(folder.passport)["attempts"]) == 1


def test_a_request_to_stop_saves_and_ends(cluster: Cluster) -> None:
    long = tuple("steps=3000" if text == "steps=8" else text for text in SHORT)
    cluster.stage("midtrain", sets=long)
    folder = RunFolder(cluster.runs / "tiny" / "midtrain")
    ended: list[Finished] = []
    thread = threading.Thread(target=lambda: ended.append(cluster.run(0)))
    thread.start()
    wait_for(lambda: len(runs.read_lines(folder.metrics)) > 4)
    shown = cluster.tanren("status").out
    line = next(text for text in shown.splitlines() if text.startswith("tiny/midtrain "))
    assert line.split()[1:3] == ["running", "100"]
    assert "/3000" in line
    said = cluster.tanren("cancel", "tiny/midtrain")
    assert "job 100 saves after its step and ends" in said.out
    thread.join(60)
    assert ended[0].code == 75, ended[0].text
    assert "stopped by request (STOP)" in ended[0].text
    assert runs.iterations(folder)[-1] > 0


def test_cancel_takes_waiting_jobs_out_of_the_queue(cluster: Cluster) -> None:
    cluster.midtrain("--chain", "2")
    done = cluster.tanren("cancel", "tiny/midtrain")
    assert done.out.strip() == "cancelled 100, 101"
    assert [job["state"] for job in cluster.jobs] == ["CANCELLED", "CANCELLED"]
    again = cluster.tanren("cancel", "tiny/midtrain")
    assert again.code == 2
    assert "has no job in the scheduler" in again.err
    wrong = cluster.tanren("cancel", "tiny/nothing")
    assert wrong.code == 2
    assert "RUN=tiny/nothing: there is no such run" in wrong.err


def test_a_stage_whose_base_failed_says_so_and_does_nothing(empty: Cluster) -> None:
    """As on Grid Engine, which starts a job after any end of the one before."""
    empty.stage("convert", "--needs")
    folder = RunFolder(empty.runs / "tiny" / "preprocess")
    runs.mark_failed(folder, RequestError("here", "no text", "mend it"))
    done = empty.run(1)
    assert done.code == 2
    assert "preprocess: is not done, and this stage stands on it: no text" in done.text


def test_fewer_hosts_than_asked_for_is_a_failure_of_the_site(cluster: Cluster) -> None:
    site = cluster.site.read_text().replace("gpus: 8, cores: 96", "gpus: 0, cores: 4")
    cluster.site.write_text(site)
    done = cluster.tanren("midtrain", str(RECIPES / "midtrain.yaml"), "--nodes", "2",
                          sets=(*SHORT, "layout.data=2"))  # fmt: skip
    assert done.code == 0, done.text
    ran = cluster.run(0, hosts="node1")
    assert ran.code == 1
    assert "the job has 1 hosts (node1), and asked for 2" in ran.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--type", "fpga"), "TYPE=fpga: mine.yaml has no such resource type"),
        (("--type", "gpu", "--nodes", "65"), "NODES=65: a job of gpu on mine.yaml may have 64"),
        (("--hours", "200"), "HOURS=200: a job of cpu on mine.yaml may take 168 hours"),
        (("--site", "abci4"), "abci4.yaml: there is no such file"),
        (
            ("--site", "abci3", "--type", "rt_HC"),
            "user.toml: names no group, and abci3 charges one",
        ),
        (("--site", "local", "--nodes", "2"), "NODES, TYPE: ask for a job, and this machine is no"),
        (("--type", "gpu"), "holds no image for GPUs (train.sif), which the job needs"),
    ],
)
def test_what_the_site_has_not_is_refused_before_anything_is_submitted(
    cluster: Cluster, words: tuple[str, ...], message: str
) -> None:
    cluster.tanren.environment["RUNTIME"] = ""
    cluster.tanren.environment["IMAGES"] = str(cluster.runs.parent)
    done = cluster.midtrain(*words)
    assert done.code == 2, done.text
    assert message in done.err.replace(str(cluster.site), "mine.yaml")
    assert not cluster.queue.exists()


def test_a_plan_says_what_the_submission_would_refuse(cluster: Cluster) -> None:
    cluster.tanren.environment["IMAGES"] = str(cluster.runs.parent)
    said = "holds no image for GPUs (train.sif), which the job needs; make build-image IMAGE=train"
    words = ("plan", str(RECIPES / "midtrain.yaml"), "--site", str(cluster.site), "--type")
    for runtime, kind, there in (("", "gpu", True), ("native", "gpu", False), ("", "cpu", False)):
        cluster.tanren.environment["RUNTIME"] = runtime
        done = cluster.tanren(*words, kind, *(("--runtime", runtime) if runtime else ()))
        assert done.code == 0, done.text
        assert (said in done.out) == there, done.out


def test_a_plan_of_a_user_without_a_group_says_so_and_plans(cluster: Cluster) -> None:
    done = cluster.tanren("plan", str(RECIPES / "midtrain.yaml"), "--site", "abci3")
    assert done.code == 0, done.text
    assert "user.toml: names no group, and abci3 charges one" in done.out
    assert "node-hours" in done.out


def test_a_plan_counts_a_chain_and_what_comes_before_it(empty: Cluster) -> None:
    words = ("plan", str(RECIPES / "midtrain.yaml"), "--site", str(empty.site), "--hours", "2")
    done = empty.tanren(*words, "--chain", "3")
    rows = dict(re.split(r"  +", line, maxsplit=1) for line in done.out.splitlines()
                if re.match(r"\w[\w ]*  +\S", line))  # fmt: skip
    assert rows["jobs"].startswith("3, one after the other, each 1 x gpu on mine for at most 2")
    assert rows["cost"] == "6.0 node-hours; the site's file knows no points"
    # Each of them may take the hour of its recipe.
    assert rows["before it"] == "preprocess, convert: at most 2.0 node-hours more"
    assert rows["state"].startswith("new; preprocess, convert must be made first")
    assert "holds no image for GPUs" in rows["refused now"]


def test_a_time_that_is_too_short_for_a_run_counts_all_jobs() -> None:
    abci = read_site("abci3")
    place = make_place("abci3", abci, Job(), Wish(hours=1), "g", trains=True)
    plan = midtrain(machine=Machine(gpus=8)).model_copy(update={"hours": (3.1, "measured")})

    def too_short(jobs: int) -> bool:
        text = io.StringIO()
        print_plan(Preview(plan, place=place, jobs=jobs), Console(file=text, soft_wrap=True))
        return "too short" in text.getvalue()

    assert [too_short(jobs) for jobs in (1, 3, 4)] == [True, True, False]
    made = make_plan(reading.read_request(orders.Order(RECIPES / "preprocess.yaml")))
    for parts, said in ((0, "3, one after the other, each"), (2, "2 + 1, each")):
        text = io.StringIO()
        found = Preview(made, place=place, jobs=3, parts=parts)
        print_plan(found, Console(file=text, soft_wrap=True))
        assert re.search(rf"^jobs +{re.escape(said)} 1 x", text.getvalue(), re.MULTILINE)


def test_the_limits_of_abci_name_what_fits() -> None:
    abci = read_site("abci3")

    def refused(**wish: Any) -> str:
        with pytest.raises(RequestError) as error:
            make_place("abci3", abci, Job(), Wish(**wish), "g", trains=True)
        return str(error.value)

    assert "NODES=128" in refused(nodes=200)
    assert "NODES=1 or TYPE=rt_HF" in refused(type="rt_HG", nodes=2)
    few = abci.model_copy(update={"node_hours": 100.0})
    with pytest.raises(RequestError, match=r"are 120 node-hours(.|\n)*HOURS=10 and CHAIN=n"):
        make_place("abci3", few, Job(), Wish(nodes=10, hours=12), "g", trains=True)
    assert "CHAIN=n" in refused(hours=169)
    with pytest.raises(RequestError, match="save_minutes: 60 are the whole of 1 hours"):
        make_place("abci3", abci, Job(save_minutes=60.0), Wish(), "g", trains=True)
    place = make_place("abci3", abci, Job(nodes=2), Wish(hours=10), "g", trains=True)
    assert (place.gpus, place.points) == (16, 300)
    other = make_place("abci3", abci, Job(nodes=2), Wish(), "g", trains=False)
    assert (other.type_name, other.nodes, other.gpus) == ("rt_HC", 1, 0)


def test_the_site_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SITE", raising=False)
    assert queue.find_site(None, User()) is None
    assert queue.find_site("abci3", User(site="slurm")) == "abci3"
    assert queue.find_site(None, User(site="slurm")) == "slurm"
    assert queue.find_site("local", User(site="slurm")) is None
    here = Site.model_validate_json(
        json.dumps(read_site("tsubame4").model_dump() | {"found_by": [str(tmp_path)]})
    )
    monkeypatch.setattr(queue, "sites", lambda: {"mine": here})
    monkeypatch.setenv("PATH", str(tmp_path))
    assert queue.find_site(None, User()) is None  # the folder is there, qsub is not
    (tmp_path / "qsub").write_text("#!/bin/sh\n")
    (tmp_path / "qsub").chmod(0o755)
    assert queue.find_site(None, User()) == "mine"


def test_a_field_of_user_toml_can_be_set_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "user.toml"
    file.write_text('group = "a"\nruns = "/r"\n')
    monkeypatch.setenv("TANREN_USER", str(file))
    assert read_user(["group=b"]) == User(group="b", runs="/r")
    with pytest.raises(RequestError, match="grop: is not a field here"):
        read_user(["grop=b"])


def test_make_passes_the_jobs_wishes_on() -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    done = subprocess.run(
        ["make", "-n", "midtrain", "SITE=abci3", "NODES=2", "HOURS=24", "TYPE=rt_HF", "AFTER=1 2",
         "CHAIN=3", "RESERVATION=R1", "SET=user.group=g"],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    words = done.stdout.splitlines()[-1].split("&& ")[1].split()
    text = " ".join(words)
    assert "--set 'user.group=g'" in text
    assert (
        "--site 'abci3' --nodes 2 --hours 24 --type 'rt_HF' --reservation 'R1' --after '1' "
        "--after '2' --chain 3 --needs --then export"
    ) in text


def test_the_submitters_python_is_the_jobs(cluster: Cluster) -> None:
    cluster.midtrain()
    script = (cluster.runs / "tiny" / "midtrain" / "job.sh").read_text()
    assert f"export TANREN_PYTHON={sys.executable}" in script


def test_the_plan_of_a_job_says_what_it_costs_and_whether_its_time_will_do(empty: Cluster) -> None:
    recipe = REPOSITORY / "recipes" / "llmjp4-8b-4layers" / "midtrain.yaml"
    words = ("plan", str(recipe), "--site", "abci3", "--nodes", "2", "--hours", "10")
    done = empty.tanren(*words, sets=("user.group=g", "steps=300000", "evaluation=null"))
    assert done.code == 0, done.text
    rows = {line[:15].strip(): line[15:].strip() for line in done.out.splitlines()}
    assert rows["job"] == "2 x rt_HF on abci3 for at most 10 hours, group g"
    assert rows["cost"].startswith("20.0 node-hours; 300 points for the whole time")
    assert rows["memory"].startswith("18 of 140 GiB a GPU (weights 4.6, gradients 9.3, ")
    assert rows["time"] == "6.7 hours at 50,972 tokens/s a GPU, measured on 1 x H200"
    assert "too short" not in rows
    assert rows["processes"] == "16 on 2 nodes (cuda)"
    assert '--nnodes 2 --node-rank "$node_rank" --master-addr THE_FIRST_HOST' in done.out
    short = empty.tanren(*words[:-1], "2", sets=("user.group=g", "steps=300000", "evaluation=null"))
    assert "the run takes about 6.7 hours: CHAIN=4, or more HOURS=" in short.out
    longest = empty.tanren(*words[:-1], "168", sets=("user.group=g", "steps=22570000",
                                                     "evaluation=null"))  # fmt: skip
    (row,) = [line for line in longest.out.splitlines() if line.startswith("too short")]
    # Three times 168 hours would do, if each job did not stop earlier, to save.
    assert row.endswith("the run takes about 503.8 hours: CHAIN=4")
    assert not empty.queue.exists()


def test_code_that_no_commit_holds_is_not_submitted_unasked(
    empty: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ALLOW_DIRTY", raising=False)
    for name, value in {**empty.environment, "RUNS": str(empty.runs), "RUNTIME": "native"}.items():
        monkeypatch.setenv(name, value)
    dirty = {"id": "0" * 40, "dirty": True, "changed": ["src/tanren/runs.py"]}
    monkeypatch.setattr(provenance, "git_commit", lambda *_: dirty)
    order = orders.Order(RECIPES / "preprocess.yaml", wish=Wish(type="cpu"))
    place = clusters.place_for(order)
    assert place is not None
    with pytest.raises(RequestError, match=r"no commit holds: src/tanren/runs.py") as refused:
        clusters.send(order, place, False, print)
    assert "ALLOW_DIRTY=1" in refused.value.next_step
    assert not empty.queue.exists()
    assert clusters.send(replace(order, allow_dirty=True), place, False, print) == ("100",)
    frozen = runs.read_json(empty.runs / "tiny" / "preprocess" / "order.json")
    assert frozen["commit"] == dirty


def test_a_submission_writes_no_key(empty: Cluster) -> None:
    keys = {"HF_TOKEN": "hf_planted12345678", "WANDB_API_KEY": "planted-wandb-12345678"}
    empty.tanren.environment |= keys
    assert empty.stage("preprocess").code == 0
    files = [path for path in empty.runs.rglob("*") if path.is_file()]
    assert {"order.json", "job.sh", "jobs.json"} <= {path.name for path in files}
    for path in files:
        assert not any(key in path.read_text() for key in keys.values()), path
