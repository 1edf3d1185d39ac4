"""What a command asks for: a stage of a recipe, and where and how it is to run."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path

from tanren.config.errors import RequestError
from tanren.config.load import read_recipe, read_user, recipe_path, repository
from tanren.config.schema import Recipe
from tanren.config.training import Training
from tanren.plan import training
from tanren.plan.bench import Bench, bench_recipe
from tanren.plan.plan import Request
from tanren.plan.site import Wish


@dataclass(frozen=True)
class Order:
    """A command line, taken apart but not yet read."""

    recipe_file: Path
    variant: str | None = None
    name: str | None = None
    assignments: tuple[str, ...] = ()
    # apptainer, singularity, native; None chooses by what is there.
    runtime: str | None = None
    # Folders that a container is to see besides those that the recipe names.
    binds: tuple[str, ...] = ()
    # A cluster's name, or local; None finds it out.
    site: str | None = None
    wish: Wish = field(default_factory=Wish)
    # Jobs to wait for, and how many jobs one run is cut into.
    after: tuple[str, ...] = ()
    chain: int = 1
    # Nodes that make the shards of preprocess, each by a job of its own; None for one job.
    parts: int | None = None
    # `field=value` of user.toml for this once.
    user: tuple[str, ...] = ()
    # The recipe of the variant may be absent: a stage that follows another has seldom one.
    plain_if_absent: bool = False
    # Run a few steps of the stage to measure it.
    bench: Bench | None = None
    # Submit code that no commit holds.
    allow_dirty: bool = False

    def command(self, verb: str) -> str:
        """This order as a command that can be pasted."""
        words = ["bin/tanren", verb, shown(self.recipe_file)]
        words += ["--variant", self.variant] if self.variant else []
        words += ["--name", self.name] if self.name else []
        for assignment in self.assignments:
            words += ["--set", assignment]
        words += ["--runtime", self.runtime] if self.runtime else []
        for bind in self.binds:
            words += ["--bind", bind]
        for assignment in self.user:
            words += ["--set", f"user.{assignment}"]
        words += ["--site", self.site] if self.site else []
        return shlex.join(words)


def shown(path: Path | str) -> str:
    """A path as a person would type it: relative where it is below the current folder."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def runs_root() -> Path:
    """Where run folders go: $RUNS, else user.toml's runs, else runs/ in the repository.

    Raises:
        RequestError: a file is in the way.
    """
    stated = os.environ.get("RUNS") or read_user().runs
    root = Path(stated).expanduser().resolve() if stated else repository() / "runs"
    there = next(path for path in (root, *root.parents) if path.exists())
    if not there.is_dir():
        raise RequestError(root, f"cannot be a folder: {there} is a file", "RUNS= names another")
    return root


def recipe_of(order: Order) -> tuple[str, Recipe]:
    """The stage and the recipe that an order names, with its variant and its changes."""
    path, variant = order.recipe_file.resolve(), order.variant
    if order.plain_if_absent and not recipe_path(path, variant).exists():
        variant = None
    stage, recipe = read_recipe(path, variant, list(order.assignments))
    return stage, bench_recipe(recipe, order.bench, path) if order.bench else recipe


def refuse_given(order: Order, recipe: Recipe) -> None:
    """Refuse to start from `init: given` before anything is made for it.

    Raises:
        RequestError: with how to name the base.
    """
    if isinstance(recipe, Training):
        training.refuse_given(recipe, str(order.recipe_file))


def refuse_start(order: Order, request: Request) -> None:
    """Refuse what cannot become of anything before something is made for it.

    Raises:
        RequestError: the base is not named or not there, or there are no GPUs for months of work.
    """
    refuse_given(order, request.recipe)
    if not request.folder.done.exists():
        training.refuse_processors(request)
        if request.begun is None:
            _refuse_without_checkpoint(order, request.recipe)


def _refuse_without_checkpoint(order: Order, recipe: Recipe) -> None:
    kind, _, where = recipe.init.partition(":") if isinstance(recipe, Training) else ("", "", "")
    if kind == "checkpoint" and not Path(where).is_dir():
        raise RequestError(
            f"{order.recipe_file}: init",
            f"there is no folder {where}",
            "name a checkpoint's own folder (.../iter_0000500), which holds .metadata",
        )


def check_name(value: str, option: str = "--name", also: str = "-") -> None:
    """Refuse a name that cannot be part of a folder's name.

    Args:
        also: what it may hold beside letters, digits, _ and a dot.
    """
    if not re.fullmatch(rf"[A-Za-z0-9_][A-Za-z0-9_.{also}]*", value):
        raise RequestError(
            f"{option} {value}",
            "cannot be part of a folder's name",
            "use letters, digits, _ and . (in a name - as well)",
        )


def check_names(order: Order) -> None:
    """Variant and name become parts of a folder's name, from which both can be read back."""
    if order.variant is not None:
        check_name(order.variant, "--variant", "")
    if order.name is not None:
        check_name(order.name)


def order_of(order: Order, folder_name: str, stage: str) -> Order:
    """The order of another run of the same task, by its folder's name."""
    rest = folder_name.removeprefix(stage)
    variant, _, name = rest.removeprefix(".").partition("-") if rest else ("", "", "")
    return replace(
        order,
        recipe_file=order.recipe_file.with_name(f"{stage}.yaml"),
        variant=variant if rest.startswith(".") else None,
        name=(name if rest.startswith(".") else rest.removeprefix("-")) or None,
        assignments=(),
        plain_if_absent=False,
        bench=None,
        # What was asked for the stage itself: its size, its parts.
        wish=Wish(),
        chain=1,
        parts=None,
    )
