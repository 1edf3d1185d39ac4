"""Boxes of any cut, read where they lie."""

from __future__ import annotations

import io
import itertools
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tanren.config.errors import RequestError
from tanren.convert import torch_dist
from tanren.convert.mapping import mapped
from tanren.convert.tensors import Held, Stored, rows
from tanren.convert.torch_dist import Boxes, Record

WHOLE = torch.arange(3 * 8 * 10, dtype=torch.float32).reshape(3, 8, 10).bfloat16()
Box = tuple[tuple[int, ...], tuple[int, ...]]


def saved(value: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


def checkpoint(folder: Path, boxes: list[tuple[Box, bytes]], whole: torch.Tensor = WHOLE) -> Boxes:
    """A checkpoint whose tensor `w` lies in these boxes, with something before each."""
    records = []
    with (folder / "__0_0.distcp").open("wb") as stream:
        for (offsets, sizes), blob in boxes:
            stream.write(b"other")
            stored = Stored(tuple(whole.shape), whole.dtype)
            where = stream.tell(), len(blob)
            records.append(Record("w", "__0_0.distcp", *where, stored, offsets, sizes))
            stream.write(blob)
    (folder / ".metadata").write_bytes(pickle.dumps(torch_dist.metadata(records)))
    return Boxes(folder)


def part(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
    return WHOLE[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]


def cuts(shape: tuple[int, ...], at: list[list[int]]) -> list[Box]:
    """The boxes between cuts of each axis."""
    found: list[Box] = [((), ())]
    for size, inner in zip(shape, at, strict=True):
        ends = sorted({0, size, *(one % size for one in inner)})
        spans = list(itertools.pairwise(ends))
        found = [((*o, a), (*n, b - a)) for o, n in found for a, b in spans]
    return found


@settings(max_examples=40, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(data=st.data())
def test_any_part_is_read_from_boxes_of_any_cut(tmp_path: Path, data: st.DataObject) -> None:
    """Those of layers, of tensor parallelism (rows or columns), and of data-parallel ranks."""
    inner = [data.draw(st.lists(st.integers(0, 9), max_size=2)) for _ in range(3)]
    boxes = cuts((3, 8, 10), inner)
    contents = [(box, saved(part(*box).clone())) for box in boxes]
    stored = checkpoint(tmp_path, data.draw(st.permutations(contents)))
    for _ in range(5):
        offsets = tuple(data.draw(st.integers(0, n - 1)) for n in (3, 8, 10))
        sizes = tuple(
            data.draw(st.integers(1, n - o)) for n, o in zip((3, 8, 10), offsets, strict=True)
        )
        found = stored.read("w", offsets, sizes)
        assert found.shape == sizes
        assert torch.equal(found, part(offsets, sizes))


ALL: Box = ((0, 0, 0), (3, 8, 10))
ODD = {
    "a view of a larger storage": (saved(torch.cat([WHOLE, WHOLE])[3:]), False),
    "a transposed one": (saved(WHOLE.transpose(0, 2).contiguous().transpose(0, 2)), False),
    "torch's old format": (saved(WHOLE, _use_new_zipfile_serialization=False), False),
    "a parameter": (saved(torch.nn.Parameter(WHOLE)), False),
    "another type": (saved(WHOLE.float()), False),
    "without an axis of length 1": (saved(WHOLE.reshape(24, 10)), True),
    "a plain one": (saved(WHOLE), True),
}


@pytest.mark.parametrize("kind", ODD)
def test_archives_that_are_not_plain_are_read_by_torch(tmp_path: Path, kind: str) -> None:
    blob, in_place = ODD[kind]
    stored = checkpoint(tmp_path, [(ALL, blob)])
    assert torch.equal(stored.read("w", *ALL), WHOLE)
    assert torch.equal(stored.read("w", (1, 2, 3), (2, 4, 5)), part((1, 2, 3), (2, 4, 5)))
    assert (stored._place("w", 0) is not None) == in_place


class Bomb:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("exploded"),))


def with_pickle(blob: bytes, content: bytes) -> bytes:
    """A torch.save archive with another pickle in it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(blob)) as old, zipfile.ZipFile(stream, "w") as new:
        for entry in old.infolist():
            new.writestr(entry, content if entry.filename.endswith("data.pkl") else old.read(entry))
    return stream.getvalue()


BROKEN = {
    "code": (with_pickle(saved(WHOLE), pickle.dumps(Bomb())), "is broken"),
    "no archive": (b"nothing at all" * 40, "is broken"),
    "cut off": (saved(WHOLE)[:-300], "is broken"),
    "no tensor": (saved([1]), "holds a list where w should be"),
    "a smaller tensor": (
        saved(WHOLE[:2].clone()),
        r"w is \[2, 8, 10\], and \[3, 8, 10\] is stated",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_box_is_named_and_nothing_in_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    blob, problem = BROKEN[kind]
    stored = checkpoint(tmp_path, [(ALL, blob)])
    with pytest.raises(RequestError, match=problem) as refused:
        stored.read("w", *ALL)
    assert refused.value.place == str(tmp_path / "__0_0.distcp")
    assert not (tmp_path / "exploded").exists()


def test_a_box_that_is_compressed_is_refused_by_its_kind(tmp_path: Path) -> None:
    stored = checkpoint(tmp_path, [(ALL, saved(WHOLE))])
    [place] = stored._metadata.storage_data.values()
    place.transform_descriptors = ["stream.zstd"]
    with pytest.raises(RequestError, match=r"w is stored stream\.zstd, which is not read"):
        stored.read("w", *ALL)


def test_a_hole_between_boxes_is_refused(tmp_path: Path) -> None:
    boxes = [((at, 0, 0), (1, 8, 10)) for at in range(3)]
    stored = checkpoint(tmp_path, [(box, saved(part(*box).clone())) for box in boxes])
    del stored._metadata.state_dict_metadata["w"].chunks[1]
    assert torch.equal(stored.read("w", *boxes[2]), part(*boxes[2]))
    with pytest.raises(RequestError, match="w has holes: 160 of 240 elements are there"):
        stored.read("w", *ALL)


def test_large_tensors_are_written_in_boxes_of_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_dist, "LIMIT", 30)
    tensors = {"decoder.layers.w": WHOLE, "embedding": WHOLE[0], "norm": WHOLE[0, 0],
               "one": torch.ones(1)}  # fmt: skip
    torch_dist.write(tmp_path, Held(tensors), prefix="model.")
    stored = Boxes(tmp_path)
    assert set(stored.stored) == {"model." + name for name in tensors}
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        found = stored.read("model." + name, (0,) * len(shape), shape)
        assert (found.dtype, found.shape) == (tensor.dtype, shape)
        assert torch.equal(found, tensor)
        chunks = stored._chunks("model." + name)
        assert max(one.sizes.numel() for one in chunks) <= 30
    # 8 rows of 10 in three boxes of about the same size, of each layer.
    sizes = [tuple(one.sizes) for one in stored._chunks("model.decoder.layers.w")]
    assert sorted(sizes) == sorted([(1, 3, 10), (1, 3, 10), (1, 2, 10)] * 3)


def test_a_mapped_tensor_is_let_go_of_with_its_last_reference(tmp_path: Path) -> None:
    file = tmp_path / "bytes"
    file.write_bytes(bytes(range(256)) * 64)

    def held() -> int:
        return Path("/proc/self/maps").read_text().count(str(file))

    tensor = mapped(file, 4097, torch.uint8, (100, 10))
    assert torch.equal(tensor[0], torch.arange(1, 11, dtype=torch.uint8))
    column = tensor[:, 3]
    del tensor
    assert held() == 1
    column += 1  # what is changed is this process's copy
    assert file.read_bytes() == bytes(range(256)) * 64
    del column
    assert held() == 0
    with pytest.raises(RequestError, match="is not whole: it has 16384 bytes, and 16385 are stat"):
        mapped(file, 1, torch.uint8, (16384,))


def test_a_part_of_a_tensor_in_memory_is_rows_of_it() -> None:
    held = Held({"w": WHOLE})
    assert torch.equal(rows(held, "w", 1, 2, 5), WHOLE[1, 2:5])
    assert torch.equal(rows(held, "w", None, 1, 3), WHOLE[1:3])
