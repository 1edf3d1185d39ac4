"""The files of a source, in the order in which they are read."""

from __future__ import annotations

import glob
from pathlib import Path

from tanren.config.data import Collection
from tanren.config.errors import RequestError
from tanren.data import hub

# What documents.py reads; of a folder, these files are taken.
KINDS = {
    ".jsonl": "lines", ".json": "lines", ".ndjson": "lines", ".gz": "gz", ".zst": "zst",
    ".parquet": "parquet",
}  # fmt: skip


def wanted_of(source: Collection) -> hub.Wanted | None:
    """What a source takes from the hub; None where it has a path or no files at all."""
    if source.hf is None:
        return None
    return hub.Wanted(hub.parse(source.hf, "dataset"), source.files)


def files_of(source: Collection) -> list[Path]:
    """The files that a source's globs match, sorted by path, with those below matched folders.

    Args:
        source: what the recipe says, its path absolute. One of Python's documentation has none.
    Raises:
        RequestError: nothing matches, or a match is neither a file nor a folder with data.
        hub.NotFetchedError: the source is on the hub, and not whole here.
    """
    wanted = wanted_of(source)
    if wanted is not None:
        return list(hub.find(wanted).files)
    if source.path is None:
        return []
    matched = [Path(name) for name in sorted(glob.glob(source.path, recursive=True))]
    if not matched:
        raise RequestError(
            source.path, f"no file of source {source.name} is there",
            "check the source's path (a relative one begins at the recipe's folder)",
        )  # fmt: skip
    return sorted({file for path in matched for file in _files_below(path, source)})


def _files_below(path: Path, source: Collection) -> list[Path]:
    if path.is_file():
        return [path]
    files = [p for p in path.rglob("*") if p.suffix.lower() in KINDS and p.is_file()]
    if not files:
        raise RequestError(
            path, f"holds no data file ({', '.join(KINDS)}), and source {source.name} needs one",
            "name the files, such as FOLDER/*.jsonl",
        )  # fmt: skip
    return files
