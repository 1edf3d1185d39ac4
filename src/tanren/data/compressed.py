"""Compressed files as streams: gzip and Zstandard, one stream after the other, breaks noticed."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol


class _Stream(Protocol):
    """What the decompressors of zlib and zstandard have in common: one stream, then its end."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, /) -> bytes: ...


def _gzip_stream() -> _Stream:
    return zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)


class _ZstdStream:
    """zstandard's decompressor, which says what it finds by an exception of its own."""

    def __init__(self) -> None:
        import zstandard

        self._error = zstandard.ZstdError
        # Some publishers use windows beyond the 128 MiB that are allowed by default.
        self._stream = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()

    @property
    def eof(self) -> bool:
        return bool(self._stream.eof)

    @property
    def unused_data(self) -> bytes:
        return bytes(self._stream.unused_data)

    def decompress(self, data: bytes) -> bytes:
        try:
            return bytes(self._stream.decompress(data))
        except self._error as error:
            raise ValueError(str(error)) from None


OPENERS: dict[str, Callable[[], Any]] = {"gz": _gzip_stream, "zst": _ZstdStream}


@dataclass
class Position:
    """How much of a compressed file has been read."""

    read: int = 0


def unpacked(
    blocks: Iterable[bytes], opener: Callable[[], _Stream], done: Position
) -> Iterator[bytes]:
    """Unpack a file that may hold several streams one after the other.

    Raises:
        ValueError: the file ends within a stream, or holds something else (zlib.error: so, too).
    """
    stream = None
    for block in blocks:
        data = block
        while data:
            # gzip files may be padded with zeros.
            if stream is None and not data.strip(b"\0"):
                break
            stream = stream or opener()
            unpacked = stream.decompress(data)
            if unpacked:
                yield unpacked
            data = b""
            if stream.eof:
                data, stream = stream.unused_data, None
        done.read += len(block)
    if stream is not None:
        raise ValueError("the file ends before its compressed stream does")
