"""Run by test_flash4.py on a Hopper GPU, `python -m tests.engine.flash4_check`: kernels' errors.

Results and gradients of FlashAttention 4 and of Transformer Engine, beside fp64's, as norms.
"""

from __future__ import annotations

from typing import Any

import torch
from transformer_engine.pytorch import DotProductAttention

from tanren.engine import flash4
from tanren.engine.packed import sequence_params

HEADS, GROUPS = 8, 2
# Lengths of packed segments, some of them of a whole tile, a token, or nothing; and none longer
# than a tile.
SEGMENTS = (700, 1, 37, 128, 129, 1000, 53, 0, 0)
SHORT = (100, 1, 37, 128, 64, 53, 0, 0)
Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def drawn(width: int, *around: int) -> tuple[Heads, torch.Tensor]:
    """Query, key and value, and the gradient of the result [..., heads x width]."""
    torch.manual_seed(width)

    def one(heads: int) -> torch.Tensor:
        wide = torch.randn(*around, heads, width, device="cuda")
        return wide.bfloat16().requires_grad_()

    upstream = torch.randn(*around, HEADS * width, device="cuda").bfloat16()
    return (one(HEADS), one(GROUPS), one(GROUPS)), upstream


def true_attention(heads: Heads, ends: list[int]) -> torch.Tensor:
    """Packed [tokens, heads, width] in fp64, of segments that end there."""
    query, key, value = heads
    key, value = (one.repeat_interleave(HEADS // GROUPS, 1) for one in (key, value))
    found, begin = [], 0
    for end in ends:
        q, k, v = (one[begin:end].transpose(0, 1) for one in (query, key, value))
        scores = q @ k.transpose(1, 2) / q.size(-1) ** 0.5
        later = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
        found.append((scores.masked_fill(later, -torch.inf).softmax(-1) @ v).transpose(0, 1))
        begin = end
    return torch.cat(found).flatten(1)


def errors(found: torch.Tensor, heads: Heads, upstream: torch.Tensor, true: Any) -> list[float]:
    """Of the result and the three gradients, relative, by the norm."""
    gradients = torch.autograd.grad(found, heads, upstream.view_as(found))
    return [
        float((one.double() - other).norm() / other.norm())
        for one, other in zip((found.view_as(true[0]), *gradients), true, strict=True)
    ]


def in_fp64(heads: Heads, upstream: torch.Tensor, ends: list[int], rows: bool) -> Any:
    """The result and the gradients; of rows [sequence, batch, ...] each is a segment."""

    def flat(one: torch.Tensor) -> torch.Tensor:
        return one.transpose(0, 1).flatten(0, 1) if rows else one

    wide: Any = tuple(one.detach().double().requires_grad_() for one in heads)
    result = true_attention(tuple(map(flat, wide)), ends)  # type: ignore[arg-type]
    if rows:
        sequence, batch = heads[0].shape[:2]
        result = result.view(batch, sequence, -1).transpose(0, 1)
    gradients = torch.autograd.grad(result, wide, upstream.double().view_as(result))
    return result.detach(), *gradients


def check(width: int, lengths: tuple[int, ...]) -> None:
    """Packed segments of these lengths, or without any rows of two samples."""
    packed = bool(lengths)
    if packed:
        ends = torch.tensor(lengths).cumsum(0).tolist()
        heads, upstream = drawn(width, ends[-1])
        cu_seqlens = torch.tensor([0, *ends], dtype=torch.int32, device="cuda")
        segments = sequence_params(cu_seqlens, max(lengths))
        theirs = {
            "qkv_format": "thd", "attn_mask_type": "padding_causal",
            "cu_seqlens_q": cu_seqlens, "cu_seqlens_kv": cu_seqlens,
            "max_seqlen_q": max(lengths), "max_seqlen_kv": max(lengths),
        }  # fmt: skip
    else:
        ends = [1024, 2048]
        heads, upstream = drawn(width, 1024, 2)
        segments, theirs = None, {"qkv_format": "sbhd", "attn_mask_type": "causal"}
    true = in_fp64(heads, upstream, ends, rows=not packed)
    te = DotProductAttention(HEADS, width, num_gqa_groups=GROUPS, attention_dropout=0.0)
    ours = errors(flash4.attend(*heads, segments), heads, upstream, true)
    by_te = errors(te(*heads, **theirs), heads, upstream, true)
    kind = f"packed {max(lengths)}" if packed else "rows"
    print(
        kind, width, "flash4", [f"{one:.4f}" for one in ours], "te", [f"{one:.4f}" for one in by_te]
    )
    assert all(one < 1.2 * other + 1e-4 for one, other in zip(ours, by_te, strict=True))


if __name__ == "__main__":
    for width in flash4.HEADS:
        for lengths in ((), SEGMENTS, SHORT):
            check(width, lengths)
    print("checked 6")
