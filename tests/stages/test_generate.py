"""Files of prompts: answered in order and in batches, each as if alone; bad lines are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tanren.config.errors import RequestError
from tanren.stages.generate import answer_file, answers, generate, read_prompts
from tests.conftest import RECIPES, Tanren
from tests.stages.test_bad_input import refused

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<answer>"
LINES: list[dict[str, Any]] = [
    {"prompt": "Sort 3, 2.", "id": 7},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]},
    {"prompt": "日本で一番高い山は?"},
    {"prompt": "a"},
    {"messages": [{"role": "user", "content": "Sort 3, 2."}]},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of bytes whose most likely token is nearly certain, so that sampling takes it."""
    folder = tmp_path_factory.mktemp("model")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = {letter: number for number, letter in enumerate(letters)} | {"</s>": 256}
    fast = Tokenizer(models.BPE(vocab=pieces, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=256, bos_token_id=256, eos_token_id=256,
    ))  # fmt: skip
    with torch.no_grad():
        made.lm_head.weight.mul_(10_000)
    made.save_pretrained(folder)
    return folder


def test_a_batch_answers_as_each_prompt_alone(model: Path, tmp_path: Path) -> None:
    """Of prompts of different lengths: padding is neither read nor counted as a position."""
    file, output = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in LINES) + "\n\n")
    seen: list[tuple[int, int]] = []
    count = answer_file(
        model, file, output, 6, chat=True, seed=0, batch=4,
        watch=lambda done, of: seen.append((done, of)),
    )  # fmt: skip
    assert count == 5
    assert seen == [(n, 5) for n in range(1, 6)]
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert [{k: v for k, v in line.items() if k != "answer"} for line in written] == LINES
    alone = []
    for line in LINES:
        asked = line.get("messages", line.get("prompt"))
        assert asked is not None
        ((_, answer),) = answers(model, [asked], 6, chat=True, seed=0, batch=1)
        alone.append(answer)
    assert [line["answer"] for line in written] == alone
    assert len(set(alone)) > 2, "one answer to everything would hide what is mixed up"
    # A prompt of a tuned model is what a person says.
    assert written[0]["answer"] == written[4]["answer"]
    assert written[0]["answer"] == generate(model, "Sort 3, 2.", 6, chat=True)


def test_a_text_goes_on_and_its_answer_is_what_was_added(model: Path) -> None:
    ((text, answer),) = answers(model, ["Sort 3"], 6, chat=False, seed=0, batch=1)
    assert text == "Sort 3" + answer
    assert answer
    assert generate(model, "Sort 3", 6, chat=False) == text


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "is not JSON"),
        ('["a"]', "asks nothing"),
        ('{"question": "a"}', "asks nothing"),
        ('{"prompt": ""}', "asks nothing"),
        ('{"prompt": "a", "messages": []}', "asks nothing"),
        ('{"messages": []}', "asks nothing"),
        ('{"messages": [{"role": "user", "content": 3}]}', "asks nothing"),
        ('{"messages": [{"role": "user"}]}', "asks nothing"),
    ],
)
def test_a_line_that_asks_nothing_is_named(tmp_path: Path, line: str, problem: str) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text(f'{{"prompt": "a"}}\n\n{line}\n')
    with pytest.raises(RequestError) as error:
        read_prompts(file)
    assert error.value.place == f"{file}:3"
    assert problem in error.value.problem
    assert '{"prompt": "..."}' in error.value.next_step


def test_an_empty_file_and_messages_to_a_midtrained_model(model: Path, tmp_path: Path) -> None:
    file, output = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    file.write_text("\n")
    with pytest.raises(RequestError, match="holds no prompt"):
        read_prompts(file)
    file.write_text(json.dumps(LINES[1]))
    with pytest.raises(RequestError, match="no chat template"):
        answer_file(model, file, output, 6, chat=False, seed=0, batch=4)
    assert not output.exists()


def test_the_command_writes_answers_beside_the_prompts(model: Path, tmp_path: Path) -> None:
    tanren = Tanren(tmp_path / "runs")
    hf = tanren.folder("sft") / "hf"
    hf.mkdir(parents=True)
    (hf / "iter_0000006").symlink_to(model)
    file = tmp_path / "q.jsonl"
    file.write_text(json.dumps(LINES[0]) + "\n" + json.dumps(LINES[1]) + "\n")
    words = ("generate", str(RECIPES / "sft.yaml"), "--tokens", "4")
    done = tanren(*words, "--prompts", str(file))
    assert done.code == 0, done.text
    assert done.out == f"answers: {tmp_path / 'q.answers.jsonl'}\n"
    lines = (tmp_path / "q.answers.jsonl").read_text().splitlines()
    assert [json.loads(line).keys() - {"answer"} for line in lines] == [
        {"prompt", "id"}, {"messages"}]  # fmt: skip
    file.write_text("{}\n")
    refused(tanren(*words, "--prompts", str(file)), 2, "q.jsonl:1", "asks nothing")
    refused(tanren(*words, "--prompts", str(tmp_path / "no.jsonl")), 2, "no.jsonl", "no such file")
    refused(tanren(*words), 2, "--prompt", "is empty")
    refused(tanren(*words, "--prompts", str(file), "--prompt", "a"), 2, "--prompt", "two things")
