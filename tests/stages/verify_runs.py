"""Run by test_verify.py in a process of its own: engine/cpu.py changes torch for good.

Compares a Hugging Face folder with its checkpoint, as they are and with one thing wrong at a time.
Prints one JSON object: of each case the report.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import torch

from tanren.config.errors import RequestError, WorkError
from tanren.config.model import Model, RopeScaling
from tanren.convert import hf, interchange, llama, llama_config, nemo
from tanren.convert.interchange import Options
from tanren.convert.tensors import Held
from tanren.stages import verify
from tests.convert.held import whole

SHAPE = Model(
    layers=3, hidden_size=64, ffn_hidden_size=96, attention_heads=4, kv_groups=2,
    vocabulary_size=203, max_positions=256, rotary_base=1e4, norm_epsilon=1e-6,
)  # fmt: skip
SCALING = RopeScaling(
    factor=4.0, low_frequency_factor=1.0, high_frequency_factor=3.0, original_max_positions=32
)
SCALED = SHAPE.model_copy(update={"rope_scaling": SCALING, "rotary_base": 5e5})
TIED = SHAPE.model_copy(update={"tied_embeddings": True})
QKV = "decoder.layers.self_attention.linear_qkv.weight"
FC1 = "decoder.layers.mlp.linear_fc1.weight"
FC2 = "decoder.layers.mlp.linear_fc2.weight"
Weights = dict[str, torch.Tensor]


def weights(shape: Model) -> Weights:
    generator = torch.Generator().manual_seed(7)

    def draw(of: tuple[int, ...]) -> torch.Tensor:
        drawn = torch.randn(of, generator=generator)
        return drawn.sigmoid() + 0.5 if len(of) == 1 else drawn * 0.1

    return {name: draw(of) for name, of in llama.hf_shapes(shape).items()}


def write(folder: Path, shape: Model, tensors: Weights, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    hf.write_tensors(folder, Held(tensors))
    hf.write_settings(folder, shape, torch.float32, None, None)
    config = orjson.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_bytes(orjson.dumps(config | changes))
    return folder


def by_projection(there: Weights) -> None:
    """All queries, then all keys, then all values: not by key-value groups."""
    queries, keys, values = (
        torch.stack(parts)
        for parts in zip(*(llama._split_qkv(SHAPE, one) for one in there[QKV]), strict=True)
    )
    there[QKV] = torch.cat([queries, keys, values], dim=1)


def swap_gate(there: Weights) -> None:
    there[FC1] = there[FC1].roll(SHAPE.ffn_hidden_size, dims=1)


def interleave_rotary(there: Weights) -> None:
    """Rows of queries and keys in pairs, as the first LLaMAs' own files have them."""
    rows = there[QKV].reshape(SHAPE.layers, -1, 2, SHAPE.head_width // 2, SHAPE.hidden_size)
    by_pairs = rows.transpose(2, 3).reshape(there[QKV].shape)
    values = by_pairs.view(SHAPE.layers, SHAPE.kv_groups, -1, SHAPE.head_width, SHAPE.hidden_size)
    values[:, :, -1] = there[QKV].view(values.shape)[:, :, -1]
    there[QKV] = by_pairs


def permute_one(there: Weights) -> None:
    there[FC2][1] = there[FC2][1].flip(1)


def swap_layers(there: Weights) -> None:
    there[QKV] = there[QKV][[0, 2, 1]]


def poison(there: Weights) -> None:
    there[FC2][2, 5, 5] = float("nan")


def conversions(root: Path) -> dict[str, Any]:
    """Whole conversions that compare both sides: right, rounded, and by projection on each way."""
    found: dict[str, Any] = {}
    shown: list[verify.Report] = []

    def convert(name: str, way: Any, source: Path, dtype: str | None = None) -> None:
        target = root / "made" / name
        compared = verify.comparison(target, shown.append, lambda doing: None)
        try:
            way(source, target, Options(dtype=dtype, verify=compared), lambda doing: None)
        except WorkError as error:
            found[name] = [error.place, error.problem, [one.name for one in root.glob("made/*")]]
        else:
            found[name] = [shown[-1].failed is None, len(shown[-1].differences), target.exists()]

    there = write(root / "source", SHAPE, weights(SHAPE))
    convert("in", interchange.hf_to_mcore, there)
    convert("out", interchange.mcore_to_hf, root / "made" / "in")
    convert("in-bf16", interchange.hf_to_mcore, there, "bf16")
    convert("out-bf16", interchange.mcore_to_hf, root / "made" / "in", "bf16")
    convert("nemo1", partial(nemo.hf_to_nemo, kind="nemo1"), there)
    convert("nemo2", nemo.hf_to_nemo, there, "bf16")
    convert("of-nemo1", nemo.nemo_to_hf, root / "made" / "nemo1")
    convert("of-nemo2", partial(nemo.nemo_to_hf, like=there), root / "made" / "nemo2")
    join, split = llama._join_qkv, llama._split_qkv
    sizes = [one.shape[0] for one in split(SHAPE, torch.empty(128, 64))]
    llama._join_qkv = lambda model, parts: torch.cat(parts)
    convert("bug-in", interchange.hf_to_mcore, there)
    convert("bug-nemo", nemo.hf_to_nemo, there)
    llama._join_qkv = join
    llama._split_qkv = lambda model, tensor: list(torch.split(tensor, sizes))
    convert("bug-out", interchange.mcore_to_hf, root / "made" / "in")
    llama._split_qkv = split
    return found


def main(root: Path) -> dict[str, Any]:
    cases: dict[str, tuple[Model, Callable[[Weights], None] | None, dict[str, Any]]] = {
        "right": (SHAPE, None, {}),
        "right-tied": (TIED, None, {}),
        "right-scaled": (SCALED, None, {}),
        "right-mistral": (SHAPE, None, {
            "model_type": "mistral", "architectures": ["MistralForCausalLM"],
            "sliding_window": None,
        }),
        "by-projection": (SHAPE, by_projection, {}),
        "rotary-pairs": (SHAPE, interleave_rotary, {}),
        "gate-and-up": (SHAPE, swap_gate, {}),
        "theta": (SHAPE, None, {"rope_theta": 2e4}),
        "no-scaling": (SCALED, None, {"rope_scaling": None}),
        "scaling-factor": (SCALED, None, {
            "rope_scaling": llama_config.config_of(SCALED)["rope_scaling"] | {"factor": 8.0},
        }),
        "epsilon": (SHAPE, None, {"rms_norm_eps": 1e-5}),
        "tied": (SHAPE, None, {"tie_word_embeddings": True}),
        "one-layer": (SHAPE, permute_one, {}),
        "two-layers": (SHAPE, swap_layers, {}),
        "nan": (SHAPE, poison, {}),
    }  # fmt: skip
    results: dict[str, Any] = {}
    for name, (shape, change, changes) in cases.items():
        tensors = weights(shape)
        folder = write(root / name, shape, tensors, **changes)
        there = {n: t.clone() for n, t in whole(llama.to_mcore(shape, Held(tensors))).items()}
        if change is not None:
            change(there)
        report = verify.verify(folder, Held(there), shape, verify.ids_for(None, shape), folder)
        failed = report.failed
        results[name] = {
            "failed": failed.where if failed else None,
            "places": [one.where for one in report.differences],
            "largest": max(one.relative for one in report.differences),
            "tokens": report.tokens,
        }
    results |= conversions(root)
    # Two folders against each other; and models that cannot be compared.
    right, ids = root / "right", verify.ids_for(None, SHAPE)
    for name, other in (("hf-right", right), ("hf-theta", root / "theta")):
        found = verify.verify_hf(right, other, SHAPE, ids, right).failed
        results[name] = found.where if found else None
    fewer = SHAPE.model_copy(update={"layers": 2})
    write(root / "fewer", fewer, weights(fewer))
    try:
        verify.verify_hf(right, root / "fewer", SHAPE, ids, right)
    except RequestError as error:
        results["fewer"] = error.problem
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(Path(sys.argv[1]))))
