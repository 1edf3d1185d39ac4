"""A submission: an image that holds a model and the program that answers with it.

It is layered on an image that is there, cpu or train, so its packages are those that the model was
trained with, and its build fetches nothing. What goes in: containers/answer.py, the Hugging Face
folder at /model, and the settings that the program has where its command line states none.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import orjson
from pydantic import Field

from tanren import runs
from tanren.config.errors import RequestError
from tanren.config.fields import Strict
from tanren.config.load import repository
from tanren.images import build as building
from tanren.images import sif
from tanren.images.builder import Builder, Places, Report
from tanren.images.definition import IMAGES, Image, read_versions, source_files
from tanren.images.lock import Base, Lock, check_definition, image_file

IMAGE = Image("submission", "an exported model and the program that answers with it")
BASES = tuple(image.name for image in IMAGES.values() if image.engine)
# Where a build finds the model and the settings: folders that every base has.
_MODEL_IN_BUILD, _SETTINGS_IN_BUILD = "/mnt", "/srv"
_SETTINGS_FILE = "answer.json"  # containers/answer.py reads it under this name


class Settings(Strict):
    """What containers/answer.py does where its command line states nothing else."""

    max_tokens: int = Field(default=1024, ge=1)
    temperature: float = Field(default=0.0, ge=0)
    batch_size: int = Field(default=16, ge=1)
    question: str = Field(default="{problem}", pattern=r"\{problem\}")


def base_image(images: Path, wanted: str | None) -> tuple[Path, Lock]:
    """The image that a submission is layered on: the wish, else train where it is there, else cpu.

    Raises:
        RequestError: it is not there, is another checkout's, or has no packages for a model.
    """
    if wanted is not None and wanted not in BASES:
        raise RequestError(
            f"BASE={wanted}", "is no image that a model answers in", " or ".join(BASES)
        )
    there = image_file(images, IMAGES["train"]).exists()
    image = IMAGES[wanted or ("train" if there else "cpu")]
    path = image_file(images, image)
    return path, check_definition(path, image)


def digest() -> str:
    """SHA-256 over the definition and the files that it copies."""
    content = hashlib.sha256()
    for file in source_files(IMAGE):
        content.update(f"{file}\0".encode() + (repository() / file).read_bytes() + b"\0")
    return content.hexdigest()


def files_of(model: Path) -> dict[str, str]:
    """SHA-256 of each file of a Hugging Face folder.

    Raises:
        RequestError: it holds adapters alone, or no weights.
    """
    if not (model / "config.json").exists():
        raise RequestError(
            model, "holds adapters without their base", 'make export SET="adapters=merged" ...'
        )
    found = {str(p.relative_to(model)): p for p in sorted(model.rglob("*")) if p.is_file()}
    if not any(name.endswith(".safetensors") for name in found):
        raise RequestError(model, "holds no weights (.safetensors)", "make export ITER=latest ...")
    return {name: sif.sha256(path) for name, path in found.items()}


def build(
    model: Path, target: Path, base: tuple[Path, Lock], settings: Settings, builder: Builder,
    places: Places, report: Report,
) -> Lock:  # fmt: skip
    """Build the image of a submission, and its lock; it has its name when its %test has passed.

    Args:
        model: a Hugging Face folder, as an export makes it.
        base: the image below and its lock, as `base_image` gives them.
    Raises:
        RequestError: this machine cannot build it. WorkError: the build failed; no image is left.
    """
    base_file, base_lock = base
    model, target = model.resolve(), target.absolute()
    scratch = building.scratch_of(target, places)
    places = replace(places, images=target.parent)
    target.parent.mkdir(parents=True, exist_ok=True)
    with runs.locked(target.parent / ".lock"):
        building.remove_left_overs(target, scratch)
        _check_machine(model, base_file, base_lock, places)
        report("reading the model")
        files = files_of(model)
        model_digest = hashlib.sha256(orjson.dumps(files)).hexdigest()
        log = target.with_suffix(".build.log")
        log.write_bytes(b"")
        commit = building.commit_of(IMAGE)
        values = {
            "FROM": str(base_file),
            "BASE": base_lock.image,
            "BASE_DIGEST": f"sha256:{base_lock.sha256}",
            "MODEL": "/".join(model.parts[-4:]),
            "MODEL_DIGEST": f"sha256:{model_digest}",
            "DEFINITION": digest(),
            "COMMIT": f"{commit.id or 'unknown'}{' with changes' if commit.dirty else ''}",
        }
        own = scratch / "settings"
        own.mkdir(parents=True)
        (own / _SETTINGS_FILE).write_bytes(orjson.dumps(settings.model_dump()))
        binds = ((model, _MODEL_IN_BUILD), (own, _SETTINGS_IN_BUILD))
        return building.publish(
            IMAGE, values, binds, Base(name=base_lock.image, digest=values["BASE_DIGEST"]),
            commit, target, builder, places, scratch, log, report,
            model=files, model_from=str(model),
        )  # fmt: skip


def _check_machine(model: Path, base: Path, base_lock: Lock, places: Places) -> None:
    """Room for the unpacked base and the model, and a builder that may build."""
    for path in (model, base):
        if any(character in str(path) for character in ",: "):
            raise RequestError(
                path, "cannot be built from: its name has a comma, a colon or a space", "rename it"
            )
    weights = sum(p.stat().st_size for p in model.rglob("*") if p.is_file()) / 2**30
    unpacked = read_versions(IMAGES[base_lock.image]).build_gib
    building.check_room(places.scratch, unpacked + weights, "this submission", "TMPDIR")
    building.check_room(
        places.images, base_lock.bytes / 2**30 + weights, "this submission",
        "RUNS (or runs in user.toml)",
    )  # fmt: skip
    if os.getuid() != 0:
        building.check_namespaces()
