"""FlashAttention 4 as the attention of GPU runs, where the package flash-attn-4 is installed.

It computes what Transformer Engine's does by cuDNN (causal, grouped heads, bf16, rows or packed
segments), faster on Hopper (docs/performance.md). It is a beta whose kernels are compiled at their
first call, some ten seconds, and what is called here is not its public part, which copies results
to another order; so a run takes it only in the version that was tried. To be dropped when
Transformer Engine offers it: megatron-core 0.16.1 wants one before 2.12.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch.autograd.function import once_differentiable

from tanren.config.errors import RequestError
from tanren.config.model import Model
from tanren.engine import hopper

PACKAGE, VERSION = "flash-attn-4", "4.0.0b36"
# Widths of a head that it was tried with.
HEADS = (64, 128)
# Packed micro batches of more segments take other kernels. So do those that say that no segment is
# longer than a tile, but what they say is a bound: it is kept above.
MOST_SEGMENTS, TILE = 256, 128


def wanted(attention: str, precision: str, shape: Model, context: int) -> bool:
    """Whether a run takes it.

    Args:
        attention: `auto`, `te` or `flash4`, as the recipe says.
        precision: `bf16` or `fp32`.
        context: the context-parallel size.
    Raises:
        RequestError: the recipe wants it, and it cannot be had here.
    """
    if attention == "te" or not torch.cuda.is_available():
        return False
    why = _obstacle(precision, shape, context)
    if why is not None and attention == "flash4":
        raise RequestError("attention", f"flash4 is not to be had: {why}", "--set attention=auto")
    return why is None


def _obstacle(precision: str, shape: Model, context: int) -> str | None:
    """Why it cannot be taken; None where it can."""
    if why := hopper.why_not_installed(PACKAGE, VERSION):
        return why
    if not _importable():
        return f"{PACKAGE} is installed, but another flash_attn hides it"
    if why := hopper.why_not_here():
        return why
    if shape.head_width not in HEADS:
        return f"it was tried with heads of {HEADS}, not of {shape.head_width}"
    if shape.kv_groups == shape.attention_heads:
        return "it was tried with grouped heads alone"
    if precision != "bf16":
        return f"it computes in bf16, and the run is in {precision}"
    if context > 1:
        return "with context parallelism Transformer Engine's is taken"
    return None


def _importable() -> bool:
    """Its modules lie in the folder of flash-attn 2, where that is installed too."""
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except ImportError:
        return False


def takes(packed: PackedSeqParams | None) -> bool:
    """Whether a micro batch is one that it was tried with."""
    if packed is None:
        return True
    segments: int = packed.cu_seqlens_q.numel() - 1
    return segments <= MOST_SEGMENTS


@cache
def _interface() -> Any:
    """The package's own, imported at the first call: it takes seconds."""
    from flash_attn.cute import interface
    from flash_attn.cute.cache_utils import JITPersistentCache

    # Ranks wait for one another's locks in the cache, and 15 s are few for many of them.
    JITPersistentCache.LOCK_TIMEOUT_SECONDS = 600
    return interface


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        segments: dict[str, Any],
    ) -> torch.Tensor:  # fmt: skip
        """See `attend`."""
        # In the order of what comes after it, so that nothing is copied.
        result = torch.empty_like(query)
        q, k, v, out = (_rows(one) for one in (query, key, value, result))
        _, logs, *_ = _interface()._flash_attn_fwd(
            q, k, v, causal=True, return_lse=True, out=out, **segments
        )
        ctx.save_for_backward(query, key, value, result, logs)
        ctx.segments = segments
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, result, logs = ctx.saved_tensors
        gradients = tuple(torch.empty_like(one) for one in (query, key, value))
        dq, dk, dv = (_rows(one) for one in gradients)
        q, k, v, out, d_out = (_rows(one) for one in (query, key, value, result, gradient))
        _interface()._flash_attn_bwd(
            q, k, v, out, d_out, logs, causal=True, dq=dq, dk=dk, dv=dv, **ctx.segments
        )
        return *gradients, None


def _rows(heads: torch.Tensor) -> torch.Tensor:
    """[sequence, batch, heads, width] with the batch first, as a view; packed ones as they are."""
    return heads.transpose(0, 1) if heads.dim() == 4 else heads


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSeqParams | None
) -> torch.Tensor:
    """Causal attention within a row or a segment.

    Args:
        query: [sequence, batch, heads, width]; packed [tokens, heads, width].
        key: with groups instead of heads; the value as well.
        packed: the segments, where they are packed.
    Returns:
        [sequence, batch, heads x width]; packed [tokens, heads x width].
    """
    segments: dict[str, Any] = {}
    if packed is not None:
        segments = {
            "cu_seqlens_q": packed.cu_seqlens_q,
            "cu_seqlens_k": packed.cu_seqlens_kv,
            "max_seqlen_q": max(packed.max_seqlen_q, TILE + 1),
            "max_seqlen_k": max(packed.max_seqlen_kv, TILE + 1),
        }
    found: torch.Tensor = _Attention.apply(  # type: ignore[no-untyped-call]
        query.contiguous(), key.contiguous(), value.contiguous(), segments
    )
    return found.flatten(-2)
