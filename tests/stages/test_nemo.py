"""sft and dpo by NeMo: the curves of the engine, from the same start (make test-nemo)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tanren import runs
from tanren.environments import NEMO
from tanren.plan.paths import RunFolder
from tests.conftest import REPOSITORY, SHORT_SFT, Tanren, set_back, wait_for
from tests.stages.compared import curve

pytestmark = [
    pytest.mark.nemo,
    pytest.mark.skipif(not os.access(NEMO.python(), os.X_OK), reason="make env-nemo"),
]
BY_NEMO = ("engine=nemo",)


def ask(folder: Path, *words: str) -> Any:
    """What tests/stages/nemo_runs.py finds in NeMo's own Python."""
    out = folder / "found.json"
    environment = os.environ | {
        "PYTHONPATH": f"{REPOSITORY / 'src'}:{REPOSITORY}", "TORCHDYNAMO_DISABLE": "1",
        "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [str(NEMO.python()), "-m", "tests.stages.nemo_runs", *words, str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_bytes())


@pytest.fixture(scope="module")
def tuned(once_trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Tanren:
    """A short sft by NeMo of the short training, exported; its checkpoints 2, 4 and 6."""
    tanren = Tanren(tmp_path_factory.mktemp("nemo"))
    shutil.copytree(once_trained / "tiny", tanren.runs / "tiny")
    done = tanren.sft("--then", "export", sets=BY_NEMO)
    assert done.code == 0, done.text
    return tanren


@pytest.fixture
def again(tuned: Tanren, tmp_path: Path) -> Tanren:
    """A copy of it."""
    shutil.copytree(tuned.runs, tmp_path / "runs")
    return Tanren(tmp_path / "runs")


def test_nemos_models_are_the_engines_in_every_shape(tmp_path: Path) -> None:
    """Losses and gradients of packed micro batches: tied, padded, scaled, heads of 12."""
    found = ask(tmp_path, "shapes")
    assert sorted(found) == ["head", "scaled", "tied", "untied"]
    for name, one in found.items():
        assert one["count"] == 30, name
        assert one["parameters"] == (14 if name == "tied" else 15)
        assert one["losses"] < 1e-6 and one["gradients"] < 5e-6, name


def test_sft_by_nemo_has_the_engines_curve_and_weights(tuned: Tanren, once_tuned: Path) -> None:
    theirs = Tanren(once_tuned)
    for key, count in (("loss", 6), ("held_out_loss", 3), ("grad_norm", 6), ("lr", 6)):
        mine = curve(tuned, "sft", key)
        assert len(mine) == count
        assert mine == pytest.approx(curve(theirs, "sft", key), rel=1e-6), key
    assert curve(tuned, "sft", "tokens") == curve(theirs, "sft", "tokens")
    from safetensors.torch import load_file

    exports = [one.folder("sft") / "hf" / "iter_0000006" for one in (tuned, theirs)]
    mine, others = (load_file(one / "model.safetensors") for one in exports)
    assert mine.keys() == others.keys() and len(mine) == 39
    for name, tensor in mine.items():
        assert (tensor.float() - others[name].float()).abs().max() < 1e-3, name


def test_its_checkpoints_are_nemos_own(tuned: Tanren, tmp_path: Path) -> None:
    folder = RunFolder(tuned.folder("sft"))
    assert runs.iterations(folder) == (2, 4, 6)
    assert runs.latest_checkpoint(folder) == 6
    checkpoint = folder.checkpoint(6)
    assert sorted(path.name for path in checkpoint.iterdir()) == [
        "context", "files.json", "weights"
    ]  # fmt: skip
    found = ask(tmp_path, "context", str(checkpoint))
    assert len(found.pop("tokens")) > 5
    assert found == {"layers": 4, "hidden": 192, "vocabulary": 2048}
    result = runs.result_of(folder)
    assert result is not None
    assert (result["iteration"], result["template"]) == (6, "llmjp-instruct")


def test_a_run_of_nemo_goes_on_where_a_signal_stopped_it(again: Tanren, tuned: Tanren) -> None:
    """Twice: by its newest checkpoint of some time ago, and after the signal."""
    folder = set_back(again, 2, "sft")
    folder.metrics.unlink()
    process = again.start("sft", str(REPOSITORY / "recipes/tiny/sft.yaml"),
                          sets=(*SHORT_SFT, *BY_NEMO))  # fmt: skip
    wait_for(lambda: 3 in runs.curve(folder.metrics, "loss"))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    if process.returncode == 75:
        assert "the same command goes on from there" in err
        assert runs.latest_checkpoint(folder) == max(runs.curve(folder.metrics, "loss")) < 6
        done = again.sft(sets=BY_NEMO)
        assert done.code == 0, done.text
    else:
        assert process.returncode == 0, out + err  # it was over before it heard
    for key in ("loss", "grad_norm", "lr"):
        assert curve(again, "sft", key) == curve(tuned, "sft", key)[2:], key


def test_two_processes_train_what_one_does(again: Tanren, tuned: Tanren) -> None:
    shutil.rmtree(again.folder("sft"))
    done = again.sft(sets=(*BY_NEMO, "layout.data=2", "micro_batch=1"))
    assert done.code == 0, done.text
    for key in ("loss", "held_out_loss", "grad_norm"):
        assert curve(again, "sft", key) == pytest.approx(curve(tuned, "sft", key), rel=1e-6), key


@pytest.mark.parametrize("engine", ["nemo", "megatron"])
def test_either_engine_tunes_what_nemo_has_tuned(
    again: Tanren, once_tuned: Path, engine: str
) -> None:
    """DPO from NeMo's sft; once_tuned has that of the engine from its own."""
    done = again.dpo(sets=(f"engine={engine}",))
    assert done.code == 0, done.text
    for key in ("loss", "held_out_loss", "grad_norm", "chosen_log_prob"):
        mine, theirs = curve(again, "dpo", key), curve(Tanren(once_tuned), "dpo", key)
        assert len(mine) == len(theirs) >= 3
        assert mine == pytest.approx(theirs, rel=2e-5), key
    assert curve(again, "dpo", "loss")[0] == pytest.approx(0.693147, abs=1e-6)
    assert curve(again, "dpo", "loss")[-1] < 0.6
