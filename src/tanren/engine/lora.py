"""Low-rank adapters beside the frozen linear layers (LoRA, Hu et al. 2021), in any layout.

A layer's linear module stays as it is, with its names in checkpoints; a hook adds to its output
what the adapter makes of its input. Base checkpoints load as into a model without adapters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from tanren.config.training import Lora, LoraLinear
from tanren.convert.lora import MODULES, table
from tanren.convert.tensors import Tensors
from tanren.engine.model import Llama

# Their input is split over the tensor-parallel ranks, and not their output.
_ROW_PARALLEL = ("attention_dense", "mlp_fc2")


class Adapter(torch.nn.Module):
    """alpha/rank B A dropout(x), beside one linear layer.

    Beside a column-parallel layer each rank holds the whole A [rank, in] and its output's rows of
    B [out, rank]; beside a row-parallel one its input's columns of A and the whole B. What lies
    between them, [sequence, batch, rank], is all that the ranks exchange.

    Args:
        weight: of the linear layer, this rank's part.
        down: A [rank, in], whole. B begins as nought.
    """

    def __init__(
        self,
        name: LoraLinear,
        weight: torch.Tensor,
        down: torch.Tensor,
        lora: Lora,
        *,
        sequence_parallel: bool,
    ) -> None:
        super().__init__()
        out_features, in_features = weight.shape
        self.row_parallel, self.gated = name in _ROW_PARALLEL, name == "mlp_fc1"
        self.sequence_parallel = sequence_parallel
        self.scale, self.dropout, self.enabled = lora.scale, lora.dropout, True
        make = partial(torch.nn.Linear, bias=False, device=weight.device, dtype=weight.dtype)
        self.linear_in = make(in_features, lora.rank)
        self.linear_out = make(lora.rank, out_features)
        first = in_features * parallel_state.get_tensor_model_parallel_rank()
        part = down[:, first : first + in_features] if self.row_parallel else down
        with torch.no_grad():
            self.linear_in.weight.copy_(part)
            self.linear_out.weight.zero_()
        split, whole = self.linear_out.weight, self.linear_in.weight
        if self.row_parallel:
            split, whole = whole, split
        # Gate and up lie in each rank's part, one after the other, as in W.
        stride = 2 if self.gated else 1
        set_tensor_model_parallel_attributes(split, True, int(self.row_parallel), stride)
        # The whole one sees this rank's part of the sequence: megatron-core sums its gradients.
        marked: Any = whole
        marked.sequence_parallel = sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What joins the linear layer's output.

        Args:
            x: the linear layer's input, [sequence, batch, in], as this rank has it.
        """
        low = self.linear_in(self._dropped(x))
        if self.row_parallel:
            low = (
                reduce_scatter_to_sequence_parallel_region(low)
                if self.sequence_parallel
                else reduce_from_tensor_model_parallel_region(low)
            )
        else:
            # Backward it sums over the ranks' parts of the output, so that A and what lies before
            # it have their gradients whole.
            low = (
                gather_from_sequence_parallel_region(low)
                if self.sequence_parallel
                else copy_to_tensor_model_parallel_region(low)
            )
        result: torch.Tensor = self.linear_out(self.scale * low)
        return result

    def _dropped(self, x: torch.Tensor) -> torch.Tensor:
        if not (self.training and self.dropout):
            return x
        if self.row_parallel and not self.sequence_parallel:
            # Other columns on each rank, so other numbers; with sequence parallelism the whole
            # block draws them so. What every rank has alike is dropped alike.
            with get_cuda_rng_tracker().fork():
                return torch.nn.functional.dropout(x, self.dropout)
        return torch.nn.functional.dropout(x, self.dropout)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The two matrices as megatron-core's checkpoints take them, stacked over the layers."""
        assert metadata is not None
        out = f"{prefix}linear_out.weight"
        tensors: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"linear_in.weight": 1} if self.row_parallel else {"linear_out.weight": 0},
            sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=metadata["dp_cp_group"],
        )
        if self.gated:
            tensors[out] = apply_swiglu_sharded_factory(tensors[out], sharded_offsets)
        # In the model the adapter lies beside the linear layer, in a checkpoint within it.
        inside = prefix.removesuffix("_adapter.") + ".adapter."
        replace_prefix_for_sharding(tensors, prefix, inside)
        return tensors


