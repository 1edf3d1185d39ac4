"""What this machine has, read without torch."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from tanren.plan.cost import Gpu
from tanren.plan.kernels import QUACK, QUACK_VERSION
from tanren.plan.plan import Machine


def this_machine(*, in_image: bool = False) -> Machine:
    """GPUs that a process here may use, cores, and whether the CPU multiplies bf16 matrices.

    Args:
        in_image: stages run in an image, which has Transformer Engine and quack-kernels where there
            are GPUs.
    """
    gpus = visible_gpus()
    usable = in_image or find_spec("transformer_engine") is not None
    return Machine(
        gpus=gpus if usable else 0,
        idle_gpus=0 if usable else gpus,
        fast_bf16=_fast_bf16(),
        cores=len(os.sched_getaffinity(0)),
        gpu=_gpu(in_image) if gpus and usable else None,
        memory_gib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
    )


def _gpu(in_image: bool) -> Gpu | None:
    found = _smallest_gpu()
    return None if found is None else replace(found, quack=in_image or _has_quack())


def _has_quack() -> bool:
    """Whether this Python has it as runs take it."""
    try:
        return metadata.version(QUACK) == QUACK_VERSION
    except metadata.PackageNotFoundError:
        return False


def _of_gpus(fields: str) -> list[str]:
    """A line a GPU, of what the driver says of these fields, without units.

    Raises:
        OSError, subprocess.SubprocessError: there is no driver that answers.
    """
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=20
    ).stdout.splitlines()


@cache
def _smallest_gpu() -> Gpu | None:
    """Name and memory as the driver tells them; None where it has no tool for it."""
    try:
        found = [line.split(", ", 1) for line in _of_gpus("memory.total,name")]
        mib, name = min((float(memory), name) for memory, name in found)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return Gpu(name, mib / 1024)


@cache
def gpus_and_driver() -> tuple[tuple[str, ...], str | None]:
    """The name of each GPU and the driver's version, as the driver tells them; none without it."""
    try:
        found = [line.split(", ", 1) for line in _of_gpus("driver_version,name") if line]
        return tuple(name for _, name in found), found[0][0]
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return (), None


def cpu_name() -> str:
    """The processor as the kernel names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown"


@cache
def compute_capability() -> float | None:
    """Of the oldest GPU, 9.0 for an H100 or H200; None where the driver does not tell."""
    try:
        return min(float(line) for line in _of_gpus("compute_cap") if line)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def visible_gpus() -> int:
    """GPUs of this machine that CUDA_VISIBLE_DEVICES lets a process see."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([part for part in visible.split(",") if part.strip() not in ("", "-1")])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def _fast_bf16() -> bool:
    # AVX-512 BF16 alone was measured slower than fp32 for training; matrix tiles are what helps.
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
