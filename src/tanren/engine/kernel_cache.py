"""Compiled kernels are kept between runs: a job's home is a new one, and with it Triton's cache."""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
from pathlib import Path

logger = logging.getLogger("tanren")


def keep(folder: Path) -> None:
    """Let Triton and FlashAttention 4 keep what they compile. Call it before they are imported.

    Both know a kernel by its source, its compiler and the device. What the environment says already
    stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
    if not _locks(folder):
        logger.info("%s cannot be locked: FlashAttention 4 is compiled at each start", folder)
        return
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(folder / "flash-attn"))


def _locks(folder: Path) -> bool:
    """Whether files there can be locked; some Lustre mounts cannot, and FlashAttention 4 gives up
    a run that waits for a lock.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True
