"""Grid Engine (Altair's), as on TSUBAME 4.0.

`-hold_jid` waits for the end of a job, however it ended; that it ended well is checked by the job
itself at its start, from the run folders that it stands on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tanren.config.errors import RequestError
from tanren.launch.scheduler import After, Allocation, JobRequest, State, read_hosts


def header(job: JobRequest) -> list[str]:
    """The #$ lines of a job script."""
    if job.reservation:
        raise RequestError(
            f"reservation {job.reservation}",
            "cannot be asked for on Grid Engine here",
            "leave it out, or ask the site how its reservations are used",
        )
    return [
        "#$ -cwd",
        f"#$ -N {job.name}",
        f"#$ -l {job.type}={job.nodes}",
        f"#$ -l h_rt={job.clock}",
        "#$ -j y",
        f"#$ -o {job.output}/scheduler.log",
    ]


def submit(job: JobRequest, script: Path, after: After) -> list[str]:
    """The command that submits a script. The group is no option of a script there."""
    group = ["-g", job.group] if job.group else []
    hold = ["-hold_jid", ",".join(after.ids)] if after.ids else []
    return ["qsub", *group, *hold, str(script)]


def job_id(answer: str) -> str | None:
    """`1234`, from `Your job 1234 ("name") has been submitted`."""
    match = re.search(r"^Your job (\d+) ", answer, re.MULTILINE)
    return match[1] if match else None


def query() -> list[str]:
    """The command whose answer `states` reads."""
    return ["qstat", "-r"]


def states(answer: str) -> dict[str, tuple[str, State]]:
    """Name and state of each job that has not ended, by its id."""
    found: dict[str, tuple[str, State]] = {}
    number, letters = "", ""
    for line in answer.splitlines():
        row = re.match(r"\s*(\d+)\s+[\d.]+\s+\S+\s+\S+\s+(\w+)\s", line)
        if row:
            number, letters = row[1], row[2]
        name = re.match(r"\s+Full jobname:\s+(\S+)", line)
        if name and number:
            state: State = (
                "running" if set(letters) & set("rtd") else "held" if "h" in letters else "queued"
            )
            found[number] = (name[1], state)
    return found


def cancel(job_id: str) -> list[str]:
    """The command that ends a job."""
    return ["qdel", job_id]


def allocation(environment: Mapping[str, str]) -> Allocation:
    """The job's id and hosts, inside it. Without a parallel environment there is no host file."""
    hosts = environment.get("PE_HOSTFILE")
    return Allocation(
        environment["JOB_ID"], read_hosts(hosts) if hosts else (environment["HOSTNAME"],)
    )


def start_on_every_node(hosts: Sequence[str], hostfile: Path) -> list[str]:
    """What goes before a command to run it once on each node."""
    return ["mpirun", "--hostfile", str(hostfile), "-np", str(len(hosts)), "--map-by", "ppr:1:node",
            "--bind-to", "none"]  # fmt: skip
