"""Sources to token files on all cores: units to shards by workers, shards joined in input order.

The result does not depend on the number of workers, nor on how often it was interrupted.
"""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tanren import linux, runs
from tanren.config.data import Source
from tanren.config.errors import RequestError, WorkError
from tanren.data import indexed, shards, tokenizer
from tanren.data.documents import UNIT_BYTES, Unit, units
from tanren.data.shards import Settings, Shard

logger = logging.getLogger("tanren")


@dataclass(frozen=True)
class Made:
    """The token files of one source."""

    name: str
    documents: int
    tokens: int
    empty: int
    skipped: int
    # Of the shards that it was joined from: content, tokenizer and settings.
    digest: str


@dataclass
class Progress:
    """How far the work is, for whoever watches."""

    doing: str
    done: int
    total: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Job:
    """What is to be tokenized, where to, and by how many.

    `shards` is a folder for what is half done; `prefixes` say where each source's files go.
    """

    sources: tuple[Source, ...]
    prefixes: tuple[Path, ...]
    tokenizer: Path
    settings: Settings
    shards: Path
    workers: int
    unit_bytes: int = UNIT_BYTES


def cores() -> int:
    """The cores that this process may use, as the scheduler has given them."""
    return len(os.sched_getaffinity(0))


def run(job: Job, watch: Callable[[Progress], None]) -> list[Made]:
    """Tokenize the sources of a job; their files appear when all are whole.

    Raises:
        RequestError: a source is not there or holds no text, or a line is no document.
        WorkError: a worker was killed. What was finished is kept for the next call.
    """
    cut = [units(source, job.unit_bytes) for source in job.sources]
    vocabulary = tokenizer.read(job.tokenizer).size
    with _pool(job) as pool, _disk_errors(job):
        made = iter(_shards(job, pool, [unit for pieces in cut for unit in pieces], watch))
        of_source = [[next(made) for _ in pieces] for pieces in cut]
        for source, mine in zip(job.sources, of_source, strict=True):
            if not sum(shard.documents for shard in mine):
                raise no_text(source)
        joined = [
            _join(job, number, mine, vocabulary, pool) for number, mine in enumerate(of_source)
        ]
    for path in job.shards.iterdir():
        path.unlink()
    job.shards.rmdir()
    return joined


def by_hand(
    path: str, tokenizer_path: Path, prefix: Path, settings: Settings, *, text_key: str,
    workers: int, watch: Callable[[Progress], None],
) -> Made:  # fmt: skip
    """Tokenize files that no recipe names.

    Raises:
        RequestError: as `run`; or another process is at the same files, or there is no BOS.
    """
    found = tokenizer.read(tokenizer_path)
    if settings.prepend_bos and found.bos is None:
        raise RequestError(tokenizer_path, "names no bos_token", "leave --prepend-bos out")
    source = Source(name=prefix.name, path=path, text_key=text_key)
    job = Job(
        sources=(source,), prefixes=(prefix,), tokenizer=tokenizer_path, settings=settings,
        shards=prefix.with_name(f"{prefix.name}.shards"), workers=workers,
    )  # fmt: skip
    units(source)  # a source that is not there leaves nothing behind
    with runs.locked(job.shards / ".lock"):
        [made] = run(job, watch)
    return made


def no_text(source: Source) -> RequestError:
    return RequestError(
        source.path or source.name,
        f"source {source.name} holds no text: every document is empty or there is none",
        "check the source's path and text_key",
    )


def run_part(job: Job, part: int, parts: int, watch: Callable[[Progress], None]) -> int:
    """Make every `parts`-th shard of a job, for `run` to find; returns how many they are."""
    every = [unit for source in job.sources for unit in units(source, job.unit_bytes)]
    with _pool(job) as pool, _disk_errors(job):
        return len(_shards(job, pool, every[part::parts], watch))


def _shards(
    job: Job, pool: ProcessPoolExecutor, pieces: list[Unit], watch: Callable[[Progress], None]
) -> list[Shard]:
    """Have the shards of these units made; in the units' order."""
    began = time.monotonic()
    asked = {pool.submit(_make, unit): unit for unit in pieces}
    done = tokens = 0
    try:
        for future in as_completed(asked):
            tokens += future.result().tokens
            done += 1
            watch(Progress(
                asked[future].source.name, done, len(asked), tokens, time.monotonic() - began
            ))  # fmt: skip
    except BrokenProcessPool:
        raise WorkError(
            job.shards,
            "a worker was killed, for lack of memory as a rule",
            f"run the same command again: {done} of {len(asked)} shards are kept; with fewer "
            "workers if it happens again",
        ) from None
    return [future.result() for future in asked]


def _join(
    job: Job, number: int, made: list[Shard], vocabulary: int, pool: ProcessPoolExecutor
) -> Made:
    source, prefix = job.sources[number], job.prefixes[number]
    counts = indexed.join(prefix, [job.shards / shard.key for shard in made], vocabulary, pool.map)
    skipped = sum(shard.skipped for shard in made)
    if skipped:
        log = prefix.with_name(f"{prefix.name}.skipped.jsonl")
        parts = [shards.skipped_path(job.shards, s.key) for s in made if s.skipped]
        runs.write_atomic(log, b"".join(part.read_bytes() for part in parts))
        logger.warning("%s: %d lines were passed over; %s names them", source.name, skipped, log)
    result = Made(
        name=source.name,
        documents=counts.documents,
        tokens=counts.tokens,
        empty=sum(shard.empty for shard in made),
        skipped=skipped,
        digest=hashlib.sha256(" ".join(shard.key for shard in made).encode()).hexdigest(),
    )
    logger.info(
        "%s: %d documents, %d tokens (%d empty documents, %d lines passed over)",
        result.name, result.documents, result.tokens, result.empty, result.skipped,
    )  # fmt: skip
    return result


@contextmanager
def _disk_errors(job: Job) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WorkError(
            error.filename or job.shards,
            error.strerror or str(error),
            "make room, or mend what it says, and run the same command again: finished shards in "
            f"{job.shards} are kept",
        ) from error


@contextmanager
def _pool(job: Job) -> Iterator[ProcessPoolExecutor]:
    """Workers with their tokenizer; they end with this process, however it ends."""
    job.shards.mkdir(parents=True, exist_ok=True)
    arguments = (job.tokenizer, job.settings, job.shards, os.getpid())
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(job.workers, context, _begin, arguments)
    try:
        yield pool
    except BaseException:
        # What they are at is in vain, and may take long.
        for worker in multiprocessing.active_children():
            worker.kill()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# In a worker --------------------------------------------------------------------------------------

_maker: shards.Maker | None = None


def _begin(folder: Path, settings: Settings, shards_folder: Path, parent: int) -> None:
    """Get a worker ready: its tokenizer, one thread, and an end with its parent."""
    global _maker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"
    # Ctrl-C reaches the whole group: the parent alone says what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    linux.end_with(parent)
    _maker = shards.Maker(tokenizer.read(folder), settings, shards_folder)


def _make(unit: Unit) -> Shard:
    assert _maker is not None
    return _maker(unit)
