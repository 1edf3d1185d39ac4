"""The environment of lm-evaluation-harness: .venv-eval, apart from the engine's own packages."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tanren.config.errors import RequestError
from tanren.config.load import repository

_LOCKS = ("eval.in", "eval.txt", "native.txt")


def python_of(environment: Mapping[str, str] = os.environ) -> Path:
    """The harness's Python: $TANREN_EVAL_PYTHON, else that of .venv-eval in the repository."""
    stated = environment.get("TANREN_EVAL_PYTHON")
    return Path(stated) if stated else repository() / ".venv-eval" / "bin" / "python"


def pinned() -> str:
    """`lm-eval 0.4.13`, as the lock has it."""
    lock = (repository() / "containers" / "locks" / "eval.txt").read_text()
    found = re.search(r"^lm-eval==(\S+)", lock, re.MULTILINE)
    assert found is not None, "eval.txt"
    return f"lm-eval {found[1]}"


def is_current(python: Path) -> bool:
    """Whether an environment was made from this checkout's locks; one of your own always is."""
    if python != repository() / ".venv-eval" / "bin" / "python":
        return True
    mark = repository() / ".venv-eval" / ".eval"
    files = [str(repository() / "containers" / "locks" / name) for name in _LOCKS]
    done = subprocess.run(
        ["bash", "-c", 'cat "$@" | cksum', "-", *files], capture_output=True, text=True, check=False
    )
    return mark.is_file() and mark.read_text().strip() == done.stdout.strip()


def require() -> Path:
    """The harness's Python.

    Raises:
        RequestError: it is not installed, or from other locks than this checkout's.
    """
    python = python_of()
    if not os.access(python, os.X_OK):
        raise RequestError(python, "is not there: evaluation needs an environment of its own",
                           "make env-eval")  # fmt: skip
    if not is_current(python):
        raise RequestError(python, "was installed from other locks than this checkout's",
                           "make env-eval")  # fmt: skip
    return python
