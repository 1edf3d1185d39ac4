"""The model: megatron-core's GPTModel in the shape of a LLaMA."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module

from tanren.config.model import Model
from tanren.config.training import Layout, Lora
from tanren.engine.loss import cross_entropy_and_log_z, hide_padding
from tanren.engine.packed import block_mask, sequence_params

FP8_RECIPES = {"tensorwise": "tensorwise", "delayed": "delayed", "blockwise": "blockwise"}


def transformer_config(
    shape: Model, layout: Layout, *, precision: str, fp8: str = "none"
) -> TransformerConfig:
    """megatron-core's configuration of a LLaMA in this layout.

    Args:
        precision: `bf16` or `fp32`.
        fp8: `none`, or the scaling recipe of Transformer Engine.
    """
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    recompute: dict[str, Any] = {}
    if layout.recompute != "none":
        recompute["recompute_granularity"] = layout.recompute
        if layout.recompute == "full":
            recompute |= {"recompute_method": "uniform", "recompute_num_layers": 1}
    scaling: dict[str, Any] = {}
    if fp8 != "none":
        scaling |= {"fp8": "hybrid", "fp8_recipe": FP8_RECIPES[fp8]}
        if fp8 == "delayed":
            scaling |= {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.attention_heads,
        num_query_groups=shape.kv_groups,
        kv_channels=shape.head_width,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=shape.init_std,
        # Also for a model that is loaded: without it the local spec marks no parameter as split,
        # and the gradient norm of a tensor-parallel run would count the first rank's part alone.
        perform_initialization=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision == "bf16",
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        sequence_parallel=layout.sequence_parallel,
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=on_gpu,
        apply_rope_fusion=on_gpu,
        cross_entropy_loss_fusion=on_gpu,
        cross_entropy_fusion_impl="te" if on_gpu else "native",
        attention_softmax_in_fp32=True,
        deallocate_pipeline_outputs=True,
        **recompute,
        **scaling,
    )


def _layers(config: TransformerConfig) -> Any:
    """Transformer Engine's layers on a GPU, megatron-core's own on a CPU."""
    if torch.cuda.is_available():
        from megatron.core.models.gpt.gpt_layer_specs import (
            get_gpt_layer_with_transformer_engine_spec,
        )

        return get_gpt_layer_with_transformer_engine_spec()
    from tanren.engine import cpu

    return cpu.block_spec(config)


class Llama(GPTModel):
    """GPTModel whose loss does not see the rows that only pad the vocabulary.

    Args:
        z_loss: what log²Z of each token is weighed with; 0 leaves it out.
    """

    # Set by lora.add_adapters; then they alone are trained and saved.
    lora: Lora | None = None

    def __init__(self, shape: Model, config: TransformerConfig, z_loss: float = 0.0) -> None:
        super().__init__(
            config=config,
            transformer_layer_spec=_layers(config),
            vocab_size=shape.padded_vocabulary,
            max_sequence_length=shape.max_positions,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            parallel_output=True,
            share_embeddings_and_output_weights=shape.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=shape.rotary_base,
        )
        self.shape, self.z_loss = shape, z_loss
        # Transformer Engine's attention takes packed sequences (thd), the local one a mask.
        self.takes_sequences = torch.cuda.is_available()
        scaling = shape.rope_scaling
        if scaling is not None:
            # megatron-core passes on the factor alone; the other three are the recipe's as well.
            rotary = self.rotary_pos_emb
            rotary.inv_freq = rotary._apply_scaling(
                rotary.inv_freq,
                factor=scaling.factor,
                low_freq_factor=scaling.low_frequency_factor,
                high_freq_factor=scaling.high_frequency_factor,
                original_max_position_embeddings=scaling.original_max_positions,
            )

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        packed: dict[str, torch.Tensor] | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """GPTModel's forward pass; or that of a packed micro batch, see `packed_forward`.

        Args:
            packed: the micro batch that the tokens are of.
        """
        if packed is None:
            return super().forward(input_ids, position_ids, attention_mask, **options)
        assert self.config.context_parallel_size == 1
        assert not self.z_loss
        rows, width = input_ids.shape
        # As long as a row, so that it is computed once and cached: [width, 1, 1, head].
        rotary = self.rotary_pos_emb(width)
        mask = sequences = None
        if self.takes_sequences:
            input_ids, position_ids = input_ids.view(1, -1), position_ids.view(1, -1)
            longest = int(packed["max_seqlen"])
            sequences = sequence_params(packed["cu_seqlens"], longest)
            # It starts a block for each of these positions of each segment: no more than needed.
            rotary = rotary[:longest]
        else:
            mask = block_mask(packed["cu_seqlens"], rows, width)
            rotary = rotary[position_ids.transpose(0, 1), 0]
        hidden = None
        if self.pre_process:
            hidden = self.embedding(input_ids=input_ids, position_ids=position_ids)
        hidden = self.decoder(
            hidden_states=hidden,
            attention_mask=mask,
            rotary_pos_emb=rotary,
            packed_seq_params=sequences,
        )
        return self._losses_at(hidden, packed) if self.post_process else hidden

    def _losses_at(self, hidden: torch.Tensor, packed: dict[str, torch.Tensor]) -> torch.Tensor:
        """Cross-entropy where it counts; the logits of the other positions are never made.

        Args:
            hidden: [sequence, batch, hidden]; the sequence is this rank's part of it with sequence
                parallelism.
        """
        if self.config.sequence_parallel:
            # Every rank goes on with all of it, alike, and so has the whole gradient again.
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        flat = hidden.transpose(0, 1).reshape(-1, hidden.size(-1))
        rows = flat.index_select(0, packed["positions"])[:, None]
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else None
        layer = self.output_layer
        # What it would gather is whole; without the mark it adds up the ranks' input gradients.
        marked, layer.sequence_parallel = layer.sequence_parallel, False
        try:
            logits, _ = layer(rows, weight=weight)
        finally:
            layer.sequence_parallel = marked
        return self.compute_language_model_loss(packed["targets"][None], logits)[0]

    def compute_language_model_loss(
        self, labels: torch.Tensor, logits: torch.Tensor
    ) -> torch.Tensor:
        """Cross-entropy of each token over the real vocabulary.

        Args:
            labels: [batch, sequence].
            logits: [sequence, batch, padded vocabulary / tensor parallel].
        Returns:
            [batch, sequence]; with z-loss [2, batch, sequence], cross-entropy and z-loss.
        """
        hide_padding(
            logits, self.shape.vocabulary_size, parallel_state.get_tensor_model_parallel_rank()
        )
        if not self.z_loss:
            return super().compute_language_model_loss(labels, logits)
        losses, log_z = cross_entropy_and_log_z(
            logits, labels.transpose(0, 1), parallel_state.get_tensor_model_parallel_group()
        )
        return torch.stack([losses, self.z_loss * log_z.square()]).transpose(1, 2)


def build(shape: Model, config: TransformerConfig, z_loss: float = 0.0) -> Llama:
    """This rank's part of the model, on its device."""
    model = Llama(shape, config, z_loss)
    return model.cuda()


def wrap_for_training(model: Llama) -> DistributedDataParallel:
    """Gradient buffers and reduction over the data-parallel ranks, sharded for the optimizer."""
    config = model.config
    on_gpu = torch.cuda.is_available()
    data_parallel = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    overlap = on_gpu and data_parallel > 1
    module = Float16Module(config, model) if config.bf16 else model
    return DistributedDataParallel(
        config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=True,
            overlap_grad_reduce=overlap,
            overlap_param_gather=overlap,
            check_for_nan_in_grad=False,
        ),
        module,
    )
