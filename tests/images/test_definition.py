"""The definitions take every value from versions.env, and everything else agrees with it."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

from tanren.config.errors import RequestError
from tanren.images import definition
from tanren.images.definition import IMAGES, Image
from tanren.images.requirements import packages_of, platforms
from tests.conftest import REPOSITORY

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ALL = list(IMAGES.values())
KNOWN = {
    "FROM": "host/pytorch@sha256:0", "BASE": "host/pytorch:1", "BASE_DIGEST": "sha256:0",
    "COMMIT": "c0ffee", "DEBIAN_MIRROR": "mirror:/debian", "DEFINITION": "d1",
}  # fmt: skip


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A repository with the containers folder alone, to be changed."""
    shutil.copytree(REPOSITORY / "containers", tmp_path / "containers")
    return tmp_path


@pytest.mark.parametrize("image", ALL, ids=lambda image: image.name)
def test_a_definition_renders_with_every_argument(image: Image) -> None:
    text = definition.render(image, KNOWN)
    assert "{{" not in text
    assert f"org.tanren.image {image.name}" in text
    assert f"/opt/tanren/check.py {image.name} /srv" in text
    assert f"containers/locks/{image.name}.txt /opt/tanren/lock.txt" in text
    head = text.split("%", 1)[0]
    if image.debian:
        assert head.startswith("Bootstrap: debootstrap\nOSVersion: bookworm\nMirrorURL: mirror:")
    else:
        assert head.startswith("Bootstrap: docker\nFrom: host/pytorch@sha256:0\n")


@pytest.mark.parametrize("image", ALL, ids=lambda image: image.name)
def test_a_definition_declares_the_arguments_that_it_uses(image: Image) -> None:
    """Both builders refuse an argument that is not used, and one that is not given."""
    text = (REPOSITORY / image.definition).read_text()
    section = re.search(r"^%arguments\n((?:[ \t]+.*\n)+)", text, re.MULTILINE)
    assert section
    declared = {line.strip().rstrip("=") for line in section[1].splitlines()}
    assert declared == set(definition.TEMPLATE.findall(text))
    assert declared == set(definition.arguments(image, KNOWN))


def test_a_value_that_nobody_states_is_named(copy: Path) -> None:
    path = copy / "containers" / "cpu.def"
    path.write_text(path.read_text() + "\n%help\n    {{ COLOUR }}\n")
    with pytest.raises(RequestError, match=r"cpu.def: asks for COLOUR, which .*versions.env"):
        definition.render(IMAGES["cpu"], KNOWN, copy)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("TRAIN_PYTHON = 3.12", r"versions.env:\d+: 'TRAIN_PYTHON = 3.12' is not KEY=value"),
        ("TRAIN_PYTHON=", r"states no TRAIN_PYTHON"),
    ],
)
def test_a_wrong_line_of_the_versions_is_named(copy: Path, line: str, message: str) -> None:
    path = copy / "containers" / "versions.env"
    path.write_text(path.read_text().replace("TRAIN_PYTHON=3.12", line))
    with pytest.raises(RequestError, match=message):
        definition.read_versions(IMAGES["train"], copy)


def test_there_is_no_other_image() -> None:
    with pytest.raises(RequestError, match=r"train, te19, nemo, merge, cpu"):
        definition.image_named("gpu")


def test_the_digest_of_a_definition_changes_with_each_of_its_files(copy: Path) -> None:
    image = IMAGES["te19"]
    files = definition.source_files(image, copy)
    assert Path("containers/patches/megatron-core-0.10.0.patch") in files
    assert len(files) == 5
    seen = {definition.definition_digest(image, copy)}
    for file in files:
        path = copy / file
        path.write_text(path.read_text() + "# changed\n")
        seen.add(definition.definition_digest(image, copy))
    versions = copy / "containers" / "versions.env"
    text = versions.read_text()
    versions.write_text(text.replace("TE19_BASE=", "TE19_BASE=other"))
    seen.add(definition.definition_digest(image, copy))
    assert len(seen) == 7
    before = definition.definition_digest(image, copy)
    # Another image's versions, and a digest that is stated after the first build.
    for old, new in (("TE19_DIGEST=", "TE19_DIGEST=sha256:1"), ("TRAIN_GLIBC=", "TRAIN_GLIBC=9")):
        versions.write_text(versions.read_text().replace(old, new))
    assert definition.definition_digest(image, copy) == before


