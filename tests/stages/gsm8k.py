"""GSM8K as conversations and as preferences, and a task that tunes a small model on them.

    python -m tests.stages.gsm8k GSM8K_FOLDER TASK_FOLDER

writes TASK_FOLDER with recipes and data: bin/tanren sft TASK_FOLDER/sft.yaml --needs, then dpo.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import orjson

RECIPES = {
    "preprocess": """\
tokenizer: {train: {vocabulary_size: 2048}}
sources: [{name: text, path: text.jsonl}]
""",
    "convert": "{model: tiny, source: random, tokenizer: 'stage:preprocess'}\n",
    "sft": """\
model: tiny
init: stage:convert
template: llmjp-instruct
datasets:
  - {name: train, path: train.jsonl, split_dev: false}
  - {name: test, path: test.jsonl}
max_dev_ratio: 0.99
max_dev_samples: 200
sequence_length: 512
global_batch: 16
micro_batch: 4
steps: 100
precision: fp32
optimizer: {lr: 3.0e-3, min_lr: 3.0e-4, beta2: 0.98}
schedule: {style: cosine, warmup_steps: 10}
checkpoints: {every_steps: 100, keep_last: 1}
""",
    "dpo": """\
model: tiny
init: stage:sft
template: llmjp-instruct
datasets:
  - {name: pairs, path: pairs.jsonl, split_dev: false}
  - {name: unseen, path: unseen.jsonl}
max_dev_ratio: 0.99
max_dev_samples: 300
sequence_length: 384
global_batch: 32
micro_batch: 4
steps: 60
precision: fp32
optimizer: {lr: 1.0e-4, min_lr: 1.0e-5, beta2: 0.98}
schedule: {style: cosine, warmup_steps: 5}
checkpoints: {every_steps: 60, keep_last: 1}
""",
    "export": "of: stage:sft\n",
}
MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
# Problems of the test set that are looked at.
TEST = 200
# Of the questions that models answered, those whose pairs are for dev alone.
_UNSEEN = 300


def write_task(gsm8k: Path, task: Path) -> None:
    """Write recipes and data."""
    task.mkdir(parents=True, exist_ok=True)
    for stage, text in RECIPES.items():
        (task / f"{stage}.yaml").write_text(text)
    for name, problems in (("train", 7473), ("test", TEST)):
        rows = _read(gsm8k / f"{name}.jsonl")[:problems]
        _write(task / f"{name}.jsonl", ({"messages": [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": row["answer"]},
        ]} for row in rows))  # fmt: skip
    rows = _read(gsm8k / "train.jsonl")
    _write(task / "text.jsonl", ({"text": f"{row['question']}\n{row['answer']}"} for row in rows))
    questions = _read(gsm8k / "example_model_solutions.jsonl")
    random.Random(0).shuffle(questions)
    _write(task / "unseen.jsonl", (pair for row in questions[:_UNSEEN] for pair in _pairs(row)[:1]))
    _write(task / "pairs.jsonl", (pair for row in questions[_UNSEEN:] for pair in _pairs(row)))


def _pairs(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Each correct solution of a question against each one that is not."""
    said = [row[model] for model in MODELS]
    right = [one["solution"] for one in said if one["is_correct"] and one["solution"].strip()]
    wrong = [one["solution"] for one in said if not one["is_correct"] and one["solution"].strip()]
    prompt = [{"role": "user", "content": row["question"]}]
    return [
        {"messages": prompt, "chosen_response": chosen, "rejected_response": rejected}
        for chosen in dict.fromkeys(right)
        for rejected in dict.fromkeys(wrong)
        if chosen.strip() != rejected.strip()
    ]


def _read(path: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))


if __name__ == "__main__":
    write_task(Path(sys.argv[1]), Path(sys.argv[2]))
