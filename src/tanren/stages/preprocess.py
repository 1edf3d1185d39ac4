"""Text to tokens: documents → tokenizer → Megatron .bin/.idx."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from tanren import runs
from tanren.config.data import Preprocess, Source
from tanren.config.errors import RequestError
from tanren.data import hub, tokenize
from tanren.data import tokenizer as tokenizers
from tanren.data.documents import documents, units
from tanren.data.shards import Settings
from tanren.data.tokenize import Job, Progress
from tanren.plan.paths import RunFolder
from tanren.plan.plan import PreprocessPlan, digest

logger = logging.getLogger("tanren")


def run(plan: PreprocessPlan, attempt: int) -> None:
    """Make the run folder's `tokenizer/` and `tokens/`; for a part its share of the shards."""
    recipe, folder = plan.recipe, plan.folder
    shutil.rmtree(folder.tokens, ignore_errors=True)
    tokenizer = _tokenizer(recipe, folder)
    if recipe.prepend_bos and tokenizer.bos is None:
        raise RequestError(
            f"{plan.recipe_file}: prepend_bos",
            f"the tokenizer {tokenizer.folder} names no bos_token",
            "prepend_bos: false, or a tokenizer whose tokenizer_config.json names it",
        )
    job = Job(
        sources=recipe.sources,
        prefixes=tuple(folder.tokens_of(source.name) for source in recipe.sources),
        tokenizer=folder.tokenizer,
        settings=Settings(recipe.append_eod, recipe.prepend_bos, recipe.on_error),
        shards=folder.shards,
        workers=tokenize.cores(),
    )

    def watch(progress: Progress) -> None:
        runs.append_line(folder.metrics, asdict(progress))

    began = time.monotonic()
    if plan.part is not None:
        shards = tokenize.run_part(job, plan.part.number - 1, plan.part.of, watch)
        seconds = time.monotonic() - began
        logger.info("%d shards in %.1f s by %d workers", shards, seconds, job.workers)
        runs.mark_done(folder, {"shards": shards, "seconds": round(seconds, 2)})
        return
    made = tokenize.run(job, watch)
    tokens, seconds = sum(source.tokens for source in made), time.monotonic() - began
    logger.info("%d tokens in %.1f s by %d workers", tokens, seconds, job.workers)
    runs.mark_done(
        folder,
        {
            "identity": digest([plan.settings, [source.digest for source in made]]),
            "sources": [asdict(source) for source in made],
            "tokens": tokens,
            "vocabulary_size": tokenizer.size,
            "eod": tokenizer.eod,
            "bos": tokenizer.bos,
            "seconds": round(seconds, 2),
        },
    )


def _tokenizer(recipe: Preprocess, folder: RunFolder) -> tokenizers.Tokenizer:
    """The tokenizer, with its files in the run folder: later stages take it from there."""
    shutil.rmtree(folder.tokenizer, ignore_errors=True)
    if recipe.tokenizer.train is not None:
        size = recipe.tokenizer.train.vocabulary_size
        logger.info("training a tokenizer of %d pieces", size)
        texts = (text for source in recipe.sources for text in _texts(source, recipe.on_error))
        return tokenizers.train(texts, size, folder.tokenizer)
    original = _original_tokenizer(recipe)
    tokenizers.read(original)
    tokenizers.copy(original, folder.tokenizer)
    return tokenizers.read(folder.tokenizer)


def _original_tokenizer(recipe: Preprocess) -> Path:
    if recipe.tokenizer.path is not None:
        return Path(recipe.tokenizer.path)
    assert recipe.tokenizer.hf is not None
    return hub.find(hub.tokenizer_of(recipe.tokenizer.hf)).folder


def _texts(source: Source, on_error: str) -> Iterator[str]:
    def problem(error: RequestError) -> None:
        if on_error == "stop":
            raise error

    empty = True
    for unit in units(source):
        for text in documents(unit, problem):
            if text:
                empty = False
                yield text
    if empty:
        raise tokenize.no_text(source)
