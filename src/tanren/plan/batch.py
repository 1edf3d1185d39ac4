"""Batch arithmetic."""

from __future__ import annotations

from tanren.config.errors import RequestError
from tanren.config.fields import Strict
from tanren.config.training import Layout, Midtrain, Training


def ceil_div(a: int, b: int) -> int:
    """`a / b`, rounded up."""
    return -(-a // b)


class Cut(Strict):
    """How a global batch lies over the processes."""

    data_parallel: int
    micro_batch: int


class Batch(Cut):
    """How a global batch is cut, and how many of them the run takes."""

    accumulation: int
    steps: int
    tokens_per_step: int

    @property
    def tokens(self) -> int:
        """Tokens that the whole run trains on."""
        return self.steps * self.tokens_per_step


def data_parallel_size(layout: Layout, gpus: int, place: str) -> int:
    """Data-parallel size: what the recipe says, else every GPU that the model leaves, else 1."""
    if layout.data is not None:
        needed = layout.data * layout.model_parallel
        if gpus and needed > gpus:
            raise RequestError(
                f"{place}: layout",
                f"needs {needed} processes, and there are {gpus} GPUs",
                "use a smaller layout, or leave layout.data out",
            )
        return layout.data
    if not gpus:
        return 1
    if gpus % layout.model_parallel:
        raise RequestError(
            f"{place}: layout",
            f"{gpus} GPUs are not a multiple of {layout.model_parallel} (tensor {layout.tensor} x "
            f"pipeline {layout.pipeline} x context {layout.context})",
            "change the layout, or state layout.data to use fewer GPUs",
        )
    return gpus // layout.model_parallel


def tokens_per_step(recipe: Midtrain) -> int:
    """Tokens of one global batch."""
    return recipe.sequence_length * recipe.global_batch


def stated_steps(recipe: Midtrain) -> int | None:
    """Steps of the whole run as the recipe states them; None where they follow from the mix."""
    if recipe.tokens is not None:
        return ceil_div(recipe.tokens, tokens_per_step(recipe))
    return recipe.steps


def make_batch(recipe: Midtrain, data_parallel: int, place: str, *, steps: int) -> Batch:
    """Cut the global batch into micro batches.

    Args:
        steps: of the whole run.
    Raises:
        RequestError: the global batch does not divide; the message names the nearest that do.
    """
    check_divides(f"{place}: global_batch", recipe.global_batch, recipe, data_parallel)
    return Batch(
        data_parallel=data_parallel,
        micro_batch=recipe.rows,
        accumulation=recipe.global_batch // (data_parallel * recipe.rows),
        steps=steps,
        tokens_per_step=tokens_per_step(recipe),
    )


def check_divides(place: str, sequences: int, recipe: Training, data_parallel: int) -> None:
    """Refuse a number of sequences that does not fill the micro batches of every replica."""
    divisor = data_parallel * recipe.rows
    if sequences % divisor:
        below = sequences // divisor * divisor
        nearest = [str(n) for n in (below, below + divisor) if n > 0]
        raise RequestError(
            place,
            f"{sequences} is not a multiple of {divisor} (data parallel {data_parallel} x "
            f"micro_batch {recipe.rows})",
            f"use {' or '.join(nearest)}",
        )
