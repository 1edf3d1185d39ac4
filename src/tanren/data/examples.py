"""The token cache: a set's conversations or preferences as tokens, made once and memory-mapped.

    CACHE/0123456789abcdef.../    named by the content of the files, the tokenizer and the kind
        facts.json                the counts, the end tokens, each file's size
        tokens.bin trained.bin    int32 and bool [tokens], the examples one after the other
        examples.bin              int64 [examples + 1]: where each example begins, and the end
        counts.bin                int32 [examples]: how many tokens of each are trained
        samples.bin               int64 [samples + 1]: the same of samples, in examples
        places.bin                int64 [samples, 2]: the file and the row of each sample
        rewards.bin               float32 [samples, 2]: of the chosen and the rejected answer (dpo)

A sample is a line: of sft a conversation, which is one example or more, of dpo a pair of examples,
the chosen answer's first. What a run makes of a set (how many, how long) is not in it.
"""

from __future__ import annotations

import hashlib
import logging
import socket
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tanren import runs
from tanren.config.data import ChatSet
from tanren.config.errors import RequestError, WorkError
from tanren.data import conversations, template
from tanren.data.chat import Chat, Example
from tanren.data.conversations import Kind

logger = logging.getLogger("tanren")
# Changes when the same lines begin to give other tokens.
_FORMAT = 1
_FACTS = "facts.json"
# Conversations that are tokenized at once: enough for all cores, little to hold.
_BATCH = 1024
# A wait or a piece of work that is shorter than this needs no word.
_QUIET_SECONDS = 5.0
_WORD_SECONDS = 60.0
_TYPES = {
    "tokens": np.dtype("<i4"), "trained": np.dtype("?"), "examples": np.dtype("<i8"),
    "counts": np.dtype("<i4"), "samples": np.dtype("<i8"), "places": np.dtype("<i8"),
    "rewards": np.dtype("<f4"),
}  # fmt: skip


@dataclass(frozen=True)
class Tokenized:
    """A set's tokens, memory-mapped. Samples and examples are counted from 0."""

    chat_set: ChatSet
    kind: Kind
    folder: Path
    files: list[Path]
    end_ids: tuple[int, ...]
    tokens: npt.NDArray[np.int32]
    trained: npt.NDArray[np.bool_]
    examples: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int32]
    samples: npt.NDArray[np.int64]
    places: npt.NDArray[np.int64]
    rewards: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.samples) - 1

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each example."""
        return np.diff(self.examples)

    def examples_of(self, sample: int) -> list[Example]:
        """The examples of a sample, as views of what is on disk."""
        return [self.example(n) for n in range(self.samples[sample], self.samples[sample + 1])]

    def example(self, number: int) -> Example:
        """One example by its number."""
        part = slice(self.examples[number], self.examples[number + 1])
        return Example(self.tokens[part], self.trained[part])

    def place(self, sample: int) -> str:
        """The line that a sample is from."""
        file, row = (int(number) for number in self.places[sample])
        return conversations.place(self.chat_set, self.files, file, row)


def make(chat_set: ChatSet, kind: Kind, tokenizer: Path, chat: Callable[[], Chat],
         cache: Path) -> Path:  # fmt: skip
    """Tokenize a set, or find that it was done; one process of a run calls this.

    Args:
        tokenizer: the folder that `template.prepare` made.
        chat: gives its Chat, when something is to be tokenized.
        cache: the folder of all token caches; others may be at work there.
    Returns:
        the folder of the set's tokens, for `read`.
    Raises:
        RequestError: a file is not there, or a line is no conversation (or preference).
    """
    folder = cache / _key(chat_set, kind, tokenizer)
    if _whole(folder) is not None:
        return folder
    lock = cache / f".{folder.name}.lock"
    if runs.is_locked(lock):
        logger.info("%s: waiting for another process, which tokenizes it", chat_set.name)
    with runs.locked(lock, wait_seconds=float("inf")):
        # Another may have made it while this one waited.
        if _whole(folder) is None:
            with runs.whole_folder(folder) as partial:
                _write(partial, chat_set, kind, chat())
    return folder


def read(folder: Path, chat_set: ChatSet, kind: Kind, wait_seconds: float = 300.0) -> Tokenized:
    """Open what `make` made; every process of a run calls this.

    Raises:
        WorkError: it is not whole on this node, however long one waits.
    """
    began, said = time.monotonic(), False
    while (facts := _whole(folder)) is None:
        waited = time.monotonic() - began
        if waited > wait_seconds:
            raise WorkError(
                folder,
                f"is not whole on {socket.gethostname()} {waited:.0f} s after it was made",
                "RUNS= on a disk that all nodes share",
            )
        if waited > _QUIET_SECONDS and not said:
            logger.warning("waiting to see %s on %s", folder, socket.gethostname())
            said = True
        time.sleep(0.1)
    arrays = {name: _map(folder, name) for name in _TYPES}
    return Tokenized(
        chat_set=chat_set, kind=kind, folder=folder, files=conversations.files_of_set(chat_set),
        end_ids=tuple(facts["end_ids"]), tokens=arrays["tokens"], trained=arrays["trained"],
        examples=arrays["examples"], counts=arrays["counts"], samples=arrays["samples"],
        places=arrays["places"].reshape(-1, 2), rewards=arrays["rewards"].reshape(-1, 2),
    )  # fmt: skip


def _key(chat_set: ChatSet, kind: Kind, tokenizer: Path) -> str:
    """What a set's tokens are known by."""
    result = hashlib.sha256(f"{_FORMAT} {kind} {template.digest(tokenizer)}\n".encode())
    for digest in conversations.content(chat_set, kind):
        result.update(f"{digest}\n".encode())
    return result.hexdigest()[:32]


