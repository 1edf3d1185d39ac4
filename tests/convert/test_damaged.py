"""Damaged folders and checkpoints: refused in words, or converted as if nothing had happened."""

from __future__ import annotations

import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tanren import runs
from tanren.config.errors import RequestError
from tanren.config.training import Lora
from tanren.convert import hf, interchange, llama, lora, nemo, torch_dist
from tanren.convert.interchange import Options
from tanren.convert.tensors import Held
from tanren.data import tokenizer as tokenizers
from tanren.stages.convert import convert_base
from tests.convert import models

MODEL = models.SHAPE.model_copy(update={"vocabulary_size": 270, "layers": 2})
# Damages of each side; each is told by its number.
CASES = 80


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder in three files with a tokenizer, and its checkpoint."""
    root = tmp_path_factory.mktemp("whole")
    folder = root / "hf"
    folder.mkdir()
    tokenizers.train(["the smith folds the steel"] * 9, 265, root / "tokenizer")
    hf.write_tensors(folder, Held(models.weights(MODEL)), max_shard_bytes=12_000)
    hf.write_settings(folder, MODEL, torch.bfloat16, root / "tokenizer", None)
    assert len(list(folder.glob("*.safetensors"))) == 3
    interchange.hf_to_mcore(folder, root / "mcore", Options(), lambda text: None)
    return root


def damage(folder: Path, seed: int) -> str:
    """Do one thing to one file of a folder; says what.

    What a tensor's own bytes are changed to is another tensor, which nothing can tell; so bytes are
    changed around them only.
    """
    draw = random.Random(seed)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    file = draw.choice(files)
    content = file.read_bytes()
    kind = draw.choice(["cut", "cut", "flip", "flip", "flip", "write", "grow", "remove", "empty"])
    at = draw.choice(_around_tensors(content))
    if kind == "cut":
        file.write_bytes(content[: draw.randrange(len(content))])
    elif kind == "flip":
        changed = bytes([content[at] ^ (1 << draw.randrange(8))])
        file.write_bytes(content[:at] + changed + content[at + 1 :])
    elif kind == "write":
        changed = bytes([draw.randrange(256)])
        file.write_bytes(content[:at] + changed + content[at + 1 :])
    elif kind == "grow":
        file.write_bytes(content + draw.randbytes(draw.choice([1, 40])))
    elif kind == "remove":
        file.unlink()
    else:
        file.write_bytes(b"")
    return f"{kind} {file.relative_to(folder)} at {at} of {len(content)}"


def _around_tensors(content: bytes) -> list[int]:
    """Places in a file that are no element of a tensor."""
    free = bytearray(b"\1" * len(content))
    for tensor in _TENSORS:
        start = content.find(tensor)
        while start >= 0:
            free[start : start + len(tensor)] = bytes(len(tensor))
            start = content.find(tensor, start + 1)
    return [at for at, one in enumerate(free) if one] or [0]


def _rows() -> list[bytes]:
    """Every row of every tensor: whatever order and boxes they lie in."""
    found = set()
    for tensor in models.weights(MODEL).values():
        for row in tensor if tensor.dim() > 1 else [tensor]:
            found.add(row.contiguous().view(torch.uint8).numpy().tobytes())
    return sorted(found)


_TENSORS = _rows()


def outcome(way: Callable[..., object], source: Path, target: Path, what: str) -> str:
    """`refused` in words, or `equal`."""
    try:
        way(source, target, Options(), lambda text: None)
    except RequestError as error:
        assert error.place, what
        assert error.problem, what
        assert error.next_step, f"{what}: {error}"
        assert not target.exists(), what
        left = [path.name for path in target.parent.iterdir() if target.name in path.name]
        assert left == [], what
        return "refused"
    return "equal"


@pytest.mark.parametrize("side", ["hf", "mcore"])
def test_whatever_is_damaged_is_refused_in_words_or_makes_no_difference(
    whole: Path, tmp_path: Path, side: str
) -> None:
    found = {"refused": 0, "equal": 0}
    for seed in range(CASES):
        source, target = tmp_path / "source", tmp_path / "target"
        shutil.copytree(whole / side, source)
        what = f"{seed}: {damage(source, seed)}"
        way = interchange.hf_to_mcore if side == "hf" else interchange.mcore_to_hf
        try:
            result = outcome(way, source, target, what)
            if result == "equal":
                if side == "hf":
                    interchange.mcore_to_hf(target, tmp_path / "back", Options(), lambda text: None)
                held = models.read(target if side == "mcore" else tmp_path / "back")
                wanted = models.weights(MODEL)
                assert held.keys() == wanted.keys(), what
                assert all(torch.equal(held[name], one) for name, one in wanted.items()), what
        except Exception as error:
            raise AssertionError(f"{what}: {error!r}") from error
        found[result] += 1
        for folder in (source, target, tmp_path / "back"):
            shutil.rmtree(folder, ignore_errors=True)
    # Neither all nor nothing: what is damaged here is worth damaging.
    assert found["refused"] > CASES // 3
    assert found["equal"] > CASES // 20


@pytest.mark.parametrize("change", ["length", "file"])
def test_two_tensors_that_would_lie_in_one_place_are_refused(
    whole: Path, tmp_path: Path, change: str
) -> None:
    """Archives are found from their ends: with a wrong length another one is read."""
    folder = shutil.copytree(whole / "mcore", tmp_path / "mcore")
    path = folder / "release" / ".metadata"
    found = torch_dist.read_metadata(path.parent)
    boxes = [one for index, one in found.storage_data.items() if index.offset is not None]
    boxes.sort(key=lambda one: (one.relative_path, one.offset))
    if change == "length":
        assert boxes[-2].relative_path == boxes[-1].relative_path
        boxes[-2].length += boxes[-1].length
    else:
        boxes[-1].relative_path = boxes[0].relative_path
    path.write_bytes(pickle.dumps(found))
    runs.write_file_list(path.parent)
    with pytest.raises(RequestError, match="says that two tensors overlap in __0_") as refused:
        interchange.mcore_to_hf(folder, tmp_path / "back", Options(), lambda text: None)
    assert refused.value.place == str(path)
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("change", [1, 4, -1])
def test_a_header_that_would_shift_a_tensor_is_refused(
    whole: Path, tmp_path: Path, change: int
) -> None:
    """torch itself believes it, and reads what lies some bytes beside."""
    folder = shutil.copytree(whole / "mcore", tmp_path / "mcore")
    file = folder / "release" / "__0_1.distcp"
    content = bytearray(file.read_bytes())
    # The first entry's own header: signature, ..., length of its name, length of the extra field.
    start = content.rindex(b"PK\3\4", 0, content.index(b"archive/data/0"))
    extra = int.from_bytes(content[start + 28 : start + 30], "little")
    content[start + 28 : start + 30] = (extra + change).to_bytes(2, "little")
    file.write_bytes(content)
    with pytest.raises(RequestError, match="the header of archive/data/0 is not one") as refused:
        interchange.mcore_to_hf(folder, tmp_path / "back", Options(), lambda text: None)
    assert refused.value.place == str(file)
    assert not (tmp_path / "back").exists()


def poisoned(folder: Path, name: str = "model.layers.1.mlp.up_proj.weight") -> Path:
    """A Hugging Face folder with one NaN."""
    tensors = models.weights(MODEL)
    tensors[name][3, 5] = float("nan")
    folder.mkdir()
    hf.write_tensors(folder, Held(tensors))
    hf.write_settings(folder, MODEL, torch.bfloat16, None, None)
    return folder


@pytest.mark.parametrize("way", [interchange.hf_to_mcore, nemo.hf_to_nemo])
def test_a_nan_is_named_and_goes_no_farther(tmp_path: Path, way: Callable[..., object]) -> None:
    source, target = poisoned(tmp_path / "hf"), tmp_path / "target"
    with pytest.raises(RequestError) as refused:
        way(source, target, Options(), lambda text: None)
    row = MODEL.ffn_hidden_size + 3
    name = "decoder.layers.mlp.linear_fc1.weight of layer 1"
    assert refused.value.problem == f"{name} holds nan at [{row}, 5]"
    assert refused.value.place == str(source)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_nan_in_a_checkpoint_reaches_no_hugging_face_folder(whole: Path, tmp_path: Path) -> None:
    with hf.open_model(poisoned(tmp_path / "hf")) as stored:
        shutil.copytree(whole / "mcore", tmp_path / "mcore")
        for file in (tmp_path / "mcore" / "release").glob("*.distcp"):
            file.unlink()
        torch_dist.write(tmp_path / "mcore" / "release", llama.to_mcore(MODEL, stored))
        runs.write_file_list(tmp_path / "mcore" / "release")
    with pytest.raises(
        RequestError, match=r"layers\.1\.mlp\.up_proj\.weight holds nan at \[3, 5\]"
    ):
        interchange.mcore_to_hf(tmp_path / "mcore", tmp_path / "back", Options(), lambda text: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "mcore"]


def test_the_stage_and_the_adapters_go_through_the_gate_as_well(tmp_path: Path) -> None:
    source = poisoned(tmp_path / "hf")
    with pytest.raises(RequestError, match="holds nan at"):
        convert_base(source, MODEL, tmp_path / "iter_0000000", "recipe.yaml")
    settings = Lora(rank=2, alpha=4.0, targets=("mlp_fc2",))
    [adapter] = lora.table(MODEL, settings)
    matrices = {
        adapter.linear_in: torch.ones(MODEL.layers, 2, MODEL.ffn_hidden_size),
        adapter.linear_out: torch.ones(MODEL.layers, MODEL.hidden_size, 2),
    }
    lora.write_peft(tmp_path / "peft", MODEL, Held(matrices), settings, "owner/base")
    matrices[adapter.linear_out][1, 7, 1] = -float("inf")
    with pytest.raises(RequestError, match=r"down_proj\.lora_B\.weight holds -inf at \[7, 1\]"):
        lora.write_peft(tmp_path / "bad", MODEL, Held(matrices), settings, "owner/base")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "peft"]


@pytest.mark.parametrize("way", [interchange.hf_to_mcore, nemo.hf_to_nemo])
def test_what_the_embedding_has_no_row_for_is_refused_before_anything_is_written(
    whole: Path, tmp_path: Path, way: Callable[..., object]
) -> None:
    small = MODEL.model_copy(update={"vocabulary_size": 264})
    models.write(tmp_path / "hf", small)
    for file in (whole / "hf").glob("tokenizer*"):
        shutil.copyfile(file, tmp_path / "hf" / file.name)
    with pytest.raises(RequestError, match="has 264 rows, and the tokenizer's largest id is 264"):
        way(tmp_path / "hf", tmp_path / "target", Options(), lambda text: None)
    folder = models.write(tmp_path / "tied", small, {"tie_word_embeddings": True})
    with pytest.raises(RequestError, match=r"lm_head\.weight is not model\.embed_tokens\.weight"):
        way(folder, tmp_path / "target", Options(), lambda text: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "tied"]
