"""The plan: recipe + site + what is there → one frozen value, computed without torch, clock, disk.

Only plan.json crosses into the container, so a plan holds everything that a stage needs to know.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import orjson
from pydantic import Field, TypeAdapter, ValidationError

from tanren.config.errors import RequestError
from tanren.config.schema import (
    STAGES,
    Convert,
    Export,
    Midtrain,
    Model,
    Preprocess,
    Recipe,
    Strict,
)
from tanren.plan.batch import (
    Batch,
    check_divides,
    data_parallel_size,
    make_batch,
    stated_steps,
)
from tanren.plan.checks import check_layout, check_schedule, check_shape, check_vocabulary
from tanren.plan.cost import Gpu, check_memory, estimated_hours
from tanren.plan.memory import Memory, checkpoint_gib
from tanren.plan.mix import Mixture, SourceCount, count_notes, make_mixture
from tanren.plan.paths import TRAINING_STAGES, Part, RunFolder, run_name

# A base that the recipe leaves to whoever starts the run, and how it is named.
GIVEN = "given"
GIVE_BASE = 'SET="init=hf:/FOLDER" or SET="init=checkpoint:/FOLDER/iter_0000500"'


@dataclass(frozen=True)
class Machine:
    """What the machine that runs the stage has."""

    gpus: int = 0
    # GPUs that stay idle because Transformer Engine, which the engine needs there, is missing.
    idle_gpus: int = 0
    nodes: int = 1
    fast_bf16: bool = False
    cores: int = 1
    # Of the smallest GPU; None where there is none or its size is not known.
    gpu: Gpu | None = None

    @property
    def device(self) -> Literal["cuda", "cpu"]:
        return "cuda" if self.gpus else "cpu"


@dataclass(frozen=True)
class Product:
    """The outcome of another stage as its run folder shows it.

    `result` is what the stage wrote into DONE, None while there is none. `started` is the digest
    of the settings that the run was started with, `iterations` its whole checkpoints.
    """

    stage: str
    folder: RunFolder
    result: Mapping[str, Any] | None = None
    started: str | None = None
    iterations: tuple[int, ...] = ()

    @property
    def identity(self) -> str | None:
        """A digest of the settings and the content that the product was made from."""
        return str(self.result["identity"]) if self.result else None


@dataclass(frozen=True)
class Begun:
    """A run that has begun, as its folder shows it.

    `settings` and `data_start` are of the plan that it was last started with, `iteration` is where
    it would go on.
    """

    settings: Mapping[str, Any]
    data_start: int
    iteration: int


@dataclass(frozen=True)
class Request:
    """What a person asked for, with every file read."""

    task: str
    stage: str
    recipe: Recipe
    recipe_file: Path
    runs: Path
    machine: Machine
    variant: str | None = None
    name: str | None = None
    model: Model | None = None
    products: Mapping[str, Product] = field(default_factory=dict)
    # A mark of each file that the recipe names, by its part in the recipe; None before it is there.
    inputs: Mapping[str, str | None] = field(default_factory=dict)
    # The table that a mix names: tokens by source.
    counts: Mapping[str, int] | None = None
    # What this run's own folder holds; None for a new run.
    begun: Begun | None = None
    # The part of the stage that is asked for; None for the whole.
    part: Part | None = None

    @property
    def folder(self) -> RunFolder:
        whole = RunFolder(self.runs / self.task / run_name(self.stage, self.variant, self.name))
        return whole.part(self.part) if self.part else whole


class Launch(Strict):
    """Processes of the stage, on all nodes. Those of the `engine` join a process group."""

    engine: bool
    processes: int
    device: Literal["cuda", "cpu"]
    nodes: int = 1

    @property
    def torchrun(self) -> bool:
        """Whether torchrun starts them. One process needs it not, and saves its two seconds."""
        return self.processes > 1

    @property
    def processes_per_node(self) -> int:
        return self.processes // self.nodes


class PlanBase(Strict):
    """What the plans of all stages share."""

    format: Literal[1] = 1
    task: str
    variant: str | None
    name: str | None
    recipe_file: str
    run: str
    launch: Launch
    # What the result depends on. A run goes on, or counts as done, only under equal settings.
    settings: dict[str, Any]
    # What a person should know beside the numbers.
    notes: tuple[str, ...] = ()

    @property
    def folder(self) -> RunFolder:
        return RunFolder(Path(self.run))


class PreprocessPlan(PlanBase):
    stage: Literal["preprocess"] = "preprocess"
    recipe: Preprocess
    # Not in the settings: how many make the shards changes nothing in them.
    part: Part | None = None


class ConvertPlan(PlanBase):
    stage: Literal["convert"] = "convert"
    recipe: Convert
    model: Model
    tokenizer: str | None


class MidtrainPlan(PlanBase):
    stage: Literal["midtrain"] = "midtrain"
    recipe: Midtrain
    model: Model
    precision: Literal["bf16", "fp32"]
    batch: Batch
    # None while the tokens are not known: preprocess has not run, and the recipe has no counts.
    mix: Mixture | None
    # The iteration at which the run began to read its present data: 0, but after `new-data`.
    data_start: int = 0
    # The folder of the preprocessed data, and its tokenizer's facts.
    data: str
    # `scratch`, `hf:PATH` or `checkpoint:PATH`: a stage is already turned into its checkpoint.
    start: str
    # The Hugging Face folder that tokenizer and generation config are exported from.
    hf_source: str | None
    # Of one GPU, in GiB; None where the GPU is not known.
    memory: Memory | None = None
    gpu_memory_gib: float | None = None
    # Of one checkpoint. The run keeps `checkpoints.keep_last` and the one that is being written.
    checkpoint_gib: float = 0.0
    # Hours of training and the assumption behind them; None where they cannot be estimated.
    hours: tuple[float, str] | None = None


class ExportPlan(PlanBase):
    stage: Literal["export"] = "export"
    recipe: Export
    # The run folder that is exported from, and which of its checkpoints; None while it has none.
    source: str
    iteration: int | None


Plan = Annotated[
    PreprocessPlan | ConvertPlan | MidtrainPlan | ExportPlan, Field(discriminator="stage")
]
_PLAN: TypeAdapter[Plan] = TypeAdapter(Plan)


def digest(value: Any) -> str:
    """A short SHA-256 of any JSON value, independent of the order of keys."""
    return hashlib.sha256(orjson.dumps(value, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]


def read_plan(path: Path) -> Plan:
    """Read a plan.json."""
    try:
        return _PLAN.validate_json(path.read_bytes())
    except FileNotFoundError:
        raise RequestError(path, "there is no such plan") from None
    except ValidationError as error:
        first = error.errors()[0]
        field_name = ".".join(str(part) for part in first["loc"])
        raise RequestError(
            path,
            f"was written by another version of tanren ({field_name}: {first['msg']})",
            "run the stage under a new NAME=, or check out the commit that its passport names",
        ) from None


def reference(stage_reference: str, variant: str | None, name: str | None) -> str:
    """The run folder's name that `stage:X` means inside a run of this variant and name.

    Training stages follow the run's variant and name, so that an export of NAME=a never takes the
    weights of another run. Preparing stages are shared. A full name (`stage:midtrain-a`) is taken
    as it is.
    """
    stage = stage_reference.removeprefix("stage:")
    return run_name(stage, variant, name) if stage in TRAINING_STAGES else stage


def references(recipe: Recipe) -> tuple[str, ...]:
    """Every `stage:X` that a recipe stands on, in the order in which to make them."""
    if isinstance(recipe, Convert):
        found = [recipe.tokenizer]
    elif isinstance(recipe, Midtrain):
        found = [recipe.data, recipe.init]
    elif isinstance(recipe, Export):
        found = [recipe.of]
    else:
        found = []
    return tuple(r for r in found if r is not None and r.startswith("stage:"))


def stage_of(folder_name: str) -> str:
    """The stage of a run folder's name (`midtrain.100B-try2` → `midtrain`)."""
    for stage in STAGES:
        if folder_name == stage or folder_name.startswith((stage + ".", stage + "-")):
            return stage
    raise RequestError(
        f"stage:{folder_name}", "names no stage", f"the stages are {', '.join(STAGES)}"
    )


