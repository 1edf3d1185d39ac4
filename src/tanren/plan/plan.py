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

from tanren.config.data import Preprocess
from tanren.config.errors import RequestError
from tanren.config.fields import Strict
from tanren.config.merge import Merge
from tanren.config.model import Model
from tanren.config.schema import Convert, Evaluation, Export, Recipe
from tanren.config.training import Dpo, Midtrain, Sft, Training, Tuning, by_nemo
from tanren.plan.batch import Batch, Cut
from tanren.plan.bench import Bench
from tanren.plan.cost import Gpu
from tanren.plan.memory import Memory
from tanren.plan.mix import Mixture
from tanren.plan.paths import Part, RunFolder, run_name, stage_name, stage_of


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
    # Of the machine itself; None where it is not known.
    memory_gib: float | None = None

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
    # The steps that sft or dpo found in its data, and a digest of the settings that it had then;
    # None before it has read them.
    steps: int | None = None
    steps_of: str | None = None
    # The part of the stage that is asked for; None for the whole.
    part: Part | None = None
    # The recipe is that of a bench of the stage, not the stage's own.
    bench: Bench | None = None
    # The run folder's name of the base that the run, or its job, was given; None for a new run.
    base: str | None = None
    # What the variant and --set made of the recipe's fields: before and after.
    changed: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def folder(self) -> RunFolder:
        of = None
        if isinstance(self.recipe, Export | Evaluation):
            of = stage_of(stage_name(self.recipe.of))
        stage = f"bench.{self.stage}" if self.bench else self.stage
        whole = RunFolder(self.runs / self.task / run_name(stage, self.variant, self.name, of))
        return whole.part(self.part) if self.part else whole


class Launch(Strict):
    """Processes of the stage, on all nodes. Those of the `engine` join a process group.

    `own` is the image or the environment that they run in instead of that of the engine.
    """

    engine: bool
    processes: int
    device: Literal["cuda", "cpu"]
    nodes: int = 1
    own: Literal["merge", "nemo"] | None = None

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
    # Of a stage that is run to be measured.
    bench: Bench | None = None
    # What the variant and --set made of the recipe's fields: before and after.
    changed: dict[str, tuple[Any, Any]] = Field(default_factory=dict)

    @property
    def folder(self) -> RunFolder:
        return RunFolder(Path(self.run))

    @property
    def made_up(self) -> bool:
        """Whether the run reads random data, and begins from random weights."""
        return self.bench is not None and not self.bench.real


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


class TrainingPlan(PlanBase):
    """What the plans of all stages that train share."""

    stage: Literal["midtrain", "sft", "dpo"]
    recipe: Training
    model: Model
    precision: Literal["bf16", "fp32"]
    batch: Cut
    # `scratch`, `hf:PATH` or `checkpoint:PATH`: a stage is already turned into its checkpoint.
    start: str
    # The run folder's name of the stage behind it: the run keeps to it.
    base: str | None = None
    # The adapters to fold into the weights of `start`, in this order: the base was trained by LoRA.
    adapters: tuple[str, ...] = ()
    # The Hugging Face folder that tokenizer and generation config are exported from.
    hf_source: str | None
    # Of one GPU, in GiB; None where the GPU is not known.
    memory: Memory | None = None
    gpu_memory_gib: float | None = None
    # Of one checkpoint. The run keeps `checkpoints.kept` of them and the one that is being written.
    checkpoint_gib: float = 0.0
    # Hours of training and the assumption behind them; None where they cannot be estimated.
    hours: tuple[float, str] | None = None


class MidtrainPlan(TrainingPlan):
    stage: Literal["midtrain"] = "midtrain"
    recipe: Midtrain
    batch: Batch
    # None while the tokens are not known: preprocess has not run, and the recipe has no counts.
    mix: Mixture | None
    # The iteration at which the run began to read its present data: 0, but after `new-data`.
    data_start: int = 0
    # The folder of the preprocessed data, and its tokenizer's facts.
    data: str


