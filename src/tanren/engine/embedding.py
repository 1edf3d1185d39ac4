"""The vocabulary's embedding, whose gradient goes where it is added up."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch.autograd.function import once_differentiable

from tanren.engine.main_grad import already_in_main_grad


class _Lookup(torch.autograd.Function):
    """Rows of a weight; their gradients join its main_grad."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Weight [pieces, hidden], rows [...]; [..., hidden]."""
        ctx.save_for_backward(rows)
        ctx.weight = weight
        return F.embedding(rows, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (rows,) = ctx.saved_tensors
        total = ctx.weight.main_grad
        # On a GPU sorted by piece, and so in one order; index_add_ adds as its threads come.
        total.index_put_(
            (rows.flatten(),), gradient.flatten(0, -2).to(total.dtype), accumulate=True
        )
        return already_in_main_grad(ctx.weight), None


def _joins(weight: Any) -> bool:
    """Whether a weight's gradient is one that `_Lookup` adds up.

    A frozen weight has none. A tied one gets another by the head, and megatron-core adds both. In
    bf16 main gradients the rows of a frequent piece would be lost in their sum one by one. On a CPU
    index_put_ adds in no fixed order.
    """
    main_grad = getattr(weight, "main_grad", None)
    tied = getattr(weight, "zero_out_wgrad", False)
    in_fp32 = main_grad is not None and main_grad.dtype == torch.float32
    return bool(weight.is_cuda and in_fp32 and not tied)


def rows_of(tokens: torch.Tensor, first: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a rank that holds some rows of the vocabulary, which one each token takes.

    Returns:
        the rows; and where a token is another rank's, and takes any. Those are spread over all
        rows, since gradients that meet in one row wait for one another.
    """
    mine = tokens - first
    elsewhere = (mine < 0) | (mine >= rows)
    spread = torch.arange(tokens.numel(), device=tokens.device).view_as(tokens) % rows
    return torch.where(elsewhere, spread, mine), elsewhere


class Embedding(VocabParallelEmbedding):
    """megatron-core's layer, made by GPTModel, with another backward pass.

    A micro batch has some thousand tokens of some hundred thousand pieces. torch makes a gradient
    of the whole vocabulary of it, which is filled with noughts and then added to main_grad: 8 bytes
    moved for each of the weight's elements, where the rows of these tokens are all that changes.
    """

    @classmethod
    def take_over(cls, layer: VocabParallelEmbedding) -> None:
        """Make GPTModel's embedding one of these."""
        layer.__class__ = cls

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, sequence]; as megatron-core: [batch, sequence, hidden], or with sequence
        parallelism this rank's [sequence, batch, hidden].
        """
        if not _joins(self.weight):
            return super().forward(tokens)
        rows, elsewhere = tokens, None
        if self.tp_group.size() > 1:
            rows, elsewhere = rows_of(
                tokens, self.vocab_start_index, self.num_embeddings_per_partition
            )
        found: torch.Tensor = _Lookup.apply(  # type: ignore[no-untyped-call]
            self.weight, rows
        )
        if elsewhere is not None:
            found = found.masked_fill(elsewhere[..., None], 0)
        if self.reduce_scatter_embeddings:
            found = found.transpose(0, 1).contiguous()
            return reduce_scatter_to_sequence_parallel_region(found, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(found, group=self.tp_group)
