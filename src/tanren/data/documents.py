"""Sources to documents: .jsonl files, and the text that every Python installation carries."""

from __future__ import annotations

import ast
import glob
import importlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import orjson

from tanren.config.errors import RequestError
from tanren.config.schema import Source

# Folders of the standard library whose docstrings say nothing to a reader.
_SKIPPED = {"test", "tests", "idlelib", "turtledemo", "site-packages", "__pycache__", "pydoc_data"}


def documents(source: Source) -> Iterator[str]:
    """The texts of a source that are not empty, in a fixed order.

    Args:
        source: what the recipe says, its path absolute.
    Raises:
        RequestError: nothing matches, there is no text, or a line is not JSON or has no text;
            file and line are named.
    """
    if source.python_documentation == "topics":
        texts = _topics()
    elif source.python_documentation == "docstrings":
        texts = _docstrings()
    else:
        texts = _json_lines(source)
    empty = True
    for text in texts:
        if text:
            empty = False
            yield text
    if empty:
        raise RequestError(
            source.path or source.name,
            f"source {source.name} holds no text: every document is empty or there is none",
            "check the source's path and text_key",
        )


def _topics() -> Iterator[str]:
    """The language reference behind help(): one document a topic."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise RequestError(
            "pydoc_data.topics",
            "this Python comes without its documentation",
            "install the whole standard library (Debian: libpython3-stdlib), or use another source",
        ) from None
    for name in sorted(topics):
        yield topics[name]


def _docstrings() -> Iterator[str]:
    """One document a module of the standard library: its docstring and those of its contents."""
    root = Path(sysconfig.get_path("stdlib"))
    found = False
    for path in sorted(root.rglob("*.py")):
        if _SKIPPED & set(path.relative_to(root).parts[:-1]):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue
        module = ast.get_docstring(tree)
        if not module:
            continue
        parts = [module]
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) > 80:
                    parts.append(f"{node.name}: {text}")
        found = True
        yield "\n\n".join(parts)
    if not found:
        raise RequestError(root, "holds no sources of the standard library", "use another source")


def _json_lines(source: Source) -> Iterator[str]:
    assert source.path is not None
    paths = [Path(name) for name in sorted(glob.glob(source.path))]
    if not paths:
        raise RequestError(
            source.path, f"no file of source {source.name} is there", "check the source's path"
        )
    for path in paths:
        if not path.is_file():
            raise RequestError(
                path,
                f"is not a file, and source {source.name} needs one",
                "name the .jsonl files, such as FOLDER/*.jsonl",
            )
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _text_of(line, source.text_key, f"{path}:{number}")


def _text_of(line: bytes, key: str, place: str) -> str:
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise RequestError(place, f"is not JSON: {error}", "mend or remove the line") from None
    if not isinstance(value, dict) or not isinstance(value.get(key), str):
        keys = type(value).__name__
        if isinstance(value, dict):
            keys = ", ".join(value) or "no keys"
            if key in value:
                keys = f"{type(value[key]).__name__} there"
        raise RequestError(
            place,
            f"has no text under {key!r}; it has {keys}",
            "state the source's text_key, or mend the line",
        )
    text: str = value[key]
    return text
