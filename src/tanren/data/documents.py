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


def documents(source: Source, folder: Path) -> Iterator[str]:
    """The texts of a source, in a fixed order.

    Args:
        source: what the recipe says.
        folder: relative paths are taken from here (the recipe's folder).
    Raises:
        RequestError: nothing matches, or a line is not JSON or has no text; file and line named.
    """
    if source.python_documentation == "topics":
        return _topics()
    if source.python_documentation == "docstrings":
        return _docstrings()
    assert source.path is not None
    return _json_lines(source, folder)


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


def _json_lines(source: Source, folder: Path) -> Iterator[str]:
    assert source.path is not None
    pattern = str(folder / Path(source.path).expanduser())
    paths = [Path(name) for name in sorted(glob.glob(pattern))]
    if not paths:
        raise RequestError(
            pattern, f"no file of source {source.name} is there", "check the source's path"
        )
    for path in paths:
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
        keys = ", ".join(value) if isinstance(value, dict) else type(value).__name__
        raise RequestError(
            place,
            f"has no text under {key!r}; it has {keys}",
            "state the source's text_key, or mend the line",
        )
    text: str = value[key]
    return text
