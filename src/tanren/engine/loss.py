"""The loss: cross-entropy and z-loss, summed over the tokens that count, with their number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

# Logits that are in fp32 at a time, for the z-loss: 256 MiB of them.
_CHUNK = 2**26


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


class _CrossEntropyAndLogZ(torch.autograd.Function):
    """Keeps the logits alone, and turns them into their gradient in place, some rows at a time.

    Drop it when Transformer Engine's cross-entropy, one kernel, gives log Z or takes a z-loss
    (its pull request 2707).
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [tokens, vocabulary / tensor parallel], labels [tokens]; two of [tokens]."""
        highest = logits.amax(-1).float()
        dist.all_reduce(highest, dist.ReduceOp.MAX, group)
        column = labels - group.rank() * logits.size(-1)
        mine = (column >= 0) & (column < logits.size(-1))
        column = column.where(mine, 0)
        wanted = logits.gather(-1, column[:, None])[:, 0].float() - highest
        exponentials = torch.empty_like(highest)
        for rows in _chunks(logits):
            shifted = logits[rows].float() - highest[rows, None]
            exponentials[rows] = shifted.exp_().sum(-1)
        sums = torch.stack([exponentials, wanted.where(mine, 0)])
        dist.all_reduce(sums, group=group)
        above_highest = sums[0].log()
        log_z = above_highest + highest
        ctx.save_for_backward(logits, column, mine, log_z)
        return above_highest - sums[1], log_z

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_losses: torch.Tensor, d_log_z: torch.Tensor
    ) -> tuple[torch.Tensor, None, None]:
        """Every logit moves both by its probability; the label's moves the cross-entropy by -1."""
        logits, column, mine, log_z = ctx.saved_tensors
        gradient = logits.detach()
        weight, label = d_losses + d_log_z, d_losses * mine
        for rows in _chunks(gradient):
            part = (gradient[rows].float() - log_z[rows, None]).exp_().mul_(weight[rows, None])
            part.scatter_add_(-1, column[rows, None], -label[rows, None])
            gradient[rows] = part.to(gradient.dtype)
        return gradient, None, None


def _chunks(logits: torch.Tensor) -> Iterator[slice]:
    rows = max(_CHUNK // logits.size(-1), 1)
    for first in range(0, logits.size(0), rows):
        yield slice(first, first + rows)


def cross_entropy_and_log_z(
    logits: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy and log Z (the logarithm of the softmax's denominator), Z computed once.

    The backward pass overwrites the logits with their gradient, so that there is no second copy.

    Args:
        logits: [..., vocabulary / tensor parallel], this rank's columns, padding hidden.
        labels: [...], over the whole vocabulary.
        group: the tensor-parallel ranks, over whose columns the softmax goes.
    Returns:
        both in nats and fp32, of the labels' shape, and the same on every rank of the group.
    """
    losses, log_z = _CrossEntropyAndLogZ.apply(  # type: ignore[no-untyped-call]
        logits.view(-1, logits.size(-1)), labels.reshape(-1), group
    )
    return losses.view(labels.shape), log_z.view(labels.shape)


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
