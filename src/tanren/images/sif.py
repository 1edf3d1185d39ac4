"""The header of a .sif file: what must be fixed for two builds to be the same bytes.

Layout as in the SIF specification 1.0: a header of 128 bytes with the file's id and its two times,
then descriptors of 585 bytes, each with two times of its own. All little-endian.
"""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

from tanren.config.errors import WorkError

_MAGIC = slice(32, 42)
_ID, _TIMES, _TABLE = 48, 64, 88  # offsets in the header
_HEADER_BYTES = 128
_DESCRIPTOR_BYTES = 585
_USED, _DESCRIPTOR_TIMES = 4, 41  # offsets in a descriptor


def fix_header(path: Path, seconds: int = 0) -> None:
    """Replace the random id and the times of a .sif file by fixed ones, in place.

    Raises:
        WorkError: the file is not a .sif.
    """
    times = struct.pack("<qq", seconds, seconds)
    with path.open("r+b") as file:
        header = file.read(_HEADER_BYTES)
        if header[_MAGIC] != b"SIF_MAGIC\0":
            raise WorkError(path, "is not a SIF image", "remove it and build it again")
        file.seek(_ID)
        file.write(bytes(16) + times)
        total, start = struct.unpack_from("<qq", header, _TABLE)
        for number in range(total):
            place = start + number * _DESCRIPTOR_BYTES
            file.seek(place)
            descriptor = file.read(_DESCRIPTOR_BYTES)
            if len(descriptor) == _DESCRIPTOR_BYTES and descriptor[_USED]:
                file.seek(place + _DESCRIPTOR_TIMES)
                file.write(times)


def sha256(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
