"""Token files to batches: megatron-core's GPTDataset over a weighted mix, read once in order."""

from __future__ import annotations

import logging
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from torch.utils.data import DataLoader, Dataset, Sampler

from tanren.plan.mix import SourceShare

Batch = dict[str, torch.Tensor]


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
    complete, rank = cache / "COMPLETE", torch.distributed.get_rank()
    wanted = repr((blend, data, split, sequence_length, sizes, seed))
    if rank == 0 and not (complete.exists() and complete.read_text() == wanted):
        # What an interrupted first start left: megatron takes any file that is there for whole.
        shutil.rmtree(cache, ignore_errors=True)
        cache.mkdir(parents=True)
    torch.distributed.barrier()
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
    built = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()
    torch.distributed.barrier()
    if rank == 0:
        complete.write_text(wanted)
    return Blend(built[0], built[1] if held_out_samples else None)


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


def batches(
    dataset: Dataset[Batch], sampler: MicroBatches, *, workers: int, device: torch.device
) -> Iterator[Batch]:
    """Micro batches on the device: tokens, labels, loss_mask, position_ids, each [micro, seq]."""
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        worker_init_fn=_quiet_worker,
    )
    for batch in loader:
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
