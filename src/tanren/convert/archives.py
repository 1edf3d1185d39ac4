"""Archives of a whole checkpoint, as NeMo 1's .nemo: a tar file without compression."""

from __future__ import annotations

import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tanren.config.errors import RequestError, WorkError
from tanren.plan.paths import PARTIAL


def write_to(target: Path, *, force: bool) -> Path:
    """The file that a conversion is to make.

    Raises:
        RequestError: there is one already, or a folder.
    """
    final = target.expanduser().absolute()
    if final.is_dir():
        raise RequestError(target, "is a folder", "name a file for the archive")
    if final.exists() and not force:
        raise RequestError(
            target, "is there already", "name a new file, or replace it with --force"
        )
    return final


def pack(folder: Path, archive: Path) -> None:
    """Make an archive of what is in a folder; it appears when it is whole."""
    partial = archive.with_name(archive.name + PARTIAL)
    try:
        with tarfile.open(partial, "w") as tar:
            for path in sorted(folder.iterdir()):
                tar.add(path, arcname=f"./{path.name}")
        partial.replace(archive)
    except OSError as error:
        raise WorkError(
            archive, f"cannot be written: {error.strerror}", "make room and run the command again"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def beside(target: Path) -> Iterator[Path]:
    """A folder on the same disk, gone afterwards."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        yield Path(folder)


@contextmanager
def unpacked(archive: Path, scratch: Path) -> Iterator[Path]:
    """What an archive holds, in a folder beside `scratch` that is gone afterwards."""
    with beside(scratch) as folder:
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")
        except (tarfile.TarError, EOFError) as error:
            raise RequestError(archive, f"is no whole archive of NeMo: {error}",
                               "bring the file again") from None  # fmt: skip
        yield folder
