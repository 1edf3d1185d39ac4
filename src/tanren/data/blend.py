"""Token files to batches: megatron-core's GPTDataset over a weighted mix, read once in order."""

from __future__ import annotations

import logging
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from torch.utils.data import DataLoader, Dataset, Sampler

from tanren import runs
from tanren.config.errors import WorkError
from tanren.plan.mix import SourceShare

logger = logging.getLogger("tanren")
Batch = dict[str, torch.Tensor]
_COMPLETE = "COMPLETE.json"
# A wait that is shorter than this needs no word.
_QUIET_SECONDS = 5.0


@dataclass(frozen=True)
class DatasetTokenizer:
    """The part of a tokenizer that GPTDataset asks for.

    There is no pad token: pre-training samples are full, and a pad id that equals a real token
    would silently drop that token's loss.
    """

    vocab_size: int
    eod: int

    @property
    def unique_identifiers(self) -> dict[str, int]:
        return {"vocab_size": self.vocab_size, "eod": self.eod}


@dataclass(frozen=True)
class Blend:
    """Training and held-out samples of a run."""

    train: Dataset[Batch]
    held_out: Dataset[Batch] | None


def build(
    sources: tuple[SourceShare, ...],
    *,
    split: str,
    sequence_length: int,
    train_samples: int,
    held_out_samples: int,
    seed: int,
    tokenizer: DatasetTokenizer,
    cache: Path,
    data: str,
) -> Blend:
    """Lay out the samples of a mix from its start to the run's end; every rank calls this.

    Args:
        train_samples: steps x global batch: the order is drawn once for all of them, so that a
            resumed run reads on where it stopped.
        data: what the token files were made from: the same names may hold other text by now.
        cache: where the order is kept; rank 0 writes it, the others read.
    """
    sizes = [train_samples, held_out_samples, 0]
    blend = ([source.prefix for source in sources], [source.weight for source in sources])
    rank = torch.distributed.get_rank()
    wanted = repr((blend, data, split, sequence_length, sizes, seed))
    there = _is_complete(cache, wanted) if rank == 0 else False
    if rank == 0 and not there:
        # What an interrupted first start left: megatron takes any file that is there for whole.
        shutil.rmtree(cache, ignore_errors=True)
        cache.mkdir(parents=True)
    logging.getLogger("megatron.core.datasets").setLevel(logging.WARNING)
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=sequence_length,
        blend=blend,
        split=split,
        path_to_cache=str(cache),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    for part, size in enumerate(sizes):
        if not size:
            # Not only to save time: megatron-core would look for samples in a part without
            # documents for ever.
            config.split_matrix[part] = None

    def lay_out(on_this_rank: bool) -> list[Any]:
        wanted_here = lambda: on_this_rank  # noqa: E731
        found: list[Any] = BlendedMegatronDatasetBuilder(
            GPTDataset, sizes, wanted_here, config
        ).build()
        return found

    # Written by one, whole, before any other looks: its node may see a shared disk late.
    built = lay_out(rank == 0)
    if rank == 0 and not there:
        _complete(cache, wanted)
    torch.distributed.barrier()
    _wait_for(cache, wanted)
    others = lay_out(rank != 0)
    built = others if rank else built
    return Blend(built[0], built[1] if held_out_samples else None)


def _complete(cache: Path, wanted: str) -> None:
    """Say that a cache is whole, and what it holds."""
    files = {path.name: path.stat().st_size for path in cache.iterdir()}
    runs.write_json(cache / _COMPLETE, {"of": wanted, "files": files})


def _is_complete(cache: Path, wanted: str) -> bool:
    """Whether a cache is that of these samples, and every file of it is seen here."""
    said = runs.read_json(cache / _COMPLETE)
    if said is None or said["of"] != wanted:
        return False
    paths = {cache / name: size for name, size in said["files"].items()}
    return all(path.exists() and path.stat().st_size == size for path, size in paths.items())


def _wait_for(cache: Path, wanted: str, seconds: float = 300.0) -> None:
    """Wait until what the first rank wrote is seen on this node.

    Raises:
        WorkError: it does not come.
    """
    began, said = time.monotonic(), False
    while not _is_complete(cache, wanted):
        waited = time.monotonic() - began
        if waited > seconds:
            raise WorkError(
                cache,
                f"is not whole on {socket.gethostname()} {waited:.0f} s after the first rank wrote "
                "it",
                "RUNS= on a disk that all nodes share",
            )
        if waited > _QUIET_SECONDS and not said:
            logger.warning("waiting to see %s on %s", cache, socket.gethostname())
            said = True
        time.sleep(0.1)


class MicroBatches(Sampler[list[int]]):
    """The sample numbers of each micro batch of one data-parallel rank, from a sample on.

    A global batch holds the same samples whatever the data-parallel size and the micro batch, so
    a run resumed in another layout trains on the same tokens in the same step.
    """

    def __init__(
        self, *, first: int, last: int, micro_batch: int, data_rank: int, data_size: int
    ) -> None:
        self.first, self.last = first, last
        self.micro_batch, self.data_rank, self.data_size = micro_batch, data_rank, data_size

    def __iter__(self) -> Iterator[list[int]]:
        stride = self.micro_batch * self.data_size
        for start in range(self.first + self.data_rank * self.micro_batch, self.last, stride):
            yield list(range(start, min(start + self.micro_batch, self.last)))


def loader(
    dataset: Dataset[Any],
    sampler: Iterable[list[Any]],
    *,
    workers: int,
    device: torch.device,
    collate: Callable[[list[Any]], Batch] | None = None,
) -> DataLoader[Any]:
    """Micro batches in memory that the device can take them from.

    Args:
        sampler: the samples of each micro batch, by what the dataset knows them by.
        collate: makes one of a list of samples; without it, tensors of samples are stacked.
    """
    return DataLoader(
        dataset,
        batch_sampler=cast(Any, sampler),
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        worker_init_fn=_quiet_worker,
        collate_fn=collate,
        # Without its own it draws a seed for its workers, which need none, from the numbers that
        # dropout draws from: a resume and an evaluation would each move them on.
        generator=torch.Generator(),
    )


def batches(
    dataset: Dataset[Batch], sampler: MicroBatches, *, workers: int, device: torch.device
) -> Iterator[Batch]:
    """Micro batches on the device: tokens, labels, loss_mask, position_ids, each [micro, seq]."""
    for batch in loader(dataset, sampler, workers=workers, device=device):
        # The number of the source that BlendedDataset adds has no sequence dimension to slice.
        yield {
            key: value.to(device, non_blocking=True)
            for key, value in batch.items()
            if key != "dataset_id"
        }


def _quiet_worker(_: int) -> None:
    """Leave the handling of Ctrl-C and SIGTERM to the process that saves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
