"""What the repository says twice is the same both times."""

from __future__ import annotations

import re
import sys

from tests.conftest import REPOSITORY, tracked

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
LOCK = (REPOSITORY / "containers" / "locks" / "native.txt").read_text()


def name_of(requirement: str) -> str:
    return re.split(r"[\[<>=;! ]", requirement)[0].lower().replace("_", "-")


def test_every_dependency_has_an_exact_version() -> None:
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    wanted = [requirement for group in groups for requirement in group]
    assert wanted
    locked = {
        name_of(line) for line in LOCK.splitlines() if re.match(r"^[A-Za-z0-9._-]+==\S+", line)
    }
    assert {name_of(requirement) for requirement in wanted} - locked == set()
    assert "megatron-core==0.16.1" in LOCK


def test_ci_runs_the_readmes_test_command() -> None:
    ci = (REPOSITORY / ".ci" / "run").read_text().splitlines()
    assert "make test" in ci
    assert "make check" in ci


def test_the_house_in_the_design_is_the_house() -> None:
    text = (REPOSITORY / "docs" / "design.md").read_text()
    for path in sorted((REPOSITORY / "src" / "tanren").rglob("*.py")):
        if not path.name.startswith("__"):
            assert path.name in text or path.stem in text, path


def test_no_module_has_grown_past_its_room() -> None:
    """The style's rule: up to 400 lines, then it is split along the house's plan."""
    modules = tracked("src/*.py")
    assert len(modules) > 200
    lines = {name: (REPOSITORY / name).read_text().count("\n") for name in modules}
    assert {name: count for name, count in lines.items() if count > 400} == {}


def test_no_file_names_a_package_registry_by_its_host() -> None:
    """PyPI and the Debian mirror are the machine's own settings."""
    files = [name for name in tracked() if not name.endswith((".png", ".xz"))]
    assert files
    hosts = re.compile(r"(pypi|pythonhosted|debian|download\.pytorch)\.(org|io)")
    # Checkpoints that tests read are no text, but hold some.
    texts = {name: (REPOSITORY / name).read_text(errors="replace") for name in files}
    assert [name for name, text in texts.items() if hosts.search(text)] == []
    bases = [name for name, text in texts.items() if re.search(r"nvcr[.]io", text)]
    assert bases == ["containers/versions.env"]
