"""Counts of token files without numpy, held to the reader that has it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tanren import tokenfiles
from tanren.config.errors import RequestError
from tanren.data import indexed


@pytest.mark.parametrize("documents", [[], [[]], [[1, 2, 3], [4, 5]], [[], [7], []]])
@pytest.mark.parametrize("vocabulary", [300, 130_000])
def test_the_last_entry_counts_what_all_entries_count(
    tmp_path: Path, documents: list[list[int]], vocabulary: int
) -> None:
    prefix = tmp_path / "dclm" / "dclm-0000"
    written = indexed.write(prefix, documents, vocabulary)
    assert tokenfiles.count(prefix) == written == indexed.check(prefix)
    assert written.tokens == sum(len(document) for document in documents)


def test_a_length_that_is_not_its_offsets_is_found_by_the_reader(tmp_path: Path) -> None:
    indexed.write(tmp_path / "t", [[1, 2, 3], [4, 5]], 300)
    idx = tokenfiles.idx_path(tmp_path / "t")
    content = bytearray(idx.read_bytes())
    content[tokenfiles.HEADER_BYTES] = 9
    idx.write_bytes(content)
    with pytest.raises(RequestError) as refused:
        indexed.check(tmp_path / "t")
    assert refused.value.problem == "has lengths of 11 tokens, and 5 by its offsets"
