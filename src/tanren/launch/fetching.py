"""What recipes take from the hub: named, missing, fetched before a job starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path

from tanren.config.errors import RequestError
from tanren.config.load import read_recipe, recipe_path
from tanren.config.schema import STAGES, Recipe
from tanren.data import fetch, hub
from tanren.data.hub import Fetched, Wanted
from tanren.launch import inputs

# Shows how far a fetch is while it lasts.
Screen = Callable[[], AbstractContextManager[fetch.Report]]


def of_targets(
    targets: Iterable[str], variant: str | None, kind: hub.Kind, globs: tuple[str, ...]
) -> list[Wanted]:
    """What a command line names: recipes, folders of recipes, `hf:owner/name@revision`.

    Args:
        kind: of what is named by hand.
        globs: of what is named by hand; without any the whole data set, or what a model is made of.
    Raises:
        RequestError: a recipe is wrong, or there is none.
    """
    found: list[Wanted] = []
    for target in targets:
        if target.startswith("hf:"):
            found.append(_by_hand(target, kind, globs))
        elif globs:
            raise RequestError(
                f"--files {globs[0]}", f"goes with hf:owner/name, and {target} is a recipe",
                "a recipe says itself which files it needs",
            )  # fmt: skip
        else:
            for recipe in _recipes(Path(target), variant):
                found += inputs.hub_parts(recipe).values()
    return list(dict.fromkeys(found))


def _by_hand(target: str, kind: hub.Kind, globs: tuple[str, ...]) -> Wanted:
    if not globs and kind == "model":
        return hub.model_of(target)
    return Wanted(hub.parse(target, kind), globs or ("**",))


def _recipes(path: Path, variant: str | None) -> list[Recipe]:
    """A recipe file, or those of a folder; a variant counts where a stage has it."""
    path = path.resolve()
    if not path.is_dir():
        return [_read(path, variant)]
    files = [path / f"{stage}.yaml" for stage in STAGES]
    there = [file for file in files if file.exists() or recipe_path(file, variant).exists()]
    if not there:
        raise RequestError(path, "holds no recipe of a stage", f"such as {files[0].name}")
    return [_read(file, variant if recipe_path(file, variant).exists() else None) for file in there]


def _read(path: Path, variant: str | None) -> Recipe:
    _, recipe = read_recipe(path, variant, [])
    return inputs.with_absolute_paths(recipe, path.parent)


def missing(recipe: Recipe) -> dict[str, Wanted]:
    """What a recipe takes from the hub and what is not whole here, by its part in the recipe."""
    found = {}
    for part, wanted in inputs.hub_parts(recipe).items():
        try:
            hub.find(wanted)
        except hub.NotFetchedError:
            found[part] = wanted
    return found


def refuse_missing(recipe: Recipe, task: str) -> None:
    """Refuse a recipe whose files are not here: a compute node may not reach the hub."""
    for part, wanted in missing(recipe).items():
        raise RequestError(
            wanted.reference,
            f"({part}) is not fetched yet, and the nodes of a job may not reach the hub",
            f"make fetch TASK={task}",
        )


def fetch_missing(recipe: Recipe, screen: Screen, say: Callable[[str], None]) -> bool:
    """Fetch what a recipe takes from the hub and what is not here; whether there was anything."""
    found = missing(recipe)
    for wanted in found.values():
        fetch_shown(wanted, screen, say)
    return bool(found)


def fetch_shown(
    wanted: Wanted, screen: Screen, say: Callable[[str], None], *,
    workers: int = fetch.WORKERS, verify: bool = False, update: bool = False,
) -> Fetched:  # fmt: skip
    """Fetch, with the progress on a screen, and say what is there now."""
    with screen() as report:
        found = fetch.fetch(
            wanted, report, say, workers=workers, verify=verify, update=update
        )  # fmt: skip
    say(f"{wanted.reference} is there: {found.mark}")
    return found


def notes(recipe: Recipe, task: str) -> list[str]:
    """What a plan says of a recipe's references: not fetched, not pinned."""
    found = []
    absent = missing(recipe)
    parts: dict[hub.Reference, list[str]] = {}
    for part, wanted in inputs.hub_parts(recipe).items():
        parts.setdefault(wanted.reference, []).append(part)
    for reference, its_parts in parts.items():
        if unfetched := [part for part in its_parts if part in absent]:
            found.append(
                f"{reference} ({hub.shortened(unfetched)}) is not fetched yet: make fetch "
                f"TASK={task}, or a run on this machine does it first"
            )
        if reference.pinned:
            continue
        commit = hub.commit_of(reference)
        found.append(
            f"{reference} ({hub.shortened(its_parts)}) is not pinned; "
            + (
                f"here it is what it was when first fetched: write {reference.name}@{commit}"
                if commit
                else "the first fetch remembers its commit, and says it"
            )
        )
    return found
