"""The engine and NeMo side by side: the same steps of sft or dpo, their speed, memory and losses.

    PYTHONPATH=src python benchmarks/nemo.py --model llmjp4-8b-4layers --tied --out nemo.json \\
        --nemo-python .venv-nemo/bin/python

Both read the same made-up conversations of GSM8K's lengths, packed alike, and begin from the same
random weights, so that their losses can be compared. Each runs in a process of its own, by
tanren's own stages, on one GPU, or on the CPU where there is none. Timed are the steps between the
warm-up and the two that the engine's bench traces.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import torch

from tanren import provenance, runs
from tanren.config.load import read_model, read_recipe, repository
from tanren.config.model import Model
from tanren.config.training import Tuning
from tanren.convert import llama, mcore
from tanren.convert.tensors import Held
from tanren.plan.bench import Bench, bench_recipe
from tanren.plan.cost import Gpu
from tanren.plan.make import make_plan
from tanren.plan.plan import DpoPlan, Machine, Request, SftPlan

ENGINES = ("megatron", "nemo")


def main(words: Sequence[str] | None = None) -> None:
    options = read_options(words)
    shape = read_model(options.model)
    if options.tied:
        shape = shape.model_copy(update={"tied_embeddings": True})
    folder = Path(tempfile.mkdtemp(prefix="nemo-", dir=options.scratch))
    base = folder / "base"
    write_base(shape, base)
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "model": options.model, "parameters": shape.parameters,
        "sequence_length": options.sequence, "steps": options.steps, "runs": [],
    }  # fmt: skip
    for stage in options.stages:
        for rows in options.micro_batch:
            for engine in options.engines:
                found["runs"].append(measure(options, shape, stage, rows, engine, folder, base))
                # What was measured is kept whatever comes after.
                found["apart"] = apart(found["runs"])
                options.out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


def read_options(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="the engine and NeMo, measured side by side")
    parser.add_argument("--model", required=True, help="a shape in recipes/models")
    parser.add_argument("--tied", action="store_true", help="with tied embeddings")
    parser.add_argument("--stages", nargs="+", choices=("sft", "dpo"), default=["sft", "dpo"])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--sequence", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=16, help="of a step of sft")
    parser.add_argument("--pairs", type=int, default=64, help="of a step of dpo")
    parser.add_argument("--micro-batch", type=int, nargs="+", default=[1])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--nemo-python", default=sys.executable, help="a Python that has NeMo")
    parser.add_argument("--nemo-path", default="", help="what it finds NeMo by (PYTHONPATH)")
    parser.add_argument("--scratch", type=Path, help="where the base and the runs go")
    parser.add_argument("--out", type=Path, required=True, help="a JSON file")
    return parser.parse_args(words)


def write_base(shape: Model, base: Path) -> None:
    """A checkpoint of random weights in bf16."""
    drawn = torch.Generator().manual_seed(1)
    tensors = {}
    for entry in llama.table(shape):
        size = (shape.layers, *entry.shape) if entry.stacked else entry.shape
        tensor = torch.ones(size, dtype=torch.bfloat16)
        if "norm" not in entry.mcore:
            tensor.normal_(0.0, shape.init_std, generator=drawn)
        tensors[entry.mcore] = tensor
    mcore.write_base(shape, Held(tensors), base)


def plan_of(
    options: argparse.Namespace, shape: Model, stage: str, rows: int, engine: str, folder: Path,
    base: Path,
) -> SftPlan | DpoPlan:  # fmt: skip
    """The bench's plan of a stage, begun from the base, by the engine."""
    recipe_file = repository() / "recipes" / "tiny" / f"{stage}.yaml"
    batch = options.rows if stage == "sft" else options.pairs
    _, recipe = read_recipe(recipe_file, None, [
        f"sequence_length={options.sequence}", f"global_batch={batch}", f"micro_batch={rows}",
        f"precision={options.precision}", "optimizer.lr=1.0e-5", "optimizer.min_lr=1.0e-5",
        "main_gradients=fp32",
    ])  # fmt: skip
    bench = Bench(steps=options.steps)
    gpu, device = None, 0
    if torch.cuda.is_available():
        gpu, device = Gpu(torch.cuda.get_device_name(), 140.0), 1
    plan = make_plan(Request(
        task="benchmark", stage=stage, recipe=bench_recipe(recipe, bench, recipe_file),
        recipe_file=recipe_file, runs=folder, model=shape, bench=bench, name=f"{engine}-{rows}",
        machine=Machine(gpus=device, gpu=gpu, cores=len(os.sched_getaffinity(0))),
    ))  # fmt: skip
    assert isinstance(plan, SftPlan | DpoPlan)
    changed: Tuning = plan.recipe.model_copy(update={"engine": engine})
    launch = plan.launch.model_copy(update={"own": "nemo" if engine == "nemo" else None})
    return plan.model_copy(
        update={"recipe": changed, "launch": launch, "start": f"checkpoint:{base}"}
    )


