"""What a stage's process says of itself must never be what ends it."""

from __future__ import annotations

import pytest
import torch

from tanren.stages import process


def test_versions_are_those_of_this_process() -> None:
    found = process.facts()
    assert found["torch"]["threads"] == torch.get_num_threads()
    assert "torch" in found["packages"]


def test_another_cudnn_than_torchs_own_is_noted_and_ends_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def version() -> int:
        raise RuntimeError("compiled against (9, 19, 0) but found (9, 14, 0)")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 3))
    monkeypatch.setattr(torch.backends.cudnn, "version", version)
    assert process.facts()["torch"]["cudnn"] == "compiled against (9, 19, 0) but found (9, 14, 0)"
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    assert process.facts()["torch"]["cudnn"] == 91900
