"""Builds an image: checks, wheels, the builder behind spython, the gate, the lock.

Nothing gets an image's final name before its %test has passed and its lock is known.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from tanren import runs
from tanren.config.errors import RequestError, WorkError
from tanren.config.load import repository
from tanren.images import registry, requirements, sif
from tanren.images.builder import (
    Builder,
    Places,
    Report,
    labels_of,
    packages_of,
    run_builder,
    tool,
)
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

# Where a build finds the wheels and the repository: folders that every base has.
WHEELS_IN_BUILD, REPOSITORY_IN_BUILD = "/mnt", "/srv"


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
    scratch = scratch_of(target, places)
    with runs.locked(places.images / f".{image.name}.lock"):
        remove_left_overs(target, scratch)
        _check_machine(versions, places)
        before = _previous(target)
        base = _base(versions, before)
        log = places.images / f"{image.name}.build.log"
        log.write_bytes(b"")
        report("fetching packages")
        wheels = _wheels(versions, places, log)
        scratch.mkdir(parents=True)
        commit = commit_of(image)
        binds = ((wheels, WHEELS_IN_BUILD), (repository(), REPOSITORY_IN_BUILD))
        lock = publish(
            image, _values(image, base, commit, places), binds, base, commit, target,
            builder, places, scratch, log, report,
        )  # fmt: skip
    return lock, _notes(image, versions, before, lock)


def publish(
    image: Image, values: dict[str, str], binds: Sequence[tuple[Path, str]], base: Base,
    commit: Commit, target: Path, builder: Builder, places: Places, scratch: Path, log: Path,
    report: Report, **model: Any,
) -> Lock:  # fmt: skip
    """Build beside the target, look at what was built, and give it its name and its lock.

    Args:
        values: of the definition's arguments.
        scratch: exists; it is removed, however the build ends.
        model: what a submission's lock says of the model in it.
    Raises:
        WorkError: the build failed; no image is left.
    """
    partial = target.parent / f".{target.name}.{os.getpid()}.partial"
    began = time.monotonic()
    wanted = {"definition": values["DEFINITION"], "model-digest": values.get("MODEL_DIGEST")}
    try:
        with tool(builder, places, scratch) as client:
            run_builder(client, image, values, binds, partial, places, log, report)
            sif.fix_header(partial)
            packages = packages_of(client, partial)
            labels = labels_of(client, partial)
        if any(labels.get(key) != value for key, value in wanted.items()):
            raise WorkError(
                partial, f"carries other labels than it was built with: {labels}",
                "the same command again; no other build may write there meanwhile",
            )  # fmt: skip
        lock = Lock(
            image=image.name,
            sha256=sif.sha256(partial),
            bytes=partial.stat().st_size,
            base=base,
            definition=values["DEFINITION"],
            commit=commit,
            builder=builder.version,
            built=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            seconds=round(time.monotonic() - began, 1),
            python=packages["python"],
            system=packages["system"],
            **model,
        )
        lock_file(target).unlink(missing_ok=True)
        os.replace(partial, target)
        write_lock(target, lock)
    finally:
        partial.unlink(missing_ok=True)
        shutil.rmtree(scratch, ignore_errors=True)
    return lock


def info(sif_file: Path, builder: Builder, scratch: Path) -> tuple[Lock, dict[str, str]]:
    """The lock beside an image and the labels inside it.

    Raises:
        RequestError: they do not belong together, or the image's content has changed.
    """
    lock = read_lock(sif_file)
    places = Places(sif_file.parent, scratch, scratch)
    with tempfile.TemporaryDirectory() as folder, tool(builder, places, Path(folder)) as client:
        labels = labels_of(client, sif_file)
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


def scratch_of(target: Path, places: Places) -> Path:
    """Where an image is unpacked while it is built; its own, since others may be built meanwhile.

    Of the same name as well, into another checkout's images.
    """
    own = hashlib.sha256(bytes(target.absolute())).hexdigest()[:12]
    return places.scratch / f"tanren-build-{os.getuid()}-{target.stem}-{own}"


def remove_left_overs(target: Path, scratch: Path) -> None:
    """What a build that was killed left behind.

    Raises:
        RequestError: some of it cannot be removed.
    """
    for partial in target.parent.glob(f".{target.name}.*.partial"):
        partial.unlink()
    # debootstrap mounts /proc in what it makes.
    for point in _mounted_below(scratch):
        subprocess.run(["umount", point], capture_output=True, check=False)
    remove = f"rm -r {shlex.quote(str(scratch))}"
    elsewhere = "or TMPDIR=/another/folder for this build"
    if still := _mounted_below(scratch):
        raise RequestError(
            still[0], "was mounted by a build that was killed, and cannot be unmounted",
            f"as root: umount --lazy {shlex.quote(still[0])} && {remove}; {elsewhere}",
        )  # fmt: skip
    try:
        shutil.rmtree(scratch)
    except FileNotFoundError:
        return
    except OSError as error:
        raise RequestError(
            error.filename, f"is left of a build that was killed: {error.strerror}",
            f"{remove}, as root where you may not; {elsewhere}",
        ) from None  # fmt: skip


def _mounted_below(folder: Path) -> list[str]:
    """Mount points, those within others first."""
    folder = folder.resolve()
    points = (mount.mountpoint for mount in psutil.disk_partitions(all=True))
    return sorted((one for one in points if folder in Path(one).parents), reverse=True)


def _check_machine(versions: Versions, places: Places) -> None:
    image = versions.image
    check_room(places.scratch, versions.build_gib, image.name, "TMPDIR")
    check_room(
        places.images, versions.build_gib * 0.4, image.name, "IMAGES (or images in user.toml)"
    )
    if image.debian and shutil.which("debootstrap") is None:
        raise RequestError(
            "debootstrap",
            f"is not on this machine, and {image.name} starts from Debian",
            "install it (apt install debootstrap, dnf install debootstrap), or build elsewhere and "
            f"copy {image.name}.sif and {image.name}.sif.lock.json",
        )
    if os.getuid() != 0:
        check_namespaces()


def check_room(place: Path, needed_gib: float, what: str, variable: str) -> None:
    """Refuse a build for which a folder has too little room."""
    place.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(place).free / 2**30
    if free < needed_gib:
        raise RequestError(
            place,
            f"has {free:.1f} GiB free, a build of {what} needs {needed_gib:.1f}",
            f"free some space, or set {variable} to a larger folder",
        )


def check_namespaces() -> None:
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


def commit_of(image: Image) -> Commit:
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
