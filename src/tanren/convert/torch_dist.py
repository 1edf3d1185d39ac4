"""The torch_dist format: tensors in boxes, a torch.save archive each, and `.metadata`, which says
what is where.

One process reads and writes them, whatever layout saved them. An archive keeps a tensor's bytes as
they are in memory, so that a box is memory-mapped where it lies.
"""

from __future__ import annotations

import heapq
import io
import itertools
import math
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import numpy as np
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from tanren.config.errors import RequestError
from tanren.convert import archive, unpickle
from tanren.convert.mapping import Sink, contiguous, mapped
from tanren.convert.tensors import Stored, Tensors, each, rows

# Elements of a box that is written: what a thread holds at a time (128 MiB of bf16).
LIMIT = 1 << 26
# Threads that write, each with a file of its own.
THREADS = 4
# Tensors of which each layer has one lie stacked under these names.
STACKED = "decoder.layers."


@dataclass(frozen=True)
class Record:
    """Where in a checkpoint's files something lies. Objects have no box."""

    key: str
    file: str
    offset: int
    length: int
    stored: Stored | None = None
    offsets: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()


def metadata(records: Iterable[Record]) -> Metadata:
    """A checkpoint's `.metadata`, as torch.distributed.checkpoint reads it."""
    contents: dict[str, Any] = {}
    places: dict[Any, Any] = {}
    records = list(records)
    for one in records:
        place = _StorageInfo(one.file, one.offset, one.length)
        if one.stored is None:
            contents[one.key] = BytesStorageMetadata()
            places[MetadataIndex(one.key)] = place
            continue
        chunk = ChunkStorageMetadata(torch.Size(one.offsets), torch.Size(one.sizes))
        if one.key not in contents:
            contents[one.key] = TensorStorageMetadata(
                TensorProperties(one.stored.dtype), torch.Size(one.stored.shape), []
            )
        contents[one.key].chunks.append(chunk)
        places[MetadataIndex(one.key, one.offsets)] = place
    for key, one in contents.items():
        if isinstance(one, TensorStorageMetadata):
            there = sum(chunk.sizes.numel() for chunk in one.chunks)
            assert there == one.size.numel(), f"{key}: {there} of {one.size.numel()} elements"
    assert len(places) == len(records)
    return Metadata(contents, storage_data=places, version="1.0.0")


def read_metadata(checkpoint: Path, *, trust: bool = False) -> Metadata:
    """What a checkpoint says is where.

    Args:
        trust: run what `.metadata` names; see `unpickle`.
    Raises:
        RequestError: `.metadata` is missing, broken, or names what could run code.
    """
    path, again = checkpoint / ".metadata", "bring the checkpoint again, whole"
    found = unpickle.load_metadata(path, trust=trust)
    try:
        # Objects may share a place: those that are None do.
        places = sorted(
            (one.relative_path, one.offset, one.length)
            for index, one in found.storage_data.items()
            if index.offset is not None
        )
        boxes = [
            (tuple(chunk.offsets), tuple(chunk.sizes), one.properties.dtype)
            for one in found.state_dict_metadata.values()
            if isinstance(one, TensorStorageMetadata)
            for chunk in one.chunks
        ]
    except Exception as error:  # a pickle with a wrong byte raises anything
        raise RequestError(path, f"is not whole: {error!r}", again) from None
    for (file, start, length), (other, next_start, _) in itertools.pairwise(places):
        if file == other and start + length > next_start:
            raise RequestError(path, f"says that two tensors overlap in {file}", again)
    if len(places) < len(boxes):
        raise RequestError(path, "does not say where all of its tensors lie", again)
    return found


