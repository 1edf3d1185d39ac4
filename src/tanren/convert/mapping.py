"""Tensors that lie in files, memory-mapped: a piece is mapped when it is read, and not longer."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import torch

from tanren.config.errors import RequestError


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
