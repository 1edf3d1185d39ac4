"""Sources to documents."""

from __future__ import annotations

import sys
import sysconfig
from itertools import islice
from pathlib import Path
from typing import Literal

import pytest

from tanren.config.errors import EXIT_REQUEST, RequestError
from tanren.config.schema import Source
from tanren.data.documents import documents


def read(folder: Path, path: str = "a.jsonl", text_key: str = "text") -> list[str]:
    return list(documents(Source(name="mine", path=str(folder / path), text_key=text_key)))


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
        (b'{"text": "\xff"}', "is not JSON: str is not valid UTF-8"),
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


def test_a_byte_order_mark_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes('\ufeff{"text": "a"}\n'.encode())
    error = refusal(tmp_path)
    assert error.place == f"{tmp_path}/a.jsonl:1"
    assert "BOM" in error.problem


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


@pytest.mark.parametrize("data", [b"", b"\n \t\r\n\n", b'{"text": ""}\n'])
def test_a_source_without_text_is_an_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(data)
    error = refusal(tmp_path)
    assert error.place == f"{tmp_path}/a.jsonl"
    assert error.problem.startswith("source mine holds no text")


def test_files_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in "cab":
        (tmp_path / f"{name}.jsonl").write_text(f'{{"body": "{name}", "text": "no"}}\n')
    assert read(tmp_path, "*.jsonl", text_key="body") == ["a", "b", "c"]
    assert read(tmp_path, "[bc].jsonl", text_key="body") == ["b", "c"]


@pytest.mark.parametrize(("kind", "fewest"), [("topics", 60), ("docstrings", 30)])
def test_python_documentation_is_text_and_stays_the_same(
    kind: Literal["topics", "docstrings"], fewest: int
) -> None:
    source = Source(name="python", python_documentation=kind)
    first = list(islice(documents(source), 100 if kind == "topics" else 30))
    assert len(first) >= fewest
    assert all(text.strip() for text in first)
    assert list(islice(documents(source), len(first))) == first


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
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    source = Source(name="python", python_documentation="docstrings")
    assert list(documents(source)) == ["A.", f"Z.\n\nC: {long}"]


def test_a_python_without_its_documentation_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    for kind, place in (("topics", "pydoc_data.topics"), ("docstrings", str(tmp_path))):
        source = Source.model_validate({"name": "python", "python_documentation": kind})
        with pytest.raises(RequestError) as caught:
            list(documents(source))
        assert caught.value.place == place
        assert "use another source" in caught.value.next_step
