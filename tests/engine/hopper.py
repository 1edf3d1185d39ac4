"""Packages of kernels for Hopper, really there or only as it seems."""

from __future__ import annotations

from importlib import metadata

import pytest
import torch


def on_hopper_with(package: str, version: str) -> bool:
    """Whether this is a GPU whose runs are to take a package, by what its module knows not of."""
    try:
        there = metadata.version(package) == version
    except metadata.PackageNotFoundError:
        return False
    return there and torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def pretend(
    monkeypatch: pytest.MonkeyPatch, package: str, version: str | None,
    capability: tuple[int, int] = (9, 0),
) -> None:  # fmt: skip
    """A GPU with that package, or without."""

    def found(name: str) -> str:
        assert name == package
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
