"""What a run folder says: done, failed, stopped, which checkpoints are whole, who works on it.

Used by the command and by the stages alike; standard library and orjson only.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson

from tanren.config.errors import RequestError, TanrenError, WorkError, error_from_dict
from tanren.plan.paths import (
    CHECKPOINT_FILES,
    PARTIAL,
    Part,
    RunFolder,
    iteration_of,
    part_named,
)
from tanren.plan.plan import MidtrainPlan, Plan, TrainingPlan, TuningPlan, digest


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never half."""
    partial = path.with_name(f".{path.name}.{unique()}{PARTIAL}")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def unique() -> str:
    """A part of a file's name that no other living process has, on this node or another."""
    return f"{socket.gethostname()}-{os.getpid()}"


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    option = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE
    write_atomic(path, orjson.dumps(value, option=option))


def read_json(path: Path) -> Any:
    """Read a JSON file; None where there is none."""
    try:
        return orjson.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except orjson.JSONDecodeError as error:
        raise RequestError(
            path, f"is not JSON: {error}", "it was changed by hand or the disk was full: remove it"
        ) from None


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A folder that gets its name when everything in it is written."""
    partial = final.with_name(final.name + PARTIAL)
    old = final.with_name(f"{final.name}.old{PARTIAL}")
    try:
        for left in (partial, old):  # by one that was killed
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if final.exists():
            os.replace(final, old)
        os.replace(partial, final)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise WorkError(
            final, f"cannot be written: {error.strerror}", "make room and run the command again"
        ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def mark_done(folder: RunFolder, result: dict[str, Any]) -> None:
    """Close a run: what it made, for people and for the stages that stand on it."""
    folder.failed.unlink(missing_ok=True)
    folder.stopped.unlink(missing_ok=True)
    write_json(folder.done, result)


def mark_failed(folder: RunFolder, error: TanrenError) -> None:
    """Leave the reason of a failure where the command that waits for it looks."""
    write_json(folder.failed, error.as_dict())


def mark_stopped(folder: RunFolder, reason: str, step: int) -> None:
    """Note that the run stopped early, saved, and can go on."""
    write_json(folder.stopped, {"reason": reason, "step": step})


def result_of(folder: RunFolder) -> dict[str, Any] | None:
    """What a finished run made; None while it is not finished."""
    value = read_json(folder.done)
    assert value is None or isinstance(value, dict), folder.done
    return value


def failure_of(folder: RunFolder) -> TanrenError | None:
    """Why the last attempt failed; None when it did not."""
    value = read_json(folder.failed)
    return error_from_dict(value) if value else None


def parts(folder: RunFolder) -> list[tuple[Part, RunFolder]]:
    """The parts of a run that have folders, in their order."""
    if not folder.parts.is_dir():
        return []
    found = [part_named(path.name) for path in folder.parts.iterdir()]
    ordered = sorted((part.of, part.number) for part in found if part is not None)
    return [(Part(number, of), folder.part(Part(number, of))) for of, number in ordered]


def write_file_list(checkpoint: Path) -> int:
    """Write down every file of a finished checkpoint with its size; all of them in bytes."""
    sizes = {
        str(path.relative_to(checkpoint)): path.stat().st_size
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != CHECKPOINT_FILES
    }
    write_json(checkpoint / CHECKPOINT_FILES, sizes)
    return sum(sizes.values())


def checkpoint_problem(checkpoint: Path, *, foreign: bool = False) -> str | None:
    """What is wrong with a checkpoint folder; None when every file has its whole size.

    Args:
        foreign: it may be Megatron-LM's, which lists no files: the two without which megatron-core
            cannot read are looked for then.
    """
    listed = checkpoint / CHECKPOINT_FILES
    if not listed.exists():
        needed = ("metadata.json", ".metadata") if foreign else (CHECKPOINT_FILES,)
        absent = [name for name in needed if not (checkpoint / name).exists()]
        return f"the file {absent[0]} is missing" if absent else None
    for name, size in read_json(listed).items():
        file = checkpoint / name
        if not file.exists():
            return f"the file {name} is missing"
        if file.stat().st_size != size:
            return f"the file {name} has {file.stat().st_size} bytes of {size}"
    return None


def iterations(folder: RunFolder) -> tuple[int, ...]:
    """The checkpoints under their final names, oldest first. Half-written ones have another."""
    if not folder.checkpoints.is_dir():
        return ()
    found = (iteration_of(path) for path in folder.checkpoints.iterdir())
    return tuple(sorted(number for number in found if number is not None))


def total_steps(plan: Plan | TrainingPlan) -> int | None:
    """Steps of a whole training; None for other stages, and before sft or dpo read its data."""
    if isinstance(plan, MidtrainPlan):
        return plan.batch.steps
    if isinstance(plan, TuningPlan):
        laid_out = read_json(plan.folder.examples) or {}
        same = laid_out.get("settings") == digest(plan.settings)
        return plan.steps or (laid_out.get("steps") if same else None)
    return None


def check_checkpoint(folder: RunFolder, iteration: int) -> Path:
    """The folder of a checkpoint, after making sure that it is whole.

    Raises:
        RequestError: it is not; the message names the file and what to do.
    """
    checkpoint = folder.checkpoint(iteration)
    if not checkpoint.is_dir():
        there = ", ".join(str(i) for i in iterations(folder)) or "none"
        raise RequestError(checkpoint, "there is no such checkpoint", f"there are: {there}")
    problem = checkpoint_problem(checkpoint)
    if problem:
        whole = [
            i for i in iterations(folder)
            if i != iteration and checkpoint_problem(folder.checkpoint(i)) is None
        ]  # fmt: skip
        rest = (
            f"the run then goes on from iteration {whole[-1]}, which is whole"
            if whole
            else "no other checkpoint is there: the stage starts anew"
        )
        raise RequestError(checkpoint, problem, f"rm -r {checkpoint}   ({rest})")
    return checkpoint


def latest_checkpoint(folder: RunFolder) -> int | None:
    """The newest checkpoint, made sure to be whole; None where there is none."""
    found = iterations(folder)
    if not found:
        return None
    check_checkpoint(folder, found[-1])
    return found[-1]


def append_line(path: Path, value: dict[str, Any]) -> None:
    """Append one JSON line in one write, after closing a line that a crash left open."""
    line = orjson.dumps(value) + b"\n"
    with path.open("ab+") as file:
        if file.tell() and file.seek(-1, os.SEEK_END) is not None and file.read(1) != b"\n":
            line = b"\n" + line
        file.write(line)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every whole JSON line of a file; torn ones (a crash in mid-write) are left out."""
    return json_lines(path.read_bytes()) if path.exists() else []


