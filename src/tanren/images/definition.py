"""The images, and the one home of their versions: containers/versions.env.

A definition is a template. This module knows which values it takes, which files make it what it is,
and the digest of all of that, which a built image carries as a label.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from tanren.config.errors import RequestError
from tanren.config.load import repository

TEMPLATE = re.compile(r"\{\{\s*([A-Z0-9_]+)\s*\}\}")
# Where the files of an image lie, from the repository's root.
CONTAINERS = Path("containers")


@dataclass(frozen=True)
class Image:
    """One of the five images.

    `engine` says that its packages are those that tanren itself needs, `debian` that it starts
    from debootstrap instead of a base image with a digest.
    """

    name: str
    purpose: str
    engine: bool = False
    debian: bool = False

    @property
    def definition(self) -> Path:
        return CONTAINERS / f"{self.name}.def"

    @property
    def lock(self) -> Path:
        """Exact versions and hashes of the Python packages that the image adds to its base."""
        return CONTAINERS / "locks" / f"{self.name}.txt"

    @property
    def requirements(self) -> Path:
        """The names that the lock is made from; versions are in versions.env."""
        return CONTAINERS / "locks" / f"{self.name}.in"


IMAGES = {
    image.name: image
    for image in (
        Image("train", "midtraining, SFT, DPO and conversion on GPUs", engine=True),
        Image("te19", "checkpoints of the v4 line: read and continued"),
        Image("nemo", "NeMo checkpoints, NeMo SFT and DPO"),
        Image("merge", "mergekit", debian=True),
        Image("cpu", "the tiny recipe, CI, laptops", engine=True, debian=True),
    )
}


def image_named(name: str) -> Image:
    """One of the images.

    Raises:
        RequestError: there is no such image.
    """
    if name not in IMAGES:
        raise RequestError(
            f"IMAGE={name}", "there is no such image", f"the images are {', '.join(IMAGES)}"
        )
    return IMAGES[name]


@dataclass(frozen=True)
class Versions:
    """The values of versions.env that concern one image, by their key without the image's name."""

    image: Image
    values: dict[str, str]

    @property
    def base(self) -> str:
        """What the definition starts from, as a person would name it."""
        return self.values.get("BASE") or f"debian {self.values['SUITE']}"

    @property
    def digest(self) -> str:
        """The base's digest, empty while nobody has stated one."""
        return self.values.get("DIGEST", "")

    @property
    def python(self) -> str:
        return self.values["PYTHON"]

    @property
    def glibc(self) -> str:
        return self.values["GLIBC"]

    @property
    def cuda(self) -> str | None:
        """The base's CUDA; None for an image without."""
        return self.values.get("CUDA")

    @property
    def build_gib(self) -> float:
        """Free space that a build needs: the unpacked base, the packages and the image."""
        return float(self.values["GIB"])

    @property
    def kept(self) -> list[str]:
        """Packages of the base that the image leaves as they are."""
        return [name for name in self.values.get("KEEP", "").split(",") if name]

    @property
    def left_out(self) -> list[str]:
        """Requirements that a package states and that the image does without."""
        return [name for name in self.values.get("WITHOUT", "").split(",") if name]

    @property
    def pins(self) -> dict[str, str]:
        """Package names and the versions that locks/NAME.txt must have."""
        return {
            key.removeprefix("PIN_").lower().replace("_", "-"): value
            for key, value in self.values.items()
            if key.startswith("PIN_")
        }


def read_versions(image: Image, root: Path | None = None) -> Versions:
    """Read containers/versions.env: `KEY=value` lines, the key beginning with the image's name."""
    path = (root or repository()) / CONTAINERS / "versions.env"
    values: dict[str, str] = {}
    prefixes = (["DEBIAN"] if image.debian else []) + [image.name.upper()]
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line or line.startswith("#"):
            continue
        match = re.fullmatch(r"([A-Z0-9]+)_([A-Z0-9_]+)=(\S*)", line)
        if match is None:
            raise RequestError(
                f"{path}:{number}", f"{line!r} is not KEY=value",
                "write it so, without spaces, as the lines beside it",
            )  # fmt: skip
        if match[1] in prefixes:
            values[match[2]] = match[3]
    for key in ("PYTHON", "GLIBC", "GIB", "SUITE" if image.debian else "BASE"):
        if not values.get(key):
            raise RequestError(
                path, f"states no {prefixes[-1]}_{key}",
                "add the line, as the other images have it",
            )  # fmt: skip
    return Versions(image, values)


def source_files(image: Image, root: Path | None = None) -> list[Path]:
    """The files that make an image what it is, relative to the repository."""
    root = root or repository()
    text = (root / image.definition).read_text()
    section = re.search(r"^%files\n((?:[ \t]+.*\n)*)", text, re.MULTILINE)
    copied = [Path(line.split()[0]) for line in section[1].splitlines()] if section else []
    files = [image.definition, *copied]
    for file in files:
        if not (root / file).is_file():
            raise RequestError(
                root / image.definition, f"copies {file}, which is not there",
                f"git checkout {file}, or take it out of %files",
            )  # fmt: skip
    return files


def definition_digest(image: Image, root: Path | None = None) -> str:
    """SHA-256 over the definition, the files that it copies, and its versions."""
    root = root or repository()
    content = hashlib.sha256()
    for file in source_files(image, root):
        content.update(f"{file}\0".encode() + (root / file).read_bytes() + b"\0")
    for key, value in sorted(read_versions(image, root).values.items()):
        # The room that a build needs changes nothing, nor what is said of the base beside it; a
        # digest that is stated later neither.
        if key not in ("GIB", "CUDA", "DIGEST"):
            content.update(f"{key}={value}\0".encode())
    return content.hexdigest()


def arguments(image: Image, known: dict[str, str], root: Path | None = None) -> dict[str, str]:
    """The value of every template of a definition, and no other.

    Args:
        known: values that are not in versions.env (the commit, the mirror, the base's digest).
    Raises:
        RequestError: the definition asks for a value that nobody states.
    """
    root = root or repository()
    text = (root / image.definition).read_text()
    prefix = "DEBIAN_" if image.debian else ""
    stated = {
        **{prefix + key: value for key, value in read_versions(image, root).values.items()},
        **known,
    }
    wanted = sorted(set(TEMPLATE.findall(text)))
    absent = [name for name in wanted if name not in stated]
    if absent:
        raise RequestError(
            root / image.definition,
            f"asks for {', '.join(absent)}, which containers/versions.env does not state",
            "state them there",
        )
    return {name: stated[name] for name in wanted}


def render(image: Image, known: dict[str, str], root: Path | None = None) -> str:
    """A definition's text with its values, as the builder reads it."""
    values = arguments(image, known, root)
    text = ((root or repository()) / image.definition).read_text()
    return TEMPLATE.sub(lambda match: values[match[1]], text)
