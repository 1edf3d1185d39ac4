"""This machine's own Python as the place where stages run: .venv with the engine's packages."""

from __future__ import annotations

import subprocess
import sys
from importlib import invalidate_caches
from importlib.util import find_spec

from tanren.config.errors import RequestError
from tanren.config.load import repository


def complete() -> None:
    """Install the engine's part of .venv when only the login node's half is there.

    Raises:
        RequestError: it cannot be installed, or this is another Python than .venv's.
    """
    if find_spec("torch") is not None:
        return
    root = repository()
    if sys.prefix != str(root / ".venv"):
        raise RequestError(
            sys.executable,
            "has no torch, which stages need outside of an image",
            "make setup, and run bin/tanren; or RUNTIME=apptainer with an image",
        )
    # bin/setup says itself what is wrong and what to do.
    done = subprocess.run([root / "bin" / "setup", "engine"], check=False)
    if done.returncode:
        raise RequestError(".venv", "lacks the engine's packages, see above",
                           "the same command again, when that is mended")  # fmt: skip
    invalidate_caches()
