"""Megatron's .bin/.idx token files as far as they can be looked at without numpy: their counts.

Layout of .idx (little endian): the magic, version 1 (u64), the type code (u8), the number of
sequences (u64), the number of document marks (u64), then lengths (i32), byte offsets (i64) and
document marks (i64). (megatron-core 0.16.1, datasets/indexed_dataset.py)
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from tanren.config.errors import RequestError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<QBQQ")
HEADER_BYTES = len(MAGIC) + HEADER.size
# Bytes of a token by its type code.
TOKEN_BYTES = {4: 4, 8: 2}
AGAIN = "make the tokens again: remove the preprocess run folder and run make preprocess"


def bin_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".idx")


@dataclass(frozen=True)
class Counts:
    documents: int
    tokens: int


def count(prefix: Path) -> Counts:
    """Count the documents and tokens of a pair of files by their sizes and the last index entry.

    Raises:
        RequestError: a file is missing, truncated, or not Megatron's.
    """
    idx, tokens = idx_path(prefix), bin_path(prefix)
    for path in (idx, tokens):
        if not path.is_file():
            raise RequestError(path, "is missing", AGAIN)
    size = idx.stat().st_size
    with idx.open("rb") as file:
        head = file.read(HEADER_BYTES)
        if not head.startswith(MAGIC) or len(head) < HEADER_BYTES:
            raise RequestError(idx, "is not a Megatron index (its first bytes differ)", AGAIN)
        version, code, sequences, marks = HEADER.unpack(head[len(MAGIC) :])
        if version != 1:
            raise RequestError(idx, f"is version {version}; known is 1", AGAIN)
        if code not in TOKEN_BYTES:
            raise RequestError(idx, f"holds tokens of type {code}; known are 4 and 8", AGAIN)
        expected = HEADER_BYTES + sequences * (4 + 8) + marks * 8
        if size != expected:
            raise RequestError(idx, f"has {size} bytes, and its header says {expected}", AGAIN)
        wanted = 0
        if sequences:
            file.seek(HEADER_BYTES + 4 * (sequences - 1))
            (length,) = struct.unpack("<i", file.read(4))
            file.seek(HEADER_BYTES + 4 * sequences + 8 * (sequences - 1))
            (offset,) = struct.unpack("<q", file.read(8))
            wanted = offset + length * TOKEN_BYTES[code]
    found = tokens.stat().st_size
    if wanted != found:
        raise RequestError(tokens, f"has {found} bytes, and its index says {wanted}", AGAIN)
    return Counts(int(sequences), found // TOKEN_BYTES[code])
