"""A small Hugging Face LLaMA with a tokenizer of as many pieces as the vocabulary has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tanren.config.model import Model
from tanren.convert import llama_config
from tests.convert.compare import SHAPE as COMPARED

SHAPE = {**COMPARED, "vocabulary_size": 256}


def write_hf(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    tokenizer_class: str = "PreTrainedTokenizerFast",
    **changes: Any,
) -> Model:
    """Write it as transformers does, and return its shape."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    model = Model(**{**SHAPE, **changes})
    torch.manual_seed(7)
    made = LlamaForCausalLM(LlamaConfig.from_dict(llama_config.config_of(model))).to(dtype).eval()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    made.save_pretrained(folder)
    # What transformers 5 writes of shape and tokenizer, NeMo's transformers 4 cannot read.
    config = {**llama_config.config_of(model), "torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config))
    pieces = ["<s>", "</s>", "<unk>", *(chr(65 + at) for at in range(model.vocabulary_size - 3))]
    words = {piece: at for at, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    about = json.loads((folder / "tokenizer_config.json").read_text())
    about["tokenizer_class"] = tokenizer_class
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return model
