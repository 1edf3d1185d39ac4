"""Run by test_megatron_loads.py in a process of its own: engine/cpu.py changes torch for good.

megatron-core loads what was written as strictly as it can. Prints one JSON object.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tanren.config.training import Layout
from tanren.engine import distributed
from tests.convert.saved_by_others import shape, weights

CASE = "mcore-0.9.0"


def main(checkpoint: Path) -> dict[str, list[str]]:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    from tanren.engine import model as models

    model = shape(CASE)
    config = models.transformer_config(model, Layout(), precision="fp32")
    built = models.build(model, config)

    def load(strict: StrictHandling) -> object:
        for weight in built.parameters():
            weight.data.fill_(float("nan"))
        return dist_checkpointing.load(built.sharded_state_dict(), str(checkpoint), strict=strict)

    # What Megatron-LM asks for by default: all that the model has must be there.
    load(StrictHandling.ASSUME_OK_UNEXPECTED)
    wanted = weights(model)
    different = []
    for name, parameter in built.named_parameters():
        parts = name.split(".")
        key = name
        if parts[1] == "layers":
            norms = {"input_layernorm": "self_attention.linear_qkv.layer_norm_weight",
                     "pre_mlp_layernorm": "mlp.linear_fc1.layer_norm_weight"}  # fmt: skip
            key = "decoder.layers." + norms.get(parts[3], ".".join(parts[3:]))
        expected = wanted[key][int(parts[2])] if parts[1] == "layers" else wanted[key]
        if not torch.equal(parameter.data.bfloat16(), expected):
            different.append(name)
    # To megatron-core missing is what nothing asked for.
    _, left, lacking = load(StrictHandling.RETURN_ALL)  # type: ignore[misc]
    return {
        "parameters": [name for name, _ in built.named_parameters()],
        "different": different,
        "lacking": sorted(lacking),
        "left": sorted(left),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    distributed.initialize(Layout(), "cpu", seed=1)
    print(json.dumps(main(Path(sys.argv[1]))))
