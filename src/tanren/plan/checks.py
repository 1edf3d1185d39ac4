"""What a plan refuses: a recipe that does not fit its model, its base, its data or its machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tanren.config.errors import RequestError
from tanren.config.model import Model
from tanren.config.training import Training


def check_vocabulary(
    recipe_file: object, model: Model, tokenizer_size: int, tokenizer: object
) -> None:
    """Refuse a tokenizer that has ids beyond the model's embedding rows."""
    if tokenizer_size > model.vocabulary_size:
        raise RequestError(
            recipe_file,
            f"the model has {model.vocabulary_size} embedding rows and the tokenizer {tokenizer} "
            f"has {tokenizer_size} pieces",
            "use the tokenizer that the model was trained with, or a model shape that fits",
        )


def check_shape(place: str, model: Model, base: Path, there: Mapping[str, Any]) -> None:
    """Refuse a base of another shape, naming each field with both values."""
    here = {**model.model_dump(mode="json"), "head_size": model.head_width}
    # One that follows from the others may be stated or not.
    usual = there["hidden_size"] // there["attention_heads"]
    there = {**there, "head_size": there.get("head_size") or usual}
    differing = [
        f"{key} {there.get(key)} there, {here[key]} here"
        for key in here
        if key != "init_std" and there.get(key) != here[key]
    ]
    if differing:
        raise RequestError(
            f"{place}: init",
            f"the base {base} has another shape: {'; '.join(differing)}",
            "make the recipe's model the base's, or convert another base",
        )


def check_layout(recipe: Training, model: Model, device: str, place: str) -> None:
    layout = recipe.layout
    problems = [
        (model.attention_heads % layout.tensor, "attention_heads", model.attention_heads,
         "tensor", layout.tensor),
        (model.kv_groups % layout.tensor, "kv_groups", model.kv_groups, "tensor", layout.tensor),
        (model.ffn_hidden_size % layout.tensor, "ffn_hidden_size", model.ffn_hidden_size,
         "tensor", layout.tensor),
        (model.padded_vocabulary % layout.tensor, "padded vocabulary", model.padded_vocabulary,
         "tensor", layout.tensor),
        (model.layers % layout.pipeline, "layers", model.layers, "pipeline", layout.pipeline),
        (recipe.sequence_length % (2 * layout.context) if layout.context > 1 else 0,
         "sequence_length", recipe.sequence_length, "2 x context", 2 * layout.context),
        (recipe.row_length % (layout.tensor * layout.context)
         if layout.sequence_parallel else 0,
         "sequence_length", recipe.row_length, "tensor x context",
         layout.tensor * layout.context),
    ]  # fmt: skip
    for remainder, what, value, divisor_name, divisor in problems:
        if remainder:
            raise RequestError(
                f"{place}: layout",
                f"{what} {value} is not a multiple of {divisor_name} {divisor}",
                "choose a size that divides it",
            )
    if device == "cpu":
        if recipe.fp8 != "none":
            raise RequestError(
                f"{place}: fp8",
                f"{recipe.fp8} needs a GPU, and this machine has none",
                "--set fp8=none",
            )
        if recipe.attention == "flash4":
            raise RequestError(
                f"{place}: attention",
                "flash4 needs a GPU, and this machine has none",
                "--set attention=auto",
            )
        if layout.context > 1:
            raise RequestError(
                f"{place}: layout.context",
                f"{layout.context} needs Transformer Engine on GPUs, and this machine has none",
                "--set layout.context=1",
            )
    if recipe.attention == "flash4" and layout.context > 1:
        raise RequestError(
            f"{place}: attention",
            f"flash4 knows no context parallelism (layout.context {layout.context})",
            "--set attention=auto takes Transformer Engine's",
        )
    if recipe.attention == "flash4" and recipe.precision == "fp32":
        raise RequestError(
            f"{place}: attention", "flash4 goes with precision bf16, not fp32",
            "--set attention=auto",
        )  # fmt: skip
    if recipe.fp8 != "none" and recipe.precision == "fp32":
        raise RequestError(
            f"{place}: fp8", f"{recipe.fp8} goes with precision bf16, not fp32", "--set fp8=none"
        )


def check_schedule(recipe: Training, steps: int, place: str) -> None:
    schedule = recipe.schedule
    if schedule.warmup_steps >= steps:
        raise RequestError(
            f"{place}: schedule.warmup_steps",
            f"{schedule.warmup_steps} are not fewer than the run's {steps} steps",
            f"use at most {steps - 1}",
        )
    if schedule.decay_steps and schedule.decay_steps + schedule.warmup_steps > steps:
        raise RequestError(
            f"{place}: schedule.decay_steps",
            f"{schedule.decay_steps} and {schedule.warmup_steps} of warm-up are more than the "
            f"run's {steps} steps",
            f"use at most {max(steps - schedule.warmup_steps, 0)}",
        )
    if schedule.constant_steps + schedule.warmup_steps >= steps:
        raise RequestError(
            f"{place}: schedule.constant_steps",
            f"{schedule.constant_steps} and {schedule.warmup_steps} of warm-up leave none of the "
            f"run's {steps} steps to the decay",
            f"use at most {max(steps - schedule.warmup_steps - 1, 0)}",
        )
