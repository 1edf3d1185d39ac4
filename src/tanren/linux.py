"""What the kernel is asked to do for processes of ours: prctl(2)."""

from __future__ import annotations

import ctypes
import os
import signal

# Loaded here: between a fork and an exec, a thread of the parent may hold the importer's lock.
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG, _PR_SET_NAME, _PR_SET_CHILD_SUBREAPER = 1, 15, 36


def signal_at_parents_end(number: int) -> None:
    """Have this signal sent to this process when its parent ends, however that ends."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, number)


def end_with(parent: int) -> None:
    """End this process, a child of `parent`, with it; at once where that is gone already."""
    signal_at_parents_end(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def adopt_orphans() -> None:
    """Make processes whose parents end, below this one, its own children."""
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def rename(name: str) -> None:
    """Call this process so in what lists processes, in at most 15 letters of ASCII."""
    _LIBC.prctl(_PR_SET_NAME, name.encode())
