"""Memory that the trainer and its writer share, and the copies into it from the device."""

from __future__ import annotations

import logging
import mmap
import os
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

logger = logging.getLogger("tanren")

# Where tensors begin in the memory.
ALIGNMENT = 64
# What a thread touches at a time.
_SLICE = 2**28


class Staging:
    """Host memory of a fixed size, without a name in any file system (/dev/shm may be small)."""

    def __init__(self, descriptor: int) -> None:
        """Take the file descriptor of it, of no size yet."""
        self.descriptor = descriptor
        self.copied: torch.cuda.Event | None = None
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._stream: torch.cuda.Stream | None = None
        self._locked = False

    def allocate(self, size: int) -> None:
        """Make it so long, in bytes; once."""
        assert not self._bytes.numel()
        # To the kernel it is a file, and a limit on these is not meant for it.
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        os.ftruncate(self.descriptor, size)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        if size:
            self._bytes = torch.frombuffer(mmap.mmap(self.descriptor, size), dtype=torch.uint8)

    def lock(self) -> None:
        """Page-lock it on a GPU, so that copies go on beside what is computed.

        For the 20 GB of a rank this takes seconds, and it is no work for a thread beside training:
        what the driver holds up meanwhile may be a collective that another rank waits for.
        """
        if not (torch.cuda.is_available() and self._bytes.numel()):
            return
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        began, size = time.perf_counter(), self._bytes.numel()
        self.touch()
        portable = 1
        self._locked = int(runtime.cudaHostRegister(self._bytes.data_ptr(), size, portable)) == 0
        if self._locked:
            seconds = time.perf_counter() - began
            logger.info("%.1f GiB for checkpoints page-locked in %.1f s", size / 2**30, seconds)
        else:
            logger.warning(
                "the memory for checkpoints cannot be page-locked: saves block training longer"
            )

    def touch(self, threads: int = 8) -> None:
        """Have the kernel give every page of it, by several threads.

        Locking would do that too, by one: at 1.6 GB/s that took 22 s for a rank of 8.59 B on two
        GPUs.
        """
        size = self._bytes.numel()
        with ThreadPoolExecutor(threads) as pool:
            for first in range(0, size, _SLICE):
                pool.submit(self._bytes[first : first + _SLICE].zero_)

    def copy(self, tensors: list[tuple[torch.Tensor, int]]) -> None:
        """Begin to copy contiguous tensors, each to its place in bytes.

        From a GPU it goes on beside what is computed; `finish` waits for it. The tensors must not
        change before.
        """
        if self._stream is None:
            self._copy(tensors)
            return
        # The update may still be running.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._copy(tensors)
            self.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.copied.record(self._stream)

    def _copy(self, tensors: list[tuple[torch.Tensor, int]]) -> None:
        for tensor, place in tensors:
            source = tensor.detach().view(-1).view(torch.uint8)
            self._bytes[place : place + source.numel()].copy_(source, non_blocking=True)

    def finish(self) -> None:
        """Wait until everything is copied."""
        if self.copied is not None:
            self.copied.synchronize()
            self.copied = None

    def close(self) -> None:
        """Give the memory back."""
        self.finish()
        if self._locked:
            runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            runtime.cudaHostUnregister(self._bytes.data_ptr())
            self._locked = False
        self._bytes = torch.empty(0, dtype=torch.uint8)
        os.close(self.descriptor)