def test_a_definition_that_copies_nothing_is_an_error(copy: Path) -> None:
    (copy / "containers" / "check.py").unlink()
    with pytest.raises(RequestError, match=r"cpu.def: copies containers/check.py, which is not"):
        definition.definition_digest(IMAGES["cpu"], copy)


@pytest.mark.parametrize("image", ALL, ids=lambda image: image.name)
def test_a_lock_has_the_stated_versions_and_hashes_and_keeps_the_base(image: Image) -> None:
    versions = definition.read_versions(image)
    path = REPOSITORY / image.lock
    locked = packages_of(path)
    assert versions.pins
    assert {name: locked[name] for name in versions.pins} == versions.pins
    assert not set(locked) & {*versions.kept, *versions.left_out}
    entries = re.split(r"\n(?=\S)", re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE))
    assert len(entries) == len(locked) > 20
    for entry in entries:
        assert "--hash=sha256:" in entry, entry
    # Or %post finds that their requirements are not met.
    given = "--without {{ WITHOUT }}" in (REPOSITORY / image.definition).read_text()
    assert given == bool(versions.left_out)
    if not image.debian:
        assert {"torch", "transformer-engine", "flash-attn"} <= set(versions.kept)


def test_the_engine_has_the_same_versions_in_its_images_and_outside() -> None:
    """What is tested on the CPU is what runs on GPUs."""
    native: dict[str, set[str]] = {}
    text = (REPOSITORY / "containers" / "locks" / "native.txt").read_text()
    for name, version in re.findall(r"^([a-z0-9._-]+)==([^\s;]+)", text, re.MULTILINE):
        native.setdefault(name, set()).add(version)
    compared = 0
    for name in ("cpu", "train"):
        for package, version in packages_of(REPOSITORY / IMAGES[name].lock).items():
            if package in native:
                compared += 1
                assert version.removesuffix("+cpu") in native[package], (name, package)
    assert compared > 80


def test_other_files_state_the_same_versions() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    engine = project["optional-dependencies"]["engine"]
    for name in ("cpu", "train"):
        pin = definition.read_versions(IMAGES[name]).pins["megatron-core"]
        assert f"megatron-core=={pin}" in engine
    pages = [REPOSITORY / "docs" / "design.md", REPOSITORY / "docs" / "images.md"]
    known = {definition.read_versions(image).pins.get("megatron-core") for image in ALL}
    for page in pages:
        stated = set(re.findall(r"megatron-core (\d+\.\d+\.\d+)", page.read_text()))
        assert stated
        assert stated <= known | {"0.9.0"}, page
    table = pages[1].read_text()
    for image in ALL:
        row = next(line for line in table.splitlines() if line.startswith(f"| `{image.name}` |"))
        versions = definition.read_versions(image)
        tag = versions.values.get("BASE", "").partition(":")[2].removesuffix("-py3")
        assert (tag or "Debian 12") in row
        for package in ("megatron-core", "nemo-toolkit", "mergekit"):
            if package in versions.pins:
                assert f"{package} {versions.pins[package]}" in row, row


def test_a_patch_is_for_the_version_that_its_image_has() -> None:
    te19 = definition.read_versions(IMAGES["te19"]).pins["megatron-core"]
    for version in ("0.9.0", te19):
        path = REPOSITORY / "containers" / "patches" / f"megatron-core-{version}.patch"
        lines = path.read_text().splitlines()
        assert lines[0] == f"Package: megatron-core {version}"
        for field in ("Origin:", "Reason:", "Drop:"):
            assert any(line.startswith(field) for line in lines), (path, field)
    assert f"megatron-core-{te19}.patch" in (REPOSITORY / IMAGES["te19"].definition).read_text()


def test_the_wheels_of_an_older_c_library_are_accepted_and_of_a_newer_not() -> None:
    found = platforms("2.28")
    assert found[0] == "manylinux_2_28_x86_64"
    assert "manylinux_2_17_x86_64" in found
    assert "manylinux2014_x86_64" in found
    assert "manylinux_2_34_x86_64" not in found
