"""Builds an image: checks, wheels, the builder behind spython, the gate, the lock.

Nothing gets an image's final name before its %test has passed and its lock is known. What spython
0.3.14 does by surprise stays in here: it calls whatever is named `singularity` in PATH, wants sudo,
returns the path of a stale file after a failure, blocks when the builder writes much to stderr, and
ends the process on some errors.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import psutil

from tanren import runs
from tanren.config.errors import RequestError, TanrenError, WorkError
from tanren.config.load import repository
from tanren.images import registry, requirements, sif
from tanren.images.definition import (
    CONTAINERS,
    Image,
    Versions,
    arguments,
    definition_digest,
    read_versions,
    source_files,
)
from tanren.images.lock import (
    Base,
    Commit,
    Lock,
    differences,
    image_file,
    lock_file,
    read_lock,
    system_lock,
    write_lock,
)

TAIL_LINES = 15
# Where a build finds the wheels and the repository: folders that every base has.
WHEELS_IN_BUILD, REPOSITORY_IN_BUILD = "/mnt", "/srv"
_LABEL = "org.tanren."
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


def build(image: Image, builder: Builder, places: Places, report: Report) -> tuple[Lock, list[str]]:
    """Build an image and its lock.

    Args:
        report: called with what is being done, a few times a second while the builder works.
    Returns:
        the lock, and what a person should know about it (packages that moved since the last one).
    Raises:
        RequestError: the machine cannot build it. WorkError: the build failed; no image is left.
    """
    versions = read_versions(image)
    target = image_file(places.images, image)
    places.images.mkdir(parents=True, exist_ok=True)
    scratch = places.scratch / f"tanren-build-{os.getuid()}-{image.name}"
    with runs.locked(places.images / f".{image.name}.lock"):
        _remove_left_overs(target, scratch)
        _check_machine(versions, places)
        before = _previous(target)
        base = _base(versions, before)
        log = places.images / f"{image.name}.build.log"
        log.write_bytes(b"")
        report("fetching packages")
        wheels = _wheels(versions, places, log)
        partial = places.images / f".{target.name}.{os.getpid()}.partial"
        began = time.monotonic()
        scratch.mkdir(parents=True)
        try:
            commit = _commit(image)
            values = _values(image, base, commit, places)
            with _tool(builder, places, scratch) as client:
                _run(client, image, values, wheels, partial, places, log, report)
                sif.fix_header(partial)
                packages = _packages(client, partial)
                labels = _labels(client, partial)
            if labels.get("definition") != definition_digest(image):
                raise WorkError(partial, f"carries other labels than it was built with: {labels}")
            lock = Lock(
                image=image.name,
                sha256=sif.sha256(partial),
                bytes=partial.stat().st_size,
                base=base,
                definition=labels["definition"],
                commit=commit,
                builder=builder.version,
                built=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                seconds=round(time.monotonic() - began, 1),
                python=packages["python"],
                system=packages["system"],
            )
            lock_file(target).unlink(missing_ok=True)
            os.replace(partial, target)
            write_lock(target, lock)
        finally:
            partial.unlink(missing_ok=True)
            shutil.rmtree(scratch, ignore_errors=True)
    return lock, _notes(image, versions, before, lock)


def info(sif_file: Path, builder: Builder, scratch: Path) -> tuple[Lock, dict[str, str]]:
    """The lock beside an image and the labels inside it.

    Raises:
        RequestError: they do not belong together, or the image's content has changed.
    """
    lock = read_lock(sif_file)
    places = Places(sif_file.parent, scratch, scratch)
    with tempfile.TemporaryDirectory() as folder, _tool(builder, places, Path(folder)) as client:
        labels = _labels(client, sif_file)
    digest = sif.sha256(sif_file)
    for what, inside, beside in (
        ("sha256", digest, lock.sha256),
        ("definition", labels.get("definition"), lock.definition),
    ):
        if inside != beside:
            raise RequestError(
                sif_file,
                f"has the {what} {inside}, its lock says {beside}",
                f"copy the image and its lock again, or make build-image IMAGE={lock.image}",
            )
    return lock, labels


def _remove_left_overs(target: Path, scratch: Path) -> None:
    """What a build that was killed left behind."""
    for partial in target.parent.glob(f".{target.name}.*.partial"):
        partial.unlink()
    shutil.rmtree(scratch, ignore_errors=True)


def _check_machine(versions: Versions, places: Places) -> None:
    image = versions.image
    for place, share in ((places.scratch, 1.0), (places.images, 0.4)):
        place.mkdir(parents=True, exist_ok=True)
        needed, free = versions.build_gib * share, shutil.disk_usage(place).free / 2**30
        if free < needed:
            variable = "TMPDIR" if place == places.scratch else "IMAGES (or images in user.toml)"
            raise RequestError(
                place,
                f"has {free:.1f} GiB free, a build of {image.name} needs {needed:.1f}",
                f"free some space, or set {variable} to a larger folder",
            )
    if image.debian and shutil.which("debootstrap") is None:
        raise RequestError(
            "debootstrap",
            f"is not on this machine, and {image.name} starts from Debian",
            "install it (apt install debootstrap, dnf install debootstrap), or build elsewhere and "
            f"copy {image.name}.sif and {image.name}.sif.lock.json",
        )
    if os.getuid() != 0:
        _check_namespaces()


def _check_namespaces() -> None:
    """Building without root needs user namespaces."""
    tried = subprocess.run(
        ["unshare", "--user", "true"], capture_output=True, text=True, check=False
    )
    if tried.returncode:
        raise RequestError(
            "user namespaces",
            f"are not allowed here ({tried.stderr.strip()}), and a build without root needs them",
            "ask the administrator for user.max_user_namespaces > 0 and a range for you in "
            "/etc/subuid and /etc/subgid, or build elsewhere and copy the .sif and its lock",
        )


def _previous(target: Path) -> Lock | None:
    """The lock of the image that is to be replaced; an unreadable one counts as none."""
    try:
        return Lock.model_validate_json(lock_file(target).read_bytes())
    except (OSError, ValueError):
        return None


def _base(versions: Versions, before: Lock | None) -> Base:
    """The base and its digest, after making sure that its tag still means what it meant."""
    image = versions.image
    if image.debian:
        return Base(name=versions.base, digest=None)
    _, _, tag = registry.split_base(versions.base)
    known, origin = versions.digest, "containers/versions.env"
    if not known and before and before.base.name == versions.base and before.base.digest:
        known, origin = before.base.digest, f"the last build of {image.name}"
    if not tag:
        if not known:
            key = f"{image.name.upper()}_DIGEST"
            raise RequestError(versions.base, "has neither a tag nor a digest",
                               f"state {key} in containers/versions.env")  # fmt: skip
        return Base(name=versions.base, digest=known)
    now = registry.digest_of(versions.base)
    if known and known != now:
        raise RequestError(
            versions.base,
            f"has moved: the tag is {now} now, {origin} says {known}",
            f"to take the new base write {image.name.upper()}_DIGEST={now} into "
            f"containers/versions.env; to stay, take the tag out of {image.name.upper()}_BASE and "
            "state the old digest",
        )
    return Base(name=versions.base, digest=now)


def _wheels(versions: Versions, places: Places, log: Path) -> Path:
    """The folder with the lock's packages, named for what it depends on."""
    lock = repository() / versions.image.lock
    key = sif.sha256(lock)[:12]
    parent = places.cache / "wheels" / versions.image.name
    folder = parent / key
    requirements.fetch_wheels(versions, folder, log)
    requirements.remove_other_wheels(parent, folder)
    return folder


