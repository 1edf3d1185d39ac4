"""Hugging Face folders: whole or not there, and plain words about a broken one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tanren import runs
from tanren.config.errors import RequestError, WorkError
from tanren.convert import hf
from tanren.convert.tensors import Held

TENSORS = {f"layer.{i}.weight": torch.full((64, 4), float(i)) for i in range(5)}


def write(folder: Path, max_shard_bytes: int = hf.MAX_SHARD_BYTES) -> Path:
    with runs.whole_folder(folder) as partial:
        hf.write_tensors(partial, Held(TENSORS), max_shard_bytes=max_shard_bytes)
    return folder


@pytest.mark.parametrize(("limit", "files"), [(hf.MAX_SHARD_BYTES, 1), (2048, 3), (100, 5)])
def test_tensors_come_back_from_one_file_or_many(tmp_path: Path, limit: int, files: int) -> None:
    folder = write(tmp_path / "model", limit)
    assert len(list(folder.glob("*.safetensors"))) == files
    with hf.open_model(folder) as found:
        assert list(found.stored) == list(TENSORS)
        assert all(torch.equal(found.read(name), tensor) for name, tensor in TENSORS.items())


def test_transformers_reads_our_index(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = write(tmp_path / "model", 2048)
    names = [path.name for path in sorted(folder.glob("model-*.safetensors"))]
    assert names == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    together = {k: v for name in names for k, v in load_file(folder / name).items()}
    assert together.keys() == TENSORS.keys()


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(RequestError) as refused, hf.open_model(folder):
        pass
    assert refused.value.place == str(folder / "model.safetensors")
    assert "is not whole" in refused.value.problem


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", 2048)
    (folder / "model-00002-of-00003.safetensors").unlink()
    missing = pytest.raises(RequestError, match=r"model-00002-of-00003\.safetensors: is missing")
    with missing, hf.open_model(folder):
        pass


def test_a_folder_without_tensors_or_config_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(RequestError, match=r"holds neither model\.safetensors"),
        hf.open_model(tmp_path),
    ):
        pass
    with pytest.raises(RequestError, match=r"config\.json: is missing"):
        hf.read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RequestError, match=r"config\.json: is not JSON"):
        hf.read_config(tmp_path)


def test_a_path_that_is_not_there_is_not_asked_of_the_hub(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="there is no such folder"):
        hf.locate(str(tmp_path / "nothing"))


def test_a_failed_write_leaves_the_old_folder_and_no_half_one(tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    before = (folder / "model.safetensors").read_bytes()
    full = pytest.raises(WorkError, match="cannot be written: No space left on device")
    with full, runs.whole_folder(folder) as partial:
        (partial / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")
    assert (folder / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
