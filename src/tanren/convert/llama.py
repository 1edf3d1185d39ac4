"""The one table of names and layouts between Hugging Face's LLaMA and megatron-core's GPTModel.

megatron-core stacks the layers: the checkpoint's tensor `decoder.layers.mlp.linear_fc2.weight` has
the shape [layers, hidden, ffn]. Its query, key and value rows are interleaved by key-value group,
gate and up projection are one matrix, and the vocabulary is padded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from tanren.config.errors import RequestError
from tanren.config.model import Model
from tanren.convert.tensors import Stored, Tensors, listed, rows


@dataclass(frozen=True)
class Entry:
    """One tensor of a megatron-core checkpoint and the Hugging Face tensors it is made of.

    `hf` names hold `{layer}` where the tensor is stacked over the layers. `join` makes one layer's
    tensor from them and `split` takes it apart again.
    """

    mcore: str
    hf: tuple[str, ...]
    shape: tuple[int, ...]
    join: Callable[[Model, list[torch.Tensor]], torch.Tensor]
    split: Callable[[Model, torch.Tensor], list[torch.Tensor]]

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.hf[0]


def _same(model: Model, parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0]


def _same_split(model: Model, tensor: torch.Tensor) -> list[torch.Tensor]:
    return [tensor]


def _join_qkv(model: Model, parts: list[torch.Tensor]) -> torch.Tensor:
    """[heads x d, h], [groups x d, h], [groups x d, h] → [groups x (heads/groups + 2) x d, h]."""
    groups, width = model.kv_groups, model.head_width
    by_group = [part.reshape(groups, -1, width, part.shape[-1]) for part in parts]
    return torch.cat(by_group, dim=1).reshape(-1, parts[0].shape[-1])


def _split_qkv(model: Model, tensor: torch.Tensor) -> list[torch.Tensor]:
    groups, width = model.kv_groups, model.head_width
    queries = model.attention_heads // groups
    by_group = tensor.reshape(groups, queries + 2, width, tensor.shape[-1])
    parts = torch.split(by_group, [queries, 1, 1], dim=1)
    return [part.reshape(-1, tensor.shape[-1]) for part in parts]


def _join_rows(model: Model, parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(parts)


def _split_rows(model: Model, tensor: torch.Tensor) -> list[torch.Tensor]:
    return list(tensor.chunk(2))


def _pad(model: Model, parts: list[torch.Tensor]) -> torch.Tensor:
    (tensor,) = parts
    padding = model.padded_vocabulary - model.vocabulary_size
    return torch.cat([tensor, tensor.new_zeros(padding, tensor.shape[1])]) if padding else tensor


def _unpad(model: Model, tensor: torch.Tensor) -> list[torch.Tensor]:
    return [tensor[: model.vocabulary_size]]


def table(model: Model) -> list[Entry]:
    """Every tensor of a LLaMA of this shape, in the order of the forward pass."""
    h, ffn, width = model.hidden_size, model.ffn_hidden_size, model.head_width
    heads, groups, vocabulary = model.attention_heads, model.kv_groups, model.padded_vocabulary
    hf, mcore = "model.layers.{layer}.", "decoder.layers."
    attention, mlp = hf + "self_attn.", hf + "mlp."
    entries = [
        Entry("embedding.word_embeddings.weight", ("model.embed_tokens.weight",),
              (vocabulary, h), _pad, _unpad),
        Entry(mcore + "self_attention.linear_qkv.layer_norm_weight",
              (hf + "input_layernorm.weight",), (h,), _same, _same_split),
        Entry(mcore + "self_attention.linear_qkv.weight",
              tuple(f"{attention}{name}_proj.weight" for name in "qkv"),
              ((heads + 2 * groups) * width, h), _join_qkv, _split_qkv),
        Entry(mcore + "self_attention.linear_proj.weight", (attention + "o_proj.weight",),
              (h, heads * width), _same, _same_split),
        Entry(mcore + "mlp.linear_fc1.layer_norm_weight",
              (hf + "post_attention_layernorm.weight",), (h,), _same, _same_split),
        Entry(mcore + "mlp.linear_fc1.weight", (mlp + "gate_proj.weight", mlp + "up_proj.weight"),
              (2 * ffn, h), _join_rows, _split_rows),
        Entry(mcore + "mlp.linear_fc2.weight", (mlp + "down_proj.weight",),
              (h, ffn), _same, _same_split),
        Entry("decoder.final_layernorm.weight", ("model.norm.weight",), (h,), _same, _same_split),
    ]  # fmt: skip
    if not model.tied_embeddings:
        entries.append(
            Entry("output_layer.weight", ("lm_head.weight",), (vocabulary, h), _pad, _unpad)
        )
    return entries


def hf_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Every tensor of the Hugging Face model and its shape, in the order of the forward pass."""
    shapes: dict[str, tuple[int, ...]] = {}
    by_entry = [(entry, _parts(model, entry)) for entry in table(model)]
    unstacked = [one for one in by_entry if not one[0].stacked]
    for entry, parts in unstacked[:1]:
        shapes |= zip(entry.hf, parts, strict=True)
    for layer in range(model.layers):
        for entry, parts in by_entry:
            if entry.stacked:
                names = [name.format(layer=layer) for name in entry.hf]
                shapes |= zip(names, parts, strict=True)
    for entry, parts in unstacked[1:]:
        shapes |= zip(entry.hf, parts, strict=True)
    return shapes


