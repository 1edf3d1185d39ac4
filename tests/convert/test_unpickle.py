"""Pickles of others: what they hold is read, and what they name is not run."""

from __future__ import annotations

import argparse
import collections
import io
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import metadata as dcp

from tanren.config.errors import RequestError
from tanren.convert import unpickle

PLAIN = {
    "weights": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "parameter": torch.nn.Parameter(torch.ones(3)),
    "args": argparse.Namespace(dtype=torch.bfloat16, lr=np.float64(0.25), steps=np.int32(7)),
    "size": torch.Size([1, 2]),
    "ordered": collections.OrderedDict(a=1),
    "default": collections.defaultdict(list, b=[2]),
    "state": {"python": random.getstate(), "numpy": np.random.get_state()},
    "scales": io.BytesIO(b"as Transformer Engine had them"),
    "path": Path("/data/tokenizer"),
    "raw": b"\x00\xff",
    "set": {1, 2},
}


class Unknown:
    """What no list has."""

    value = 3


class Runs:
    """An object whose pickle calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._said = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._said


def archive(path: Path, content: bytes) -> Path:
    """A file of torch.save whose pickle is this."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", content)
        file.writestr("archive/version", "3\n")
    return path


def test_what_checkpoints_hold_is_read(tmp_path: Path) -> None:
    path = tmp_path / "common.pt"
    torch.save(PLAIN, path)
    found = unpickle.load(path)
    assert found.keys() == PLAIN.keys()
    assert torch.equal(found["weights"], PLAIN["weights"])  # type: ignore[arg-type]
    assert found["weights"].dtype == torch.bfloat16
    assert torch.equal(found["parameter"], torch.ones(3))
    assert found["args"] == argparse.Namespace(dtype=torch.bfloat16, lr=0.25, steps=7)
    assert type(found["args"].lr) is float
    assert found["size"] == torch.Size([1, 2])
    assert found["ordered"] == {"a": 1}
    assert found["default"] == {"b": [2]}
    assert found["state"]["python"] == PLAIN["state"]["python"]  # type: ignore[index,call-overload]
    assert found["scales"].getvalue() == b"as Transformer Engine had them"
    assert found["path"] == "/data/tokenizer"
    assert found["raw"] == b"\x00\xff"
    assert found["set"] == {1, 2}


def test_tensors_stay_in_the_file_until_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"weight": torch.zeros(1 << 20)}, path)
    whole = unpickle.load(path, mapped=True)["weight"]
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo(next(n for n in archive.namelist() if n.endswith("data/0")))
    with path.open("r+b") as file:
        file.seek(offset.header_offset + offset.file_size)
        file.write(np.float32(2).tobytes())
    assert whole.count_nonzero() == 1, "a copy would not have changed"
    whole[0] = 5
    assert unpickle.load(path)["weight"][0] != 5, "the file is never written"


ENUM = b"cmegatron.core.transformer.enums\nAttnBackend\n"
FORMAT = b"ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\n"


@pytest.mark.parametrize(
    ("content", "value"),
    [
        (ENUM + b"(I5\ntR.", 5),
        # As the first versions of Python 3.11 pickle a member.
        (b"cbuiltins\ngetattr\n(" + ENUM + b"S'auto'\ntR.", "auto"),
        (
            b"cbuiltins\ngetattr\n(" + FORMAT + b"S'TORCH_PRESERVE_FORMAT'\ntR.",
            dcp._MEM_FORMAT_ENCODING.TORCH_PRESERVE_FORMAT,
        ),
        (b"csignal\nSignals\n(I15\ntR.", "SIGTERM"),
    ],
)
def test_enums_become_plain_values(tmp_path: Path, content: bytes, value: object) -> None:
    assert unpickle.load(archive(tmp_path / "common.pt", content)) == value


