"""A Hugging Face base to a megatron-core checkpoint, on a CPU, without building the model."""

from __future__ import annotations

import logging
from pathlib import Path

from tanren import runs
from tanren.config.errors import RequestError
from tanren.config.model import Model
from tanren.convert import audit, hf, llama, llama_config, mcore
from tanren.data import tokenizer as tokenizers
from tanren.plan.checks import check_vocabulary
from tanren.plan.plan import ConvertPlan, digest

logger = logging.getLogger("tanren")


def run(plan: ConvertPlan, attempt: int) -> None:
    """Make `checkpoints/iter_0000000`, and before it the base itself where the recipe draws it."""
    folder, model = plan.folder, plan.model
    if plan.recipe.source == "random":
        assert plan.tokenizer is not None
        base = folder.hf_base
        size = tokenizers.read(Path(plan.tokenizer)).size
        check_vocabulary(plan.recipe_file, model, size, plan.tokenizer)
        logger.info("drawing a base of %.1f M parameters", model.parameters / 1e6)
        hf.write_random(base, model, Path(plan.tokenizer), plan.recipe.seed)
    else:
        base = hf.locate(plan.recipe.source.removeprefix("hf:"))
    check_tokenizers(base, plan.tokenizer, plan.recipe_file)
    logger.info("converting %s", base)
    convert_base(base, model, folder.checkpoint(0), plan.recipe_file)
    runs.write_atomic(folder.latest, b"0")
    runs.mark_done(
        folder,
        {
            "identity": digest(
                [plan.settings, runs.read_json(folder.checkpoint(0) / "files.json")]
            ),
            "iteration": 0,
            "hf": str(base),
            "model": model.model_dump(mode="json"),
        },
    )


def convert_base(base: Path, model: Model, checkpoint: Path, recipe_file: str) -> None:
    """Check a Hugging Face folder against the recipe's shape and write it as a checkpoint."""
    config = base / "config.json"
    there = llama_config.model_of(hf.read_config(base), config)
    llama_config.check_same_shape(model, there, f"{recipe_file}: model", base)
    with hf.open_model(base) as tensors:
        audit.check_base(base, tensors, model)
        mcore.write_base(model, llama.to_mcore(model, tensors, base), checkpoint, place=base)


def check_tokenizers(
    base: Path, tokenizer: str | None, recipe_file: str,
    next_step: str = "preprocess the data with the base's tokenizer",
) -> None:  # fmt: skip
    """Refuse data whose tokenizer is not the base's."""
    if tokenizer is None or not tokenizers.is_there(base):
        return
    there, here = tokenizers.read(base), tokenizers.read(Path(tokenizer))
    if not there.agrees_with(here):
        raise RequestError(
            f"{recipe_file}: tokenizer",
            f"{tokenizer} ({here.size} pieces) is not the tokenizer of the base {base} "
            f"({there.size} pieces)",
            next_step,
        )
