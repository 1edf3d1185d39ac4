"""PBS Professional, as on ABCI 3.0.

`-q` names the resource type and `select` the nodes. A reservation is a queue of its own, which then
takes the type as the variable RTYPE.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tanren.launch.scheduler import After, Allocation, JobRequest, State, read_hosts

_STATES: dict[str, State] = {"Q": "queued", "H": "held", "W": "queued", "T": "queued",
                             "R": "running", "S": "running", "E": "running", "B": "running",
                             "F": "ended", "X": "ended", "C": "ended"}  # fmt: skip


def header(job: JobRequest) -> list[str]:
    """The #PBS lines of a job script."""
    lines = [f"#PBS -N {job.name}"]
    lines += [f"#PBS -P {job.group}"] if job.group else []
    lines += [f"#PBS -q {job.reservation or job.type}"]
    lines += [f"#PBS -v RTYPE={job.type}"] if job.reservation else []
    return [
        *lines,
        f"#PBS -l select={job.nodes}",
        f"#PBS -l walltime={job.clock}",
        "#PBS -j oe",
        f"#PBS -o {job.output}/scheduler.log",
    ]


def submit(job: JobRequest, script: Path, after: After) -> list[str]:
    """The command that submits a script."""
    kind = "afterok" if after.success else "afterany"
    depend = ["-W", f"depend={kind}:{':'.join(after.ids)}"] if after.ids else []
    return ["qsub", *depend, str(script)]


def job_id(answer: str) -> str | None:
    """`12345.pbs1`, from the last line of qsub's answer."""
    match = re.search(r"^(\d+(?:\.[\w.-]+)?)$", answer.strip().splitlines()[-1] if answer else "")
    return match[1] if match else None


def query() -> list[str]:
    """The command whose answer `states` reads."""
    return ["qstat", "-f"]


def states(answer: str) -> dict[str, tuple[str, State]]:
    """Name and state of each job, by its id."""
    found = {}
    for block in re.split(r"^(?=Job Id:)", answer, flags=re.MULTILINE):
        number = re.match(r"Job Id:\s*(\S+)", block)
        name = re.search(r"Job_Name = (\S+)", block)
        state = re.search(r"job_state = (\w)", block)
        if number and name and state:
            found[number[1]] = (name[1], _STATES.get(state[1], "running"))
    return found


def cancel(job_id: str) -> list[str]:
    """The command that ends a job."""
    return ["qdel", job_id]


def allocation(environment: Mapping[str, str]) -> Allocation:
    """The job's id and hosts, inside it."""
    return Allocation(environment["PBS_JOBID"], read_hosts(environment["PBS_NODEFILE"]))


def start_on_every_node(hosts: Sequence[str], hostfile: Path) -> list[str]:
    """What goes before a command to run it once on each node."""
    return ["mpirun", "--hostfile", str(hostfile), "-np", str(len(hosts)), "--map-by", "ppr:1:node",
            "--bind-to", "none"]  # fmt: skip
