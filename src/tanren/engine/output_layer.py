"""The output layer: megatron-core's, with losses (head.py) where it makes logits."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
)

from tanren.engine import head, hopper


class Head(ColumnParallelLinear):
    """The output layer, which makes losses where it is given labels.

    It is megatron-core's layer, made by GPTModel, with another forward pass: a module's call waits
    for its weights, which the distributed optimizer gathers meanwhile.
    """

    vocabulary_size: int
    z_loss: float
    # Set by megatron-core before a step's first micro batch, as on Transformer Engine's layers.
    is_first_microbatch: bool
    # Where the weight is cast to FP8; None where the gradients' products stay in bf16.
    _fp8: Any | None
    _add: head.Add

    @classmethod
    def take_over(
        cls, layer: ColumnParallelLinear, vocabulary_size: int, z_loss: float, add: head.Add
    ) -> None:
        """Make GPTModel's output layer one of these.

        Args:
            vocabulary_size: pieces without padding.
            z_loss: what log²Z of each token is weighed with; 0 leaves it out.
            add: see `head.losses_by_chunks`.
        """
        layer.__class__, layer._add = cls, add
        layer.vocabulary_size, layer.z_loss = vocabulary_size, z_loss
        layer.is_first_microbatch, layer._fp8 = True, None
        # What is kept for these products is what Hopper's read.
        if layer.config.fp8 is not None and hopper.is_here():
            from tanren.engine import head_fp8

            layer._fp8 = head_fp8.Weight()

    def forward(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
        *,
        labels: torch.Tensor | None = None,
        loss_weights: torch.Tensor | None = None,
    ) -> Any:
        """Losses of tokens; without labels what megatron-core's layer makes: logits, and a bias.

        Args:
            hidden: [tokens, hidden], the same on all tensor-parallel ranks. With sequence
                parallelism it is gathered, and gathering sums its gradient over the ranks.
            weight: [columns, hidden], the embedding's where it is tied.
            labels: [tokens].
            loss_weights: [tokens] in fp32, what each token's losses count in the sum that is
                differentiated; None where that is not known yet.
        Returns:
            [kinds, tokens] in nats and fp32: cross-entropy, and with `z_loss` the weighed log²Z.
        """
        if labels is None:
            return super().forward(hidden, weight, runtime_gather_output)
        weight = self.weight if weight is None else weight
        if not self.sequence_parallel:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)
        mine = head.Vocabulary.of(self.vocabulary_size, weight.size(0), self.tp_group)
        known = loss_weights is not None and head.GRADIENTS_BY_CHUNKS
        if known or not torch.is_grad_enabled():
            cast = None
            if self._fp8 is not None and torch.is_grad_enabled():
                changed = self.is_first_microbatch and weight.requires_grad
                cast = self._fp8.cast(weight, changed=changed)
                self.is_first_microbatch = False
            return head.losses_by_chunks(
                hidden, weight, labels, mine, self.z_loss,
                loss_weights=loss_weights, chunk=head.CHUNK, fp8=cast, add=self._add,
            )  # fmt: skip
        logits = self._forward_impl(
            input=hidden,
            weight=weight,
            bias=None,
            gradient_accumulation_fusion=self.gradient_accumulation_fusion,
            allreduce_dgrad=False,
            sequence_parallel=False,
            tp_group=self.tp_group,
        )
        return head.losses_of_logits(logits, labels, mine, self.z_loss)