def json_lines(block: bytes) -> list[dict[str, Any]]:
    """The objects in a block of JSON lines; lines that are torn, or no object, are left out."""
    values = []
    for line in block.splitlines():
        try:
            value = orjson.loads(line)
        except orjson.JSONDecodeError:
            continue
        if isinstance(value, dict):
            values.append(value)
    return values


def curve(path: Path, key: str) -> dict[int, float]:
    """A metric by step. Steps that were run again after a resume count once, the last time."""
    return {line["step"]: line[key] for line in read_lines(path) if "step" in line and key in line}


def is_locked(path: Path) -> bool:
    """Whether some process on this machine holds the lock."""
    if not path.exists():
        return False
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in (errno.EAGAIN, errno.EACCES)
        return False


def make(folder: RunFolder) -> None:
    """Make a run's folder.

    Raises:
        RequestError: it cannot be made.
    """
    try:
        folder.root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(
            folder.root, f"cannot be made: {error.strerror}",
            "RUNS=/another/folder, or runs in user.toml, says where run folders go",
        ) from None  # fmt: skip


@contextmanager
def locked(path: Path, *, wait_seconds: float = 0.0) -> Iterator[int]:
    """Hold an exclusive lock on a file, shared with the processes that inherit it.

    Yields:
        the lock's file descriptor, to be passed on to child processes.
    Raises:
        RequestError: another process holds it; the message says which.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        deadline = time.monotonic() + wait_seconds
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    # A file system without locks (some Lustre mounts): go on without.
                    break
                if time.monotonic() < deadline:
                    time.sleep(0.2)
                    continue
                holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
                raise RequestError(
                    path.parent,
                    f"is being worked on by {holder or 'another process'}",
                    "wait for it, or end it first",
                ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def scores_of(folder: RunFolder) -> list[dict[str, Any]]:
    """The scores that an evaluation found; of a training those of its newest evaluated export."""
    for place in (folder.scores, folder.evaluation.scores):
        found = read_json(place)
        if found is not None:
            scores: list[dict[str, Any]] = found["scores"]
            return scores
    return []
