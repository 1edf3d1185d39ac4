"""What a run has trained on, its curves and its checkpoints, to be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tanren import runs
from tanren.config.load import read_recipe
from tanren.config.training import Tuning
from tanren.data import examples, selection
from tanren.data.chat import Example
from tanren.plan.paths import RunFolder
from tests.conftest import RECIPES, SHORT_DPO, SHORT_SFT, Tanren


def curve(tanren: Tanren, run: str, key: str) -> list[float]:
    """A metric of a run in the order of its steps."""
    found = runs.curve(tanren.folder(run) / "metrics.jsonl", key)
    return [found[step] for step in sorted(found)]


def choice_of(tanren: Tanren, stage: str) -> selection.Choice:
    """What the short run of sft or dpo reads, from its cache."""
    short = {"sft": SHORT_SFT, "dpo": SHORT_DPO}[stage]
    _, recipe = read_recipe(RECIPES / f"{stage}.yaml", None, list(short))
    assert isinstance(recipe, Tuning)
    [folder] = [
        facts.parent
        for facts in tanren.folder("cache").glob("*/facts.json")
        if json.loads(facts.read_bytes())["kind"] == stage
    ]
    data = examples.read(folder, recipe.datasets[0], "sft" if stage == "sft" else "dpo")
    return selection.choose([data], recipe, stage)


def log_probs(model: Any, example: Example) -> Any:
    """By transformers: the log-probability of each token that an example trains, [tokens]."""
    import torch

    tokens = torch.from_numpy(example.tokens.astype(int))
    with torch.no_grad():
        every = model(tokens[None, :-1]).logits[0].log_softmax(-1)
    each = every.gather(-1, tokens[1:, None])[:, 0]
    return each[torch.from_numpy(example.trained.copy())[1:]]


def weights(checkpoint: Path) -> dict[str, bytes]:
    """Every tensor of a checkpoint, optimizer included, as bytes."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.FileSystemReader(checkpoint)
    stored = reader.read_metadata().state_dict_metadata
    state = {
        key: torch.empty(value.size, dtype=value.properties.dtype)
        for key, value in stored.items()
        if isinstance(value, TensorStorageMetadata)
    }
    assert any(key.startswith("optimizer.") for key in state)
    dcp.load(state, storage_reader=reader, no_dist=True)
    return {key: value.view(torch.uint8).numpy().tobytes() for key, value in state.items()}


def assert_same_run(mine: Tanren, theirs: Tanren, run: str, steps: int) -> None:
    """To the last bit: the curves, and the last checkpoint."""
    for key in ("loss", "held_out_loss", "grad_norm", "lr", "tokens"):
        found = curve(mine, run, key)
        assert found == curve(theirs, run, key), key
        assert len(found) == (steps if key != "held_out_loss" else steps // 3 + 1)
    mine_too, theirs_too = (
        weights(RunFolder(one.folder(run)).checkpoint(steps)) for one in (mine, theirs)
    )
    assert mine_too.keys() == theirs_too.keys()
    assert [key for key in mine_too if mine_too[key] != theirs_too[key]] == []
