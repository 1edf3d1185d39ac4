"""A decoder layer on a GPU: Transformer Engine's modules, and kernels of ours between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TEDotProductAttention,
    TERowParallelLinear,
)
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec

from tanren.engine import current_scaling, flash4, linear
from tanren.engine.kernels import Where, nowhere, split_and_rotate, swiglu
from tanren.engine.norm_kernels import add_and_norm, norm


class RotaryAttention(SelfAttention):
    """megatron-core's attention, whose heads are split and rotated in one pass."""

    _angles: torch.Tensor | None = None

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        rotary_pos_emb: torch.Tensor | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As in megatron-core; rotary_pos_emb [tokens, 1, 1, head] has the angles of each token's
        position, also where sequences are packed.
        """
        self._angles = rotary_pos_emb
        return super().forward(hidden_states, attention_mask, **options)

    def get_query_key_value_tensors(
        self, hidden_states: torch.Tensor, *arguments: Any, **options: Any
    ) -> Any:
        """Query, key and value of each head, the first two turned by their positions."""
        angles, self._angles = self._angles, None
        assert angles is not None
        if self.config.num_query_groups < self.world_size:
            # Ranks share a group of keys: megatron-core gathers it and takes a rank's part.
            query, key, value = super().get_query_key_value_tensors(
                hidden_states, *arguments, **options
            )
            return _turned(query, angles), _turned(key, angles), value
        mixed, _ = self.linear_qkv(hidden_states)
        return split_and_rotate(mixed, angles, self.num_query_groups_per_partition)


def _turned(heads: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    turned: torch.Tensor = _apply_rotary_pos_emb_bshd(heads, angles, rotary_interleaved=False)
    return turned


class Flash4(TEDotProductAttention):
    """FlashAttention 4 where it was tried, else Transformer Engine's."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *arguments: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """As in megatron-core; what is asked for here is always causal, without a bias."""
        if flash4.takes(packed_seq_params):
            return flash4.attend(query, key, value, packed_seq_params)
        found: torch.Tensor = super().forward(
            query, key, value, attention_mask, *arguments,
            packed_seq_params=packed_seq_params, **options,
        )  # fmt: skip
        return found


