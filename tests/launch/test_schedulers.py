"""What is said to PBS Professional, Grid Engine and Slurm, and how their answers are read."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tanren.config.errors import RequestError, WorkError
from tanren.config.fields import Job
from tanren.config.load import read_site, repository
from tanren.launch import gridengine, pbs, queue, scheduler, slurm
from tanren.launch.scheduler import After, JobRequest
from tanren.plan.paths import RunFolder
from tanren.plan.site import Place, Wish, make_place
from tests.launch import strict_pbs

RUN = RunFolder(Path("/groups/g/runs/llmjp4-8b/midtrain.100B"))
JOB = JobRequest("llmjp4-8b-midtrain", "rt_HF", 2, 36.5, "gaa50000", Path("/r/log"), 8, 192)


def place(site: str, *, group: str = "gaa50000", trains: bool = True, **wish: object) -> Place:
    return make_place(site, read_site(site), Job(), Wish(**wish), group, trains=trains)  # type: ignore[arg-type]


def script(where: Place, segment: int = 1) -> list[str]:
    return queue.script(RUN, where, "llmjp4-8b", segment).splitlines()


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TANREN_USER", "TANREN_CACHE", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("IMAGES", "/groups/g/images")
    monkeypatch.setenv("DATA", "/groups/g/data")


def tail(seconds: int, *words: str) -> list[str]:
    return [
        f"export TANREN_PYTHON={sys.executable}",
        "export RUNS=/groups/g/runs",
        "export IMAGES=/groups/g/images",
        "export DATA=/groups/g/data",
        f"export TANREN_DEADLINE=$(($(date +%s) + {seconds}))",
        " ".join([f"exec {repository()}/bin/tanren job {RUN.root}", *words]),
    ]


MARK = "# /groups/g/runs/llmjp4-8b/midtrain.100B, written by tanren. Nothing here is to be edited."


def test_the_whole_script_for_abci() -> None:
    assert script(place("abci3", nodes=2, hours=36.5)) == [
        "#!/bin/bash",
        "#PBS -N llmjp4-8b-midtrain.100B-9bfa72",
        "#PBS -P gaa50000",
        "#PBS -q rt_HF",
        "#PBS -l select=2",
        "#PBS -l walltime=36:30:00",
        "#PBS -j oe",
        "#PBS -o /groups/g/runs/llmjp4-8b/midtrain.100B/log/scheduler.log",
        MARK,
        "exec >>/groups/g/runs/llmjp4-8b/midtrain.100B/log/job.log 2>&1",
        "source /etc/profile.d/modules.sh",
        "module load hpcx",
        "set -euo pipefail",
        *tail(130800),
    ]


def test_the_whole_script_for_abci_with_a_reservation_and_as_a_part_of_a_chain() -> None:
    lines = script(place("abci3", hours=1, reservation="R1234"), segment=3)
    assert lines[3:6] == ["#PBS -q R1234", "#PBS -v RTYPE=rt_HF", "#PBS -l select=1"]
    assert lines[-6:] == tail(3060, "--segment", "3")


def test_the_whole_script_for_tsubame() -> None:
    assert script(place("tsubame4", group="tga-x", nodes=4, hours=24)) == [
        "#!/bin/bash",
        "#$ -cwd",
        "#$ -N llmjp4-8b-midtrain.100B-9bfa72",
        "#$ -l node_f=4",
        "#$ -l h_rt=24:00:00",
        "#$ -j y",
        "#$ -o /groups/g/runs/llmjp4-8b/midtrain.100B/log/scheduler.log",
        MARK,
        "exec >>/groups/g/runs/llmjp4-8b/midtrain.100B/log/job.log 2>&1",
        "source /etc/profile.d/modules.sh",
        "module load openmpi/5.0.7-gcc",
        "set -euo pipefail",
        *tail(85800),
    ]


def test_the_whole_script_for_slurm() -> None:
    assert script(place("slurm", nodes=2, hours=0.5, reservation="team")) == [
        "#!/bin/bash",
        "#SBATCH --job-name=llmjp4-8b-midtrain.100B-9bfa72",
        "#SBATCH --account=gaa50000",
        "#SBATCH --partition=gpu",
        "#SBATCH --reservation=team",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --cpus-per-task=96",
        "#SBATCH --time=0:30:00",
        "#SBATCH --output=/groups/g/runs/llmjp4-8b/midtrain.100B/log/slurm-%j.log",
        MARK,
        "exec >>/groups/g/runs/llmjp4-8b/midtrain.100B/log/job.log 2>&1",
        "set -euo pipefail",
        *tail(1530),
    ]


@pytest.mark.parametrize("site", ["abci3", "tsubame4", "slurm"])
def test_every_type_of_a_site_has_its_request(site: str) -> None:
    types = read_site(site).types
    assert types
    for name in types:
        where = place(site, type=name)
        text = "\n".join(script(where))
        wanted = {"abci3": f"#PBS -q {name}\n", "tsubame4": f"#$ -l {name}=1\n",
                  "slurm": f"#SBATCH --partition={name}\n"}[site]  # fmt: skip
        assert wanted in text
        if site == "abci3":
            strict_pbs.check(text, read_site(site))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("#PBS -P gaa50000\n", ""), "-P is mandatory"),
        (("#PBS -q rt_HF\n", ""), "-q is mandatory"),
        (("select=2", "select=200"), "at most 128 nodes"),
        (("walltime=36:30:00", "walltime=200:00:00"), "at most 168 h"),
        (("walltime=36:30:00", "walltime=86400"), "HH:MM:SS"),
        (("-q rt_HF", "-q rt_XX"), "no queue rt_XX"),
        (("-q rt_HF", "-q R12"), "RTYPE"),
        (("#PBS -j oe", "#PBS --join"), "unknown option --join"),
    ],
)
def test_the_strict_reader_refuses_what_pbs_would(change: tuple[str, str], message: str) -> None:
    """The tests' own tool: it must be able to say no."""
    text = "\n".join(script(place("abci3", nodes=2, hours=36.5)))
    strict_pbs.check(text, read_site("abci3"))
    with pytest.raises(AssertionError, match=message):
        strict_pbs.check(text.replace(*change), read_site("abci3"))


