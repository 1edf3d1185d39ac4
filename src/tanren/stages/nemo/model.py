"""NeMo's LLaMA as a stage trains it: our shapes, our micro batches, our losses."""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from nemo.collections import llm
from nemo.collections.llm.gpt.model.llama import Llama31Config
from nemo.lightning.megatron_parallel import MegatronLossReduction

from tanren.config.model import Model
from tanren.data.blend import Batch
from tanren.engine.packed import block_mask, sequence_params
from tanren.engine.step import Objective

# What has kernels on a GPU alone.
_FUSED = (
    "masked_softmax_fusion", "bias_activation_fusion", "bias_dropout_fusion", "apply_rope_fusion",
    "cross_entropy_loss_fusion", "gradient_accumulation_fusion", "persist_layer_norm",
)  # fmt: skip


def plain_config(shape: Model, **more: Any) -> llm.LlamaConfig:
    """NeMo's configuration of a shape, as its checkpoints carry it."""
    fields: dict[str, Any] = {
        "num_layers": shape.layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.attention_heads,
        "num_query_groups": shape.kv_groups,
        "kv_channels": shape.head_width,
        "layernorm_epsilon": shape.norm_epsilon,
        "init_method_std": shape.init_std,
        "seq_length": shape.max_positions,
        "rotary_base": shape.rotary_base,
        "share_embeddings_and_output_weights": shape.tied_embeddings,
        "vocab_size": shape.padded_vocabulary,
        **more,
    }
    if not torch.cuda.is_available():
        fields |= dict.fromkeys(_FUSED, False)
    scaling = shape.rope_scaling
    if scaling is None:
        return llm.LlamaConfig(**fields)
    return Llama31Config(
        **fields,
        scale_factor=scaling.factor,
        low_freq_factor=scaling.low_frequency_factor,
        high_freq_factor=scaling.high_frequency_factor,
        old_context_len=scaling.original_max_positions,
    )


def training_config(shape: Model, recompute: str = "none") -> llm.LlamaConfig:
    """The same with what a training adds.

    Args:
        recompute: `none`, `selective` or `full`.
    """
    more: dict[str, Any] = {}
    if recompute != "none":
        more["recompute_granularity"] = recompute
    if recompute == "full":
        more |= {"recompute_method": "uniform", "recompute_num_layers": 1}
    if not torch.cuda.is_available():
        more["transformer_layer_spec"] = _local_layers
    return plain_config(
        shape, calculate_per_token_loss=True, attention_softmax_in_fp32=True, **more
    )


def _local_layers(config: llm.GPTConfig) -> Any:
    from tanren.engine import cpu

    return cpu.block_spec(config)


class Reduction(MegatronLossReduction):
    """The losses of micro batches, and what the ranks say of a step together."""

    def __init__(self, step: Any) -> None:
        """Take reports to `step`, which gives a step's mean loss for them."""
        super().__init__()
        self._step = step
        self.loss: Any = None

    def forward(self, batch: Batch, output: torch.Tensor) -> Any:
        """The sum to differentiate, how many count, and the report of the micro batch before."""
        return self.loss(output)

    def reduce(self, reports: list[torch.Tensor]) -> torch.Tensor:
        """The mean loss of the global batch."""
        # NeMo copies what is not on the GPU there, and can do so with plain numbers alone.
        return torch.tensor(self._step(reports), device=reports[0].device)


class Tuned(llm.LlamaModel):
    """NeMo's LLaMA whose step is an objective of ours on packed micro batches."""

    # Set before training: what is minimised, and where its reports go.
    objective: Objective
    reduction: Reduction

    def configure_model(self, vp_stage: int | None = None) -> None:
        """Make the model; its padded vocabulary has no part in the softmax."""
        super().configure_model(vp_stage)
        self.real_vocabulary: int
        gpt, real = self.module, self.real_vocabulary
        if gpt.vocab_size == real:
            return
        plain = type(gpt).compute_language_model_loss

        def without_padding(self: Any, labels: torch.Tensor, logits: torch.Tensor) -> Any:
            # Behind autograd's back: where a probability is 0, so is its gradient.
            logits.detach()[..., real:].fill_(-torch.inf)
            return plain(self, labels, logits)

        gpt.compute_language_model_loss = MethodType(without_padding, gpt)

    def data_step(self, dataloader_iter: Iterator[Any]) -> Batch:
        """A micro batch, which is on its device already."""
        batch, _, _ = next(dataloader_iter)
        return batch

    def training_step(self, batch: Batch, batch_idx: int | None = None) -> torch.Tensor:
        """The losses where they count; the reduction is told what to make of them."""
        output, self.reduction.loss = self.objective.forward_step(iter([batch]), self)
        return output

    @property
    def training_loss_reduction(self) -> Reduction:
        """Where NeMo's forward-backward pass takes the losses to."""
        return self.reduction

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        *,
        packed: Batch,
        loss_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """A packed micro batch (tanren.data.packing.collate), as `packed_forward` asks.

        Returns:
            the losses where they count, in nats and fp32, in the order of packed["positions"].
        """
        rows, width = input_ids.shape
        labels = torch.zeros_like(input_ids).view(-1)
        labels[packed["positions"]] = packed["targets"]
        mask, given = None, {}
        if torch.cuda.is_available():
            # Transformer Engine's attention and rotary embedding take the examples end to end.
            input_ids, position_ids = input_ids.view(1, -1), position_ids.view(1, -1)
            labels = labels.view(1, -1)
            longest = int(packed["max_seqlen"])
            given["packed_seq_params"] = sequence_params(packed["cu_seqlens"], longest)
        else:
            labels = labels.view(rows, width)
            mask = block_mask(packed["cu_seqlens"], rows, width)
        losses = self.module(input_ids, position_ids, mask, labels=labels, **given)
        return losses.flatten().float().index_select(0, packed["positions"])
