"""The builder behind spython: a build, and what a built image says of itself.

What spython 0.3.14 does by surprise stays in here: it calls whatever is named `singularity` in
PATH, wants sudo, returns the path of a stale file after a failure, blocks when the builder writes
much to stderr, and ends the process on some errors.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import psutil

from tanren.config.errors import TanrenError, WorkError
from tanren.config.load import repository
from tanren.images.definition import Image

TAIL_LINES = 15
_LABEL = "org.tanren."
# Every kernel mounts gzip. mksquashfs's own level 9 takes six times the CPU of 4, for 4 % less.
_PACKING = "-comp gzip -Xcompression-level 4 -all-time 0 -mkfs-time 0"
# What a builder's log says, and what to do about it.
_HINTS = (
    (r"No space left on device", "free some space, or set TMPDIR to a larger node-local folder"),
    (r"Failed getting release file|Couldn't download|Temporary failure resolving",
     "check that this machine reaches the mirror; DEBIAN_MIRROR=URL names another"),
    (r"user namespace|newuidmap|no subuid|fakeroot.*(mapping|not)",
     "ask the site for user namespaces and a range for you in /etc/subuid and /etc/subgid"),
    (r"unauthorized|denied: requested access", "log in to the registry: apptainer registry login"),
    (r"no longer applies", "the patch's own text says when it may be dropped"),
)  # fmt: skip


@dataclass(frozen=True)
class Builder:
    """The program that builds, as `launch/container.py` found it."""

    binary: Path
    version: str


@dataclass(frozen=True)
class Places:
    """Where a build reads and writes.

    `scratch` must be on a local disk; `cache` keeps wheels and the base's layers between builds.
    """

    images: Path
    cache: Path
    scratch: Path
    debian_mirror: str | None = None
    gpu: bool = False


Report = Callable[[str], None]


@contextlib.contextmanager
def tool(builder: Builder, places: Places, scratch: Path) -> Iterator[Any]:
    """spython's client, bound to one binary, with its folders where the site allows them.

    Inside, the current folder is the repository: a definition's %files start there.
    """
    shim = scratch / "bin"
    shim.mkdir(parents=True, exist_ok=True)
    program = shim / "singularity"
    # TANREN_LOG: spython reads one of two pipes, and a builder that fills the other one waits for
    # ever, so a build writes both to its log.
    program.write_text(
        '#!/bin/sh\n[ -z "${TANREN_LOG-}" ] || exec >>"$TANREN_LOG" 2>&1\n'
        f"exec '{builder.binary}' \"$@\"\n"
    )
    program.chmod(0o755)
    before, folder = dict(os.environ), Path.cwd()
    (places.cache / "layers").mkdir(parents=True, exist_ok=True)
    for name in ("CACHEDIR", "TMPDIR"):
        where = places.cache / "layers" if name == "CACHEDIR" else scratch
        os.environ[f"APPTAINER_{name}"] = os.environ[f"SINGULARITY_{name}"] = str(where)
    for name in ("SOURCE_DATE_EPOCH", "APPTAINER_BIND", "SINGULARITY_BIND"):
        os.environ.pop(name, None)
    os.environ["PATH"] = f"{shim}{os.pathsep}{before.get('PATH', '')}"
    os.chdir(repository())
    try:
        from spython.main import get_client

        yield get_client(quiet=True)
    except SystemExit:
        raise WorkError(
            builder.binary, "spython gave up without a word",
            f"{builder.binary} version; make doctor says what it lacks",
        ) from None  # fmt: skip
    finally:
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(before)


def run_builder(
    client: Any, image: Image, values: dict[str, str], binds: Sequence[tuple[Path, str]],
    partial: Path, places: Places, log: Path, report: Report,
) -> None:  # fmt: skip
    """Run the builder on an image's definition.

    Args:
        values: of the definition's templates.
        binds: folders that the build sees, and where; they are not written.
    Raises:
        WorkError: it failed, with the end of its log.
    """
    options = [
        word for folder, place in binds for word in ("--bind", f"{folder}:{place}:ro")
    ]  # fmt: skip
    options += ["--nv"] if places.gpu else []
    options += ["--fakeroot"] if os.getuid() else []
    for key, value in values.items():
        options += ["--build-arg", f"{key}={value}"]
    helped = subprocess.run(["singularity", "build", "--help"], capture_output=True, text=True,
                            check=False).stdout  # fmt: skip
    if "--mksquashfs-args" in helped:  # SingularityCE has no such option; its images differ in time
        options += ["--mksquashfs-args", _PACKING]
    failure: list[BaseException] = []

    def work() -> None:
        os.environ["TANREN_LOG"] = str(log)
        try:
            _, lines = client.build(
                recipe=str(image.definition), image=str(partial), sudo=False, stream=True,
                quiet=True, options=options,
                # Without it a label that the builder sets itself (its date) stays as it was.
                force=True,
            )  # fmt: skip
            for _ in lines:
                pass
        except (subprocess.CalledProcessError, SystemExit) as error:
            failure.append(error)
        finally:
            os.environ.pop("TANREN_LOG", None)

    _while_working(work, lambda: report(_doing(log)))
    if failure or not partial.exists():
        raise _failed(image, log)


def _while_working(work: Callable[[], None], tick: Callable[[], None]) -> None:
    """Run `work` in a thread and `tick` beside it; Ctrl-C reaches this thread and the builder."""
    from threading import Thread

    thread = Thread(target=work, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            tick()
            thread.join(0.3)
    except BaseException:
        # A signal that reached this process alone: the builder must not go on without us.
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
        thread.join(10)
        raise


def _doing(log: Path) -> str:
    """What a builder is at, from the end of its log."""
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 20_000))
        text = file.read().decode(errors="replace")
    marks = (
        ("Creating SIF file", "writing the image"),
        ("Running testscript", "testing (%test)"),
        ("Successfully installed", "finishing the installation"),
        ("Processing ./", "installing packages"),
        ("Running post scriptlet", "installing packages"),
        ("I: Configuring", "configuring Debian"),
        ("I: Unpacking", "unpacking Debian"),
        ("I: Retrieving", "fetching Debian"),
        ("Extracting", "unpacking the base"),
        ("Copying blob", "fetching the base"),
    )
    places = [(text.rfind(mark), doing) for mark, doing in marks if mark in text]
    return max(places)[1] if places else "making the base"


def _failed(image: Image, log: Path) -> TanrenError:
    lines = log.read_text(errors="replace").splitlines()
    tail = "".join(f"\n    | {line[:300]}" for line in lines[-TAIL_LINES:])
    end = "\n".join(lines[-200:])
    hints = [hint for pattern, hint in _HINTS if re.search(pattern, end, re.IGNORECASE)]
    next_step = hints[0] if hints else "read the log, mend it, and run the same command again"
    stage = "its %test failed" if "Running testscript" in end else "the build failed"
    return WorkError(
        log,
        f"{stage}, so there is no new {image.name}.sif",
        f"{next_step}. The log ends with:{tail}",
    )


def packages_of(client: Any, partial: Path) -> dict[str, dict[str, str]]:
    """The package lists that %post wrote down inside the image."""
    answer = client.execute(
        str(partial), ["cat", "/opt/tanren/packages.json"], return_result=True, quiet=True
    )
    if answer["return_code"]:
        raise WorkError(
            partial, f"does not start: {answer['message']}",
            "make doctor says what containers lack on this machine",
        )  # fmt: skip
    message = answer["message"]
    value: dict[str, dict[str, str]] = orjson.loads(
        message if isinstance(message, str) else message[0]
    )
    return value


def labels_of(client: Any, path: Path) -> dict[str, str]:
    """tanren's labels of an image, without their prefix."""
    answer = client.inspect(str(path), quiet=True)
    if "attributes" not in answer:
        raise WorkError(
            path, f"cannot be inspected: {answer.get('message')}",
            "build it again: make build-image IMAGE=...",
        )  # fmt: skip
    labels: dict[str, str] = answer["attributes"]["labels"]
    return {
        key.removeprefix(_LABEL): value for key, value in labels.items() if key.startswith(_LABEL)
    }
