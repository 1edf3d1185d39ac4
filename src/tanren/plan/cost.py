"""Whether a run fits its GPUs, and about how long it takes, before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from tanren.config.errors import RequestError
from tanren.config.model import Model
from tanren.config.training import Measured, Training, Tuning, by_nemo
from tanren.plan.kernels import HOPPER, quack_obstacle
from tanren.plan.memory import RESERVED_GIB, Memory, training_memory

# Peak of dense bf16 matrix products in TFLOP/s (NVIDIA's data sheets), by the name's beginning.
PEAK_TFLOPS = {"NVIDIA H200": 989.0, "NVIDIA H100": 989.0, "NVIDIA A100": 312.0}
# Shares of the bf16 peak that a first estimate takes. An assumption: 8.59 B parameters at sequence
# 4096 were measured at 52 % in bf16 without any fusion and at 77 % in FP8.
ASSUMED_SHARE = {"none": 0.50, "fp8": 0.70}


@dataclass(frozen=True)
class Gpu:
    """One GPU of the machine that runs the stage."""

    name: str
    memory_gib: float
    # quack-kernels is installed where the stage runs.
    quack: bool = False


def peak_tflops(gpu: str, fp8: str = "none") -> float | None:
    """A GPU's peak of dense matrix products by its name; in FP8 twice that in bf16."""
    peak = next((value for name, value in PEAK_TFLOPS.items() if gpu.startswith(name)), None)
    return None if peak is None else peak * (1 if fp8 == "none" else 2)


def estimated_hours(
    model: Model, recipe: Training, tokens: int, gpu: Gpu, gpus: int
) -> tuple[float, str] | None:
    """Hours of pure training and where they are from; None for an unknown GPU.

    From what the recipe says it was measured at, where that is what runs, else from the model's
    FLOPs and an assumed share.
    """
    if recipe.measured is not None and _measured_so(recipe, recipe.measured, gpu):
        rate = recipe.measured.tokens_per_second_per_gpu
        return tokens / (rate * gpus) / 3600, (
            f"at {rate:,.0f} tokens/s a GPU, measured on {recipe.measured.on}"
        )
    peak = peak_tflops(gpu.name)
    if peak is None:
        return None
    share = ASSUMED_SHARE["none" if recipe.fp8 == "none" else "fp8"]
    seconds = model.flops_per_token(recipe.sequence_length) * tokens / (peak * 1e12 * share * gpus)
    return seconds / 3600, f"at {share:.0%} of {gpus} x {peak:,.0f} TFLOP/s, an assumption"


def _measured_so(recipe: Training, measured: Measured, gpu: Gpu) -> bool:
    adapters = isinstance(recipe, Tuning) and recipe.lora is not None
    return (
        gpu.name.startswith(measured.gpu)
        and (measured.fp8, measured.sequence_length) == (recipe.fp8, recipe.sequence_length)
        and recipe.layout.model_parallel == 1
        and recipe.layout.recompute == "none"
        and not adapters
    )


AnyTraining = TypeVar("AnyTraining", bound=Training)

# Tokens of a micro batch over which nothing was measured to be gained, and the share of a GPU that
# what the plan chooses may fill: what a recipe states may fill all of it.
ENOUGH_TOKENS = 8192
CHOSEN_SHARE = 0.95


