"""Packed micro batches (tanren.data.packing.collate) through the model.

Each example sees itself alone, and logits are made only where the loss counts. On a GPU the rows
are laid end to end, and Transformer Engine's attention takes the segments (thd); on a CPU they stay
rows, and a mask keeps the examples apart. Context parallelism is not offered.
"""

from __future__ import annotations

import torch
from megatron.core.packed_seq_params import PackedSeqParams


def packed_forward(
    batch: dict[str, torch.Tensor],
    model: torch.nn.Module,
    loss_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """One packed micro batch through this rank's part of the model.

    Args:
        loss_weights: [positions], what each loss counts in the sum that is differentiated: then
            nothing else may be. None where that is not known yet.
    Returns:
        on the last pipeline stage the losses where they count, in nats and fp32, in the order of
        batch["positions"]; on the others hidden states of the shape that `schedule_shape` says.
    """
    losses: torch.Tensor = model(
        batch["tokens"], batch["position_ids"], packed=batch, loss_mask=loss_weights
    )
    return losses


def schedule_shape(rows: int, width: int) -> tuple[int, int]:
    """seq_length and micro_batch_size for megatron-core's schedules, which size by them what they
    send between pipeline stages.
    """
    return (rows * width, 1) if torch.cuda.is_available() else (width, rows)


def sequence_params(cu_seqlens: torch.Tensor, longest: int) -> PackedSeqParams:
    """The segments, for Transformer Engine's attention and rotary embedding.

    Their number and the longest may change from micro batch to micro batch: since 1.13 Transformer
    Engine rounds up what cuDNN's graphs depend on (here segments to 32 or a power of two, tokens to
    a power of two). cu_seqlens_*_padded stay unset: there are no gaps between segments, and finding
    that out would wait for the GPU.
    """
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def block_mask(cu_seqlens: torch.Tensor, rows: int, width: int) -> torch.Tensor:
    """bool [rows, 1, width, width], true where a position (third) must not see another (fourth)."""
    positions = torch.arange(rows * width, dtype=torch.int32, device=cu_seqlens.device)
    segment = torch.searchsorted(cu_seqlens, positions, right=True).view(rows, width)
    other = segment[:, :, None] != segment[:, None, :]
    later = torch.ones_like(other[0]).triu(diagonal=1)
    return (other | later)[:, None]