def test_the_commands_that_submit() -> None:
    file, ok, end = Path("/r/job.sh"), After(("1.pbs1", "2.pbs1")), After(("7",), success=False)
    assert pbs.submit(JOB, file, After()) == ["qsub", "/r/job.sh"]
    assert pbs.submit(JOB, file, ok) == ["qsub", "-W", "depend=afterok:1.pbs1:2.pbs1", "/r/job.sh"]
    assert pbs.submit(JOB, file, end) == ["qsub", "-W", "depend=afterany:7", "/r/job.sh"]
    assert gridengine.submit(JOB, file, After()) == ["qsub", "-g", "gaa50000", "/r/job.sh"]
    assert gridengine.submit(replace(JOB, group=None), file, After(("1", "2"))) == [
        "qsub", "-hold_jid", "1,2", "/r/job.sh",
    ]  # fmt: skip
    assert slurm.submit(JOB, file, After()) == ["sbatch", "--parsable", "/r/job.sh"]
    assert slurm.submit(JOB, file, After(("1", "2"))) == [
        "sbatch", "--parsable", "--dependency=afterok:1:2", "--kill-on-invalid-dep=yes",
        "/r/job.sh",
    ]  # fmt: skip
    assert "--dependency=afterany:7" in slurm.submit(JOB, file, end)
    with pytest.raises(RequestError, match="reservation R1: cannot be asked for on Grid Engine"):
        gridengine.header(replace(JOB, reservation="R1"))


@pytest.mark.parametrize(
    ("adapter", "answer", "number"),
    [
        (pbs, "12345.pbs1\n", "12345.pbs1"),
        (pbs, "qsub: this month's points: 12\n12345.pbs1\n", "12345.pbs1"),
        (pbs, "12345\n", "12345"),
        (pbs, "", None),
        (pbs, "Welcome\n", None),
        (gridengine, 'Your job 77 ("tiny") has been submitted\n', "77"),
        (gridengine, 'warning\nYour job 77 ("tiny 9 x") has been submitted\n', "77"),
        (gridengine, "Unable to run job: unknown resource\n", None),
        (slurm, "4711\n", "4711"),
        (slurm, "4711;cluster\n", "4711"),
        (slurm, "Submitted batch job 4711\n", None),
    ],
)
def test_the_job_id_of_an_answer(adapter: scheduler.Scheduler, answer: str, number: str) -> None:
    assert adapter.job_id(answer) == number


