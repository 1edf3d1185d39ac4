"""The loss counts what it should and nothing else."""

from __future__ import annotations

import torch

from tanren.engine.loss import token_loss


def test_masked_tokens_do_not_count() -> None:
    losses = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]], requires_grad=True)
    mask = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    total, tokens, report = token_loss(mask, losses)
    assert (total.item(), tokens.item(), report.tolist()) == (21.0, 3, [21.0, 3.0, 0.0])
    total.backward()
    assert losses.grad is not None
    assert losses.grad.tolist() == mask.tolist()


def test_the_z_loss_is_trained_on_and_reported_apart() -> None:
    losses = torch.tensor([[[1.0, 2.0]], [[16.0, 32.0]]], requires_grad=True)
    total, tokens, report = token_loss(torch.tensor([[1.0, 0.0]]), losses)
    assert (total.item(), tokens.item(), report.tolist()) == (17.0, 1, [1.0, 1.0, 16.0])
    total.backward()
    assert losses.grad is not None
    assert losses.grad.tolist() == [[[1.0, 0.0]], [[1.0, 0.0]]]
