"""Sources to units to documents, in every format, whole and broken."""

from __future__ import annotations

import gzip
import sys
import sysconfig
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import orjson
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tanren.config.data import Source
from tanren.config.errors import EXIT_REQUEST, RequestError
from tanren.data import documents as module
from tanren.data.documents import content, documents, units


def stop(error: RequestError) -> None:
    raise error


def source(path: Path | str, **more: Any) -> Source:
    return Source(name="mine", path=str(path), **more)


def texts_of(
    one: Source, problems: list[RequestError] | None = None, unit_bytes: int = 64 << 20
) -> list[str]:
    take = stop if problems is None else problems.append
    return [text for unit in units(one, unit_bytes) for text in documents(unit, take) if text]


def read(folder: Path, path: str = "a.jsonl", text_key: str = "text") -> list[str]:
    return texts_of(source(folder / path, text_key=text_key))


def refusal(folder: Path, path: str = "a.jsonl") -> RequestError:
    with pytest.raises(RequestError) as caught:
        read(folder, path)
    assert caught.value.exit_code == EXIT_REQUEST == 2
    assert caught.value.problem
    assert caught.value.next_step
    return caught.value


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": ', "is not JSON"),
        (b"plain words", "is not JSON"),
        (b'{"text": "a"} {"text": "b"}', "is not JSON"),
        (b'{"text": "\xff"}', "is not UTF-8"),
        (b'{"text": "\\ud800"}', "is not JSON"),
        (b'{"body": "a", "url": "b"}', "has no text under 'text'; it has body, url"),
        (b"{}", "has no text under 'text'"),
        (b'{"text": 5}', "has no text under 'text'"),
        (b'{"text": null}', "has no text under 'text'"),
        (b'{"text": ["a"]}', "has no text under 'text'"),
        (b"{}", "has no text under 'text'; it has no keys"),
        (b'{"text": null}', "has no text under 'text'; it has NoneType there"),
        (b'["text"]', "has no text under 'text'; it has list"),
        (b'"text"', "has no text under 'text'; it has str"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, line: bytes, problem: str) -> None:
    """Blank lines count, as they do in an editor."""
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "good"}\n')
    error = refusal(tmp_path)
    assert error.place == f"{tmp_path}/a.jsonl:3"
    assert error.problem.startswith(problem)


def test_a_byte_order_mark_begins_a_file_alone(tmp_path: Path) -> None:
    """Editors on Windows write it; it is no part of the first line."""
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"text": "a"}\n{"text": "b"}\n'.encode())
    assert read(tmp_path) == ["a", "b"]
    path.write_bytes('{"text": "a"}\n\ufeff{"text": "b"}\n'.encode())
    error = refusal(tmp_path)
    assert error.place == f"{path}:2"
    assert "BOM" in error.problem


@pytest.mark.parametrize("encoding", ["cp932", "euc_jp"])
def test_japanese_in_another_encoding_is_told_from_bytes_that_are_none(
    tmp_path: Path, encoding: str
) -> None:
    text = '{"text": "東京は日本の首都です。カタカナも"}\n'
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' + text.encode(encoding))
    error = refusal(tmp_path)
    name = encoding.replace("_", "-").upper()
    assert error.place == f"{tmp_path}/a.jsonl:2"
    assert error.problem == f"is not UTF-8; it reads as {name} (iconv -f {name} -t UTF-8)"
    assert error.next_step == "convert the file, or on_error: skip"


@pytest.mark.parametrize(
    "line",
    ["東京は日本の首都です。".encode()[:-1], "général".encode("latin-1"), b"\x83\xff"],
)
def test_a_broken_byte_is_no_other_encoding(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "' + line + b'"}\n')
    error = refusal(tmp_path)
    assert error.problem == "is not UTF-8"
    assert error.next_step == "mend or remove the line, or on_error: skip"


