"""Adapters as merged weights and as PEFT keeps them; the engine's own are in tests/engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from safetensors.torch import load_file

from tanren.config.errors import RequestError
from tanren.config.model import Model
from tanren.config.training import Lora
from tanren.convert import llama, llama_config, lora
from tanren.convert.tensors import Held
from tests.convert.held import whole

SHAPE = Model(
    layers=2, hidden_size=16, ffn_hidden_size=24, attention_heads=4, kv_groups=2,
    vocabulary_size=200, max_positions=64, rotary_base=5e5, norm_epsilon=1e-6, init_std=0.1,
)  # fmt: skip
SHAPES = {
    "grouped": SHAPE,
    "ungrouped": SHAPE.model_copy(update={"kv_groups": 4}),
    "head-size": SHAPE.model_copy(update={"head_size": 6, "kv_groups": 1}),
    "tied": SHAPE.model_copy(update={"tied_embeddings": True}),
}
TARGETS = ("attention_qkv", "attention_dense", "mlp_fc1", "mlp_fc2", "all")


def adapters(model: Model, settings: Lora) -> dict[str, torch.Tensor]:
    """Random ones, in both matrices, by their names in a checkpoint."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for adapter in lora.table(model, settings):
        rows, columns = adapter.weight.shape
        for name, shape in (
            (adapter.linear_in, (settings.rank, columns)),
            (adapter.linear_out, (rows, settings.rank)),
        ):
            drawn = torch.randn((model.layers, *shape), generator=generator)
            tensors[name] = 0.2 * drawn
    return tensors


def base(model: Model) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    return LlamaForCausalLM(LlamaConfig.from_dict(llama_config.config_of(model))).float().eval()


def logits(model: Any) -> torch.Tensor:
    tokens = torch.arange(48).reshape(2, 24)
    with torch.no_grad():
        found: torch.Tensor = model(tokens).logits
    return found


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_merged_weights_and_peft_say_the_same(tmp_path: Path, shape: str, targets: str) -> None:
    from peft import PeftModel

    model = SHAPES[shape]
    settings = Lora.model_validate({"rank": 3, "alpha": 4.5, "targets": (targets,)})
    tensors, reference = adapters(model, settings), base(model)
    before = logits(reference)
    weights = llama.to_mcore(model, Held(reference.state_dict()))
    both = lora.merged(model, weights, Held(tensors), settings)
    merged = base(model)
    merged.load_state_dict(whole(llama.to_hf(model, both)), strict=not model.tied_embeddings)
    lora.write_peft(tmp_path / "peft", model, Held(tensors), settings, "owner/base")
    beside = PeftModel.from_pretrained(reference, str(tmp_path / "peft"))
    assert (logits(merged) - before).abs().max() > 1e-2
    torch.testing.assert_close(logits(beside.eval()), logits(merged), rtol=0, atol=2e-5)


def test_the_folder_is_what_peft_itself_would_write(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    settings = Lora(rank=3, alpha=6.0, dropout=0.1)
    lora.write_peft(
        tmp_path / "ours", SHAPE, Held(adapters(SHAPE, settings)), settings, "owner/base"
    )
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    theirs = get_peft_model(
        base(SHAPE), LoraConfig(r=3, lora_alpha=6, target_modules=names, task_type="CAUSAL_LM")
    )
    theirs.save_pretrained(str(tmp_path / "theirs"))
    mine, reference = (
        {
            name: (tensor.shape, tensor.dtype)
            for name, tensor in load_file(tmp_path / kind / "adapter_model.safetensors").items()
        }
        for kind in ("ours", "theirs")
    )
    assert mine == reference
    assert len(mine) == 2 * SHAPE.layers * len(names)
    config = orjson.loads((tmp_path / "ours" / "adapter_config.json").read_bytes())
    known = orjson.loads((tmp_path / "theirs" / "adapter_config.json").read_bytes())
    assert config.keys() <= known.keys()
    assert config == {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "owner/base",
        "r": 3, "lora_alpha": 6, "lora_dropout": 0.1, "target_modules": names, "bias": "none",
        "inference_mode": True,
    }  # fmt: skip


def test_the_sum_is_taken_in_fp32_and_the_base_stays_as_it_is() -> None:
    settings = Lora(rank=3, alpha=6.0, targets=("mlp_fc2",))
    tensors = {name: t.bfloat16() for name, t in adapters(SHAPE, settings).items()}
    (adapter,) = lora.table(SHAPE, settings)
    weight = torch.randn((2, 16, 24), generator=torch.Generator().manual_seed(0)).bfloat16()
    kept = weight.clone()
    both = lora.merged(SHAPE, Held({adapter.weight.mcore: weight}), Held(tensors), settings)
    down, up = (tensors[name].double() for name in (adapter.linear_in, adapter.linear_out))
    exact = weight.double() + 2.0 * up @ down
    found = both.read(adapter.weight.mcore)
    assert found.dtype == torch.bfloat16
    # One rounding to the eight bits of bf16, and no other.
    torch.testing.assert_close(found.double(), exact, rtol=1.001 * 2**-8, atol=1e-9)
    assert torch.equal(weight, kept)


def test_a_folder_without_settings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"common\.pt: is missing"):
        lora.settings_of(tmp_path)
