"""The loss: cross-entropy summed over the tokens that count, with their number."""

from __future__ import annotations

import torch


def hide_padding(logits: torch.Tensor, vocabulary_size: int, tensor_rank: int) -> None:
    """Take the vocabulary's padding rows out of the softmax, in place.

    Without this the untrained rows take part in the denominator, and the loss is not the one that
    Hugging Face computes for the same weights.

    Args:
        logits: [..., padded vocabulary / tensor parallel], this rank's columns.
        vocabulary_size: columns that are real, over all ranks.
        tensor_rank: this rank's place in its tensor-parallel group.
    """
    first_padding = vocabulary_size - tensor_rank * logits.size(-1)
    if first_padding < logits.size(-1):
        logits[..., max(first_padding, 0) :] = torch.finfo(logits.dtype).min / 2


def token_loss(
    loss_mask: torch.Tensor, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum the losses of the tokens that count.

    Args:
        loss_mask: [batch, sequence], 1 where a token counts.
        losses: [batch, sequence], cross-entropy in nats.
    Returns:
        the sum (to differentiate), the number of tokens (int), and both as one tensor [2].
    """
    mask = loss_mask.reshape(-1).float()
    total = (losses.reshape(-1).float() * mask).sum()
    tokens = mask.sum()
    return total, tokens.to(torch.int), torch.stack([total.detach(), tokens])
