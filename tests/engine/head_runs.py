"""Run by test_head.py in processes of their own: one rank's part of the vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# 24 columns of which 11 are real: of three ranks the second has padding too, the third it alone.
TOKENS, WIDTH, PADDED, REAL = 15, 16, 24, 11
# Four tokens at a time, and more than there are.
CHUNKS = (4, 64)
COEFFICIENT = 1e-2
Found = dict[str, Any]


def example(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states and a weight whose logits are far from nought (the highest over 200), labels,
    and what each token counts.
    """
    torch.manual_seed(1)
    hidden = torch.randn(TOKENS, WIDTH)
    weight = 2 * torch.randn(PADDED, WIDTH)
    hidden[:, 0], weight[:, 0] = 20.0, 10.0
    labels, counts = torch.randint(REAL, (TOKENS,)), torch.rand(TOKENS)
    counts[3] = 0.0
    return hidden.to(dtype), weight.to(dtype), labels, counts


def expected(dtype: torch.dtype, z_loss: float) -> Found:
    """In fp64, from the same numbers."""
    hidden, weight, labels, counts = example(dtype)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = hidden @ weight[:REAL].T
    log_z = logits.logsumexp(1)
    losses = torch.stack([log_z - logits.gather(1, labels[:, None])[:, 0], z_loss * log_z.square()])
    (counts * losses).sum().backward()
    return {"losses": losses.detach(), "hidden": hidden.grad, "weight": weight.grad}


def one(
    mine: Any, dtype: torch.dtype, z_loss: float, chunk: int | None, main: torch.dtype | None
) -> Found:
    """This rank's losses and gradients; by chunks, or from the logits of all tokens."""
    from tanren.engine import head

    hidden, weight, labels, counts = example(dtype)
    hidden.requires_grad_()
    own: Any = weight[mine.first :][: PADDED // mine.group.size()].clone().requires_grad_()
    if main is not None:
        # As megatron-core's gradient buffers have it, with a micro batch before this one.
        own.main_grad, own.grad_added_to_main_grad = torch.ones_like(own, dtype=main), False
    if chunk is None:
        losses = head.losses_of_logits(hidden @ own.T, labels, mine, z_loss)
    else:
        losses = head.losses_by_chunks(
            hidden, own, labels, mine, z_loss, loss_weights=counts, chunk=chunk
        )
    (counts * losses).sum().backward()
    assert hidden.grad is not None
    d_hidden = hidden.grad.float()
    dist.all_reduce(d_hidden, group=mine.group)
    d_weight = own.grad if main is None else own.main_grad - 1
    assert main is None or own.grad_added_to_main_grad
    return {"losses": losses.detach(), "hidden": d_hidden, "weight": d_weight}


def cases() -> list[tuple[torch.dtype, float, int | None, torch.dtype | None]]:
    return [
        (dtype, z_loss, chunk, main)
        for dtype in (torch.float32, torch.bfloat16)
        for z_loss in (0.0, COEFFICIENT)
        for chunk in (None, *CHUNKS)
        for main in ((None,) if chunk is None else (None, torch.float32, dtype))
    ]


def run(rank: int, ranks: int, folder: Path) -> None:
    """Every case, to a file."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / f"store-{ranks}"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    from tanren.engine.head import Vocabulary

    assert dist.group.WORLD is not None
    mine = Vocabulary.of(REAL, PADDED // ranks, dist.group.WORLD)
    torch.save({case: one(mine, *case) for case in cases()}, folder / f"{ranks}-{rank}.pt")
    dist.destroy_process_group()
