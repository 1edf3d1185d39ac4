"""What pydantic finds wrong in a document, in words for a person."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tanren.config.fields import FORMS, Strict

if TYPE_CHECKING:
    from tanren.config.load import Document

Location = tuple[str | int, ...]

FLOAT_HINT = "YAML reads a number such as 5e-5 as text: write 5.0e-5"


def explain(
    document: Document, model: type[Strict], errors: Sequence[Any]
) -> list[tuple[str, str]]:
    """Each problem's place and what it is.

    Args:
        errors: those of pydantic's ValidationError.
    """
    return [_explain(document, model, item) for item in _in_order(errors)]


def _in_order(errors: Sequence[Any]) -> list[Any]:
    """What is misspelled before what is missing, since often it is the same; a list whose items are
    wrong is not empty for a person.
    """

    def has_wrong_items(place: Location) -> bool:
        return any(
            item["loc"][: len(place)] == place and len(item["loc"]) > len(place) for item in errors
        )

    kept = [
        item
        for item in errors
        if not (item["type"] == "too_short" and has_wrong_items(item["loc"]))
    ]
    return sorted(kept, key=lambda item: bool(item["type"] == "missing"))


def value_at(values: dict[str, Any], location: Location) -> Any:
    """The value at a place; None where there is none."""
    value: Any = values
    for part in location:
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def _looks_like_float(value: object) -> bool:
    try:
        return isinstance(value, str) and float(value) is not None
    except ValueError:
        return False


def _explain(document: Document, model: type[Strict], item: Any) -> tuple[str, str]:
    location: Location = _without_branch(document, tuple(item["loc"]))
    kind, message = item["type"], item["msg"]
    if kind == "extra_forbidden":
        parent = _model_at(model, location[:-1])
        known = list(parent.model_fields) if parent else []
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        return document.place(location), f"is not a field here{meant}" + (
            f"; the fields are {', '.join(known)}" if known else ""
        )
    if kind == "missing":
        return document.place(location), "is missing"
    if kind == "value_error":
        return document.place(location), message.removeprefix("Value error, ")
    value = value_at(document.values, location)
    if kind == "string_pattern_mismatch" and item["ctx"]["pattern"] in FORMS:
        form = FORMS[item["ctx"]["pattern"]]
        return document.place(location), f"{value!r} is not of the form {form}"
    hint = f". {FLOAT_HINT}" if _looks_like_float(value) else ""
    return document.place(location), f"{value!r}: {message[0].lower()}{message[1:]}{hint}"


def _without_branch(document: Document, location: Location) -> Location:
    """Pydantic ends the place of `int | "latest"` with the branch, which is no field."""
    leaf = location[:-1]
    scalar = leaf and not isinstance(value_at(document.values, leaf), dict | list | type(None))
    return leaf if scalar else location


def _model_at(model: type[Strict], location: Location) -> type[Strict] | None:
    """The model behind a nested field, to name the fields that it has."""
    for part in location:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(str(part))
        if field is None:
            return None
        nested = [
            kind
            for kind in (field.annotation, *getattr(field.annotation, "__args__", ()))
            if isinstance(kind, type) and issubclass(kind, Strict)
        ]
        if not nested:
            return None
        model = nested[0]
    return model
