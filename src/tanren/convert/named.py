"""Tensors of Megatron-LM's checkpoints under the names and in the shapes of llama's table."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from tanren.config.errors import RequestError
from tanren.config.model import Model
from tanren.convert import llama
from tanren.convert.tensors import Stored, Tensors, rows
from tanren.convert.torch_dist import STACKED

# Norms under the names of the layers that hold them in Transformer Engine's, and the names of
# Megatron-LM's models before megatron-core.
_LAYER_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "input_norm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    "post_attention_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    "post_attention_norm.weight": "mlp.linear_fc1.layer_norm_weight",
    "self_attention.query_key_value.weight": "self_attention.linear_qkv.weight",
    "self_attention.dense.weight": "self_attention.linear_proj.weight",
    "mlp.dense_h_to_4h.weight": "mlp.linear_fc1.weight",
    "mlp.dense_4h_to_h.weight": "mlp.linear_fc2.weight",
}
_NAMES = {
    "language_model.embedding.word_embeddings.weight": "embedding.word_embeddings.weight",
    "language_model.encoder.final_layernorm.weight": "decoder.final_layernorm.weight",
    "language_model.encoder.final_norm.weight": "decoder.final_layernorm.weight",
    "language_model.output_layer.weight": "output_layer.weight",
    "word_embeddings_for_head.weight": "output_layer.weight",
}
_LAYER = re.compile(r"(?:decoder|language_model\.encoder)\.layers\.(?:(\d+)\.)?(.*)")
# megatron-core 0.14 and later can store gate and up projection apart.
_HALVES = {"mlp.linear_fc1.weight_w": 0, "mlp.linear_fc1.weight_v": 1}
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


def named(model: Model, source: Tensors, place: object) -> Tensors:
    """Tensors of Megatron's under the names and in the shapes of the table.

    Layers may lie stacked or each by itself, norms where either kind of layer has them, gate and
    up projection together or apart, the vocabulary with any padding.

    Raises:
        RequestError: a tensor is missing, is too much, or has another shape.
    """
    return _Named(model, source, place)


@dataclass(frozen=True)
class _Piece:
    """Where a tensor of one layer is, or a half of it."""

    name: str
    layer: int | None  # where it is one of a stack
    shape: tuple[int, ...]
    dtype: torch.dtype


class _Named:
    """Tensors under the table's names, read from where they are."""

    def __init__(self, model: Model, source: Tensors, place: object) -> None:
        self._source = source
        self._pieces: dict[tuple[str, int | None], dict[int, _Piece]] = {}
        surplus = []
        wanted = llama.mcore_shapes(model)
        for name, stored in source.stored.items():
            if "_extra_state" in name or name.endswith("rotary_pos_emb.inv_freq"):
                continue
            key, layer, half = _canonical(name)
            # The last pipeline stage keeps a copy of tied embeddings.
            if model.tied_embeddings and key == "output_layer.weight":
                continue
            for at, piece in _layers(name, stored, key, layer):
                if key not in wanted:
                    surplus.append(name)
                    break
                there = self._pieces.setdefault((key, at), {})
                # Twice under two names is once too often: neither is known to be the right one.
                if half in there or (at is not None and at >= model.layers):
                    surplus.append(_numbered(key, at))
                there[half] = piece
        self.stored = self._checked(model, wanted, surplus, place)

    def _checked(
        self, model: Model, wanted: Mapping[str, tuple[int, ...]], surplus: list[str], place: object
    ) -> dict[str, Stored]:
        """What the tensors are, once they are all there and fit."""
        found: dict[str, Stored] = {}
        expected: dict[str, tuple[int, ...]] = {}
        for key, shape in wanted.items():
            stacked = key.startswith(STACKED)
            for layer in range(model.layers) if stacked else (None,):
                name, rest = _numbered(key, layer), shape[1:] if stacked else shape
                expected[name] = rest
                whole = self._whole(key, layer)
                if whole is None:
                    continue
                found[name] = whole
                # Whatever padding there is, ours is zeros.
                if key in _VOCABULARY and model.vocabulary_size <= whole.shape[0]:
                    found[name] = Stored((rest[0], *whole.shape[1:]), whole.dtype)
                    without = (model.vocabulary_size, *whole.shape[1:])
                    (piece,) = self._pieces[key, layer].values()
                    self._pieces[key, layer] = {-1: replace(piece, shape=without)}
        found |= {name: Stored((), torch.float32) for name in surplus if name not in expected}
        llama.check_tensors(found, expected, place)
        twice = [name for name in surplus if name in expected]
        if twice:
            raise RequestError(
                place, f"holds {', '.join(twice[:5])} twice, under two names",
                "save the checkpoint again with the Megatron-LM that made it",
            )  # fmt: skip
        return {key: Stored(shape, self._dtype(key, place)) for key, shape in wanted.items()}

    def _dtype(self, key: str, place: object) -> torch.dtype:
        """The type of a tensor, of all its layers."""
        kinds = {
            piece.dtype: piece.name
            for (name, _), halves in self._pieces.items()
            if name == key
            for piece in halves.values()
        }
        if len(kinds) > 1:
            said = ", ".join(f"{name} is {kind}" for kind, name in kinds.items())
            raise RequestError(
                place, f"{said}, and they become one tensor",
                "are there files of two checkpoints in the folder?",
            )  # fmt: skip
        (dtype,) = kinds
        return dtype

    def _whole(self, key: str, layer: int | None) -> Stored | None:
        """What is stored of one layer's tensor, both halves together."""
        halves = self._pieces.get((key, layer), {})
        if set(halves) == {-1}:
            return Stored(halves[-1].shape, halves[-1].dtype)
        if set(halves) == {0, 1}:
            gate, up = halves[0], halves[1]
            return Stored((gate.shape[0] + up.shape[0], *gate.shape[1:]), gate.dtype)
        return None

    def read(self, name: str, layer: int | None = None) -> torch.Tensor:
        shape = self.stored[name].shape
        if not name.startswith(STACKED):
            return self.rows(name, None, 0, shape[0])
        if layer is None:
            return torch.stack([self.read(name, one) for one in range(shape[0])])
        return self.rows(name, layer, 0, shape[1])

    def rows(self, name: str, layer: int | None, start: int, stop: int) -> torch.Tensor:
        found = []
        at = 0
        for _, piece in sorted(self._pieces[name, layer].items()):
            low, high = max(start - at, 0), min(stop - at, piece.shape[0])
            if low < high:
                found.append(rows(self._source, piece.name, piece.layer, low, high))
            at += piece.shape[0]
        if stop > at:  # the padding of the vocabulary
            width = self.stored[name].shape[1:]
            found.append(
                torch.zeros((stop - max(start, at), *width), dtype=self.stored[name].dtype)
            )
        return found[0] if len(found) == 1 else torch.cat(found)


def _canonical(name: str) -> tuple[str, int | None, int]:
    """The table's name for a tensor, its layer where it is one layer's, and which half it is."""
    found = _LAYER.fullmatch(name)
    if found is None:
        return _NAMES.get(name, name), None, -1
    rest, half = found[2], _HALVES.get(found[2], -1)
    if half >= 0:
        rest = "mlp.linear_fc1.weight"
    layer = None if found[1] is None else int(found[1])
    return STACKED + _LAYER_NAMES.get(rest, rest), layer, half


def _layers(
    name: str, stored: Stored, key: str, layer: int | None
) -> Iterator[tuple[int | None, _Piece]]:
    """The tensors of single layers that a stored tensor holds."""
    if layer is not None or not key.startswith(STACKED) or not stored.shape:
        yield layer, _Piece(name, None, stored.shape, stored.dtype)
        return
    for at in range(stored.shape[0]):
        yield at, _Piece(name, at, stored.shape[1:], stored.dtype)


def _numbered(key: str, layer: int | None) -> str:
    return key if layer is None else f"{STACKED}{layer}.{key.removeprefix(STACKED)}"
