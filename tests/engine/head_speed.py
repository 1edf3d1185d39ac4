"""What the head costs, in several ways: `python -m tests.engine.head_speed OUT.json [TOKENS...]`.

Run by hand on one GPU, with nothing else on it: less than a minute of it for 4,096, 8,192 and
16,384 tokens, hidden size 4,096, 196,608 columns, bf16. Forward and backward together, the weight's
gradient into an fp32 main_grad, and for 8,192 tokens into a bf16 one. Transformer Engine and Liger
are compared where they are installed.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from tanren.engine import head, head_kernels
from tanren.engine.main_grad import add_product

HIDDEN, COLUMNS, REAL = 4096, 196_608, 196_480
TOKENS = (4096, 8192, 16384)
REPEATS, WARM_UP = 10, 2
CHECKED, ROWS = 64, 2048
BLOCKS = ((2048, 4), (4096, 4), (4096, 8), (8192, 4), (8192, 8), (16384, 8), (16384, 16),
          (32768, 16), (32768, 32))  # fmt: skip
TILES = ((64, 64), (64, 128), (128, 64), (128, 128))
# Losses and the gradient of the hidden states; the weight's gradient joins its main_grad.
Way = Callable[[torch.Tensor, Any, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class FusedLinear(torch.autograd.Function):
    """Logits, whose layer adds the weight's gradient to main_grad in its matrix product."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: Any) -> torch.Tensor:
        ctx.save_for_backward(hidden)
        ctx.weight = weight
        return hidden @ weight.T

    @staticmethod
    def backward(ctx: Any, d_logits: torch.Tensor) -> tuple[torch.Tensor, None]:
        (hidden,) = ctx.saved_tensors
        add_product(ctx.weight.main_grad, d_logits, hidden)
        return d_logits @ ctx.weight, None


def linear(hidden: torch.Tensor, weight: torch.Tensor, fused: bool) -> torch.Tensor:
    return FusedLinear.apply(hidden, weight) if fused else hidden @ weight.T


def backward(losses: torch.Tensor, hidden: torch.Tensor, weight: Any) -> Any:
    """Of the losses' sum; what is left for main_grad is added as megatron-core's hook does."""
    (torch.ones_like(losses) * losses).sum().backward()
    if weight.grad is not None:
        if not getattr(weight, "grad_added_to_main_grad", False):
            weight.main_grad.add_(weight.grad)
        weight.grad = None
    weight.grad_added_to_main_grad = False
    return losses.detach(), hidden.grad


def by_torch(hidden: torch.Tensor, weight: Any, labels: torch.Tensor) -> Any:
    logits = linear(hidden, weight, False)
    losses = F.cross_entropy(logits[:, :REAL].float(), labels, reduction="none")
    return backward(losses, hidden, weight)


def by_te(fused: bool, hidden: torch.Tensor, weight: Any, labels: torch.Tensor) -> Any:
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    logits = linear(hidden, weight, fused)
    logits[:, REAL:] = torch.finfo(logits.dtype).min / 2
    losses = parallel_cross_entropy(logits[None], labels[None])[0]
    return backward(losses, hidden, weight)


def by_logits(
    mine: head.Vocabulary, fused: bool, hidden: torch.Tensor, weight: Any, labels: torch.Tensor
) -> Any:
    losses = head.losses_of_logits(linear(hidden, weight, fused), labels, mine)[0]
    return backward(losses, hidden, weight)


def by_chunks(
    mine: head.Vocabulary, chunk: int, z_loss: float,
    hidden: torch.Tensor, weight: Any, labels: torch.Tensor, *, fp8: bool = False,
) -> Any:  # fmt: skip
    """With `fp8` gradients are products of it; the weight is cast once, as in a step."""
    ones = torch.ones(len(labels), device=labels.device)
    if fp8 and not hasattr(weight, "in_fp8"):
        from tanren.engine import head_fp8

        weight.in_fp8 = head_fp8.Weight().cast(weight.detach(), changed=True)
    losses = head.losses_by_chunks(
        hidden, weight, labels, mine, z_loss,
        loss_weights=ones, chunk=chunk, fp8=weight.in_fp8 if fp8 else None,
    )  # fmt: skip
    found, d_hidden = backward(losses, hidden, weight)
    return found[0], d_hidden