def _commit(image: Image) -> Commit:
    """The newest commit that changed what the image is made from."""
    root = repository()
    files = [str(file) for file in (*source_files(image), CONTAINERS / "versions.env")]

    def git(*words: str) -> str | None:
        done = subprocess.run(["git", "-C", str(root), *words, "--", *files], capture_output=True,
                              text=True, check=False)  # fmt: skip
        return done.stdout.strip() if done.returncode == 0 else None

    changed = git("status", "--porcelain")
    return Commit(id=git("log", "-1", "--format=%H") or None,
                  dirty=None if changed is None else bool(changed))  # fmt: skip


def _values(image: Image, base: Base, commit: Commit, places: Places) -> dict[str, str]:
    """What the definition's templates become."""
    origin = registry.split_base(base.name)[:2] if base.digest else ("", "")
    state = " with changes" if commit.dirty else ""
    known = {
        "DEFINITION": definition_digest(image),
        "COMMIT": f"{commit.id or 'unknown'}{state}",
        "BASE": base.name,
        "BASE_DIGEST": base.digest or "",
        "FROM": f"{origin[0]}/{origin[1]}@{base.digest}",
    }
    if image.debian:
        known["DEBIAN_MIRROR"] = places.debian_mirror or debian_mirror()
    return arguments(image, known)


