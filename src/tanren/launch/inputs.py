"""The files that a recipe names: where they are, and a mark that changes when they do.

A product made from a file counts as done only while the file is the one it was made from.
"""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar, cast

from tanren.config.data import ChatSet, Preprocess, Source
from tanren.config.errors import RequestError
from tanren.config.fields import SOURCE_NAME
from tanren.config.merge import Merge, export_named
from tanren.config.schema import Convert, Evaluation, Recipe
from tanren.config.training import Midtrain, Tuning
from tanren.data import hub, sources
from tanren.environments import HARNESS

R = TypeVar("R", bound=Recipe)
S = TypeVar("S", Source, ChatSet)
_MODEL_FILES = ("*.json", "*.safetensors", "*.model")


def with_absolute_paths(recipe: R, folder: Path) -> R:
    """The recipe with its paths absolute: relative ones are taken from the recipe's folder."""
    if isinstance(recipe, Preprocess):
        path = _absolute(recipe.tokenizer.path, folder)
        tokenizer = recipe.tokenizer.model_copy(update={"path": path})
        return recipe.model_copy(
            update={"sources": _absolute_sets(recipe.sources, folder), "tokenizer": tokenizer}
        )
    if isinstance(recipe, Convert):
        return recipe.model_copy(update={"source": _absolute_base(recipe.source, folder)})
    if isinstance(recipe, Midtrain):
        mix = recipe.mix.model_copy(update={"counts": _absolute(recipe.mix.counts, folder)})
        return recipe.model_copy(update={"init": _absolute_base(recipe.init, folder), "mix": mix})
    if isinstance(recipe, Tuning):
        named = recipe.tokenizer
        own = named is not None and not named.startswith("stage:")
        changes = {
            "init": _absolute_base(recipe.init, folder),
            "tokenizer": _absolute(named, folder) if own else named,
            "datasets": _absolute_sets(recipe.datasets, folder),
        }
        return cast(R, recipe.model_copy(update=changes))
    if isinstance(recipe, Merge):
        absolute = {one: _absolute_model(one, folder) for one in recipe.ingredients}
        return cast(R, recipe.with_models(absolute))
    if isinstance(recipe, Evaluation):
        folder_of_tasks = _absolute(recipe.task_folder, folder)
        return recipe.model_copy(update={"task_folder": folder_of_tasks})
    return recipe


def _absolute_sets(sets: tuple[S, ...], folder: Path) -> tuple[S, ...]:
    """Sources with absolute paths, in which nothing of the folder's name is a pattern."""
    pattern_safe = Path(glob.escape(str(folder)))
    return tuple(one.model_copy(update={"path": _absolute(one.path, pattern_safe)}) for one in sets)


def sets_of(recipe: Recipe) -> tuple[Source, ...] | tuple[ChatSet, ...]:
    """The collections that a recipe reads."""
    if isinstance(recipe, Preprocess):
        return recipe.sources
    return recipe.datasets if isinstance(recipe, Tuning) else ()


def tokenizer_path(recipe: Recipe) -> str | None:
    """The tokenizer that a recipe names by a path."""
    if isinstance(recipe, Preprocess):
        return recipe.tokenizer.path
    named = recipe.tokenizer if isinstance(recipe, Tuning) else None
    return None if named is None or named.startswith("stage:") else named


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


def _absolute_model(model: str, folder: Path) -> str:
    """A soup's model: a stage's export as it is, a folder's path, or `owner/name@revision`."""
    if export_named(model) is not None:
        return model
    return _absolute_base(f"hf:{model.removeprefix('hf:')}", folder).removeprefix("hf:")


def _models(recipe: Recipe) -> list[str]:
    """The models of a soup that no stage has made."""
    ingredients = recipe.ingredients if isinstance(recipe, Merge) else ()
    return [model for model in ingredients if export_named(model) is None]


def paths(recipe: Recipe) -> list[str]:
    """The files and folders that a recipe names (patterns as they are)."""
    found = [one.path for one in sets_of(recipe)]
    found.append(tokenizer_path(recipe))
    kind, _, where = _base(recipe).partition(":")
    if kind in ("hf", "checkpoint") and where.startswith("/"):
        found.append(glob.escape(where))
    found += [glob.escape(model) for model in _models(recipe) if model.startswith("/")]
    return [path for path in found if path is not None]