def test_the_bad_file_of_many_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n{\n')
    assert refusal(tmp_path, "*.jsonl").place == f"{tmp_path}/b.jsonl:2"


@pytest.mark.parametrize("path", ["a.jsonl", "*.jsonl", "no/such/folder/*"])
def test_nothing_there_is_an_error(tmp_path: Path, path: str) -> None:
    (tmp_path / "other.txt").write_text('{"text": "a"}\n')
    error = refusal(tmp_path, path)
    assert error.place == f"{tmp_path}/{path}"
    assert error.problem.startswith("no file of source mine")


@pytest.mark.parametrize(
    ("data", "texts"),
    [
        (b'\n{"text": "a"}\n  \n\r\n{"text": "b"}\n\n', ["a", "b"]),
        (b'{"text": "a"}\r\n{"text": "b"}', ["a", "b"]),
        (b'{"text": ""}\n{"text": "a"}\n', ["a"]),
        (b'{"text": "line\\nline", "n": 1}\n', ["line\nline"]),
        (b'{"text": "\\u935b\\u932c \\ud83d\\udd28"}\n', ["鍛錬 🔨"]),
        # Characters that str.splitlines takes for the end of a line.
        ('{"text": "鍛錬\u2028が\u0085ぎ"}\n'.encode(), ["鍛錬\u2028が\u0085ぎ"]),
    ],
)
def test_texts_come_as_they_are(tmp_path: Path, data: bytes, texts: list[str]) -> None:
    (tmp_path / "a.jsonl").write_bytes(data)
    assert read(tmp_path) == texts


def test_files_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in "cab":
        (tmp_path / f"{name}.jsonl").write_text(f'{{"body": "{name}", "text": "no"}}\n')
    assert read(tmp_path, "*.jsonl", text_key="body") == ["a", "b", "c"]
    assert read(tmp_path, "[bc].jsonl", text_key="body") == ["b", "c"]


@pytest.mark.parametrize(("kind", "fewest"), [("topics", 60), ("docstrings", 30)])
def test_python_documentation_is_text_and_stays_the_same(
    kind: Literal["topics", "docstrings"], fewest: int
) -> None:
    [unit] = units(Source(name="python", python_documentation=kind))
    first = list(islice(documents(unit, stop), 100 if kind == "topics" else 30))
    assert len(first) >= fewest
    assert all(text.strip() for text in first)
    assert list(islice(documents(unit, stop), len(first))) == first


def test_docstrings_are_those_of_modules_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "What it says, " * 6 + "and more."
    files = {
        "z.py": f'"""Z."""\nclass C:\n    """{long}"""\n    def f(self): "short"\n',
        "package/a.py": '"""A."""\n',
        "package/undocumented.py": "x = 1\n",
        "package/broken.py": '"""Broken."""\ndef (\n',
        "package/latin.py": b'"""\xff"""\n',
        "test/t.py": '"""A test."""\n',
        "site-packages/s.py": '"""Not ours."""\n',
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    [unit] = units(Source(name="python", python_documentation="docstrings"))
    assert list(documents(unit, stop)) == ["A.", f"Z.\n\nC: {long}"]


def test_a_python_without_its_documentation_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    for kind, place in (("topics", "pydoc_data.topics"), ("docstrings", str(tmp_path))):
        [unit] = units(Source.model_validate({"name": "python", "python_documentation": kind}))
        with pytest.raises(RequestError) as caught:
            list(documents(unit, stop))
        assert caught.value.place == place
        assert "use another source" in caught.value.next_step


TEXTS = [f"{number}: 鍛錬 {'word ' * (number % 7)}" for number in range(60)]
LINES = b"".join(orjson.dumps({"text": text, "n": 1}) + b"\n" for text in TEXTS)


def parquet(path: Path, texts: list[Any], rows: int = 7, column: str = "text") -> None:
    table = pyarrow.table({column: texts, "other": list(range(len(texts)))})
    pyarrow.parquet.write_table(table, path, row_group_size=rows)


def write(path: Path, data: bytes = LINES) -> None:
    """Lines in the format that the file's name says; compressed ones in several streams."""
    third = len(data) // 3
    parts = [data[:third], data[third : 2 * third], data[2 * third :]]
    if path.suffix.lower() == ".gz":
        data = b"".join(gzip.compress(part) for part in parts)
    elif path.suffix == ".zst":
        data = b"".join(zstandard.compress(part) for part in parts)
    path.write_bytes(data)


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz", "a.json.zst", "A.JSONL.GZ"]
)
def test_every_format_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    write(tmp_path / name)
    assert texts_of(source(tmp_path / name)) == TEXTS
    write(tmp_path / name, LINES.rstrip(b"\n"))
    assert texts_of(source(tmp_path / name)) == TEXTS, "without a last newline"


def test_parquet_gives_the_same_documents(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", TEXTS)
    assert texts_of(source(tmp_path / "a.parquet")) == TEXTS
    cut = units(source(tmp_path / "a.parquet"), 1)
    assert [(unit.first, unit.end) for unit in cut] == [(n, n + 1) for n in range(9)]
    assert len({content(unit) for unit in cut}) == 9, "each row group has bytes of its own"
    assert texts_of(source(tmp_path / "a.parquet"), unit_bytes=1) == TEXTS


def test_gzip_padded_with_zeros_is_whole(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES) + bytes(1000))
    assert texts_of(source(tmp_path / "a.jsonl.gz")) == TEXTS


@settings(deadline=None, max_examples=60)
@given(
    lines=st.lists(st.text(st.characters(codec="utf-8"), max_size=12), max_size=12),
    unit_bytes=st.integers(1, 90),
    newline=st.sampled_from([b"\n", b"\r\n", b"\n\n"]),
    last=st.booleans(),
)
def test_wherever_a_file_is_cut_each_line_is_read_once(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], unit_bytes: int, newline: bytes,
    last: bool,
) -> None:  # fmt: skip
    path = tmp_path_factory.mktemp("cut") / "a.jsonl"
    data = newline.join(orjson.dumps({"text": line}) for line in lines)
    path.write_bytes(data + (newline if last and lines else b""))
    assert texts_of(source(path), unit_bytes=unit_bytes) == [line for line in lines if line]
    cut = units(source(path), unit_bytes)
    assert sum((unit.end or 0) - unit.first for unit in cut) == path.stat().st_size


