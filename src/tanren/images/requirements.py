"""Locks of Python packages (uv resolves), and the wheels that a lock names (pip fetches).

Both talk to PyPI with the machine's own settings; no address of it stands in a file here.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tanren.config.errors import RequestError, WorkError
from tanren.config.load import repository
from tanren.images.definition import CONTAINERS, IMAGES, Image, Versions, read_versions

NATIVE = CONTAINERS / "locks" / "native.txt"
# lm-evaluation-harness, which has an environment of its own and no image.
EVAL = CONTAINERS / "locks" / "eval.txt"
# NeMo on a CPU, of the same versions as the image nemo.
NEMO_CPU = CONTAINERS / "locks" / "nemo-cpu.txt"
APART = ("native", "eval", "nemo-cpu")
# Every image is x86_64; the C library's version is the newest that a wheel may ask for.
_OLDEST_GLIBC = 5


def packages_of(lock: Path) -> dict[str, str]:
    """Names and versions in a lock."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", lock.read_text(), re.MULTILINE)
    if not found:
        raise RequestError(lock, "names no package", f"git checkout {lock}, or make lock")
    return dict(found)


def renew(names: list[str], *, upgrade: bool) -> list[Path]:
    """Write the locks anew: the native one, the harness's, NeMo's, and those of the images.

    Args:
        upgrade: take the newest versions; without it only what a changed requirement asks for.
    Returns:
        the files whose content changed.
    """
    uv = Path(sys.executable).with_name("uv")
    if not uv.exists():
        raise RequestError(uv, "is not there", "bin/setup dev")
    root = repository()
    before = {path: path.read_text() for path in (root / CONTAINERS / "locks").glob("*.txt")}
    if "native" in names:
        _compile(uv, _native_options(root), root / NATIVE, upgrade)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            if name == "eval":
                _compile(uv, _eval_options(root, Path(folder)), root / EVAL, upgrade)
            elif name == "nemo-cpu":
                _compile(uv, _nemo_options(root, Path(folder)), root / NEMO_CPU, upgrade)
            elif name != "native":
                options = _image_options(IMAGES[name], root, Path(folder))
                _compile(uv, options, root / IMAGES[name].lock, upgrade)
    after = sorted((root / CONTAINERS / "locks").glob("*.txt"))
    return [path for path in after if before.get(path) != path.read_text()]


def _native_options(root: Path) -> list[str]:
    return [str(root / "pyproject.toml"), "--all-extras", "--universal", "--python-version", "3.10",
            "--no-annotate"]  # fmt: skip


def _eval_options(root: Path, folder: Path) -> list[str]:
    """The same versions as everywhere where there are any; torch and its own are native.txt's."""
    never = folder / "eval.never"
    never.write_text("torch ; sys_platform == 'never'\n")
    return [str(root / EVAL.with_suffix(".in")), "-c", str(root / NATIVE), "--override",
            str(never), "--no-emit-package", "torch", "--universal", "--python-version", "3.11",
            "--no-annotate"]  # fmt: skip


def _nemo_options(root: Path, folder: Path) -> list[str]:
    """The image's pins, torch as everywhere; what its GPU build brings is left to pip.

    nvidia-resiliency-ext has wheels for glibc 2.39 and newer only, and NeMo does without it.
    """
    torch = packages_of(root / NATIVE)
    pins = {**read_versions(IMAGES["nemo"], root).pins, "torch": torch["torch"]}
    gpu = [name for name in torch if name.startswith(("nvidia-", "cuda-", "triton"))]
    never = folder / "nemo-cpu.never"
    never.write_text(
        "".join(f"{name} ; sys_platform == 'never'\n" for name in [*gpu, "nvidia-resiliency-ext"])
    )
    pinned = folder / "nemo-cpu.pins"
    pinned.write_text("".join(f"{name}=={version}\n" for name, version in pins.items()))
    return [str(root / NEMO_CPU.with_suffix(".in")), "-c", str(pinned), "--override", str(never),
            "--python-version", "3.11", "--no-annotate"]  # fmt: skip


