"""What cannot be converted is refused in one message, and nothing is written or lost."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import struct
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch

from tanren.config.errors import RequestError, WorkError
from tanren.convert import folders, interchange
from tanren.convert.interchange import Options, shard_size
from tests.conftest import REPOSITORY
from tests.convert import models

INDEX = "model.safetensors.index.json"
SECOND = "model-00002-of-00003.safetensors"


def config(folder: Path, **changes: Any) -> None:
    stated = orjson.loads((folder / "config.json").read_bytes()) | changes
    (folder / "config.json").write_bytes(orjson.dumps(stated))


def header(file: Path, change: Callable[[bytes], bytes]) -> None:
    """Change a safetensors file's header, and leave its tensors."""
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    text = change(content[8 : 8 + length])
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def overlapping(text: bytes) -> bytes:
    """Lay a tensor of a header where another one is that is as large."""
    value = orjson.loads(text)
    places = [one["data_offsets"] for name, one in value.items() if name != "__metadata__"]
    one, other = next(
        (one, other) for one in places for other in places
        if one is not other and one[1] - one[0] == other[1] - other[0]
    )  # fmt: skip
    other[:] = one
    return orjson.dumps(value)


def edit(file: Path, old: bytes, new: bytes) -> None:
    content = file.read_bytes()
    assert old in content
    file.write_bytes(content.replace(old, new, 1))


def cut(file: Path, count: int) -> None:
    file.write_bytes(file.read_bytes()[:-count])


def index_with(folder: Path, name: str, file: str) -> None:
    value = orjson.loads((folder / INDEX).read_bytes())
    value["weight_map"][name] = file
    (folder / INDEX).write_bytes(orjson.dumps(value))


