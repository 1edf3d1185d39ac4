"""`python -m tanren.stages RUN/plan.json ATTEMPT`: runs one stage in this process.

torchrun starts one of these a GPU. The outcome is left in the run folder (DONE, FAILED or
STOPPED), where the command that waits finds it.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import time
import traceback
import warnings
from pathlib import Path

from tanren import runs
from tanren.config.errors import TanrenError, WorkError
from tanren.plan.paths import RunFolder
from tanren.plan.plan import read_plan


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
        if plan.launch.engine and plan.launch.device == "cpu":
            from tanren.engine import cpu

            cpu.hide_gpu_libraries()
        stage = importlib.import_module(f"tanren.stages.{plan.stage}")
        if rank == 0:
            with runs.locked(folder.root / ".worker", wait_seconds=60):
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
        return WorkError(
            error.filename or folder.root,
            error.strerror or str(error),
            "mend that and run the same command again",
        )
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
    return WorkError(
        folder.root,
        f"{type(error).__name__}: {first_line}",
        f"the whole trace is in {folder.log(attempt)}",
    )


def _end_with_the_launcher() -> None:
    """Ask the kernel for SIGTERM when the parent dies, so that no training is left behind."""
    import ctypes
    import signal

    pr_set_pdeathsig = 1
    try:
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGTERM)
    except (OSError, AttributeError):
        logging.getLogger("tanren").debug("no prctl on this system")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
