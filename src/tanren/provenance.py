"""The passport: what each attempt of a run was made from."""

from __future__ import annotations

import platform
import socket
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from tanren import runs
from tanren.plan.paths import RunFolder

_PACKAGES = (
    "torch", "megatron-core", "transformer-engine", "transformers", "tokenizers", "safetensors",
    "numpy",
)  # fmt: skip


def open_attempt(
    folder: RunFolder, repository: Path, plan: dict[str, Any], image: dict[str, Any] | None = None
) -> int:
    """Append an entry to passport.json and return the attempt's number, from 1.

    Args:
        image: the facts of the container image that the stage runs in; None outside of one.
    """
    passport = runs.read_json(folder.passport) or {"format": 1, "attempts": []}
    number = len(passport["attempts"]) + 1
    passport["attempts"].append(
        {
            "attempt": number,
            "started": _now(),
            "host": socket.gethostname(),
            "commit": git_commit(repository),
            # Of the image, where there is one: the login node's own are not what runs.
            **(
                {"image": image}
                if image
                else {"python": platform.python_version(), "packages": versions()}
            ),
            "plan": plan,
        }
    )
    runs.write_json(folder.passport, passport)
    return number


def close_attempt(folder: RunFolder, number: int, ending: str) -> None:
    """Note how an attempt ended: `done`, `stopped: SIGTERM`, or the error."""
    passport = runs.read_json(folder.passport)
    passport["attempts"][number - 1] |= {"ended": _now(), "ending": ending}
    runs.write_json(folder.passport, passport)


def git_commit(repository: Path) -> dict[str, Any]:
    """The commit of a checkout and whether its tracked files were changed."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(repository), *words], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return {"id": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return {"id": None, "dirty": None}


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide a result."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
