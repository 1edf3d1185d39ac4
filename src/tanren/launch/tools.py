"""Small programs that need the engine's packages: run in the image or in .venv, their output read.

They are no stages: they leave nothing behind, and a person waits for them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import orjson

from tanren import runs
from tanren.config.errors import RequestError, WorkError, error_from_dict
from tanren.launch import container, local, native, orders
from tanren.launch.machine import visible_gpus
from tanren.launch.orders import Order
from tanren.plan.paths import RunFolder, is_run_of, run_name


def output_of(
    order: Order, module: str, words: Sequence[str], given: bytes = b"", *, gpus: bool = False
) -> bytes:
    """What `python -m MODULE WORDS` prints, given this on its input.

    Args:
        gpus: it may use this machine's; else it sees none.
    Raises:
        TanrenError: what the program left as its error.
    """
    inside = container.choose(order.runtime, visible_gpus())
    environment = os.environ | {"PYTHONPATH": local.python_path()}
    if not gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    # What torch and megatron-core warn of at their import is nothing to whoever asked.
    quiet = [] if os.environ.get("TANREN_DEBUG") else ["-W", "ignore"]
    if inside is None:
        native.complete()
        command = [sys.executable, *quiet, "-m", module, *words]
    else:
        bound = container.binds(None, orders.runs_root(), order.binds)
        there = replace(inside, binds=bound)
        inner = ["python3", *quiet, "-m", module, *words]
        command = ["bash", "-c", container.script_of(there, inner)]
    done = subprocess.run(
        command, input=given, stdout=subprocess.PIPE, env=environment, check=False
    )
    if done.returncode == 0:
        return done.stdout
    try:
        raise error_from_dict(orjson.loads(done.stdout))
    except (orjson.JSONDecodeError, KeyError):
        raise WorkError(module, f"ended with code {done.returncode}", "see above") from None


def answers_file(prompts: Path) -> Path:
    """Where the answers to a file of prompts go: `questions.answers.jsonl`, beside it.

    Raises:
        RequestError: there is no such file, or nothing can be written beside it.
    """
    if not prompts.is_file():
        raise RequestError(prompts, "there is no such file", "check PROMPTS=")
    if not os.access(prompts.parent, os.W_OK):
        raise RequestError(prompts.parent, "cannot be written, and answers go beside the prompts",
                           "copy the prompts to a folder of yours")  # fmt: skip
    return prompts.with_name(f"{prompts.name.removesuffix('.jsonl')}.answers.jsonl")


def asks_by_template(stage: str, export: Path) -> bool:
    """Whether a model is asked by its chat template: after sft and dpo, and a soup that has one."""
    if stage == "merge":
        return bool((runs.result_of(RunFolder(export.parents[1])) or {}).get("chat"))
    return stage != "midtrain"


def newest_export(order: Order) -> Path:
    """The export of a run's newest checkpoint that has one.

    Raises:
        RequestError: it has none; the message says what makes one.
    """
    stage, task = order.recipe_file.name.split(".")[0], order.recipe_file.resolve().parent.name
    folder = RunFolder(orders.runs_root() / task / run_name(stage, order.variant, order.name))
    if (folder.hf_merged / "config.json").is_file():
        return folder.hf_merged
    found = [
        path.parent
        for name in ("config.json", "adapter_config.json")
        for path in folder.hf.glob(f"iter_*/{name}")
    ]
    if not found:
        options = "".join(
            f" {key}={value}"
            for key, value in (("VARIANT", order.variant), ("NAME", order.name))
            if value
        )
        makes = f"merge TASK={task}" if stage == "merge" else f"export TASK={task} STAGE={stage}"
        exports = folder.root.parent.glob("*/hf/iter_*/*config.json")
        names = sorted({path.parents[2].name for path in exports})
        own = [name for name in names if is_run_of(stage, name)]
        there = f"; {', '.join(own)} {'has' if len(own) == 1 else 'have'} one" if own else ""
        raise RequestError(folder.hf, f"holds no export{there}", f"make {makes}{options}")
    return max(found)
