"""Reads YAML recipes, model shapes, sites and user.toml into the frozen models of `schema`.

Errors point at a line of a file: the YAML tree is walked before it becomes values, so that every
field remembers where it was written.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, TypeVar, cast

import orjson
import yaml
from pydantic import ValidationError

from tanren.config.errors import RequestError
from tanren.config.explain import Location, explain, value_at
from tanren.config.fields import Strict
from tanren.config.model import Model
from tanren.config.schema import STAGES, Recipe
from tanren.config.site import Site, User

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

M = TypeVar("M", bound=Strict)


class _Loader(yaml.SafeLoader):
    """SafeLoader, asked for one node at a time by `_build`."""


@dataclass(frozen=True)
class Document:
    """The values of a YAML file and where each was written."""

    path: Path
    values: dict[str, Any]
    places: dict[Location, str]

    def place(self, location: Location) -> str:
        """`file:line: field` of the nearest field that the file really has; the file alone of what
        several fields say together, which has no line.
        """
        if not location:
            return str(self.path)
        for length in range(len(location), -1, -1):
            if location[:length] in self.places:
                where = self.places[location[:length]]
                break
        else:
            where = str(self.path)
        field = ".".join(str(part) for part in location)
        return f"{where}: {field}" if field else where


def read_yaml(path: Path) -> Document:
    """Read one YAML mapping.

    Raises:
        RequestError: the file is missing, is not YAML, is not a mapping, repeats a key, or holds
            a sexagesimal number (24:00:00, which YAML 1.1 reads as 86400).
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RequestError(path, "there is no such file", _similar_files(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(
            path, f"cannot be read: {error}", f"ls -l {path}; it must be readable text in UTF-8"
        ) from None
    places: dict[Location, str] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        values = (
            {}
            if node is None
            else _build(loader, node, (), places, lambda mark: f"{path}:{mark.line + 1}")
        )
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise RequestError(f"{path}{line}", f"not YAML: {error.problem}", "") from None
    except yaml.reader.ReaderError as error:
        row = text.count("\n", 0, error.position) + 1
        raise RequestError(
            f"{path}:{row}",
            f"not YAML: holds the control character {error.character:#04x}",
            "remove it; an editor may not show it",
        ) from None
    if not isinstance(values, dict):
        raise RequestError(
            path,
            f"holds a {type(values).__name__}, not fields with values",
            "write `field: value` lines",
        )
    return Document(path, values, places)


def _build(
    loader: _Loader,
    node: yaml.Node,
    location: Location,
    places: dict[Location, str],
    where: Callable[[yaml.Mark], str],
) -> Any:
    place = where(node.start_mark)
    field = ".".join(str(part) for part in location)
    places.setdefault(location, place)
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = where(key_node.start_mark)
            if not isinstance(key_node, yaml.ScalarNode):
                raise RequestError(f"{place}: {field}" if field else place, "a field needs a name",
                                   "write a word before the colon")  # fmt: skip
            # As it is written: `no`, 1.10 and 2024_01 are names here, not values.
            key = key_node.value
            here = (*location, key)
            if key in result:
                raise RequestError(
                    f"{place}: {'.'.join(map(str, here))}",
                    "is stated twice",
                    f"the first is at {places[here]}",
                )
            places[here] = place
            result[key] = _build(loader, value_node, here, places, where)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [
            _build(loader, child, (*location, index), places, where)
            for index, child in enumerate(node.value)
        ]
    try:
        value = loader.construct_object(node)
    except ValueError as error:  # 2020-13-45 looks like a date and is none
        raise RequestError(f"{place}: {field}", f"{node.value}: {error}", "quote it") from None
    if isinstance(value, int | float) and ":" in node.value:
        raise RequestError(
            f"{place}: {field}",
            f"YAML reads {node.value} as {value}",
            "write hours as a number, such as walltime_hours: 24",
        )
    if (isinstance(value, float) and not math.isfinite(value)) or (
        isinstance(value, int) and not -(2**63) <= value < 2**63
    ):
        raise RequestError(
            f"{place}: {field}", f"{node.value} is not a number that can be used",
            "state a finite one, of at most 63 bits",
        )  # fmt: skip
    if isinstance(value, date | bytes):  # datetime is a date
        return node.value
    return value


def parse_set(assignments: list[str]) -> list[tuple[tuple[str, ...], Any]]:
    """Read `a.b=c` assignments; the right side is YAML, so 8, true, 1.0e-5 and [1, 2] work."""
    result = []
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        keys = tuple(key.split("."))
        if not equals or not all(keys):
            raise RequestError(
                f"--set {assignment}",
                "is not of the form field.subfield=value",
                "for example --set optimizer.lr=1.0e-4",
            )
        try:
            loader = _Loader(text)
            node = loader.get_single_node()
            value = None if node is None else _build(loader, node, keys, {}, lambda _: "--set")
        except yaml.YAMLError as error:
            said = getattr(error, "problem", None) or getattr(error, "reason", error)
            raise RequestError(
                f"--set {assignment}", f"the value is not YAML: {said}",
                "quote what YAML would read otherwise: --set 'field=\"a: b\"'",
            ) from None  # fmt: skip
        result.append((keys, value))
    return result


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it; mappings are merged, everything else is replaced."""
    result = dict(base)
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = merge(result[key], value)
        else:
            result[key] = value
    return result


def recipe_path(path: Path, variant: str | None) -> Path:
    """The file of a recipe, or of its variant beside it (midtrain.yaml → midtrain.100B.yaml)."""
    return path.with_name(f"{path.stem}.{variant}{path.suffix}") if variant else path


def read_recipe(path: Path, variant: str | None, assignments: list[str]) -> tuple[str, Recipe]:
    """Read a recipe file with its base, its variant and the --set changes.

    Returns:
        the stage's name (the first part of the file's name) and its recipe.
    """
    stage = path.name.split(".")[0]
    if stage not in STAGES:
        known = ", ".join(f"{name}.yaml" for name in STAGES)
        raise RequestError(path, "the file's name is not that of a stage", f"one of {known}")
    document = _with_base(recipe_path(path, variant), [])
    values, places = document.values, dict(document.places)
    for keys, value in parse_set(assignments):
        nested: Any = value
        for key in reversed(keys):
            nested = {key: nested}
        values = merge(values, nested)
        # A section that only --set names was not written in the file.
        sections = {keys[:length]: "--set" for length in range(1, len(keys))}
        places = _overlay(sections | places, _places_of(nested, (), "--set"), values)
    changed = Document(document.path, values, places)
    return stage, cast(Recipe, validate(changed, STAGES[stage]))


def changed_fields(
    path: Path, variant: str | None, assignments: list[str]
) -> dict[str, tuple[Any, Any]]:
    """What the variant and the --set changes make of a recipe's fields: before and after.

    A field that one of both does not state is None there. Without a plain recipe beside the
    variant, before is nothing.
    """
    plain = _with_base(path, []).values if path.exists() else {}
    there = recipe_path(path, variant)
    values = _with_base(there, []).values if there.exists() else plain
    for keys, value in parse_set(assignments):
        nested: Any = value
        for key in reversed(keys):
            nested = {key: nested}
        values = merge(values, nested)
    before, after = _flat(plain), _flat(values)
    return {
        key: (before.get(key), after.get(key))
        for key in [*before, *(key for key in after if key not in before)]
        if before.get(key) != after.get(key)
    }


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return found


def _places_of(value: Any, location: Location, place: str) -> dict[Location, str]:
    """The same place for every value that is not a mapping, and for what is inside lists."""
    items = value.items() if isinstance(value, dict) else ()
    inside = {
        where: place for key, inner in items for where in _places_of(inner, (*location, key), place)
    }
    return inside or {location: place}


def _overlay(
    below: dict[Location, str], above: dict[Location, str], values: dict[str, Any]
) -> dict[Location, str]:
    """The places of two merged files; what was inside a replaced value is forgotten."""
    replaced = {where for where in above if where and not isinstance(value_at(values, where), dict)}
    kept = {
        where: place
        for where, place in below.items()
        if not any(where[:length] in replaced for length in range(1, len(where) + 1))
    }
    return kept | above


def _with_base(path: Path, seen: list[Path]) -> Document:
    """A file laid over the file that its `base:` names, and so on."""
    document = read_yaml(path)
    base = document.values.get("base")
    if base is None:
        return document
    if not isinstance(base, str):
        raise RequestError(
            document.place(("base",)), f"{base!r} is not the name of a recipe file",
            "name one that lies beside it, such as base: midtrain.yaml",
        )  # fmt: skip
    if path.resolve() in seen:
        raise RequestError(
            document.place(("base",)), f"{path.name} is its own base in the end",
            "take `base:` out of one of the files",
        )  # fmt: skip
    below = _with_base(path.parent / base, [*seen, path.resolve()])
    values = {key: value for key, value in document.values.items() if key != "base"}
    merged = merge(below.values, values)
    return Document(path, merged, _overlay(below.places, document.places, merged))


def validate(document: Document, model: type[M]) -> M:
    """Values to a frozen model; every problem of the file in one message.

    Raises:
        RequestError: with one line for each field that is wrong.
    """
    try:
        # JSON is pydantic's strict mode for files: a list is a tuple, text is never a number.
        return model.model_validate_json(orjson.dumps(document.values))
    except ValidationError as error:
        problems = explain(document, model, error.errors())
    place, problem = problems[0]
    others = [f"also {where}: {what}" for where, what in problems[1:]]
    raise RequestError(place, problem, "\n        ".join(others))


def _similar_files(path: Path) -> str:
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist either"
    names = sorted(p.name for p in path.parent.iterdir() if not p.name.startswith("."))
    return f"{path.parent} has {', '.join(names)}" if names else f"{path.parent} is empty"


def repository() -> Path:
    """The root of the checkout that this code runs from."""
    return Path(__file__).resolve().parents[3]


def read_model(name: str) -> Model:
    """A model's shape by its name: recipes/models/NAME.yaml."""
    return validate(read_yaml(repository() / "recipes" / "models" / f"{name}.yaml"), Model)


def read_site(name: str) -> Site:
    """A site by its name (recipes/sites/NAME.yaml), or by the path of a file of one's own."""
    own = Path(name).expanduser()
    path = own if own.suffix == ".yaml" else repository() / "recipes" / "sites" / f"{name}.yaml"
    return validate(read_yaml(path), Site)


def sites() -> dict[str, Site]:
    """Every site that the repository knows, by name."""
    found = sorted((repository() / "recipes" / "sites").glob("*.yaml"))
    assert found, "recipes/sites is empty"
    return {path.stem: read_site(path.stem) for path in found}


def read_user(assignments: Iterable[str] = ()) -> User:
    """user.toml at the root of the repository (or where TANREN_USER names it); may be absent.

    Args:
        assignments: `field=value` changes, from SET="user.field=value".
    """
    named = os.environ.get("TANREN_USER")
    path = Path(named or repository() / "user.toml")
    if not path.is_file():
        if named:
            raise RequestError(
                path, "TANREN_USER names a file that is not there",
                "name one that is, or unset TANREN_USER",
            )  # fmt: skip
        values: dict[str, Any] = {}
    else:
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise RequestError(
                path,
                f"not TOML: {error}",
                f"mend that line; fields are {', '.join(User.model_fields)}",
            ) from None
    for keys, value in parse_set(list(assignments)):
        values = merge(values, {".".join(keys): value})
    return validate(Document(path, values, {}), User)
