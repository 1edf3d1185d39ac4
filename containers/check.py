#!/usr/bin/env python3
"""%test of every image, the gate of a build: imports, versions, a training step, FP8 on a GPU."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

IMPORTS = {
    "cpu": ("torch", "megatron.core", "megatron.core.datasets.helpers_cpp", "transformers"),
    "train": (
        "torch", "transformer_engine.pytorch", "megatron.core",
        "megatron.core.datasets.helpers_cpp", "transformers", "flash_attn.cute.interface",
        "quack.gemm_interface", "quack.epilogue.library",
    ),
    "te19": (
        "torch", "transformer_engine.pytorch", "megatron.core",
        "megatron.core.datasets.helpers_cpp", "megatron.core.dist_checkpointing", "transformers",
    ),
    "nemo": ("torch", "transformer_engine.pytorch", "megatron.core", "nemo.collections.llm"),
    "merge": ("torch", "transformers", "mergekit.merge"),
}  # fmt: skip
# The images that hold what tanren's own stages need.
TRAINS = ("cpu", "train")


def main() -> None:
    image, repository = sys.argv[1], Path(sys.argv[2])
    for name in IMPORTS[image]:
        importlib.import_module(name)
    shown = ("torch", "transformer-engine", "megatron-core", "flash-attn-4", "quack-kernels",
             "transformers", "nemo-toolkit", "mergekit", "numpy")  # fmt: skip
    there = {p.metadata["Name"].lower().replace("_", "-"): p.version
             for p in metadata.distributions()}  # fmt: skip
    print(f"check {image}: Python {sys.version.split()[0]}, "
          + ", ".join(f"{name} {there[name]}" for name in shown if name in there))  # fmt: skip
    if image in TRAINS:
        train_one_step(repository)
    if image == "merge":
        import_the_stage(repository)
    import torch

    if torch.cuda.is_available() and "transformer-engine" in there:
        multiply_on_gpu()
    else:
        print(f"check {image}: no GPU here, matrix products in bf16 and FP8 were not tried")


def import_the_stage(repository: Path) -> None:
    """The stage that runs in this image, with what tanren's own modules import."""
    sys.path.insert(0, str(repository / "src"))
    for name in ("__main__", "merge"):
        importlib.import_module(f"tanren.stages.{name}")


def train_one_step(repository: Path) -> None:
    """The whole road on the CPU, one step long: text, tokens, base, training, checkpoint."""
    recipe = repository / "recipes" / "tiny" / "midtrain.yaml"
    if not recipe.exists():
        sys.exit(f"check.py: {recipe} is not there: bind tanren's repository at {repository}")
    sets = ["steps=1", "sequence_length=64", "global_batch=2", "micro_batch=1", "precision=fp32",
            "schedule.warmup_steps=0", "schedule.decay_steps=1",
            "evaluation.sequences=2"]  # fmt: skip
    command = [str(repository / "bin" / "tanren"), "midtrain", str(recipe), "--needs"]
    for assignment in sets:
        command += ["--set", assignment]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "user.toml").touch()
        environment = os.environ | {
            "RUNS": f"{folder}/runs", "HOME": folder, "TMPDIR": folder, "RUNTIME": "native",
            "TANREN_PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "",
            "PYTHONDONTWRITEBYTECODE": "1", "TANREN_USER": f"{folder}/user.toml",
        }  # fmt: skip
        done = subprocess.run(command, env=environment, check=False)
    if done.returncode:
        sys.exit(f"check.py: one step of tiny ended with {done.returncode}")


def multiply_on_gpu() -> None:
    """Transformer Engine's linear layer in bf16 and in FP8 against float64 on the CPU."""
    import torch
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import DelayedScaling

    torch.manual_seed(0)
    layer = te.Linear(512, 256, bias=False, params_dtype=torch.bfloat16).cuda()
    values = torch.randn(128, 512, device="cuda", dtype=torch.bfloat16)
    exact = values.double().cpu() @ layer.weight.detach().double().cpu().T
    # Relative to the exact product: bf16 keeps 8 bits of the mantissa, FP8 (e4m3) 4.
    for name, fp8, bound in (("bf16", False, 0.01), ("FP8", True, 0.06)):
        with torch.no_grad(), te.fp8_autocast(enabled=fp8, fp8_recipe=DelayedScaling()):
            for _ in range(2):  # the second call uses the scale that the first one measured
                product = layer(values)
        error = ((product.double().cpu() - exact).norm() / exact.norm()).item()
        print(f"check: {name} matrix product on {torch.cuda.get_device_name()}, error {error:.4f}")
        if not error < bound:
            sys.exit(f"check.py: the error of the {name} product is {error:.4f}, over {bound}")


if __name__ == "__main__":
    main()
