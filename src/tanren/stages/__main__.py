"""`python -m tanren.stages RUN/plan.json ATTEMPT`: runs one stage in this process.

torchrun starts one of these a GPU. The outcome is left in the run folder (DONE, FAILED or
STOPPED), where the command that waits finds it.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path

import psutil

from tanren import linux, provenance, runs
from tanren.config.errors import TanrenError, WorkError, of_system
from tanren.plan.paths import RunFolder
from tanren.plan.plan import TrainingPlan, read_plan
from tanren.stages.process import facts


def main(arguments: list[str]) -> int:
    plan_file, attempt = Path(arguments[0]), int(arguments[1])
    rank = int(os.environ.get("RANK", "0"))
    _end_with_the_launcher()
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format="%(asctime)s %(levelname).1s " + (f"[rank {rank}] " if rank else "") + "%(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    if not os.environ.get("TANREN_DEBUG"):
        # What torch and megatron-core say of themselves hides what a person looks for in a log.
        warnings.simplefilter("ignore")
        logging.getLogger("megatron").setLevel(logging.WARNING)
        logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)
    folder = RunFolder(plan_file.parent)
    try:
        plan = read_plan(plan_file)
        if plan.launch.engine:
            if plan.launch.device == "cpu":
                from tanren.engine import cpu

                cpu.hide_gpu_libraries()
            if plan.launch.own != "nemo":
                from tanren.engine import eager, writer

                if isinstance(plan, TrainingPlan):
                    writer.fork_early()
                eager.import_megatron()
            elif plan.launch.device == "cpu":
                from tanren.stages.nemo import cpu as nemo_cpu

                nemo_cpu.install()
        stage = importlib.import_module(f"tanren.stages.{plan.stage}")
        if rank == 0:
            with runs.locked(folder.root / ".worker", wait_seconds=60):
                provenance.note(folder, attempt, {"process": facts()})
                stage.run(plan, attempt)
        else:
            stage.run(plan, attempt)
    except TanrenError as error:
        traceback.print_exc()
        _leave(folder, error)
        return error.exit_code
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # nothing may end without a word; torch has some of these, too
        traceback.print_exc()
        _leave(folder, _unforeseen(folder, error, attempt))
        return 1
    return 0


def _leave(folder: RunFolder, error: TanrenError) -> None:
    """Write FAILED; one rank has the reason, and the others fail because of it.

    When all fail at once, the first has it. When another fails alone, the first notices only when
    that one ends, which is after it has written.
    """
    if os.environ.get("RANK", "0") != "0":
        deadline = time.monotonic() + 3
        while not folder.failed.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
    if not folder.failed.exists():
        try:
            runs.mark_failed(folder, error)
        except OSError:
            traceback.print_exc()


def _unforeseen(folder: RunFolder, error: BaseException, attempt: int) -> TanrenError:
    if isinstance(error, OSError) and error.errno:
        return of_system(error, folder.root)
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
    return WorkError(
        folder.root,
        f"{type(error).__name__}: {first_line}",
        f"the whole trace is in {folder.log(attempt)}",
    )


# What torchrun gives its workers, too.
_GRACE_SECONDS = 30.0


def _end_with_the_launcher() -> None:
    """Save and end when the parent dies, so that no training is left behind.

    The kernel sends SIGTERM then. A step that does not end within the grace, or a save, is cut off:
    on a cluster the job is over, and the node may be another's.
    """
    parent = os.getppid()
    linux.signal_at_parents_end(signal.SIGTERM)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        time.sleep(_GRACE_SECONDS)
        here = psutil.Process()
        for process in [*here.children(recursive=True), here]:
            with contextlib.suppress(psutil.Error):
                process.kill()

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
