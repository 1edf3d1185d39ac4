#!/usr/bin/env python3
"""%post of every image: installs a lock over a base, and proves that the base stayed what it was.

It runs inside the image with the standard library alone. The wheels were fetched beforehand by the
machine that builds, so nothing here needs a network, a registry's address or a CA file.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import py_compile
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
# What a build leaves behind that differs from build to build and that nobody reads in an image.
LEFT_OVERS = (
    "/var/lib/apt/lists", "/var/cache/apt", "/var/cache/debconf", "/var/cache/ldconfig", "/var/log",
    "/root/.cache",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheels", type=Path, required=True, help="the folder of wheels")
    parser.add_argument("--keep", default="", help="packages of the base that must not change")
    parser.add_argument("--without", default="", help="requirements that are left out")
    parser.add_argument("--patch", type=Path, action="append", default=[])
    parser.add_argument("--debian", action="store_true", help="the base is debootstrap's")
    options = parser.parse_args()

    lock = HERE / "lock.txt"
    kept = names(options.keep)
    before = versions(kept)
    print(f"the base has {before}" if kept else "a base without Python packages", flush=True)
    install(lock, options.wheels)
    if versions(kept) != before:
        stop(f"the base's packages changed: {before} before, {versions(kept)} after")
    installed = locked(lock)
    unmet = missing_requirements(installed, kept, names(options.without))
    if unmet:
        stop("requirements are not met: " + "; ".join(unmet))
    for patch in options.patch:
        apply(patch)
    compile_all(installed)
    record()
    if options.debian:
        clean()


def stop(problem: str) -> None:
    sys.exit(f"install.py: {problem}")


def names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def canonical(name: str) -> str:
    """A package's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def distributions() -> dict[str, metadata.Distribution]:
    """Installed packages by canonical name, read anew: pip runs in a process of its own."""
    # The first one found is the one that Python imports.
    found: dict[str, metadata.Distribution] = {}
    for distribution in metadata.distributions():
        found.setdefault(canonical(distribution.metadata["Name"]), distribution)
    return found


def versions(wanted: list[str]) -> dict[str, str | None]:
    """The installed versions of packages; None for what the base does not have."""
    there = distributions()
    return {name: there[name].version if name in there else None for name in wanted}


def locked(lock: Path) -> list[str]:
    """The packages that a lock names."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==", lock.read_text(), re.MULTILINE)
    if not found:
        stop(f"{lock} names no package")
    return [canonical(name) for name in found]


def install(lock: Path, wheels: Path) -> None:
    """Install a lock, every file checked by its hash, and nothing that it does not name."""
    own = sorted(wheels.glob("pip-*.whl"))
    pip = [str(own[0] / "pip")] if own else ["-m", "pip"]
    environment = {
        # NGC's images constrain pip to what they ship; what has to stay is checked by name here.
        **{key: value for key, value in os.environ.items() if not key.startswith("PIP_")},
        "PIP_CONFIG_FILE": os.devnull,
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [
        sys.executable, *pip, "install", "--no-index", "--find-links", str(wheels), "--no-deps",
        "--require-hashes", "--no-build-isolation", "--no-compile", "--no-cache-dir",
        "--root-user-action=ignore", "--break-system-packages", "--disable-pip-version-check",
        "--progress-bar", "off", "-r", str(lock),
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, check=False)
    if done.returncode:
        stop(f"pip ended with {done.returncode}")


def missing_requirements(installed: list[str], kept: list[str], without: list[str]) -> list[str]:
    """What the installed packages require and do not find, without what is left out on purpose.

    A package that is kept counts in whatever version the base has.
    """
    # pip vendors it in every version; the image itself may have another one or none.
    from pip._vendor.packaging.requirements import Requirement

    there = distributions()
    found = []
    for name in installed:
        for text in there[name].requires or []:
            requirement = Requirement(text)
            wanted = canonical(requirement.name)
            if wanted in without or (requirement.marker and not requirement.marker.evaluate(
                {"extra": ""}
            )):  # fmt: skip
                continue
            if wanted not in there:
                found.append(f"{name} needs {requirement}, which is not installed")
            elif wanted not in kept and not requirement.specifier.contains(
                there[wanted].version, prereleases=True
            ):
                found.append(f"{name} needs {requirement}, installed is {there[wanted].version}")
    return found


def apply(patch: Path) -> None:
    """Apply a patch to the package that its first line names, or stop the build with its name.

    The first line is `Package: NAME VERSION`.
    """
    package, version = patch.read_text().splitlines()[0].removeprefix("Package: ").split()
    there = distributions().get(canonical(package))
    if there is None or there.version != version:
        has = f"{package} {there.version}" if there else f"no {package}"
        stop(f"{patch.name} is for {package} {version}, the image has {has}")
    assert there is not None
    if shutil.which("patch") is None:
        stop(f"{patch.name} cannot be applied: the base has no program `patch`")
    site = str(there.locate_file(""))
    command = ["patch", "--strip=1", "--forward", "--fuzz=0", "--directory", site]
    for dry in (["--dry-run"], []):
        done = subprocess.run(
            [*command, *dry, "--input", str(patch)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            stop(f"{patch.name} no longer applies to {package} {version}:\n{done.stdout}")
    print(f"patched {package} {version} with {patch.name}", flush=True)


def compile_all(installed: list[str]) -> None:
    """Bytecode that depends on the source alone: a stored time would differ at every build."""
    there = distributions()
    for name in installed:
        for file in there[name].files or []:
            if file.suffix == ".py":
                compileall.compile_file(
                    str(there[name].locate_file(file)), quiet=2,
                    invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
                )  # fmt: skip


def record() -> None:
    """Write down every package of the image, for its lock and its label."""
    python = {name: package.version for name, package in sorted(distributions().items())}
    debian = {}
    if shutil.which("dpkg-query"):
        listed = subprocess.run(
            ["dpkg-query", "-W", "-f", "${Package} ${Version}\n"],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        debian = dict(line.split() for line in sorted(listed.splitlines()))
    facts = {"python": python, "system": debian}
    (HERE / "packages.json").write_text(json.dumps(facts, indent=1) + "\n")


def clean() -> None:
    """Remove what differs from build to build; /tmp belongs to the machine that builds."""
    for folder in map(Path, LEFT_OVERS):
        for entry in folder.iterdir() if folder.is_dir() else ():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    Path("/etc/hostname").write_text("tanren\n")
    Path("/etc/machine-id").write_text("")


if __name__ == "__main__":
    main()
