"""Where a tensor's elements lie within a torch.save archive, found without running its pickle.

An archive is a zip file that keeps them as they are in memory, uncompressed: they can be
memory-mapped.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tanren.config.errors import RequestError
from tanren.convert.mapping import contiguous

# Types by the names of their storages, as torch pickles them.
_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}  # fmt: skip
# Of a zip entry's own header: its length, and where it says how long name and extra field are.
_HEADER, _LENGTHS = 30, 26


@dataclass(frozen=True)
class Place:
    """Where a tensor's elements lie in a file, in a row."""

    file: Path
    offset: int
    dtype: torch.dtype


def find(file: Path, offset: int, length: int, numel: int) -> Place | None:
    """The place of a tensor's elements within a torch.save archive that is a part of a file."""
    try:
        with file.open("rb") as stream, zipfile.ZipFile(_Window(stream, offset, length)) as archive:
            entries = {one.filename.partition("/")[2]: one for one in archive.infolist()}
            order = entries.get("byteorder")
            if order is not None and archive.read(order) != b"little":
                return None
            dtype = _dtype(archive.read(entries["data.pkl"]), numel)
            data = entries["data/0"]
            plain = data.compress_type == zipfile.ZIP_STORED
            if dtype is None or not plain or data.file_size < numel * dtype.itemsize:
                return None
            stream.seek(offset + data.header_offset + _LENGTHS)
            name, extra = struct.unpack("<HH", stream.read(4))
            rest = stream.read(name + extra)
    except FileNotFoundError:
        raise RequestError(file, "is missing", "bring the checkpoint again, whole") from None
    except Exception:
        # A wrong byte raises anything. torch's own reading says what is wrong, or that nothing is.
        return None
    # Where the elements begin: torch, too, believes these lengths, and no checksum is compared.
    if rest[:name] != data.orig_filename.encode() or not _in_fields(rest[name:]):
        raise RequestError(
            file, f"is broken: the header of {data.orig_filename} is not one",
            "bring the checkpoint again, whole",
        )  # fmt: skip
    return Place(file, offset + data.header_offset + _HEADER + name + extra, dtype)


def _in_fields(extra: bytes) -> bool:
    """Whether a zip entry's extra bytes are fields from end to end: kind, length, content."""
    at = 0
    while at + 4 <= len(extra):
        at += 4 + struct.unpack_from("<H", extra, at + 2)[0]
    return at == len(extra)


def _dtype(content: bytes, numel: int) -> torch.dtype | None:
    """The type of a pickled tensor that is its storage from the first element on, in a row."""
    found = _Description(io.BytesIO(content)).load()
    if not isinstance(found, _Tensor):
        return None
    flat = contiguous(found.shape)
    in_a_row = all(
        size == 1 or stride == wanted
        for size, stride, wanted in zip(found.shape, found.strides, flat, strict=True)
    )
    return found.dtype if in_a_row and not found.first and math.prod(found.shape) == numel else None


@dataclass(frozen=True)
class _Tensor:
    """What a pickled tensor says of itself."""

    dtype: torch.dtype
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Description(pickle.Unpickler):
    """Reads what a pickled tensor is like; it makes nothing else, and calls nothing."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda dtype, first, shape, strides, *_: _Tensor(dtype, first, shape, strides)
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a plain tensor")

    def persistent_load(self, identity: Any) -> torch.dtype:
        kind, dtype, key, *_ = identity
        if kind != "storage" or key != "0" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("not a plain tensor")
        return dtype


class _Window(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, stream: Any, start: int, length: int) -> None:
        self._stream, self._start, self._length, self._at = stream, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if origin + offset < 0:
            raise OSError("before the start")
        self._at = origin + offset
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        rest = max(self._length - self._at, 0)
        count = rest if size is None or size < 0 else min(size, rest)
        self._stream.seek(self._start + self._at)
        content = bytes(self._stream.read(count))
        self._at += len(content)
        return content
