"""Text to tokens: documents → tokenizer → Megatron .bin/.idx."""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tanren import runs
from tanren.config.errors import RequestError
from tanren.config.schema import Preprocess, Source
from tanren.data import indexed
from tanren.data import tokenizer as tokenizers
from tanren.data.documents import documents
from tanren.plan.paths import RunFolder
from tanren.plan.plan import PreprocessPlan, digest

logger = logging.getLogger("tanren")
_BATCH = 256


def run(plan: PreprocessPlan, attempt: int) -> None:
    """Make the run folder's `tokenizer/` and `tokens/`."""
    recipe, folder = plan.recipe, plan.folder
    for made in (folder.tokens, folder.tokenizer):
        shutil.rmtree(made, ignore_errors=True)
    folder.tokens.mkdir(parents=True)
    tokenizer = _tokenizer(recipe, folder)
    if recipe.prepend_bos and tokenizer.bos is None:
        raise RequestError(
            f"{plan.recipe_file}: prepend_bos",
            f"the tokenizer {tokenizer.folder} names no bos_token",
        )
    began = time.monotonic()
    sources = []
    for number, source in enumerate(recipe.sources):
        runs.append_line(
            folder.metrics, {"doing": source.name, "done": number, "total": len(recipe.sources)}
        )
        sources.append(_tokenize(source, recipe, tokenizer, folder))
    tokens = sum(source["tokens"] for source in sources)
    seconds = time.monotonic() - began
    logger.info("%d tokens in %.1f s", tokens, seconds)
    runs.mark_done(
        folder,
        {
            "identity": digest([plan.settings, [source["sha256"] for source in sources]]),
            "sources": sources,
            "tokens": tokens,
            "vocabulary_size": tokenizer.size,
            "eod": tokenizer.eod,
            "bos": tokenizer.bos,
            "seconds": round(seconds, 2),
        },
    )


def _tokenizer(recipe: Preprocess, folder: RunFolder) -> tokenizers.Tokenizer:
    """The tokenizer, with its files in the run folder: later stages take it from there."""
    if recipe.tokenizer.train is not None:
        size = recipe.tokenizer.train.vocabulary_size
        logger.info("training a tokenizer of %d pieces", size)
        texts = (text for source in recipe.sources for text in documents(source))
        return tokenizers.train(texts, size, folder.tokenizer)
    assert recipe.tokenizer.path is not None
    original = Path(recipe.tokenizer.path)
    tokenizers.read(original)
    tokenizers.copy(original, folder.tokenizer)
    return tokenizers.read(folder.tokenizer)


def _tokenize(
    source: Source,
    recipe: Preprocess,
    tokenizer: tokenizers.Tokenizer,
    folder: RunFolder,
) -> dict[str, Any]:
    prefix = folder.tokens_of(source.name)
    counts = indexed.write(prefix, _ids(source, recipe, tokenizer), tokenizer.size)
    logger.info("%s: %d documents, %d tokens", source.name, counts.documents, counts.tokens)
    return {
        "name": source.name,
        "documents": counts.documents,
        "tokens": counts.tokens,
        "sha256": _sha256(indexed.bin_path(prefix)),
    }


def _ids(
    source: Source, recipe: Preprocess, tokenizer: tokenizers.Tokenizer
) -> Iterator[list[int]]:
    head = [tokenizer.bos] if recipe.prepend_bos and tokenizer.bos is not None else []
    tail = [tokenizer.eod] if recipe.append_eod else []
    for texts in _batched(documents(source)):
        for ids in tokenizer.encode(texts):
            if ids:
                yield head + ids + tail


def _batched(texts: Iterator[str]) -> Iterator[list[str]]:
    batch = []
    for text in texts:
        batch.append(text)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _sha256(path: Path) -> str:
    result = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            result.update(block)
    return result.hexdigest()
