"""Memory that the trainer and its writer share, and the copies into it from the device."""

from __future__ import annotations

import logging
import mmap
import os
import resource
import threading
from typing import Any

import torch

logger = logging.getLogger("tanren")

# Page-locked at a time, so that nothing waits long for it; a copy must not cross a border.
_LOCKED_AT_ONCE = 1 << 28
# Where tensors begin in the memory.
ALIGNMENT = 64


class Staging:
    """Host memory of a fixed size, without a name in any file system (/dev/shm may be small).

    On a GPU it is page-locked, in a thread: for the 20 GB of a rank that takes seconds.
    """

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("tanren-checkpoint")
        self.copied: torch.cuda.Event | None = None
        self._bytes: torch.Tensor | None = None
        self._stream: torch.cuda.Stream | None = None
        self._locking: threading.Thread | None = None
        self._locked: list[int] = []

    def allocate(self, size: int) -> None:
        """Make it so long, in bytes; once."""
        assert self._bytes is None
        # To the kernel it is a file, and a limit on these is not meant for it.
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        os.ftruncate(self.descriptor, size)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        if not size:
            self._bytes = torch.empty(0, dtype=torch.uint8)
            return
        self._bytes = torch.frombuffer(mmap.mmap(self.descriptor, size), dtype=torch.uint8)
        if torch.cuda.is_available():
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            device = torch.cuda.current_device()
            self._locking = threading.Thread(target=self._lock, args=(device,), daemon=True)
            self._locking.start()

    def _lock(self, device: int) -> None:
        # A thread begins on the first device, and would make a context there.
        torch.cuda.set_device(device)
        assert self._bytes is not None
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        base, size = self._bytes.data_ptr(), self._bytes.numel()
        for first in range(0, size, _LOCKED_AT_ONCE):
            length = min(_LOCKED_AT_ONCE, size - first)
            portable = 1
            if int(runtime.cudaHostRegister(base + first, length, portable)) != 0:
                logger.warning(
                    "memory for checkpoints cannot be page-locked beyond %.1f GiB: saves will "
                    "block training longer", first / 2**30,
                )  # fmt: skip
                return
            self._locked.append(base + first)

    def copy(self, tensors: list[tuple[torch.Tensor, int]]) -> None:
        """Begin to copy contiguous tensors, each to its place in bytes.

        From a GPU it goes on beside what is computed; `finish` waits for it. The tensors must not
        change before.
        """
        assert self._bytes is not None
        if self._stream is None:
            for tensor, place in tensors:
                self._bytes[place : place + tensor.nbytes].copy_(_as_bytes(tensor))
            return
        if self._locking is not None:
            self._locking.join()
            self._locking = None
        # The update may still be running.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for tensor, place in tensors:
                source, begin, end = _as_bytes(tensor), place, place + tensor.nbytes
                while begin < end:
                    border = min(begin - begin % _LOCKED_AT_ONCE + _LOCKED_AT_ONCE, end)
                    part = source[begin - place : border - place]
                    self._bytes[begin:border].copy_(part, non_blocking=True)
                    begin = border
            self.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.copied.record(self._stream)

    def finish(self) -> None:
        """Wait until everything is copied."""
        if self.copied is not None:
            self.copied.synchronize()
            self.copied = None

    def close(self) -> None:
        """Give the memory back."""
        if self._locking is not None:
            self._locking.join()
        self.finish()
        for address in self._locked:
            torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]
        self._locked.clear()
        self._bytes = None
        os.close(self.descriptor)


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view(-1).view(torch.uint8)
