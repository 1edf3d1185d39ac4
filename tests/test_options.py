"""docs/options.md names fields, targets and variables that exist."""

from __future__ import annotations

import re

import pytest
from pydantic import BaseModel

from tanren.config.model import Model
from tanren.config.schema import STAGES
from tanren.config.site import Site, User
from tests.conftest import REPOSITORY

MAKEFILE = (REPOSITORY / "Makefile").read_text()
CONVERSIONS = (REPOSITORY / "src" / "tanren" / "cli" / "convert.py").read_text()
ROOTS: dict[str, type[BaseModel]] = {**STAGES, "model": Model, "site": Site, "user": User}
# What a recipe's field may be set to, said beside the field.
VALUES = {"delayed", "init: scratch", "init: given"}


def rows() -> list[tuple[str, str, str]]:
    lines = (REPOSITORY / "docs" / "options.md").read_text().splitlines()
    cells = [
        tuple(cell.strip() for cell in line.strip("|").split(" | "))
        for line in lines
        if line.startswith("| ") and not line.startswith(("| option |", "| ---"))
    ]
    assert len(cells) > 100
    return [(theirs, who, here) for theirs, who, here in cells]


def names(here: str) -> list[str]:
    return re.findall(r"`([^`]+)`", here)


def models_in(annotation: object) -> list[type[BaseModel]]:
    """The models that a field's type is made of: X, X | None, tuple[X, ...], Annotated[X, ...]."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    parts = getattr(annotation, "__args__", ())
    return [model for part in parts for model in models_in(part)]


def is_field(path: str) -> bool:
    root, *fields = path.split(".")
    models = [ROOTS[root]] if root in ROOTS else []
    for field in fields:
        found = [model.model_fields[field] for model in models if field in model.model_fields]
        if not found:
            return False
        models = [model for info in found for model in models_in(info.annotation)]
    return root in ROOTS and bool(fields)


def is_there(name: str) -> bool:
    if name in VALUES:
        return True
    if target := re.fullmatch(r"make ([a-z-]+)", name):
        return bool(re.search(rf"^{target[1]}:.*## ", MAKEFILE, re.MULTILINE))
    if variable := re.fullmatch(r"([A-Z]+)=\w*", name):
        return f"$({variable[1]})" in MAKEFILE
    if verb := re.fullmatch(r"tanren convert ([a-z-]+)", name):
        return f'@convert.command(\n    "{verb[1]}"' in CONVERSIONS
    return is_field(name)


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0][:60])
def test_a_replacement_exists(row: tuple[str, str, str]) -> None:
    _, who, here = row
    assert [name for name in names(here) if not is_there(name)] == []
    # Either something replaces it, or the row says that nothing does.
    assert names(here) or here.startswith(("always", "gone: ", "not yet")), here
    assert re.fullmatch(r"[1-5]( [1-5])*", who), who


def test_what_is_not_there_is_found_out() -> None:
    assert is_field("midtrain.optimizer.lr")
    assert is_field("preprocess.sources.path")
    for name in (
        "midtrain.optimizer.rate",
        "midtrain.seed.x",
        "make fly",
        "tanren convert hf-to-onnx",
        "WINGS=",
        "--lr",
        "user",
    ):
        assert not is_there(name), name