def _image_options(image: Image, root: Path, folder: Path) -> list[str]:
    versions = read_versions(image, root)
    options = [str(root / image.requirements)]
    if image.engine:
        # The same versions as outside of the image, so that what is tested here is what runs there.
        options += [str(root / "pyproject.toml"), "--extra", "engine", "--extra", "tracking",
                    "-c", str(root / NATIVE)]  # fmt: skip
    pins = folder / f"{image.name}.pins"
    pins.write_text("".join(f"{name}=={version}\n" for name, version in versions.pins.items()))
    never = folder / f"{image.name}.never"
    never.write_text(
        "".join(
            f"{name} ; sys_platform == 'never'\n" for name in [*versions.kept, *versions.left_out]
        )
    )
    platform = f"x86_64-manylinux_{versions.glibc.replace('.', '_')}"
    return [*options, "-c", str(pins), "--override", str(never), "--generate-hashes",
            "--no-annotate", "--python-version", versions.python,
            "--python-platform", platform]  # fmt: skip


def _compile(uv: Path, options: list[str], lock: Path, upgrade: bool) -> None:
    command = [str(uv), "pip", "compile", "--quiet", "--no-emit-index-url", "--no-emit-find-links",
               "--custom-compile-command", "make lock", *options, "-o", str(lock)]  # fmt: skip
    command += ["--upgrade"] if upgrade else []
    # uv has settings of its own; the machine's are pip's.
    environment = dict(os.environ)
    for theirs, ours in (
        ("PIP_FIND_LINKS", "UV_FIND_LINKS"),
        ("PIP_INDEX_URL", "UV_DEFAULT_INDEX"),
        ("PIP_EXTRA_INDEX_URL", "UV_INDEX"),
    ):
        if theirs in environment:
            environment.setdefault(ours, environment[theirs])
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise WorkError(
            lock, f"cannot be made: {done.stderr.strip()}",
            "mend what uv names, in the .in file beside it or in the network to PyPI",
        )  # fmt: skip


def platforms(glibc: str) -> list[str]:
    """The wheel tags that a C library of this version can load, newest first."""
    newest = int(glibc.split(".")[1])
    numbered = [f"manylinux_2_{n}_x86_64" for n in range(newest, _OLDEST_GLIBC - 1, -1)]
    return [*numbered, "manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]


def fetch_wheels(versions: Versions, folder: Path, log: Path) -> None:
    """Bring every file of an image's lock into a folder, each checked by its hash.

    What is there already stays, so that a call that was interrupted goes on.

    Raises:
        WorkError: PyPI cannot be reached, or a file has another hash than the lock says.
    """
    lock = repository() / versions.image.lock
    folder.mkdir(parents=True, exist_ok=True)
    wanted = len(packages_of(lock))
    tag = "cp" + versions.python.replace(".", "")
    command = [
        sys.executable, "-m", "pip", "download", "--require-hashes", "--no-deps", "--dest",
        str(folder), "-r", str(lock), "--python-version", versions.python, "--implementation", "cp",
        "--abi", tag, "--abi", "abi3", "--abi", "none", "--disable-pip-version-check", "--no-input",
        "--progress-bar", "off",
    ]  # fmt: skip
    for platform in platforms(versions.glibc):
        command += ["--platform", platform]
    with log.open("ab") as output:
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        said = [line for line in log.read_text(errors="replace").splitlines() if "ERROR" in line]
        reason = said[-1] if said else f"pip ended with {done.returncode}"
        raise WorkError(
            lock,
            f"not every package could be fetched: {reason}",
            f"check the network to PyPI (PIP_INDEX_URL for a mirror; PIP_EXTRA_INDEX_URL names "
            f"PyTorch's index of CPU wheels, which cpu and merge need); the log is {log}",
        )
    assert len(list(folder.iterdir())) >= wanted, folder


def remove_other_wheels(parent: Path, kept: Path) -> None:
    """Remove the wheels of earlier locks."""
    for folder in parent.iterdir() if parent.is_dir() else ():
        if folder != kept and folder.is_dir():
            shutil.rmtree(folder)
