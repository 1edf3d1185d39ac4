"""Run by .venv-nemo's Python with a folder: what NeMo itself makes of each case in it.

A case is a folder with `hf` and `ours`, which tanren converted from it. NeMo imports the first to
`imported`, exports the second to `exported`, and answers with the second: `logits.pt`. Of both
contexts it says what it built from them: `built.json`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any


def built(path: Path) -> dict[str, str]:
    from nemo.lightning import io

    model: Any = io.load_context(path, subpath="model")
    fields = {one.name: getattr(model.config, one.name) for one in dataclasses.fields(model.config)}
    generation = fields.pop("generation_config").to_dict()
    generation.pop("_from_model_config", None)
    return {name: getattr(value, "__qualname__", repr(value)) for name, value in fields.items()} | {
        "generation": json.dumps(generation, sort_keys=True),
        "class": type(model.config).__qualname__,
        "model": type(model).__qualname__,
        "words": str(model.tokenizer.text_to_ids("ab")),
        "vocabulary": str(model.tokenizer.vocab_size),
    }


def logits(path: Path) -> Any:
    import torch
    from nemo.collections.llm.gpt.model.llama import HFLlamaExporter

    model, _ = HFLlamaExporter(path).nemo_load(path)
    model.eval()
    tokens = torch.arange(24).reshape(2, 12) * 7 % 200
    positions = torch.arange(12).expand(2, 12)
    mask = torch.ones(1, 1, 12, 12).triu(1).bool()
    with torch.no_grad():
        found = model(tokens, positions, mask)
    return found.float().reshape(2, 12, -1)


def main(folder: Path) -> None:
    import torch
    from nemo.collections import llm

    from tests.nemo import on_cpu

    on_cpu.install()
    for case in sorted(folder.iterdir()):
        model = llm.LlamaModel(llm.LlamaConfig(num_layers=1, hidden_size=8, num_attention_heads=1))
        llm.import_ckpt(model, f"hf://{case / 'hf'}", output_path=case / "imported")
        llm.export_ckpt(case / "ours", "hf", output_path=case / "exported")
        torch.save(logits(case / "ours"), case / "logits.pt")
        contexts = {name: built(case / name) for name in ("ours", "imported")}
        (case / "built.json").write_text(json.dumps(contexts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
