"""order.json: what was asked for, frozen when a stage is submitted.

A recipe that is edited while its job waits does not change the job.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
from pydantic import Field, ValidationError

from tanren import provenance, runs
from tanren.config.errors import RequestError
from tanren.config.fields import Strict
from tanren.config.load import repository
from tanren.config.model import Model
from tanren.config.schema import STAGES
from tanren.launch.orders import Order
from tanren.plan.bench import Bench
from tanren.plan.paths import Part, RunFolder
from tanren.plan.plan import Machine, Request
from tanren.plan.references import base_of
from tanren.plan.site import Place


class Ordered(Strict):
    """A request without what only the job can know."""

    format: int = 1
    task: str
    stage: str
    variant: str | None
    name: str | None
    recipe_file: str
    runs: str
    recipe: dict[str, Any]
    model: Model | None
    runtime: str | None
    binds: tuple[str, ...]
    site: str
    type: str
    nodes: int
    hours: float
    # The run folder's name of the base.
    base: str | None = None
    # Run folders that must be DONE when the job starts.
    needs: tuple[str, ...] = ()
    part: Part | None = None
    bench: Bench | None = None
    changed: dict[str, tuple[Any, Any]] = Field(default_factory=dict)
    # The code when it was submitted; a job runs what the checkout is when it starts.
    commit: dict[str, Any] | None = None


def write(
    order: Order, request: Request, place: Place, folder: RunFolder, must_be_done: tuple[Path, ...]
) -> None:
    """Write down what is submitted.

    Args:
        must_be_done: run folders that must be done when the job starts.
    """
    frozen = Ordered(
        task=request.task,
        stage=request.stage,
        variant=request.variant,
        name=request.name,
        recipe_file=str(request.recipe_file),
        runs=str(request.runs),
        recipe=orjson.loads(request.recipe.model_dump_json()),
        model=request.model,
        base=base_of(request),
        runtime=order.runtime,
        binds=order.binds,
        site=place.site_name,
        type=place.type_name,
        nodes=place.nodes,
        hours=place.hours,
        needs=tuple(map(str, must_be_done)),
        part=request.part,
        bench=request.bench,
        changed=dict(request.changed),
        commit=provenance.git_commit(repository()),
    )
    runs.write_json(folder.order, orjson.loads(frozen.model_dump_json()))


def read(folder: RunFolder) -> tuple[Ordered, Request]:
    """What was submitted, as a request that lacks the machine and the products alone.

    Raises:
        RequestError: there is no such file, or another version of tanren wrote it.
    """
    try:
        order = Ordered.model_validate_json(folder.order.read_bytes())
        recipe = STAGES[order.stage].model_validate_json(orjson.dumps(order.recipe))
    except FileNotFoundError:
        raise RequestError(
            folder.order, "there is no such order", "submit the stage again"
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise RequestError(
            folder.order, f"was written by another version of tanren ({field}: {first['msg']})",
            "submit the stage again",
        ) from None  # fmt: skip
    request = Request(
        task=order.task,
        stage=order.stage,
        recipe=recipe,  # type: ignore[arg-type]
        recipe_file=Path(order.recipe_file),
        runs=Path(order.runs),
        machine=Machine(),
        variant=order.variant,
        name=order.name,
        model=order.model,
        part=order.part,
        bench=order.bench,
        base=order.base,
        changed=order.changed,
    )
    return order, request
