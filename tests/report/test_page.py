"""report.html: what stands in it, and in headless Chromium what a person sees."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import orjson
import pytest

from tanren import runs
from tanren.config.errors import RequestError
from tanren.launch import compare
from tanren.plan.paths import RunFolder
from tanren.report import page
from tests.conftest import Tanren
from tests.report.folders import make_run

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None
)


def data_of(text: str) -> Any:
    found = re.search(r'id="page-data">(.*?)</script>', text, re.DOTALL)
    assert found
    return orjson.loads(found[1])


def test_a_page_says_all_in_words_and_needs_no_other_file(tmp_path: Path) -> None:
    folder = make_run(tmp_path, starts=(1, 61), held_out_loss=4.0, save_blocked_seconds=0.5)
    path = page.write([folder])
    assert path == folder.report
    text = path.read_text()
    for expected in (
        "120", "4.983 → 3", "120,000", "attempt", "0123abcd", "node-hours", "Every step is shown",
        'aria-label="tiny/sft: training from 4.983 at step 1 to 3 at step 120', "Passport",
    ):  # fmt: skip
        assert expected in text, expected
    assert "default-src 'none'" in text
    assert re.findall(r'(?:src|href)="(?!data:)', text) == []
    assert "is still going" not in text
    charts = {chart["id"]: chart for chart in data_of(text)["charts"]}
    assert {"loss", "lr", "grad_norm", "speed", "blocked"} == set(charts)


def test_what_a_run_calls_itself_cannot_end_the_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "sft-<!--<script><b>")
    text = page.write([folder]).read_text()
    assert "<b>" not in text
    assert data_of(text)["runs"][0]["name"] == "tiny/sft-<!--<script><b>"


def test_a_page_of_a_long_run_is_small_and_quick_and_says_what_it_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path, steps=20_000, tflops_per_gpu=400.0, peak_memory_gib=99.0)
    assert not page.cheap(folder) or folder.metrics.stat().st_size < 8 * 2**20
    began = time.process_time()
    text = page.write([folder]).read_text()
    assert time.process_time() - began < 2.0  # a fifth of the steps and of ten seconds
    assert len(text) < 2_000_000
    assert "Of 20,000 steps a curve shows 2,000 points" in text
    lines = [line for chart in data_of(text)["charts"] for line in chart["lines"]]
    assert all(len(line["steps"]) <= 2000 for line in lines)


def test_two_runs_of_a_stage_lie_over_one_another(tmp_path: Path) -> None:
    first, second = make_run(tmp_path), make_run(tmp_path, "sft-b", steps=60)
    path = page.write([first, second])
    assert path == first.comparison
    assert not first.report.exists()
    text = path.read_text()
    assert "tiny/sft and tiny/sft-b" in text
    assert "What differs" in text
    labels = {line["label"] for line in data_of(text)["charts"][0]["lines"]}
    assert labels == {f"tiny/{name} training{how}" for name in ("sft", "sft-b")
                      for how in ("", ", smoothed")}  # fmt: skip


def test_runs_that_are_no_curves_of_one_kind_are_refused(tmp_path: Path) -> None:
    sft, dpo = make_run(tmp_path), make_run(tmp_path, "dpo", stage="dpo")
    for others, problem in (([dpo], "different stages"), ([sft], "twice")):
        with pytest.raises(RequestError, match=problem) as caught:
            page.write([sft, *others])
        assert caught.value.next_step
    assert not sft.comparison.exists()


def test_a_run_that_goes_on_or_has_no_step_yet_has_a_page_too(tmp_path: Path) -> None:
    folder = make_run(tmp_path, done=False)
    folder.metrics.unlink()
    with runs.locked(folder.lock):
        text = page.write([folder]).read_text()
    assert "is still going (running)" in text
    assert "no metrics yet" in text


def test_a_folder_that_cannot_be_written_is_said_with_a_way_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    with pytest.raises(RequestError, match="cannot be written") as caught:
        page.write([folder], tmp_path / "absent" / "page.html")
    assert "--out" in caught.value.next_step


def test_the_command_writes_the_pages_of_every_stage(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared / "tiny", tmp_path / "tiny")
    for run in ("tiny/preprocess", "tiny/convert"):
        done = Tanren(tmp_path)("report", run)
        assert done.code == 0, done.text
        text = RunFolder(tmp_path / run).report.read_text()
        assert "What it made" in text
        assert str(tmp_path / run) in done.out
    wrong = Tanren(tmp_path)("report", "tiny/none")
    assert wrong.code == 2
    assert "the runs are" in wrong.err


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: chromium-headless-shell)")
def test_a_browser_draws_every_curve_and_has_nothing_to_complain_of(tmp_path: Path) -> None:
    assert CHROMIUM is not None
    runs_there = [
        make_run(tmp_path, name, stage="dpo", starts=starts, margin=0.5, held_out_loss=0.6,
                 accuracy=0.7, chosen_reward=0.1, rejected_reward=-0.1, kl=0.1,
                 save_blocked_seconds=0.1)
        for name, starts in (("dpo", (1, 50)), ("dpo-b", (1,)))
    ]  # fmt: skip
    path = page.write(runs_there)
    done = subprocess.run(
        [CHROMIUM, "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--user-data-dir={tmp_path / 'browser'}", "--virtual-time-budget=2000", "--dump-dom",
         path.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    drawn = re.search(r'data-points="([\d ]+)"', done.stdout)
    assert drawn, done.stdout[:500]
    points = [int(number) for number in drawn[1].split()]
    figures = len(re.findall(r"<figure ", done.stdout))
    assert figures == len(points) == 9
    assert len(re.findall(r"<canvas", done.stdout)) == figures
    # Loss: training, smoothed, and held out, of two runs.
    assert points[0] == 120 * 6
    assert min(points) >= 240


def test_the_scores_of_the_export_are_on_the_page_and_in_the_comparison(tmp_path: Path) -> None:
    one = {"task": "gsm8k", "metric": "exact_match", "filter": "strict", "value": 0.25,
           "stderr": 0.01, "examples": 1319}  # fmt: skip
    first, second = make_run(tmp_path), make_run(tmp_path, "sft.B-try")
    assert "Evaluation" not in page.write([first]).read_text()
    for folder in (first, second):
        folder.evaluation.root.mkdir()
    runs.write_json(first.evaluation.scores, {"scores": [one]})
    runs.write_json(second.evaluation.scores, {"scores": [one | {"value": 0.5, "stderr": None}]})
    assert first.evaluation.root.name == "eval.sft"
    assert second.evaluation.root.name == "eval.sft.B-try"
    text = page.write([first, second]).read_text()
    for expected in ("Evaluation", "gsm8k", "exact_match strict", "0.25 ± 0.01 (1319 examples)",
                     "0.5 (1319 examples)"):  # fmt: skip
        assert expected in text, expected
    found = compare.compare(first, second).groups["scores"]
    assert found == ["gsm8k exact_match strict 0.25 there, 0.5 here"]
