"""Slurm: a resource type is a partition."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tanren.config.errors import WorkError
from tanren.launch.scheduler import After, Allocation, JobRequest, State, unique

_STATES: dict[str, State] = {"PENDING": "queued", "CONFIGURING": "queued", "REQUEUED": "queued",
                             "RUNNING": "running", "COMPLETING": "running",
                             "SUSPENDED": "held"}  # fmt: skip
# Before the end Slurm sends this signal to the script; a stage that gets it saves and stops.
WARNING_SECONDS = 300


def header(job: JobRequest) -> list[str]:
    """The #SBATCH lines of a job script."""
    lines = [f"#SBATCH --job-name={job.name}"]
    lines += [f"#SBATCH --account={job.group}"] if job.group else []
    lines += [f"#SBATCH --partition={job.type}"]
    lines += [f"#SBATCH --reservation={job.reservation}"] if job.reservation else []
    lines += [f"#SBATCH --nodes={job.nodes}", "#SBATCH --ntasks-per-node=1"]
    lines += [f"#SBATCH --gpus-per-node={job.gpus_per_node}"] if job.gpus_per_node else []
    return [
        *lines,
        f"#SBATCH --cpus-per-task={job.cores}",
        f"#SBATCH --time={job.clock}",
        f"#SBATCH --output={job.output}/slurm-%j.log",
    ]


def submit(job: JobRequest, script: Path, after: After) -> list[str]:
    """The command that submits a script."""
    kind = "afterok" if after.success else "afterany"
    depend = [f"--dependency={kind}:{':'.join(after.ids)}", "--kill-on-invalid-dep=yes"]
    return ["sbatch", "--parsable", *(depend if after.ids else []), str(script)]


def job_id(answer: str) -> str | None:
    """`1234`, from sbatch --parsable (`1234` or `1234;cluster`)."""
    match = re.fullmatch(r"(\d+)(?:;\S+)?", answer.strip())
    return match[1] if match else None


def query() -> list[str]:
    """The command whose answer `states` reads."""
    return ["squeue", "--noheader", "--format=%i %j %T %r"]


def states(answer: str) -> dict[str, tuple[str, State]]:
    """Name and state of each job that has not ended, by its id."""
    found: dict[str, tuple[str, State]] = {}
    for line in answer.splitlines():
        number, name, state, *reason = line.split()
        if state == "PENDING" and "Dependency" in "".join(reason):
            found[number] = (name, "held")
        elif state in _STATES:
            found[number] = (name, _STATES[state])
    return found


def cancel(job_id: str) -> list[str]:
    """The command that ends a job."""
    return ["scancel", job_id]


def allocation(environment: Mapping[str, str]) -> Allocation:
    """The job's id and hosts, inside it."""
    listed = environment["SLURM_JOB_NODELIST"]
    done = subprocess.run(
        ["scontrol", "show", "hostnames", listed], capture_output=True, text=True, check=False
    )
    hosts = unique(done.stdout.split())
    if done.returncode or not hosts:
        raise WorkError(
            f"SLURM_JOB_NODELIST={listed}", f"names no host: {done.stderr.strip()}",
            "submit again; tell the site",
        )  # fmt: skip
    return Allocation(environment["SLURM_JOB_ID"], hosts)


def start_on_every_node(hosts: Sequence[str], hostfile: Path) -> list[str]:
    """What goes before a command to run it once on each node."""
    return ["srun", "--nodes", str(len(hosts)), "--ntasks", str(len(hosts)),
            "--ntasks-per-node", "1", "--kill-on-bad-exit=1"]  # fmt: skip
