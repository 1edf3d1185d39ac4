"""The checkpoints that old versions saved (make_fixtures.py), and what they hold."""

from __future__ import annotations

import tarfile
from pathlib import Path

import torch

from tanren.config.model import Model
from tests.convert.make_fixtures import CASES, FIXTURES, SHAPE, VOCABULARY, value


def unpack(folder: Path) -> Path:
    """All of them, each in a folder of its name."""
    with tarfile.open(FIXTURES) as archive:
        archive.extractall(folder, filter="data")
    return folder


def shape(name: str) -> Model:
    """The model of a case."""
    return Model(
        layers=SHAPE["num-layers"], hidden_size=SHAPE["hidden-size"],
        ffn_hidden_size=SHAPE["ffn-hidden-size"], attention_heads=SHAPE["num-attention-heads"],
        kv_groups=CASES[name].groups, vocabulary_size=VOCABULARY + 1,
        max_positions=SHAPE["max-position-embeddings"], rotary_base=SHAPE["rotary-base"],
        norm_epsilon=SHAPE["norm-epsilon"], tied_embeddings=CASES[name].tied,
    )  # fmt: skip


def weights(model: Model) -> dict[str, torch.Tensor]:
    """Every weight of a case, under the names of llama's table, padded with zeros."""
    from tanren.convert import llama

    found = {name: value(name, shape) for name, shape in llama.mcore_shapes(model).items()}
    for name, tensor in found.items():
        if name.startswith(("embedding", "output_layer")):
            tensor[model.vocabulary_size :] = 0
    return found
