"""The program of a submission: what it reads, what it asks a model, what it leaves."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers

from tests.conftest import REPOSITORY

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def program() -> ModuleType:
    before = os.environ.get("HF_HUB_OFFLINE")
    path = REPOSITORY / "containers" / "answer.py"
    spec = importlib.util.spec_from_file_location("answer", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["answer"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    assert os.environ.pop("HF_HUB_OFFLINE") == "1"
    if before is not None:
        os.environ["HF_HUB_OFFLINE"] = before
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 60 thousand parameters over bytes, 96 positions."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({"</s>": 0, **{c: n for n, c in enumerate(alphabet, 1)}}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=96, eos_token_id=0, bos_token_id=0,
        initializer_range=0.4,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write(path: Path, *lines: object) -> Path:
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(text) + "\n")
    return path


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def user(text: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": text}]}


@pytest.fixture
def run(program: ModuleType, model: Path, tmp_path: Path) -> Callable[..., tuple[int, list]]:
    def call(*lines: object, options: tuple[str, ...] = ()) -> tuple[int, list]:
        source, out = write(tmp_path / "in.jsonl", *lines), tmp_path / "out.jsonl"
        code = program.main(["--model_path", str(model), "--input_path", str(source),
                             "--output_path", str(out), "--max_tokens", "12",
                             *options])  # fmt: skip
        return code, read(out) if out.exists() else []

    return call


def test_each_line_has_its_answer_and_keeps_what_it_had(
    run: Callable[..., tuple[int, list]],
) -> None:
    lines = [{"id": 7, "problem": "1+1は?", "unit": "和"}, user("and a longer question"),
             {"prompt": "go on"}, {"prompt": [{"role": "user", "content": "x"}]}]  # fmt: skip
    code, found = run(*lines)
    assert code == 0
    assert [{k: v for k, v in one.items() if k != "output"} for one in found] == lines
    assert all(one["output"] for one in found)
    assert len({one["output"] for one in found}) == 4


def test_an_answer_does_not_depend_on_its_batch(run: Callable[..., tuple[int, list]]) -> None:
    """Padding on the left is masked, and positions begin behind it."""
    lines = [user("a" * length) for length in (1, 30, 7, 52, 16)]
    _, alone = run(*lines, options=("--batch_size", "1"))
    _, together = run(*lines, options=("--batch_size", "5"))
    assert [one["output"] for one in alone] == [one["output"] for one in together]
    assert len(alone) == 5


def test_the_likeliest_tokens_are_those_of_transformers(
    run: Callable[..., tuple[int, list]], model: Path
) -> None:
    _, (found,) = run(user("what?"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    ids = tokenizer("<user>what?<assistant>", return_tensors="pt").input_ids
    llama = transformers.AutoModelForCausalLM.from_pretrained(model)
    for _ in range(12):
        ids = torch.cat([ids, llama(ids).logits[:, -1:].argmax(-1)], 1)
        assert ids[0, -1] != 0, "this model ends at once: take another seed"
    assert found["output"] == tokenizer.decode(ids[0, -12:])


def test_a_temperature_draws_by_the_seed(run: Callable[..., tuple[int, list]]) -> None:
    def outputs(*options: str) -> list[object]:
        return [one["output"] for one in run(user("a"), user("bc"), options=options)[1]]

    hot = ("--temperature", "2.0")
    assert outputs(*hot) == outputs(*hot)
    assert outputs(*hot) != outputs()
    assert outputs(*hot) != outputs(*hot, "--seed", "1")


def test_a_wrong_line_is_named_and_the_others_are_answered(
    run: Callable[..., tuple[int, list]], capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = run(
        "{half", user("a"), "", [1], {"id": 1}, user("long " * 30), {"prompt": 3},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "assistant", "content": "I am done"}]},
    )  # fmt: skip
    assert code == 1
    errors = [one.get("error", "") for one in found]
    assert len(errors) == 8  # the empty line is none
    assert errors[1] == ""
    assert found[1]["output"]
    for error, start in zip(
        [errors[0], *errors[2:]],
        ("is not JSON: ", "is not an object but list", "has neither messages nor a prompt nor",
         "has 167 tokens, and the model 96 positions", "its prompt is no text",
         "its messages are no list of objects", "its last message is the assistant's"),
        strict=True,
    ):  # fmt: skip
        assert error.startswith(start), error
    said = capsys.readouterr().err
    assert "in.jsonl:1: is not JSON" in said
    assert "in.jsonl:4: is not an object" in said  # counted with the empty line
    assert "in.jsonl:9: its last message" in said


def test_an_answer_ends_at_the_models_positions(run: Callable[..., tuple[int, list]]) -> None:
    """And a short question in the same batch has all of its tokens."""
    long = "a" * (96 - len("<user><assistant>") - 5)
    _, (first, second) = run(user(long), user("b"))
    _, (_, alone) = run(user(long), user("b"), options=("--batch_size", "1"))
    assert second["output"] == alone["output"]
    _, (whole,) = run(user("b"))
    assert second["output"] == whole["output"]
    assert 0 < len(first["output"].encode()) <= 5 * 3


def test_a_problem_is_asked_as_the_image_was_built_to(
    run: Callable[..., tuple[int, list]], program: ModuleType, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    settings = tmp_path / "answer.json"
    settings.write_text(json.dumps({"question": "Q: {problem} {x}", "max_tokens": 3}))
    monkeypatch.setattr(program, "SETTINGS", settings)
    options = program.parse(["--check"])
    assert (options.question, options.max_tokens, options.temperature) == ("Q: {problem} {x}", 3, 0)
    assert program.parse(["--check", "--max_tokens", "9"]).max_tokens == 9
    _, (asked,) = run({"problem": "1+1"})
    _, (said,) = run(user("Q: 1+1 {x}"))
    assert asked["output"] == said["output"]


def test_less_memory_makes_smaller_batches(program: ModuleType) -> None:
    class Tokenizer:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return "".join(map(chr, ids))

    sizes: list[int] = []

    def generate(prompts: list[list[int]], limits: list[int]) -> list[list[int]]:
        sizes.append(len(prompts))
        if sum(map(len, prompts)) > 8:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")
        assert limits == [min(4, 20 - len(p)) for p in prompts]
        return [[ord("a") + len(p)] for p in prompts]

    lines = [program.Line(n, {}, ids=[1] * n) for n in (2, 9, 3, 1, 4)]
    program.answer(lines, Tokenizer(), generate, 4, 4, 20)
    assert [line.output for line in lines] == ["c", "", "d", "b", "e"]
    assert lines[1].error == "does not fit into memory (9 tokens)"
    assert sizes == [4, 2, 1, 1, 1, 1, 1]

    def broken(prompts: list[list[int]], limits: list[int]) -> list[list[int]]:
        raise RuntimeError("another trouble")

    with pytest.raises(RuntimeError, match="another trouble"):
        program.answer(lines, Tokenizer(), broken, 4, 4, 20)


def test_what_cannot_begin_says_why_and_leaves_the_output_before(
    program: ModuleType, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    source, out = write(tmp_path / "in.jsonl", user("a")), write(tmp_path / "out.jsonl", "before")
    (tmp_path / "empty.jsonl").write_text("\n\n")

    def call(source: Path = source, out: Path = out, model: Path = model) -> str:
        words = ["--model_path", str(model), "--input_path", str(source), "--output_path", str(out)]
        assert program.main(words) == 2
        return capsys.readouterr().err

    assert "absent.jsonl: No such file" in call(source=tmp_path / "absent.jsonl")
    assert "empty.jsonl: has no lines" in call(source=tmp_path / "empty.jsonl")
    assert "cannot be written: No such file" in call(out=tmp_path / "no" / "out.jsonl")
    assert "is the input, too" in call(out=source)
    assert "holds no model" in call(model=tmp_path)
    monkeypatch.setattr(program, "encode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call()
    assert out.read_text() == "before\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty.jsonl", "in.jsonl", "out.jsonl"]
    for words in ([], ["--check", "--max_tokens", "0"], ["--check", "--question", "no place"]):
        with pytest.raises(SystemExit):
            program.parse(words)


def test_a_check_reads_the_weights_and_asks_the_model(
    program: ModuleType, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert program.main(["--check", "--model_path", str(model)]) == 0
    assert "asked '1+1', it answers '" in capsys.readouterr().out
    monkeypatch.setattr(program, "SMALL_GIB", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert program.main(["--check", "--model_path", str(model)]) == 0
    assert "the model was not asked anything" in capsys.readouterr().out
    assert program.main(["--check", "--model_path", str(tmp_path)]) == 2
    assert "holds no weights" in capsys.readouterr().err
    (tmp_path / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "", "model.absent": ""}}))
    assert program.main(["--check", "--model_path", str(tmp_path)]) == 2
    assert "lacks 1 tensors, model.absent the first" in capsys.readouterr().err
