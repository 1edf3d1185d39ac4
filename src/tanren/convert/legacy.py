"""Megatron-LM's `torch` format: a file of torch.save for each tensor- and pipeline-parallel rank.

`mp_rank_TT/model_optim_rng.pt`, with pipeline stages `mp_rank_TT_PPP/model_optim_rng.pt`. Each
holds its rank's shards of its own layers, counted from 0; with a virtual pipeline in `model0`,
`model1` and so on. The files are mapped, and the shards joined when they are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tanren.config.errors import RequestError
from tanren.convert import unpickle
from tanren.convert.tensors import Stored

FILE = "model_optim_rng.pt"
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(_\d{3,})?")
# How a tensor is cut over the tensor-parallel ranks, by the module that it belongs to, under
# megatron-core's names and under those of Megatron-LM's own models before it. What is not named
# is whole on each rank.
_ROWS = ("word_embeddings", "output_layer", "linear_qkv", "query_key_value")
_COLUMNS = ("linear_proj", "linear_fc2", "dense", "dense_4h_to_h")
_GATED = ("linear_fc1", "dense_h_to_4h")
_LAYER = re.compile(r"(.*\blayers\.)(\d+)(\..*)")


@dataclass(frozen=True)
class _Shards:
    """One tensor: its parts, a rank's each, and how they make the whole."""

    parts: tuple[torch.Tensor, ...]
    cut: str  # rows, columns, gated, whole

    @property
    def shape(self) -> tuple[int, ...]:
        first, count = tuple(self.parts[0].shape), len(self.parts)
        if self.cut == "columns":
            return (first[0], first[1] * count)
        return first if self.cut == "whole" else (first[0] * count, *first[1:])

    def rows(self, start: int, stop: int) -> torch.Tensor:
        if self.cut == "columns":
            cut = [part[start:stop] for part in self.parts]
            return cut[0] if len(cut) == 1 else torch.cat(cut, 1)
        found, at = [], 0
        for piece in self._in_order():
            low, high = max(start - at, 0), min(stop - at, len(piece))
            if low < high:
                found.append(piece[low:high])
            at += len(piece)
        return found[0] if len(found) == 1 else torch.cat(found)

    def _in_order(self) -> Sequence[torch.Tensor]:
        if self.cut == "whole":
            return self.parts[:1]
        if self.cut == "rows":
            return self.parts
        # Each rank has its rows of the gate, and then its rows of the up projection.
        halves = [part.chunk(2) for part in self.parts]
        return [gate for gate, _ in halves] + [up for _, up in halves]


