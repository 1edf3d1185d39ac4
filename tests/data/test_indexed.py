"""Token files, held to megatron-core's own writer and reader."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from tanren.config.errors import EXIT_REQUEST, RequestError
from tanren.data import indexed

CORPORA = {
    "one": [[5, 6, 7]],
    "several": [[1], [2, 3, 4, 5], list(range(200)), [9, 9]],
    "empty documents": [[], [1, 2], [], [3], []],
    "nothing but an empty document": [[]],
}


@pytest.mark.parametrize("name", CORPORA)
@pytest.mark.parametrize(
    ("vocabulary", "bytes_a_token"), [(300, 2), (65499, 2), (65500, 4), (130_000, 4)]
)
def test_the_files_are_those_of_megatron(
    tmp_path: Path, name: str, vocabulary: int, bytes_a_token: int
) -> None:
    corpus = [*CORPORA[name], [vocabulary - 1]] if name == "several" else CORPORA[name]
    dtype = DType.optimal_dtype(vocabulary)
    builder = IndexedDatasetBuilder(f"{tmp_path}/theirs.bin", dtype=dtype)
    for document in corpus:
        builder.add_document(torch.tensor(document, dtype=torch.int64), [len(document)])
    builder.finalize(f"{tmp_path}/theirs.idx")

    counts = indexed.write(tmp_path / "ours", corpus, vocabulary)
    tokens = sum(len(document) for document in corpus)
    assert counts == indexed.Counts(len(corpus), tokens) == indexed.check(tmp_path / "ours")
    assert indexed.check(tmp_path / "theirs") == counts
    assert (tmp_path / "ours.bin").stat().st_size == tokens * bytes_a_token
    for suffix in ("bin", "idx"):
        ours, theirs = (tmp_path / f"{who}.{suffix}" for who in ("ours", "theirs"))
        assert ours.read_bytes() == theirs.read_bytes(), suffix


@pytest.mark.parametrize("vocabulary", [300, 130_000])
def test_megatron_reads_what_was_written(tmp_path: Path, vocabulary: int) -> None:
    corpus = CORPORA["several"] + CORPORA["empty documents"]
    indexed.write(tmp_path / "v1.2-text", corpus, vocabulary)
    dataset = IndexedDataset(str(tmp_path / "v1.2-text"))
    assert len(dataset) == len(corpus)
    assert [document.tolist() for document in dataset] == corpus
    assert dataset.document_indices.tolist() == list(range(len(corpus) + 1))


def test_a_corpus_without_documents_counts_nothing(tmp_path: Path) -> None:
    assert indexed.write(tmp_path / "t", [], 300) == indexed.Counts(0, 0)
    assert indexed.check(tmp_path / "t") == indexed.Counts(0, 0)


@pytest.mark.parametrize("token", [-1, 65536])
def test_a_token_that_does_not_fit_is_never_wrapped(tmp_path: Path, token: int) -> None:
    with pytest.raises(OverflowError):
        indexed.write(tmp_path / "t", [[token]], 300)


def test_an_interrupted_write_leaves_the_old_files(tmp_path: Path) -> None:
    def interrupted() -> Iterator[list[int]]:
        yield list(range(250)) * 200
        raise KeyboardInterrupt

    indexed.write(tmp_path / "t", [[1, 2]], 300)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"t.bin", "t.idx"}
    with pytest.raises(KeyboardInterrupt):
        indexed.write(tmp_path / "t", interrupted(), 300)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    indexed.write(tmp_path / "t", [[3]], 300)
    assert {path.name for path in tmp_path.iterdir()} == set(before), "no partial file stays"


def cut(count: int) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(path.read_bytes()[:-count])


def put(offset: int, data: bytes) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[offset : offset + len(data)] = data
        path.write_bytes(content)

    return change


# The .bin holds 5 tokens of 2 bytes; the .idx 34 bytes of header, 2 lengths, 2 offsets, 3 marks.
@pytest.mark.parametrize(
    ("suffix", "damage", "problem"),
    [
        ("bin", Path.unlink, "is missing"),
        ("idx", Path.unlink, "is missing"),
        ("bin", cut(1), "has 9 bytes, and its index says 10"),
        ("bin", cut(10), "has 0 bytes, and its index says 10"),
        ("bin", put(10, b"\x00\x00"), "has 12 bytes, and its index says 10"),
        ("idx", cut(1), "has 81 bytes, and its header says 82"),
        ("idx", cut(82 - 34), "has 34 bytes, and its header says 82"),
        ("idx", put(82, b"\x00"), "has 83 bytes, and its header says 82"),
        ("idx", cut(82 - 33), "is not a Megatron index"),
        ("idx", cut(82), "is not a Megatron index"),
        ("idx", put(0, b"X"), "is not a Megatron index"),
        ("idx", put(8, b"X"), "is not a Megatron index"),
        ("idx", put(9, b"\x07"), "is version 7; known is 1"),
        ("idx", put(17, b"\x06"), "holds tokens of type 6; known are 4 and 8"),
    ],
)
def test_damage_is_named_by_its_file(
    tmp_path: Path, suffix: str, damage: Callable[[Path], object], problem: str
) -> None:
    indexed.write(tmp_path / "t", [[1, 2, 3], [4, 5]], 300)
    file = tmp_path / f"t.{suffix}"
    damage(file)
    with pytest.raises(RequestError) as caught:
        indexed.check(tmp_path / "t")
    error = caught.value
    assert (error.place, error.exit_code) == (str(file), EXIT_REQUEST)
    assert error.problem.startswith(problem)
    assert "make preprocess" in error.next_step


def test_the_type_of_a_token_is_little_endian() -> None:
    assert indexed.token_type(65499) == np.dtype("<u2")
    assert indexed.token_type(65500) == np.dtype("<i4")