def fitted(
    model: Model, recipe: AnyTraining, data_parallel: int, sequences: tuple[int, ...],
    precision: str, gpu: Gpu | None,
) -> AnyTraining:  # fmt: skip
    """The recipe with its micro batch and main gradients chosen, where they are `auto`.

    fp32 gradients before bf16 ones, and of these the largest micro batch that fits: the sums over a
    step's micro batches come before a few per cent of speed. Where nothing fits, or the GPU is not
    known, the smallest: `check_memory` then says what to change.

    Args:
        sequences: numbers of rows that micro batches have to divide on every replica.
    """
    rows: list[Any] = [recipe.micro_batch]
    gradients: list[Any] = [recipe.main_gradients]
    if recipe.micro_batch == "auto":
        most = max(ENOUGH_TOKENS // recipe.row_length, 1) if gpu else 1
        powers = [2**power for power in reversed(range(most.bit_length()))]
        rows = [n for n in powers if all(s % (n * data_parallel) == 0 for s in sequences)] or [1]
    if recipe.main_gradients == "auto":
        gradients = ["fp32", "bf16"] if gpu and precision == "bf16" else ["fp32"]
    chosen = recipe
    for gradient in gradients:
        for row in rows:
            chosen = recipe.model_copy(update={"micro_batch": row, "main_gradients": gradient})
            if gpu is None:
                return chosen
            counted = _as_it_runs(model, chosen, precision, gpu)
            needed = _memory(model, counted, recipe.layout.pipeline, precision, data_parallel)
            if needed.total <= CHOSEN_SHARE * (gpu.memory_gib - RESERVED_GIB):
                return chosen
    return chosen


def check_memory(
    model: Model, recipe: Training, data_parallel: int, accumulation: int, precision: str,
    gpu: Gpu, place: str,
) -> Memory:  # fmt: skip
    """The memory that a GPU needs.

    Raises:
        RequestError: it has less; the message names the nearest changes that fit.
    """
    counted = _as_it_runs(model, recipe, precision, gpu)
    needed = _memory(model, counted, accumulation, precision, data_parallel)
    room = gpu.memory_gib - RESERVED_GIB
    if needed.total <= room:
        return needed
    ways = _ways(model, counted, data_parallel, accumulation, precision, room)
    ways = ways or _split_layers(model, recipe, data_parallel, accumulation, precision, room)
    # Near each other they must not look the same.
    digits = 0 if needed.total - room >= 1 else 1
    raise RequestError(
        f"{place}: micro_batch {recipe.micro_batch}",
        f"needs about {needed.total:.{digits}f} GiB a GPU ({explained(needed)}), and a {gpu.name} "
        f"has {room:.{digits}f} GiB for it",
        " or ".join(ways) if ways else "use more GPUs or a larger tensor or pipeline size",
    )


def _as_it_runs(model: Model, recipe: AnyTraining, precision: str, gpu: Gpu) -> AnyTraining:
    """With `linear: auto` as what a run on this GPU will take."""
    if recipe.linear != "auto" or not gpu.quack or not gpu.name.startswith(HOPPER):
        return recipe
    if by_nemo(recipe):
        return recipe
    lora = isinstance(recipe, Tuning) and recipe.lora is not None
    if quack_obstacle(precision, recipe.fp8, model, recipe.layout.tensor, lora=lora):
        return recipe
    return recipe.model_copy(update={"linear": "quack"})


def explained(memory: Memory) -> str:
    """`weights 16.0, gradients 32.0, ...` in GiB."""
    return ", ".join(f"{name} {value:.1f}" for name, value in memory.model_dump().items())


def _memory(
    model: Model, recipe: Training, accumulation: int, precision: str, data_parallel: int
) -> Memory:
    return training_memory(
        model, recipe, precision=precision, data_parallel=data_parallel, accumulation=accumulation
    )


def _ways(
    model: Model, recipe: Training, data_parallel: int, accumulation: int, precision: str,
    room: float,
) -> list[str]:  # fmt: skip
    """The smallest changes that fit: a smaller micro batch, recomputation, more GPUs."""

    def fits(changed: Training, ranks: int) -> bool:
        return _memory(model, changed, accumulation, precision, ranks).total <= room

    def smaller(recompute: str) -> int | None:
        layout = recipe.layout.model_copy(update={"recompute": recompute})
        for micro_batch in range(recipe.rows, 0, -1):
            changed = recipe.model_copy(update={"micro_batch": micro_batch, "layout": layout})
            divides = recipe.global_batch % (micro_batch * data_parallel) == 0
            if divides and fits(changed, data_parallel):
                return micro_batch
        return None

    ways = []
    plain = smaller(recipe.layout.recompute)
    if plain:
        ways.append(f"--set micro_batch={plain}")
    elif recipe.layout.recompute != "full":
        again = smaller("full")
        if again:
            ways.append(f"--set layout.recompute=full --set micro_batch={again}")
    for factor in range(2, 129):
        ranks = data_parallel * factor
        if recipe.global_batch % (recipe.rows * ranks) == 0 and fits(recipe, ranks):
            gpus = ranks * recipe.layout.model_parallel
            ways.append(f"{gpus} GPUs")
            break
    return ways


def _split_layers(
    model: Model, recipe: Training, data_parallel: int, accumulation: int, precision: str,
    room: float,
) -> list[str]:  # fmt: skip
    """The smallest tensor-parallel size that fits the same GPUs; none where the recipe states what
    does not go with one.
    """
    layout = recipe.layout
    if layout.data is not None or recipe.linear == "quack" or by_nemo(recipe):
        return []
    for tensor in (2, 4, 8):
        ranks, rest = divmod(data_parallel * layout.tensor, tensor)
        whole = model.kv_groups % tensor == 0 and model.ffn_hidden_size % tensor == 0
        if rest or not whole or tensor <= layout.tensor:
            continue
        for recompute in dict.fromkeys([layout.recompute, "full"]):
            for row in dict.fromkeys([recipe.rows, 1]):
                changed = recipe.model_copy(update={
                    "micro_batch": row,
                    "linear": "te",
                    "layout": layout.model_copy(update={"tensor": tensor, "recompute": recompute}),
                })  # fmt: skip
                fits = _memory(model, changed, accumulation, precision, ranks).total <= room
                if fits and recipe.global_batch % (row * ranks) == 0:
                    sets = [f"--set layout.tensor={tensor}"]
                    sets += [f"--set layout.recompute={recompute}"] * (
                        recompute != layout.recompute
                    )
                    sets += [f"--set micro_batch={row}"] * (row != recipe.rows)
                    return [" ".join(sets)]
    return []