def test_the_states_of_jobs() -> None:
    assert pbs.states(
        "Job Id: 12.pbs1\n    Job_Name = a-1\n    job_state = R\n    queue = rt_HF\n\n"
        "Job Id: 13.pbs1\n    Job_Name = b\n    job_state = H\n\n"
        "Job Id: 14.pbs1\n    Job_Name = c\n    job_state = F\n"
    ) == {"12.pbs1": ("a-1", "running"), "13.pbs1": ("b", "held"), "14.pbs1": ("c", "ended")}
    assert gridengine.states(
        "job-ID  prior   name       user         state submit/start at     queue   slots\n"
        "-----------------\n"
        "      1 0.50000 tiny-prepr root         r     11/21/2026 13:55:35 all.q@vm    1\n"
        "       Full jobname:     tiny-preprocess-6ec5b2\n"
        "       Master Queue:     all.q@vm\n"
        "      2 0.00000 tiny-conve root         hqw   11/21/2026 13:55:36             1\n"
        "       Full jobname:     tiny-convert-280186\n"
        "      3 0.00000 x          root         Eqw   11/21/2026 13:55:36             1\n"
        "       Full jobname:     x\n"
    ) == {"1": ("tiny-preprocess-6ec5b2", "running"), "2": ("tiny-convert-280186", "held"),
          "3": ("x", "queued")}  # fmt: skip
    assert slurm.states(
        "4 a RUNNING None\n5 b PENDING (Dependency)\n6 c PENDING (Resources)\n7 d COMPLETED None\n"
    ) == {"4": ("a", "running"), "5": ("b", "held"), "6": ("c", "queued")}
    for adapter in (pbs, gridengine, slurm):
        assert adapter.states("") == {}


def test_hosts_are_read_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "nodes"
    file.write_text("hnode001\nhnode001\nhnode002\nhnode002\n")
    given = pbs.allocation({"PBS_JOBID": "1.pbs1", "PBS_NODEFILE": str(file)})
    assert given == scheduler.Allocation("1.pbs1", ("hnode001", "hnode002"))
    file.write_text("r1n1 192 all.q@r1n1 NULL\nr1n2 192 all.q@r1n2 NULL\n")
    given = gridengine.allocation({"JOB_ID": "9", "PE_HOSTFILE": str(file), "HOSTNAME": "r1n1"})
    assert given.hosts == ("r1n1", "r1n2")
    assert gridengine.allocation({"JOB_ID": "9", "HOSTNAME": "r1n1"}).hosts == ("r1n1",)
    tool = tmp_path / "scontrol"
    tool.write_text('#!/bin/sh\n[ "$3" = "node[1-2]" ] && printf "node1\\nnode2\\n"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    given = slurm.allocation({"SLURM_JOB_ID": "3", "SLURM_JOB_NODELIST": "node[1-2]"})
    assert given.hosts == ("node1", "node2")
    with pytest.raises(WorkError, match="names no host"):
        slurm.allocation({"SLURM_JOB_ID": "3", "SLURM_JOB_NODELIST": "other"})
    file.write_text("\n")
    with pytest.raises(WorkError, match="list of hosts is empty"):
        pbs.allocation({"PBS_JOBID": "1", "PBS_NODEFILE": str(file)})
    with pytest.raises(WorkError, match="cannot be read: No such file"):
        pbs.allocation({"PBS_JOBID": "1", "PBS_NODEFILE": str(tmp_path / "absent")})


def test_what_starts_a_command_on_every_node() -> None:
    hosts = ("a", "b")
    mpirun = ["mpirun", "--hostfile", "/r/hosts", "-np", "2", "--map-by", "ppr:1:node",
              "--bind-to", "none"]  # fmt: skip
    assert pbs.start_on_every_node(hosts, Path("/r/hosts")) == mpirun
    assert gridengine.start_on_every_node(hosts, Path("/r/hosts")) == mpirun
    assert slurm.start_on_every_node(hosts, Path("/r/hosts")) == [
        "srun", "--nodes", "2", "--ntasks", "2", "--ntasks-per-node", "1", "--kill-on-bad-exit=1",
    ]  # fmt: skip


def test_a_scheduler_that_is_not_there_refuses_or_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RequestError, match=r"qsub-x: is not on this machine, so it cannot list"):
        scheduler.ask(["qsub-x"], "list jobs")
    with pytest.raises(RequestError, match=r"sh: refused to list jobs: no such queue"):
        scheduler.ask(["sh", "-c", "echo no such queue >&2; exit 3"], "list jobs")
    monkeypatch.setattr(scheduler, "TIMEOUT_SECONDS", 0.2)
    with pytest.raises(WorkError, match=r"sleep: did not answer within 0.2 s(.|\n)*submit twice"):
        scheduler.ask(["sleep", "5"], "submit a job")
