"""English mathematics and Japanese sentences, with llm-jp's tokenizer, to a model that reads them.

The data is no part of the repository: it is taken from a folder `shared/data` beside the checkout,
or from $TANREN_TEST_DATA, and without it this test is skipped.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import orjson
import pytest
import torch

from tanren import runs
from tanren.data import indexed
from tanren.data import tokenizer as tokenizers
from tanren.plan.paths import RunFolder
from tests.conftest import REPOSITORY, Tanren

DATA = Path(os.environ.get("TANREN_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
MODEL = DATA / "llm-jp-tokenizer-v4" / "llm-jp-tokenizer_ver4.0_alpha1.0.model"
RECIPES = {
    "preprocess": """
tokenizer: {path: TOKENIZER}
prepend_bos: true
sources:
  - {name: math/gsm8k, path: text/gsm8k.jsonl.gz}
  - {name: jnli, path: text/jnli.jsonl}
""",
    "convert": "{model: tiny-llmjp4, source: random, tokenizer: stage:preprocess}",
    "midtrain": """
model: tiny-llmjp4
init: stage:convert
data: stage:preprocess
mix:
  shares: {"math/*": 0.8, jnli: 0.2}
tokens: 8_000
split: 100,0,0
sequence_length: 128
global_batch: 4
micro_batch: 4
precision: fp32
optimizer: {lr: 2.0e-2, min_lr: 2.0e-3}
schedule: {style: cosine, warmup_steps: 2}
checkpoints: {every_steps: 100}
""",
    "export": "{of: stage:midtrain, dtype: fp32}",
}

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not MODEL.exists(), reason=f"there is no {MODEL}"),
]


def gsm8k(part: str) -> list[str]:
    lines = (DATA / "gsm8k" / f"{part}.jsonl").read_text().splitlines()
    return [f"{one['question']}\n{one['answer']}" for one in map(json.loads, lines)]


@pytest.fixture
def task(tmp_path: Path) -> Path:
    import gzip

    folder = tmp_path / "real"
    (folder / "text").mkdir(parents=True)
    jnli = (DATA / "jnli" / "jnli-v1.1-train.txt").read_text().splitlines()
    texts = {"gsm8k.jsonl.gz": gsm8k("train"), "jnli.jsonl": list(dict.fromkeys(jnli))}
    for name, lines in texts.items():
        data = b"".join(orjson.dumps({"text": line}) + b"\n" for line in lines)
        packed = gzip.compress(data, 1) if name.endswith(".gz") else data
        (folder / "text" / name).write_bytes(packed)
    for stage, text in RECIPES.items():
        (folder / f"{stage}.yaml").write_text(text.replace("TOKENIZER", str(MODEL)))
    return folder


def held_out_loss(model: Path, texts: list[str]) -> float:
    """Mean loss a token of transformers, on text that was in no training."""
    import transformers

    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = tokenizers.read(model)
    losses = []
    for ids in tokenizer.encode(texts):
        row = torch.tensor([[tokenizer.bos, *ids[:120].tolist()]])
        with torch.no_grad():
            losses.append(network(row, labels=row).loss)
    return float(torch.stack(losses).mean())


def test_a_model_learns_to_read_real_text(bare: Tanren, task: Path) -> None:
    done = bare("midtrain", str(task / "midtrain.yaml"), "--needs", "--then", "export")
    assert done.code == 0, done.text
    preprocess, midtrain = (RunFolder(bare.runs / "real" / n) for n in ("preprocess", "midtrain"))

    result = runs.result_of(preprocess)
    assert result is not None
    assert (result["bos"], result["eod"], result["vocabulary_size"]) == (1, 2, 196608)
    tokenizer = tokenizers.read(MODEL)
    expected = [[1, *ids.tolist(), 2] for ids in tokenizer.encode(gsm8k("train"))]
    indexed.write(task / "theirs", expected, tokenizer.size)
    for path in (indexed.bin_path, indexed.idx_path):
        ours = path(preprocess.tokens_of("math/gsm8k")).read_bytes()
        assert ours == path(task / "theirs").read_bytes()

    mix = {source["name"]: source for source in runs.read_json(midtrain.plan)["mix"]["sources"]}
    assert mix["math/gsm8k"]["weight"] == pytest.approx(0.8, abs=1e-9)
    losses = runs.curve(midtrain.metrics, "loss")
    assert len(losses) == 16  # 8,000 tokens of 4 x 128
    base = runs.result_of(RunFolder(bare.runs / "real" / "convert"))
    assert base is not None
    test = gsm8k("test")[:12]
    before = held_out_loss(Path(base["hf"]), test)
    after = held_out_loss(midtrain.export(16), test)
    assert before == pytest.approx(12.19, abs=0.1), "a random model knows nothing: ln 196608"
    assert after < before - 2.5, (before, after)
