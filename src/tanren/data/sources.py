"""The files of a source."""

from __future__ import annotations

import glob
from pathlib import Path

from tanren.config.errors import RequestError
from tanren.config.schema import Source

# What lies beside the data in a folder, and is not meant when the folder is named.
_DATA = (".jsonl", ".json", ".ndjson", ".gz", ".zst", ".parquet")


def files_of(source: Source) -> list[Path]:
    """The files of a source, sorted by path: those that its pattern names; of a folder, all below.

    Raises:
        RequestError: there is none.
    """
    assert source.path is not None
    found: list[Path] = []
    for name in glob.glob(source.path, recursive=True):
        path = Path(name)
        if path.is_dir():
            found += [p for p in path.rglob("*") if p.suffix.lower() in _DATA and p.is_file()]
        else:
            found.append(path)
    if not found:
        raise RequestError(
            source.path,
            f"no file of source {source.name} is there",
            "check the source's path (a relative one begins at the recipe's folder)",
        )
    return sorted(set(found))
