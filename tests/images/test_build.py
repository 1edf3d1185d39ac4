"""Building: what is refused before it starts, what stays after a failure, what the lock says."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tanren.config.errors import RequestError, TanrenError, WorkError
from tanren.images import build as building
from tanren.images import builder as programs
from tanren.images import lock as locks
from tanren.images import registry, sif
from tanren.images.build import build
from tanren.images.builder import Builder, Places
from tanren.images.definition import IMAGES, definition_digest
from tests.conftest import REPOSITORY, wait_for
from tests.images.conftest import FAKE

CPU = IMAGES["cpu"]


def quiet(_: str) -> None:
    pass


def test_a_build_leaves_an_image_its_lock_and_its_log(builder: Builder, places: Places) -> None:
    said: list[str] = []
    lock, _ = build(CPU, builder, places, said.append)
    path = places.images / "cpu.sif"
    assert sorted(p.name for p in places.images.iterdir() if not p.name.startswith(".")) == [
        "cpu.build.log", "cpu.sif", "cpu.sif.lock.json",
    ]  # fmt: skip
    assert lock == locks.read_lock(path) == locks.check_definition(path, CPU)
    assert lock.sha256 == sif.sha256(path)
    assert lock.definition == definition_digest(CPU)
    assert lock.builder == "apptainer version 1.4.5"
    assert lock.python == {"torch": "2.13.0+cpu"}
    assert lock.system == {"libc6": "2.36"}
    assert said[0] == "fetching packages"
    assert not list(places.scratch.iterdir())
    again, labels = building.info(path, builder, places.cache)
    assert again == lock
    assert labels["definition"] == lock.definition
    assert labels["base"] == "debian bookworm"


def test_two_builds_are_the_same_bytes(builder: Builder, places: Places) -> None:
    first, _ = build(CPU, builder, places, quiet)
    second, notes = build(CPU, builder, places, quiet)
    assert first.sha256 == second.sha256
    assert not [note for note in notes if "differs from the image before" in note]


def test_packages_that_moved_are_named(
    builder: Builder, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "system_lock", lambda: {"libc6": "2.35", "tar": "1"})
    _, notes = build(CPU, builder, places, quiet)
    assert notes == [
        "2 Debian packages differ from containers/locks/debian.txt: libc6 2.35 → 2.36, "
        "tar 1 → absent"
    ]


@pytest.mark.parametrize(
    ("where", "message", "advice"),
    [
        ("post", "the build failed, so there is no new cpu.sif", "free some space, or set TMPDIR"),
        ("test", "its %test failed, so there is no new cpu.sif", "read the log"),
        ("squash", "its %test failed, so there is no new cpu.sif", "read the log"),
    ],
)
def test_a_build_that_fails_leaves_the_image_before(
    builder: Builder, places: Places, monkeypatch: pytest.MonkeyPatch, where: str, message: str,
    advice: str,
) -> None:  # fmt: skip
    build(CPU, builder, places, quiet)
    before = {p.name: p.read_bytes() for p in places.images.glob("cpu.sif*")}
    monkeypatch.setenv("FAKE_FAIL", where)
    environment, folder = dict(os.environ), Path.cwd()
    with pytest.raises(WorkError) as error:
        build(CPU, builder, places, quiet)
    assert message in str(error.value)
    assert advice in error.value.next_step
    assert str(places.images / "cpu.build.log") in str(error.value)
    assert {p.name: p.read_bytes() for p in places.images.glob("cpu.sif*")} == before
    assert not list(places.images.glob(".*.partial"))
    assert not list(places.scratch.iterdir())
    assert (dict(os.environ), Path.cwd()) == (environment, folder)


def test_a_failure_shows_the_end_of_the_log(
    builder: Builder, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FAIL", "test")
    with pytest.raises(WorkError, match=r"\| check.py: the error of the FP8 product is 0.2"):
        build(CPU, builder, places, quiet)
    assert not (places.images / "cpu.sif").exists()


def builders(images: Path) -> list[int]:
    """The processes whose words name a file in this folder."""
    found = psutil.process_iter(["cmdline"])
    return [p.pid for p in found if str(images) in " ".join(p.info["cmdline"] or [])]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_build_that_is_killed_leaves_no_half_image(tmp_path: Path, number: int) -> None:
    """SIGTERM takes the builder along; after SIGKILL the next build clears what is there."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "apptainer").symlink_to(FAKE)
    # It is looked for and not run: the builder above stands for it.
    (tools / "debootstrap").symlink_to(FAKE)
    images = tmp_path / "images"
    (images / ".cache").mkdir(parents=True)
    pip = tools / "sitecustomize.py"
    pip.write_text(
        "import tanren.images.requirements as r\n"
        "r.fetch_wheels = lambda versions, folder, log: folder.mkdir(parents=True, exist_ok=True)\n"
    )
    environment = os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}", "IMAGES": str(images), "FAKE_FAIL": "never",
        "DEBIAN_MIRROR": "mirror:/debian", "TANREN_PYTHON": sys.executable,
        "PYTHONPATH": f"{REPOSITORY / 'src'}:{tools}", "TMPDIR": str(tmp_path / "scratch"),
    }  # fmt: skip
    command = [str(REPOSITORY / "bin" / "tanren"), "image", "build", "cpu"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    partials = lambda: list(images.glob(".cpu.sif.*.partial"))  # noqa: E731
    wait_for(lambda: any(p.stat().st_size for p in partials()), 30)
    process.send_signal(number)
    process.wait(20)
    if number == signal.SIGTERM:
        assert process.returncode == 143
        assert not partials()
        wait_for(lambda: not builders(images), 5)
    else:
        assert partials()
        # The program itself goes on, and would write after the next build has cleared.
        for pid in builders(images):
            os.kill(pid, signal.SIGKILL)
    done = subprocess.run(command, env=environment | {"FAKE_FAIL": ""}, check=False,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert not partials()
    assert (images / "cpu.sif").exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can mount")
def test_what_a_killed_debootstrap_has_mounted_goes_too(builder: Builder, places: Places) -> None:
    left = building.scratch_of(places.images / "cpu.sif", places) / "build temp" / "rootfs" / "proc"
    left.mkdir(parents=True)
    for source in ("one", "two"):
        subprocess.run(["mount", "-t", "tmpfs", source, left], check=True)
    (left / "held").mkdir()
    with subprocess.Popen(["sleep", "60"], cwd=left / "held") as user:
        with pytest.raises(RequestError, match=r"rootfs/proc: was mounted[^$]*umount --lazy '/"):
            build(CPU, builder, places, quiet)
        assert (left / "held").exists()
        user.kill()
    build(CPU, builder, places, quiet)
    assert not list(places.scratch.iterdir())


def test_what_cannot_be_removed_is_named(
    builder: Builder, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = building.scratch_of(places.images / "cpu.sif", places)

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path / "rootfs"))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(RequestError, match=rf"rootfs: is left [^$]*denied[^$]*rm -r {left}"):
        build(CPU, builder, places, quiet)


def test_the_same_image_of_two_checkouts_is_unpacked_apart(places: Places) -> None:
    found = {building.scratch_of(Path(f"/{one}/images/cpu.sif"), places) for one in "ab"}
    assert len(found) == 2
    assert {one.parent for one in found} == {places.scratch}


def test_too_little_room_is_said_before_the_build(
    builder: Builder, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=3 * 2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(RequestError, match=r"scratch: has 3.0 GiB free, a build of cpu needs 4.0"):
        build(CPU, builder, places, quiet)


def test_debian_needs_debootstrap(
    builder: Builder, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(
        RequestError, match=r"debootstrap: is not on this machine(.|\n)*apt install"
    ):
        build(CPU, builder, places, quiet)


def test_a_machine_without_user_namespaces(
    builder: Builder, places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "bin" / "unshare"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho 'unshare failed: Operation not permitted' >&2; exit 1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    with pytest.raises(
        RequestError, match=r"not allowed here \(unshare failed(.|\n)*max_user_name"
    ):
        build(CPU, builder, places, quiet)


def test_without_root_the_builder_is_asked_for_fakeroot(
    builder: Builder, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    monkeypatch.setattr(building, "check_namespaces", lambda: None)
    seen = []
    monkeypatch.setattr(programs, "_while_working", lambda work, tick: seen.append(work) or work())
    with programs.tool(builder, places, places.scratch) as client:
        calls: dict[str, object] = {}
        monkeypatch.setattr(
            type(client), "build", lambda self, **words: calls.update(words) or ("", [])
        )
        with pytest.raises(WorkError):
            binds = ((Path("/w"), "/mnt"), (REPOSITORY, "/srv"))
            programs.run_builder(client, CPU, {"A": "b"}, binds, places.images / "p", places,
                                 _log(places), quiet)  # fmt: skip
    assert calls["options"] == [
        "--bind", "/w:/mnt:ro", "--bind", f"{REPOSITORY}:/srv:ro", "--fakeroot", "--build-arg",
        "A=b", "--mksquashfs-args",
        "-comp gzip -Xcompression-level 4 -all-time 0 -mkfs-time 0",
    ]  # fmt: skip
    assert calls["sudo"] is False


def _log(places: Places) -> Path:
    places.images.mkdir(parents=True, exist_ok=True)
    log = places.images / "log"
    log.write_text("")
    return log


def test_a_base_that_moved_stops_the_build(
    builder: Builder, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = IMAGES["train"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("U", (), {"free": 2**40}))
    monkeypatch.setattr(registry, "digest_of", lambda _: "sha256:first")
    lock, notes = build(train, builder, places, quiet)
    assert lock.base.digest == "sha256:first"
    assert re.match(r"to fix the base for everybody: TRAIN_DIGEST=sha256:first in", notes[0])
    _, labels = building.info(places.images / "train.sif", builder, places.cache)
    assert labels["digest"] == "sha256:first"
    monkeypatch.setattr(registry, "digest_of", lambda _: "sha256:second")
    with pytest.raises(RequestError) as error:
        build(train, builder, places, quiet)
    assert "the tag is sha256:second now, the last build of train says sha256:first" in str(
        error.value
    )
    assert "write TRAIN_DIGEST=sha256:second into" in error.value.next_step


def test_an_image_that_was_changed_or_is_anothers_is_refused(
    builder: Builder, places: Places
) -> None:
    build(CPU, builder, places, quiet)
    path = places.images / "cpu.sif"
    with path.open("ab") as file:
        file.write(b"1")
    with pytest.raises(RequestError, match=r"cpu.sif: has [\d,]+ bytes, its lock says"):
        locks.read_lock(path)
    content = bytearray(path.read_bytes()[:-1])
    content[80] ^= 1
    path.write_bytes(content)
    with pytest.raises(RequestError, match=r"has the sha256 \w+, its lock says"):
        building.info(path, builder, places.cache)
    with pytest.raises(RequestError, match=r"holds the image cpu, not train"):
        locks.check_definition(path, IMAGES["train"])
    value = json.loads(locks.lock_file(path).read_text())
    locks.lock_file(path).write_text(json.dumps(value | {"definition": "0" * 64}))
    with pytest.raises(RequestError, match=r"built from another definition \(commit .*0{12}\)"):
        locks.check_definition(path, CPU)
    locks.lock_file(path).write_text(json.dumps(value | {"bytes": "many"}))
    with pytest.raises(RequestError, match=r"is no lock of an image \(bytes: "):
        locks.read_lock(path)
    locks.lock_file(path).unlink()
    with pytest.raises(RequestError, match=r"cpu.sif.lock.json: is missing"):
        locks.read_lock(path)


def test_only_images_have_headers_to_fix(tmp_path: Path) -> None:
    path = tmp_path / "a.sif"
    path.write_bytes(b"x" * 200)
    with pytest.raises(WorkError, match="is not a SIF image"):
        sif.fix_header(path)


def test_a_machine_whose_apt_names_no_debian_must_be_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "apt-get"
    tool.write_text(
        "#!/bin/sh\necho 'http://a/ubuntu Ubuntu noble'\n"
        "[ -z \"$DEBIAN\" ] || echo 'http://b/debian Debian trixie-updates'\n"
        "[ -z \"$DEBIAN\" ] || echo 'http://b/debian Debian trixie'\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(
        TanrenError, match=r"the Debian mirror: is not known here(.|\n)*DEBIAN_MIRR"
    ):
        building.debian_mirror()
    monkeypatch.setenv("DEBIAN", "1")
    assert building.debian_mirror() == "http://b/debian"