class SwiGLU(MegatronModule):
    """The activation between fc1 (gate and up, one after the other) and fc2."""

    _around: tuple[Any, Any] | None = None

    def stand_between(self, fc1: torch.nn.Module, fc2: torch.nn.Module) -> None:
        """Measure what these layers cast to FP8: the gradient of fc1's output, fc2's input."""
        # In a tuple, or they would be this module's children as well.
        self._around = fc1, fc2

    def forward(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[sequence, batch, 2 x width] to [sequence, batch, width]."""
        if self._around is None:
            return swiglu(gate_up)
        fc1, fc2 = self._around
        return swiglu(
            gate_up,
            partial(current_scaling.of_input, fc2),
            partial(current_scaling.of_gradient, fc1),
        )


class Column(TEColumnParallelLinear):
    """The projection to queries, keys and values, by other products."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """[sequence, batch, hidden] to [sequence, batch, out], and no bias."""
        return linear.linear(x, self.weight), None


class Row(TERowParallelLinear):
    """The projection of what attention made, by other products."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """[sequence, batch, in] to [sequence, batch, hidden], and no bias."""
        return linear.linear(x, self.weight), None


class GateUp(TEColumnParallelLinear):
    """fc1, whose product applies SwiGLU as well."""

    def forward(self, x: torch.Tensor) -> tuple[tuple[torch.Tensor, torch.Tensor], None]:
        """What `linear.gate_up` makes of [sequence, batch, hidden], for `Down`; no bias."""
        return linear.gate_up(x, self.weight), None


class Passing(MegatronModule):
    """Where megatron-core has the activation, which was applied already."""

    def forward(
        self, halves: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return halves


class Down(TERowParallelLinear):
    """fc2, whose gradient's product makes that of gate and up."""

    def forward(self, halves: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, None]:
        """[sequence, batch, hidden], and no bias."""
        return linear.down(*halves, self.weight), None


class Norm(torch.nn.Module):
    """The RMSNorm before a linear layer; `Residual` may have it computed with the sum before it."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.epsilon = eps
        ones = torch.ones(
            hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device()
        )
        self.weight = torch.nn.Parameter(ones)
        # megatron-core sums the gradients of what sees a rank's part of the sequence alone.
        marked: Any = self.weight
        marked.sequence_parallel = config.sequence_parallel
        self._of_normed: Where = nowhere
        # The last sum, and its norm, which nobody has taken yet.
        self._ready: tuple[torch.Tensor, torch.Tensor] | None = None

    def stand_before(self, linear: torch.nn.Module) -> None:
        """Measure what this layer casts to FP8: its input."""
        self._of_normed = partial(current_scaling.of_input, linear)

    def forward(
        self,
        stream: torch.Tensor,
        branch: torch.Tensor | None = None,
        of_gradient: Where = nowhere,
    ) -> torch.Tensor:
        """The norm of the stream; or with a branch the sum of both, whose norm is kept for when
        this sum is what comes.

        Both are calls of the module, since megatron-core waits before one for the weight to be
        gathered from other ranks.

        Args:
            stream: [sequence, batch, hidden], as `branch` and what is returned.
            of_gradient: where the largest absolute value of the sum's gradient goes.
        """
        ready, self._ready = self._ready, None
        if branch is not None:
            self._ready = add_and_norm(
                stream, branch, self.weight, self.epsilon, self._of_normed, of_gradient
            )
            return self._ready[0]
        if ready is not None and ready[0] is stream:
            return ready[1]
        return norm(stream, self.weight, self.epsilon, self._of_normed)


class Residual:
    """The sum of the stream and what attention or MLP made of it, as megatron-core calls it."""

    def __init__(self) -> None:
        self._add: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = torch.add

    def stand_between(self, linear: torch.nn.Module, norm: Norm) -> None:
        """Leave the sum to the norm that comes next, which measures the gradient of what this
        linear layer made, since it is the sum's.
        """
        self._add = partial(norm, of_gradient=partial(current_scaling.of_gradient, linear))

    def __call__(self, training: bool, fused: bool) -> Callable[..., torch.Tensor]:
        """What megatron-core calls with a layer's result and its bias, the stream and a dropout."""
        return self._join

    def _join(
        self, given: tuple[torch.Tensor, None], stream: torch.Tensor, dropout: float
    ) -> torch.Tensor:
        branch, bias = given
        assert bias is None and not dropout
        return self._add(stream, branch)


def join(layers: Iterable[Any], *, alone: bool) -> None:
    """Let what lies between the products of a stage's layers add, norm and measure in one pass.

    Args:
        alone: whether each layer is computed again by itself in the backward pass: then nothing of
            it is there for the next.
    """
    own = list(layers)
    for layer in own:
        attention, mlp = layer.self_attention, layer.mlp
        layer.input_layernorm.stand_before(attention.linear_qkv)
        layer.self_attn_bda.stand_between(attention.linear_proj, layer.pre_mlp_layernorm)
        layer.pre_mlp_layernorm.stand_before(mlp.linear_fc1)
        if isinstance(mlp.activation_func, SwiGLU):
            mlp.activation_func.stand_between(mlp.linear_fc1, mlp.linear_fc2)
        # megatron-core's turns gradients on for a sum: an evaluation would keep every layer's.
        layer.bias_dropout_add_exec_handler = nullcontext
    for layer, after in pairwise(() if alone else own):
        layer.mlp_bda.stand_between(layer.mlp.linear_fc2, after.input_layernorm)


def layer_spec(*, by_flash4: bool = False, by_quack: bool = False) -> ModuleSpec:
    """The layer that GPTModel builds on a GPU; the configuration has `use_te_activation_func`, by
    which megatron-core takes the activation from here.

    Args:
        by_flash4: whether attention is FlashAttention 4's instead of Transformer Engine's.
        by_quack: whether products are quack-kernels' where these are faster, with SwiGLU inside.
    """
    spec = get_gpt_layer_with_transformer_engine_spec()
    layer = spec.submodules
    attention, mlp = layer.self_attention.submodules, layer.mlp.submodules
    layer.self_attention.module = RotaryAttention
    if by_flash4:
        attention.core_attention = Flash4
    mlp.activation_func = SwiGLU
    layer.input_layernorm = layer.pre_mlp_layernorm = Norm
    attention.linear_qkv = mlp.linear_fc1 = TEColumnParallelLinear
    if by_quack:
        attention.linear_qkv, attention.linear_proj = Column, Row
        mlp.linear_fc1, mlp.activation_func, mlp.linear_fc2 = GateUp, Passing, Down
    layer.self_attn_bda = layer.mlp_bda = Residual
    # In checkpoints a norm lies in the linear layer behind it, as in megatron-core's own spec.
    layer.sharded_state_dict_keys_map = {
        "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
        "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    }
    return spec
