"""Run by test_parity.py in a process of its own: engine/cpu.py changes torch for good.

For each case: a Hugging Face LLaMA with random weights, saved by transformers, converted, run
through megatron-core, exported again. Prints one JSON object a case.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tanren.config.model import Model, RopeScaling
from tanren.config.training import Layout
from tanren.engine import distributed

SHAPE = {
    "layers": 3, "hidden_size": 64, "ffn_hidden_size": 96, "attention_heads": 4, "kv_groups": 2,
    "vocabulary_size": 256, "max_positions": 256, "rotary_base": 10000.0, "norm_epsilon": 1e-5,
    "init_std": 0.08,
}  # fmt: skip
SCALING = RopeScaling(
    factor=4.0, low_frequency_factor=1.0, high_frequency_factor=3.0, original_max_positions=32
)
CASES = {
    "grouped": {},
    "ungrouped": {"kv_groups": 4},
    "one-group": {"kv_groups": 1},
    "tied": {"tied_embeddings": True},
    "head-size": {"head_size": 24},
    "padded-vocabulary": {"vocabulary_size": 203},
    "tied-and-padded": {"vocabulary_size": 203, "tied_embeddings": True},
    "scaled-rope": {"rope_scaling": SCALING, "rotary_base": 500000.0},
}


def compare(shape: Model, folder: Path) -> dict[str, float | bool]:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from tanren.convert import hf, llama, llama_config, mcore
    from tanren.engine import model as models
    from tanren.engine.checkpoint import load_base
    from tanren.stages import convert

    torch.manual_seed(7)
    reference = (
        LlamaForCausalLM(LlamaConfig.from_dict(llama_config.config_of(shape))).float().eval()
    )
    with torch.no_grad():
        for name, weight in reference.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    base, checkpoint, back = folder / "hf", folder / "mcore", folder / "back"
    reference.save_pretrained(base, max_shard_size="200KB")
    convert.convert_base(base, shape, checkpoint, "recipe.yaml")

    config = models.transformer_config(shape, Layout(), precision="fp32")
    model = models.build(shape, config).eval()
    load_base(model, checkpoint, "recipe.yaml")
    tokens = torch.randint(0, shape.vocabulary_size, (2, 96))
    positions = torch.arange(96).expand(2, -1)
    with torch.no_grad():
        theirs = reference(tokens, labels=tokens)
        ours = model(tokens, positions, None)
        losses = model(tokens[:, :-1], positions[:, :-1], None, labels=tokens[:, 1:])

    with mcore.open_checkpoint(checkpoint) as tensors:
        hf.write_model(back, shape, llama.to_hf(shape, tensors), tokenizer=None, base=base)
    again = AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32)
    before, after = reference.state_dict(), again.state_dict()
    return {
        "sharded": len(list(base.glob("*.safetensors"))) > 1,
        "spread": float(theirs.logits.std()),
        "logits": float((ours[..., : shape.vocabulary_size] - theirs.logits).abs().max()),
        "loss": float((losses.mean() - theirs.loss).abs()),
        "padding": int(model.output_layer.weight.shape[0] if model.output_layer.weight is not None
                       else model.shared_embedding_or_output_weight().shape[0]),
        "exact": before.keys() == after.keys()
        and all(torch.equal(before[name], after[name]) for name in before),
        "rows": int(again.get_input_embeddings().weight.shape[0]),
    }  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    distributed.initialize(Layout(), "cpu", seed=1)
    root = Path(sys.argv[1])
    results = {
        name: compare(Model.model_validate(SHAPE | changes), root / name)
        for name, changes in CASES.items()
    }
    print(json.dumps(results))
