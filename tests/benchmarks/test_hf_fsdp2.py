"""The benchmark of transformers under FSDP2 trains the shape that it says, and counts right."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tanren.config.load import read_model
from tests.conftest import REPOSITORY

pytest.importorskip("transformers")
pytestmark = pytest.mark.long


def test_two_processes_train_and_are_measured(tmp_path: Path) -> None:
    # Of a vocabulary of 2,048 pieces: two bytes a token.
    tokens = np.random.default_rng(0).integers(0, 2048, size=64 * 2 * 3, dtype="<u2")
    (tmp_path / "text.bin").write_bytes(tokens.tobytes())
    out = tmp_path / "hf.json"
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            str(REPOSITORY / "benchmarks" / "hf_fsdp2.py"), "--model", "tiny", "--sequence", "64",
            "--micro-batch", "2", "--accumulation", "3", "--steps", "2", "--warm-up", "1",
            "--lr", "1.0e-3", "--late-reduce", "--keep-gathered", "--data", str(tmp_path / "text"),
            "--out", str(out),
        ],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY / "src"), "CUDA_VISIBLE_DEVICES": "",
                          "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_bytes())
    assert json.loads(done.stdout) == found
    assert (found["processes"], found["gpus"], found["attention"]) == (2, 0, "sdpa")
    assert (found["global_batch"], found["tokens_per_step"]) == (12, 12 * 64)
    assert found["steps"] == {"all": 2, "warm_up": 1, "timed": 1}
    assert len(found["seconds"]) == len(found["loss"]) == len(found["grad_norm"]) == 2
    seconds = found["seconds"][1]
    assert found["step_seconds"] == {"median": seconds, "min": seconds, "max": seconds}
    rate = found["tokens_per_second_per_gpu"]["median"]
    assert rate == pytest.approx(6 * 64 / seconds, rel=1e-3)
    operations = read_model("tiny").flops_per_token(64)
    assert found["tflops_per_gpu"]["median"] == pytest.approx(rate * operations / 1e12, abs=0.006)
    # Both steps read the three micro batches of the file; the first step has learned from them.
    assert found["loss"][0] == pytest.approx(math.log(2048), abs=0.2)
    assert found["loss"][1] < found["loss"][0] - 0.05
    assert all(norm > 0.1 for norm in found["grad_norm"])


@pytest.mark.parametrize("words", [(), ("--late-reduce", "--keep-gathered")])
def test_the_sharded_model_is_transformers_own(words: tuple[str, ...]) -> None:
    """Made on no device at first: what is no weight must be made anew. And its gradients."""
    import torch
    import torch.distributed as dist
    import transformers

    from benchmarks import hf_fsdp2
    from tanren.convert.llama_config import config_of

    shape = read_model("tiny")
    options = hf_fsdp2.read_options(
        ["--model", "tiny", "--attention", "sdpa", "--accumulation", "3", *words]
    )
    batches = [torch.arange(96)[None] * factor % 2048 for factor in (3, 5, 7)]
    device = hf_fsdp2.join()
    try:
        model = hf_fsdp2.build(shape, options, device)
        own = {name: one.full_tensor() for name, one in model.state_dict().items()}
        with torch.no_grad():
            found = model(input_ids=batches[0]).logits.float()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        step = hf_fsdp2.step(model, optimizer, iter(batches), options, 1, device)
    finally:
        dist.destroy_process_group()
    assert sum(one.numel() for one in own.values()) == shape.parameters
    assert {one.dtype for one in own.values()} == {torch.float32}
    norms = [one for one in own.values() if one.dim() == 1]
    assert len(norms) == 2 * shape.layers + 1
    assert all(bool((one == 1).all()) for one in norms)
    assert float(own["lm_head.weight"].std()) == pytest.approx(shape.init_std, rel=0.02)

    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config_of(shape)))
    plain.load_state_dict(own)
    plain.to(torch.bfloat16)
    with torch.no_grad():
        expected = plain(input_ids=batches[0], use_cache=False).logits.float()
    assert found.shape == expected.shape == (1, 96, 2048)
    assert float((found - expected).abs().max()) < 0.02 * float(expected.abs().max())
    plain.float()
    losses = [plain(input_ids=one, labels=one, use_cache=False).loss for one in batches]
    mean = torch.stack(losses).mean()
    mean.backward()
    norm = torch.nn.utils.get_total_norm([one.grad for one in plain.parameters()])
    assert step["loss"] == pytest.approx(float(mean), rel=1e-3)
    assert step["grad_norm"] == pytest.approx(float(norm), rel=0.02)


def test_a_benchmark_that_would_measure_nothing_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from benchmarks import hf_fsdp2

    with pytest.raises(SystemExit):
        hf_fsdp2.read_options(["--model", "tiny", "--steps", "2"])
    assert "--steps 2: --warm-up 2 leaves none to measure" in capsys.readouterr().err
