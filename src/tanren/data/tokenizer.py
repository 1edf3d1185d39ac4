"""Tokenizers: read a Hugging Face folder, or train a small byte-level BPE.

Reads and writes tokenizer.json with the tokenizers library alone: transformers takes seconds to
import, and only the export needs it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from tanren.config.errors import RequestError

BOS, EOS = "<s>", "</s>"
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer with the ids that training needs.

    `size` counts added tokens too: every id is below it.
    """

    backend: tokenizers.Tokenizer
    folder: Path
    size: int
    bos: int | None
    eod: int

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, with no special token added."""
        return [e.ids for e in self.backend.encode_batch(texts, add_special_tokens=False)]


def read(folder: Path) -> Tokenizer:
    """Read a folder with tokenizer.json and tokenizer_config.json.

    Raises:
        RequestError: a file is missing, or no end-of-sequence token is named.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise RequestError(
            folder, "has no tokenizer.json", "name a folder with a Hugging Face fast tokenizer"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise RequestError(path, f"is not a tokenizer: {error}") from None
    config = _special_tokens(folder)
    eos = config.get("eos_token")
    eod = backend.token_to_id(eos) if eos is not None else None
    if eod is None:
        raise RequestError(
            folder / "tokenizer_config.json",
            f"the end-of-sequence token {eos!r} is not in the vocabulary",
            "set eos_token: documents are ended with it",
        )
    bos = config.get("bos_token")
    return Tokenizer(
        backend=backend,
        folder=folder,
        size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
        bos=backend.token_to_id(bos) if bos else None,
        eod=eod,
    )


def _special_tokens(folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            values: dict[str, Any] = orjson.loads(path.read_bytes())
        except orjson.JSONDecodeError as error:
            raise RequestError(path, f"is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise RequestError(path, "is not a JSON object", "fetch the tokenizer again")
        for key in ("bos_token", "eos_token"):
            value = values.get(key)
            if isinstance(value, dict):
                value = value.get("content")
            if isinstance(value, str):
                found[key] = value
    return found


def train(texts: Iterable[str], vocabulary_size: int, folder: Path) -> Tokenizer:
    """Train a byte-level BPE (any text is covered, no unknown token) and write its folder.

    Raises:
        RequestError: the text is too small for that many pieces.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    size = backend.get_vocab_size()
    if size < vocabulary_size:
        raise RequestError(
            "tokenizer.train.vocabulary_size",
            f"{vocabulary_size} pieces cannot be learned from this text, only {size}",
            f"use {size} or fewer, or more text",
        )
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_bytes(orjson.dumps(config, option=orjson.OPT_INDENT_2))
    return read(folder)


def copy(source: Path, destination: Path) -> None:
    """Copy a tokenizer's files from one Hugging Face folder to another."""
    destination.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, destination / name)