def _whole(folder: Path) -> dict[str, Any] | None:
    """The facts of a cache that is there, each of its files seen in its whole size."""
    facts: dict[str, Any] | None = runs.read_json(folder / _FACTS)
    if facts is None:
        return None
    paths = {folder / name: size for name, size in facts["files"].items()}
    seen = all(path.exists() and path.stat().st_size == size for path, size in paths.items())
    return facts if seen else None


def _map(folder: Path, name: str) -> Any:
    path = folder / f"{name}.bin"
    if not path.stat().st_size:  # rewards of sft
        return np.empty(0, dtype=_TYPES[name])
    return np.memmap(path, dtype=_TYPES[name], mode="r")


def _write(folder: Path, chat_set: ChatSet, kind: Kind, chat: Chat) -> None:
    began = said = time.monotonic()
    examples, samples, counts = array("q", [0]), array("q", [0]), array("i")
    places, rewards = array("q"), array("f")
    end_ids: set[int] = set()
    with ExitStack() as stack:
        tokens, trained = (
            stack.enter_context((folder / f"{name}.bin").open("wb"))
            for name in ("tokens", "trained")
        )
        read = conversations.read(chat_set, kind)
        for lines, made in _batches(read, kind, chat):
            for line, mine in zip(lines, made, strict=True):
                for example in mine:
                    tokens.write(example.tokens.astype("<i4", copy=False).tobytes())
                    trained.write(example.trained.tobytes())
                    examples.append(examples[-1] + len(example.tokens))
                    counts.append(int(example.trained.sum()))
                    end_ids |= example.end_ids
                samples.append(len(examples) - 1)
                places.extend((line.file, line.row))
                rewards.extend(getattr(line, "rewards", ()))
            if time.monotonic() - said > _WORD_SECONDS:
                said = time.monotonic()
                logger.info("%s: %d lines are tokenized", chat_set.name, len(samples) - 1)
    if len(samples) == 1:
        raise RequestError(
            chat_set.path or chat_set.name,
            f"dataset {chat_set.name} holds no line",
            "check its path, or remove it from the recipe",
        )
    for name, values in (("examples", examples), ("counts", counts), ("samples", samples),
                         ("places", places), ("rewards", rewards)):  # fmt: skip
        np.asarray(values).astype(_TYPES[name]).tofile(folder / f"{name}.bin")
    facts = {
        "name": chat_set.name, "kind": kind, "samples": len(samples) - 1,
        "examples": len(examples) - 1, "tokens": examples[-1], "end_ids": sorted(end_ids),
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
    }  # fmt: skip
    runs.write_json(folder / _FACTS, facts)
    logger.info(
        "%s: %d %s, %d tokens, in %.1f s", chat_set.name, len(samples) - 1,
        "conversations" if kind == "sft" else "pairs", examples[-1], time.monotonic() - began,
    )  # fmt: skip


def _batches(
    lines: Iterator[Any], kind: Kind, chat: Chat
) -> Iterator[tuple[list[Any], Iterable[Sequence[Example]]]]:
    encode: Callable[[list[Any]], Iterable[Sequence[Example]]]
    encode = chat.conversations if kind == "sft" else chat.pairs
    while batch := list(islice(lines, _BATCH)):
        yield batch, encode(batch)
