"""What differs between a run and what is asked for now: settings, files, what lies below it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson

from tanren import runs
from tanren.config.data import Preprocess
from tanren.config.errors import RequestError
from tanren.config.merge import Merge
from tanren.config.training import Midtrain
from tanren.launch import inputs, origins, reading
from tanren.launch.orders import Order, order_of
from tanren.plan.make import make_plan
from tanren.plan.paths import PREPARING_STAGES
from tanren.plan.plan import Plan, Product, Request, comparable, differences, read_plan, settings_of


def between(before: Plan, plan: Plan) -> list[str]:
    """Each setting in which a plan differs from that of the run that is there.

    Files of another time but the same sizes are compared by their content, where the run's passport
    has all of it (files of at most 16 MiB): a copy or a fresh checkout is no change.
    """
    return differences(before.settings, _now(before.settings, before, plan))


def _now(was: Mapping[str, Any], before: Plan, plan: Plan) -> dict[str, Any]:
    """A plan's settings as they compare with those of a run that is there."""
    now = comparable(was, plan.settings)
    if "inputs" in now:
        now = {**now, "inputs": _same_content(before, now["inputs"], plan)}
    return now


def _same_content(before: Plan, marks: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """These marks, but those of before where a plan's files hold what the run's files held."""
    was = before.settings.get("inputs", {})
    other = [key for key, mark in marks.items() if mark != was.get(key)
             and _size(mark) is not None and _size(mark) == _size(was.get(key))]  # fmt: skip
    if not other:
        return dict(marks)
    passport = runs.read_json(before.folder.passport)
    attempts = (passport if isinstance(passport, dict) else {}).get("attempts") or [{}]
    then, now = attempts[-1].get("inputs") or {}, origins.inputs_of(plan)

    def same(key: str) -> bool:
        name = f"data {key}" if f"data {key}" in now else key
        old, new = then.get(name, {}), now.get(name, {})
        parts = ("files", "bytes", "sha256")
        if "sha256" not in new or old.get("sampled") or new.get("sampled"):
            return False
        return all(old.get(part) == new.get(part) for part in parts)

    return {key: was[key] if key in other and same(key) else mark for key, mark in marks.items()}


def _size(mark: object) -> str | None:
    """`3 files of 120 bytes` of a mark; None of one that is not of files."""
    size, found, _ = str(mark).partition(" bytes (")
    return size if found else None


def below(order: Order, request: Request) -> list[RequestError]:
    """What changed below a stage since it was made: files that became tokens, recipes.

    A file that is gone is no change: text may be removed once it is tokens. Of recipes those of the
    preparing stages are compared, with what --set made of them then; what trained a base may have
    changed since, and its run keeps what it was.
    """
    found = []
    if isinstance(request.recipe, Merge):  # of models, whatever made them
        return []
    for product in request.products.values():
        if product.result is None or not product.folder.plan.exists():
            continue
        before = read_plan(product.folder.plan)
        changed = _files(before)
        if changed:
            found.append(_refusal(product, "was made from other files", changed))
            continue
        changed = _settings(order, request, product, before)
        if changed:
            found.append(_refusal(product, "was made with other settings", changed))
    return found


def refuse_below(
    order: Order, request: Request, new: bool, say: Callable[[str], None]
) -> None:  # fmt: skip
    """Refuse a new run over what changed below it; of one that has begun, say so.

    Raises:
        RequestError: with what changed, and how to make it anew.
    """
    for change in below(order, request):
        if new:
            raise change
        say(f"note: {change.place} {change.problem}; this run has what was there before")


def _refusal(product: Product, problem: str, changed: list[str]) -> RequestError:
    root = product.folder.root
    return RequestError(
        root, f"{problem}: {'; '.join(changed[:6])}",
        f"rm -r {root}, and the same command makes it again; or put back what it was made from",
    )  # fmt: skip


def _files(before: Plan) -> list[str]:
    try:
        marks = inputs.marks(before.recipe)
    except RequestError:
        return []
    there = {key: mark for key, mark in marks.items() if mark is not None}
    was = before.settings.get("inputs", {})
    return [
        f"{key} {was.get(key)} then, {mark} now"
        for key, mark in _same_content(before, there, before).items()
        if was.get(key) != mark
    ]


def _settings(order: Order, request: Request, product: Product, before: Plan) -> list[str]:
    if product.stage not in PREPARING_STAGES:
        return []
    again = order_of(order, product.folder.root.name, product.stage)
    sets = tuple(f"{key}={orjson.dumps(after).decode()}" for key, (_, after) in
                 before.changed.items())  # fmt: skip
    try:
        now = make_plan(reading.read_request(replace(again, assignments=sets), request.machine))
    except RequestError:  # its recipe is gone, or is being changed: nothing here needs it
        return []
    # What this version of a recipe has more has its default then.
    was = {**before.settings, **settings_of(before.recipe)}
    found = differences(_from_here(was, before), _from_here(_now(was, before, now), now))
    recipe = before.recipe
    if isinstance(recipe, Preprocess) and not isinstance(request.recipe, Midtrain):
        # The tokenizer alone is read, which was trained on the sources or was not.
        parts = ("tokenizer", "inputs.tokenizer") + (
            ("sources", "inputs") if recipe.tokenizer.train else ()
        )
        found = [one for one in found if one.startswith(parts)]
    return found


def _from_here(settings: dict[str, Any], plan: Plan) -> Any:
    """Settings without the folder that a checkout lies in: another one has the same recipes."""
    # CHECKOUT/recipes/TASK/STAGE.yaml; a task may also lie anywhere else.
    folders = Path(plan.recipe_file).parents
    root = f"{folders[min(2, len(folders) - 1)]}/"
    return orjson.loads(orjson.dumps(settings).replace(root.encode(), b""))