def mcore_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Every tensor of a megatron-core checkpoint of the model and its shape, with the layers."""
    return {
        entry.mcore: (model.layers, *entry.shape) if entry.stacked else entry.shape
        for entry in table(model)
    }


def _parts(model: Model, entry: Entry) -> list[tuple[int, ...]]:
    """The shapes of the Hugging Face tensors of one layer's tensor."""
    parts = entry.split(model, torch.empty(entry.shape, device="meta"))
    return [tuple(part.shape) for part in parts]


def check_tensors(
    stored: Mapping[str, Stored], wanted: Mapping[str, tuple[int, ...]], place: object,
    *, strict: bool = False,
) -> None:  # fmt: skip
    """Refuse tensors that are not those of the model, each of them named.

    Args:
        strict: of a result; what others write besides is surplus then.
    Raises:
        RequestError: some are missing, there are others, or one has another shape.
    """
    missing = [name for name in wanted if name not in stored]
    # What old LLaMA checkpoints hold of the rotary embedding is computed anew by everyone. A model
    # with tied embeddings may be saved with both.
    surplus = [
        name
        for name in stored
        if name not in wanted
        and (strict or not name.endswith(("rotary_emb.inv_freq", "lm_head.weight")))
    ]
    if missing:
        raise RequestError(
            place,
            f"holds no tensor {listed(missing)}",
            "the shape that is stated and the tensors do not belong together",
        )
    if surplus:
        raise RequestError(
            place,
            f"holds tensors that a LLaMA of this shape has not: {listed(surplus)}",
            "is it another architecture, or are there more layers than is stated?",
        )
    other = [
        f"{name} is {list(stored[name].shape)} there, and the model's is {list(shape)}"
        for name, shape in wanted.items()
        if stored[name].shape != shape
    ]
    if other:
        raise RequestError(
            place,
            "; ".join(other[:5]) + (f"; and {len(other) - 5} more" if len(other) > 5 else ""),
            "the shape that is stated and the tensors do not belong together",
        )


def to_mcore(model: Model, tensors: Tensors, place: object = "the base") -> Tensors:
    """Hugging Face tensors under megatron-core's names and in its layout.

    Args:
        place: where they are from, for messages.
    Raises:
        RequestError: they are not those of the model, or of more than one type where
            megatron-core has one tensor.
    """
    check_tensors(tensors.stored, hf_shapes(model), place)
    return _Joined(model, tensors, place)


