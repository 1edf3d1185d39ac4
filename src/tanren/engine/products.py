"""Matrix products by the package quack-kernels, where it is installed: with SwiGLU inside them, and
those of weights' gradients.

The product that makes gate and up applies SwiGLU to what it still holds in registers; the one that
makes SwiGLU's gradient turns it into those of gate and up, and makes SwiGLU's result once more, so
that it need not be kept. Two passes over memory fall away, and a tenth of a layer's activations.
Gate and up lie beside each other in between, so the products that read their gradient are the
package's as well. What else is not faster than cuBLAS's, on the Hopper GPUs where it was tried
(docs/performance.md), is left to torch; so are products in FP8, which were not tried.
"""

from __future__ import annotations

import logging
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

from tanren.config.errors import RequestError
from tanren.config.model import Model
from tanren.engine import hopper
from tanren.engine.main_grad import add_product
from tanren.plan.kernels import QUACK, QUACK_VERSION, quack_obstacle

logger = logging.getLogger("tanren")

PACKAGE, VERSION = QUACK, QUACK_VERSION
# Tiles of a weight's gradient. Where the last wave of them leaves more of the GPU idle than a tenth
# of the work, cuBLAS's are faster.
_TILE, _FILLED = (128, 192), 0.9


def wanted(
    linear: str, precision: str, fp8: str, shape: Model, tensor: int, *, lora: bool
) -> bool:  # fmt: skip
    """Whether a run takes it.

    Args:
        linear: `auto`, `te` or `quack`, as the recipe says.
        precision: `bf16` or `fp32`.
        fp8: the scaling of FP8, or `none`.
        tensor: the tensor-parallel size.
        lora: whether adapters stand beside linear layers.
    Raises:
        RequestError: the recipe wants it, and it cannot be had here.
    """
    if linear == "te" or not torch.cuda.is_available():
        return False
    why = _obstacle(precision, fp8, shape, tensor, lora=lora)
    if why is not None and linear == "quack":
        raise RequestError("linear", f"quack is not to be had: {why}", "--set linear=auto")
    if why is not None:
        logger.info("products by Transformer Engine: %s", why)
    return why is None


def _obstacle(precision: str, fp8: str, shape: Model, tensor: int, *, lora: bool) -> str | None:
    """Why it cannot be taken; None where it can."""
    if why := hopper.why_not_installed(PACKAGE, VERSION) or hopper.why_not_here():
        return why
    if why := quack_obstacle(precision, fp8, shape, tensor, lora=lora):
        return why
    try:
        _quack()
    except ImportError as error:
        return f"{PACKAGE} cannot be imported: {error}"
    return None


@cache
def _quack() -> Any:
    """What is taken of the package, imported at the first call: it takes seconds, and wants to know
    beforehand where it may keep what it compiles.
    """
    from quack.epilogue import library  # noqa: F401 (what gemm_act imports at its first call)
    from quack.gemm import gemm
    from quack.gemm_config import GemmConfig
    from quack.gemm_interface import gemm_act, gemm_dact

    # The fastest of seven that were timed on a hot GPU, and the same in each run.
    m, n = _TILE
    tiles = GemmConfig(
        tile_m=m, tile_n=n, pingpong=True, cluster_m=2, cluster_n=1, is_dynamic_persistent=False,
        device_capacity=hopper.CAPABILITY[0],
    )  # fmt: skip
    return SimpleNamespace(gemm=gemm, gemm_act=gemm_act, gemm_dact=gemm_dact, tiles=tiles)


def gate_up_and_swiglu(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x weightᵀ, and SwiGLU of it.

    Args:
        x: [tokens, hidden].
        weight: [2 x width, hidden], the gate's rows first.
    Returns:
        [tokens, 2 x width], gate and up of each channel beside each other; [tokens, width], made
        of them before they were rounded.
    """
    quack = _quack()
    gate_up = x.new_empty(x.size(0), weight.size(0))
    result = x.new_empty(x.size(0), weight.size(0) // 2)
    quack.gemm_act(
        x, weight.t(), activation="swiglu", preact_out=gate_up, postact_out=result,
        concat_layout=("B",), config=quack.tiles,
    )  # fmt: skip
    return gate_up, result


def swiglu_gradient(
    gradient: torch.Tensor, weight: torch.Tensor, gate_up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of gate and up, from that of what comes behind the product with SwiGLU.

    Args:
        gradient: [tokens, hidden].
        weight: [hidden, width], of that product.
        gate_up: as `gate_up_and_swiglu` makes it.
    Returns:
        [tokens, 2 x width], in gate_up's order; and SwiGLU's result once more, [tokens, width].
    """
    quack = _quack()
    found = torch.empty_like(gate_up)
    result = gate_up.new_empty(gate_up.size(0), gate_up.size(1) // 2)
    quack.gemm_dact(
        gradient, weight, gate_up, activation="swiglu", dx_out=found, postact_out=result,
        dynamic_scheduler=False, config=quack.tiles,
    )  # fmt: skip
    return found, result


def gated_input_gradient(of_gate_up: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """of_gate_up weight, [tokens, hidden].

    Args:
        of_gate_up: [tokens, 2 x width], in gate_up's order.
        weight: [2 x width, hidden], the gate's rows first.
    """
    found = of_gate_up.new_empty(of_gate_up.size(0), weight.size(1))
    # In its order, [m, k] and [n, k] to [m, n]; halves are put together in batches alone.
    _quack().gemm(
        of_gate_up[None], weight.t()[None], found[None], None, None, 256, 128, 1, 2,
        concat_layout=("B",),
    )  # fmt: skip
    return found


def add_weight_gradient(
    total: torch.Tensor, gradient: torch.Tensor, x: torch.Tensor, *, gated: bool = False
) -> None:
    """total += gradientᵀ x, see `main_grad.add_product`.

    Args:
        total: [out, in], in fp32 or bf16.
        gradient: [tokens, out].
        x: [tokens, in].
        gated: the gradient's columns are in gate_up's order, and the total's rows are not.
    """
    if not gated and not _fills(x.size(1), gradient.size(1), _processors(x.device)):
        add_product(total, gradient, x)
        return
    # A sum in bf16 is to be rounded once, so its kernel reads what it adds to.
    read = None if total.dtype == torch.float32 else total.t()[None]
    # As its transpose, which is faster.
    _quack().gemm(
        x.t()[None], gradient.t()[None], total.t()[None], read, None, *_TILE, 2, 1,
        pingpong=True, add_to_output=read is None,
        concat_layout=("C", "out") if gated else None,
    )  # fmt: skip


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _fills(rows: int, columns: int, processors: int) -> bool:
    """Whether tiles of a result keep so many multiprocessors at work to their end."""
    tiles = -(-rows // _TILE[0]) * -(-columns // _TILE[1])
    waves = -(-tiles // processors)
    return rows * columns >= _FILLED * waves * processors * _TILE[0] * _TILE[1]
