"""Units to shards: one worker turns one unit of a source into a pair of token files.

A shard is known by its content: the unit's bytes, the tokenizer and the settings. So whoever asks
for the same again, after an interruption or on another node, finds it made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import orjson

from tanren import runs
from tanren.config.errors import RequestError
from tanren.data import indexed
from tanren.data.documents import Unit, content, documents
from tanren.data.tokenizer import Tokenizer

# Text that is given to a tokenizer at once: enough that the call does not count, little to hold.
_BATCH_CHARACTERS = 1 << 20
# Changes when the same unit and settings begin to give other tokens.
_FORMAT = 1


@dataclass(frozen=True)
class Settings:
    """What is done with every document."""

    append_eod: bool = True
    prepend_bos: bool = False
    on_error: Literal["stop", "skip"] = "stop"


@dataclass(frozen=True)
class Shard:
    """A pair of token files in the shards' folder, and what was seen on the way."""

    key: str
    documents: int
    tokens: int
    empty: int
    skipped: int


class Maker:
    """Makes shards in a folder, one at a time; every worker has its own."""

    def __init__(self, tokenizer: Tokenizer, settings: Settings, folder: Path) -> None:
        self.tokenizer, self.settings, self.folder = tokenizer, settings, folder
        self._problems: list[RequestError] = []
        self._empty = 0

    def __call__(self, unit: Unit) -> Shard:
        """The shard of a unit, made now or before.

        Raises:
            RequestError: a line is no document, and the settings do not say to pass over it.
        """
        key = self._key(unit)
        found = read(self.folder, key)
        return found or self._make(unit, key)

    def _key(self, unit: Unit) -> str:
        facts = [self._identity(unit), content(unit)]
        return hashlib.sha256(orjson.dumps(facts)).hexdigest()[:32]

    def _identity(self, unit: Unit) -> list[object]:
        key = None if unit.path is None else unit.source.text_key
        return [_FORMAT, self.tokenizer.digest, asdict(self.settings), key]

    def _make(self, unit: Unit, key: str) -> Shard:
        self._problems, self._empty = [], 0
        # Two nodes may be given the same text: each writes under a name of its own.
        prefix = self.folder / f"{key}.{runs.unique()}"
        writer = indexed.Writer(prefix, self.tokenizer.size)
        for texts in self._batches(unit):
            self._write(writer, texts)
        counts = writer.close()
        shard = Shard(key, counts.documents, counts.tokens, self._empty, len(self._problems))
        for suffix in ("bin", "idx"):
            (self.folder / f"{prefix.name}.{suffix}").replace(self.folder / f"{key}.{suffix}")
        if self._problems:
            lines = (
                orjson.dumps({"place": problem.place, "problem": problem.problem})
                for problem in self._problems
            )
            runs.write_atomic(skipped_path(self.folder, key), b"\n".join(lines) + b"\n")
        # Last: a shard without it is not whole.
        runs.write_json(_facts_path(self.folder, key), asdict(shard))
        return shard

    def _problem(self, error: RequestError) -> None:
        if self.settings.on_error == "stop":
            raise error
        self._problems.append(error)

    def _batches(self, unit: Unit) -> Iterator[list[str]]:
        batch: list[str] = []
        held = 0
        for text in documents(unit, self._problem):
            if not text:
                self._empty += 1
                continue
            batch.append(text)
            held += len(text)
            if held >= _BATCH_CHARACTERS:
                yield batch
                batch, held = [], 0
        if batch:
            yield batch

    def _write(self, writer: indexed.Writer, texts: list[str]) -> None:
        found = [ids for ids in self.tokenizer.encode(texts) if len(ids)]
        self._empty += len(texts) - len(found)
        bos = self.tokenizer.bos if self.settings.prepend_bos else None
        head = [np.array([bos], dtype=np.int32)] if bos is not None else []
        tail = [np.array([self.tokenizer.eod], np.int32)] if self.settings.append_eod else []
        around = len(head) + len(tail)
        # Joined once, not once a document: that costs as much as a tenth of the tokenizing.
        pieces = [piece for ids in found for piece in (*head, ids, *tail)] if around else found
        writer.add(pieces, [len(ids) + around for ids in found])


def read(folder: Path, key: str) -> Shard | None:
    """A shard that is there and whole."""
    value = runs.read_json(_facts_path(folder, key))
    if value is None:
        return None
    try:
        shard = Shard(**value)
        counts = indexed.check(folder / key)
    except (TypeError, RequestError):
        return None
    return shard if counts == indexed.Counts(shard.documents, shard.tokens) else None


def _facts_path(folder: Path, key: str) -> Path:
    return folder / f"{key}.json"


def skipped_path(folder: Path, key: str) -> Path:
    """The lines that a shard passed over, as JSON lines; absent where there are none."""
    return folder / f"{key}.skipped.jsonl"
