"""A submission: what is refused, what the builder is given, what stays; with a fake builder."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import orjson
import pytest

from tanren.config.errors import RequestError, WorkError
from tanren.images import build as building
from tanren.images import definition, submission
from tanren.images.builder import Builder, Places
from tanren.images.definition import IMAGES
from tanren.images.lock import Lock, lock_file, read_lock
from tanren.images.submission import Settings
from tests.conftest import REPOSITORY

TEXT = (REPOSITORY / "containers" / "submission.def").read_text()


def quiet(_: str) -> None:
    pass


@pytest.fixture
def base(builder: Builder, places: Places) -> tuple[Path, Lock]:
    building.build(IMAGES["cpu"], builder, places, quiet)
    return submission.base_image(places.images, None)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "tiny" / "dpo" / "hf" / "iter_0000004"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_the_definition_declares_what_it_uses_and_copies_what_is_there() -> None:
    section = re.search(r"^%arguments\n((?:[ \t]+.*\n)+)", TEXT, re.MULTILINE)
    assert section
    declared = {line.strip().rstrip("=") for line in section[1].splitlines()}
    assert declared == set(definition.TEMPLATE.findall(TEXT))
    assert len(declared) == 7
    assert definition.source_files(submission.IMAGE) == [
        Path("containers/submission.def"), Path("containers/answer.py"),
    ]  # fmt: skip
    answer = (REPOSITORY / "containers" / "answer.py").read_text()
    for name, field in Settings.model_fields.items():
        default = re.escape(json.dumps(field.default))
        assert re.search(rf'"--{name}", (type=\w+, )?default={default}[,)]', answer), name
    assert f'MODEL = Path("{re.search(r"cp -r /mnt (.*)", TEXT)[1]}")' in answer


def test_a_submission_has_its_lock_with_each_file_of_the_model(
    builder: Builder, places: Places, base: tuple[Path, Lock], model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    given: list[object] = []
    run = building.run_builder

    def watch(client, image, values, binds, *rest):  # type: ignore[no-untyped-def]
        settings = orjson.loads((binds[1][0] / "answer.json").read_bytes())
        given.extend([values, [place for _, place in binds], settings])
        run(client, image, values, binds, *rest)

    monkeypatch.setattr(building, "run_builder", watch)
    target = model.parents[1] / "submission" / "iter_0000004.sif"
    lock = submission.build(model, target, base, Settings(max_tokens=5), builder, places, quiet)
    values, binds, settings = given
    assert values["FROM"] == str(places.images / "cpu.sif")  # type: ignore[index]
    assert values["MODEL"] == "tiny/dpo/hf/iter_0000004"  # type: ignore[index]
    assert binds == ["/mnt", "/srv"]
    assert settings == {"max_tokens": 5, "temperature": 0.0, "batch_size": 16,
                        "question": "{problem}"}  # fmt: skip
    assert lock == read_lock(target)
    assert lock.base.digest == f"sha256:{base[1].sha256}"
    assert lock.model is not None
    assert sorted(lock.model) == ["config.json", "model.safetensors"]
    assert sorted(p.name for p in target.parent.iterdir() if p.name[0] != ".") == [
        "iter_0000004.build.log", "iter_0000004.sif", "iter_0000004.sif.lock.json",
    ]  # fmt: skip
    assert not list(places.scratch.iterdir())
    (model / "model.safetensors").write_bytes(b"others!")
    monkeypatch.setenv("FAKE_FAIL", "test")
    before = target.read_bytes(), lock_file(target).read_bytes()
    with pytest.raises(WorkError, match=r"%test failed, so there is no new submission.sif"):
        submission.build(model, target, base, Settings(), builder, places, quiet)
    assert (target.read_bytes(), lock_file(target).read_bytes()) == before
    assert not list(places.scratch.iterdir())


def test_what_no_submission_is_made_of_is_refused(
    builder: Builder, places: Places, base: tuple[Path, Lock], model: Path, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=r"BASE=merge: is no image that a(.|\n)*train or cpu"):
        submission.base_image(places.images, "merge")
    with pytest.raises(RequestError, match=r"train.sif: there is no such image"):
        submission.base_image(places.images, "train")
    assert submission.base_image(places.images, "cpu") == base

    def refused(match: str, folder: Path = model) -> None:
        target = tmp_path / "out" / "a.sif"
        with pytest.raises(RequestError, match=match):
            submission.build(folder, target, base, Settings(), builder, places, quiet)
        assert not target.exists()

    odd = model.rename(model.with_name("a b"))
    refused(r"a b: cannot be built from: its name has a comma, a colon or a space", odd)
    odd.rename(model)
    (model / "model.safetensors").unlink()
    refused("holds no weights")
    (model / "config.json").unlink()
    refused("holds adapters without their base")


def test_too_little_room_and_no_namespaces_are_said_first(
    builder: Builder, places: Places, base: tuple[Path, Lock], model: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def build() -> None:
        submission.build(
            model, tmp_path / "out" / "a.sif", base, Settings(), builder, places, quiet
        )

    monkeypatch.setattr(os, "getuid", lambda: 1000)

    def never() -> None:
        raise RequestError("user namespaces", "are not allowed here", "ask the site")

    monkeypatch.setattr(building, "check_namespaces", never)
    with pytest.raises(RequestError, match="user namespaces"):
        build()
    usage = building.shutil.disk_usage("/")._replace(free=3 * 2**30)
    monkeypatch.setattr(building.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(RequestError, match=r"has 3.0 GiB free, a build of this submission needs 4"):
        build()
