"""What `make doctor` asks of the world around it: programs, disks, variables, the network.

One value, so that a test can give another world.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from threading import Thread

NETWORK_SECONDS = 2.0
# A program that hangs (a dead NFS server behind quota) is no answer either.
_PROGRAM_SECONDS = 2.0


def _run(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(
            list(command), capture_output=True, text=True, errors="replace", check=True,
            timeout=_PROGRAM_SECONDS, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _fetch(url: str) -> str | None:
    request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "tanren"})
    try:
        urllib.request.urlopen(request, timeout=NETWORK_SECONDS).close()
    except urllib.error.HTTPError:
        return None  # it answers
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))
    return None


def _device_files() -> int:
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


@dataclass(frozen=True)
class Outside:
    """The world as a login node or a laptop has it.

    `run` gives what a program prints, None where it is absent, fails or hangs; `fetch` why an
    address does not answer, None when it does; `free` the free bytes of a folder's disk; `module`
    whether this Python has one.
    """

    run: Callable[[Sequence[str]], str | None] = _run
    which: Callable[[str], str | None] = shutil.which
    free: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free
    writable: Callable[[Path], bool] = lambda path: os.access(path, os.W_OK | os.X_OK)
    fetch: Callable[[str], str | None] = _fetch
    module: Callable[[str], bool] = lambda name: find_spec(name) is not None
    gpus: Callable[[], int] = _device_files
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    python: tuple[int, ...] = sys.version_info[:3]
    home: Path = field(default_factory=Path.home)


class Asked:
    """An address that is asked while other things are looked at.

    Name servers keep no timeout of ours: whoever waits for the answer waits so long and no longer.
    """

    def __init__(self, outside: Outside, url: str) -> None:
        self.url, self.answers = url, [f"no answer within {NETWORK_SECONDS:g} s"]
        self.thread = Thread(target=self._ask, args=(outside,), daemon=True)
        self.thread.start()

    def _ask(self, outside: Outside) -> None:
        self.answers.append(outside.fetch(self.url) or "")

    def problem(self) -> str | None:
        """Why it does not answer; None when it does."""
        self.thread.join(NETWORK_SECONDS)
        return self.answers[-1] or None
