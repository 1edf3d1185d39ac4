"""The command in a process that stays: its jobs run where torch has been imported already.

A job of the real command begins with seconds of imports, and the tests of a stage want many jobs.
Here everything is as there (options, plans, run folders, logs, exit codes) but that the processes
of a job are this one and, for a job of two, another that stays. What happens to processes (signals,
kills) is tested with the real command.

    python -m tests.stages.warm          reads requests as JSON lines, answers likewise
    python -m tests.stages.warm second   the second process of jobs of two
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tests.conftest import REPOSITORY, Finished, Tanren


@dataclass(kw_only=True)
class Warm(Tanren):
    """As `Tanren`, but for what it runs in."""

    server: Server

    def __call__(self, *words: str, sets: tuple[str, ...] = (), **options: object) -> Finished:
        assert not options, options
        for assignment in sets:
            words = (*words, "--set", assignment)
        environment = {"RUNS": str(self.runs), **self.environment}
        answer = self.server.ask({"words": words, "environment": environment})
        return Finished(answer["code"], answer["out"], answer["err"])


class Server:
    """A process that runs commands, and another after some of them.

    Threads of a job's process groups outlive it, some of them busy.
    """

    commands = 5

    def __init__(self) -> None:
        self.process: Process | None = None
        self.asked = 0

    def ask(self, request: dict[str, Any]) -> Any:
        if self.process is not None and self.asked >= self.commands:
            self.end()
        if self.process is None:
            self.process, self.asked = Process(), 0
        self.asked += 1
        self.process.tell(request)
        return self.process.hear()

    def end(self) -> None:
        if self.process is not None:
            self.process.end()
        self.process = None


class Process:
    """A process of this module, seen from outside; it is there when it can be told something."""

    def __init__(self, *words: str) -> None:
        environment = os.environ | {
            "CUDA_VISIBLE_DEVICES": "", "RUNTIME": "native", "TORCHDYNAMO_DISABLE": "1",
            "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{REPOSITORY / 'src'}:{REPOSITORY}",
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.stages.warm", *words], env=environment, cwd=REPOSITORY,
            text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self.hear() == "ready"

    def tell(self, request: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def hear(self, seconds: float = 120.0) -> Any:
        assert self.process.stdout is not None
        too_late = threading.Timer(seconds, self.process.kill)
        too_late.start()
        line = self.process.stdout.readline()
        too_late.cancel()
        assert line, f"it ended with {self.process.wait()}"
        return json.loads(line)

    def end(self) -> None:
        """Let it end, and with it what it has started; it does so as well when this one ends."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


class _Job:
    """Stands for the Popen of a job, and runs it here."""

    second: Process | None = None

    def __init__(self, words: list[str], *, stdout: IO[bytes], **_: object) -> None:
        lines = Path(words[-1]).read_text().splitlines()
        exports = [shlex.split(line)[1] for line in lines if line.startswith("export ")]
        *command, plan, attempt = shlex.split(lines[-1])
        job = {
            "plan": plan, "attempt": attempt, "log": stdout.name,
            "two": "torch.distributed.run" in command,
            "threads": int(dict(one.split("=", 1) for one in exports)["OMP_NUM_THREADS"]),
        }  # fmt: skip
        self.pid = os.getpid()
        if not job["two"]:
            self.returncode = run_stage(0, job)
            return
        assert self.second is not None
        Path(plan).with_name("meeting").unlink(missing_ok=True)
        self.second.tell(job)
        # Where this one has failed the other waits for it, and the test ends.
        self.returncode = run_stage(0, job) or self.second.hear()

    def poll(self) -> int:
        return self.returncode


class _Subprocess:
    """The module subprocess as `tanren.launch.local` sees it."""

    Popen, DEVNULL, STDOUT = _Job, subprocess.DEVNULL, subprocess.STDOUT


def run_stage(rank: int, job: dict[str, Any]) -> int:
    """One process of a job."""
    import torch
    import torch.distributed as dist

    from tanren.engine import cpu, distributed, writer
    from tanren.stages.__main__ import main

    torch.set_num_threads(job["threads"])
    with Path(job["log"]).open("a") as log, _as_before(), contextlib.redirect_stderr(log):
        handler = logging.StreamHandler(log)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s"))
        logging.getLogger().handlers = [handler]
        logging.getLogger().setLevel(logging.WARNING if rank else logging.INFO)
        if job["two"]:
            cpu.install()
            store = dist.FileStore(str(Path(job["plan"]).with_name("meeting")), 2)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
        try:
            return main([job["plan"], job["attempt"]])
        finally:
            # A stage that fails leaves these to the end of its process.
            distributed.finalize()
            if writer._waiting is not None:
                unused = writer.take()
                unused.kill()
                unused.wait()


@contextlib.contextmanager
def _as_before() -> Iterator[None]:
    """Take back what a stage does to its process."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    handlers = {number: signal.getsignal(number) for number in numbers}
    loggers = logging.getLogger().handlers
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        logging.getLogger().handlers = loggers


def _command(words: list[str]) -> int:
    """bin/tanren."""
    from tanren import cli

    sys.argv = ["tanren", *words]
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    raise AssertionError("it exits")


def _serve(say: Any) -> None:
    from tanren.launch import local

    here: Any = local
    here.subprocess = _Subprocess
    before = dict(os.environ)
    say("ready")
    for line in sys.stdin:
        request = json.loads(line)
        if _Job.second is None and any(re.match("layout.*=2$", word) for word in request["words"]):
            _Job.second = Process("second")
        os.environ.clear()
        os.environ.update(before | request["environment"])
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = _command(request["words"])
        say({"code": code, "out": out.getvalue(), "err": err.getvalue()})


def _be_second(say: Any) -> None:
    os.environ["RANK"] = "1"
    say("ready")
    for line in sys.stdin:
        say(run_stage(1, json.loads(line)))


def main(words: list[str]) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    from tanren.engine import cpu, eager

    cpu.hide_gpu_libraries()
    # A job begins with it, too, and wants to be the first.
    once: Any = cpu
    once.hide_gpu_libraries = lambda: None
    eager.import_megatron()
    serve = _be_second if words else _serve
    serve(lambda answer: print(json.dumps(answer), file=answers, flush=True))
    if _Job.second is not None:
        _Job.second.end()
    os._exit(0)  # at once: all that is left is seconds of taking down what torch has put up


if __name__ == "__main__":
    main(sys.argv[1:])
