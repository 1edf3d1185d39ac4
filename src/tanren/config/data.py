"""What a recipe says of its data: sources, mixes, conversations."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from tanren.config.fields import (
    SOURCE_NAME,
    HubReference,
    Job,
    NonNegative,
    NonNegativeFloat,
    PositiveFloat,
    Strict,
)


class TokenizerTraining(Strict):
    """A byte-level BPE tokenizer trained on the recipe's own text."""

    vocabulary_size: Annotated[int, Field(ge=300)]


class Tokenizer(Strict):
    """Where the tokenizer comes from: a folder with tokenizer.json, the hub, or training."""

    path: str | None = None
    hf: HubReference | None = None
    train: TokenizerTraining | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> Tokenizer:
        if [self.path, self.hf, self.train].count(None) != 2:
            raise ValueError("state exactly one of path, hf, train")
        return self


class Collection(Strict):
    """A named collection of files, or of what every Python carries, in place of them."""

    name: Annotated[str, Field(pattern=SOURCE_NAME)]
    path: str | None = None
    hf: HubReference | None = None
    files: tuple[str, ...] = ()
    python_documentation: Literal["topics", "docstrings"] | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if [self.path, self.hf, self.python_documentation].count(None) != 2:
            raise ValueError("state exactly one of path, hf, python_documentation")
        if (self.hf is None) == bool(self.files):
            raise ValueError(
                'hf needs files, and files need hf: files: ["data/*.jsonl"] names files of the hub'
            )
        return self


class Source(Collection):
    """A named collection of documents.

    `path` is a file, a glob (`**` goes into folders) or a folder: .jsonl or .json (one object a
    line), also with .gz or .zst, and .parquet, with the text under `text_key`. `hf` is a data set
    of the hub (owner/name@revision), and `files` are globs that say which of its files.
    `python_documentation` is what every Python carries: the language reference behind help()
    (`topics`), or the docstrings of the standard library (`docstrings`).
    """

    text_key: str = "text"


class Preprocess(Strict):
    """Text to tokens: a tokenizer, and Megatron .bin/.idx files, one pair a source.

    Each document gets the end-of-sequence token behind it, and with `prepend_bos` the beginning one
    before it. A line that is no document stops the stage, or is passed over (`on_error: skip`),
    counted and written down in tokens/SOURCE.skipped.jsonl.
    """

    tokenizer: Tokenizer
    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    append_eod: bool = True
    prepend_bos: bool = False
    on_error: Literal["stop", "skip"] = "stop"
    job: Job = Job()

    @model_validator(mode="after")
    def _names_differ(self) -> Preprocess:
        names = [source.name for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two sources are named {name}")
        return self


class Mix(Strict):
    """How much of each source a run reads. Names are those of sources, or globs (`dclm*`).

    `ratios`: a source gives its tokens times its ratio, 1 where nothing names it. `shares`: a
    source, or what a glob names together, gets its share of the run; every source is named. 0
    leaves a source out. No source is read more than `max_epochs` times. `counts` is a table of
    NAME<TAB>TOKENS, from which a plan is made before the data is there.
    """

    ratios: dict[str, NonNegativeFloat] | None = None
    shares: dict[str, NonNegativeFloat] | None = None
    max_epochs: PositiveFloat = 1.0
    counts: str | None = None

    @model_validator(mode="after")
    def _one_rule(self) -> Mix:
        if self.shares is None:
            return self
        if self.ratios is not None:
            raise ValueError("state only one of ratios, shares")
        total = math.fsum(self.shares.values())
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the shares add up to {total:.7g}, not to 1")
        return self


class ChatSet(Collection):
    """A set of conversations (sft) or of preferences (dpo): one a line.

    `path` is a file, a glob (`**` goes into folders) or a folder: .jsonl or .json (one object a
    line), also with .gz or .zst, and .parquet. `hf` is a data set of the hub
    (owner/name@revision), and `files` are globs that say which of its files.
    `python_documentation: docstrings` are questions about the standard library that every Python
    carries.

    Of at most `max_samples` conversations, drawn by the seed, some are held out (`split_dev`). The
    others are read `upsampling` times an epoch.
    """

    python_documentation: Literal["docstrings"] | None = None
    max_samples: NonNegative | None = None
    split_dev: bool = True
    upsampling: Annotated[float, Field(ge=1)] = 1.0
