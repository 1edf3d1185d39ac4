"""Tokenizers: Hugging Face's fast ones, SentencePiece models, or a small byte-level BPE trained.

Reads with the tokenizers and sentencepiece libraries alone: transformers takes seconds to import,
and only the export needs it.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import orjson
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from tanren.config.errors import RequestError
from tanren.data.hub import TOKENIZER_FILES

BOS, EOS = "<s>", "</s>"
Ids = npt.NDArray[np.int32]
# Text on which two kinds of the same tokenizer are held against each other.
_PROBES = (
    "The smith folds the steel 12 times,\n\tagain  and again.",
    "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。",
    "def f(x):\n    return x ** 2  # 二乗 😀 \u0627\u0644\u062e\u0637",
)


class _Backend(Protocol):
    def encode(self, texts: list[str]) -> list[Ids]: ...

    def decode(self, ids: Ids) -> str: ...

    def pieces(self) -> dict[str, int]: ...


class _Fast:
    """tokenizer.json. The text of a special token in a document stays text."""

    def __init__(self, path: Path) -> None:
        try:
            self.backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise RequestError(
                path, f"is not a tokenizer: {error}", "fetch the tokenizer again"
            ) from None
        self.backend.encode_special_tokens = True
        self.backend.no_truncation()
        self.backend.no_padding()

    def encode(self, texts: list[str]) -> list[Ids]:
        encoded = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(one.ids, dtype=np.int32) for one in encoded]

    def decode(self, ids: Ids) -> str:
        return str(self.backend.decode(ids.tolist(), skip_special_tokens=False))

    def pieces(self) -> dict[str, int]:
        return dict(self.backend.get_vocab(with_added_tokens=True))


class _SentencePiece:
    """A SentencePiece model. User-defined pieces in a document become their ids, as in Megatron."""

    def __init__(self, path: Path) -> None:
        import sentencepiece

        self.backend = sentencepiece.SentencePieceProcessor()
        try:
            self.backend.LoadFromSerializedProto(path.read_bytes())
        except (RuntimeError, OSError) as error:
            raise RequestError(
                path, f"is not a SentencePiece model: {error}", "fetch the tokenizer again"
            ) from None

    def encode(self, texts: list[str]) -> list[Ids]:
        return list(self.backend.encode(texts, num_threads=1, return_type="numpy"))

    def decode(self, ids: Ids) -> str:
        return str(self.backend.decode(ids.tolist()))

    def pieces(self) -> dict[str, int]:
        backend = self.backend
        return {backend.id_to_piece(number): number for number in range(backend.get_piece_size())}


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer with the ids that training needs.

    `size` counts added tokens too: every id is below it. `digest` changes with anything that could
    change the ids of a text.
    """

    backend: _Backend
    folder: Path
    size: int
    bos: int | None
    eod: int
    digest: str

    def encode(self, texts: list[str]) -> list[Ids]:
        """Token ids of each text, with no special token added."""
        return self.backend.encode(texts)

    def agrees_with(self, other: Tokenizer) -> bool:
        """Whether both give every text the same ids.

        Of one kind they must have the same pieces; a fast tokenizer and the SentencePiece model
        that it was made from may name special pieces differently, so these are tried on text.
        """
        if type(self.backend) is type(other.backend):
            return self.backend.pieces() == other.backend.pieces()
        ours, theirs = self.encode(list(_PROBES)), other.encode(list(_PROBES))
        return all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


def is_there(folder: Path) -> bool:
    """Whether a folder holds a tokenizer that can be read here."""
    return (folder / "tokenizer.json").is_file() or any(folder.glob("*.model"))


def read(path: Path) -> Tokenizer:
    """Read a Hugging Face folder (tokenizer.json, else its SentencePiece model), or a .model file.

    Raises:
        RequestError: there is none or more than one, or no end-of-sequence token is named.
    """
    if path.suffix == ".model":
        return _read_sentencepiece(path)
    if (path / "tokenizer.json").is_file():
        return _read_fast(path)
    found = sorted(path.glob("*.model"))
    if len(found) != 1:
        raise RequestError(
            path,
            f"has no tokenizer.json and {len(found) or 'no'} SentencePiece models",
            "name a folder with a Hugging Face tokenizer, or the .model file itself",
        )
    return _read_sentencepiece(found[0])


def largest_id(path: Path) -> int:
    """The largest id that a text can get, whether or not special tokens are named; see `read`."""
    fast = path / "tokenizer.json"
    if fast.is_file():
        return max(_Fast(fast).pieces().values())
    model = path if path.suffix == ".model" else min(path.glob("*.model"))
    return max(_SentencePiece(model).pieces().values())


def _read_sentencepiece(path: Path) -> Tokenizer:
    if not path.is_file():
        raise RequestError(path, "there is no such file", "check the tokenizer's path")
    backend = _SentencePiece(path)
    bos, eos = backend.backend.bos_id(), backend.backend.eos_id()
    if eos < 0:
        raise RequestError(
            path, "has no end-of-sequence piece", "use a model that has one: documents end with it"
        )
    return Tokenizer(
        backend=backend,
        folder=path.parent,
        size=backend.backend.get_piece_size(),
        bos=bos if bos >= 0 else None,
        eod=eos,
        digest=hashlib.sha256(path.read_bytes()).hexdigest(),
    )


def _read_fast(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    fast = _Fast(path)
    config = _special_tokens(folder)
    eos = config.get("eos_token")
    eod = fast.backend.token_to_id(eos) if eos is not None else None
    if eod is None:
        raise RequestError(
            folder / "tokenizer_config.json",
            f"the end-of-sequence token {eos!r} is not in the vocabulary",
            "set eos_token: documents are ended with it",
        )
    bos = config.get("bos_token")
    bos_id = fast.backend.token_to_id(bos) if bos else None
    return Tokenizer(
        backend=fast,
        folder=folder,
        size=max(fast.pieces().values()) + 1,
        bos=bos_id,
        eod=eod,
        digest=hashlib.sha256(path.read_bytes() + f"{bos_id} {eod}".encode()).hexdigest(),
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
            raise RequestError(path, f"is not JSON: {error}", "fetch the tokenizer again") from None
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
    """Copy a tokenizer's files: those of a Hugging Face folder, or one SentencePiece model."""
    destination.mkdir(parents=True, exist_ok=True)
    folder, patterns = (
        (source.parent, (source.name,)) if source.is_file() else (source, TOKENIZER_FILES)
    )
    for pattern in patterns:
        for path in folder.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, destination / path.name)