class TuningPlan(TrainingPlan):
    """What the plans of sft and dpo share."""

    stage: Literal["sft", "dpo"]
    recipe: Tuning
    # What the recipe states, or what the data gave; None before the data was read.
    steps: int | None
    # The tokenizer's folder, or `hf:REFERENCE` for the base's; None while the base is not there.
    tokenizer: str | None
    # The folder of the base's own, where a stage made the base and the recipe names another.
    base_tokenizer: str | None = None
    # Where tokens and the reference's log-probabilities are kept for every run of the task.
    cache: str


class SftPlan(TuningPlan):
    stage: Literal["sft"] = "sft"
    recipe: Sft


class DpoPlan(TuningPlan):
    stage: Literal["dpo"] = "dpo"
    recipe: Dpo


class ExportPlan(PlanBase):
    stage: Literal["export"] = "export"
    recipe: Export
    # The run folder that is exported from, and which of its checkpoints; None while it has none.
    source: str
    iteration: int | None


class MergePlan(PlanBase):
    stage: Literal["merge"] = "merge"
    recipe: Merge
    # Each model's folder, as the recipe names the model, in its order; None while it is not there.
    # `owner/name@revision` stays, and is looked for in what was fetched.
    folders: dict[str, str | None]


class EvaluationPlan(PlanBase):
    stage: Literal["eval"] = "eval"
    recipe: Evaluation
    # The exported folder, and the iteration that it is of; None while there is none, and a soup is
    # of no iteration.
    model: str | None
    iteration: int | None
    # Asked by the chat template.
    chat: bool


Plan = Annotated[
    PreprocessPlan
    | ConvertPlan
    | MidtrainPlan
    | SftPlan
    | DpoPlan
    | ExportPlan
    | MergePlan
    | EvaluationPlan,
    Field(discriminator="stage"),
]
_PLAN: TypeAdapter[Plan] = TypeAdapter(Plan)


def digest(value: Any) -> str:
    """A short SHA-256 of any JSON value, independent of the order of keys."""
    return hashlib.sha256(orjson.dumps(value, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]


def read_plan(path: Path) -> Plan:
    """Read a plan.json."""
    try:
        return parse_plan(path.read_bytes(), path)
    except FileNotFoundError:
        raise RequestError(
            path, "there is no such plan", "make status lists the runs that there are"
        ) from None


def parse_plan(value: bytes | Mapping[str, Any], place: object) -> Plan:
    """A plan from its JSON, or from the values of it that a passport holds."""
    try:
        return _PLAN.validate_json(value if isinstance(value, bytes) else orjson.dumps(value))
    except ValidationError as error:
        first = error.errors()[0]
        field_name = ".".join(str(part) for part in first["loc"])
        raise RequestError(
            place,
            f"was written by another version of tanren ({field_name}: {first['msg']})",
            "run the stage under a new NAME=, or check out the commit that its passport names",
        ) from None


def own_image(recipe: Recipe | Training) -> Literal["merge", "nemo"] | None:
    """The image, or the environment, that a recipe's stage has to itself."""
    if isinstance(recipe, Merge):
        return "merge"
    return "nemo" if by_nemo(recipe) else None


def common(request: Request, settings: dict[str, Any], launch: Launch) -> dict[str, Any]:
    return {
        "task": request.task,
        "variant": request.variant,
        "name": request.name,
        "recipe_file": str(request.recipe_file),
        "run": str(request.folder.root),
        "launch": launch,
        "settings": settings,
        "bench": request.bench,
        "changed": dict(request.changed),
    }


def settings_of(recipe: Strict, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    dumped: dict[str, Any] = orjson.loads(recipe.model_dump_json())
    # What is asked of a scheduler, who watches, and how fast it once was, change no result.
    left_out = (*without, "job", "tracking", "measured")
    return {key: value for key, value in dumped.items() if key not in left_out}


def comparable(before: Mapping[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """These settings, with what is not there any more taken to be what it was."""
    was = before.get("inputs", {})
    kept = {
        key: was.get(key) if value is None else value
        for key, value in now.get("inputs", {}).items()
    }
    return {**now, "inputs": kept} if "inputs" in now else now


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
