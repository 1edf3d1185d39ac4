"""A machine with a container program that is not a real one, and folders of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tanren.images import requirements
from tanren.images.builder import Builder, Places
from tanren.images.definition import Versions
from tanren.launch import container

FAKE = Path(__file__).with_name("fake_builder.py")


@pytest.fixture
def builder() -> Builder:
    return Builder(FAKE, "apptainer version 1.4.5")


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    """Folders for a build that fetches nothing."""

    def nothing(versions: Versions, folder: Path, log: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(requirements, "fetch_wheels", nothing)
    which = shutil.which
    monkeypatch.setattr(
        shutil, "which", lambda name: "/sbin/debootstrap" if name == "debootstrap" else which(name)
    )
    return Places(tmp_path / "images", tmp_path / "cache", tmp_path / "scratch", "mirror:/debian")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with the fake as `apptainer`, and an empty images folder, which is returned."""
    tools, images = tmp_path / "tools", tmp_path / "images"
    tools.mkdir()
    images.mkdir()
    (tools / "apptainer").symlink_to(FAKE)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setenv("IMAGES", str(images))
    monkeypatch.delenv("RUNTIME", raising=False)
    container.find.cache_clear()
    yield images
    container.find.cache_clear()
