"""Where a conversion reads and writes: refused before it begins, whole or not there at its end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tanren import runs
from tanren.config.errors import RequestError

# What a folder holds that a conversion or a training made: --force replaces no other.
_MADE = ("config.json", "latest_checkpointed_iteration.txt", "model_config.yaml", ".metadata",
         "weights")  # fmt: skip
# What a conversion writes beside the tensors, at most: a large vocabulary's tokenizer, headers.
_BESIDE = 2**26


def read_from(source: Path) -> Path:
    """A folder that a conversion reads, without symbolic links.

    Raises:
        RequestError: it is not there, no folder, or a link that leads to itself.
    """
    try:
        found = source.expanduser().resolve(strict=True)
    except FileNotFoundError:
        raise RequestError(source, "there is no such folder", "check the path") from None
    except (OSError, RuntimeError):  # a loop is a RuntimeError before Python 3.13
        raise RequestError(
            source, "is a symbolic link that leads back to itself",
            f"ls -l {source}, and link it to the folder",
        ) from None  # fmt: skip
    if not found.is_dir():
        raise RequestError(source, "is a file, and not a folder", "name the folder that it is in")
    return found


def write_to(target: Path, source: Path, *, force: bool) -> Path:
    """The folder that a conversion is to make, without symbolic links.

    Args:
        source: what `read_from` gave.
        force: replace what is there, if a conversion or a training made it.
    Raises:
        RequestError: it is the source or around it, or there is something that would be lost.
    """
    try:
        final = target.expanduser().resolve()
    except (OSError, RuntimeError):
        final = None
    # A link to itself is resolved to itself by Python 3.13.
    if final is None or final.is_symlink():
        raise RequestError(target, "is a symbolic link that leads back to itself", "name a folder")
    if final == source:
        raise RequestError(target, "is the folder that is read", "name a new folder for the result")
    if final in source.parents:
        raise RequestError(
            target, f"holds {source}, which is read", "name a new folder for the result"
        )
    if not final.exists():
        return final
    if not final.is_dir():
        raise RequestError(target, "is a file", "name a new folder for the result")
    there = sorted(path.name for path in final.iterdir())
    if there and not force:
        raise RequestError(
            target, f"is there already, and holds {', '.join(there[:3])}",
            "name a new folder, or replace it with --force",
        )  # fmt: skip
    if there and not any((final / name).exists() for name in _MADE):
        raise RequestError(
            target, f"is not replaced: with {', '.join(there[:3])} it is no model or checkpoint",
            "name a new folder for the result",
        )  # fmt: skip
    return final


def check_room(target: Path, sizes: Iterable[int]) -> None:
    """Refuse what the disk has no room for, before anything is written.

    Args:
        sizes: of the tensors, in bytes.
    """
    place = target
    while not place.exists():
        place = place.parent
    needed, free = sum(sizes) + _BESIDE, shutil.disk_usage(place).free
    if needed > free:
        raise RequestError(
            target, f"needs {needed / 1e9:.1f} GB, and the disk has {free / 1e9:.1f} GB free",
            "make room, or name a folder on another disk",
        )  # fmt: skip
    if not os.access(place, os.W_OK):
        raise RequestError(target, f"may not be made: {place} is not yours to write in",
                           "name another folder")  # fmt: skip


@contextmanager
def alone(final: Path) -> Iterator[None]:
    """Hold a folder that is being made: a second process would mix its files with these.

    Raises:
        RequestError: another process makes it.
    """
    lock = final.with_name(f".{final.name}.lock")
    with ExitStack() as stack:
        try:
            stack.enter_context(runs.locked(lock))
        except RequestError as error:
            raise RequestError(final, error.problem, error.next_step) from None
        try:
            yield
        finally:
            # While it is held, so that nobody waits for a file that is gone.
            lock.unlink(missing_ok=True)
