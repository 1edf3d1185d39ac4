"""The loss counts what it should and nothing else; the z-loss is that of the whole vocabulary."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from tanren.engine import loss as module
from tanren.engine.loss import cross_entropy_and_log_z, hide_padding, token_loss


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


# 24 columns of which 11 are real, so that of two ranks the second one has padding alone.
SEQUENCE, BATCH, PADDED, REAL, COEFFICIENT = 5, 3, 24, 11, 1e-2


def example() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits far from nought (the highest over 200), labels, and a weight for each token."""
    torch.manual_seed(1)
    logits = 8 * torch.randn(SEQUENCE, BATCH, PADDED) + 200
    return logits, torch.randint(REAL, (SEQUENCE, BATCH)), torch.rand(SEQUENCE, BATCH)


def train_on(rank: int, ranks: int, folder: Path, dtype: torch.dtype) -> None:
    """One rank's part of the vocabulary: its losses, log Z and gradient go to a file."""
    store = dist.FileStore(str(folder / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    assert dist.group.WORLD is not None
    # Four rows at a time of fifteen tokens.
    module._CHUNK = 4 * PADDED // ranks
    logits, labels, weights = example()
    leaf = logits.to(dtype).chunk(ranks, dim=-1)[rank].clone().requires_grad_()
    part = leaf * 1
    hide_padding(part, REAL, rank)
    losses, log_z = cross_entropy_and_log_z(part, labels, dist.group.WORLD)
    (weights * (losses + COEFFICIENT * log_z.square())).sum().backward()
    torch.save((losses, log_z, leaf.grad), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("ranks", "dtype", "near"),
    [(1, torch.float32, 2e-5), (2, torch.float32, 2e-5), (2, torch.bfloat16, 4e-3)],
)
def test_the_z_loss_is_that_of_the_whole_vocabulary_in_fp64(
    tmp_path: Path, ranks: int, dtype: torch.dtype, near: float
) -> None:
    multiprocessing.spawn(train_on, (ranks, tmp_path, dtype), ranks)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)]

    logits, labels, weights = example()
    dense = logits.to(dtype).double().requires_grad_()
    log_z = dense[..., :REAL].logsumexp(-1)
    losses = log_z - dense.gather(-1, labels[..., None])[..., 0]
    (weights * (losses + COEFFICIENT * log_z.square())).sum().backward()
    assert dense.grad is not None

    for found in parts:
        torch.testing.assert_close(found[0].double(), losses.detach(), rtol=1e-6, atol=1e-4)
        torch.testing.assert_close(found[1].double(), log_z.detach(), rtol=1e-6, atol=0.0)
    gradient = torch.cat([found[2] for found in parts], -1)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient.double(), dense.grad, rtol=near, atol=near / 10)


def test_the_logits_become_their_gradient(tmp_path: Path) -> None:
    """No second tensor of the logits' size is kept for the backward pass or made by it."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        logits, labels, _ = example()
        part = logits.requires_grad_() * 1
        places: list[int] = []
        part.register_hook(lambda gradient: places.append(gradient.data_ptr()))
        assert dist.group.WORLD is not None
        losses, log_z = cross_entropy_and_log_z(part, labels, dist.group.WORLD)
        (losses + log_z.square()).sum().backward()
        assert places == [part.data_ptr()]
    finally:
        dist.destroy_process_group()
