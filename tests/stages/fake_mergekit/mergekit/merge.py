import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def run_merge(config, target, options):
    assert options.options["random_seed"] is not None
    folders = [Path(one["model"]["model"]["path"]) for one in config.asked["models"]]
    models = [load_file(folder / "model.safetensors") for folder in folders]
    mean = {
        name: (sum(model[name].float() for model in models) / len(models)).bfloat16()
        for name in models[0]
    }
    if folders[0].name == "broken":
        mean["model.norm.weight"][3] = torch.nan
    save_file(mean, Path(target) / "model.safetensors", metadata={"format": "pt"})
    made = json.loads((folders[-1] / "config.json").read_text()) | {"dtype": "float32"}
    (Path(target) / "config.json").write_text(json.dumps(made))
