"""The process that writes a rank's checkpoints, forked off the trainer.

It knows no GPU and joins no process group: the trainer leaves the tensors in memory that both see,
and this process widens them, writes them and, that of the first rank, publishes the checkpoint. It
runs beside the training at a low priority, and ends when the trainer does, however that ends.

A stage forks it before there are GPUs and process groups: with torch imported and little else. A
Python of its own would import all that a second time, which is seconds and some hundred megabytes a
rank just when the training begins.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import mmap
import os
import pickle
import queue
import shutil
import signal
import threading
import traceback
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import torch

from tanren import linux, runs
from tanren.convert.tensors import Stored
from tanren.convert.torch_dist import Record, metadata, shares
from tanren.engine.boxes import Chunk, join
from tanren.plan.paths import PARTIAL, RunFolder

# Threads of a rank, each with a file of its own.
THREADS = 4


@dataclass(frozen=True)
class Item:
    """A box to be written, and where its values lie in the shared memory, in bytes.

    With `remainder` the values are bf16 weights, and what is written are their fp32 masters.
    """

    chunk: Chunk
    kept: torch.dtype
    written: torch.dtype
    place: int
    remainder: int | None = None


@dataclass(frozen=True)
class Memory:
    """How long the shared memory is, and what lies where in it: told once, for every save."""

    size: int
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Write:
    """Write a rank's part.

    Args:
        blobs: objects of megatron-core's checkpoints, pickled, by their keys.
        files: whole files, by their names.
    """

    folder: Path
    rank: int
    blobs: dict[str, bytes]
    files: dict[str, bytes]


@dataclass(frozen=True)
class Publish:
    """Every rank's part is there: give the checkpoint its name.

    Args:
        written: what each rank wrote where (`Written.records`).
    """

    root: Path
    iteration: int
    written: tuple[bytes, ...]
    keep_last: int
    keep_every: int | None


@dataclass(frozen=True)
class Written:
    """A rank's part is on the disk. `records`: pickled and compressed, a `Record` a box."""

    records: bytes


@dataclass(frozen=True)
class Published:
    """The checkpoint has its name; the size of its files in bytes."""

    size: int


@dataclass(frozen=True)
class Failed:
    """What went wrong: the disk, in a person's words, or an error of ours with its trace."""

    reason: str
    trace: str | None = None


class Writer:
    """Does what it is told, one thing after the other."""

    def __init__(self, memory: int) -> None:
        """Take the file descriptor of the shared memory."""
        self.descriptor = memory
        self.shared: mmap.mmap | None = None
        self.items: tuple[Item, ...] = ()

    def do(self, order: Memory | Write | Publish) -> Written | Published | None:
        if isinstance(order, Memory):
            self.items = order.items
            if order.size:
                # Its pages come to be here, so that the trainer need not wait for them.
                flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
                self.shared = mmap.mmap(self.descriptor, order.size, flags=flags)
            return None
        if isinstance(order, Write):
            return self.write(order)
        return publish(order)

    def write(self, order: Write) -> Written:
        """Write this rank's files: each thread has one."""
        order.folder.mkdir(parents=True, exist_ok=True)
        for name, content in order.files.items():
            runs.write_atomic(order.folder / name, content)
        jobs = [
            (order.folder / f"__{order.rank}_{number}.distcp", items)
            for number, items in enumerate(shares(self.items, THREADS, _size))
        ]
        records: list[Record] = []
        with ThreadPoolExecutor(THREADS) as pool:
            done = [
                pool.submit(self._write_file, path, items, order.blobs if not number else {})
                for number, (path, items) in enumerate(jobs)
                if items or (order.blobs and not number)
            ]
            for one in done:
                records += one.result()
        return Written(zlib.compress(pickle.dumps(records), 1))

    def _write_file(self, path: Path, items: list[Item], blobs: dict[str, bytes]) -> list[Record]:
        records = []
        with path.open("wb") as stream:
            for key, blob in blobs.items():
                records.append(Record(key, path.name, stream.tell(), len(blob)))
                stream.write(blob)
            for item in items:
                offset = stream.tell()
                torch.save(self._values(item), stream)
                length = stream.tell() - offset
                chunk = item.chunk
                stored = Stored(chunk.shape, item.written)
                records.append(
                    Record(
                        chunk.name, path.name, offset, length, stored, chunk.offsets, chunk.sizes
                    )
                )
            stream.flush()
            os.fsync(stream.fileno())
        return records

    def _values(self, item: Item) -> torch.Tensor:
        count = item.chunk.numel

        def at(place: int, dtype: torch.dtype) -> torch.Tensor:
            assert self.shared is not None
            return torch.frombuffer(self.shared, dtype=dtype, count=count, offset=place)

        values = at(item.place, item.kept)
        if item.remainder is not None:
            values = join(values, at(item.remainder, torch.int16))
        return values.to(item.written).view(item.chunk.sizes)


def _size(item: Item) -> int:
    return item.chunk.numel * item.written.itemsize


def publish(order: Publish) -> Published:
    """Write down what is where, name the folder, move the tracker, prune."""
    partial = partial_of(RunFolder(order.root).checkpoint(order.iteration))
    records = [one for each in order.written for one in pickle.loads(zlib.decompress(each))]
    runs.write_atomic(partial / ".metadata", pickle.dumps(metadata(records)))
    return settle(order)


