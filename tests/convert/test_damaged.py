"""Damaged folders and checkpoints: refused in words, or converted as if nothing had happened."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tanren.config.errors import RequestError
from tanren.convert import hf, interchange
from tanren.convert.interchange import Options
from tanren.convert.tensors import Held
from tanren.data import tokenizer as tokenizers
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
