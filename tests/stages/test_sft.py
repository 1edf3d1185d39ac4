"""Supervised fine-tuning: the same loss however it is packed, laid out and interrupted."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tanren import runs
from tanren.data import selection
from tanren.data.packing import best_fit
from tanren.plan.paths import RunFolder
from tests.conftest import CHATS, RECIPES, SHORT_SFT, Tanren, set_back, trainer_of, wait_for
from tests.stages.compared import assert_same_run, choice_of, curve, log_probs
from tests.stages.conftest import take
from tests.stages.warm import Warm

LAYOUTS = {
    "sequence": ("layout.tensor=2", "layout.sequence_parallel=true"),
    "pipeline": ("layout.pipeline=2",),
    "data": ("layout.data=2", "micro_batch=1"),
}


@pytest.fixture
def choice(once_tuned: Path) -> selection.Choice:
    return choice_of(Tanren(once_tuned), "sft")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_train_what_one_does(warm: Warm, once_tuned: Path, layout: str) -> None:
    done = warm.sft(sets=(*LAYOUTS[layout], "checkpoints.every_steps=9"))
    assert done.code == 0, done.text
    for key in ("loss", "held_out_loss", "grad_norm"):
        mine, theirs = curve(warm, "sft", key), curve(Tanren(once_tuned), "sft", key)
        assert len(mine) == len(theirs) >= 3
        assert mine == pytest.approx(theirs, rel=2e-5), key
    assert curve(warm, "sft", "loss")[-1] < curve(warm, "sft", "loss")[0] - 0.5


def test_packing_ranks_and_the_cache_change_nothing(warm: Warm, choice: selection.Choice) -> None:
    """Two epochs of a step each: in full rows by one process; in a row each by two, from no cache.

    Each example is read once an epoch, and the steps are those that the epochs give.
    """
    sets = ("steps=null", "epochs=2.0", "schedule.warmup_steps=0", "schedule.constant_steps=0",
            "micro_batch=1", "checkpoints.every_steps=9")  # fmt: skip
    lengths = choice.sets[0].lengths[choice.used[0]] - 1
    rows = len(best_fit(lengths, 128))
    assert rows < len(lengths) == 54
    packed, alone = (f"global_batch={rows}", *sets), ("global_batch=54", "packing=false", *sets)
    plan = ("plan", str(RECIPES / "sft.yaml"))
    before = warm(*plan, sets=(*SHORT_SFT, *packed)).out
    assert re.search(r"^steps +known once the data is read \(2 epochs\)$", before, re.MULTILINE)
    keys = ("loss", "held_out_loss", "grad_norm", "tokens")
    found: list[dict[str, list[float]]] = []
    for one in (packed, (*alone, "layout.data=2")):
        shutil.rmtree(warm.folder("cache"), ignore_errors=True)
        done = warm.sft(sets=one)
        assert done.code == 0, done.text
        found.append({key: curve(warm, "sft", key) for key in keys})
        after = warm(*plan, sets=(*SHORT_SFT, *one)).out
        assert re.search(r"^steps +2 \(2 epochs\)$", after, re.MULTILINE)
        made = json.loads((warm.folder("sft") / "examples.json").read_bytes())
        shutil.rmtree(warm.folder("sft"))
    for key in keys:
        assert len(found[0][key]) == 2, key
        assert found[1][key] == pytest.approx(found[0][key], rel=1e-5), key
    # Of each example all tokens but the last are the model's input.
    assert found[0]["tokens"] == [lengths.sum(), 2 * lengths.sum()]
    assert (made["steps"], made["end_ids"]) == (2, [1])
    [row] = made["sets"]
    assert row.pop("trained_tokens") < row["tokens"] / 3
    assert row == {
        "name": "questions", "read": 60, "too_long": 0, "used": 54, "dev": 6,
        "samples_per_epoch": 54, "examples": 54, "tokens": lengths.sum() + 54,
    }  # fmt: skip


def test_a_stop_after_any_step_and_the_same_command_goes_on(warm: Warm, once_tuned: Path) -> None:
    """Data, schedule and random state are those of the run that nothing disturbed, bit for bit."""
    warm.environment["TANREN_DEADLINE"] = "1"  # long ago: each attempt stops after a step
    for step in (1, 2):
        stopped = warm.sft()
        assert stopped.code == 75, stopped.text
        assert f"stopped by the end of its walltime after step {step}, saved" in stopped.err
    del warm.environment["TANREN_DEADLINE"]
    done = warm.sft()
    assert done.code == 0, done.text
    assert "goes on from iteration 2" in done.out
    assert_same_run(warm, Tanren(once_tuned), "sft", 6)


@pytest.mark.long
def test_a_checkpoint_goes_on_in_another_layout(warm: Warm, once_tuned: Path) -> None:
    take(once_tuned, warm, "sft", 2)
    for iteration, layout in ((2, "sequence"), (4, "pipeline")):
        done = warm.sft(sets=(*LAYOUTS[layout], "micro_batch=1"))
        assert done.code == 0, done.text
        assert f"goes on from iteration {iteration}" in done.out
        mine, theirs = curve(warm, "sft", "loss"), curve(Tanren(once_tuned), "sft", "loss")
        assert len(mine) == len(theirs) == 6
        assert mine == pytest.approx(theirs, rel=2e-5)
        set_back(warm, 4, "sft")


@pytest.mark.long
def test_kill_9_goes_back_to_the_last_whole_checkpoint(tanren: Tanren, once_tuned: Path) -> None:
    """By the real command: the training alone is killed."""
    (tanren.runs / "tiny" / "midtrain").symlink_to(once_tuned / "tiny" / "midtrain")
    folder = RunFolder(tanren.folder("sft"))
    process = tanren.start("sft", str(RECIPES / "sft.yaml"), sets=SHORT_SFT)
    wait_for(folder.checkpoint(2).exists)
    training = trainer_of(process.pid)
    training.kill()
    process.communicate()
    assert runs.latest_checkpoint(folder) in (2, 4)

    done = tanren.sft()
    assert done.code == 0, done.text
    assert re.search("goes on from iteration [24]\n", done.out)
    assert_same_run(tanren, Tanren(once_tuned), "sft", 6)


def test_the_export_talks_and_has_the_loss_that_training_had(
    warm: Warm, once_tuned: Path, choice: selection.Choice
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    take(once_tuned, warm, "sft", 6)
    shutil.copyfile(once_tuned / "tiny" / "sft" / "DONE", warm.folder("sft") / "DONE")
    done = warm("export", str(RECIPES / "export.yaml"), sets=("of=stage:sft", "dtype=fp32"))
    assert done.code == 0, done.text
    assert warm.folder("export.sft").is_dir()
    folder = warm.folder("sft") / "hf" / "iter_0000006"
    assert {path.name for path in folder.iterdir()} == {
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [tokenizer.eos_token_id] == [1]

    # What is held out, as the run tokenized it, and as inference asks the same questions.
    lines = [json.loads(line) for line in (CHATS / "questions.jsonl").read_text().splitlines()]
    losses = []
    assert len(choice.dev) == 6
    for sample in choice.dev[:, 1].tolist():
        [example] = choice.examples(0, sample)
        messages = lines[sample]["messages"]
        first = next(n for n, one in enumerate(messages) if one["role"] == "assistant")
        asked = tokenizer.apply_chat_template(messages[:first], add_generation_prompt=True)
        asked = asked["input_ids"]
        assert asked == example.tokens[: int(example.trained.argmax())].tolist()
        assert tokenizer.decode(example.tokens) == tokenizer.apply_chat_template(
            messages, tokenize=False
        )
        losses.append(-log_probs(model, example))
    mean = float(torch.cat(losses).mean())
    assert mean == pytest.approx(curve(Tanren(once_tuned), "sft", "held_out_loss")[-1], rel=1e-5)
