"""Batch and mix arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from tanren.config.errors import RequestError
from tanren.config.schema import Layout, Midtrain, Strict


def ceil_div(a: int, b: int) -> int:
    """`a / b`, rounded up."""
    return -(-a // b)


class Batch(Strict):
    """How a global batch is cut, and how many of them the run takes."""

    data_parallel: int
    micro_batch: int
    accumulation: int
    steps: int
    tokens_per_step: int

    @property
    def tokens(self) -> int:
        """Tokens that the whole run trains on."""
        return self.steps * self.tokens_per_step


class SourceShare(Strict):
    """One source of the mix: what is there, what is taken."""

    name: str
    prefix: str
    tokens: int
    ratio: float
    weight: float
    epochs: float


@dataclass(frozen=True)
class SourceCount:
    """A preprocessed source as preprocess counted it."""

    name: str
    prefix: str
    tokens: int
    documents: int


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


def make_batch(recipe: Midtrain, data_parallel: int, place: str) -> Batch:
    """Cut the global batch into micro batches.

    Raises:
        RequestError: the global batch does not divide; the message names the nearest that do.
    """
    check_divides(f"{place}: global_batch", recipe.global_batch, recipe, data_parallel)
    tokens_per_step = recipe.sequence_length * recipe.global_batch
    steps = recipe.steps or ceil_div(recipe.tokens or 0, tokens_per_step)
    return Batch(
        data_parallel=data_parallel,
        micro_batch=recipe.micro_batch,
        accumulation=recipe.global_batch // (data_parallel * recipe.micro_batch),
        steps=steps,
        tokens_per_step=tokens_per_step,
    )


def check_divides(place: str, sequences: int, recipe: Midtrain, data_parallel: int) -> None:
    """Refuse a number of sequences that does not fill the micro batches of every replica."""
    divisor = data_parallel * recipe.micro_batch
    if sequences % divisor:
        below = sequences // divisor * divisor
        nearest = [str(n) for n in (below, below + divisor) if n > 0]
        raise RequestError(
            place,
            f"{sequences} is not a multiple of {divisor} (data parallel {data_parallel} x "
            f"micro_batch {recipe.micro_batch})",
            f"use {' or '.join(nearest)}",
        )


def make_mix(
    counts: tuple[SourceCount, ...],
    ratios: dict[str, float] | None,
    split: str,
    tokens: int,
    place: str,
    *,
    held_out: bool,
) -> tuple[SourceShare, ...]:
    """Weights and epochs of each source.

    A source weighs its token count times its ratio (1 where the mix does not name it). The epochs
    are over the training split, taken as its share of the tokens (Megatron splits by documents).
    """
    _check_split(counts, split, held_out, place)
    ratios = ratios or {}
    names = [count.name for count in counts]
    for name in ratios:
        if name not in names:
            raise RequestError(
                f"{place}: mix.{name}",
                "names no source of the data",
                f"the sources are {', '.join(names)}",
            )
    parts = [float(part) for part in split.split(",")]
    training_share = parts[0] / sum(parts)
    total = sum(count.tokens * ratios.get(count.name, 1.0) for count in counts)
    shares = []
    for count in counts:
        ratio = ratios.get(count.name, 1.0)
        weight = count.tokens * ratio / total
        epochs = weight * tokens / (count.tokens * training_share)
        shares.append(
            SourceShare(
                name=count.name,
                prefix=count.prefix,
                tokens=count.tokens,
                ratio=ratio,
                weight=weight,
                epochs=epochs,
            )
        )
    return tuple(shares)


def _check_split(counts: tuple[SourceCount, ...], split: str, held_out: bool, place: str) -> None:
    """Refuse a split that leaves a source without a document in a part that is read.

    megatron-core cuts each source by documents, and would look for samples in an empty part for
    ever. The rounding is its own.
    """
    parts = [float(part) for part in split.split(",")]
    ends = [sum(parts[: number + 1]) / sum(parts) for number in range(len(parts))]
    for count in counts:
        training = round(ends[0] * count.documents)
        evaluation = round(ends[1] * count.documents) - training
        problem = "to train on" if not training else "to hold out" if not evaluation else None
        if problem is None or (problem == "to hold out" and not held_out):
            continue
        raise RequestError(
            f"{place}: split",
            f"{split} leaves none of the {count.documents} documents of source {count.name} "
            f"{problem}",
            "give that part a larger share, leave the source out, or leave out the evaluation",
        )