def debian_mirror() -> str:
    """The mirror that this machine's own apt uses.

    Raises:
        RequestError: this machine is no Debian, or has no such source.
    """
    with contextlib.suppress(OSError):
        listed = subprocess.run(
            ["apt-get", "indextargets", "--format", "$(SITE) $(ORIGIN) $(CODENAME)",
             "Created-By: Packages"],
            capture_output=True, text=True, check=False,
        ).stdout  # fmt: skip
        for line in listed.splitlines():
            site, origin, codename = [*line.split(), "", "", ""][:3]
            if origin == "Debian" and "-" not in codename:
                return site
    raise RequestError(
        "the Debian mirror",
        "is not known here: this machine's apt names none",
        "DEBIAN_MIRROR=URL make build-image ... (any mirror of Debian's main archive), or "
        'debian_mirror = "URL" in user.toml',
    )


@contextlib.contextmanager
def _tool(builder: Builder, places: Places, scratch: Path) -> Iterator[Any]:
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
        raise WorkError(builder.binary, "spython gave up without a word") from None
    finally:
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(before)


def _run(
    client: Any, image: Image, values: dict[str, str], wheels: Path, partial: Path, places: Places,
    log: Path, report: Report,
) -> None:  # fmt: skip
    options = [
        "--bind", f"{wheels}:{WHEELS_IN_BUILD}:ro",
        "--bind", f"{repository()}:{REPOSITORY_IN_BUILD}:ro",
    ]  # fmt: skip
    options += ["--nv"] if places.gpu else []
    options += ["--fakeroot"] if os.getuid() else []
    for key, value in values.items():
        options += ["--build-arg", f"{key}={value}"]
    helped = subprocess.run(["singularity", "build", "--help"], capture_output=True, text=True,
                            check=False).stdout  # fmt: skip
    if "--mksquashfs-args" in helped:  # SingularityCE has no such option; its images differ in time
        options += ["--mksquashfs-args", "-all-time 0 -mkfs-time 0"]
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


def _packages(client: Any, partial: Path) -> dict[str, dict[str, str]]:
    """The package lists that %post wrote down inside the image."""
    answer = client.execute(
        str(partial), ["cat", "/opt/tanren/packages.json"], return_result=True, quiet=True
    )
    if answer["return_code"]:
        raise WorkError(partial, f"does not start: {answer['message']}")
    message = answer["message"]
    value: dict[str, dict[str, str]] = orjson.loads(
        message if isinstance(message, str) else message[0]
    )
    return value


def _labels(client: Any, path: Path) -> dict[str, str]:
    """tanren's labels of an image, without their prefix."""
    answer = client.inspect(str(path), quiet=True)
    if "attributes" not in answer:
        raise WorkError(path, f"cannot be inspected: {answer.get('message')}")
    labels: dict[str, str] = answer["attributes"]["labels"]
    return {
        key.removeprefix(_LABEL): value for key, value in labels.items() if key.startswith(_LABEL)
    }


def _notes(image: Image, versions: Versions, before: Lock | None, lock: Lock) -> list[str]:
    notes = []
    if image.debian:
        moved = differences(system_lock(), lock.system)
        if moved:
            notes.append(
                f"{len(moved)} Debian packages differ from containers/locks/debian.txt: "
                f"{', '.join(moved[:4])}{' ...' if len(moved) > 4 else ''}"
            )
    elif not versions.digest:
        notes.append(
            f"to fix the base for everybody: {image.name.upper()}_DIGEST={lock.base.digest} in "
            "containers/versions.env"
        )
    if before and before.definition == lock.definition and before.sha256 != lock.sha256:
        changed = [
            *differences(before.python, lock.python), *differences(before.system, lock.system)
        ]  # fmt: skip
        what = ", ".join(changed[:6]) if changed else "no package"
        notes.append(f"differs from the image before, of the same definition, in: {what}")
    return notes
