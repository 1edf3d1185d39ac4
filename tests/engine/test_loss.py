"""The loss counts what it should and nothing else."""

from __future__ import annotations

import pytest
import torch

from tanren.engine.loss import hide_padding, token_loss


def test_masked_tokens_do_not_count() -> None:
    losses = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]], requires_grad=True)
    mask = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    total, tokens, report = token_loss(mask, losses)
    assert (total.item(), tokens.item(), report.tolist()) == (21.0, 3, [21.0, 3.0])
    total.backward()
    assert losses.grad is not None
    assert losses.grad.tolist() == mask.tolist()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_padding_is_hidden_on_every_tensor_parallel_rank(ranks: int) -> None:
    """Ten real columns of sixteen: with four ranks the last one has padding alone."""
    torch.manual_seed(0)
    whole = torch.randn(3, 16)
    parts = [part.clone() for part in whole.chunk(ranks, dim=-1)]
    for rank, part in enumerate(parts):
        hide_padding(part, 10, rank)
    joined = torch.cat(parts, dim=-1)
    assert torch.equal(joined[:, :10], whole[:, :10])
    assert joined.softmax(-1)[:, 10:].sum() == 0
    torch.testing.assert_close(joined.softmax(-1)[:, :10], whole[:, :10].softmax(-1))
