"""Kernels for Hopper GPUs, of packages that a run takes in the versions that were tried."""

from __future__ import annotations

from importlib import metadata

import torch

CAPABILITY = (9, 0)


def is_here() -> bool:
    """Whether this process's GPU is one."""
    return torch.cuda.get_device_capability() == CAPABILITY


def why_not_installed(package: str, version: str) -> str | None:
    """Why a package is not there as it was tried; None where it is."""
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError:
        return f"{package} is not installed (this was tried with {version})"
    return None if found == version else f"{package} {found} is installed, and {version} was tried"


def why_not_here() -> str | None:
    """Why this GPU takes other kernels, which were not tried; None where it is a Hopper."""
    return (
        None if is_here() else f"it was tried on Hopper, and this is {torch.cuda.get_device_name()}"
    )
