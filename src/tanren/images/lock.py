"""IMAGE.sif.lock.json: what an image is, beside the image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tanren import runs
from tanren.config.errors import RequestError
from tanren.config.fields import Strict
from tanren.config.load import repository
from tanren.images.definition import IMAGES, Image, definition_digest


class Base(Strict):
    """What an image starts from; the digest is None for a base that has none (debootstrap)."""

    name: str
    digest: str | None


class Commit(Strict):
    """The newest commit that changed a file of the definition, and whether one was changed since.

    Not the checkout's commit: the same definition makes the same image in every later checkout.
    """

    id: str | None
    dirty: bool | None


class Lock(Strict):
    """The facts of a built image."""

    format: int = 1
    image: str
    sha256: str
    bytes: int
    base: Base
    definition: str
    commit: Commit
    builder: str
    built: str
    seconds: float
    python: dict[str, str]
    system: dict[str, str]
    # Of a submission: SHA-256 of each file of its model, and the folder that they come from.
    model: dict[str, str] | None = None
    model_from: str | None = None

    def facts(self) -> dict[str, Any]:
        """What a passport says of the image that a run used."""
        return self.model_dump(exclude={"format", "seconds"})


def image_file(folder: Path, image: Image) -> Path:
    """Where an image lies."""
    return folder / f"{image.name}.sif"


def lock_file(sif: Path) -> Path:
    """The lock beside an image."""
    return sif.with_name(sif.name + ".lock.json")


def read_lock(sif: Path) -> Lock:
    """Read the lock beside an image.

    Raises:
        RequestError: it is missing, is no lock, or belongs to another file.
    """
    path = lock_file(sif)
    build = f"make build-image IMAGE={sif.stem}"
    if not sif.exists():
        raise RequestError(sif, "there is no such image", build)
    try:
        lock = Lock.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise RequestError(
            path, "is missing: nobody knows what the image beside it is made from",
            f"copy it from where the image comes from, or {build}",
        ) from None  # fmt: skip
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise RequestError(
            path, f"is no lock of an image ({field}: {first['msg']})", build
        ) from None
    if sif.stat().st_size != lock.bytes:
        raise RequestError(
            sif,
            f"has {sif.stat().st_size:,} bytes, its lock says {lock.bytes:,}: the copy is not "
            "whole, or the lock is another image's",
            f"copy both again, or {build}",
        )
    return lock


def write_lock(sif: Path, lock: Lock) -> None:
    """Write the lock beside an image."""
    value: dict[str, Any] = lock.model_dump()
    runs.write_json(lock_file(sif), value)


def check_definition(sif: Path, image: Image, root: Path | None = None) -> Lock:
    """The lock of an image that was made from this checkout's definition.

    Raises:
        RequestError: the image was made from another one.
    """
    lock = read_lock(sif)
    if lock.image != image.name:
        raise RequestError(sif, f"holds the image {lock.image}, not {image.name}",
                           f"make build-image IMAGE={image.name}")  # fmt: skip
    here = definition_digest(image, root)
    if lock.definition != here:
        commit = f"commit {lock.commit.id[:12]}" if lock.commit.id else "an unknown commit"
        raise RequestError(
            sif,
            f"was built from another definition ({commit}: {lock.definition[:12]}) than this "
            f"checkout's ({here[:12]})",
            f"make build-image IMAGE={image.name}, or check out that commit",
        )
    return lock


def differences(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Packages whose versions differ, as `libc6 2.36-9 → 2.36-10`."""
    names = sorted(before.keys() | after.keys())
    return [
        f"{name} {before.get(name, 'absent')} → {after.get(name, 'absent')}"
        for name in names
        if before.get(name) != after.get(name)
    ]


def renew_system_lock(images: Path) -> list[Path]:
    """Take the Debian packages of the cpu image that was built here as those of every build."""
    lock = read_lock(image_file(images, IMAGES["cpu"]))
    path = repository() / "containers" / "locks" / "debian.txt"
    lines = [f"{name}={version}\n" for name, version in sorted(lock.system.items())]
    head = "# Debian packages of cpu and merge; `bin/tanren image lock debian` writes them anew.\n"
    content = head + "".join(lines)
    if path.exists() and path.read_text() == content:
        return []
    path.write_text(content)
    return [path]


def system_lock(root: Path | None = None) -> dict[str, str]:
    """The Debian packages that cpu and merge are known to consist of."""
    path = (root or repository()) / "containers" / "locks" / "debian.txt"
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)
