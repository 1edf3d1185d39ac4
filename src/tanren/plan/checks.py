"""What a plan refuses: a recipe that does not fit its model, its base, its data or its machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tanren.config.errors import RequestError
from tanren.config.model import Model
from tanren.config.training import Training, Tuning


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
    _check_kernels(recipe, device, place)


def _check_kernels(recipe: Training, device: str, place: str) -> None:
    """Refuse what asks for kernels that this machine or this layout has not."""
    layout, flash4 = recipe.layout, recipe.attention == "flash4"
    quack, fp8, wide = recipe.linear == "quack", recipe.fp8, recipe.precision == "fp32"
    cpu, adapted = device == "cpu", isinstance(recipe, Tuning) and recipe.lora is not None
    no_gpu = "needs a GPU, and this machine has none"
    problems = [
        (cpu and fp8 != "none", "fp8", f"{fp8} {no_gpu}", "fp8=none"),
        (cpu and flash4, "attention", f"flash4 {no_gpu}", "attention=auto"),
        (cpu and quack, "linear", f"quack {no_gpu}", "linear=auto"),
        (cpu and layout.context > 1, "layout.context",
         f"{layout.context} needs Transformer Engine on GPUs, and this machine has none",
         "layout.context=1"),
        (flash4 and layout.context > 1, "attention",
         f"flash4 knows no context parallelism (layout.context {layout.context})",
         "attention=auto takes Transformer Engine's"),
        (quack and layout.tensor > 1, "linear",
         f"quack knows no tensor parallelism (layout.tensor {layout.tensor})",
         "linear=auto takes Transformer Engine's"),
        (quack and adapted, "linear", "quack knows no adapters (lora)",
         "linear=auto takes Transformer Engine's"),
        (quack and fp8 != "none", "linear", f"quack computes in bf16, not in FP8 ({fp8})",
         "linear=auto takes Transformer Engine's"),
        (flash4 and wide, "attention", "flash4 goes with precision bf16, not fp32",
         "attention=auto"),
        (quack and wide, "linear", "quack goes with precision bf16, not fp32", "linear=auto"),
        (fp8 != "none" and wide, "fp8", f"{fp8} goes with precision bf16, not fp32", "fp8=none"),
    ]  # fmt: skip
    for bad, field, problem, step in problems:
        if bad:
            raise RequestError(f"{place}: {field}", problem, f"--set {step}")


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
