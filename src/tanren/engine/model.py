"""The model: megatron-core's GPTModel in the shape of a LLaMA."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.param_and_grad_buffer import shard_buffer
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module

from tanren.config.model import Model, RopeScaling
from tanren.config.training import Layout, Lora
from tanren.engine.embedding import Embedding
from tanren.engine.flash4 import PACKAGE as FLASH4
from tanren.engine.main_grad import add_product, fuse_without_apex
from tanren.engine.output_layer import Head
from tanren.engine.packed import block_mask, sequence_params
from tanren.engine.products import PACKAGE as QUACK
from tanren.engine.products import add_weight_gradient

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
        # A weight's gradient joins its main gradient inside the matrix product that makes it.
        gradient_accumulation_fusion=on_gpu,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        # By this megatron-core takes the activation of engine/layers.py.
        use_te_activation_func=on_gpu,
        apply_rope_fusion=on_gpu,
        attention_softmax_in_fp32=True,
        deallocate_pipeline_outputs=True,
        **recompute,
        **scaling,
    )


def _layers(config: TransformerConfig, *, flash4: bool, quack: bool) -> Any:
    """Transformer Engine's layers on a GPU, megatron-core's own on a CPU."""
    if torch.cuda.is_available():
        from tanren.engine.layers import layer_spec

        return layer_spec(by_flash4=flash4, by_quack=quack)
    from tanren.engine import cpu

    return cpu.block_spec(config)


def scale_rotary(rotary: Any, scaling: RopeScaling | None) -> None:
    """Scale the frequencies of a rotary embedding as Llama 3.1 does.

    megatron-core passes on the factor alone; the other three are the recipe's as well.
    """
    if scaling is not None:
        rotary.inv_freq = rotary._apply_scaling(
            rotary.inv_freq,
            factor=scaling.factor,
            low_freq_factor=scaling.low_frequency_factor,
            high_freq_factor=scaling.high_frequency_factor,
            original_max_position_embeddings=scaling.original_max_positions,
        )


class Llama(GPTModel):
    """GPTModel whose losses are made by `Head`, over the vocabulary without its padding.

    Args:
        z_loss: what log²Z of each token is weighed with; 0 leaves it out.
        flash4: whether attention is FlashAttention 4's, on a GPU.
        quack: whether products are quack-kernels', on a GPU.
    """

    # Set by lora.add_adapters; then they alone are trained and saved.
    lora: Lora | None = None

    def __init__(
        self, shape: Model, config: TransformerConfig, z_loss: float = 0.0, *,
        flash4: bool = False, quack: bool = False,
    ) -> None:  # fmt: skip
        if config.gradient_accumulation_fusion:
            fuse_without_apex()
        super().__init__(
            config=config,
            transformer_layer_spec=_layers(config, flash4=flash4, quack=quack),
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
        # By whose kernels, in words.
        self.attention = self.products = "megatron-core"
        if torch.cuda.is_available():
            from tanren.engine.layers import join

            self.attention = FLASH4 if flash4 else "Transformer Engine"
            self.products = QUACK if quack else "Transformer Engine"
            join(self.decoder.layers, alone=config.recompute_granularity == "full")
        if self.pre_process:
            Embedding.take_over(self.embedding.word_embeddings)
        if self.post_process:
            add = add_weight_gradient if quack else add_product
            Head.take_over(self.output_layer, shape.vocabulary_size, z_loss, add)
        # Transformer Engine's attention takes packed sequences (thd), the local one a mask.
        self.takes_sequences = torch.cuda.is_available()
        scale_rotary(self.rotary_pos_emb, shape.rope_scaling)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        packed: dict[str, torch.Tensor] | None = None,
        loss_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """GPTModel's forward pass; or that of a packed micro batch, see `packed_forward`.

        Args:
            packed: the micro batch that the tokens are of.
            loss_mask: of the losses' shape and in fp32, what each counts in the sum that is
                differentiated: then nothing else may be. None where that is not known yet.
        Returns:
            with labels [batch, sequence], the cross-entropy in nats; with z-loss
            [2, batch, sequence], cross-entropy and z-loss.
        """
        if packed is None:
            options["loss_mask"] = loss_mask
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
        if not self.post_process:
            return hidden
        # Where it counts alone; the logits of the other positions are never made.
        flat = self._whole(hidden).transpose(0, 1).flatten(0, 1)
        chosen = flat.index_select(0, packed["positions"])
        return self._losses(chosen, packed["targets"], loss_mask)[0]

    def _postprocess(self, **given: Any) -> torch.Tensor:
        """GPTModel's last step; with labels by `Head`."""
        labels, loss_mask = given["labels"], given["loss_mask"]
        if labels is None or not self.post_process:
            return super()._postprocess(**given)
        if loss_mask is not None:
            loss_mask = loss_mask.T.flatten()
        hidden = self._whole(given["hidden_states"])
        losses = self._losses(hidden.flatten(0, 1), labels.T.flatten(), loss_mask)
        batch_second = losses.view(-1, *labels.T.shape).transpose(1, 2)
        return batch_second if self.z_loss else batch_second[0]

    def _whole(self, hidden: torch.Tensor) -> torch.Tensor:
        """[sequence, batch, hidden], of whose sequence parallelism leaves a rank its part."""
        if not self.config.sequence_parallel:
            return hidden
        return gather_from_sequence_parallel_region(hidden)

    def _losses(
        self, hidden: torch.Tensor, labels: torch.Tensor, loss_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """See `Head.forward`; the embedding's weight where it is tied."""
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else None
        return self.output_layer(hidden, weight, labels=labels, loss_weights=loss_mask)


def build(shape: Model, config: TransformerConfig, z_loss: float = 0.0, **kernels: bool) -> Llama:
    """This rank's part of the model, on its device; see `Llama`."""
    model = Llama(shape, config, z_loss, **kernels)
    return model.cuda()


class ShardedGradients(DistributedDataParallel):
    """megatron-core's gradient buffers, of which a rank scales what its optimizer reads.

    Once they are reduced, the rest of a buffer has sums that nothing reads any more.
    """

    def scale_gradients(self, scaling_factor: torch.Tensor) -> None:
        """Multiply this rank's part of each bucket, in place.

        Args:
            scaling_factor: of no dimensions, on the buffers' device.
        """
        assert not self.expert_parallel_bucket_groups
        parts = [
            shard_buffer(bucket.grad_data, group.intra_distributed_optimizer_instance_size)[
                group.intra_distributed_optimizer_instance_rank
            ]
            for group in self.bucket_groups
            for bucket in group.buckets
        ]
        torch._foreach_mul_(parts, scaling_factor)


def wrap_for_training(
    model: Llama, main_gradients: Literal["fp32", "bf16"] = "fp32"
) -> DistributedDataParallel:
    """Gradient buffers and reduction over the data-parallel ranks, sharded for the optimizer.

    Args:
        main_gradients: the type that gradients are added up in.
    """
    config = model.config
    on_gpu = torch.cuda.is_available()
    data_parallel = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    overlap = on_gpu and data_parallel > 1
    module = Float16Module(config, model) if config.bf16 else model
    return ShardedGradients(
        config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=main_gradients == "fp32",
            use_distributed_optimizer=True,
            overlap_grad_reduce=overlap,
            overlap_param_gather=overlap,
            check_for_nan_in_grad=False,
        ),
        module,
    )
