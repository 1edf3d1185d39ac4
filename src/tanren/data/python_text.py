"""Real text that every Python installation carries, so that a recipe can do without a download."""

from __future__ import annotations

import ast
import functools
import importlib
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tanren.config.errors import RequestError

# Folders of the standard library whose docstrings say nothing to a reader.
_SKIPPED = {"test", "tests", "idlelib", "turtledemo", "site-packages", "__pycache__", "pydoc_data"}
_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_QUESTIONS = (
    "What does {} do?",
    "Say in one sentence what {} is for.",
    "I found {} in a program. What is it?",
    "Explain {} to me.",
)
# From a capital letter to a full stop, of a length that says something and is read at a glance.
_SENTENCE = re.compile(r"[A-Z][^.]{18,158}\.(?=\s|$)")


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
    for _, tree in _modules():
        module = ast.get_docstring(tree)
        if not module:
            continue
        parts = [module]
        for node in ast.walk(tree):
            if isinstance(node, _DEFINITIONS):
                text = ast.get_docstring(node)
                if text and len(text) > 80:
                    parts.append(f"{node.name}: {text}")
        yield "\n\n".join(parts)


def questions() -> Iterator[dict[str, Any]]:
    """Conversations: someone asks what a thing of the standard library does, and is told.

    The answer is the first sentence of its docstring.
    """
    for number, (name, sentence, _) in enumerate(_said()):
        yield {"messages": [_question(number, name), {"role": "assistant", "content": sentence}]}


def preferences() -> Iterator[dict[str, Any]]:
    """The same questions where a docstring says more: chosen is what it says first, which is what
    the thing does, and rejected what it goes on with: a detail.
    """
    detailed = (one for one in _said() if one[2])
    for number, (name, sentence, detail) in enumerate(detailed):
        yield {
            "messages": [_question(number, name)],
            "chosen_response": sentence,
            "rejected_response": detail,
        }


def _question(number: int, name: str) -> dict[str, str]:
    return {"role": "user", "content": _QUESTIONS[number % len(_QUESTIONS)].format(name)}


@functools.cache
def _said() -> list[tuple[str, str, str | None]]:
    """Names of public things, what their docstrings begin with, no sentence twice, and a detail."""
    found: dict[str, tuple[str, str | None]] = {}
    for module, tree in _modules():
        things: list[tuple[str, Any]] = [(module, tree)]
        for node in tree.body:
            if isinstance(node, _DEFINITIONS):
                name = f"{module}.{node.name}"
                things.append((name, node))
                methods = node.body if isinstance(node, ast.ClassDef) else []
                things += [
                    (f"{name}.{one.name}", one) for one in methods if isinstance(one, _DEFINITIONS)
                ]
        for name, node in things:
            first, *more = (ast.get_docstring(node) or "").split("\n\n")
            sentence = _sentence(first)
            public = not any(part.startswith("_") for part in name.split("."))
            if public and sentence:
                details = [_sentence(paragraph) for paragraph in more]
                detail = next((one for one in details if one not in (None, sentence)), None)
                found.setdefault(sentence, (name, detail))
    return [(name, sentence, detail) for sentence, (name, detail) in found.items()]


def _sentence(paragraph: str) -> str | None:
    """The sentence that a paragraph begins with, in one line; None where it is none, or long."""
    found = _SENTENCE.match(" ".join(paragraph.split()))
    return found[0] if found else None


def _modules() -> Iterator[tuple[str, ast.Module]]:
    """The modules of the standard library that can be parsed, with their names."""
    root = Path(sysconfig.get_path("stdlib"))
    found = False
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED & set(parts[:-1]):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue
        found = found or bool(ast.get_docstring(tree))
        yield ".".join(parts).removesuffix(".__init__"), tree
    if not found:
        raise RequestError(root, "holds no sources of the standard library", "use another source")
