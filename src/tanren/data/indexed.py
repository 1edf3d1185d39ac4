"""Megatron's .bin/.idx token files, byte-identical to what its own builder writes.

Layout of .idx (little endian): the magic, version 1 (u64), the type code (u8), the number of
sequences (u64), the number of document marks (u64), then lengths (i32), byte offsets (i64) and
document marks (i64). Here every document is one sequence. (megatron-core 0.16.1,
datasets/indexed_dataset.py)
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tanren.config.errors import RequestError
from tanren.plan.paths import PARTIAL

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<QBQQ")
_TYPES: dict[int, np.dtype[Any]] = {4: np.dtype("<i4"), 8: np.dtype("<u2")}


def bin_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".idx")


def token_type(vocabulary_size: int) -> np.dtype[Any]:
    """Megatron's rule: two bytes a token under 65,500 pieces, else four."""
    return _TYPES[8] if vocabulary_size < 65500 else _TYPES[4]


@dataclass(frozen=True)
class Counts:
    documents: int
    tokens: int


class Writer:
    """Writes one pair of files; they get their names when both are whole."""

    def __init__(self, prefix: Path, vocabulary_size: int) -> None:
        self.prefix = prefix
        self.dtype = token_type(vocabulary_size)
        self.lengths: list[int] = []
        self._bin = _partial(bin_path(prefix)).open("wb")

    def add(self, tokens: list[int]) -> None:
        """Append one document."""
        self._bin.write(np.asarray(tokens, dtype=self.dtype).tobytes())
        self.lengths.append(len(tokens))

    def close(self) -> Counts:
        """Write the index and give both files their names."""
        self._bin.close()
        lengths = np.asarray(self.lengths, dtype="<i4")
        offsets = np.zeros(len(lengths), dtype="<i8")
        np.cumsum(lengths[:-1], dtype="<i8", out=offsets[1:])
        code = next(code for code, dtype in _TYPES.items() if dtype == self.dtype)
        with _partial(idx_path(self.prefix)).open("wb") as file:
            file.write(_MAGIC)
            file.write(_HEADER.pack(1, code, len(lengths), len(lengths) + 1))
            file.write(lengths.tobytes())
            file.write((offsets * self.dtype.itemsize).tobytes())
            file.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())
        for path in (bin_path(self.prefix), idx_path(self.prefix)):
            _partial(path).replace(path)
        return Counts(len(lengths), int(lengths.sum(dtype=np.int64)))


def _partial(path: Path) -> Path:
    return path.with_name(path.name + PARTIAL)


def check(prefix: Path) -> Counts:
    """Count the documents and tokens of a pair of files, making sure that both are whole.

    Raises:
        RequestError: a file is missing, truncated, or not Megatron's.
    """
    again = "make the tokens again: remove the preprocess run folder and run make preprocess"
    idx, tokens = idx_path(prefix), bin_path(prefix)
    for path in (idx, tokens):
        if not path.is_file():
            raise RequestError(path, "is missing", again)
    size = idx.stat().st_size
    with idx.open("rb") as file:
        head = file.read(len(_MAGIC) + _HEADER.size)
        if not head.startswith(_MAGIC) or len(head) < len(_MAGIC) + _HEADER.size:
            raise RequestError(idx, "is not a Megatron index (its first bytes differ)", again)
        version, code, sequences, marks = _HEADER.unpack(head[len(_MAGIC) :])
        if version != 1:
            raise RequestError(idx, f"is version {version}; known is 1", again)
        if code not in _TYPES:
            raise RequestError(idx, f"holds tokens of type {code}; known are 4 and 8", again)
        expected = len(head) + sequences * (4 + 8) + marks * 8
        if size != expected:
            raise RequestError(idx, f"has {size} bytes, and its header says {expected}", again)
        lengths = np.fromfile(file, dtype="<i4", count=sequences)
    total = int(lengths.sum(dtype=np.int64))
    wanted, found = total * _TYPES[code].itemsize, tokens.stat().st_size
    if wanted != found:
        raise RequestError(tokens, f"has {found} bytes, and its index says {wanted}", again)
    return Counts(int(sequences), total)


def write(prefix: Path, documents: Iterable[list[int]], vocabulary_size: int) -> Counts:
    """Write documents of token ids as PREFIX.bin and PREFIX.idx."""
    writer = Writer(prefix, vocabulary_size)
    for document in documents:
        writer.add(document)
    return writer.close()
