"""%post: what it refuses. The whole of it runs in real images (tests/images/test_real.py)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import REPOSITORY


@pytest.fixture(scope="module")
def install() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "install", REPOSITORY / "containers" / "install.py"
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Python path to install pretended packages into."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return tmp_path


def package(site: Path, name: str, version: str, *requires: str) -> None:
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {text}" for text in requires]
    (folder / "METADATA").write_text("\n".join(lines) + "\n")
    (folder / "RECORD").write_text("")


def test_versions_are_found_by_any_spelling(install: ModuleType, site: Path) -> None:
    package(site, "Some.Package_x", "1.5")
    assert install.versions(["some-package-x", "absent"]) == {
        "some-package-x": "1.5", "absent": None,
    }  # fmt: skip


def test_requirements_that_are_not_met_are_named(install: ModuleType, site: Path) -> None:
    package(site, "ours", "1", "kept>=9", "old>=2", "absent", "left-out", "other; extra == 'x'",
            "windows; sys_platform == 'win32'", "dev>=2")  # fmt: skip
    package(site, "kept", "1")
    package(site, "old", "1")
    package(site, "dev", "2.10.0a0")
    assert install.missing_requirements(["ours"], ["kept"], ["left-out"]) == [
        "ours needs old>=2, installed is 1",
        "ours needs absent, which is not installed",
    ]


def test_a_lock_that_names_nothing_is_an_error(install: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "lock.txt").write_text("# nothing\n")
    with pytest.raises(SystemExit, match="names no package"):
        install.locked(tmp_path / "lock.txt")


def test_a_base_that_changed_stops_the_build(
    install: ModuleType, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(site, "kept-one", "1")
    (site / "lock.txt").write_text("ours==1 --hash=sha256:0\n")

    def replaces(lock: Path, wheels: Path) -> None:
        package(site, "ours", "1")
        (site / "kept_one-1.dist-info" / "METADATA").write_text("Name: kept-one\nVersion: 2\n")

    monkeypatch.setattr(install, "HERE", site)
    monkeypatch.setattr(install, "install", replaces)
    monkeypatch.setattr(sys, "argv", ["install.py", "--wheels", "/w", "--keep", "kept-one,absent"])
    with pytest.raises(SystemExit) as error:
        install.main()
    assert str(error.value) == (
        "install.py: the base's packages changed: {'kept-one': '1', 'absent': None} before, "
        "{'kept-one': '2', 'absent': None} after"
    )
    assert not (site / "packages.json").exists()


PATCH = """\
Package: ours 1
Reason: a test.

--- a/ours.py
+++ b/ours.py
@@ -1 +1 @@
-colour = 'red'
+colour = 'blue'
"""


def test_a_patch_applies_or_stops_the_build_with_its_name(install: ModuleType, site: Path) -> None:
    package(site, "ours", "1")
    patch, module = site / "ours-1.patch", site / "ours.py"
    patch.write_text(PATCH)
    module.write_text("colour = 'red'\n")
    install.apply(patch)
    assert module.read_text() == "colour = 'blue'\n"
    with pytest.raises(SystemExit, match=r"ours-1.patch no longer applies to ours 1"):
        install.apply(patch)
    assert module.read_text() == "colour = 'blue'\n"
    module.write_text("colour = 'green'\n")
    with pytest.raises(SystemExit, match=r"ours-1.patch no longer applies"):
        install.apply(patch)
    patch.write_text(PATCH.replace("ours 1", "ours 2"))
    with pytest.raises(SystemExit, match=r"ours-1.patch is for ours 2, the image has ours 1"):
        install.apply(patch)


def test_a_base_without_the_patch_program_is_said(
    install: ModuleType, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(site, "ours", "1")
    (site / "ours-1.patch").write_text(PATCH)
    monkeypatch.setenv("PATH", str(site))
    with pytest.raises(SystemExit, match="the base has no program `patch`"):
        install.apply(site / "ours-1.patch")
