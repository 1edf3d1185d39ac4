"""Run by .venv-nemo's Python: NeMo on a CPU, with linear layers that have their norm inside.

Transformer Engine's layers, which NeMo's importer and exporter name, need a GPU. megatron-core's
own layers have the norm beside the linear layer: in a checkpoint the names are the same, in the
model they are not. The layers here have Transformer Engine's names in both.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch


def install() -> None:
    """Give NeMo these layers wherever it would take megatron-core's own."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel import ColumnParallelLinear, random
    from megatron.core.transformer import transformer_block
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
    from nemo.collections.llm.gpt.model import base
    from nemo.lightning.io import pl

    class Norm(torch.nn.RMSNorm):
        """Of the model's type; megatron-core's own is fp32."""

        def __init__(self, config: Any, hidden_size: int, eps: float) -> None:
            super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)

    class NormLinear(ColumnParallelLinear):
        def __init__(self, input_size: int, output_size: int, *, config: Any, **rest: Any) -> None:
            super().__init__(input_size, output_size, config=config, **rest)
            ones = torch.ones(input_size, dtype=config.params_dtype)
            self.layer_norm_weight = torch.nn.Parameter(ones)
            self.epsilon = config.layernorm_epsilon

        def forward(self, value: torch.Tensor, *rest: Any, **named: Any) -> Any:
            size = (value.shape[-1],)
            normed = torch.nn.functional.rms_norm(value, size, self.layer_norm_weight, self.epsilon)
            return super().forward(normed, *rest, **named)

        def sharded_state_dict(
            self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
        ) -> Any:
            state = self.state_dict(prefix="", keep_vars=True)
            return make_sharded_tensors_for_checkpoint(
                state, prefix, {"weight": 0}, sharded_offsets
            )

    def spec(config: Any) -> Any:
        layer = get_gpt_layer_local_spec(normalization=config.normalization)
        parts = layer.submodules
        parts.input_layernorm = parts.pre_mlp_layernorm = IdentityOp
        parts.self_attention.submodules.linear_qkv = NormLinear
        parts.mlp.submodules.linear_fc1 = NormLinear
        parts.sharded_state_dict_keys_map = {}
        return layer

    checked = TransformerConfig.__post_init__

    def without_kernels(config: Any) -> None:
        config.apply_rope_fusion = config.masked_softmax_fusion = False
        config.gradient_accumulation_fusion = config.persist_layer_norm = False
        checked(config)

    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.Stream = lambda *where: None
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.cuda.current_device = lambda: torch.device("cpu")
    # Dropout's random state, of which nothing is drawn here.
    random.CudaRNGStatesTracker.fork = lambda tracker, name="": contextlib.nullcontext()
    pl._fix_tensors_device = lambda checkpoint: checkpoint
    base.local_layer_spec = spec
    transformer_block.LayerNormImpl = Norm
    TransformerConfig.__post_init__ = without_kernels