def measure(
    options: argparse.Namespace, shape: Model, stage: str, rows: int, engine: str, folder: Path,
    base: Path,
) -> dict[str, Any]:  # fmt: skip
    """Run one, and read what it wrote down."""
    plan = plan_of(options, shape, stage, rows, engine, folder, base)
    run = plan.folder
    run.root.mkdir(parents=True)
    value = orjson.loads(plan.model_dump_json())
    runs.write_json(run.plan, value)
    attempt = provenance.open_attempt(run, repository(), value, None, {})
    nemo = engine == "nemo"
    path = [str(repository() / "src"), options.nemo_path if nemo else os.environ["PYTHONPATH"]]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, path)), "PYTHONUNBUFFERED": "1",
        "WANDB_MODE": "disabled", "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
    }  # fmt: skip
    if plan.launch.device == "cpu":
        environment["TORCHDYNAMO_DISABLE"] = "1"
    python = options.nemo_python if nemo else sys.executable
    said = run.log(attempt)
    said.parent.mkdir(parents=True, exist_ok=True)
    with said.open("wb") as log:
        code = subprocess.run(
            [python, "-m", "tanren.stages", str(run.plan), str(attempt)],
            env=environment, stdout=log, stderr=subprocess.STDOUT, check=False,
        ).returncode  # fmt: skip
    what = {"stage": stage, "engine": engine, "micro_batch": rows}
    if code or not run.done.exists():
        tail = said.read_text(errors="replace").splitlines()[-25:]
        print("\n".join(tail), file=sys.stderr)
        return what | {"failed": tail}
    losses = runs.curve(run.metrics, "loss")
    seconds, speeds = (
        [curve[step] for step in Bench(steps=options.steps).timed]
        for curve in (runs.curve(run.metrics, key) for key in ("seconds", "tokens_per_second"))
    )
    memory = runs.curve(run.metrics, "peak_memory_gib")
    return what | {
        "tokens_per_second": round(statistics.median(speeds), 1),
        "step_seconds": round(statistics.median(seconds), 4),
        # Before the engine's last two steps, which are traced.
        "peak_memory_gib": memory.get(options.steps - 2),
        "losses": [losses[step] for step in sorted(losses)],
        "grad_norms": list(runs.curve(run.metrics, "grad_norm").values()),
    }


def apart(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each pair of runs the largest relative difference of their losses."""
    found = []
    for one in measured:
        for other in measured:
            alike = all(one[key] == other[key] for key in ("stage", "micro_batch"))
            both = "losses" in one and "losses" in other
            if alike and both and (one["engine"], other["engine"]) == ENGINES:
                pairs = zip(one["losses"], other["losses"], strict=True)
                found.append({
                    "stage": one["stage"], "micro_batch": one["micro_batch"],
                    "losses": max(abs(a - b) / abs(a) for a, b in pairs),
                    "speed": other["tokens_per_second"] / one["tokens_per_second"],
                })  # fmt: skip
    return found


if __name__ == "__main__":
    main()
