"""What a recipe may say: strict, frozen models, one a stage.

Units are in the names. Unknown keys are errors. Nothing here reads a file or knows a site.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class Strict(BaseModel):
    """Base of every model: no unknown key, no change after reading, no silent conversion."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
_PART = r"[A-Za-z0-9_-][A-Za-z0-9._-]*"
# Of a source. Its token files lie in folders where the name has a /, and never outside of them.
SOURCE_NAME = rf"^{_PART}(/{_PART})*$"


def _one_key_mapping(value: Any) -> Any:
    """`init: {hf: PATH}` and `init: hf:PATH` say the same."""
    if isinstance(value, dict) and len(value) == 1:
        ((kind, target),) = value.items()
        return f"{kind}:{target}" if isinstance(target, str) else value
    return value


StageReference = Annotated[
    str, BeforeValidator(_one_key_mapping), Field(pattern=r"^stage:[A-Za-z0-9._-]+$")
]
Base = Annotated[
    str,
    BeforeValidator(_one_key_mapping),
    Field(pattern=r"^(scratch|given|(hf|checkpoint):\S.*|stage:[A-Za-z0-9._-]+)$"),
]
# A repository of the Hugging Face hub at a revision (a commit, a tag or a branch; main without).
HUB_REFERENCE = (
    r"^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*(@[A-Za-z0-9][A-Za-z0-9._/-]*)?$"
)
HubReference = Annotated[str, Field(pattern=HUB_REFERENCE)]


class RopeScaling(Strict):
    """Llama-3.1 frequency scaling (Llama 3 herd of models, 2024, section 3.2)."""

    factor: PositiveFloat = 8.0
    low_frequency_factor: PositiveFloat = 1.0
    high_frequency_factor: PositiveFloat = 4.0
    original_max_positions: Positive = 8192