def add_adapters(model: Llama, lora: Lora, *, seed: int) -> None:
    """Freeze the model and put an adapter beside each targeted linear layer.

    A is drawn from U(-1/√in, 1/√in), as PEFT draws it, the same in any layout; B is nought, so that
    the model computes at first what its base does. Call it before the model is wrapped.

    Args:
        seed: of A. Every rank draws all of them and keeps what is its own.
    """
    assert model.lora is None
    model.lora = lora
    model.requires_grad_(False)
    own = {layer.layer_number: layer for layer in model.decoder.layers}
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    generator = torch.Generator().manual_seed(seed)
    some = next(iter(own.values()))
    for number in range(1, model.config.num_layers + 1):
        for name in lora.linears:
            width = some.get_submodule(MODULES[name]).weight.shape[1]
            down = torch.empty(lora.rank, width * ranks if name in _ROW_PARALLEL else width)
            torch.nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
            if number in own:
                _add(own[number], name, down, lora)
    if model.pre_process:
        model.embedding.register_forward_hook(_begin_the_graph)


def _add(layer: torch.nn.Module, name: LoraLinear, down: torch.Tensor, lora: Lora) -> None:
    place, _, attribute = MODULES[name].rpartition(".")
    parent: Any = layer.get_submodule(place)
    linear: Any = getattr(parent, attribute)
    adapter = Adapter(
        name, linear.weight, down, lora, sequence_parallel=parent.config.sequence_parallel
    )
    # Beside the linear layer: within it, its own sharded_state_dict would take the adapter's
    # tensors for its own.
    parent.add_module(f"{attribute}_adapter", adapter)
    linear.register_forward_hook(partial(_join, adapter))


def _join(
    adapter: Adapter, linear: torch.nn.Module, inputs: tuple[torch.Tensor], output: tuple[Any, Any]
) -> tuple[torch.Tensor, Any]:
    """Add the adapter's part to a linear layer's output; megatron-core's return a bias with it."""
    (x,), (result, bias) = inputs, output
    return (result + adapter(x) if adapter.enabled else result), bias


def _begin_the_graph(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
    """Recomputed layers have gradients only where what enters asks for one; here nothing would."""
    if torch.is_grad_enabled():
        output.requires_grad_()


def fold(model: Llama, tensors: Tensors, lora: Lora) -> None:
    """Add the adapters of a checkpoint to the weights: a base that was trained by LoRA.

    Args:
        model: with the weights beside which the adapters were trained.
        tensors: the adapters', stacked over the layers.
    """
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    for name, adapter in zip(lora.linears, table(model.shape, lora), strict=True):
        down, up = tensors.read(adapter.linear_in), tensors.read(adapter.linear_out)
        for layer in model.decoder.layers:
            linear: Any = layer.get_submodule(MODULES[name])
            weight = linear.weight
            a, b = down[layer.layer_number - 1], up[layer.layer_number - 1]
            if name in _ROW_PARALLEL:
                a = a.chunk(ranks, dim=1)[rank]
            elif name == "mlp_fc1":
                # Gate and up lie in each rank's part, one after the other.
                b = torch.cat([half.chunk(ranks)[rank] for half in b.chunk(2)])
            else:
                b = b.chunk(ranks)[rank]
            change = lora.scale * (b.to(weight.device).float() @ a.to(weight.device).float())
            with torch.no_grad():
                weight.copy_(weight.float() + change)


@contextmanager
def without_adapters(model: torch.nn.Module) -> Iterator[None]:
    """Within, the model computes what its base does: the reference of DPO, without a second model.

    Args:
        model: a Llama, or what wraps one.
    """
    adapters = [module for module in model.modules() if isinstance(module, Adapter)]
    assert adapters
    for adapter in adapters:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.enabled = True


def adapter_keys(model: Llama) -> set[str]:
    """The adapters' tensors by their names in the model's state; none without LoRA."""
    return {
        f"{place}.{name}"
        for place, module in model.named_modules()
        if isinstance(module, Adapter)
        for name in module.state_dict()
    }
