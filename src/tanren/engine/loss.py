"""The loss: cross-entropy and z-loss, summed over the tokens that count, with their number."""

from __future__ import annotations

import torch


def token_loss(
    loss_mask: torch.Tensor, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum the losses of the tokens that count.

    Args:
        loss_mask: [batch, sequence], 1 where a token counts.
        losses: [batch, sequence], cross-entropy in nats; or [2, batch, sequence], z-loss with it.
    Returns:
        the sum (to differentiate), the number of tokens (int), and [3] to report: cross-entropy,
        tokens, z-loss.
    """
    mask = loss_mask.reshape(-1).float()
    tokens = mask.sum()
    kinds = losses.view(-1, *loss_mask.shape)
    cross_entropy, *others = [(kind.reshape(-1).float() * mask).sum() for kind in kinds]
    z_loss = others[0] if others else torch.zeros_like(cross_entropy)
    report = torch.stack([cross_entropy, tokens, z_loss]).detach()
    return cross_entropy + z_loss, tokens.to(torch.int), report


def answer_loss(
    weights: torch.Tensor, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum the losses of a packed micro batch.

    Args:
        weights: [positions], 1 where a token counts, 0 where a micro batch has none.
        losses: [positions], cross-entropy in nats, as `packed_forward` gives them.
    Returns:
        the sum (to differentiate), the number of tokens (int), and [2] to report: cross-entropy,
        tokens.
    """
    total, tokens = (losses * weights).sum(), weights.sum()
    return total, tokens.to(torch.int), torch.stack([total, tokens]).detach()