class Model(Strict):
    """The shape of a LLaMA-type model."""

    layers: Positive
    hidden_size: Positive
    ffn_hidden_size: Positive
    attention_heads: Positive
    kv_groups: Positive
    head_size: Positive | None = None
    vocabulary_size: Positive
    max_positions: Positive
    rotary_base: PositiveFloat
    rope_scaling: RopeScaling | None = None
    norm_epsilon: PositiveFloat
    tied_embeddings: bool = False
    init_std: PositiveFloat = 0.02

    @model_validator(mode="after")
    def _shapes_fit(self) -> Model:
        if self.attention_heads % self.kv_groups:
            raise ValueError(
                f"attention_heads {self.attention_heads} is not a multiple of "
                f"kv_groups {self.kv_groups}"
            )
        if self.head_size is None and self.hidden_size % self.attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of attention_heads "
                f"{self.attention_heads}: state head_size"
            )
        if self.head_width % 2:
            raise ValueError(f"head size {self.head_width} is odd: rotary embedding needs pairs")
        return self

    @property
    def head_width(self) -> int:
        """Channels of one attention head."""
        return self.head_size or self.hidden_size // self.attention_heads

    @property
    def padded_vocabulary(self) -> int:
        """Embedding rows inside the engine: the vocabulary rounded up to a multiple of 128.

        It does not depend on the layout, so that a checkpoint fits every tensor-parallel size
        that divides 128.
        """
        return -(-self.vocabulary_size // 128) * 128

    @property
    def parameters(self) -> int:
        """Trainable parameters, without the padding of the vocabulary."""
        attention = self.hidden_size * self.head_width * (self.attention_heads + self.kv_groups) * 2
        mlp = 3 * self.hidden_size * self.ffn_hidden_size
        embeddings = self.vocabulary_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        norms = self.hidden_size * (2 * self.layers + 1)
        return self.layers * (attention + mlp) + embeddings + norms

    def flops_per_token(self, sequence_length: int) -> float:
        """Floating-point operations of one trained token, forward and backward.

        Six per weight of every matrix product, the output layer included and the embedding
        lookup not, plus attention scores with the causal half counted once (PaLM, appendix B,
        halved for causality). For llm-jp-4-8b at 4096 this gives 49.93 GFLOP.
        """
        attention = self.hidden_size * self.head_width * (self.attention_heads + self.kv_groups) * 2
        mlp = 3 * self.hidden_size * self.ffn_hidden_size
        weights = self.layers * (attention + mlp) + self.vocabulary_size * self.hidden_size
        scores = self.layers * sequence_length * self.attention_heads * self.head_width
        return 6.0 * (weights + scores)


class Job(Strict):
    """What a stage asks a scheduler for; the command line (NODES=, HOURS=, TYPE=) goes first.

    `type` is one of the site's; without it the site's type for GPUs or for CPUs. `save_minutes`
    before the end of the walltime training stops, to save: without it 10, or 15 % of a short job.
    A step that takes longer than `hang_minutes` ends the run, with the stacks of its ranks.
    """

    nodes: Positive = 1
    walltime_hours: PositiveFloat = 1.0
    type: str | None = None
    save_minutes: PositiveFloat | None = None
    hang_minutes: PositiveFloat = 30.0


class TokenizerTraining(Strict):
    """A byte-level BPE tokenizer trained on the recipe's own text."""

    vocabulary_size: Annotated[int, Field(ge=300)]


class Tokenizer(Strict):
    """Where the tokenizer comes from: a folder with tokenizer.json, the hub, or training."""

    path: str | None = None
    hf: HubReference | None = None
    train: TokenizerTraining | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> Tokenizer:
        if [self.path, self.hf, self.train].count(None) != 2:
            raise ValueError("state exactly one of path, hf, train")
        return self


class Source(Strict):
    """A named collection of documents.

    `path` is a file, a glob (`**` goes into folders) or a folder: .jsonl or .json (one object a
    line), also with .gz or .zst, and .parquet, with the text under `text_key`. `hf` is a data set
    of the hub (owner/name@revision), and `files` are globs that say which of its files.
    `python_documentation` is what every Python carries: the language reference behind help()
    (`topics`), or the docstrings of the standard library (`docstrings`).
    """

    name: Annotated[str, Field(pattern=SOURCE_NAME)]
    path: str | None = None
    hf: HubReference | None = None
    files: tuple[str, ...] = ()
    python_documentation: Literal["topics", "docstrings"] | None = None
    text_key: str = "text"

    @model_validator(mode="after")
    def _one_origin(self) -> Source:
        if [self.path, self.hf, self.python_documentation].count(None) != 2:
            raise ValueError("state exactly one of path, hf, python_documentation")
        if (self.hf is None) == bool(self.files):
            raise ValueError(
                'hf needs files, and files need hf: files: ["data/*.jsonl"] names files of the hub'
            )
        return self


class Preprocess(Strict):
    """Text to tokens: a tokenizer, and Megatron .bin/.idx files, one pair a source.

    Each document gets the end-of-sequence token behind it, and with `prepend_bos` the beginning one
    before it. A line that is no document stops the stage, or is passed over (`on_error: skip`),
    counted and written down in tokens/SOURCE.skipped.jsonl.
    """

    tokenizer: Tokenizer
    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    append_eod: bool = True
    prepend_bos: bool = False
    on_error: Literal["stop", "skip"] = "stop"
    job: Job = Job()

    @model_validator(mode="after")
    def _names_differ(self) -> Preprocess:
        names = [source.name for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two sources are named {name}")
        return self


class Convert(Strict):
    """A Hugging Face base to a megatron-core checkpoint.

    `source` is `hf:PATH-or-repo`, or `random` for a base that the recipe makes itself.
    """

    model: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
    source: Annotated[str, BeforeValidator(_one_key_mapping), Field(pattern=r"^(random|hf:\S.*)$")]
    tokenizer: StageReference | None = None
    seed: NonNegative = 1234
    job: Job = Job()

    @model_validator(mode="after")
    def _random_needs_tokenizer(self) -> Convert:
        if self.source == "random" and self.tokenizer is None:
            raise ValueError("source: random needs tokenizer: stage:preprocess")
        return self


class Optimizer(Strict):
    """Adam with decoupled weight decay (AdamW)."""

    lr: PositiveFloat
    min_lr: NonNegativeFloat = 0.0
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    epsilon: PositiveFloat = 1.0e-8
    weight_decay: NonNegativeFloat = 0.1
    clip_grad: NonNegativeFloat = 1.0


class Schedule(Strict):
    """How the learning rate moves: warm-up, then `style`.

    `decay_steps` is how many steps the decay takes. With WSD they are the run's last ones; with
    linear and cosine they follow the warm-up, and min_lr after them (without it: to the end of
    the run).
    """

    style: Literal["constant", "linear", "cosine", "WSD"] = "cosine"
    warmup_steps: NonNegative = 0
    decay_steps: Positive | None = None
    decay_style: Literal["minus_sqrt", "linear", "cosine", "exponential"] | None = None

    @model_validator(mode="after")
    def _decay_fits_the_style(self) -> Schedule:
        if self.style == "WSD" and None in (self.decay_steps, self.decay_style):
            raise ValueError("style WSD needs decay_steps and decay_style")
        if self.style != "WSD" and self.decay_style is not None:
            raise ValueError(f"decay_style belongs to WSD, not to {self.style}")
        if self.style == "constant" and self.decay_steps is not None:
            raise ValueError("decay_steps says how long a decay takes, and constant has none")
        return self


class Layout(Strict):
    """How the model lies over the processes. `data: null` takes every GPU that is left."""

    tensor: Positive = 1
    pipeline: Positive = 1
    context: Positive = 1
    data: Positive | None = None
    sequence_parallel: bool = False
    recompute: Literal["none", "selective", "full"] = "none"

    @model_validator(mode="after")
    def _sequence_parallel_needs_tensor(self) -> Layout:
        if self.sequence_parallel and self.tensor == 1:
            raise ValueError("sequence_parallel needs tensor > 1")
        return self

    @property
    def model_parallel(self) -> int:
        """Processes that hold one copy of the model."""
        return self.tensor * self.pipeline * self.context


class Checkpointing(Strict):
    """When checkpoints are written and how many stay. The last step is always saved.

    `reshard: layout` lets a run go on in any layout; its saves gather the optimizer's state over
    the data-parallel ranks. `reshard: data` writes it in parallel, and only the data-parallel size
    may change.
    """

    every_steps: Positive
    keep_last: Positive = 2
    reshard: Literal["layout", "data"] = "layout"


class Evaluation(Strict):
    """Held-out loss: before the first step, every so many steps, and after the last."""

    every_steps: Positive | None = None
    sequences: Positive


class Measured(Strict):
    """What a recipe's training was measured at, for the plan's estimate of its hours."""

    tokens_per_second_per_gpu: PositiveFloat
    on: str


class Mix(Strict):
    """How much of each source a run reads. Names are those of sources, or globs (`dclm*`).

    `ratios`: a source gives its tokens times its ratio, 1 where nothing names it. `shares`: a
    source, or what a glob names together, gets its share of the run; every source is named. 0
    leaves a source out. No source is read more than `max_epochs` times. `counts` is a table of
    NAME<TAB>TOKENS, from which a plan is made before the data is there.
    """

    ratios: dict[str, NonNegativeFloat] | None = None
    shares: dict[str, NonNegativeFloat] | None = None
    max_epochs: PositiveFloat = 1.0
    counts: str | None = None

    @model_validator(mode="after")
    def _one_rule(self) -> Mix:
        if self.shares is None:
            return self
        if self.ratios is not None:
            raise ValueError("state only one of ratios, shares")
        total = math.fsum(self.shares.values())
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the shares add up to {total:.7g}, not to 1")
        return self


class Midtrain(Strict):
    """Continued pre-training of a base on a mix of sources.

    `init: given` is for a base that the recipe cannot name, since it is published nowhere: the run
    is planned without it, and starts only when `--set init=` names it.

    Without `steps` and `tokens` the run reads what the ratios of its mix give, once. `resume:
    new-data` lets a run that has begun go on with another mix, which is read from its own start.

    `z_loss` times the mean of log²Z joins the loss that is trained on (PaLM: 1.0e-4); the loss
    that is reported stays the cross-entropy.
    """

    model: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
    init: Base
    data: StageReference
    mix: Mix = Mix()
    resume: Literal["same-data", "new-data"] = "same-data"
    split: Annotated[str, Field(pattern=r"^\d+,\d+,\d+$")] = "998,1,1"
    sequence_length: Positive
    global_batch: Positive
    micro_batch: Positive = 1
    steps: Positive | None = None
    tokens: Positive | None = None
    precision: Literal["auto", "bf16", "fp32"] = "bf16"
    fp8: Literal["none", "tensorwise", "delayed", "blockwise"] = "none"
    optimizer: Optimizer
    schedule: Schedule = Schedule()
    z_loss: NonNegativeFloat = 0.0
    layout: Layout = Layout()
    checkpoints: Checkpointing
    evaluation: Evaluation | None = None
    seed: NonNegative = 1234
    job: Job = Job()
    measured: Measured | None = None

    @model_validator(mode="after")
    def _one_length(self) -> Midtrain:
        if self.steps is not None and self.tokens is not None:
            raise ValueError("state only one of steps, tokens")
        if self.mix.shares is not None and self.steps is None and self.tokens is None:
            raise ValueError("mix.shares are of a whole: state steps or tokens")
        if not int(self.split.split(",")[0]):
            raise ValueError(f"split {self.split} leaves nothing to train on")
        if self.evaluation and not int(self.split.split(",")[1]):
            raise ValueError(f"split {self.split} leaves nothing for the evaluation")
        if self.optimizer.min_lr > self.optimizer.lr:
            raise ValueError(
                f"optimizer.min_lr {self.optimizer.min_lr} is over lr {self.optimizer.lr}"
            )
        return self


class Export(Strict):
    """A trained checkpoint to a Hugging Face folder, with a generated sample."""

    of: StageReference
    iteration: Positive | Literal["latest"] = "latest"
    dtype: Literal["bf16", "fp32"] = "bf16"
    prompt: str = ""
    sample_tokens: NonNegative = 0
    job: Job = Job()

    @model_validator(mode="after")
    def _sample_has_a_prompt(self) -> Export:
        if self.sample_tokens and not self.prompt:
            raise ValueError("sample_tokens needs a prompt to go on from")
        return self


Recipe = Preprocess | Convert | Midtrain | Export

STAGES: dict[str, type[Strict]] = {
    "preprocess": Preprocess,
    "convert": Convert,
    "midtrain": Midtrain,
    "export": Export,
}


class NodeType(Strict):
    """One resource type of a site: what a node of it has and what a job of it may ask for."""

    gpus: NonNegative
    cores: Positive
    memory_gib: PositiveFloat
    nodes: Positive
    walltime_hours: PositiveFloat
    points_per_hour: PositiveFloat | None = None


class SiteGpu(Strict):
    """The GPU of a site's nodes, as the driver names it."""

    name: str
    memory_gib: PositiveFloat


class Site(Strict):
    """A cluster: its scheduler, its resource types and limits, what its jobs need.

    `found_by` are folders that all its machines have and others have not, by which it is found
    out; a site without any must be named. `setup` are shell lines at the start of a job (modules).
    `environment` reaches the stage (NCCL, InfiniBand).
    """

    scheduler: Literal["pbs", "gridengine", "slurm"]
    found_by: tuple[str, ...] = ()
    gpu: SiteGpu | None = None
    types: Annotated[dict[str, NodeType], Field(min_length=1)]
    gpu_type: str
    cpu_type: str
    node_hours: PositiveFloat | None = None
    group_required: bool = False
    setup: tuple[str, ...] = ()
    environment: dict[str, str] = {}
    binds: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _types_exist(self) -> Site:
        for field, name in (("gpu_type", self.gpu_type), ("cpu_type", self.cpu_type)):
            if name not in self.types:
                raise ValueError(f"{field} {name} is none of the types {', '.join(self.types)}")
        return self


class User(Strict):
    """user.toml: what is yours and never in a tracked file.

    `runs`, `data`, `images` and `cache` are folders; `binds` are folders that containers see as
    well; `site` is a file's name in recipes/sites, `group` what its scheduler charges.
    """

    site: str | None = None
    group: str | None = None
    runs: str | None = None
    data: str | None = None
    images: str | None = None
    cache: str | None = None
    binds: tuple[str, ...] = ()
    debian_mirror: str | None = None
