"""A checkpoint to a Hugging Face folder, and a sample that shows it speaks."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from tanren import runs
from tanren.config.errors import RequestError
from tanren.config.training import Lora
from tanren.convert import hf, llama, mcore
from tanren.convert import lora as adapters
from tanren.convert.tensors import Cast, Tensors
from tanren.plan.paths import RunFolder
from tanren.plan.plan import ExportPlan, TrainingPlan, TuningPlan, digest, read_plan
from tanren.stages import own_tokenizer, tuning
from tanren.stages.generate import generate

logger = logging.getLogger("tanren")


def run(plan: ExportPlan, attempt: int) -> None:
    """Make `hf/iter_0000500` in the run folder of the exported stage."""
    source, iteration = RunFolder(Path(plan.source)), plan.iteration
    assert iteration is not None
    trained = read_plan(source.plan)
    assert isinstance(trained, TrainingPlan)
    checkpoint = runs.check_checkpoint(source, iteration)
    exported, tokenizer = source.export(iteration), own_tokenizer.of(source)
    logger.info("exporting %s", checkpoint)
    settings = adapters.settings_of(checkpoint)
    dtype = hf.DTYPES[plan.recipe.dtype]
    if settings is not None and plan.recipe.adapters == "peft":
        _write_peft(trained, checkpoint, settings, exported, dtype, tokenizer)
    else:
        with _weights(trained, checkpoint, settings) as tensors:
            _write(trained, tensors, exported, dtype, tokenizer)
    sample, asked = "", plan.recipe.prompt
    if plan.recipe.sample_tokens:
        tuned = isinstance(trained, TuningPlan) and plan.recipe.question != ""
        asked = plan.recipe.question if tuned else plan.recipe.prompt
        sample = generate(exported, asked, plan.recipe.sample_tokens, chat=tuned)
    runs.mark_done(
        plan.folder,
        {
            "identity": digest(plan.settings),
            "iteration": iteration,
            "hf": str(exported),
            "prompt": asked,
            "sample": sample,
        },
    )


@contextmanager
def _weights(trained: TrainingPlan, checkpoint: Path, settings: Lora | None) -> Iterator[Tensors]:
    """A trained model's tensors, its adapters merged into its base's weights."""
    with ExitStack() as stack:
        tensors = stack.enter_context(mcore.open_checkpoint(checkpoint))
        if settings is None:
            yield tensors
        else:
            base = stack.enter_context(_start(trained))
            yield adapters.merged(trained.model, base, tensors, settings)


@contextmanager
def _start(trained: TrainingPlan) -> Iterator[Tensors]:
    """The tensors that a training with adapters began from, and left as they were."""
    kind, _, where = trained.start.partition(":")
    # Iteration 0 is what the run itself made of a Hugging Face folder.
    base = trained.folder.checkpoint(0) if kind == "hf" else Path(where)
    if not base.is_dir():
        raise RequestError(
            base, "is not there any more, and the adapters were trained beside it",
            f"bring it back, or make it again as {trained.folder.plan} says",
        )  # fmt: skip
    with ExitStack() as stack:
        tensors = stack.enter_context(mcore.open_checkpoint(base))
        for below in map(Path, trained.adapters):
            settings = adapters.settings_of(below)
            assert settings is not None, below
            beside = stack.enter_context(mcore.open_checkpoint(below))
            tensors = adapters.merged(trained.model, tensors, beside, settings)
        yield tensors


def _write(
    trained: TrainingPlan, tensors: Tensors, folder: Path, dtype: torch.dtype, tokenizer: Path
) -> None:
    base = Path(hf.locate(trained.hf_source)) if trained.hf_source else None
    end_ids = tuning.end_ids(trained.folder) if isinstance(trained, TuningPlan) else ()
    hf.write_model(
        folder, trained.model, Cast(llama.to_hf(trained.model, tensors, "the checkpoint"), dtype),
        tokenizer=tokenizer, base=base, end_ids=end_ids,
    )  # fmt: skip


def _write_peft(
    trained: TrainingPlan, checkpoint: Path, settings: Lora, folder: Path, dtype: torch.dtype,
    tokenizer: Path,
) -> None:  # fmt: skip
    """Write the adapters as PEFT has them, and beside them, once, the base they belong to."""
    base = trained.folder.hf_base
    if not base.is_dir():
        with _start(trained) as tensors:
            _write(trained, tensors, base, dtype, tokenizer)
    with mcore.open_checkpoint(checkpoint) as tensors:
        adapters.write_peft(
            folder, trained.model, tensors, settings, str(base), tokenizer=tokenizer
        )
