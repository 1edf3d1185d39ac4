"""What is wrong with conversations, or with what sft and dpo stand on: one message each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tanren.config.load import read_model
from tanren.convert import hf
from tanren.plan.paths import RunFolder
from tanren.stages.convert import convert_base
from tests.stages.test_bad_input import refused
from tests.stages.warm import Warm


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ASKED = said("user", "Sort 3, 2.")
GOOD = {"messages": [ASKED, said("assistant", "2, 3.")]}
PAIR = {"messages": [ASKED], "chosen_response": "2, 3.", "rejected_response": "3, 2."}
LONG = {"messages": [ASKED, said("assistant", "2, 3, " * 100)]}
# The stage, its lines, and the message: its place, its problem, its next step.
LINES: dict[str, tuple[str, list[Any], str, str, str]] = {
    "a preference for sft": (
        "sft", [GOOD, PAIR], "lines.jsonl:2", "is a preference (chosen and rejected), and sft",
        "give this set to a dpo recipe",
    ),
    "a conversation for dpo": (
        "dpo", [PAIR, PAIR, GOOD], "lines.jsonl:3", "is a conversation without chosen and",
        "give this set to an sft recipe",
    ),
    "a role out of order": (
        "sft", [GOOD, {"messages": [ASKED, ASKED, said("assistant", "2, 3.")]}], "lines.jsonl:2",
        "message 2 of messages is of role user, and the turn is the assistant's",
        "put a system's text first or leave it out, then user and assistant in turns",
    ),
    "an empty answer": (
        "sft", [{"messages": [ASKED, said("assistant", " \n")]}], "lines.jsonl:1",
        "message 2 of messages is an empty answer", "write it, or remove the line",
    ),
    "one answer twice": (
        "dpo", [PAIR, {**PAIR, "rejected_response": "2, 3. "}], "lines.jsonl:2",
        "chosen and rejected are the same answer", "remove the line",
    ),
    "not JSON": (
        "sft", [GOOD, "{"], "lines.jsonl:2", "is not JSON", "mend the line or remove it",
    ),
    "no line": ("sft", [], "lines.jsonl", "holds no line", "check its path"),
    "no dev example": (
        "sft", [GOOD] * 4, "sft.yaml",
        "max_dev_ratio: no dev sample is left: 0.1 of 4 samples of mine is less than one",
        "raise max_dev_ratio, or state max_dev_samples: 0",
    ),
    "all too long": (
        "sft", [LONG] * 20, "sft.yaml",
        "sequence_length: all 20 samples of mine are longer than 128 tokens",
        "raise it, or state too_long: truncate",
    ),
}  # fmt: skip


def write(folder: Path, lines: list[Any]) -> str:
    path = folder / "lines.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts))
    return f"datasets=[{{name: mine, path: {path}}}]"


@pytest.mark.parametrize("kind", LINES)
def test_lines_that_are_wrong(warm: Warm, once_tuned: Path, tmp_path: Path, kind: str) -> None:
    stage, lines, place, problem, next_step = LINES[kind]
    if stage == "dpo":
        (warm.runs / "tiny" / "sft").symlink_to(once_tuned / "tiny" / "sft")
    sets = (write(tmp_path, lines),)
    done = warm.sft(sets=sets) if stage == "sft" else warm.dpo(sets=sets)
    assert next_step in refused(done, 2, place, problem)


def test_one_that_is_too_long_is_named(warm: Warm, tmp_path: Path) -> None:
    done = warm.sft(sets=(write(tmp_path, [GOOD] * 20 + [LONG] * 2), "too_long=error"))
    err = refused(done, 2, "lines.jsonl:21", "tokens, and sequence_length is 128; 2 of 22 samples")
    assert "state too_long: drop or truncate" in err


def test_what_is_too_long_is_left_out_or_cut(warm: Warm, tmp_path: Path) -> None:
    """The table says how many, and only what is left of them is read."""
    lines = write(tmp_path, [GOOD] * 30 + [LONG] * 2)
    rows = {}
    for how in ("drop", "truncate"):
        sets = (lines, "steps=2", "schedule.constant_steps=0", f"too_long={how}")
        done = warm.sft(sets=sets)
        assert done.code == 0, done.text
        [rows[how]] = json.loads((warm.folder("sft") / "examples.json").read_bytes())["sets"]
        shutil.rmtree(warm.folder("sft"))
    for row, used in ((rows["drop"], 27), (rows["truncate"], 29)):
        assert (row["read"], row["too_long"], row["used"]) == (32, 2, used)
        assert row["tokens"] <= used * 129


@pytest.mark.parametrize(
    ("sets", "place", "problem", "next_step"),
    [
        (
            ("template=model",), "midtrain/tokenizer",
            "has no chat template, neither chat_template.jinja nor in tokenizer_config.json",
            "use template: llmjp-instruct",
        ),
        (
            ("steps=null", "epochs=1.0", "schedule.warmup_steps=50"),
            "sft.yaml", "schedule.warmup_steps: 50 are not fewer than the run's",
            "use at most ",
        ),
        (
            ("init=scratch", "tokenizer=stage:preprocess", "lora={rank: 4}"), "sft.yaml",
            "lora: trains adapters beside a base, and init: scratch has none",
            "name the base in init",
        ),
    ],
    ids=["a template that is not there", "a schedule for more steps", "adapters without a base"],
)  # fmt: skip
def test_a_recipe_that_does_not_fit(
    warm: Warm, sets: tuple[str, ...], place: str, problem: str, next_step: str
) -> None:
    assert next_step in refused(warm.sft(sets=sets), 2, place, problem)
    assert not (warm.folder("sft") / "checkpoints").exists()


def test_a_checkpoint_brings_no_tokenizer(warm: Warm, tmp_path: Path) -> None:
    base = f"init=checkpoint:{RunFolder(warm.folder()).checkpoint(8)}"
    refused(warm.sft(sets=(base,)), 2, "sft.yaml", "tokenizer: is not stated, and the base")
    sets = (base, "tokenizer=stage:preprocess", "steps=2", "schedule.constant_steps=0")
    for said_last in ("checkpoint ", "sft is done"):
        done = warm.sft(sets=sets)
        assert done.code == 0, done.text
        assert said_last in done.out
    # What stands on it asks for the tokenizer that it was given.
    other = another_tokenizer(warm, tmp_path)
    err = refused(warm.dpo(sets=(f"tokenizer={other}",)), 2, "dpo.yaml", "tokenizer: ")
    assert f"{other} (2048 pieces) is not the tokenizer of the base {warm.folder('sft')}" in err


def test_a_checkpoint_of_another_shape_names_both_sides(warm: Warm, tmp_path: Path) -> None:
    wider = read_model("tiny").model_copy(update={"ffn_hidden_size": 640})
    hf.write_random(tmp_path / "hf", wider, RunFolder(warm.folder("preprocess")).tokenizer, seed=1)
    convert_base(tmp_path / "hf", wider, tmp_path / "iter_0000000", "recipe.yaml")
    base = f"init=checkpoint:{tmp_path / 'iter_0000000'}"
    done = warm.sft(sets=(base, "tokenizer=stage:preprocess"))
    err = refused(done, 2, "sft.yaml", "init: the checkpoint ")
    assert "mlp.linear_fc1.weight is [4, 1280, 192] there and [4, 1024, 192] in" in err


def another_tokenizer(warm: Warm, folder: Path) -> Path:
    """As large as the base's, with other pieces: nothing but the vocabulary tells them apart."""
    shutil.copytree(RunFolder(warm.folder("preprocess")).tokenizer, folder / "mine")
    file = folder / "mine" / "tokenizer.json"
    value = json.loads(file.read_text())
    vocabulary = value["model"]["vocab"]
    first, second = [piece for piece in vocabulary if len(piece) == 1][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(value))
    return folder / "mine"


def test_another_tokenizer_than_the_bases_is_refused(warm: Warm, tmp_path: Path) -> None:
    other = another_tokenizer(warm, tmp_path)
    for init in ("stage:midtrain", f"hf:{RunFolder(warm.folder('convert')).hf_base}"):
        done = warm.sft(sets=(f"tokenizer={other}", f"init={init}"))
        err = refused(done, 2, "sft.yaml", "tokenizer: ")
        assert f"{other} (2048 pieces) is not the tokenizer of the base" in err
        assert "next: leave tokenizer out of the recipe" in err
