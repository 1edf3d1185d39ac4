"""Low-rank adapters from sft to dpo: small checkpoints, merged or not, a base like any other."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch

from tanren.plan.paths import RunFolder
from tests.conftest import RECIPES, Tanren
from tests.stages.compared import assert_same_run, choice_of, curve, log_probs, weights
from tests.stages.conftest import beside
from tests.stages.warm import Server, Warm

pytestmark = pytest.mark.long

BELOW = ("preprocess", "convert", "midtrain")
SIDES = ("chosen", "rejected")
LORA = ("lora={rank: 4, dropout: 0.1}", "optimizer.lr=1.0e-2", "optimizer.min_lr=1.0e-3")


@pytest.fixture(scope="module")
def adapted(once_tuned: Path, server: Server, tmp_path_factory: pytest.TempPathFactory) -> Warm:
    """An sft by adapters, its export merged and in PEFT's form, and a dpo of it."""
    root = tmp_path_factory.mktemp("adapted") / "runs"
    warm = beside(once_tuned, server, root, *BELOW)
    done = warm.sft(sets=LORA)
    assert done.code == 0, done.text
    exported = warm.folder("sft") / "hf" / "iter_0000006"
    for kind in ("peft", "merged"):
        sets = ("of=stage:sft", "dtype=fp32", f"adapters={kind}")
        done = warm("export", str(RECIPES / "export.yaml"), sets=sets)
        assert done.code == 0, done.text
        shutil.copytree(exported, root / kind)
    done = warm.dpo(sets=("checkpoints.every_steps=9",))
    assert done.code == 0, done.text
    return warm


def test_a_checkpoint_holds_the_adapters_alone(adapted: Warm, once_tuned: Path) -> None:
    folder = RunFolder(adapted.folder("sft"))
    names = weights(folder.checkpoint(6))
    trained = {name for name in names if not name.startswith(("optimizer", "rng_state"))}
    assert len(trained) == 8
    assert all(".adapter.linear_" in name for name in names if "decoder" in name)
    sizes = [
        sum(path.stat().st_size for path in one.checkpoint(6).iterdir())
        for one in (folder, RunFolder(Tanren(once_tuned).folder("sft")))
    ]
    assert sizes[0] < sizes[1] / 20
    losses = curve(adapted, "sft", "loss")
    assert losses[0] == pytest.approx(curve(Tanren(once_tuned), "sft", "loss")[0], rel=1e-6)
    assert losses[-1] < losses[0] - 0.3


def test_peft_loads_what_is_not_merged_and_both_say_the_same(adapted: Warm) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = adapted.runs / "peft"
    assert {path.name for path in folder.iterdir()} >= {
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja",
    }  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(adapted.folder("sft") / "hf" / "base")
    tokens = torch.arange(5, 70)[None]
    with torch.no_grad():
        bare = base(tokens).logits
        beside = PeftModel.from_pretrained(base, folder)(tokens).logits
        merged = AutoModelForCausalLM.from_pretrained(adapted.runs / "merged")(tokens).logits
    torch.testing.assert_close(beside, merged, rtol=1e-4, atol=1e-5)
    assert float((merged - bare).abs().max()) > 0.1
    for name in ("peft", "merged"):
        tokenizer = AutoTokenizer.from_pretrained(adapted.runs / name)
        asked = [{"role": "user", "content": "Sort 3, 2."}]
        text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        assert text == "<s>\n\n### 指示:\nSort 3, 2.\n\n### 応答:\n"


def held_out(tanren: Tanren, model: Path) -> list[float]:
    """By transformers: the mean log-probabilities of chosen and rejected dev answers."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model)
    choice = choice_of(tanren, "dpo")
    assert len(choice.dev) == 8
    found = [
        [float(log_probs(loaded, one).sum()) for one in choice.examples(0, sample)]
        for sample in choice.dev[:, 1].tolist()
    ]
    return [sum(side) / 8 for side in zip(*found, strict=True)]


def test_dpo_begins_from_the_adapters_as_from_the_merged_model(adapted: Warm) -> None:
    assert curve(adapted, "dpo", "loss")[0] == pytest.approx(math.log(2), abs=1e-3)
    began = [curve(adapted, "dpo", f"held_out_{side}_log_prob")[0] for side in SIDES]
    assert held_out(adapted, adapted.runs / "merged") == pytest.approx(began, rel=1e-5)
    log = (adapted.folder("dpo") / "log" / "1.log").read_text()
    assert f"with the adapters of {adapted.folder('sft')}/checkpoints/iter_0000006" in log


def test_dpo_of_adapters_is_the_same_in_two_processes(
    adapted: Warm, server: Server, tmp_path: Path
) -> None:
    warm = beside(adapted.runs, server, tmp_path / "runs", *BELOW, "sft")
    done = warm.dpo(sets=("layout.tensor=2", "checkpoints.every_steps=9"))
    assert done.code == 0, done.text
    for key in ("loss", "held_out_loss", "held_out_chosen_log_prob", "grad_norm"):
        mine, theirs = curve(warm, "dpo", key), curve(adapted, "dpo", key)
        assert len(mine) == len(theirs) >= 3
        assert mine == pytest.approx(theirs, rel=2e-5), key


def test_a_stop_after_any_step_and_the_same_command_goes_on(
    adapted: Warm, once_tuned: Path, server: Server, tmp_path: Path
) -> None:
    """What dropout drops is what it would have dropped."""
    warm = beside(once_tuned, server, tmp_path / "runs", *BELOW)
    warm.environment["TANREN_DEADLINE"] = "1"  # long ago: each attempt stops after a step
    for step in (1, 2):
        stopped = warm.sft(sets=LORA)
        assert stopped.code == 75, stopped.text
        assert f"after step {step}, saved" in stopped.err
    del warm.environment["TANREN_DEADLINE"]
    done = warm.sft(sets=LORA)
    assert done.code == 0, done.text
    assert_same_run(warm, adapted, "sft", 6)


def test_adapters_upon_adapters(adapted: Warm, server: Server, tmp_path: Path) -> None:
    """dpo by adapters of what sft did by adapters, interrupted, in two processes, exported."""
    warm = beside(adapted.runs, server, tmp_path / "runs", *BELOW, "sft")
    sets = (*LORA, "lora={rank: 2, targets: [attention]}")
    warm.environment["TANREN_DEADLINE"] = "1"
    # It stops within the reference, and after a step.
    for layout in ("layout.tensor=2", "layout.data=2", "layout.pipeline=2"):
        stopped = warm.dpo(sets=(*sets, layout))
        assert stopped.code == 75, stopped.text
    del warm.environment["TANREN_DEADLINE"]
    done = warm.dpo(sets=sets)
    assert done.code == 0, done.text
    losses = curve(warm, "dpo", "loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-3)
    assert losses[-1] < losses[0] - 0.05
    began = curve(adapted, "dpo", "held_out_chosen_log_prob")[0]
    assert curve(warm, "dpo", "held_out_chosen_log_prob")[0] == pytest.approx(began, rel=1e-5)

    done = warm("export", str(RECIPES / "export.yaml"), sets=("of=stage:dpo", "dtype=fp32"))
    assert done.code == 0, done.text
    ended = [curve(warm, "dpo", f"held_out_{side}_log_prob")[-1] for side in SIDES]
    model = warm.folder("dpo") / "hf" / "iter_0000006"
    assert held_out(warm, model) == pytest.approx(ended, rel=1e-5)
    assert ended[0] != pytest.approx(began, rel=1e-3)