def hub_parts(recipe: Recipe) -> dict[str, hub.Wanted]:
    """What a recipe takes from the hub, by its part in the recipe.

    Raises:
        RequestError: a base is neither a path nor a repository.
    """
    found = {}
    if isinstance(recipe, Preprocess) and recipe.tokenizer.hf is not None:
        found["tokenizer"] = hub.tokenizer_of(recipe.tokenizer.hf)
    for one in sets_of(recipe):
        wanted = sources.wanted_of(one)
        if wanted is not None:
            found[one.name] = wanted
    base = _base(recipe)
    if base.startswith("hf:") and not base.startswith("hf:/"):
        found["base"] = hub.model_of(base)
    for model in _models(recipe):
        if not model.startswith("/"):
            found[f"model {model}"] = hub.model_of(model)
    return found


def _base(recipe: Recipe) -> str:
    """What a recipe starts from; empty for one that has no base."""
    return getattr(recipe, "source", None) or getattr(recipe, "init", None) or ""


def marks(recipe: Recipe) -> dict[str, str | None]:
    """What the recipe's own files look like now, by their part in the recipe.

    None stands for what is not fetched yet.

    Raises:
        RequestError: a source matches no file, or a folder is not there.
    """
    found: dict[str, str | None] = {}
    tokenizer = tokenizer_path(recipe)
    if tokenizer is not None:
        path = Path(tokenizer)
        found["tokenizer"] = (
            _mark([path]) if path.is_file() else mark_of_folder(path, "the tokenizer's")
        )
    for one in sets_of(recipe):
        if one.path is not None:
            found[one.name] = _mark(sources.files_of(one))
    if isinstance(recipe, Evaluation):
        found["harness"] = HARNESS.pinned()
        if recipe.task_folder is not None:
            found["tasks"] = _mark_of_tasks(Path(recipe.task_folder))
    base = _base(recipe)
    if base.startswith("hf:/"):
        found["base"] = mark_of_folder(Path(base.removeprefix("hf:")), "the base model's")
    for model in _models(recipe):
        if model.startswith("/"):
            found[f"model {model}"] = mark_of_folder(Path(model), "the model's")
    for part, wanted in hub_parts(recipe).items():
        try:
            found[part] = hub.find(wanted).mark
        except hub.NotFetchedError:
            found[part] = None
    return found


def counts(recipe: Recipe) -> dict[str, int] | None:
    """The table of counts that a recipe's mix names; None where it names none."""
    if not isinstance(recipe, Midtrain) or recipe.mix.counts is None:
        return None
    return read_counts(Path(recipe.mix.counts))


def read_counts(path: Path) -> dict[str, int]:
    """Read tokens by source: lines of NAME<TAB>TOKENS; empty ones and those with # are left out.

    Raises:
        RequestError: with the file and the line.
    """
    form = "write a source's name, a tab and its tokens as digits, such as web<TAB>1000000"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        said = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise RequestError(path, f"cannot be read: {said}", "check the table's path") from None
    found: dict[str, int] = {}
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        name, tab, tokens = line.partition("\t")
        if not tab or not re.fullmatch(SOURCE_NAME, name) or not re.fullmatch("[0-9]+", tokens):
            raise RequestError(f"{path}:{number}", f"{line!r} is not NAME<TAB>TOKENS", form)
        if name in found:
            raise RequestError(
                f"{path}:{number}", f"counts {name} twice", f"the first is in line {seen[name]}"
            )
        found[name], seen[name] = int(tokens), number
    if not found:
        raise RequestError(path, "counts nothing", form)
    return found


def mark_of_folder(folder: Path, whose: str) -> str:
    """A mark of a tokenizer's or a model's folder.

    Raises:
        RequestError: there is no such folder.
    """
    if not folder.is_dir():
        raise RequestError(folder, "there is no such folder", f"check {whose} path")
    return _mark(path for pattern in _MODEL_FILES for path in folder.glob(pattern))


def _mark_of_tasks(folder: Path) -> str:
    """Of what local tasks are: their content, which is small, and their names."""
    if not folder.is_dir():
        raise RequestError(folder, "there is no such folder of tasks", "check task_folder")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not any(path.suffix in (".yaml", ".yml") for path in files):
        raise RequestError(folder, "holds no task: a .yaml file of the harness's own form",
                           "docs/evaluation.md shows one")  # fmt: skip
    content = hashlib.sha256()
    for path in files:
        content.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    return f"{len(files)} files ({content.hexdigest()[:8]})"


def _mark(paths: Iterable[Path]) -> str:
    """Names, sizes and times of change, as `make` would compare them."""
    known = [(path.name, path.stat()) for path in sorted(set(paths))]
    content = repr([(name, facts.st_size, facts.st_mtime_ns) for name, facts in known])
    size = sum(facts.st_size for _, facts in known)
    digest = hashlib.sha256(content.encode()).hexdigest()[:8]
    return f"{len(known)} files of {size:,} bytes ({digest})"