def partial_of(checkpoint: Path) -> Path:
    """Where a checkpoint is written, before it has its name."""
    return checkpoint.with_name(checkpoint.name + PARTIAL)


def settle(order: Publish) -> Published:
    """Name the folder of a checkpoint whose files are all there, move the tracker, prune."""
    folder = RunFolder(order.root)
    final = folder.checkpoint(order.iteration)
    partial = partial_of(final)
    size = runs.write_file_list(partial)
    if final.exists():
        remove(final)
    os.replace(partial, final)
    runs.write_atomic(folder.latest, f"{order.iteration}".encode())
    for old in superfluous(runs.iterations(folder), order):
        remove(folder.checkpoint(old))
    return Published(size)


def superfluous(there: tuple[int, ...], order: Publish) -> list[int]:
    """Which checkpoints go; iteration 0, the base, stays."""
    trained = [one for one in there if 0 < one <= order.iteration]
    every = order.keep_every
    return [one for one in trained[: -order.keep_last] if every is None or one % every]


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint so that a kill half-way leaves nothing under its final name."""
    going = checkpoint.with_name(checkpoint.name + ".old" + PARTIAL)
    shutil.rmtree(going, ignore_errors=True)
    os.replace(checkpoint, going)
    shutil.rmtree(going, ignore_errors=True)


def reason(error: BaseException) -> str:
    """The reason of a failed save in a person's words, from anywhere in the chain of causes."""
    text = f"{error!r} {error}"
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
        if os.strerror(code) in text or f"Errno {code}]" in text:
            return os.strerror(code)
    if "unexpected pos" in text:
        # torch's archive writer noticed first; the system's own word is lost.
        return "the disk took fewer bytes than were written: it is full, or over its quota"
    cause = error.__cause__ or error.__context__
    if cause is not None and cause is not error:
        return reason(cause)
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def _work(orders: queue.SimpleQueue[Any], writer: Writer, trainer: Connection) -> None:
    while True:
        order = orders.get()
        try:
            answer: Any = writer.do(order)
        except (OSError, RuntimeError) as error:
            answer = Failed(reason(error))
        except BaseException as error:  # the trainer must hear of it, and ends
            answer = Failed(reason(error), traceback.format_exc())
        if answer is not None:
            trainer.send(answer)


def _serve(trainer: Connection, memory: int, parent: int) -> NoReturn:
    """The whole life of the process."""
    # Nothing that the trainer had open is to stay open for this one's sake, nor be closed late.
    gc.freeze()
    kept = {0, 1, 2, trainer.fileno(), memory}
    for descriptor in {int(path.name) for path in Path("/proc/self/fd").iterdir()} - kept:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    linux.rename("tanren-writer")
    # What loads data was forked off the trainer, too, and holds the other end of the pipe: of a
    # killed trainer this process hears late by it, and might still write what the next one clears.
    linux.end_with(parent)
    os.nice(10)
    torch.set_num_threads(1)
    orders: queue.SimpleQueue[Any] = queue.SimpleQueue()
    # In a thread, so that this one sees at once that the trainer is gone.
    threading.Thread(target=_work, args=(orders, Writer(memory), trainer), daemon=True).start()
    try:
        while (order := trainer.recv()) is not None:
            orders.put(order)
    except (EOFError, OSError):
        os._exit(1)
    os._exit(0)


class Process:
    """A writer as its trainer sees it."""

    def __init__(self) -> None:
        """Fork it.

        Attributes:
            connection: takes orders, gives answers; None ends it.
            memory: the file descriptor of what both see, of no size yet.
        """
        self.memory = os.memfd_create("tanren-checkpoint")
        self.connection, theirs = Pipe()
        self.code: int | None = None
        here = os.getpid()
        with _deaf_to_signals():
            self.pid = os.fork()
            if not self.pid:
                try:
                    _serve(theirs, self.memory, here)
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(1)
        theirs.close()

    def poll(self) -> int | None:
        """Its exit code, negative for the signal that killed it; None while it runs."""
        return self._wait(os.WNOHANG)

    def wait(self) -> None:
        """Wait for its end."""
        self._wait(0)

    def kill(self) -> None:
        """End it at once."""
        if self.code is None:
            os.kill(self.pid, signal.SIGKILL)

    def _wait(self, how: int) -> int | None:
        if self.code is None:
            try:
                pid, status = os.waitpid(self.pid, how)
            except ChildProcessError:  # where SIGCHLD is ignored, nobody hears how it ended
                pid, status = self.pid, 0
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code


# The one that a stage has forked at its begin.
_waiting: Process | None = None


def fork_early() -> None:
    """Fork a writer for a saver to come, while this process has nothing to share by mistake."""
    global _waiting
    if _waiting is None:
        _waiting = Process()


def take() -> Process:
    """The writer that was forked early, else one that is forked now."""
    global _waiting
    process, _waiting = _waiting or Process(), None
    return process


@contextlib.contextmanager
def _deaf_to_signals() -> Iterator[None]:
    """Start a process that a request to stop does not reach.

    Schedulers and torchrun send SIGTERM to the whole process group. The trainer takes it as a
    request to save; the process that does the saving would die of it. A blocked signal stays
    pending here and is inherited as blocked there, so none is lost.
    """
    requests = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, requests)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
