"""Runs a job on this machine: the script, the process, its signals, its end."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, MappingProxyType

import psutil

from tanren import linux, runs, tracking
from tanren.config.errors import EXIT_STOPPED, TanrenError, WorkError
from tanren.config.load import read_user, repository
from tanren.data import hub
from tanren.environments import OWN
from tanren.launch import container
from tanren.launch.container import Container
from tanren.plan.paths import TRAINING_STAGES, RunFolder
from tanren.plan.plan import Launch

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Meeting:
    """Where the processes of several nodes meet: a host and a port that is this job's own."""

    host: str
    port: int


def script(
    folder: RunFolder, launch: Launch, attempt: int, cores: int, inside: Container | None = None,
    meeting: Meeting | None = None, stated: Mapping[str, str] = MappingProxyType({}),
) -> str:  # fmt: skip
    """What one attempt runs on each node, in a container or in the machine's own Python.

    Args:
        cores: of one node.
        meeting: for several nodes; each finds its rank among them from the program that started it.
        stated: variables of the site, whose number of threads wins.
    """
    stage = ["-m", "tanren.stages", str(folder.plan), str(attempt)]
    own = str(OWN[launch.own].python()) if launch.own else sys.executable
    words = ["python3" if inside else own]
    here = launch.processes_per_node
    if launch.torchrun:
        words += ["-m", "torch.distributed.run"]
        if launch.nodes > 1:
            assert meeting is not None, folder
            words += ["--nnodes", str(launch.nodes), "--node-rank", container.NODE_RANK]
            words += ["--master-addr", meeting.host, "--master-port", str(meeting.port)]
        else:
            words.append("--standalone")
        words += ["--nproc-per-node", str(here)]
    words += stage
    threads = max(1, cores // here)
    environment = {
        "PYTHONPATH": str(repository() / "src") if inside else python_path(),
        "PYTHONNOUSERSITE": "1",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": stated.get("OMP_NUM_THREADS", str(threads)),
        "TOKENIZERS_PARALLELISM": "true",
        # Said here: inside a container user.toml may be another, and so is the home.
        "DATA": str(hub.data_root()),
        **_tracking(),
    }
    if launch.device == "cpu":
        # GPUs that the plan does not use must not be found by torch either.
        environment["CUDA_VISIBLE_DEVICES"] = ""
        # megatron-core has torch compile its small functions. On a CPU that takes seconds and a
        # C++ compiler, and the steps are slower for it (measured: 4,800 and 6,800 tokens/s).
        environment["TORCHDYNAMO_DISABLE"] = "1"
    else:
        environment["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    lines = [
        "#!/usr/bin/env bash",
        f"# Attempt {attempt} of {folder.root}, written by tanren. Nothing here is to be edited.",
        "set -euo pipefail",
    ]
    if launch.nodes > 1:
        # srun, Open MPI's mpirun, and MPICH's, in this order.
        ranks = "${SLURM_PROCID:-${OMPI_COMM_WORLD_RANK:-${PMI_RANK:?no rank of this node}}}"
        lines.append(f"node_rank={ranks}")
    if inside:
        words = container.command(inside, words, folder.root)
        lines += container.prologue(environment)
    else:
        lines += [f"export {key}={shlex.quote(value)}" for key, value in environment.items()]
    lines.append(f"exec {container.shell_line(words)}")
    return "\n".join(lines) + "\n"


def _tracking() -> dict[str, str]:
    """Where user.toml wants a run tracked, as wandb's own variables say it; no key."""
    stated = read_user().tracking.wandb
    if stated is None:
        return {}
    project = os.environ.get(tracking.PROJECT) or stated.project or "tanren"
    entity = os.environ.get(tracking.ENTITY) or stated.entity
    return {tracking.PROJECT: project} | ({tracking.ENTITY: entity} if entity else {})


def _environment() -> dict[str, str]:
    """What the job inherits, and the key in ~/.netrc, which no container sees."""
    key = tracking.key_of_this_machine()
    return dict(os.environ) | ({tracking.KEY: key} if key else {})


def python_path() -> str:
    """This checkout's src first, then what the caller had."""
    own = str(repository() / "src")
    theirs = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join([own, *(path for path in theirs if path not in ("", own))])


def run(
    folder: RunFolder, script_file: Path, attempt: int, lock: int, watch: Callable[[], None],
    starter: tuple[str, ...] = (),
) -> TanrenError | None:  # fmt: skip
    """Run a script to its end; Ctrl-C and SIGTERM are passed on as a request to save.

    Args:
        lock: the run folder's lock, inherited by the job so that it lasts as long as the job.
        watch: called a few times a second while the job runs.
        starter: what goes before the script to run it on every node of a job.
    Returns:
        None when the stage is done; otherwise why not. A stop that can be resumed has the exit
        code 75.
    """
    log = folder.log(attempt)
    log.parent.mkdir(parents=True, exist_ok=True)
    for mark in (folder.failed, folder.stopped, folder.stop):
        mark.unlink(missing_ok=True)
    # What writes checkpoints outlives a training that is killed, and would wait for more for ever:
    # such orphans become this process's children.
    linux.adopt_orphans()
    others = set(_family(os.getpid()))
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*starter, "bash", str(script_file)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(),
            # A terminal's Ctrl-C reaches this process alone, which lets the workers save;
            # torchrun would give them 30 seconds.
            start_new_session=True,
            pass_fds=(lock,),
            preexec_fn=_die_with_parent,  # noqa: PLW1509  (one system call, nothing that locks)
        )
        trains = folder.root.name.startswith(TRAINING_STAGES)
        with _signals_to(process, folder.stop if starter else None, saves=trains) as signals:
            while process.poll() is None:
                watch()
                time.sleep(POLL_SECONDS)
            watch()
    orphans = list(set(_family(os.getpid())) - others)
    for orphan in orphans:
        with contextlib.suppress(psutil.Error):
            orphan.kill()
    psutil.wait_procs(orphans, timeout=5)
    return _ending(folder, attempt, process.returncode, signals.asked)