def by_liger(hidden: torch.Tensor, weight: Any, labels: torch.Tensor) -> Any:
    """It gives a sum alone, and knows no padding."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    real = weight.detach()[:REAL].requires_grad_()
    total = liger_fused_linear_cross_entropy(hidden, real, labels, reduction="sum")
    total.backward()
    weight.main_grad[:REAL].add_(real.grad)
    return total.detach()[None], hidden.grad


def products(hidden: torch.Tensor, weight: Any, labels: torch.Tensor) -> Any:
    """The three matrix products, and nothing else: no way is faster."""
    with torch.no_grad():
        logits = hidden @ weight.T
        d_hidden = logits @ weight
        add_product(weight.main_grad, logits, hidden)
    return logits[:, 0].float(), d_hidden


def ways(mine: head.Vocabulary) -> dict[str, Way]:
    return {
        "the three products alone": products,
        "torch": by_torch,
        "Transformer Engine": partial(by_te, False),
        "Transformer Engine, fused wgrad": partial(by_te, True),
        "ours, dense": partial(by_logits, mine, False),
        "ours, dense, fused wgrad": partial(by_logits, mine, True),
        "ours, chunks of 2048": partial(by_chunks, mine, 2048, 0.0),
        "ours, chunks of 4096": partial(by_chunks, mine, 4096, 0.0),
        "ours, chunks of 8192": partial(by_chunks, mine, 8192, 0.0),
        "ours, chunks of 4096, z-loss": partial(by_chunks, mine, 4096, 1e-4),
        "ours, chunks of 4096, FP8": partial(by_chunks, mine, 4096, 0.0, fp8=True),
        "Liger": by_liger,
    }


def inputs(tokens: int) -> tuple[torch.Tensor, Any, torch.Tensor]:
    """Logits of about N(0, 1.3²); half of the labels among the first rows."""
    torch.manual_seed(tokens)
    hidden = torch.randn(tokens, HIDDEN, device="cuda").bfloat16().requires_grad_()
    weight = (0.02 * torch.randn(COLUMNS, HIDDEN, device="cuda")).bfloat16().requires_grad_()
    labels = torch.randint(REAL, (tokens,), device="cuda")
    labels[::2] %= ROWS
    return hidden, weight, labels


def median_ms(call: Callable[[], Any]) -> float:
    """Of a call, by the GPU's clock, after a warm-up."""
    times = []
    for number in range(WARM_UP + REPEATS):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        call()
        ended.record()
        if number >= WARM_UP:
            times.append((began, ended))
    torch.cuda.synchronize()
    return statistics.median(began.elapsed_time(ended) for began, ended in times)