def test_a_unit_is_known_by_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.jsonl").write_bytes(LINES[:-2] + b" \n")
    ours, theirs = ([content(u) for u in units(source(tmp_path / f"{n}.jsonl"), 500)] for n in "ab")
    assert len(ours) == len(theirs) > 3
    assert [a == b for a, b in zip(ours, theirs, strict=True)] == [True] * (len(ours) - 1) + [False]


def test_a_folder_means_the_data_in_it(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "a/1.jsonl.gz", "c.parquet", "README.md", "b/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    write(tmp_path / "a/1.jsonl.gz", b'{"text": "one"}\n')
    write(tmp_path / "b/2.jsonl", b'{"text": "two"}\n')
    parquet(tmp_path / "c.parquet", ["three"])
    assert texts_of(source(tmp_path)) == ["one", "two", "three"]
    assert texts_of(source(f"{tmp_path}/**/*.jsonl")) == ["two"]


def test_a_kind_of_file_that_is_not_known_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(RequestError, match="not a kind of file that is known") as caught:
        units(source(tmp_path / "a.tar"))
    assert caught.value.place == f"{tmp_path}/a.tar"


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("damage", ["cut", "overwritten", "not compressed"])
def test_a_broken_stream_is_named_and_what_came_before_kept(
    tmp_path: Path, suffix: str, damage: str
) -> None:
    path = tmp_path / f"a.jsonl.{suffix}"
    write(path)
    data = path.read_bytes()
    broken = {
        "cut": data[: len(data) * 3 // 4],
        "overwritten": data[: len(data) // 2] + bytes(range(1, 41)) + data[len(data) // 2 + 40 :],
        "not compressed": LINES,
    }[damage]
    path.write_bytes(broken)
    with pytest.raises(RequestError, match="breaks off") as caught:
        texts_of(source(path))
    assert caught.value.place == str(path)
    assert "on_error: skip" in caught.value.next_step
    problems: list[RequestError] = []
    kept = texts_of(source(path), problems)
    assert kept == TEXTS[: len(kept)]
    assert bool(kept) == (damage != "not compressed")
    assert "breaks off" in problems[0].problem
    # A line that the break cuts in two is no document either.
    assert len(problems) <= 2


def test_parquet_that_is_cut_or_has_other_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet(path, TEXTS, column="body")
    with pytest.raises(RequestError, match="has no column 'text'; it has body, other"):
        texts_of(source(path))
    assert texts_of(source(path, text_key="body")) == TEXTS
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(RequestError, match="is not a whole Parquet file"):
        texts_of(source(path))


def test_rows_without_text_are_named_and_passed_over(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", ["a", None, "c", "d", None], rows=2)
    with pytest.raises(RequestError, match="NoneType") as caught:
        texts_of(source(tmp_path / "a.parquet"))
    assert caught.value.place == f"{tmp_path}/a.parquet row 2"
    problems: list[RequestError] = []
    assert texts_of(source(tmp_path / "a.parquet"), problems, 1) == ["a", "c", "d"]
    assert [problem.place.split()[-1] for problem in problems] == ["2", "5"]


def test_lines_that_are_passed_over_are_named_wherever_the_file_is_cut(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES.replace(b'"text":"7', b'"t":"7') + b"{\n" + LINES)
    problems: list[RequestError] = []
    kept = texts_of(source(tmp_path / "a.jsonl"), problems, 200)
    assert kept == [text for text in TEXTS if text[0] != "7"] + TEXTS
    assert [problem.place for problem in problems] == [
        f"{tmp_path}/a.jsonl:{number}" for number in (8, 61)
    ]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_document_that_is_too_long_is_named_and_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """2 GiB is the limit; here it is lowered, and blocks are small, to see it happen."""
    monkeypatch.setattr(module, "MAX_DOCUMENT_BYTES", 1000)
    monkeypatch.setattr(module, "_BLOCK", 64)
    lines = b'{"text": "a"}\n{"text": "' + b"x" * 5000 + b'"}\n{"text": "b"}\n'
    write(tmp_path / f"a.jsonl{suffix}", lines)
    with pytest.raises(RequestError, match=r"a line of 5,012 bytes") as caught:
        texts_of(source(tmp_path / f"a.jsonl{suffix}"))
    assert caught.value.place == f"{tmp_path}/a.jsonl{suffix}:2"
    problems: list[RequestError] = []
    assert texts_of(source(tmp_path / f"a.jsonl{suffix}"), problems) == ["a", "b"]
    assert len(problems) == 1