def to_hf(model: Model, tensors: Tensors, place: object = "the checkpoint") -> Tensors:
    """megatron-core tensors under Hugging Face's names and in its layout.

    Raises:
        RequestError: one of the model's is missing, or has another shape.
    """
    wanted = mcore_shapes(model)
    check_tensors({name: tensors.stored[name] for name in wanted if name in tensors.stored},
                  wanted, place)  # fmt: skip
    return _Split(model, tensors)


class _Joined:
    """The tensors of megatron-core, made of Hugging Face's when they are read."""

    def __init__(self, model: Model, tensors: Tensors, place: object) -> None:
        self._model, self._tensors = model, tensors
        self._entries = {entry.mcore: entry for entry in table(model)}
        self.stored = {
            name: Stored(shape, self._dtype(self._entries[name], place))
            for name, shape in mcore_shapes(model).items()
        }

    def _dtype(self, entry: Entry, place: object) -> torch.dtype:
        layers = range(self._model.layers) if entry.stacked else range(1)
        names = [name.format(layer=layer) for name in entry.hf for layer in layers]
        kinds = {self._tensors.stored[name].dtype: name for name in names}
        if len(kinds) > 1:
            (one, first), (other, second), *_ = kinds.items()
            raise RequestError(
                place, f"{first} is {one} and {second} {other}, and they become one tensor",
                "say which type they shall have: --dtype bf16 or fp32",
            )  # fmt: skip
        return next(iter(kinds))

    def read(self, name: str, layer: int | None = None) -> torch.Tensor:
        entry = self._entries[name]
        if entry.stacked and layer is None:
            return torch.stack([self.read(name, one) for one in range(self._model.layers)])
        parts = [self._tensors.read(one.format(layer=layer)) for one in entry.hf]
        return entry.join(self._model, parts)

    def rows(self, name: str, layer: int | None, start: int, stop: int) -> torch.Tensor:
        entry = self._entries[name]
        if entry.join is _join_qkv:
            return self.read(name, layer)[start:stop]
        # One after the other: what the range has of each, and of the vocabulary's padding.
        found, first = [], 0
        for one in (part.format(layer=layer) for part in entry.hf):
            last = first + self._tensors.stored[one].shape[0]
            low, high = max(start, first), min(stop, last)
            if low < high:
                found.append(rows(self._tensors, one, None, low - first, high - first))
            first = last
        if stop > first:
            padding = (stop - max(start, first), *entry.shape[1:])
            found.append(torch.zeros(padding, dtype=self.stored[name].dtype))
        return torch.cat(found) if len(found) > 1 else found[0]


class _Split:
    """The tensors of Hugging Face, taken out of megatron-core's when they are read."""

    def __init__(self, model: Model, tensors: Tensors) -> None:
        self._model, self._tensors = model, tensors
        self._from: dict[str, tuple[Entry, int | None, int]] = {}
        for entry in table(model):
            for layer in range(model.layers) if entry.stacked else (None,):
                for index, name in enumerate(entry.hf):
                    self._from[name.format(layer=layer)] = entry, layer, index
        self.stored = {
            name: Stored(shape, tensors.stored[self._from[name][0].mcore].dtype)
            for name, shape in hf_shapes(model).items()
        }

    def read(self, name: str, layer: int | None = None) -> torch.Tensor:
        return self.rows(name, layer, 0, self.stored[name].shape[0])

    def rows(self, name: str, layer: int | None, start: int, stop: int) -> torch.Tensor:
        entry, of, index = self._from[name]
        if entry.split is _split_qkv:
            return entry.split(self._model, self._tensors.read(entry.mcore, of))[index][start:stop]
        # One after the other; what is more is the vocabulary's padding, at the end.
        before = sum(self.stored[one.format(layer=of)].shape[0] for one in entry.hf[:index])
        return rows(self._tensors, entry.mcore, of, before + start, before + stop)
