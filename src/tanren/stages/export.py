"""A checkpoint to a Hugging Face folder, and a sample that shows it speaks."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from tanren import runs
from tanren.config.schema import Model
from tanren.convert import hf, llama, mcore
from tanren.plan.paths import RunFolder
from tanren.plan.plan import ExportPlan, MidtrainPlan, digest, read_plan

logger = logging.getLogger("tanren")


def run(plan: ExportPlan, attempt: int) -> None:
    """Make `hf/iter_0000500` in the run folder of the exported stage."""
    source, iteration = RunFolder(Path(plan.source)), plan.iteration
    assert iteration is not None
    trained = read_plan(source.plan)
    assert isinstance(trained, MidtrainPlan)
    checkpoint = runs.check_checkpoint(source, iteration)
    exported = source.export(iteration)
    base = Path(hf.locate(trained.hf_source)) if trained.hf_source else None
    logger.info("exporting %s", checkpoint)
    export(checkpoint, trained.model, exported, dtype=hf.DTYPES[plan.recipe.dtype],
           tokenizer=RunFolder(Path(trained.data)).tokenizer, base=base)  # fmt: skip
    sample = ""
    if plan.recipe.sample_tokens:
        sample = generate(exported, plan.recipe.prompt, plan.recipe.sample_tokens)
    runs.mark_done(
        plan.folder,
        {
            "identity": digest(plan.settings),
            "iteration": iteration,
            "hf": str(exported),
            "prompt": plan.recipe.prompt,
            "sample": sample,
        },
    )


def export(
    checkpoint: Path,
    model: Model,
    folder: Path,
    *,
    dtype: torch.dtype,
    tokenizer: Path | None,
    base: Path | None,
) -> None:
    """Write a Hugging Face folder from a checkpoint; it appears when it is whole."""
    with hf.whole_folder(folder) as partial, mcore.reader(checkpoint) as read:
        hf.write_tensors(partial, ((name, t.to(dtype)) for name, t in llama.to_hf(model, read)))
        hf.write_settings(partial, model, dtype, tokenizer, base)


def generate(folder: Path, prompt: str, tokens: int) -> str:
    """The model's own continuation of a prompt, by transformers; the same at every call."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    transformers.set_seed(0)
    with torch.no_grad():
        result = model.generate(
            ids, max_new_tokens=tokens, do_sample=True, temperature=0.7, top_p=0.9,
            attention_mask=torch.ones_like(ids), pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
    return str(tokenizer.decode(result[0], skip_special_tokens=True))