class Boxes:
    """The boxes of a checkpoint's tensors. Several threads may read at a time."""

    def __init__(self, checkpoint: Path, *, trust: bool = False) -> None:
        self.checkpoint = checkpoint
        self._metadata = read_metadata(checkpoint, trust=trust)
        self.stored = {
            name: Stored(tuple(one.size), one.properties.dtype)
            for name, one in self._metadata.state_dict_metadata.items()
            if isinstance(one, TensorStorageMetadata)
        }
        self._corners: dict[str, np.ndarray[Any, Any]] = {}
        self._places: dict[MetadataIndex, archive.Place | None] = {}

    def read(self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
        """Any part of a tensor: mapped where one box has it, else put together from several."""
        parts = self.cuts(name, offsets, sizes)
        if len(parts) == 1 and tuple(parts[0][1].shape) == sizes:
            return parts[0][1]
        whole = torch.empty(sizes, dtype=self.stored[name].dtype)
        for low, part in parts:
            window = zip(low, offsets, part.shape, strict=True)
            whole[tuple(slice(at - o, at - o + n) for at, o, n in window)].copy_(part)
        filled = sum(part.numel() for _, part in parts)
        if filled != whole.numel():
            raise RequestError(
                self.checkpoint,
                f"{name} has holes: {filled} of {whole.numel()} elements are there",
                "bring the checkpoint again, whole",
            )
        return whole

    def cuts(
        self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]
    ) -> list[tuple[tuple[int, ...], torch.Tensor]]:
        """What each box has of a part of a tensor, and where that begins in the tensor."""
        found = self._overlapping(name, offsets, sizes)
        return [self._cut(name, index, offsets, sizes) for index in found]

    def _overlapping(
        self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]
    ) -> list[int]:
        """Which boxes of a tensor have something of this part of it."""
        if name not in self._corners:
            chunks = self._chunks(name)
            self._corners[name] = np.array([[one.offsets, one.sizes] for one in chunks])
        first, count = self._corners[name][:, 0], self._corners[name][:, 1]
        wanted = np.array(offsets)
        inside = (first < wanted + sizes) & (first + count > wanted)
        found: list[int] = np.flatnonzero(inside.all(1)).tolist()
        return found

    def _cut(
        self, name: str, index: int, offsets: tuple[int, ...], sizes: tuple[int, ...]
    ) -> tuple[tuple[int, ...], torch.Tensor]:
        chunk = self._chunks(name)[index]
        origin, lengths = tuple(chunk.offsets), tuple(chunk.sizes)
        low = tuple(max(a, b) for a, b in zip(offsets, origin, strict=True))
        ends = zip(offsets, sizes, origin, lengths, strict=True)
        shape = tuple(min(a + n, b + m) - at for (a, n, b, m), at in zip(ends, low, strict=True))
        inner = tuple(at - o for at, o in zip(low, origin, strict=True))
        place = self._place(name, index)
        if place is None:
            window = tuple(slice(at, at + n) for at, n in zip(inner, shape, strict=True))
            return low, self._loaded(name, index)[window]
        strides = contiguous(lengths)
        first = sum(at * stride for at, stride in zip(inner, strides, strict=True))
        offset = place.offset + first * place.dtype.itemsize
        return low, mapped(place.file, offset, place.dtype, shape, strides)

    def _chunks(self, name: str) -> list[ChunkStorageMetadata]:
        chunks: list[ChunkStorageMetadata]
        chunks = cast(TensorStorageMetadata, self._metadata.state_dict_metadata[name]).chunks
        return chunks

    def _where(self, name: str, index: int) -> tuple[Path, int, int]:
        chunk = self._chunks(name)[index]
        try:
            place = self._metadata.storage_data[MetadataIndex(name, chunk.offsets)]
        except KeyError:
            raise RequestError(
                self.checkpoint / ".metadata", f"does not say where {name} lies",
                "bring the checkpoint again, whole",
            ) from None  # fmt: skip
        if getattr(place, "transform_descriptors", None):
            raise RequestError(
                self.checkpoint / place.relative_path,
                f"{name} is stored {', '.join(place.transform_descriptors)}, which is not read",
                "save the checkpoint without compression",
            )
        return self.checkpoint / place.relative_path, place.offset, place.length

    def _place(self, name: str, index: int) -> archive.Place | None:
        """Where a box's bytes lie; None where its archive is not a plain one."""
        chunk = self._chunks(name)[index]
        key = MetadataIndex(name, chunk.offsets)
        if key not in self._places:
            file, offset, length = self._where(name, index)
            self._places[key] = archive.find(file, offset, length, chunk.sizes.numel())
        found = self._places[key]
        return found if found is None or found.dtype == self.stored[name].dtype else None

    def _loaded(self, name: str, index: int) -> torch.Tensor:
        """A box by torch's own reading, whole."""
        file, offset, length = self._where(name, index)
        with file.open("rb") as stream:
            stream.seek(offset)
            content = stream.read(length)
        try:
            tensor = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as error:  # a pickle with a wrong byte raises anything
            raise RequestError(file, f"is broken: {error!r}", "bring the file again") from error
        if not isinstance(tensor, torch.Tensor):
            raise RequestError(
                file, f"holds a {type(tensor).__name__} where {name} should be",
                "bring the file again",
            )  # fmt: skip
        sizes = self._chunks(name)[index].sizes
        if tensor.numel() != sizes.numel():
            raise RequestError(
                file, f"{name} is {list(tensor.shape)}, and {list(sizes)} is stated",
                "bring the file again",
            )  # fmt: skip
        # Some writers leave out the axes of length 1 that stand for the layer.
        return tensor.reshape(sizes).to(self.stored[name].dtype)


