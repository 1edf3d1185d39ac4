"""Real text that every Python installation carries, so that a recipe can do without a download."""

from __future__ import annotations

import ast
import importlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tanren.config.errors import RequestError

# Folders of the standard library whose docstrings say nothing to a reader.
_SKIPPED = {"test", "tests", "idlelib", "turtledemo", "site-packages", "__pycache__", "pydoc_data"}


def topics() -> Iterator[str]:
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


def docstrings() -> Iterator[str]:
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