def make_plan(request: Request) -> Plan:
    """Plan a stage.

    Raises:
        RequestError: the recipe does not fit the machine, its data or its base.
    """
    recipe = request.recipe
    if isinstance(recipe, Preprocess):
        return _preprocess_plan(request, recipe)
    if isinstance(recipe, Convert):
        return _convert_plan(request, recipe)
    if isinstance(recipe, Midtrain):
        return _midtrain_plan(request, recipe)
    return _export_plan(request, recipe)


def _common(request: Request, settings: dict[str, Any], launch: Launch) -> dict[str, Any]:
    return {
        "task": request.task,
        "variant": request.variant,
        "name": request.name,
        "recipe_file": str(request.recipe_file),
        "run": str(request.folder.root),
        "launch": launch,
        "settings": settings,
    }


def _settings(recipe: Strict, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    dumped: dict[str, Any] = orjson.loads(recipe.model_dump_json())
    # What is asked of a scheduler, and how fast it once was, change no result.
    left_out = (*without, "job", "measured")
    return {key: value for key, value in dumped.items() if key not in left_out}


def _product(request: Request, stage_reference: str, *stages: str) -> Product:
    """The product that a recipe refers to, which must be of one of these stages."""
    product = request.products[reference(stage_reference, request.variant, request.name)]
    if product.stage not in stages:
        raise RequestError(
            request.recipe_file,
            f"{stage_reference} is a {product.stage} stage",
            f"here it must be {' or '.join(f'stage:{stage}' for stage in stages)}",
        )
    return product


def _preprocess_plan(request: Request, recipe: Preprocess) -> PreprocessPlan:
    if request.part is not None and recipe.tokenizer.train is not None:
        raise RequestError(
            f"{request.recipe_file}: tokenizer.train",
            f"would train a tokenizer in each of {request.part.of} parts, and all need the same",
            "train it once, by preprocess without PARTS on some of the text, and name its folder: "
            "tokenizer: {path: runs/TASK/preprocess/tokenizer}",
        )
    return PreprocessPlan(
        **_common(
            request,
            _settings(recipe) | {"inputs": dict(request.inputs)},
            Launch(engine=False, processes=1, device="cpu"),
        ),
        recipe=recipe,
        part=request.part,
    )


def _convert_plan(request: Request, recipe: Convert) -> ConvertPlan:
    assert request.model is not None
    inputs: dict[str, Any] = dict(request.inputs)
    tokenizer = None
    if recipe.tokenizer is not None:
        product = _product(request, recipe.tokenizer, "preprocess")
        tokenizer = str(product.folder.tokenizer)
        inputs["tokenizer"] = product.identity
        if product.result:
            check_vocabulary(
                request.recipe_file, request.model, product.result["vocabulary_size"], tokenizer
            )
    settings = _settings(recipe) | {"shape": _settings(request.model), "inputs": inputs}
    return ConvertPlan(
        **_common(request, settings, Launch(engine=False, processes=1, device="cpu")),
        recipe=recipe,
        model=request.model,
        tokenizer=tokenizer,
    )


def _midtrain_plan(request: Request, recipe: Midtrain) -> MidtrainPlan:
    model, place = request.model, str(request.recipe_file)
    assert model is not None
    check_layout(recipe, model, request.machine.device, place)
    if recipe.sequence_length > model.max_positions:
        raise RequestError(
            f"{place}: sequence_length",
            f"{recipe.sequence_length} is over the model's max_positions {model.max_positions}",
            f"use at most {model.max_positions}, or a model that was trained for more",
        )
    data_parallel = data_parallel_size(recipe.layout, request.machine.gpus, place)
    data = data_of(request, recipe)
    if data.result:
        check_vocabulary(place, model, data.result["vocabulary_size"], data.folder.tokenizer)
    data_start = _data_start(request, recipe, data)
    mix, steps, notes = _mix(request, recipe, data, data_start)
    batch = make_batch(recipe, data_parallel, place, steps=steps)
    if recipe.evaluation:
        check_divides(
            f"{place}: evaluation.sequences", recipe.evaluation.sequences, recipe, data_parallel
        )
    check_schedule(recipe, batch.steps, place)

    inputs: dict[str, Any] = {**request.inputs, "data": data.identity}
    start, hf_source = recipe.init, None
    if recipe.init.startswith("stage:"):
        base = _product(request, recipe.init, "convert", "midtrain")
        inputs["init"] = base.identity
        if base.result:
            check_shape(place, model, base.folder.root, base.result["model"])
            iteration = int(base.result["iteration"])
            start = f"checkpoint:{base.folder.checkpoint(iteration)}"
            hf_source = base.result["hf"]
    elif recipe.init == GIVEN:
        notes = (f"the base is yours to give, and nothing starts without it: {GIVE_BASE}", *notes)
    elif recipe.init.startswith("hf:"):
        hf_source = recipe.init.removeprefix("hf:")

    precision = recipe.precision
    if precision == "auto":
        precision = "bf16" if request.machine.gpus or request.machine.fast_bf16 else "fp32"
    # A run may change how it lies over the processes and what it keeps; the rest makes the result.
    settings = _settings(
        recipe,
        without=("layout", "micro_batch", "checkpoints", "evaluation", "steps", "tokens", "resume"),
    ) | {
        "mix": _mix_settings(recipe),
        "shape": _settings(model),
        "steps": batch.steps,
        "precision": precision,
        "inputs": inputs,
    }
    processes = data_parallel * recipe.layout.model_parallel
    nodes = request.machine.nodes
    if processes % nodes:
        raise RequestError(
            f"{place}: layout",
            f"{processes} processes do not spread evenly over {nodes} nodes",
            f"state layout.data so that the processes are a multiple of {nodes}, or NODES=1",
        )
    launch = Launch(engine=True, processes=processes, device=request.machine.device, nodes=nodes)
    gpu = request.machine.gpu
    return MidtrainPlan(
        **_common(request, settings, launch),
        recipe=recipe,
        model=model,
        precision=precision,
        batch=batch,
        mix=mix,
        data_start=data_start,
        notes=notes,
        data=str(data.folder.root),
        start=start,
        hf_source=hf_source,
        checkpoint_gib=checkpoint_gib(model, precision),
        memory=check_memory(model, recipe, batch, precision, gpu, place) if gpu else None,
        gpu_memory_gib=gpu.memory_gib if gpu else None,
        hours=estimated_hours(model, recipe, batch, gpu, processes) if gpu else None,
    )


def _mix(
    request: Request, recipe: Midtrain, data: Product, data_start: int
) -> tuple[Mixture | None, int, tuple[str, ...]]:
    """The mix over what preprocess counted, else over the recipe's table; the steps; notes.

    Raises:
        RequestError: the steps follow from the mix, and there are no counts yet.
    """
    place = str(request.recipe_file)
    counts, table = source_counts(data), recipe.mix.counts
    if table is not None and Path(table).is_relative_to(request.recipe_file.parent):
        table = str(Path(table).relative_to(request.recipe_file.parent))
    notes: tuple[str, ...] = ()
    if counts is not None:
        notes = count_notes(counts, request.counts or {}, table) if table else ()
    elif request.begun is not None and "steps" in request.begun.settings:
        # The data was removed after the run had begun: its length is what it was.
        return None, stated_steps(recipe) or int(request.begun.settings["steps"]), ()
    elif request.counts is not None:
        counts = table_counts(request.counts, data.folder)
        notes = (f"tokens are those of {table}: preprocess has not run",)
    steps = stated_steps(recipe)
    if counts is not None:
        mix = make_mixture(recipe, counts, place, data_start=data_start)
        return mix, mix.steps, notes
    if steps is None:
        raise RequestError(
            place,
            "states neither steps nor tokens, and the data that they follow from is not there",
            "make preprocess, or state mix.counts: a table of NAME<TAB>TOKENS",
        )
    return None, steps, ()


def data_of(request: Request, recipe: Midtrain) -> Product:
    """The preprocessed data of a training recipe."""
    return _product(request, recipe.data, "preprocess")


def source_counts(data: Product) -> tuple[SourceCount, ...] | None:
    """The sources as preprocess counted them; None while it has not run."""
    if data.result is None:
        return None
    return tuple(
        SourceCount(s["name"], str(data.folder.tokens_of(s["name"])), s["tokens"], s["documents"])
        for s in data.result["sources"]
    )


def table_counts(table: Mapping[str, int], folder: RunFolder) -> tuple[SourceCount, ...]:
    """The sources of a table of counts, with the files that preprocess would make of them."""
    return tuple(
        SourceCount(name, str(folder.tokens_of(name)), tokens) for name, tokens in table.items()
    )


def _mix_settings(recipe: Midtrain) -> dict[str, Any]:
    """What the order of samples depends on: not the limit, and not where counts came from."""
    return {"ratios": recipe.mix.ratios or {}, "shares": recipe.mix.shares}


def _data_start(request: Request, recipe: Midtrain, data: Product) -> int:
    """Where the run begins to read the data that it now asks for.

    The same data as before: where it began, or where the run goes on if it was set back to before
    that. Other data, where the recipe allows it: where the run goes on.
    """
    begun = request.begun
    if begun is None:
        return 0
    now = {**_settings(recipe), "mix": _mix_settings(recipe), "inputs": {"data": data.identity}}
    if _of_data(begun.settings) == _of_data(comparable(begun.settings, now)):
        return min(begun.data_start, begun.iteration)
    return begun.iteration if recipe.resume == "new-data" else 0


def _of_data(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that say which samples are read, and in which order."""
    found = {key: settings.get(key) for key in ("data", "mix", "split")}
    return found | {"identity": settings.get("inputs", {}).get("data")}


def _beside_data(settings: Mapping[str, Any]) -> dict[str, Any]:
    """All other settings, but for the steps."""
    found = {k: v for k, v in settings.items() if k not in ("data", "mix", "split", "steps")}
    return found | {"inputs": {k: v for k, v in settings["inputs"].items() if k != "data"}}


def comparable(before: Mapping[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """These settings, with what is not there any more taken to be what it was."""
    was = before.get("inputs", {})
    kept = {
        key: was.get(key) if value is None else value
        for key, value in now.get("inputs", {}).items()
    }
    return {**now, "inputs": kept} if "inputs" in now else now


def has_new_data(before: Plan, plan: Plan) -> bool:
    """Whether a plan differs from the one that its run has begun with in its data alone.

    The steps may differ where they follow from the mix, which then begins anew.
    """
    if not isinstance(plan, MidtrainPlan) or not isinstance(before, MidtrainPlan):
        return False
    was, now = before.settings, comparable(before.settings, plan.settings)
    other = _of_data(was) != _of_data(now) or plan.data_start != before.data_start
    follows = was["steps"] == now["steps"] or stated_steps(plan.recipe) is None
    return other and follows and _beside_data(was) == _beside_data(now)


def _export_plan(request: Request, recipe: Export) -> ExportPlan:
    source = _product(request, recipe.of, "midtrain")
    if source.result and not source.iterations:
        raise RequestError(
            source.folder.checkpoints,
            "holds no checkpoint any more",
            f"train again under another NAME=, or rm -r {source.folder.root} and train again",
        )
    iteration: int | None
    if recipe.iteration == "latest":
        iteration = source.iterations[-1] if source.iterations else None
    else:
        iteration = recipe.iteration
        if source.iterations and iteration not in source.iterations:
            there = ", ".join(str(i) for i in source.iterations)
            raise RequestError(
                f"{request.recipe_file}: iteration",
                f"{source.folder.root} has no checkpoint {iteration}",
                f"it has {there}",
            )
    of = {"of": source.started, "result": source.identity}
    settings = _settings(recipe) | {"iteration": iteration, "inputs": of}
    return ExportPlan(
        **_common(request, settings, Launch(engine=False, processes=1, device="cpu")),
        recipe=recipe,
        source=str(source.folder.root),
        iteration=iteration,
    )


def differences(there: Any, here: Any, prefix: str = "") -> list[str]:
    """Each field in which two settings differ, as `field A there, B here`."""
    if isinstance(there, dict) and isinstance(here, dict):
        found = []
        for key in [*there, *(key for key in here if key not in there)]:
            found += differences(
                there.get(key), here.get(key), f"{prefix}.{key}" if prefix else str(key)
            )
        return found
    return [] if there == here else [f"{prefix} {there} there, {here} here"]
