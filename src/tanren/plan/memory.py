"""GPU memory of training, per GPU, before anything runs.

Counted from what the engine keeps, not fitted: weights, main gradients, the optimizer's share, what
each layer saves for its backward pass, and the logits. The formula and its comparison with measured
peaks are in docs/memory.md.
"""

from __future__ import annotations

from tanren.config.fields import Strict
from tanren.config.model import Model
from tanren.config.training import Dpo, Layout, Lora, Training, Tuning

GIB = 2**30
# What no formula sees: the CUDA context, NCCL's buffers, and the allocator's gaps.
RESERVED_GIB = 4.0
# Tokens whose logits the head makes at a time.
HEAD_TOKENS = 4096


class Memory(Strict):
    """Peak memory of one GPU in GiB, by what it is for."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def checkpoint_gib(model: Model, precision: str, lora: Lora | None = None) -> float:
    """Size of one checkpoint: what is trained, and the optimizer's master copy and two moments."""
    return trained_parameters(model, lora) * (14 if precision == "bf16" else 12) / GIB


def trained_parameters(model: Model, lora: Lora | None = None) -> int:
    """All parameters, or those of the adapters."""
    return model.parameters if lora is None else model.layers * _adapters(model, lora)


def _adapters(model: Model, lora: Lora) -> int:
    """Elements of one layer's adapters: of each linear layer rank x (inputs + outputs)."""
    heads, groups, width = model.attention_heads, model.kv_groups, model.head_width
    sizes = {
        "attention_qkv": model.hidden_size + (heads + 2 * groups) * width,
        "attention_dense": heads * width + model.hidden_size,
        "mlp_fc1": model.hidden_size + 2 * model.ffn_hidden_size,
        "mlp_fc2": model.ffn_hidden_size + model.hidden_size,
    }
    return lora.rank * sum(sizes[name] for name in lora.linears)


def training_memory(
    model: Model, recipe: Training, *, precision: str, data_parallel: int, accumulation: int
) -> Memory:  # fmt: skip
    """The peak of the GPU that needs the most.

    Args:
        recipe: with its micro batch and main gradients chosen.
        precision: `bf16` or `fp32`.
        accumulation: micro batches a step; a pipeline keeps at most that many in flight.
    """
    first, last = (
        _stage(model, recipe, precision, data_parallel, accumulation, first=first)
        for first in (True, False)
    )
    return max(first, last, key=lambda memory: memory.total)


def states_gib(model: Model, recipe: Training, precision: str) -> float:
    """What one whole copy of the weights, their gradients and the optimizer takes."""
    lora = recipe.lora if isinstance(recipe, Tuning) else None
    trained = model.layers * _adapters(model, lora) if lora is not None else model.parameters
    width = 2 if precision == "bf16" else 4
    return (model.parameters * width + trained * sum(_bytes(recipe, precision))) / GIB


def _stage(
    model: Model, recipe: Training, precision: str, data_parallel: int, accumulation: int,
    *, first: bool,
) -> Memory:  # fmt: skip
    """The first pipeline stage keeps the most micro batches; the last one has the logits."""
    layout = recipe.layout
    whole = layout.pipeline == 1
    width = 2 if precision == "bf16" else 4
    layers = model.layers / layout.pipeline
    matrices = layers * _layer_matrices(model) / layout.tensor
    table = model.padded_vocabulary * model.hidden_size / layout.tensor
    tables = 2 if whole and not model.tied_embeddings else 1
    parameters = matrices + tables * table + layers * 2 * model.hidden_size
    state, gradient = _bytes(recipe, precision)
    tokens = recipe.rows * recipe.row_length / layout.context
    in_flight = min(layout.pipeline, accumulation) if first else 1
    weights = parameters * width
    trained, lora = parameters, recipe.lora if isinstance(recipe, Tuning) else None
    if lora is not None:
        # Counted whole on each tensor-parallel rank: a part of them is.
        trained = layers * _adapters(model, lora)
        weights += trained * width
    if recipe.fp8 != "none":
        # Each matrix is kept in FP8 and, since Hopper multiplies rows by rows alone, transposed.
        weights += matrices * 2
    logits = 0.0
    if whole or not first:
        # They are turned into their gradient in place, some tokens at a time; dpo keeps them all.
        at_once = tokens if isinstance(recipe, Dpo) else min(tokens, HEAD_TOKENS)
        logits = at_once * model.padded_vocabulary / layout.tensor * width
        if recipe.fp8 != "none" and not isinstance(recipe, Dpo):
            # Their gradient in FP8, as it stands and transposed; and the head's weight, transposed.
            logits *= 2
            weights += table
    return Memory(
        weights=weights / GIB,
        gradients=trained * gradient / GIB,
        optimizer=trained * state / (data_parallel * layout.context) / GIB,
        activations=in_flight * tokens * _saved(model, layout, recipe, layers, width) / GIB,
        logits=logits / GIB,
    )


def _bytes(recipe: Training, precision: str) -> tuple[int, int]:
    """Bytes of a parameter that the optimizer keeps, and those of its main gradient."""
    if precision == "fp32":
        return 8, 4
    # Of the fp32 master copy, the half that the bf16 weight is not; and two moments.
    moments = 2 * (2 if recipe.optimizer.moments == "bf16" else 4)
    return 2 + moments, 2 if recipe.main_gradients == "bf16" else 4


def _layer_matrices(model: Model) -> int:
    """Elements of one layer's matrices."""
    heads = model.attention_heads + model.kv_groups
    return 2 * model.hidden_size * model.head_width * heads + 3 * model.hidden_size * (
        model.ffn_hidden_size
    )


def _saved(model: Model, layout: Layout, recipe: Training, layers: float, width: int) -> float:
    """Bytes a token that a stage's layers keep for the backward pass.

    A layer keeps the inputs of both norms and their outputs, queries, keys and values, attention's
    output, and the two halves and the product of the gated unit. Flash attention keeps no scores.
    """
    hidden = model.hidden_size / (layout.tensor if layout.sequence_parallel else 1)
    queries = model.attention_heads * model.head_width / layout.tensor
    keys_and_values = 2 * model.kv_groups * model.head_width / layout.tensor
    inner = model.ffn_hidden_size / layout.tensor
    # What only a matrix product reads again; with FP8 it is kept in one byte, and attention's
    # output, which attention reads as well, in both.
    multiplied = 2 * hidden + inner
    if recipe.linear == "quack":
        # The gated unit's product is made once more.
        multiplied -= inner
    kept = 2 * hidden + queries + keys_and_values + queries + 2 * inner
    if recipe.fp8 == "none":
        layer = width * (multiplied + kept)
    else:
        layer = multiplied + queries + width * kept
    if layout.recompute == "full":
        return layers * width * hidden + layer
    return layers * layer
