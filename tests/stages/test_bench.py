"""The bench, end to end: the stages' own steps on this machine's CPU, measured and taken apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tanren.engine.timeline import CATEGORIES
from tests.conftest import RECIPES, SHORT_DPO, Tanren


def measured(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "bench.json").read_text())
    profile = found["profile"]
    assert tuple(profile["categories"]) == CATEGORIES
    parts = profile["categories"].values()
    assert sum(part["share"] for part in parts) == pytest.approx(1)
    assert sum(part["milliseconds"] for part in parts) == pytest.approx(
        profile["step_milliseconds"]
    )
    for category in ("gemm", "head", "norm", "optimizer", "elementwise"):
        assert profile["categories"][category]["milliseconds"] > 0, category
    assert 5 < len(profile["most_expensive"]) <= 25
    return found


def test_a_bench_needs_nothing_else_and_begins_anew(tmp_path: Path) -> None:
    tanren = Tanren(tmp_path / "runs")
    folder = tanren.folder("bench.midtrain")
    (folder / "checkpoints" / "iter_0000003").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step":1,"loss":1.0,"seconds":9.0}\n')
    (folder / "DONE").write_text("{}")
    sets = ("layout.data=2", "micro_batch=2", "sequence_length=64", "precision=fp32")
    done = tanren("bench", str(RECIPES / "midtrain.yaml"), "--steps", "5", sets=sets)
    assert done.code == 0, done.text
    found = measured(folder)
    assert not (folder / "checkpoints").exists()
    assert (found["processes"], found["accumulation"], found["steps"]["timed"]) == (2, 2, 1)
    assert found["tokens_per_step"] == 8 * 64
    seconds = found["step_seconds"]["median"]
    rate = found["tokens_per_second_per_gpu"]["median"]
    assert rate == pytest.approx(8 * 64 / seconds / 2, rel=1e-3)
    phases = found["start"]["phases"]
    assert {"imports", "process groups", "data", "model", "base"} <= set(phases)
    assert sum(phases.values()) == pytest.approx(found["start"]["seconds"], abs=0.1)
    assert f"{rate:,.0f} tokens/s a process" in done.out
    assert "matrix products" in done.out
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5]
    # The times of a step's forward passes are known at the end of the next one.
    assert [line.get("slowest_rank") in (0, 1) for line in steps] == [False] + 4 * [True]
    assert all(0 <= line["data_seconds"] <= line["seconds"] for line in steps)
    ended = json.loads((folder / "DONE").read_text())
    assert 0.5 < ended["in_steps"] <= 1
    assert ended["start_seconds"] == pytest.approx(found["start"]["seconds"], abs=0.01)


def test_made_up_pairs_need_no_reference_and_a_save_is_timed(tmp_path: Path) -> None:
    tanren = Tanren(tmp_path / "runs")
    sets = ("global_batch=8", "precision=fp32", "lora.rank=4")
    done = tanren("bench", str(RECIPES / "dpo.yaml"), "--steps", "4", "--save", sets=sets)
    assert done.code == 0, done.text
    found = measured(tanren.folder("bench.dpo"))
    assert found["save_blocked_seconds"] > 0
    assert "held up training" in done.out
    saved = sorted(path.name for path in tanren.folder("bench.dpo/checkpoints").glob("iter_*"))
    assert saved == ["iter_0000002"]
    assert not (tanren.runs / "tiny" / "cache").exists()


@pytest.mark.long
def test_a_real_bench_reads_what_the_stage_reads(once_tuned: Path, tmp_path: Path) -> None:
    shutil.copytree(once_tuned / "tiny", tmp_path / "runs" / "tiny", symlinks=True)
    tanren = Tanren(tmp_path / "runs")
    done = tanren("bench", str(RECIPES / "dpo.yaml"), "--steps", "4", "--real", sets=SHORT_DPO)
    assert done.code == 0, done.text
    found = measured(tanren.folder("bench.dpo"))
    assert found["data"] == "real"
    log = (tanren.folder("bench.dpo") / "log" / "1.log").read_text()
    assert "pairs are there" in log or "pairs in" in log
    # The stage's own run is what it was.
    assert (tanren.folder("dpo") / "DONE").exists()
