"""What a recipe says of training: midtrain, sft, dpo, and what they share."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator
from typing_extensions import Self

from tanren.config.data import ChatSet, Mix
from tanren.config.fields import (
    Base,
    Fraction,
    Job,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    StageReference,
    Strict,
    one_or_many,
)


class Optimizer(Strict):
    """Adam with decoupled weight decay (AdamW).

    `moments` is the type that Adam's two moments are kept in on a GPU that trains in bf16; on a CPU
    and in fp32 they are fp32. What is computed with them, and what a checkpoint holds, is fp32.
    """

    lr: PositiveFloat
    min_lr: NonNegativeFloat = 0.0
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    epsilon: PositiveFloat = 1.0e-8
    weight_decay: NonNegativeFloat = 0.1
    clip_grad: NonNegativeFloat = 1.0
    moments: Literal["fp32", "bf16"] = "fp32"


# The linear layers of a decoder layer.
LoraLinear = Literal["attention_qkv", "attention_dense", "mlp_fc1", "mlp_fc2"]


class Lora(Strict):
    """Low-rank adapters beside frozen weights (LoRA, Hu et al. 2021): y = Wx + alpha/rank B A x.

    `targets` are linear layers by NeMo's names: attention_qkv, attention_dense, mlp_fc1 (gate and
    up) and mlp_fc2 (down); attention, mlp and all name several. `dropout` is of A's input.
    """

    rank: Positive = 32
    alpha: PositiveFloat = 32.0
    dropout: Fraction = 0.0
    targets: Annotated[
        tuple[Literal[LoraLinear, "attention", "mlp", "all"], ...],
        BeforeValidator(one_or_many),
        Field(min_length=1),
    ] = ("all",)

    @property
    def linears(self) -> tuple[LoraLinear, ...]:
        """The linear layers that get an adapter, in the order of the forward pass."""
        every: tuple[LoraLinear, ...] = get_args(LoraLinear)
        return tuple(
            name for name in every if {name, name.partition("_")[0], "all"} & set(self.targets)
        )

    @property
    def scale(self) -> float:
        """What the adapter's output is multiplied with."""
        return self.alpha / self.rank


class Schedule(Strict):
    """How the learning rate moves: warm-up, then `style`.

    `decay_steps` is how many steps the decay takes. With WSD they are the run's last ones; with
    linear and cosine they follow the warm-up, and min_lr after them (without it: to the end of
    the run). `constant_steps` says instead how many steps at its end have min_lr.
    """

    style: Literal["constant", "linear", "cosine", "WSD"] = "cosine"
    warmup_steps: NonNegative = 0
    decay_steps: Positive | None = None
    constant_steps: NonNegative = 0
    decay_style: Literal["minus_sqrt", "linear", "cosine", "exponential"] | None = None

    @model_validator(mode="after")
    def _decay_fits_the_style(self) -> Schedule:
        if self.style == "WSD" and None in (self.decay_steps, self.decay_style):
            raise ValueError("style WSD needs decay_steps and decay_style")
        if self.style != "WSD" and self.decay_style is not None:
            raise ValueError(f"decay_style belongs to WSD, not to {self.style}")
        if self.style == "constant" and self.decay_steps is not None:
            raise ValueError("decay_steps says how long a decay takes, and constant has none")
        if self.constant_steps and self.style not in ("linear", "cosine"):
            raise ValueError(f"constant_steps belongs to linear and cosine, not to {self.style}")
        if self.constant_steps and self.decay_steps is not None:
            raise ValueError("state only one of decay_steps, constant_steps")
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


