"""What a stage's own process knows of where it runs: in an image the host cannot say it."""

from __future__ import annotations

import os
import platform
import socket
import sys
from importlib import metadata
from typing import Any


def facts() -> dict[str, Any]:
    """Python, every installed package, and, where torch is in use, what it computes with.

    Torch is asked for versions alone, so that no GPU is touched before the stage chooses its own.
    """
    packages = {
        str(one.metadata["Name"]): one.version
        for one in metadata.distributions()
        if one.metadata["Name"]
    }
    found: dict[str, Any] = {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "libc": " ".join(platform.libc_ver()),
        "packages": dict(sorted(packages.items(), key=lambda pair: pair[0].lower())),
        "world": int(os.environ.get("WORLD_SIZE", "1")),
    }
    torch: Any = sys.modules.get("torch")
    if torch is not None:
        found["torch"] = {
            "threads": torch.get_num_threads(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "cuda": torch.version.cuda,
            "cudnn": _cudnn(torch) if torch.version.cuda else None,
            "nccl": list(torch.cuda.nccl.version()) if torch.version.cuda else None,
        }
    return found


def _cudnn(torch: Any) -> int | str:
    """cuDNN's version; what torch says where another one than its own is loaded.

    Transformer Engine takes the system's cuDNN where it does not find torch's, and attention is
    all that uses it here: nothing to end a run for, but worth knowing a year later.
    """
    try:
        return int(torch.backends.cudnn.version())
    except RuntimeError as error:
        return str(error)
