"""Examples as they are trained on, answers, and what make exports."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import CHATS, RECIPES, REPOSITORY, Tanren
from tests.stages.test_bad_input import refused

# In a pipe what is trained on stands between ⟦ and ⟧.
SORT = "<s>You sort numbers.\n\n### 指示:\nSort 29, 60, 93, 16.\n\n### 応答:\n"
SHOWN = {
    "sft": (
        "questions.jsonl",
        [
            ("", f"{SORT}⟦16, 29, 60, 93.</s>⟧\n\n### 指示:\nWhich is the first?\n\n### 応答:\n"
             "⟦16.</s>⟧"),
            ("", "<s>\n\n### 指示:\nSort 78, 22.\n\n### 応答:\n⟦22, 78.</s>⟧"),
        ],
    ),
    "dpo": (
        "answers.jsonl",
        [
            (" chosen", f"{SORT}⟦16, 29, 60, 93.</s>⟧"),
            (" rejected", f"{SORT}⟦It depends o</s>⟧"),
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("stage", SHOWN)
def test_examples_are_shown_as_they_are_trained_on(once_tuned: Path, stage: str) -> None:
    name, expected = SHOWN[stage]
    n = str(len(expected) if stage == "sft" else 1)
    sets = (f"datasets=[{{name: mine, path: {CHATS / name}}}]",)
    done = Tanren(once_tuned)("show", stage, "tiny", "--n", n, sets=sets)
    assert (done.code, done.err) == (0, ""), done.text
    title = re.compile(rf"^\S*{name}:(\d+)( chosen| rejected)?  (\d+) tokens, (\d+) trained\n",
                       re.MULTILINE)  # fmt: skip
    start, *parts = title.split(done.out)
    assert start == ""
    assert len(parts) == 5 * len(expected)
    for number, (side, text) in enumerate(expected):
        line, said, tokens, trained, shown = parts[5 * number : 5 * number + 5]
        assert (int(line), said or "") == (number + 1 if stage == "sft" else 1, side)
        assert shown == f"{text}\n"
        assert 0 < int(trained) < int(tokens) < len(text)


def test_what_cannot_be_shown_is_said_as_a_stage_would(once_tuned: Path) -> None:
    sets = (f"datasets=[{{name: mine, path: {CHATS}/answers.jsonl}}]",)
    done = Tanren(once_tuned)("show", "sft", "tiny", sets=sets)
    refused(done, 2, "answers.jsonl:1", "is a preference (chosen and rejected), and sft reads")
    done = Tanren(once_tuned)("show", "midtrain", "tiny")
    refused(done, 2, "show midtrain", "shows no conversations")


def test_an_export_answers_and_what_has_none_names_its_command(once_tuned: Path) -> None:
    tanren, words = Tanren(once_tuned), ("--prompt", "Sort 3, 2.", "--tokens", "12")
    done = tanren("generate", str(RECIPES / "sft.yaml"), *words)
    assert (done.code, done.err) == (0, ""), done.text
    assert done.out.strip()
    assert "###" not in done.out, "the answer alone"
    done = tanren("generate", str(RECIPES / "dpo.yaml"), *words, "--name", "b")
    err = refused(done, 2, "dpo-b/hf", "holds no export")
    assert "next: make export TASK=tiny STAGE=dpo NAME=b" in err
    done = tanren("generate", str(RECIPES / "sft.yaml"), *words, "--name", "b")
    refused(done, 2, "sft-b/hf", "holds no export; sft has one")


@pytest.mark.parametrize(
    ("stage", "of"), [("midtrain", []), ("sft", ["--set", "of=stage:sft"]),
                      ("dpo", ["--set", "of=stage:dpo"])]
)  # fmt: skip
def test_make_export_takes_the_stage(stage: str, of: list[str]) -> None:
    done = subprocess.run(
        ["make", "-n", "export", f"STAGE={stage}"], cwd=REPOSITORY, capture_output=True,
        env={"PATH": os.environ["PATH"]}, text=True, check=True,
    )  # fmt: skip
    [command] = re.findall(r"bin/tanren .*", done.stdout)
    words = command.replace("'", "").split()
    assert words == ["bin/tanren", "export", "recipes/tiny/export.yaml", *of, "--needs"]


def test_exports_of_two_stages_do_not_collide(once_tuned: Path) -> None:
    tanren = Tanren(once_tuned)
    folders = {"midtrain": "export", "sft": "export.sft", "dpo": "export.dpo"}
    for stage, folder in folders.items():
        done = tanren("plan", str(RECIPES / "export.yaml"), sets=(f"of=stage:{stage}",))
        assert done.code == 0, done.text
        assert f"tiny/{folder}\n" in done.out.splitlines(keepends=True)[0]
    assert "done" in tanren("plan", str(RECIPES / "export.yaml"), sets=("of=stage:sft",)).out
    assert not tanren.folder("export").exists()
    assert tanren.folder("export.sft").exists()
