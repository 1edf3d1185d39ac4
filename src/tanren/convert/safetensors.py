"""Safetensors files: headers read strictly, tensors mapped, files filled by several threads.

A file is the header's length in 8 bytes, the header in JSON, and the tensors' bytes end to end
(github.com/huggingface/safetensors, README).
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tanren.config.errors import RequestError
from tanren.convert.mapping import mapped, put
from tanren.convert.tensors import Stored, Tensors, each, rows

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The longest header that the format's own library takes.
_LONGEST = 100_000_000
# Bytes that a thread holds at a time, and how many threads there are.
PIECE = 1 << 27
THREADS = 4


@dataclass(frozen=True)
class Place:
    """Where a tensor lies."""

    file: Path
    offset: int
    stored: Stored

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """The tensor, or its rows [start, stop), mapped."""
        shape, dtype = self.stored.shape, self.stored.dtype
        if stop is None:
            return mapped(self.file, self.offset, dtype, shape)
        row = math.prod(shape[1:]) * dtype.itemsize
        return mapped(self.file, self.offset + start * row, dtype, (stop - start, *shape[1:]))


def read_header(file: Path) -> dict[str, Place]:
    """Where a file's tensors lie.

    Raises:
        RequestError: the file is missing, ends too early, or its header is not one.
    """
    again = "fetch the model again"
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if length > min(size - 8, _LONGEST):
                raise RequestError(file, f"is not whole: its header has {length} bytes, the file "
                                   f"{size}", again)  # fmt: skip
            text = stream.read(length)
    except FileNotFoundError:
        raise RequestError(file, "is missing", again) from None
    except OSError as error:
        raise RequestError(file, f"cannot be read: {error.strerror}", again) from None
    try:
        header = json.loads(text, object_pairs_hook=lambda pairs: no_duplicates(pairs, file))
        header.pop("__metadata__", None)
        found = {name: _place(file, 8 + length, one) for name, one in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(file, f"has no safetensors header: {error!r}", again) from None
    at = 8 + length
    for name, place in sorted(found.items(), key=lambda one: (one[1].offset, one[1].stored.nbytes)):
        if place.offset != at:
            raise RequestError(file, f"{name} does not begin where the one before it ends", again)
        at += place.stored.nbytes
    if at != size:
        raise RequestError(
            file, f"is not whole: it has {size} bytes, and its header states {at}", again
        )
    return found


def _place(file: Path, start: int, value: dict[str, Any]) -> Place:
    begin, end = value["data_offsets"]
    stored = Stored(tuple(map(int, value["shape"])), DTYPES[value["dtype"]])
    if end - begin != stored.nbytes:
        raise ValueError(f"{end - begin} bytes for {value['dtype']} {list(stored.shape)}")
    return Place(file, start + begin, stored)


def no_duplicates(pairs: list[tuple[str, Any]], file: Path) -> dict[str, Any]:
    """The pairs of a JSON object; of a key that is there twice, readers take one or the other."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise RequestError(file, f"states {', '.join(twice[:5])} twice", "fetch the model again")
    return found


def write(files: Mapping[Path, list[str]], tensors: Tensors) -> None:
    """Write files, each with these tensors, by several threads that hold a piece each.

    Raises:
        OSError: the disk does not take it.
    """
    descriptors: dict[Path, int] = {}
    try:
        pieces: list[tuple[int, int, str, int, int]] = []
        for file, names in files.items():
            header, starts, size = _header({name: tensors.stored[name] for name in names})
            descriptors[file] = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.truncate(descriptors[file], size)
            put(descriptors[file], memoryview(header), 0)
            for name in names:
                pieces += [
                    (descriptors[file], starts[name] + before, name, start, stop)
                    for before, start, stop in _pieces(tensors.stored[name])
                ]
        each(lambda piece: _write_piece(tensors, *piece), pieces, THREADS)
        for descriptor in descriptors.values():
            os.fsync(descriptor)
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def _header(stored: Mapping[str, Stored]) -> tuple[bytes, dict[str, int], int]:
    """A file's header, where each tensor begins, and the file's size."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, one in stored.items():
        entries[name] = {
            "dtype": _NAMES[one.dtype],
            "shape": list(one.shape),
            "data_offsets": [at, at + one.nbytes],
        }
        at += one.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    starts = {name: start + entries[name]["data_offsets"][0] for name in stored}
    return struct.pack("<Q", len(text)) + text, starts, start + at


def _pieces(stored: Stored) -> list[tuple[int, int, int]]:
    """Bytes before it, first row and the row behind the last of each piece of a tensor."""
    if not stored.shape:
        return [(0, 0, 1)]
    row = math.prod(stored.shape[1:]) * stored.dtype.itemsize
    step = max(PIECE // max(row, 1), 1)
    count = stored.shape[0]
    return [(first * row, first, min(first + step, count)) for first in range(0, count, step)]


def _write_piece(
    tensors: Tensors, descriptor: int, offset: int, name: str, start: int, stop: int
) -> None:
    shape = tensors.stored[name].shape
    values = rows(tensors, name, None, start, stop) if shape else tensors.read(name)
    flat = values.contiguous().reshape(-1).view(torch.uint8)
    put(descriptor, flat.numpy().data, offset)
