"""A bench: the plan of a training stage for a few steps, measured, that leaves nothing to go on.

Unless it is to be real, it reads made-up data and begins from random weights: how fast steps are
does not depend on either, and so no other stage need have run.
"""

from __future__ import annotations

from typing import Annotated, Any, cast

from pydantic import Field

from tanren.config.data import ChatSet, Mix
from tanren.config.errors import RequestError
from tanren.config.fields import Strict
from tanren.config.model import Model
from tanren.config.schema import Recipe
from tanren.config.training import DevEvaluation, Midtrain, Schedule, Training, Tuning
from tanren.plan.batch import tokens_per_step
from tanren.plan.memory import trained_parameters

STEPS = 12
# The least that has a step to warm up, one to time, one that warms the tracer up, one to trace.
FEWEST_STEPS = 4
# The name of the one source, or set, of made-up data, and tokens of a document of it.
RANDOM, DOCUMENT_TOKENS = "random", 1024
_MOST_TOKENS = 2**25
_HOURS = 1.0


class Bench(Strict):
    """How a stage is measured: `real` with its own data and base; `save` with a checkpoint."""

    steps: Annotated[int, Field(ge=FEWEST_STEPS)] = STEPS
    real: bool = False
    save: bool = False

    @property
    def warm_up(self) -> int:
        """Steps before the timed ones; the last two of all are for the profile."""
        return min(4, self.steps - 3)

    @property
    def timed(self) -> range:
        """The steps that are timed, by their numbers from 1."""
        return range(self.warm_up + 1, self.steps - 1)

    @property
    def save_step(self) -> int:
        """The step behind which the one checkpoint is saved."""
        return self.steps // 2


def bench_recipe(recipe: Recipe, bench: Bench, place: object) -> Recipe:
    """What a bench of a recipe's stage runs: as many steps, nothing held out, a rate that rises.

    Raises:
        RequestError: the stage trains nothing.
    """
    if not isinstance(recipe, Training):
        raise RequestError(
            place, "is of a stage that trains nothing", "make bench STAGE=midtrain|sft|dpo"
        )
    hours = min(recipe.job.walltime_hours, _HOURS)
    changes: dict[str, Any] = {
        "steps": bench.steps,
        # Small rates, so that random weights stay finite; the optimizer's work is the same.
        "schedule": Schedule(style="constant", warmup_steps=bench.steps - 1),
        "job": recipe.job.model_copy(update={"walltime_hours": hours}),
        "checkpoints": recipe.checkpoints.model_copy(update={"every_steps": bench.save_step}),
        "measured": None,
    }
    if not bench.real:
        changes["init"] = "scratch"
    if isinstance(recipe, Midtrain):
        changes |= {"tokens": None, "evaluation": None, "resume": "same-data"}
        if not bench.real:
            changes["mix"] = Mix(max_epochs=1e9)
    if isinstance(recipe, Tuning):
        changes |= {"epochs": None, "max_dev_samples": 0, "evaluation": DevEvaluation()}
        if not bench.real:
            # The files are not read; a set must name some.
            made_up = ChatSet(name=RANDOM, python_documentation="docstrings")
            changes |= {"datasets": (made_up,), "tokenizer": None}
    return cast(Recipe, recipe.model_copy(update=changes))


def made_up_data(recipe: Midtrain) -> dict[str, Any]:
    """What preprocess would say of random tokens: enough for the run, or for epochs of it."""
    needed = tokens_per_step(recipe) * ((recipe.steps or 1) + 1)
    documents = max(min(needed, _MOST_TOKENS) // DOCUMENT_TOKENS, 1024)
    source = {"name": RANDOM, "tokens": documents * DOCUMENT_TOKENS, "documents": documents}
    return {"identity": f"{documents} random documents", "vocabulary_size": 0, "sources": [source]}


def least_work(
    model: Model, recipe: Training, *, precision: str, data_parallel: int, tokens: int,
    predicted: int, flops: float, swiglu_inside: bool = False,
) -> dict[str, float]:  # fmt: skip
    """What one GPU cannot do without in a step: FLOP by kind, and bytes that it moves.

    The FLOP are the model's (see `Model.flops`), with an equal part of them for each GPU. Bytes are
    counted as if each kernel did all that can be done in one pass over its tensors: residual
    additions with the norms behind them, SwiGLU and rotary embedding, the logits read and written
    once; of the optimizer the gradients' zeroing, their norm and the update.

    Args:
        tokens: of all GPUs, as `predicted` (they go through the output layer) and `flops` are.
        swiglu_inside: whether SwiGLU is inside the products beside it, without passes of its own.
    """
    layout = recipe.layout
    gpus = data_parallel * layout.model_parallel
    layers, head = model.flops(tokens, 0, 0), model.flops(0, 0, predicted)
    width = 2 if precision == "bf16" else 4
    queries = model.attention_heads * model.head_width
    keys = model.kv_groups * model.head_width
    # Forward and backward, in elements a token and layer.
    norms = 2 * 8 * model.hidden_size
    swiglu = 0 if swiglu_inside else 8 * model.ffn_hidden_size
    elements = norms + swiglu + 4 * (queries + keys)
    moved = width * (tokens * model.layers * elements + 2 * predicted * model.vocabulary_size)
    lora = recipe.lora if isinstance(recipe, Tuning) else None
    trained = trained_parameters(model, lora) / (layout.tensor * layout.pipeline)
    # Zeroed whole; then of this rank's part the norm (4), the gradient, master copy and two
    # moments read and written (28), and the weights written.
    own = trained / (data_parallel * layout.context)
    return {
        "layer_flop": layers / gpus,
        "head_flop": head / gpus,
        "attention_flop": (flops - layers - head) / gpus,
        "elementwise_bytes": moved / gpus,
        "optimizer_bytes": 4 * trained + (4 + 28 + width) * own,
    }
