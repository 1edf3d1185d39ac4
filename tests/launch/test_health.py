"""GPUs that are slow or broken are named; on a CPU processes stand for them, and gloo for NCCL."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tanren.launch import health
from tanren.launch.doctor import Group, lacking
from tanren.stages.health import measure


def gpu(index: int, tflops: float | None = 700.0, pair: float | None = 400.0,
        error: str | None = None) -> dict[str, Any]:  # fmt: skip
    return {"index": index, "tflops": tflops, "pair_gbps": pair, "error": error}


def answer(*gpus: dict[str, Any], error: str | None = None) -> dict[str, Any]:
    return {"gpus": list(gpus), "all_reduce_gbps": None if error else 430.0, "error": error}


@pytest.mark.parametrize(
    ("found", "named"),
    [
        (answer(*(gpu(i, 700 + 5 * i) for i in range(8))), {}),
        (answer(*(gpu(i, 660 if i == 3 else 700) for i in range(8))), {
            "GPU 3": "slow: 660 TFLOP/s, 400 GB/s with its neighbour (6% below the median of 700"}),
        (answer(*(gpu(i, 666 if i == 3 else 700) for i in range(8))), {}),
        (answer(*(gpu(i, pair=200 if i == 5 else 400) for i in range(8))), {
            "GPU 5": "50% below the median of 400 GB/s"}),
        (answer(*(gpu(i) for i in range(3)), gpu(3, None, None, "AcceleratorError: ECC")), {
            "GPU 3": "broken: AcceleratorError: ECC"}),
        (answer(gpu(0), gpu(1), error="GPU 1: no answer within 120 s"), {
            "all-reduce": "fails: GPU 1: no answer"}),
        (answer(gpu(0, 100, None)), {}),
    ],
)  # fmt: skip
def test_the_slow_and_the_broken_are_named(found: dict[str, Any], named: dict[str, str]) -> None:
    findings = health.judge(found)
    assert len(findings) == len(found["gpus"]) + 1
    missing = {one.what: one for one in findings if one.state == "missing"}
    assert missing.keys() == named.keys()
    for what, said in named.items():
        assert said in missing[what].found
        assert "the site" in missing[what].next_step
    refusal = lacking([Group("GPUs", tuple(findings))])
    assert (refusal is None) == (not named)


def test_two_processes_measure_and_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = health.measured("cpu", 2, "native")
    assert [one["index"] for one in found["gpus"]] == [0, 1]
    for one in found["gpus"]:
        assert one["error"] is None
        assert one["tflops"] > 1e-4
    assert found["error"] is None
    assert found["all_reduce_gbps"] > 1e-3


def test_one_that_breaks_and_one_that_hangs_take_no_other_along(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(
        "#!/usr/bin/env bash\n"
        f'case "$3 $5" in "matmul 1") echo "Xid 79" >&2; exit 3 ;; "matmul 2") sleep 60 ;;\n'
        f'*) exec {sys.executable} -c \'print("""{{"tflops": 1.0}}""")\' ;; esac\n'
    )
    python.chmod(0o755)
    found = measure("cpu", 3, str(python), limit=3.0)
    errors = [one["error"] for one in found["gpus"]]
    assert errors == [None, "ended with code 3: Xid 79", "no answer within 3 s"]
    assert found["all_reduce_gbps"] is None, "one alone has nobody to meet"


def test_a_machine_without_gpus_is_told_where_to_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    group = health.examine("native")
    refusal = lacking([group])
    assert refusal is not None
    assert "compute node" in refusal.next_step