class Legacy:
    """The weights of such a checkpoint, a tensor a layer, under the names that the files have."""

    def __init__(self, folder: Path, *, trust: bool = False) -> None:
        """
        Raises:
            RequestError: a rank's file is missing, torn, or refused; shards do not fit together.
        """
        self.folder = folder
        ranks = _ranks(folder)
        states = {
            at: [_state(path, trust) for path in paths] for at, paths in sorted(ranks.items())
        }
        first = states[0][0]
        self.args, self.iteration = first.get("args"), int(first.get("iteration", 0))
        self.version = float(first.get("checkpoint_version", 0))
        self._tensors = dict(self._joined(states))
        self.stored = {
            name: Stored(shards.shape, shards.parts[0].dtype)
            for name, shards in self._tensors.items()
        }

    def read(self, name: str, layer: int | None = None) -> torch.Tensor:
        return self.rows(name, layer, 0, self.stored[name].shape[0])

    def rows(self, name: str, layer: int | None, start: int, stop: int) -> torch.Tensor:
        assert layer is None, name
        return self._tensors[name].rows(start, stop)

    def _joined(self, states: dict[int, list[dict[str, Any]]]) -> Iterator[tuple[str, _Shards]]:
        """Each tensor with the number of its layer in the whole model.

        A virtual pipeline gives the first chunk's layers to the stages one after the other, then
        the second chunk's.
        """
        chunks = sorted({key for state in states.values() for key in _chunks(state[0])}, key=_order)
        if not chunks:
            raise RequestError(self.folder, "holds no model", f"is {FILE} of a training?")
        before = 0
        for chunk in chunks:
            for stage, ranks in states.items():
                if any(chunk not in state for state in ranks):
                    raise RequestError(
                        self.folder, f"has no {chunk} in some of the files of stage {stage}",
                        "bring the checkpoint again, whole",
                    )  # fmt: skip
                flat = [dict(_flat(state[chunk])) for state in ranks]
                layers = 0
                for name in flat[0]:
                    found = _LAYER.fullmatch(name)
                    number = int(found[2]) if found else 0
                    layers = max(layers, number + 1 if found else 0)
                    whole = f"{found[1]}{number + before}{found[3]}" if found else name
                    yield whole, self._shards(name, stage, flat)
                before += layers

    def _shards(self, name: str, stage: int, flat: list[dict[str, torch.Tensor]]) -> _Shards:
        there = {len(tensors) for tensors in flat}
        if any(name not in tensors for tensors in flat) or len(there) > 1:
            raise RequestError(
                self.folder, f"has other tensors on one rank of stage {stage} than on another",
                "bring the checkpoint again, whole",
            )  # fmt: skip
        parts = tuple(tensors[name] for tensors in flat)
        kinds = {(part.shape, part.dtype) for part in parts}
        module = name.split(".")[-2] if "." in name else name
        weight = name.endswith(".weight")
        cut = "whole"
        if weight and len(kinds) == 1 and len(parts) > 1 and parts[0].ndim == 2:
            for kind, modules in (("rows", _ROWS), ("columns", _COLUMNS), ("gated", _GATED)):
                cut = kind if module in modules else cut
        # Norms are the same on each rank; where they are not, this is no checkpoint of one model.
        same = cut != "whole" or not weight or all(part.equal(parts[0]) for part in parts[1:])
        if len(kinds) > 1 or not same:
            raise RequestError(
                self.folder, f"{name} differs between the ranks of stage {stage}",
                "are there files of two checkpoints in the folder?",
            )  # fmt: skip
        return _Shards(parts, cut)


def is_legacy(folder: Path) -> bool:
    return any(_RANK.fullmatch(path.name) for path in folder.glob("mp_rank_*"))


def _ranks(folder: Path) -> dict[int, list[Path]]:
    """The file of each pipeline stage's tensor-parallel ranks."""
    found: dict[tuple[int, int], Path] = {}
    for path in folder.glob("mp_rank_*"):
        name = _RANK.fullmatch(path.name)
        if name is None:
            continue
        if name[3]:
            raise RequestError(
                path, "is of an expert-parallel rank", "a LLaMA without experts is read"
            )
        found[int(name[2] or 0), int(name[1])] = path / FILE
    tensor, stages = ({key[axis] for key in found} for axis in (1, 0))
    wanted = [(p, t) for p in range(max(stages) + 1) for t in range(max(tensor) + 1)]
    staged = any(len(path.parent.name.split("_")) == 4 for path in found.values())
    missing = [
        f"mp_rank_{t:02d}" + (f"_{p:03d}" if staged else "")
        for p, t in wanted
        if (p, t) not in found or not found[p, t].is_file()
    ]
    if missing:
        raise RequestError(
            folder, f"lacks {FILE} of {', '.join(missing)}", "bring the checkpoint again, whole"
        )
    result: dict[int, list[Path]] = {}
    for p, t in wanted:
        result.setdefault(p, []).append(found[p, t])
    return result


def _state(path: Path, trust: bool) -> dict[str, Any]:
    state = unpickle.load(path, trust=trust, mapped=True)
    if not isinstance(state, dict):
        raise RequestError(
            path, f"holds a {type(state).__name__}, and no checkpoint", "is it Megatron-LM's?"
        )
    return state


def _chunks(state: dict[str, Any]) -> list[str]:
    return [key for key in state if re.fullmatch(r"model\d*", str(key))]


def _order(chunk: str) -> int:
    return int(chunk.removeprefix("model") or 0)


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of nested dicts by their whole names; scales of FP8 are let pass."""
    for key, held in value.items():
        name = f"{prefix}{key}"
        if isinstance(held, torch.Tensor):
            if not name.endswith("_extra_state"):
                yield name, held
        elif isinstance(held, dict) and not name.endswith("_extra_state"):
            yield from _flat(held, f"{name}.")
