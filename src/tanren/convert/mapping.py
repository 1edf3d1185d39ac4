"""Tensors in files: a piece is mapped when it is read, and not longer; pieces are written."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

from tanren.config.errors import RequestError

# What is written at a time: it stays in a core's cache between being read and being copied.
_CHUNK = 1 << 23
_PAGE = 4096


def mapped(
    file: Path, offset: int, dtype: torch.dtype, shape: tuple[int, ...],
    strides: tuple[int, ...] | None = None,
) -> torch.Tensor:  # fmt: skip
    """A tensor whose bytes lie in a file as they do in memory. Writing to it leaves the file alone.

    The mapping is its own and goes with it, so that resident memory is what is in use, however
    large the file is.

    Args:
        offset: of the first element, in bytes.
        strides: in elements; without them the elements lie in a row.
    Raises:
        RequestError: the file is missing, or ends before the tensor does.
    """
    if not torch.Size(shape).numel():
        return torch.empty(shape, dtype=dtype)
    if strides is None:
        strides = contiguous(shape)
    count = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    end = offset + count * dtype.itemsize
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size < end:
                # To read behind the end of a mapped file would end the process.
                raise RequestError(
                    file, f"is not whole: it has {size} bytes, and {end} are stated",
                    "bring the file again",
                )  # fmt: skip
            content = mmap.mmap(stream.fileno(), end - start, access=mmap.ACCESS_COPY, offset=start)
    except FileNotFoundError:
        raise RequestError(file, "is missing", "bring the file again") from None
    # The disk reads ahead of us.
    content.madvise(mmap.MADV_WILLNEED)
    flat = torch.frombuffer(content, dtype=dtype, count=count, offset=offset - start)
    return flat.as_strided(shape, strides)


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a tensor whose elements lie in a row."""
    strides, count = [], 1
    for size in reversed(shape):
        strides.append(count)
        count *= size
    return tuple(reversed(strides))


def put(descriptor: int, content: memoryview, offset: int) -> None:
    """Write all of some bytes at a place of a file. Several threads may write to one file."""
    done = 0
    while done < len(content):
        some = content[done : done + _CHUNK]
        # Mapped pages are read here, and not while the file is locked for writing.
        np.frombuffer(some, dtype=np.uint8)[::_PAGE].max()
        done += os.pwrite(descriptor, some, offset + done)


class Sink:
    """A file that is written from its start to its end, and is on the disk when it is closed."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self.position = 0
        # Why the disk did not take something, for writers that hide it.
        self.error: OSError | None = None

    def write(self, content: bytes | memoryview) -> int:
        view = memoryview(content).cast("B")
        try:
            put(self._descriptor, view, self.position)
        except OSError as error:
            self.error = error
            raise
        self.position += len(view)
        return len(view)

    def flush(self) -> None:
        """Nothing is held back."""

    def __enter__(self) -> Sink:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)
