"""Run by test_nemo.py in NeMo's own Python: NeMo's models beside the engine's, and its contexts.

python -m tests.stages.nemo_runs shapes OUT.json
python -m tests.stages.nemo_runs context CHECKPOINT OUT.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from tanren.config.model import Model
from tanren.config.training import Layout

SCALED = {"factor": 4.0, "original_max_positions": 16}
OF_SHAPES: dict[str, dict[str, Any]] = {
    "untied": {"tied_embeddings": False},
    "tied": {"tied_embeddings": True},
    "scaled": {"rope_scaling": SCALED},
    "head": {"head_size": 12},
}


def shapes() -> dict[str, dict[str, float]]:
    """Of each shape the largest difference of losses and of gradients, and their sizes.

    Of 256 columns of the vocabulary 53 are padding.
    """
    from tanren.engine import cpu, distributed, eager
    from tanren.stages.nemo import cpu as nemo_cpu

    cpu.hide_gpu_libraries()
    eager.import_megatron()
    distributed.initialize(Layout(), "cpu", 5)
    nemo_cpu.install()

    from tanren.engine import model as models
    from tanren.engine.packed import packed_forward
    from tanren.stages.nemo.model import Tuned, training_config
    from tests.engine.packed_runs import COMMON, micro_batches

    found = {}
    for name, more in OF_SHAPES.items():
        shape = Model.model_validate(COMMON | more)
        config = models.transformer_config(shape, Layout(), precision="fp32")
        ours = models.build(shape, config)
        theirs = Tuned(training_config(shape))
        theirs.real_vocabulary = shape.vocabulary_size
        theirs.configure_model()
        theirs.module.load_state_dict(ours.state_dict())
        losses = [
            torch.cat([packed_forward(batch, model) for batch in micro_batches()])
            for model in (ours, theirs)
        ]
        for one in losses:
            one.sum().backward()
        pairs = [
            (a.grad, dict(theirs.module.named_parameters())[key].grad)
            for key, a in ours.named_parameters()
        ]
        found[name] = {
            "count": len(losses[0]),
            "losses": _apart(losses[0], losses[1]),
            "gradients": max(_apart(a, b) for a, b in pairs),
            "parameters": len(pairs),
        }
    return found


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / one.abs().max())


def context(checkpoint: Path) -> dict[str, Any]:
    """What NeMo itself makes of a checkpoint's context, without anything of tanren."""
    from nemo.collections import llm
    from nemo.lightning import io

    assert not any(name.startswith("tanren.stages") for name in sys.modules)
    model = io.load_context(checkpoint / "context", subpath="model")
    assert isinstance(model, llm.LlamaModel)
    return {
        "layers": model.config.num_layers,
        "hidden": model.config.hidden_size,
        "vocabulary": model.config.vocab_size,
        "tokens": model.tokenizer.text_to_ids("What does json.dumps do?"),
    }


def main(arguments: list[str]) -> None:
    what, *rest, out = arguments
    found: Any = shapes() if what == "shapes" else context(Path(rest[0]))
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
