"""Environments apart from the engine's own packages: .venv-eval, .venv-merge, .venv-nemo."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tanren.config.errors import RequestError
from tanren.config.load import repository


@dataclass(frozen=True)
class Environment:
    """One of them. `part` is its name to bin/setup, `package` what it is made for.

    `locks` are the files of containers/locks that it is made from.
    """

    part: str
    package: str
    variable: str
    locks: tuple[str, ...]
    purpose: str

    def python(self, environment: Mapping[str, str] = os.environ) -> Path:
        """Its Python: the variable's, else that of .venv-PART in the repository."""
        stated = environment.get(self.variable)
        return Path(stated) if stated else self._folder / "bin" / "python"

    def pinned(self) -> str:
        """`lm-eval 0.4.13`, as the lock has it."""
        locks = "".join(path.read_text() for path in self._locks)
        found = re.search(rf"^{self.package}==(\S+)", locks, re.MULTILINE)
        assert found is not None, self.locks
        return f"{self.package} {found[1]}"

    def is_current(self, python: Path) -> bool:
        """Whether it was made from this checkout's locks; one of your own always is."""
        if python != self._folder / "bin" / "python":
            return True
        mark = self._folder / f".{self.part}"
        done = subprocess.run(
            ["bash", "-c", 'cat "$@" | cksum', "-", *map(str, self._locks)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        return mark.is_file() and mark.read_text().strip() == done.stdout.strip()

    def require(self) -> Path:
        """Its Python.

        Raises:
            RequestError: it is not installed, or from other locks than this checkout's.
        """
        python = self.python()
        if not os.access(python, os.X_OK):
            raise RequestError(python, f"is not there: {self.purpose} needs an environment of "
                               "its own", f"make env-{self.part}")  # fmt: skip
        if not self.is_current(python):
            raise RequestError(python, "was installed from other locks than this checkout's",
                               f"make env-{self.part}")  # fmt: skip
        return python

    @property
    def _locks(self) -> list[Path]:
        return [repository() / "containers" / "locks" / name for name in self.locks]

    @property
    def _folder(self) -> Path:
        return repository() / f".venv-{self.part}"


HARNESS = Environment(
    "eval", "lm-eval", "TANREN_EVAL_PYTHON", ("eval.in", "eval.txt", "native.txt"), "evaluation"
)
MERGE = Environment(
    "merge", "mergekit", "TANREN_MERGE_PYTHON", ("merge.in", "merge.txt"), "merging"
)
NEMO = Environment(
    "nemo", "nemo-toolkit", "TANREN_NEMO_PYTHON", ("nemo-cpu.txt", "native.txt"), "NeMo"
)
# Those that a plan names for the whole process of its stage.
OWN = {one.part: one for one in (MERGE, NEMO)}
EVERY = (HARNESS, *OWN.values())
