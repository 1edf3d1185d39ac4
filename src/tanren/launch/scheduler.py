"""What every scheduler is asked and answers; pbs, gridengine and slurm speak for theirs."""

from __future__ import annotations

import importlib
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, cast

from tanren.config.errors import RequestError, WorkError

State = Literal["queued", "running", "held", "ended"]
TIMEOUT_SECONDS = 60


@dataclass(frozen=True)
class JobRequest:
    """What a job asks for, in the words that all schedulers share.

    `hours` is the longest it may take; `type` one of the site's resource types; `output` a folder
    for the scheduler's own files (the script appends its words to a file of ours: PBS shows its
    own only when a job has ended).
    """

    name: str
    type: str
    nodes: int
    hours: float
    group: str | None
    output: Path
    gpus_per_node: int
    cores: int
    reservation: str | None = None

    @property
    def clock(self) -> str:
        """`24:00:00`, rounded up to a minute."""
        minutes = -(-int(self.hours * 3600) // 60)
        return f"{minutes // 60}:{minutes % 60:02d}:00"


@dataclass(frozen=True)
class After:
    """Jobs to wait for. `success`: they must have ended well; else any end will do."""

    ids: tuple[str, ...] = ()
    success: bool = True


@dataclass(frozen=True)
class Allocation:
    """What a job was given, read inside it."""

    job_id: str
    hosts: tuple[str, ...] = field(default_factory=tuple)


class Scheduler(Protocol):
    """What an adapter module offers. Word lists are commands; nothing in it runs one."""

    def header(self, job: JobRequest) -> list[str]: ...
    def submit(self, job: JobRequest, script: Path, after: After) -> list[str]: ...
    def job_id(self, answer: str) -> str | None: ...
    def query(self) -> list[str]: ...
    def states(self, answer: str) -> dict[str, tuple[str, State]]: ...
    def cancel(self, job_id: str) -> list[str]: ...
    def allocation(self, environment: Mapping[str, str]) -> Allocation: ...
    def start_on_every_node(self, hosts: Sequence[str], hostfile: Path) -> list[str]: ...


def adapter(name: str) -> Scheduler:
    """The module that speaks for a scheduler."""
    return cast(Scheduler, importlib.import_module(f"tanren.launch.{name}"))


def ask(command: list[str], what: str) -> str:
    """Run a scheduler's command.

    Raises:
        RequestError: the scheduler is not here, or refuses. WorkError: it does not answer.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except FileNotFoundError:
        raise RequestError(
            command[0], f"is not on this machine, so it cannot {what}",
            "log in to the cluster's login node, or SITE=local",
        ) from None  # fmt: skip
    except subprocess.TimeoutExpired:
        raise WorkError(
            command[0], f"did not answer within {TIMEOUT_SECONDS} s when asked to {what}",
            "make status shows whether the job is there; the same command does not submit twice",
        ) from None  # fmt: skip
    if done.returncode:
        said = " ".join((done.stderr.strip() or done.stdout.strip()).split())
        raise RequestError(
            command[0], f"refused to {what}: {said or done.returncode}",
            "make plan with the same words shows what it is given; docs/sites.md says from where",
        )  # fmt: skip
    return done.stdout


def unique(hosts: Sequence[str]) -> tuple[str, ...]:
    """Hosts in their order, each once: a node file has a line for each process."""
    return tuple(dict.fromkeys(hosts))


def read_hosts(path: str, column: int = 0) -> tuple[str, ...]:
    """The hosts of a node file, each once.

    Raises:
        WorkError: there is no such file, or it names no host.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except OSError as error:
        raise WorkError(
            path, f"the job's list of hosts cannot be read: {error.strerror}",
            "submit again; tell the site",
        ) from None  # fmt: skip
    hosts = unique([line.split()[column] for line in lines if line.split()])
    if not hosts:
        raise WorkError(path, "the job's list of hosts is empty", "submit again; tell the site")
    return hosts