class Preference(Strict):
    """The loss of pairs of a chosen and a rejected answer.

    `beta` scales log-ratios to rewards (ipo: its regularisation; simpo wants 2 or more).
    `label_smoothing` is the share of pairs taken to be the wrong way round. `average_log_probs`
    divides log-probabilities by the answer's tokens, as TRL's ipo does. `reward_scale` times the
    difference of the data's rewards is what the rpo losses aim at; `gamma` is the margin that simpo
    aims at. `sft_weight` times the cross-entropy of the chosen answers' tokens is added.
    """

    loss: Literal["dpo", "ipo", "rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl", "simpo"] = "dpo"
    beta: PositiveFloat = 0.1
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    sft_weight: NonNegativeFloat = 0.0
    average_log_probs: bool = False
    reward_scale: PositiveFloat = 1.0
    gamma: NonNegativeFloat = 0.5

    @model_validator(mode="after")
    def _options_belong_to_the_loss(self) -> Preference:
        # By value: a recipe that was written out whole and read again has every field set.
        if self.label_smoothing and self.loss not in ("dpo", "simpo"):
            raise ValueError(f"label_smoothing belongs to dpo and simpo, not to {self.loss}")
        if self.gamma != 0.5 and self.loss != "simpo":
            raise ValueError(f"gamma belongs to simpo, not to {self.loss}")
        if self.reward_scale != 1 and not self.loss.startswith("rpo_"):
            raise ValueError(f"reward_scale belongs to the rpo losses, not to {self.loss}")
        if self.average_log_probs and self.loss == "simpo":
            raise ValueError(
                "simpo averages log-probabilities as it is: leave out average_log_probs"
            )
        return self


