"""Sources to documents: JSON lines, plain or compressed, Parquet, and the text of every Python.

Where the objects around the texts are wanted, `rows` gives them.

A source is cut into units, pieces of about the same size whatever the number of workers. A unit is
read in one stream, by one worker; nothing is unpacked to disk, and no more than a block and a
document are in memory.
"""

from __future__ import annotations

import codecs
import hashlib
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from tanren.config.data import Source
from tanren.config.errors import RequestError
from tanren.data import python_text
from tanren.data.compressed import OPENERS, Position, unpacked
from tanren.data.sources import KINDS, files_of

# Text that one worker turns into one shard. Large enough that a worker's start does not count,
# small enough that the last ones end together.
UNIT_BYTES = 16 << 20
_BLOCK = 1 << 20
# sentencepiece and Megatron's index count a document in signed 32-bit numbers.
MAX_DOCUMENT_BYTES = 2**31 - 1

Problem = Callable[[RequestError], None]


@dataclass(frozen=True)
class Unit:
    """A piece of a source: a file, or a range of its bytes (lines) or its row groups (Parquet)."""

    source: Source
    path: Path | None = None
    first: int = 0
    end: int | None = None


def units(source: Source, unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """Cut a source, in the order of its files.

    Plain lines are cut where a line begins, Parquet between row groups; a compressed file is one
    unit, since its stream has one beginning.

    Raises:
        RequestError: a source matches no file, or a file's name or head is not understood.
    """
    if source.python_documentation:
        return [Unit(source)]
    found: list[Unit] = []
    for path in files_of(source):
        kind = _kind(path)
        if kind == "lines":
            found += _cut_lines(source, path, unit_bytes)
        elif kind == "parquet":
            found += _cut_row_groups(source, path, unit_bytes)
        else:
            found.append(Unit(source, path))
    return found


def _kind(path: Path) -> str:
    """By the last part of its name: lines, gz, zst or parquet."""
    kind = KINDS.get(path.suffix.lower())
    if kind is None:
        raise RequestError(
            path,
            "is not a kind of file that is known here",
            "known are .jsonl and .json (one object a line), also with .gz or .zst, and .parquet",
        )
    return kind


def _cut_lines(source: Source, path: Path, unit_bytes: int) -> Iterator[Unit]:
    size, first = path.stat().st_size, 0
    with path.open("rb") as file:
        while first < size:
            file.seek(first + unit_bytes - 1)
            while (piece := file.readline(_BLOCK)) and not piece.endswith(b"\n"):
                pass
            end = min(file.tell(), size)
            yield Unit(source, path, first, end)
            first = end


def _cut_row_groups(source: Source, path: Path, unit_bytes: int) -> Iterator[Unit]:
    metadata = _parquet(path).metadata
    first, held = 0, 0
    for number in range(metadata.num_row_groups):
        held += metadata.row_group(number).total_byte_size
        if held >= unit_bytes or number + 1 == metadata.num_row_groups:
            yield Unit(source, path, first, number + 1)
            first, held = number + 1, 0


def content(unit: Unit) -> str:
    """SHA-256 of a unit's bytes: what its shard is known by."""
    result = hashlib.sha256()
    if unit.path is None:
        for text in _python_text(unit.source):
            result.update(orjson.dumps(text))
        return result.hexdigest()
    for block in _blocks(unit):
        result.update(block)
    return result.hexdigest()


def _blocks(unit: Unit) -> Iterator[bytes]:
    """A unit's bytes as they are on disk."""
    assert unit.path is not None
    first, end = unit.first, unit.end
    if _kind(unit.path) == "parquet" and end is not None:
        first, end = _parquet_bytes(unit)
    with unit.path.open("rb") as file:
        file.seek(first)
        left = (unit.path.stat().st_size if end is None else end) - first
        while left > 0 and (block := file.read(min(left, _BLOCK))):
            left -= len(block)
            yield block


def documents(unit: Unit, problem: Problem) -> Iterator[str]:
    """The texts of a unit in order; empty ones come as "".

    Args:
        problem: called with each line that is no document (place, problem, next step); it raises,
            or the line is passed over.
    """
    if unit.path is None:
        yield from _python_text(unit.source)
    elif _kind(unit.path) == "parquet":
        yield from _rows(unit, problem)
    else:
        yield from _json_lines(unit, problem)


def rows(unit: Unit, keys: Sequence[str], problem: Problem) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a whole file in order, each with the number of its line or row, from 1.

    Args:
        keys: what is wanted of them; of a Parquet file nothing else is read.
        problem: as with `documents`.
    """
    assert unit.path is not None
    assert (unit.first, unit.end) == (0, None), "numbers are counted from the file's beginning"
    if _kind(unit.path) == "parquet":
        there = [key for key in keys if key in _parquet(unit.path).schema_arrow.names]
        if not there:
            raise _no_column(unit.path, keys, f"it needs {keys[0]}")
        for row, values in _columns(unit, there, problem):
            yield row, dict(zip(there, values, strict=True))
        return
    lines = _Lines(unit, problem)
    for value in lines.values():
        if isinstance(value, dict):
            yield lines.number, value
        else:
            found = f"is no object but {type(value).__name__}"
            problem(RequestError(lines.place, found, "mend or remove the line"))


def place_of(path: Path, number: int) -> str:
    """A line of a file as an editor would name it, or a row of Parquet."""
    return f"{path} row {number}" if _kind(path) == "parquet" else f"{path}:{number}"


def _python_text(source: Source) -> Iterator[str]:
    if source.python_documentation == "topics":
        return python_text.topics()
    return python_text.docstrings()


# JSON lines ---------------------------------------------------------------------------------------


def _json_lines(unit: Unit, problem: Problem) -> Iterator[str]:
    key, lines = unit.source.text_key, _Lines(unit, problem)
    for value in lines.values():
        text = value.get(key) if isinstance(value, dict) else None
        if isinstance(text, str):
            yield text
            continue
        keys = type(value).__name__
        if isinstance(value, dict):
            keys = ", ".join(value) or "no keys"
            if key in value:
                keys = f"{type(text).__name__} there"
        problem(
            RequestError(
                lines.place,
                f"has no text under {key!r}; it has {keys}",
                "state the source's text_key, or mend the line, or on_error: skip",
            )
        )


# What Japanese text is in where it is not UTF-8; EUC-JP first, since much of it could be CP932.
_ENCODINGS = ("EUC-JP", "CP932")
_KANA = re.compile("[\u3041-\u30fe]")


def _reads(line: bytes, encoding: str) -> bool:
    """Whether a line is Japanese in this encoding, and not in UTF-8 with a byte of it broken."""
    if _KANA.search(line.decode("utf-8", "ignore")):
        return False
    try:
        return len(_KANA.findall(line.decode(encoding))) > 1
    except UnicodeDecodeError:
        return False


class _Lines:
    """The lines of a unit, without their ends; `place` names the last one as an editor would."""

    def __init__(self, unit: Unit, problem: Problem) -> None:
        assert unit.path is not None
        self.unit, self.path, self.problem = unit, unit.path, problem
        self.number = 0
        self._before: int | None = None

    @property
    def place(self) -> str:
        if self._before is None:
            # A unit in the middle of a file does not know how many lines lie before it.
            before = Unit(self.unit.source, self.path, 0, self.unit.first)
            self._before = sum(block.count(b"\n") for block in _blocks(before))
        return f"{self.path}:{self._before + self.number}"

    def values(self) -> Iterator[Any]:
        """What each line says in JSON; empty lines say nothing."""
        for line in self:
            start = self.number == 1 and self.unit.first == 0
            text = line.removeprefix(codecs.BOM_UTF8) if start else line
            if not text or text.isspace():
                continue
            try:
                value = orjson.loads(text)
            except orjson.JSONDecodeError as error:
                self.problem(self._no_json(text, error))
                continue
            yield value

    def _no_json(self, line: bytes, error: orjson.JSONDecodeError) -> RequestError:
        """What is wrong with a line: its encoding, or what it says."""
        advice = "mend or remove the line, or on_error: skip"
        try:
            line.decode()
        except UnicodeDecodeError:
            read_as = next((name for name in _ENCODINGS if _reads(line, name)), None)
            if read_as is not None:
                advice = "convert the file, or on_error: skip"
            mended = f"; it reads as {read_as} (iconv -f {read_as} -t UTF-8)" if read_as else ""
            return RequestError(self.place, f"is not UTF-8{mended}", advice)
        return RequestError(self.place, f"is not JSON: {error}", advice)

    def __iter__(self) -> Iterator[bytes]:
        rest: list[bytes] = []
        held = 0
        for block in self._text_blocks():
            lines = block.split(b"\n")
            if len(lines) > 1:
                whole = self._line([*rest, lines[0]], held + len(lines[0]))
                if whole is not None:
                    yield whole
                rest, held = [], 0
                for line in lines[1:-1]:
                    self.number += 1
                    yield line
            held += len(lines[-1])
            if held <= MAX_DOCUMENT_BYTES:
                rest.append(lines[-1])
            else:
                rest = []
        if held and (whole := self._line(rest, held)) is not None:
            yield whole

    def _line(self, parts: list[bytes], size: int) -> bytes | None:
        self.number += 1
        if size <= MAX_DOCUMENT_BYTES:
            return b"".join(parts)
        self.problem(
            RequestError(
                self.place,
                f"is a line of {size:,} bytes; the longest that can be a document has "
                f"{MAX_DOCUMENT_BYTES:,}",
                "cut the document into several, or on_error: skip",
            )
        )
        return None

    def _text_blocks(self) -> Iterator[bytes]:
        kind = _kind(self.path)
        if kind == "lines":
            yield from _blocks(self.unit)
            return
        done = Position()
        try:
            yield from unpacked(_blocks(self.unit), OPENERS[kind], done)
        except (ValueError, zlib.error) as error:
            self.problem(
                RequestError(
                    self.path,
                    f"breaks off: {error}, {done.read:,} bytes into the file; what came before, "
                    f"{self.number:,} lines, can be read",
                    "fetch the file again, or on_error: skip to keep those lines",
                )
            )


# Parquet ------------------------------------------------------------------------------------------


def _parquet(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BLOCK)
    except (pyarrow.ArrowException, OSError) as error:
        raise RequestError(
            path, f"is not a whole Parquet file: {error}", "fetch the file again"
        ) from None


def _parquet_bytes(unit: Unit) -> tuple[int, int]:
    """Where a unit's row groups lie in their file."""
    assert unit.path is not None
    metadata = _parquet(unit.path).metadata
    starts, ends = [], []
    assert unit.end is not None
    for number in range(unit.first, unit.end):
        for column in range(metadata.num_columns):
            facts = metadata.row_group(number).column(column)
            start = facts.dictionary_page_offset or facts.data_page_offset
            starts.append(start)
            ends.append(start + facts.total_compressed_size)
    return min(starts, default=0), max(ends, default=0)


def _rows(unit: Unit, problem: Problem) -> Iterator[str]:
    assert unit.path is not None
    key = unit.source.text_key
    if key not in _parquet(unit.path).schema_arrow.names:
        raise _no_column(unit.path, [key], "state the source's text_key")
    for row, (text,) in _columns(unit, [key], problem):
        if isinstance(text, str):
            yield text
            continue
        problem(
            RequestError(
                place_of(unit.path, row),
                f"has no text under {key!r}; it has {type(text).__name__} there",
                "state the source's text_key, or mend the row, or on_error: skip",
            )
        )


def _no_column(path: Path, keys: Sequence[str], advice: str) -> RequestError:
    there = ", ".join(_parquet(path).schema_arrow.names) or "none"
    wanted = " or ".join(map(repr, keys))
    return RequestError(path, f"has no column {wanted}; it has {there}", advice)


def _columns(
    unit: Unit, keys: list[str], problem: Problem
) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """The number of each row of a unit in its file, from 1, and its values under these keys."""
    import pyarrow

    assert unit.path is not None
    file = _parquet(unit.path)
    row = sum(file.metadata.row_group(number).num_rows for number in range(unit.first))
    groups = range(unit.first, unit.end or file.metadata.num_row_groups)
    try:
        for batch in file.iter_batches(256, row_groups=list(groups), columns=keys):
            columns = [batch.column(key).to_pylist() for key in keys]
            for values in zip(*columns, strict=True):
                row += 1
                yield row, values
    except (pyarrow.ArrowException, OSError) as error:
        problem(
            RequestError(
                unit.path,
                f"breaks off after row {row:,}: {error}",
                "fetch the file again, or on_error: skip to keep those rows",
            )
        )