def loop(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to(folder)


def loop_of_a_file(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.name)


# What is done to a model in three files, and what is said of it: the place, then the problem.
HF: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a missing shard": (lambda f: (f / SECOND).unlink(), SECOND, "is missing"),
    "a missing index": (lambda f: (f / INDEX).unlink(), "", "holds neither model.safetensors nor"),
    "a truncated shard": (lambda f: cut(f / SECOND, 100), SECOND, "is not whole: it has"),
    "a shard with more at its end": (
        lambda f: (f / SECOND).write_bytes((f / SECOND).read_bytes() + b"x"), SECOND,
        "is not whole: it has"),
    "a shard cut within its header": (
        lambda f: (f / SECOND).write_bytes((f / SECOND).read_bytes()[:200]), SECOND,
        "is not whole: its header has"),
    "an empty shard": (lambda f: (f / SECOND).write_bytes(b""), SECOND, "is not whole"),
    "a shard that is none": (
        lambda f: (f / SECOND).write_bytes(b"\x02\0\0\0\0\0\0\0[]"), SECOND, "has no safetensors"),
    "a header with a key twice": (
        lambda f: header(f / SECOND, lambda t: t.replace(b'{', b'{"__metadata__":{},', 1)), SECOND,
        "states __metadata__ twice"),
    "a header whose tensors overlap": (
        lambda f: header(f / SECOND, overlapping),
        SECOND, "does not begin where the one before it ends"),
    "an unknown type": (
        lambda f: header(f / SECOND, lambda t: t.replace(b"BF16", b"BF17", 1)), SECOND,
        "has no safetensors header"),
    "an index with a key twice": (
        lambda f: edit(f / INDEX, b'"lm_head.weight"', b'"model.norm.weight":"x","lm_head.weight"'),
        INDEX, "states model.norm.weight twice"),
    "an index that is no JSON": (lambda f: cut(f / INDEX, 3), INDEX, "is not an index"),
    "an index that leads elsewhere": (
        lambda f: index_with(f, "lm_head.weight", "../other.safetensors"), INDEX,
        "which is no file beside it"),
    "an index that names the wrong file": (
        lambda f: index_with(f, "lm_head.weight", SECOND), INDEX,
        "says that lm_head.weight is in model-00002"),
    "two files with the same tensor": (
        lambda f: shutil.copy(f / SECOND, f / "model.safetensors"), "",
        "both hold"),
    "a shard that is a link to itself": (
        lambda f: loop_of_a_file(f / SECOND), SECOND, "cannot be read: Too many levels"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json", "is missing"),
    "a config that is no JSON": (
        lambda f: (f / "config.json").write_text("{"), "config.json", "is not JSON"),
    "a config that is a list": (
        lambda f: (f / "config.json").write_text("[]"), "config.json", "is not a JSON object"),
    "a config with a key twice": (
        lambda f: edit(f / "config.json", b"{", b'{"vocab_size":9,'), "config.json",
        "states vocab_size twice"),
    "an unknown architecture": (
        lambda f: config(f, model_type="gpt_neox"), "config.json", "model_type is 'gpt_neox'"),
    "a text for a number": (
        lambda f: config(f, num_hidden_layers="three"), "config.json", "layers: "),
    "a rope that is no object": (
        lambda f: config(f, rope_scaling="llama3"), "config.json", "is not a LLaMA's"),
    "fewer layers stated than there are": (
        lambda f: config(f, num_hidden_layers=2), "", "holds tensors that a LLaMA of this shape "
        "has not: model.layers.2.input_layernorm.weight"),
    "more layers stated than there are": (
        lambda f: config(f, num_hidden_layers=4), "", "holds no tensor model.layers.3.input"),
    "another width stated": (
        lambda f: config(f, intermediate_size=48), "",
        "model.layers.0.mlp.gate_proj.weight is [24, 16] there, and the model's is [48, 16]"),
    "another vocabulary stated": (
        lambda f: config(f, vocab_size=250), "", "model.embed_tokens.weight is [256, 16] there"),
}  # fmt: skip


def snapshot(root: Path) -> dict[str, str]:
    """Every file and link below a folder."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_symlink():
            found[str(path)] = str(path.readlink())
        elif path.is_file():
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def refused(root: Path, act: Callable[[], object]) -> RequestError:
    """What an act is refused with; it has changed nothing."""
    before = snapshot(root)
    with pytest.raises(RequestError) as error:
        act()
    assert snapshot(root) == before
    assert error.value.exit_code == 2
    return error.value


def into(source: Path, target: Path, **options: Any) -> None:
    interchange.hf_to_mcore(source, target, Options(**options), lambda text: None)


def out_of(source: Path, target: Path, like: Path | None = None, **options: Any) -> None:
    interchange.mcore_to_hf(source, target, Options(**options), lambda text: None, like=like)


@pytest.fixture
def three(tmp_path: Path) -> Path:
    folder = models.write(tmp_path / "hf", max_shard_bytes=11000)
    assert len(list(folder.glob("*.safetensors"))) == 3
    return folder


@pytest.mark.parametrize("case", HF)
def test_a_broken_model_is_refused(tmp_path: Path, three: Path, case: str) -> None:
    change, place, problem = HF[case]
    change(three)
    error = refused(tmp_path, lambda: into(three, tmp_path / "mcore"))
    assert error.place == str(three / place if place else three)
    assert problem in error.problem


# The same of a checkpoint.
MCORE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a missing file": (
        lambda f: (f / "__0_1.distcp").unlink(), "", "the file __0_1.distcp is missing"),
    "a truncated file": (lambda f: cut(f / "__0_1.distcp", 9), "", "the file __0_1.distcp has"),
    "a truncated file that nothing lists": (
        lambda f: (cut(f / "__0_1.distcp", 3000), (f / "files.json").unlink()), "__0_1.distcp",
        "is broken"),
    "a missing .metadata": (
        lambda f: (f / ".metadata").unlink(), "", "is no torch_dist checkpoint"),
    "a truncated .metadata": (
        lambda f: (cut(f / ".metadata", 50), (f / "files.json").unlink()), ".metadata",
        "is not whole"),
    "a missing common.pt": (
        lambda f: ((f / "common.pt").unlink(), (f / "files.json").unlink()), "common.pt",
        "is missing"),
    "a truncated common.pt": (
        lambda f: (cut(f / "common.pt", 500), (f / "files.json").unlink()), "common.pt",
        "is not whole"),
    "another shape stated": (
        lambda f: config(f.parent / "hf", intermediate_size=48), "",
        "is another model: ffn_hidden_size 24 there, 48 here"),
    "another vocabulary stated": (
        lambda f: config(f.parent / "hf", vocab_size=999), "",
        "has 256 rows of embeddings, and the vocabulary has 999 pieces"),
}  # fmt: skip


@pytest.mark.parametrize("case", MCORE)
def test_a_broken_checkpoint_is_refused(tmp_path: Path, three: Path, case: str) -> None:
    into(three, tmp_path / "mcore")
    checkpoint = tmp_path / "mcore" / "release"
    change, place, problem = MCORE[case]
    change(checkpoint)
    error = refused(tmp_path, lambda: out_of(tmp_path / "mcore", tmp_path / "back"))
    named = os.path.normpath(checkpoint / place)
    assert error.place == named
    assert problem in error.problem


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    error = refused(tmp_path, lambda: out_of(tmp_path / "empty", tmp_path / "back"))
    assert "is no torch_dist checkpoint" in error.problem


def test_adapters_are_not_a_model(tmp_path: Path, three: Path) -> None:
    into(three, tmp_path / "mcore")
    common = tmp_path / "mcore" / "release" / "common.pt"
    settings = {"rank": 4, "alpha": 8.0}
    torch.save(torch.load(common, weights_only=False) | {"lora": settings}, common)
    (common.parent / "files.json").unlink()
    error = refused(tmp_path, lambda: out_of(tmp_path / "mcore", tmp_path / "back"))
    assert "holds adapters" in error.problem


# What is done to the folders, what is converted into what, and what is said.
FOLDERS: dict[str, tuple[Callable[[Path], object], str, str, str]] = {
    "no source": (lambda r: None, "nothing", "new", "there is no such folder"),
    "a file as source": (lambda r: None, "hf/config.json", "new", "is a file, and not a folder"),
    "a source that is a link to itself": (
        lambda r: (r / "loop").symlink_to("loop"), "loop", "new", "leads back to itself"),
    "two links to each other": (
        lambda r: ((r / "a").symlink_to("b"), (r / "b").symlink_to("a")), "a", "new",
        "leads back to itself"),
    "a target that is a link to itself": (
        lambda r: (r / "loop").symlink_to("loop"), "hf", "loop", "leads back to itself"),
    "the target is the source": (lambda r: None, "hf", "hf", "is the folder that is read"),
    "the target is a link to the source": (
        lambda r: (r / "same").symlink_to("hf"), "hf", "same", "is the folder that is read"),
    "the source is in the target": (
        lambda r: ((r / "around").mkdir(), (r / "hf").rename(r / "around" / "hf")), "around/hf",
        "around", "which is read"),
    "the target is a file": (lambda r: (r / "file").write_text("x"), "hf", "file", "is a file"),
    "the target is there": (
        lambda r: shutil.copytree(r / "hf", r / "there"), "hf", "there", "is there already"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_that_cannot_be_are_refused(tmp_path: Path, three: Path, case: str) -> None:
    prepare, source, target, problem = FOLDERS[case]
    prepare(tmp_path)
    error = refused(tmp_path, lambda: into(tmp_path / source, tmp_path / target))
    assert problem in error.problem
    if "there already" not in problem:
        forced = refused(tmp_path, lambda: into(tmp_path / source, tmp_path / target, force=True))
        assert forced.problem == error.problem


def test_two_do_not_make_the_same_folder(tmp_path: Path, three: Path) -> None:
    into(three, tmp_path / "mcore")
    with folders.alone(tmp_path / "new"):
        for act in (
            lambda: into(three, tmp_path / "new"),
            lambda: out_of(tmp_path / "mcore", tmp_path / "new"),
        ):
            error = refused(tmp_path, act)
            assert error.place == str(tmp_path / "new")
            assert f"is being worked on by process {os.getpid()}" in error.problem
    into(three, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "mcore", "new"]


def test_force_replaces_a_model_and_nothing_else(tmp_path: Path, three: Path) -> None:
    into(three, tmp_path / "mcore")
    (tmp_path / "mcore" / "old").write_text("x")
    into(three, tmp_path / "mcore", force=True)
    assert not (tmp_path / "mcore" / "old").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "mcore"]
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    error = refused(tmp_path, lambda: into(three, tmp_path / "home", force=True))
    assert "is not replaced: with thesis.tex it is no model or checkpoint" in error.problem
    (tmp_path / "empty").mkdir()
    into(three, tmp_path / "empty")
    assert (tmp_path / "empty" / "release" / ".metadata").exists()


def test_a_link_to_a_folder_is_followed(tmp_path: Path, three: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "target").symlink_to("disk")
    into(three, tmp_path / "target")
    assert (tmp_path / "target").is_symlink()
    assert (tmp_path / "disk" / "release" / ".metadata").exists()


def test_a_disk_that_is_too_small_is_found_before(
    tmp_path: Path, three: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    into(three, tmp_path / "mcore")
    usage = namedtuple("usage", "total used free")
    needed = 2 * models.SHAPE.parameters + folders._BESIDE
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: usage(0, 0, needed - 1))
    for act in (
        lambda: into(three, tmp_path / "deep" / "new"),
        lambda: out_of(tmp_path / "mcore", tmp_path / "back"),
    ):
        error = refused(tmp_path, act)
        assert error.problem == "needs 0.1 GB, and the disk has 0.1 GB free"
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: usage(0, 0, needed))
    out_of(tmp_path / "mcore", tmp_path / "back")
    with pytest.raises(RequestError, match=r"needs 0\.1 GB"):
        out_of(tmp_path / "mcore", tmp_path / "wide", dtype="fp32")


@pytest.mark.parametrize("direction", ["in", "out"])
def test_a_disk_that_fills_up_leaves_nothing(
    tmp_path: Path, three: Path, monkeypatch: pytest.MonkeyPatch, direction: str
) -> None:
    into(three, tmp_path / "mcore")
    before = snapshot(tmp_path)
    write = os.pwrite

    def full(descriptor: int, content: memoryview, offset: int) -> int:
        if offset > 3000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, content, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(WorkError, match="cannot be written: No space left on device"):
        if direction == "in":
            into(three, tmp_path / "new")
        else:
            out_of(tmp_path / "mcore", tmp_path / "new")
    assert snapshot(tmp_path) == before
    assert not (tmp_path / "new").exists()


def test_two_types_in_one_tensor_are_refused_or_made_one(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = models.write(tmp_path / "hf")
    tensors = models.weights(models.SHAPE)
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors[name] = tensors[name].float()
    save_file(tensors, source / "model.safetensors")
    error = refused(tmp_path, lambda: into(source, tmp_path / "mcore"))
    assert f"and {name} torch.float32, and they become one tensor" in error.problem
    into(source, tmp_path / "mcore", dtype="bf16")


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("500mb", 5 * 10**8),
                                            ("1.5 GiB", 3 * 2**29), ("4096", 4096)])  # fmt: skip
def test_sizes_are_read(text: str, size: int) -> None:
    assert shard_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5 parsecs", "-5GB", "0GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="--max-shard-size: is"):
        shard_size(text)


def test_the_command_says_it_once_and_ends_with_2(tmp_path: Path, three: Path) -> None:
    (three / SECOND).unlink()
    words = ["convert", "hf-to-mcore", str(three), str(tmp_path / "new")]
    done = subprocess.run(
        [sys.executable, "-m", "tanren.cli", *words], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY / "src"), "COLUMNS": "300"},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == f"tanren: {three / SECOND}: is missing.\n  next: fetch the model again\n"
    assert not (tmp_path / "new").exists()
