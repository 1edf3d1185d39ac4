"""The passport: what each attempt of a run was made from, and how it ended.

passport.json has an entry an attempt. The command writes what the machine's side knows (code,
image, inputs, job), the stage what its process knows, and the command how it ended. No key and no
token is ever in it: where the environment has one, its value is blotted out of all that is written.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import socket
import subprocess
import time
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import orjson

from tanren import runs
from tanren.config.errors import RequestError
from tanren.config.fields import SECRET_NAME
from tanren.plan.paths import RunFolder

FORMAT = 2
# What of a changed checkout is kept; its hash is of all of it.
DIFF_BYTES = 4 << 20
# Where files that git does not know are part of what runs.
CODE = ("src", "bin", "containers")
_PACKAGES = (
    "torch", "megatron-core", "transformer-engine", "flash-attn-4", "quack-kernels",
    "transformers", "tokenizers", "safetensors", "numpy",
)  # fmt: skip
# Of large files: as many blocks of so many bytes, the first and the last among them.
_WHOLE_BYTES, _BLOCKS, _BLOCK_BYTES = 16 << 20, 16, 256 << 10


def open_attempt(
    folder: RunFolder, repository: Path, plan: dict[str, Any], image: dict[str, Any] | None = None,
    host: Mapping[str, Any] | None = None,
) -> int:  # fmt: skip
    """Append an entry to passport.json and return the attempt's number, from 1.

    Args:
        image: the facts of the container image that the stage runs in; None outside of one.
        host: what else the machine's side knows: inputs, machine, job.
    """
    passport = _read(folder) or {"attempts": []}
    for before in passport["attempts"]:
        # Its command was killed: at its walltime, by a person, or with its machine.
        before.setdefault("ending", "killed, and left no word")
    number = len(passport["attempts"]) + 1
    passport["format"] = FORMAT
    passport["attempts"].append(
        {
            "attempt": number,
            "started": _now(),
            "host": socket.gethostname(),
            "commit": git_commit(repository, folder.diff(number)),
            # Of the image, where there is one: the login node's own are not what runs.
            **(
                {"image": image}
                if image
                else {"python": platform.python_version(), "packages": versions()}
            ),
            **(host or {}),
            "plan": plan,
        }
    )
    _write(folder, passport)
    return number


def note(folder: RunFolder, number: int, facts: Mapping[str, Any]) -> None:
    """Add to an attempt's entry what is known only while it runs, or after it."""
    passport = _read(folder)
    assert passport is not None, folder.passport
    passport["attempts"][number - 1] |= facts
    _write(folder, passport)


def close_attempt(
    folder: RunFolder, number: int, ending: str, facts: Mapping[str, Any] | None = None
) -> None:
    """Note how an attempt ended: `done`, `stopped: SIGTERM`, or the error; and what it made."""
    note(folder, number, {"ended": _now(), "ending": ending, **(facts or {})})


def read_passport(folder: RunFolder) -> dict[str, Any]:
    """A run's passport, with an attempt at least.

    Raises:
        RequestError: there is none, or this version does not know its form.
    """
    found = _read(folder)
    again = "name a run that this version of tanren has begun (make status lists the runs)"
    if found is None or not found.get("attempts"):
        raise RequestError(folder.root, "has no passport: nobody knows what it was made from",
                           again)  # fmt: skip
    return found


def _read(folder: RunFolder) -> dict[str, Any] | None:
    found = runs.read_json(folder.passport)
    if found is None:
        return None
    if not isinstance(found, dict) or found.get("format", FORMAT) not in (1, FORMAT):
        stated = found.get("format") if isinstance(found, dict) else None
        raise RequestError(
            folder.passport, f"was written by another version of tanren (format {stated}, and this "
            f"one knows {FORMAT})", "use the version that wrote it",
        )  # fmt: skip
    return found


def _write(folder: RunFolder, passport: dict[str, Any]) -> None:
    option = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE
    runs.write_atomic(folder.passport, without_secrets(orjson.dumps(passport, option=option)))


def without_secrets(text: bytes, environment: Mapping[str, str] | None = None) -> bytes:
    """A text in which the values of the environment's keys and tokens stand no more."""
    for name, value in (os.environ if environment is None else environment).items():
        if re.search(SECRET_NAME, name) and len(value) >= 8:
            text = text.replace(value.encode(), f"[{name}]".encode())
    return text


