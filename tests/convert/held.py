"""Tensors read whole, for tests."""

from __future__ import annotations

import torch

from tanren.convert.tensors import Tensors


def whole(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Every tensor by its name, which is what was stated before it was read."""
    found = {name: tensors.read(name) for name in tensors.stored}
    for name, stored in tensors.stored.items():
        assert (tuple(found[name].shape), found[name].dtype) == (stored.shape, stored.dtype), name
    return found
