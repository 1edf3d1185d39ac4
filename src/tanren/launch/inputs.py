"""The files that a recipe names: where they are, and a mark that changes when they do.

A product made from a file counts as done only while the file is the one it was made from.
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from tanren.config.errors import RequestError
from tanren.config.schema import Convert, Midtrain, Preprocess, Recipe
from tanren.data.sources import files_of

R = TypeVar("R", bound=Recipe)
_MODEL_FILES = ("*.json", "*.safetensors", "*.model")


def with_absolute_paths(recipe: R, folder: Path) -> R:
    """The recipe with its paths absolute: relative ones are taken from the recipe's folder."""
    if isinstance(recipe, Preprocess):
        pattern_safe = Path(glob.escape(str(folder)))
        sources = tuple(
            source.model_copy(update={"path": _absolute(source.path, pattern_safe)})
            for source in recipe.sources
        )
        path = _absolute(recipe.tokenizer.path, folder)
        tokenizer = recipe.tokenizer.model_copy(update={"path": path})
        return recipe.model_copy(update={"sources": sources, "tokenizer": tokenizer})
    if isinstance(recipe, Convert):
        return recipe.model_copy(update={"source": _absolute_base(recipe.source, folder)})
    if isinstance(recipe, Midtrain):
        return recipe.model_copy(update={"init": _absolute_base(recipe.init, folder)})
    return recipe


def _absolute(path: str | None, folder: Path) -> str | None:
    return None if path is None else str(folder / Path(path).expanduser())


def _absolute_base(base: str, folder: Path) -> str:
    """A base as a recipe names it; `hf:owner/name` stays unless there is such a folder."""
    kind, _, where = base.partition(":")
    local = str(folder / Path(where).expanduser())
    if kind == "checkpoint":
        return f"checkpoint:{local}"
    if kind == "hf" and (where.startswith((".", "/", "~")) or Path(local).is_dir()):
        return f"hf:{local}"
    return base


def paths(recipe: Recipe) -> list[str]:
    """The files and folders that a recipe names (patterns as they are)."""
    found = []
    if isinstance(recipe, Preprocess):
        found += [source.path for source in recipe.sources]
        found.append(recipe.tokenizer.path)
    base = getattr(recipe, "source", None) or getattr(recipe, "init", None) or ""
    kind, _, where = base.partition(":")
    if kind in ("hf", "checkpoint") and where.startswith("/"):
        found.append(glob.escape(where))
    return [path for path in found if path is not None]


def marks(recipe: Recipe) -> dict[str, str]:
    """What the recipe's own files look like now, by their part in the recipe.

    Raises:
        RequestError: a source matches no file, or a folder is not there.
    """
    found = {}
    if isinstance(recipe, Preprocess):
        if recipe.tokenizer.path is not None:
            path = Path(recipe.tokenizer.path)
            found["tokenizer"] = (
                _mark([path]) if path.is_file() else _mark_of_folder(path, "the tokenizer's")
            )
        for source in recipe.sources:
            if source.path is not None:
                found[source.name] = _mark(files_of(source))
    base = getattr(recipe, "source", None) or getattr(recipe, "init", None) or ""
    if base.startswith("hf:/"):
        found["base"] = _mark_of_folder(Path(base.removeprefix("hf:")), "the base model's")
    return found


def _mark_of_folder(folder: Path, whose: str) -> str:
    if not folder.is_dir():
        raise RequestError(folder, "there is no such folder", f"check {whose} path")
    return _mark(path for pattern in _MODEL_FILES for path in folder.glob(pattern))


def _mark(paths: Iterable[Path]) -> str:
    """Names, sizes and times of change, as `make` would compare them."""
    known = [(path.name, path.stat()) for path in sorted(set(paths))]
    content = repr([(name, facts.st_size, facts.st_mtime_ns) for name, facts in known])
    size = sum(facts.st_size for _, facts in known)
    digest = hashlib.sha256(content.encode()).hexdigest()[:8]
    return f"{len(known)} files of {size:,} bytes ({digest})"
