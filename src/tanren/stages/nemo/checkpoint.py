"""Checkpoints of NeMo 2 in a run folder: weights/ and context/, published whole as others are."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import nemo.lightning as nl
import torch.distributed as dist
from nemo.collections import llm
from nemo.lightning.io.pl import TrainerContext

from tanren.config.errors import WorkError
from tanren.engine import writer
from tanren.plan.plan import TuningPlan
from tanren.stages.nemo.model import plain_config


class Checkpoints:
    """Writes the checkpoints of a run, each before training goes on."""

    def __init__(self, plan: TuningPlan) -> None:
        self.plan = plan

    def save(self, trainer: nl.Trainer, iteration: int) -> dict[str, float]:
        """Write one; every rank calls this.

        Returns:
            what metrics.jsonl says of it.
        Raises:
            WorkError: the disk does not take it.
        """
        folder, settings = self.plan.folder, self.plan.recipe.checkpoints
        partial = writer.partial_of(folder.checkpoint(iteration))
        began = time.perf_counter()
        order = writer.Publish(folder.root, iteration, (), settings.keep_last, settings.keep_every)
        size = 0.0
        try:
            if dist.get_rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            dist.barrier()
            trainer.save_checkpoint(str(partial))
            if dist.get_rank() == 0:
                write_context(partial / "context", self.plan)
                size = writer.settle(order).size / 2**30
        except (OSError, RuntimeError) as error:
            raise WorkError(
                partial,
                f"cannot be saved: {writer.reason(error)}",
                "make room and run the same command again: it goes on from the last checkpoint",
            ) from error
        dist.barrier()
        seconds = time.perf_counter() - began
        return {
            "save_blocked_seconds": round(seconds, 3),
            "save_seconds": round(seconds, 3),
            "save_gib": round(size, 3),
            "save_gib_per_second": round(size / seconds, 3),
        }


def write_context(folder: Path, plan: TuningPlan) -> None:
    """What NeMo makes the model from: its own classes alone, so that it needs no tanren."""
    model = llm.LlamaModel(plain_config(plan.model), tokenizer=_tokenizer(plan.folder.tokenizer))
    trainer = nl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        strategy=nl.MegatronStrategy(ckpt_async_save=False),
    )  # fmt: skip
    TrainerContext(model=model, trainer=trainer, extra={}).io_dump(folder, yaml_attrs=["model"])


def _tokenizer(folder: Path) -> Any:
    from nemo.collections.common.tokenizers.huggingface import AutoTokenizer

    return AutoTokenizer(str(folder))