def git_commit(repository: Path, keep: Path | None = None) -> dict[str, Any]:
    """The commit of a checkout, and what of it no commit holds.

    That is changes of tracked files, and files that git neither knows nor ignores where code is.

    Args:
        keep: where to write the changes as a patch, as far as they have room.
    Returns:
        id and dirty, None where there is no git; of a changed tree also changed (paths) and diff
        (sha256 and bytes of the whole patch, and whether the file holds all of it).
    """

    def git(*words: str, codes: tuple[int, ...] = (0,)) -> bytes:
        done = subprocess.run(["git", "-C", str(repository), *words], capture_output=True,
                              check=False)  # fmt: skip
        if done.returncode not in codes:
            raise subprocess.CalledProcessError(done.returncode, words)
        return done.stdout

    def listed(*words: str) -> list[str]:
        return [name for name in git(*words).decode(errors="replace").split("\0") if name]

    try:
        found: dict[str, Any] = {"id": git("rev-parse", "HEAD").decode().strip()}
        changed = listed("diff", "HEAD", "--name-only", "-z")
        new = listed("ls-files", "-z", "--others", "--exclude-standard", "--", *CODE)
        found["dirty"] = bool(changed or new)
        if not found["dirty"] or keep is None:
            return found | ({"changed": [*changed, *new]} if found["dirty"] else {})
        patch = git("diff", "HEAD", "--binary", "--no-color", "--no-ext-diff", "--full-index")
        for name in new:
            patch += git("diff", "--no-index", "--binary", "--no-color", "--no-ext-diff",
                         "--", "/dev/null", name, codes=(0, 1))  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return {"id": None, "dirty": None}
    patch = without_secrets(patch)
    keep.parent.mkdir(parents=True, exist_ok=True)
    runs.write_atomic(keep, patch[:DIFF_BYTES])
    diff = {
        "file": keep.name,
        "sha256": hashlib.sha256(patch).hexdigest(),
        "bytes": len(patch),
        "whole": len(patch) <= DIFF_BYTES,
    }
    return found | {"changed": [*changed, *new], "diff": diff}


def refuse_dirty(repository: Path, allowed: bool) -> None:
    """Refuse to submit code that no commit holds, unless that is wanted.

    Raises:
        RequestError: naming the files.
    """
    commit = git_commit(repository)
    if commit["dirty"] and not allowed:
        names = commit["changed"]
        rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise RequestError(
            repository, f"has changes that no commit holds: {', '.join(names[:3])}{rest}",
            "commit them; or ALLOW_DIRTY=1 (--allow-dirty), which keeps the diff in the run folder",
        )  # fmt: skip


def versions(names: Iterable[str] = _PACKAGES) -> dict[str, str]:
    """Installed versions of the packages that decide a result."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def fingerprint(path: Path, *, whole: bool = False) -> dict[str, Any]:
    """A file's size, time of change and SHA-256: {bytes, mtime_ns, sha256, sampled}.

    Of a file over 16 MiB the hash is of 16 blocks of 256 KiB, evenly spaced from its first to its
    last, and `sampled` is true: what weighs hundreds of GB is not read for its name.

    Args:
        whole: hash all of it, however large it is.
    """
    facts, result = path.stat(), hashlib.sha256()
    sampled = facts.st_size > _WHOLE_BYTES and not whole
    with path.open("rb") as file:
        if sampled:
            last = facts.st_size - _BLOCK_BYTES
            for block in range(_BLOCKS):
                file.seek(last * block // (_BLOCKS - 1))
                result.update(file.read(_BLOCK_BYTES))
        else:
            while block_read := file.read(_BLOCK_BYTES):
                result.update(block_read)
    return {
        "bytes": facts.st_size,
        "mtime_ns": facts.st_mtime_ns,
        "sha256": result.hexdigest(),
        "sampled": sampled,
    }


# A set of more files is known by the names and sizes of all, and the content of so many.
MOST_FILES = 256


def fingerprint_of(paths: Iterable[Path], root: Path) -> dict[str, Any]:
    """Files as one: {files, bytes, sha256, sampled}, the hash over names, sizes and contents."""
    files = sorted(set(paths))
    every = max(1, -(-len(files) // MOST_FILES))
    result, size, sampled = hashlib.sha256(), 0, every > 1
    for number, path in enumerate(files):
        name = str(path.relative_to(root)) if path.is_relative_to(root) else path.name
        if number % every:
            one: dict[str, Any] = {"bytes": path.stat().st_size, "sha256": "", "sampled": True}
        else:
            one = fingerprint(path)
        result.update(f"{name}\0{one['bytes']}\0{one['sha256']}\n".encode())
        size, sampled = size + one["bytes"], sampled or one["sampled"]
    return {"files": len(files), "bytes": size, "sha256": result.hexdigest(), "sampled": sampled}


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