@torch.no_grad()
def in_fp64(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> tuple[Any, ...]:
    """Losses [tokens], d_hidden [tokens, hidden], and the first rows of the weight's gradient."""
    wide = weight.double()[:REAL]
    losses, d_hidden = [], []
    d_weight = torch.zeros(ROWS, HIDDEN, dtype=torch.float64, device="cuda")
    for part, at in zip(hidden.split(512), labels.split(512), strict=True):
        logits = part.double() @ wide.T
        log_z = logits.logsumexp(1, keepdim=True)
        losses.append((log_z - logits.gather(1, at[:, None]))[:, 0])
        gradient = logits.sub_(log_z).exp_()
        gradient[torch.arange(len(at), device="cuda"), at] -= 1
        d_hidden.append(gradient @ wide)
        d_weight += gradient[:, :ROWS].T @ part.double()
    return torch.cat(losses), torch.cat(d_hidden), d_weight


def off(found: torch.Tensor, true: torch.Tensor) -> float:
    """Relative, by the norm."""
    return float((found.double() - true).norm() / true.norm())


def measure(
    way: Way, hidden: torch.Tensor, weight: Any, labels: torch.Tensor, true: tuple[Any, ...]
) -> dict[str, float]:
    """Milliseconds, GiB beside what was there, and how far from fp64 the results are."""

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        hidden.grad = None
        return way(hidden, weight, labels)

    torch.cuda.empty_cache()
    weight.main_grad.zero_()
    hidden.grad = weight.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    losses, d_hidden = call()
    row = {"GiB": (torch.cuda.max_memory_allocated() - before) / 2**30}
    if len(losses) > 1:
        row["losses"] = float((losses[-CHECKED:].double() / true[0][-CHECKED:] - 1).abs().max())
    row["d_hidden"] = off(d_hidden[-CHECKED:], true[1][-CHECKED:])
    if len(true[0]) == len(labels):
        row["d_weight"] = off(weight.main_grad[:ROWS], true[2])
    del losses, d_hidden
    return {"ms": median_ms(call), **row}


def sweep() -> list[dict[str, Any]]:
    """Each pass alone over 4,096 tokens, in blocks of several sizes."""
    rows = []
    logits = torch.randn(4096, COLUMNS, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(REAL, (4096,), device="cuda")
    zeros = torch.zeros(4096, device="cuda")
    for block, warps in BLOCKS:
        size = {"block": block, "warps": warps}
        first = median_ms(
            partial(head_kernels.softmax_parts, logits, labels, 0, REAL, **size)
        )  # fmt: skip
        second = median_ms(
            partial(
                head_kernels.to_gradient, logits, labels, 0, REAL, zeros, zeros, zeros, zeros,
                **size,
            )
        )  # fmt: skip
        gigabytes = logits.nbytes / 1e6
        rows.append({**size, "softmax_ms": first, "softmax_GB/s": gigabytes / first,
                     "gradient_ms": second, "gradient_GB/s": 2 * gigabytes / second})  # fmt: skip
        print("  ".join(f"{name} {value:8.5g}" for name, value in rows[-1].items()), flush=True)
    logits.normal_()  # the gradient of the last of these passes lies there
    by_token = torch.empty(logits.shape, dtype=torch.float8_e5m2, device="cuda")
    by_column = by_token.new_empty(COLUMNS, 4096)
    scale = torch.ones(1, device="cuda")
    for tile in TILES:
        taken = median_ms(
            partial(
                head_kernels.to_fp8_gradient, logits, labels, 0, REAL, zeros, zeros, zeros, zeros,
                scale, by_token, by_column, tile=tile,
            )
        )  # fmt: skip
        rows.append({"rows": tile[0], "columns": tile[1], "fp8_gradient_ms": taken,
                     "fp8_gradient_GB/s": 2 * gigabytes / taken})  # fmt: skip
        print("  ".join(f"{name} {value:8.5g}" for name, value in rows[-1].items()), flush=True)
    return rows


def main(out: Path, sizes: tuple[int, ...]) -> None:
    """Measure, print a table, and write it down."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    mine = head.Vocabulary.of(REAL, COLUMNS, dist.group.WORLD)
    said: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    said["passes"], said["ways"] = sweep(), []
    runs = [(tokens, torch.float32) for tokens in sizes]
    runs += [(tokens, torch.bfloat16) for tokens in sizes if tokens == 8192]
    for tokens, dtype in runs:
        hidden, weight, labels = inputs(tokens)
        weight.main_grad = torch.zeros_like(weight, dtype=dtype)
        known = slice(None) if tokens <= 4096 else slice(-CHECKED, None)
        true = in_fp64(hidden[known], weight, labels[known])
        for name, way in ways(mine).items():
            row: dict[str, Any] = {"tokens": tokens, "main_grad": str(dtype)[6:], "way": name}
            try:
                row |= measure(way, hidden, weight, labels, true)
            except (ImportError, RuntimeError, TypeError) as why:
                row["failed"] = f"{type(why).__name__}: {why}"[:200]
            said["ways"].append(row)
            numbers = (
                f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, float)
            )
            print(f"{tokens:6} {row['main_grad']:9} {name:32}", *numbers, row.get("failed", ""),
                  sep="  ", flush=True)  # fmt: skip
            out.write_text(json.dumps(said, indent=1) + "\n")
        del hidden, weight, labels, true


if __name__ == "__main__":
    main(Path(sys.argv[1]), tuple(int(one) for one in sys.argv[2:]) or TOKENS)