def test_objects_of_megatron_are_kept_without_its_code(tmp_path: Path) -> None:
    content = b"cmegatron.core.machine\nMachine\n)\x81}S'mode'\nI1\nsb."
    found = unpickle.load(archive(tmp_path / "common.pt", content))
    assert isinstance(found, unpickle.Foreign)
    assert (found.kind, found.state) == ("megatron.core.machine.Machine", {"mode": 1})


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Runs(os.system, "touch ran"), "posix.system"),
        (Runs(eval, "open('ran', 'w')"), "builtins.eval"),
        (Runs(exec, "open('ran', 'w')"), "builtins.exec"),
        (Runs(torch.load, "ran"), "torch.serialization.load"),
        (Runs(torch.storage._load_from_bytes, b""), "torch.storage._load_from_bytes"),
        (Runs(shutil.rmtree, "ran"), "shutil.rmtree"),
        (Unknown(), "tests.convert.test_unpickle.Unknown"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("where", ["common.pt", ".metadata"])
def test_what_could_run_is_refused_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, value: object, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / where
    nested = {"iteration": 1, "args": argparse.Namespace(inner=[{"deep": value}])}
    with pytest.raises(RequestError) as refused:
        if where == "common.pt":
            torch.save(nested, path)
            unpickle.load(path)
        else:
            path.write_bytes(pickle.dumps(dcp.Metadata({}, planner_data=nested)))
            unpickle.load_metadata(path)
    assert refused.value.place == str(path)
    assert f"names {name}, which could run code" in str(refused.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # BUILD of a class: its state would be the attributes of argparse.Namespace itself.
        (b"cargparse\nNamespace\n(N}S'marked'\nI1\nstb.", "it sets marked of Namespace"),
        (b"cargparse\nNamespace\n}S'marked'\nI1\nsb.", "does not support item assignment"),
        # A function that is known, taken for a class.
        (b"ctorch._utils\n_rebuild_tensor_v2\n)\x81.", "for a class"),
        (b"c_codecs\nencode\n(Vx\nVrot13\ntR.", "it encodes as rot13"),
        (b"cbuiltins\ngetattr\n(cargparse\nNamespace\nS'__init__'\ntR.", "takes attributes"),
        (b"cbuiltins\ngetattr\n(" + FORMAT + b"S'mro'\ntR.", "takes attributes"),
        (b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(VO\ntRC\x00tR.", "of the kind O"),
        (b"", "is not whole"),
        (b"garbage", "is not whole"),
    ],
)  # fmt: skip
def test_a_pickle_that_misuses_what_is_known_changes_nothing(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = archive(tmp_path / "common.pt", content)
    with pytest.raises(RequestError) as refused:
        unpickle.load(path)
    assert message in str(refused.value)
    assert not hasattr(argparse.Namespace, "marked")


def test_trust_runs_what_the_file_says(tmp_path: Path) -> None:
    path = tmp_path / "common.pt"
    torch.save({"it": Unknown(), "length": Runs(len, [1, 2])}, path)
    with pytest.raises(RequestError, match="--trust"):
        unpickle.load(path)
    found = unpickle.load(path, trust=True)
    assert isinstance(found["it"], Unknown)
    assert found["length"] == 2


@pytest.mark.parametrize("size", [0, 3, 100, -1])
def test_a_torn_file_is_named(tmp_path: Path, size: int) -> None:
    path = tmp_path / "common.pt"
    torch.save(PLAIN, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(RequestError) as refused:
        unpickle.load(path)
    assert refused.value.place == str(path)
    path.write_bytes(pickle.dumps(dcp.Metadata({}))[:size])
    with pytest.raises(RequestError, match="is not whole"):
        unpickle.load_metadata(path)


def test_a_missing_file_and_one_of_another_kind_are_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"common\.pt: is missing"):
        unpickle.load(tmp_path / "common.pt")
    with pytest.raises(RequestError, match=r"\.metadata: is missing"):
        unpickle.load_metadata(tmp_path / ".metadata")
    with pytest.raises(RequestError, match="cannot be read: Is a directory"):
        unpickle.load(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(RequestError, match="holds no metadata"):
        unpickle.load_metadata(tmp_path / ".metadata")
    # An archive of TorchScript, which has a loader of its own.
    torch.jit.script(torch.nn.Linear(1, 1)).save(str(tmp_path / "model.pt"))
    with pytest.raises(RequestError, match=r"is not a file of torch\.save"):
        unpickle.load(tmp_path / "model.pt")