class Checkpointing(Strict):
    """When checkpoints are written and how many stay. The last step is always saved.

    With both `every_steps` and `every_minutes` one is written when either is over. The newest
    `keep_last` stay, and those at multiples of `keep_every` steps.
    """

    every_steps: Positive | None = None
    every_minutes: PositiveFloat | None = None
    keep_last: Positive = 2
    keep_every: Positive | None = None

    @model_validator(mode="after")
    def _some_rhythm(self) -> Self:
        if self.every_steps is None and self.every_minutes is None:
            raise ValueError("state every_steps, every_minutes, or both")
        return self

    def kept(self, steps: int | None) -> int:
        """How many stay of a run of so many steps; of an unknown number, the newest alone."""
        return self.keep_last + (steps // self.keep_every if steps and self.keep_every else 0)


class Evaluation(Strict):
    """Held-out loss: before the first step, every so many steps, and after the last."""

    every_steps: Positive | None = None
    sequences: Positive


Fp8 = Literal["none", "tensorwise", "delayed", "blockwise"]


class Measured(Strict):
    """What a recipe's training was measured at, for the plan's estimate of its hours.

    `on` says it in words; it holds for GPUs whose name begins with `gpu`, for this length and this
    scaling, without adapters, model parallelism and recomputation.
    """

    tokens_per_second_per_gpu: PositiveFloat
    on: str
    gpu: str
    sequence_length: Positive
    fp8: Fp8 = "none"


class Wandb(Strict):
    """Weights & Biases: the project and the entity (a person or a team) that a run goes to."""

    project: str | None = None
    entity: str | None = None


class Tracking(Strict):
    """Where the metrics go besides metrics.jsonl and TensorBoard. Keys are named nowhere here."""

    wandb: Wandb | None = None


class Training(Strict):
    """What every stage that trains says: the model, how it trains and how it lies on the GPUs.

    `init: given` is for a base that the recipe cannot name, since it is published nowhere: the run
    is planned without it, and starts only when `--set init=` names it.

    `micro_batch` is in rows. `main_gradients` is the type that gradients are added up in over the
    micro batches of a step. With `auto` the plan takes what the GPU's memory holds.

    `attention` is by whose kernels a GPU computes it: `te`, Transformer Engine's choice, cuDNN on
    Hopper; `flash4`, the package flash-attn-4; `auto` takes that where it is installed and fits.
    `linear` is the same of linear layers, SwiGLU and the gradient of the head's weight: `te`, or
    `quack`, the package quack-kernels.
    """

    model: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
    init: Base
    sequence_length: Positive
    global_batch: Positive
    micro_batch: Positive | Literal["auto"] = "auto"
    main_gradients: Literal["auto", "fp32", "bf16"] = "auto"
    steps: Positive | None = None
    precision: Literal["auto", "bf16", "fp32"] = "bf16"
    fp8: Fp8 = "none"
    attention: Literal["auto", "te", "flash4"] = "auto"
    linear: Literal["auto", "te", "quack"] = "auto"
    optimizer: Optimizer
    schedule: Schedule = Schedule()
    layout: Layout = Layout()
    checkpoints: Checkpointing
    seed: NonNegative = 1234
    job: Job = Job()
    tracking: Tracking = Tracking()
    measured: Measured | None = None

    @property
    def row_length(self) -> int:
        """Tokens of one row of a micro batch."""
        return self.sequence_length

    @property
    def rows(self) -> int:
        """Rows of a micro batch, once the plan has chosen."""
        assert self.micro_batch != "auto"
        return self.micro_batch

    @model_validator(mode="after")
    def _fp32_keeps_fp32(self) -> Self:
        if self.precision == "fp32" and "bf16" in (self.main_gradients, self.optimizer.moments):
            raise ValueError("main_gradients and optimizer.moments in bf16 belong to bf16")
        return self

    @model_validator(mode="after")
    def _rates_fall(self) -> Self:
        if self.optimizer.min_lr > self.optimizer.lr:
            raise ValueError(
                f"optimizer.min_lr {self.optimizer.min_lr} is over lr {self.optimizer.lr}"
            )
        return self


class Midtrain(Training):
    """Continued pre-training of a base on a mix of sources.

    Without `steps` and `tokens` the run reads what the ratios of its mix give, once. `resume:
    new-data` lets a run that has begun go on with another mix, which is read from its own start.

    `z_loss` times the mean of log²Z joins the loss that is trained on (PaLM: 1.0e-4); the loss
    that is reported stays the cross-entropy.
    """

    data: StageReference
    mix: Mix = Mix()
    resume: Literal["same-data", "new-data"] = "same-data"
    split: Annotated[str, Field(pattern=r"^\d+,\d+,\d+$")] = "998,1,1"
    tokens: Positive | None = None
    z_loss: NonNegativeFloat = 0.0
    evaluation: Evaluation | None = None

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
        return self


class DevEvaluation(Strict):
    """The loss on the dev examples: before the first step, every so many steps, and at the end."""

    every_steps: Positive | None = None


class Tuning(Training):
    """What sft and dpo share: conversations, their template, and for how long they are read.

    `engine: nemo` trains with nemo-toolkit, in its own image or environment, and leaves checkpoints
    of NeMo 2; what else a recipe says means the same.

    `template` is `llmjp-instruct`, or `model`: the chat template in the tokenizer's folder.
    `tokenizer` names that folder (a path, or stage:preprocess) where the base has none of its own.

    A set holds out at most `max_dev_samples` and `max_dev_ratio` of its conversations. A
    conversation that is longer than `sequence_length` is cut at its end, left out, or stops the
    run (`too_long`).
    """

    engine: Literal["megatron", "nemo"] = "megatron"
    tokenizer: str | None = None
    template: Literal["model", "llmjp-instruct"]
    datasets: Annotated[tuple[ChatSet, ...], Field(min_length=1)]
    max_dev_samples: NonNegative = 100
    max_dev_ratio: Fraction = 0.1
    too_long: Literal["truncate", "drop", "error"] = "drop"
    epochs: PositiveFloat | None = None
    lora: Lora | None = None
    evaluation: DevEvaluation = DevEvaluation()

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                'state exactly one of steps, epochs; the other is null (SET="steps=null epochs=2")'
            )
        return self

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [one.name for one in self.datasets]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two datasets are named {name}")
        return self


class Sft(Tuning):
    """Supervised fine-tuning: the loss is on answers and their end tokens alone.

    `global_batch` counts rows of `sequence_length` tokens. With `packing` a row holds as many
    conversations as fit, and none attends to another; without it one.
    """

    packing: bool = True


class Dpo(Tuning):
    """Tuning on preferences: `global_batch` counts pairs of a chosen and a rejected answer.

    Pairs are packed into rows of twice `sequence_length`.
    """

    preference: Preference = Preference()

    @property
    def row_length(self) -> int:
        return 2 * self.sequence_length


def by_nemo(recipe: object) -> bool:
    """Whether the stage of a recipe trains with nemo-toolkit."""
    return isinstance(recipe, Tuning) and recipe.engine == "nemo"