@dataclass(frozen=True)
class _Part:
    """A box that is to be written: rows of a tensor, or of one layer's."""

    name: str
    layer: int | None
    start: int
    stop: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def write(folder: Path, tensors: Tensors, *, prefix: str = "", empty: Iterable[str] = ()) -> None:
    """Write tensors as boxes and `.metadata`, with a few boxes in memory at a time.

    Args:
        folder: exists, and gets its name when everything is written.
        prefix: of the names in the checkpoint.
        empty: whole names of objects that a reader asks for, and that are None.
    """
    parts = [part for name, stored in tensors.stored.items() for part in _parts(name, stored)]

    def size(part: _Part) -> int:
        return math.prod(part.sizes) * tensors.stored[part.name].dtype.itemsize

    def write_file(path: Path, mine: list[_Part]) -> list[Record]:
        records = []
        with Sink(path) as stream:
            for part in mine:
                offset = stream.position
                _save(_values(tensors, part), stream)
                stored = tensors.stored[part.name]
                records.append(
                    Record(
                        prefix + part.name, path.name, offset, stream.position - offset,
                        stored, part.offsets, part.sizes,
                    )
                )  # fmt: skip
        return records

    # Always the same boxes in the same file: what is made of equal weights has equal files.
    jobs = [
        (folder / f"__0_{number}.distcp", mine)
        for number, mine in enumerate(shares(parts, THREADS, size))
        if mine
    ]
    with _without_checksums():
        written = each(lambda job: write_file(*job), jobs, THREADS)
    records = [record for some in written for record in some]
    records += _write_empty(folder / f"__0_{THREADS}.distcp", list(empty))
    (folder / ".metadata").write_bytes(pickle.dumps(metadata(records)))


def _write_empty(path: Path, names: list[str]) -> list[Record]:
    if not names:
        return []
    nothing = io.BytesIO()
    # megatron-core stores a list, of what each rank with this object has.
    torch.save([None], nothing)
    each_takes = nothing.tell()
    path.write_bytes(nothing.getvalue() * len(names))
    return [Record(name, path.name, at * each_takes, each_takes) for at, name in enumerate(names)]


def _parts(name: str, stored: Stored) -> Iterator[_Part]:
    layers = range(stored.shape[0]) if name.startswith(STACKED) else (None,)
    for layer in layers:
        shape = stored.shape if layer is None else stored.shape[1:]
        before = () if layer is None else (layer,)
        # Of about the same size, so that gate and up do not share one.
        limit = max(LIMIT // max(math.prod(shape[1:]), 1), 1)
        step = -(-shape[0] // -(-shape[0] // limit))
        for start in range(0, shape[0], step):
            stop = min(start + step, shape[0])
            offsets = (*before, start, *(0 for _ in shape[1:]))
            sizes = (*(1 for _ in before), stop - start, *shape[1:])
            yield _Part(name, layer, start, stop, offsets, sizes)


def _values(tensors: Tensors, part: _Part) -> torch.Tensor:
    values = rows(tensors, part.name, part.layer, part.start, part.stop).reshape(part.sizes)
    # torch saves all of the storage that a tensor is a part of.
    whole = values.is_contiguous() and values.untyped_storage().nbytes() == values.nbytes
    return values if whole else values.clone(memory_format=torch.contiguous_format)


def _save(values: torch.Tensor, stream: Sink) -> None:
    try:
        torch.save(values, cast(IO[bytes], stream))
    except RuntimeError:
        # torch's archive writer says where its file ends, and not why.
        if stream.error is not None:
            raise stream.error from None
        raise


@contextmanager
def _without_checksums() -> Iterator[None]:
    """torch computes a checksum of each archive, at half the speed of writing, and reads none."""
    try:
        from torch.utils.serialization import config
    except ImportError:  # torch before 2.6 has no such switch
        yield
        return
    before = config.save.compute_crc32
    config.save.compute_crc32 = False
    try:
        yield
    finally:
        config.save.compute_crc32 = before


T = TypeVar("T")


def shares(items: Sequence[T], number: int, size: Callable[[T], int]) -> list[list[T]]:
    """Items in shares of about the same size, each in its order."""
    found: list[list[T]] = [[] for _ in range(number)]
    sizes = [(0, index) for index in range(number)]
    for item in sorted(items, key=lambda one: -size(one)):
        so_far, index = heapq.heappop(sizes)
        found[index].append(item)
        heapq.heappush(sizes, (so_far + size(item), index))
    return found
