"""Compiled kernels are kept between runs: a job's home is a new one, and with it Triton's cache."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import tempfile
from pathlib import Path

logger = logging.getLogger("tanren")


def keep(folder: Path) -> None:
    """Let Triton, FlashAttention 4 and quack-kernels keep what they compile; they know a kernel by
    its source, its compiler and the device.

    To be called before the first kernel is launched, and before these are imported. What
    the environment says already stays (a container's says nothing). A folder that cannot be had is
    no reason to stop.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            locks = _locks(file.fileno())
    except OSError as error:
        logger.warning("%s: %s; kernels are compiled at each start", folder, error.strerror)
        # By itself it keeps them in /tmp.
        os.environ.setdefault("QUACK_CACHE_ENABLED", "0")
        return
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
    if not locks:
        logger.info(
            "%s cannot be locked: FlashAttention 4 and quack-kernels are compiled at each start",
            folder,
        )
        os.environ.setdefault("QUACK_CACHE_ENABLED", "0")
        return
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    # Their files hold code of the host as well.
    processor = _processor()
    os.environ.setdefault(
        "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(folder / f"flash-attn-{processor}")
    )
    os.environ.setdefault("QUACK_CACHE_DIR", str(folder / f"quack-{processor}"))


def _locks(file: int) -> bool:
    """Whether a file can be locked; on some Lustre mounts none can, and FlashAttention 4 ends a run
    that does not get a lock.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _processor() -> str:
    """Which instructions this machine's processor has, as a short name."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(flags.encode()).hexdigest()[:8]
