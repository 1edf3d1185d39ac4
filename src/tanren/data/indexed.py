"""Megatron's .bin/.idx token files, byte-identical to what its own builder writes.

Their layout is in `tanren.tokenfiles`. Here every document is one sequence.
"""

from __future__ import annotations

import shutil
from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tanren.config.errors import RequestError
from tanren.plan.paths import PARTIAL
from tanren.tokenfiles import (
    AGAIN,
    HEADER,
    HEADER_BYTES,
    MAGIC,
    Counts,
    bin_path,
    count,
    idx_path,
)

__all__ = ["Counts", "Writer", "bin_path", "check", "idx_path", "join", "token_type", "write"]

_TYPES: dict[int, np.dtype[Any]] = {4: np.dtype("<i4"), 8: np.dtype("<u2")}


def token_type(vocabulary_size: int) -> np.dtype[Any]:
    """Megatron's rule: two bytes a token under 65,500 pieces, else four."""
    return _TYPES[8] if vocabulary_size < 65500 else _TYPES[4]


class Writer:
    """Writes one pair of files; they get their names when both are whole."""

    def __init__(self, prefix: Path, vocabulary_size: int) -> None:
        self.prefix, self.vocabulary_size = prefix, vocabulary_size
        self.dtype = token_type(vocabulary_size)
        self.lengths = array("i")
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._bin = _partial(bin_path(prefix)).open("wb")

    def add(self, pieces: Sequence[npt.NDArray[Any]], lengths: Sequence[int]) -> None:
        """Append documents of these lengths, whose token ids are the pieces joined."""
        if not pieces:
            return
        tokens = np.concatenate(pieces)
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self.vocabulary_size:
            raise OverflowError(
                f"tokens {tokens.min()} to {tokens.max()} of a vocabulary of {self.vocabulary_size}"
            )
        self._bin.write(tokens.astype(self.dtype, copy=False).tobytes())
        self.lengths.extend(lengths)

    def close(self) -> Counts:
        """Write the index and give both files their names."""
        self._bin.close()
        lengths = np.frombuffer(self.lengths, dtype=np.int32)
        _write_index(self.prefix, self.dtype, len(lengths), lambda: [lengths])
        for path in (bin_path(self.prefix), idx_path(self.prefix)):
            _partial(path).replace(path)
        return Counts(len(lengths), int(lengths.sum(dtype=np.int64)))


def _write_index(
    prefix: Path, dtype: np.dtype[Any], documents: int,
    parts: Callable[[], Iterable[npt.NDArray[np.int32]]],
) -> None:  # fmt: skip
    """Write the index of documents whose lengths come in parts, one part in memory at a time.

    Args:
        parts: gives the parts anew at each call.
    """
    code = next(code for code, known in _TYPES.items() if known == dtype)
    with _partial(idx_path(prefix)).open("wb") as file:
        file.write(MAGIC)
        file.write(HEADER.pack(1, code, documents, documents + 1))
        for part in parts():
            file.write(part.astype("<i4", copy=False).tobytes())
        offset = 0
        for part in parts():
            ends = np.cumsum(part, dtype="<i8")
            file.write(((ends - part + offset) * dtype.itemsize).astype("<i8").tobytes())
            offset += int(ends[-1]) if len(ends) else 0
        first = 0
        for part in parts():
            file.write(np.arange(first, first + len(part), dtype="<i8").tobytes())
            first += len(part)
        file.write(np.int64(documents).astype("<i8").tobytes())


def join(
    prefix: Path, shards: Sequence[Path], vocabulary_size: int, run: Callable[..., Any] = map
) -> Counts:
    """Make one pair of files of several, in their order. They are copied, and stay.

    Args:
        shards: prefixes of whole pairs (see `check`) of this vocabulary.
        run: `map`, or that of a pool: the shards are copied independently of each other.
    """
    dtype = token_type(vocabulary_size)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    counts = [count(shard) for shard in shards]
    documents = [one.documents for one in counts]
    _write_index(prefix, dtype, sum(documents), lambda: map(_lengths, shards, documents))
    *starts, size = accumulate((one.tokens * dtype.itemsize for one in counts), initial=0)
    whole = _partial(bin_path(prefix))
    with whole.open("wb") as file:
        file.truncate(size)
    list(run(_copy_into, [whole] * len(shards), [bin_path(s) for s in shards], starts))
    for path in (bin_path(prefix), idx_path(prefix)):
        _partial(path).replace(path)
    return Counts(sum(documents), sum(one.tokens for one in counts))


def _lengths(prefix: Path, documents: int) -> npt.NDArray[np.int32]:
    """The lengths of a pair's documents."""
    return np.fromfile(idx_path(prefix), dtype="<i4", count=documents, offset=HEADER_BYTES)


def _copy_into(whole: Path, part: Path, start: int) -> None:
    with whole.open("r+b") as out, part.open("rb") as file:
        out.seek(start)
        shutil.copyfileobj(file, out, 16 << 20)


def _partial(path: Path) -> Path:
    return path.with_name(path.name + PARTIAL)


def check(prefix: Path) -> Counts:
    """Count the documents and tokens of a pair of files, making sure that both are whole.

    Raises:
        RequestError: a file is missing, truncated, or not Megatron's.
    """
    counts, idx = count(prefix), idx_path(prefix)
    total = int(_lengths(prefix, counts.documents).sum(dtype=np.int64))
    if total != counts.tokens:
        raise RequestError(
            idx, f"has lengths of {total} tokens, and {counts.tokens} by its offsets", AGAIN
        )
    return counts


def write(prefix: Path, documents: Iterable[Sequence[int]], vocabulary_size: int) -> Counts:
    """Write documents of token ids as PREFIX.bin and PREFIX.idx."""
    writer = Writer(prefix, vocabulary_size)
    for document in documents:
        writer.add([np.asarray(document, dtype=np.int64)], [len(document)])
    return writer.close()