def _ending(folder: RunFolder, attempt: int, code: int, asked: bool) -> TanrenError | None:
    if folder.done.exists():
        return None
    failure = runs.failure_of(folder)
    if failure is not None:
        return failure
    stopped = runs.read_json(folder.stopped)
    if stopped:
        return _stopped(
            folder,
            f"stopped by {stopped['reason']} after step {stopped['step']}, saved",
            "the same command goes on from there",
        )
    log = folder.log(attempt)
    lines = log.read_text(errors="replace").splitlines()[-8:] if log.exists() else []
    kept = runs.iterations(folder)
    again = f"it goes on from iteration {kept[-1]}" if kept and kept[-1] else "it starts anew"
    if asked:
        return _stopped(
            folder, "stopped before it was done", f"run the same command again: {again}"
        )
    tail = "".join(f"\n    | {line}" for line in lines)
    return WorkError(
        log,
        f"the job ended with code {code} and left no word",
        f"run the same command again ({again}). The log ends with:{tail}",
    )


def _stopped(folder: RunFolder, problem: str, next_step: str) -> TanrenError:
    error = WorkError(folder.root, problem, next_step)
    error.exit_code = EXIT_STOPPED
    return error


class _signals_to:  # noqa: N801  (reads as a verb in a with statement)
    """Passes Ctrl-C and SIGTERM on to the workers; a second Ctrl-C ends them at once."""

    def __init__(
        self, process: subprocess.Popen[bytes], stop: Path | None, *, saves: bool
    ) -> None:  # fmt: skip
        """Signals reach the workers of this node; those of other nodes read the file `stop`.

        Args:
            saves: what is asked to stop finishes its step and saves it.
        """
        self.process, self.stop, self.saves, self.asked = process, stop, saves, False

    def __enter__(self) -> _signals_to:
        self.before = {
            number: signal.signal(number, self._pass_on)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            # torchrun gives each worker a process group of its own: one signal would miss them.
            for member in _family(self.process.pid):
                with contextlib.suppress(psutil.Error):
                    member.kill()
            return
        if not self.asked:
            first = ": the step is finished and saved" if self.saves else ""
            print(f"\nstopping{first} (Ctrl-C again ends at once)", file=sys.stderr, flush=True)
        self.asked = True
        if self.stop is not None:
            self.stop.touch()
            return
        for worker in _workers(self.process.pid):
            with contextlib.suppress(psutil.Error):
                worker.send_signal(signal.SIGTERM)


def _family(job: int) -> list[psutil.Process]:
    """The job's process and all that it started, it first."""
    try:
        root = psutil.Process(job)
        return [root, *root.children(recursive=True)]
    except psutil.Error:
        return []


def _workers(job: int) -> list[psutil.Process]:
    """The processes of the stage: torchrun's children, or the plain process itself.

    The script ends in `exec`, so the job's process is torchrun or the stage; in a container it is
    the container program, and they are its children.
    """
    family = _family(job)
    try:
        for process in family:
            if "torch.distributed.run" in process.cmdline():
                return process.children()
        # Of a container program the words hold "tanren.stages", too.
        stages = [
            process
            for process in family
            if "tanren.stages" in process.cmdline()
            and Path(process.cmdline()[0]).name.startswith("python")
        ]
        return stages[:1] or family
    except psutil.Error:
        return []


def _die_with_parent() -> None:
    """Ask the kernel to end the job with SIGTERM when this command is killed."""
    linux.signal_at_parents_end(signal.SIGTERM)
