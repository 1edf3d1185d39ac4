"""What the plans of all training stages share: the base, the layout, precision, memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tanren.config.errors import RequestError
from tanren.config.model import Model
from tanren.config.training import Midtrain, Training, Tuning
from tanren.plan.batch import data_parallel_size, stated_steps, tokens_per_step
from tanren.plan.checks import check_layout, check_shape
from tanren.plan.cost import check_memory
from tanren.plan.memory import checkpoint_gib, states_gib
from tanren.plan.plan import Launch, Machine, Product, Request, own_image
from tanren.plan.references import product_of, reference

# A base that the recipe leaves to whoever starts the run, and how it is named.
GIVEN = "given"
GIVE_BASE = 'SET="init=hf:/FOLDER" or SET="init=checkpoint:/FOLDER/iter_0000500"'
# More than a node's CPUs reach in training, an assumption; and the longest that is begun on them.
CPU_TFLOPS = 1.0
MOST_CPU_DAYS = 30
# Settings of a run that may change on the way: how it lies over the processes, what it keeps.
FREE = (
    "layout", "micro_batch", "main_gradients", "attention", "linear", "checkpoints", "evaluation",
    "steps",
)  # fmt: skip


@dataclass(frozen=True)
class Start:
    """Where a training begins: a plan's `start`, `adapters` and `hf_source`, and notes.

    `identity` is what the base was made from, None while it is not made or where no stage made it.
    """

    start: str
    adapters: tuple[str, ...] = ()
    hf_source: str | None = None
    product: Product | None = None
    notes: tuple[str, ...] = ()

    @property
    def identity(self) -> str | None:
        return self.product.identity if self.product else None

    @property
    def result(self) -> Any:
        """What the stage that made the base wrote of it; empty while there is none."""
        return (self.product.result if self.product else None) or {}


def begin(request: Request, recipe: Training, *stages: str) -> Start:
    """The base of a training.

    Args:
        stages: those whose product can be one.
    Raises:
        RequestError: it is of another shape, or of another stage.
    """
    place, kind = str(request.recipe_file), recipe.init.partition(":")[0]
    assert request.model is not None
    if kind == GIVEN:
        note = f"the base is yours to give, and nothing starts without it: {GIVE_BASE}"
        return Start(recipe.init, notes=(note,))
    if kind == "hf":
        return Start(recipe.init, hf_source=recipe.init.removeprefix("hf:"))
    if kind != "stage":
        return Start(recipe.init)
    product = product_of(request, recipe.init, *stages)
    named, there = reference(recipe.init, request.variant, request.name), product.folder.root.name
    notes = (f"its base is {there}: there is no {named}",) if there != named else ()
    if product.result is None:
        return Start(recipe.init, product=product, notes=notes)
    check_shape(place, request.model, product.folder.root, product.result["model"])
    if product.stage == "merge":
        hf = str(product.result["hf"])
        return Start(f"hf:{hf}", hf_source=hf, product=product, notes=notes)
    checkpoint = str(product.folder.checkpoint(int(product.result["iteration"])))
    trained_by_lora = product.result.get("lora") is not None
    return Start(
        product.result["start"] if trained_by_lora else f"checkpoint:{checkpoint}",
        # It was trained beside its own base's, if it had some.
        adapters=(*product.result.get("adapters", ()), checkpoint) if trained_by_lora else (),
        hf_source=product.result["hf"],
        product=product,
        notes=notes,
    )


def check_fit(request: Request, recipe: Training) -> int:
    """Refuse a recipe that does not fit its model or its machine.

    Returns:
        the data-parallel size.
    """
    model, place = request.model, str(request.recipe_file)
    assert model is not None
    check_layout(recipe, model, request.machine.device, place)
    if recipe.sequence_length > model.max_positions:
        raise RequestError(
            f"{place}: sequence_length",
            f"{recipe.sequence_length} is over the model's max_positions {model.max_positions}",
            f"use at most {model.max_positions}, or a model that was trained for more",
        )
    return data_parallel_size(recipe.layout, request.machine.gpus, place)


def idle_note(request: Request, data_parallel: int, recipe: Training) -> tuple[str, ...]:
    """A note on GPUs that a stated layout leaves idle, and that are paid for."""
    gpus, used = request.machine.gpus, data_parallel * recipe.layout.model_parallel
    if used >= gpus:
        return ()
    return (
        f"{gpus - used} of {gpus} GPUs stay idle: the recipe says layout.data {data_parallel} "
        '(SET="layout.data=null" takes all)',
    )


def precision_of(request: Request, recipe: Training) -> Literal["bf16", "fp32"]:
    """The precision that `auto` means on this machine."""
    if recipe.precision != "auto":
        return recipe.precision
    return "bf16" if request.machine.gpus or request.machine.fast_bf16 else "fp32"


def launch_of(request: Request, recipe: Training, data_parallel: int) -> Launch:
    """The processes of a training.

    Raises:
        RequestError: they do not spread evenly over the nodes.
    """
    processes, nodes = data_parallel * recipe.layout.model_parallel, request.machine.nodes
    if processes % nodes:
        raise RequestError(
            f"{request.recipe_file}: layout",
            f"{processes} processes do not spread evenly over {nodes} nodes",
            f"state layout.data so that the processes are a multiple of {nodes}, or NODES=1",
        )
    return Launch(
        engine=True, processes=processes, device=request.machine.device, nodes=nodes,
        own=own_image(recipe),
    )  # fmt: skip


def room_of(
    request: Request, recipe: Training, data_parallel: int, accumulation: int
) -> dict[str, Any]:
    """The fields of a plan that say what memory and disk it takes.

    Raises:
        RequestError: a GPU has less memory.
    """
    model, gpu, precision = request.model, request.machine.gpu, precision_of(request, recipe)
    assert model is not None
    place = str(request.recipe_file)
    lora = recipe.lora if isinstance(recipe, Tuning) else None
    return {
        "checkpoint_gib": checkpoint_gib(model, precision, lora),
        "memory": check_memory(model, recipe, data_parallel, accumulation, precision, gpu, place)
        if gpu
        else None,
        "gpu_memory_gib": gpu.memory_gib if gpu else None,
    }


def refuse_processors(request: Request) -> None:
    """Refuse to train on CPUs what would take them months, or more memory than the machine has,
    before anything is made for it.

    Raises:
        RequestError: with how to have GPUs, or less to do.
    """
    recipe, model, machine = request.recipe, request.model, request.machine
    if not isinstance(recipe, Training) or model is None or machine.gpus:
        return
    place = str(request.recipe_file)
    if isinstance(recipe, Midtrain) and not request.bench:
        _refuse_months(recipe, model, machine, place)
    needed = states_gib(model, recipe, precision_of(request, recipe))
    if machine.memory_gib is not None and needed > machine.memory_gib:
        raise RequestError(
            place,
            f"weights, gradients and optimizer alone are {needed:.0f} GiB, and this machine has "
            f"{machine.memory_gib:.0f} and {_no_gpus(machine)}",
            _to_have_gpus(machine),
        )


def _refuse_months(recipe: Midtrain, model: Model, machine: Machine, place: str) -> None:
    steps = stated_steps(recipe) or 0
    work = model.flops_per_token(recipe.sequence_length) * tokens_per_step(recipe) * steps
    days = work / (CPU_TFLOPS * 1e12 * machine.nodes) / 86_400
    if days <= MOST_CPU_DAYS:
        return
    raise RequestError(
        place,
        f"{work:.2g} FLOP are {days:,.0f} days on CPUs, were they to reach {CPU_TFLOPS:g} TFLOP/s "
        f"a node, and {_no_gpus(machine)}",
        _to_have_gpus(machine),
    )


def _no_gpus(machine: Machine) -> str:
    if machine.idle_gpus:
        return f"its {machine.idle_gpus} GPUs need Transformer Engine, which this Python lacks"
    return "there are no GPUs"


def _to_have_gpus(machine: Machine) -> str:
    if machine.idle_gpus:
        return "make build-image brings it in an image"
    return (
        "SITE=... (recipes/sites) for a cluster's GPUs, with a TYPE= that has some; on CPUs a "
        "small model (TASK=tiny)"
    )


def refuse_given(recipe: Training, place: str) -> None:
    """Refuse to start from `init: given` before anything is made for it.

    Raises:
        RequestError: with how to name the base.
    """
    if recipe.init == GIVEN:
        raise RequestError(
            f"{place}: init",
            "is `given`: the recipe knows no base, so whoever starts the run names it",
            GIVE_BASE,
        )


def shape_settings(model: Model) -> dict[str, Any]:
    """The shape as a run's settings keep it."""
    return model.model_dump(mode="json")
