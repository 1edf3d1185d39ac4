"""Token files to batches: the order of the samples, and what is in them."""

from __future__ import annotations

import logging
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

from tanren.config.errors import WorkError
from tanren.data import blend, indexed
from tanren.data.blend import Batch, Blend, MicroBatches
from tanren.plan.mix import SourceShare

SEQUENCE = 16
SAMPLES = 80
EOD = 1
# Each document repeats a number of its own, so a token tells its document and its source.
FIRST_TOKEN = {"three": 1000, "one": 2000}
WEIGHTS = {"three": 0.75, "one": 0.25}
CPU = torch.device("cpu")
FEW = st.integers(1, 5)


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    """build() waits for the other ranks: here there are none."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[SourceShare, ...]:
    """Two sources of 100 documents of 40 tokens; the first is to be read three times as much."""
    folder = tmp_path_factory.mktemp("tokens")
    shares = []
    for name, first in FIRST_TOKEN.items():
        documents = [[number] * 39 + [EOD] for number in range(first, first + 100)]
        tokens = indexed.write(folder / name, documents, 3000).tokens
        shares.append(
            SourceShare(name=name, prefix=str(folder / name), tokens=tokens, stated=1.0,
                        pattern=None, used=tokens, weight=WEIGHTS[name], epochs=1.0)
        )  # fmt: skip
    return tuple(shares)


def build(sources: tuple[SourceShare, ...], cache: Path, **changes: Any) -> Blend:
    request: dict[str, Any] = {
        "split": "90,10,0", "sequence_length": SEQUENCE, "train_samples": SAMPLES,
        "held_out_samples": 8, "seed": 5, "tokenizer": blend.DatasetTokenizer(3000, EOD),
        "data": "first",
    }  # fmt: skip
    return blend.build(sources, cache=cache, **(request | changes))


@pytest.fixture(scope="module")
def built(sources: tuple[SourceShare, ...], tmp_path_factory: pytest.TempPathFactory) -> Blend:
    return build(sources, tmp_path_factory.mktemp("run") / "index" / "cache")


def stream(
    dataset: Dataset[Batch], micro: int = 4, rank: int = 0, ranks: int = 1, first: int = 0
) -> list[Batch]:
    sampler = MicroBatches(
        first=first, last=SAMPLES, micro_batch=micro, data_rank=rank, data_size=ranks
    )
    return list(blend.batches(dataset, sampler, workers=0, device=CPU))


def tokens(dataset: Dataset[Batch], **layout: int) -> torch.Tensor:
    return torch.cat([batch["tokens"] for batch in stream(dataset, **layout)])


def test_a_batch_has_tokens_labels_positions_and_a_whole_loss_mask(built: Blend) -> None:
    batches = stream(built.train)
    assert len(batches) == SAMPLES // 4
    for batch in batches:
        assert set(batch) == {"tokens", "labels", "loss_mask", "position_ids"}
        assert {value.shape for value in batch.values()} == {(4, SEQUENCE)}
        assert torch.equal(batch["labels"][:, :-1], batch["tokens"][:, 1:])
        assert torch.equal(batch["position_ids"], torch.arange(SEQUENCE).expand(4, -1))
        assert torch.equal(batch["loss_mask"], torch.ones(4, SEQUENCE)), "the end counts, too"
    assert any((batch["labels"] == EOD).any() for batch in batches)


def test_sources_are_read_as_their_weights_say(built: Blend) -> None:
    last = tokens(built.train).max(dim=1).values
    from_one = (last >= FIRST_TOKEN["one"]).int()
    assert abs(int(from_one.sum()) - SAMPLES * WEIGHTS["one"]) <= 1
    assert abs(int(from_one[: SAMPLES // 2].sum()) - SAMPLES // 2 * WEIGHTS["one"]) <= 1


def test_held_out_documents_are_not_trained_on(built: Blend) -> None:
    assert built.held_out is not None
    held_out = set(torch.cat([built.held_out[n]["tokens"] for n in range(8)]).tolist()) - {EOD}
    trained = set(tokens(built.train).flatten().tolist()) - {EOD}
    assert {number // 1000 for number in held_out} == {1, 2}
    assert all(number % 1000 >= 90 for number in held_out), "the last tenth of each source"
    assert all(number % 1000 < 90 for number in trained)


@pytest.mark.parametrize("split", ["90,10,0", "1,0,0"])
def test_nothing_is_held_out_when_nothing_is_asked_for(
    sources: tuple[SourceShare, ...], tmp_path: Path, split: str
) -> None:
    only = build(sources[:1], tmp_path / "cache", split=split, held_out_samples=0)
    assert only.held_out is None
    assert tokens(only.train).shape == (SAMPLES, SEQUENCE)


def test_a_run_longer_than_its_data_reads_it_again(
    sources: tuple[SourceShare, ...], tmp_path: Path
) -> None:
    # 90 documents of 39 tokens and an end, twice, are 449 samples and 16 tokens more.
    twice = build(sources[:1], tmp_path / "cache", train_samples=449, held_out_samples=0)
    seen = torch.cat([twice.train[number]["tokens"] for number in range(449)]).flatten()
    counts = torch.bincount(seen, minlength=3000)[1000:1100].tolist()
    assert max(counts) == 2 * 39
    assert min(counts[:90]) >= 2 * 39 - SEQUENCE
    assert counts[90:] == [0] * 10


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({}, True),
        ({"seed": 6}, False),
        ({"sequence_length": 8}, False),
        ({"split": "80,20,0"}, False),
    ],
)
def test_the_order_is_the_requests(
    sources: tuple[SourceShare, ...],
    built: Blend,
    tmp_path: Path,
    change: dict[str, Any],
    same: bool,
) -> None:
    """The same in another folder, and another wherever the request differs, in one folder, too."""
    build(sources, tmp_path / "cache")
    other = build(sources, tmp_path / "cache", **change)
    fresh = build(sources, tmp_path / "fresh", **change)
    assert torch.equal(tokens(other.train), tokens(fresh.train))
    assert torch.equal(tokens(other.train), tokens(built.train)) == same


@pytest.mark.parametrize("left", ["index without its end", "no word", "other request"])
def test_an_unfinished_or_foreign_cache_is_made_again(
    sources: tuple[SourceShare, ...], built: Blend, tmp_path: Path, left: str
) -> None:
    cache = tmp_path / "cache"
    build(sources, cache)
    arrays = sorted(cache.rglob("*.npy"))
    assert arrays
    for array in arrays:
        array.write_bytes(array.read_bytes()[:-16])
    if left == "other request":
        blend._complete(cache, "something else")
    elif left == "no word":
        (cache / "COMPLETE.json").unlink()
    assert torch.equal(tokens(build(sources, cache).train), tokens(built.train))


def test_a_finished_cache_is_kept(sources: tuple[SourceShare, ...], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    build(sources, cache)
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*.npy")}
    assert before
    build(sources, cache)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.npy")} == before
    build(sources, cache, data="made again under the same names")
    after = {path: path.stat().st_mtime_ns for path in cache.rglob("*.npy")}
    assert all(after[path] > before[path] for path in before)


@pytest.mark.parametrize(("micro", "ranks"), [(4, 1), (1, 2), (2, 4), (8, 1)])
def test_every_layout_trains_on_the_same_global_batches(
    built: Blend, micro: int, ranks: int
) -> None:
    """And a run that goes on from its third step reads what is left of the same order."""
    whole = tokens(built.train).reshape(-1, 8, SEQUENCE)
    assert len(whole.flatten(0, 1).unique(dim=0)) > SAMPLES / 2, "else any order would do"
    for first in (0, 24):
        parts = [
            tokens(built.train, micro=micro, rank=rank, ranks=ranks, first=first)
            for rank in range(ranks)
        ]
        # [rank, step, accumulation, micro, seq] to [step, accumulation, rank, micro, seq]
        stacked = torch.stack(parts).reshape(ranks, -1, 8 // (micro * ranks), micro, SEQUENCE)
        together = stacked.permute(1, 2, 0, 3, 4).reshape(-1, 8, SEQUENCE)
        assert torch.equal(together, whole[first // 8 :])


def cut(first: int, last: int, micro: int, ranks: int) -> list[list[list[int]]]:
    return [
        list(MicroBatches(first=first, last=last, micro_batch=micro, data_rank=rank,
                          data_size=ranks))
        for rank in range(ranks)
    ]  # fmt: skip


@settings(deadline=None)
@given(micro=FEW, ranks=FEW, accumulation=FEW, steps=FEW, done=st.integers(0, 5))
def test_a_global_batch_is_seen_once_over_the_ranks(
    micro: int, ranks: int, accumulation: int, steps: int, done: int
) -> None:
    size = micro * ranks * accumulation
    done = min(done, steps)
    of_ranks = cut(done * size, steps * size, micro, ranks)
    for step in range(done, steps):
        begin = (step - done) * accumulation
        seen = [n for rank in of_ranks for part in rank[begin : begin + accumulation] for n in part]
        assert sorted(seen) == list(range(step * size, (step + 1) * size))
    for rank, resumed in zip(cut(0, steps * size, micro, ranks), of_ranks, strict=True):
        assert resumed == rank[done * accumulation :]
        assert all(len(part) == micro for part in rank)


@settings(deadline=None)
@given(first=st.integers(0, 50), count=st.integers(0, 50), micro=FEW, ranks=FEW)
def test_any_range_is_read_once_and_no_further(
    first: int, count: int, micro: int, ranks: int
) -> None:
    parts = [part for rank in cut(first, first + count, micro, ranks) for part in rank]
    assert sorted(n for part in parts for n in part) == list(range(first, first + count))
    assert all(0 < len(part) <= micro for part in parts)


class Handlers(Dataset[Batch]):
    """Says of the process that reads it whether it ignores the signals of a stop."""

    def __getitem__(self, number: int) -> dict[str, Any]:
        ignored = [
            signal.getsignal(each) is signal.SIG_IGN for each in (signal.SIGINT, signal.SIGTERM)
        ]
        return {"number": torch.tensor(number), "deaf": torch.tensor(ignored), "dataset_id": 3}


def test_workers_keep_the_order_and_leave_signals_to_the_trainer() -> None:
    sampler = MicroBatches(first=2, last=10, micro_batch=2, data_rank=1, data_size=2)
    batches = list(blend.batches(Handlers(), sampler, workers=2, device=CPU))
    assert [batch["number"].tolist() for batch in batches] == [[4, 5], [8, 9]]
    assert all(set(batch) == {"number", "deaf"} for batch in batches)
    assert all(batch["deaf"].all() for batch in batches)


def test_what_one_rank_wrote_is_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture,
                                           monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Another node sees the files of a shared disk later, and not all at once."""
    cache, elsewhere = tmp_path / "seen", tmp_path / "written"
    elsewhere.mkdir()
    cache.mkdir()
    for name in ("order.npy", "documents.npy"):
        (elsewhere / name).write_bytes(name.encode() * 100)
    blend._complete(elsewhere, "these samples")
    monkeypatch.setattr(blend, "_QUIET_SECONDS", 0.2)

    def appear() -> None:
        for name in ("order.npy", "COMPLETE.json", "documents.npy"):
            time.sleep(0.25)
            shutil.copyfile(elsewhere / name, cache / name)

    thread = threading.Thread(target=appear)
    thread.start()
    with caplog.at_level(logging.WARNING):
        blend._wait_for(cache, "these samples", seconds=20)
    thread.join()
    assert (cache / "documents.npy").read_bytes() == b"documents.npy" * 100
    assert caplog.messages == [f"waiting to see {cache} on {socket.gethostname()}"]
    (cache / "order.npy").write_bytes(b"half")
    for wanted in ("these samples", "other samples"):
        with pytest.raises(WorkError, match="is not whole on"):
            blend._wait_for(cache, wanted, seconds=0.3)
