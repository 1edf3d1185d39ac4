"""Which of this machine's GPUs is slow or broken: asked of stages/health.py, judged here."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import orjson

from tanren.config.errors import WorkError
from tanren.launch import container, local, native, orders
from tanren.launch.doctor import Finding, Group
from tanren.launch.machine import visible_gpus

# A GPU that is so much slower than the median is named: GPUs of one kind are within 2 %.
SLOWER = 0.05


def examine(wanted: str | None, wishes: Sequence[str] = ()) -> Group:
    """Measure the GPUs that a process here may use, in the image or in .venv.

    Args:
        wanted: a runtime's name; None chooses as a stage does.
        wishes: folders that the container sees as well.
    Raises:
        RequestError: the image cannot be used. WorkError: the measurement itself fails.
    """
    count = visible_gpus()
    if not count:
        none = Finding("GPUs", "missing", "none that a process here may use",
                       "run it on a compute node; CUDA_VISIBLE_DEVICES= must name some",
                       needed=True)  # fmt: skip
        return Group("GPUs", (none,))
    return Group("GPUs", tuple(judge(measured("cuda", count, wanted, wishes))))


def measured(
    device: Literal["cuda", "cpu"], count: int, wanted: str | None, wishes: Sequence[str] = ()
) -> Mapping[str, Any]:
    """What stages/health.py measures of so many GPUs (of a CPU: processes)."""
    inside = container.choose(wanted, count if device == "cuda" else 0)
    words = ["-m", "tanren.stages.health", device, str(count)]
    if inside is None:
        native.complete()
        command = [sys.executable, *words]
    else:
        runs = orders.runs_root()
        runs.mkdir(parents=True, exist_ok=True)
        there = replace(inside, binds=container.binds(None, runs, wishes))
        command = ["bash", "-c", container.script_of(there, ["python3", *words])]
    environment = os.environ | {"PYTHONPATH": local.python_path(), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, env=environment, check=False, stdin=subprocess.DEVNULL
    )
    try:
        found: dict[str, Any] = orjson.loads(done.stdout)
    except orjson.JSONDecodeError:
        raise WorkError(
            "the test of the GPUs",
            f"ended with code {done.returncode} and no answer",
            "see above; RUNTIME=native tries it without the image",
        ) from None
    return found


def judge(found: Mapping[str, Any]) -> list[Finding]:
    """A line for each GPU, and one for all together.

    A GPU is missing when it fails, or is over 5 % slower than the median of those that work, in the
    matrix product or in the better of its pairs.
    """
    gpus = found["gpus"]
    node = Path("/etc/hostname").read_text().strip() if Path("/etc/hostname").exists() else "here"
    tell = f"tell the site (node {node}); CUDA_VISIBLE_DEVICES= without it, or another node"
    typical = {key: median(values) for key in ("tflops", "pair_gbps")
               if (values := [gpu[key] for gpu in gpus if gpu[key] is not None])}  # fmt: skip
    findings = []
    for gpu in gpus:
        what = f"GPU {gpu['index']}"
        if gpu["error"] is not None:
            findings.append(Finding(what, "missing", f"broken: {gpu['error']}", tell, needed=True))
            continue
        said, slow = [], []
        for key, unit in (("tflops", "TFLOP/s"), ("pair_gbps", "GB/s with its neighbour")):
            if gpu[key] is None:
                continue
            share = 1 - gpu[key] / typical[key]
            said.append(f"{gpu[key]:,.4g} {unit}")
            if share > SLOWER:
                slow.append(f"{share:.0%} below the median of {typical[key]:,.4g} {unit}")
        if slow:
            findings.append(Finding(what, "missing", f"slow: {', '.join(said)} "
                                    f"({'; '.join(slow)})", tell, needed=True))  # fmt: skip
        else:
            findings.append(Finding(what, "ok", ", ".join(said)))
    if found["error"] is not None:
        findings.append(Finding("all-reduce", "missing", f"fails: {found['error']}",
                                "NCCL_DEBUG=INFO bin/tanren doctor --gpus says more; then tell the "
                                "site", needed=True))  # fmt: skip
    elif found["all_reduce_gbps"] is not None:
        working = sum(gpu["error"] is None for gpu in gpus)
        findings.append(Finding("all-reduce", "ok", f"{found['all_reduce_gbps']:,.4g} GB/s (bus "
                                f"bandwidth over {working} GPUs)"))  # fmt: skip
    return findings
