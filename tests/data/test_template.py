"""The folder of a chat tokenizer: whole, with its template, and loaded without anyone's code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest

from tanren.config.errors import RequestError
from tanren.data import template
from tanren.data import tokenizer as tokenizers
from tests.data.chat_folders import CHATML, write_source

PLACE = "sft.yaml: template"
INSTRUCT = "llmjp-instruct"


def prepare(tmp_path: Path, source: Path, name: str = "model") -> Path:
    template.prepare(source, name, tmp_path / "chat", PLACE)
    return tmp_path / "chat"


def refusal(tmp_path: Path, source: Path, name: str = "model") -> RequestError:
    with pytest.raises(RequestError) as caught:
        prepare(tmp_path, source, name)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("chat")] == []
    assert "partial" not in caught.value.place
    return caught.value


def load(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def config_of(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = orjson.loads((folder / "tokenizer_config.json").read_bytes())
    return value


@pytest.mark.parametrize("kind", ["byte level", "pieces"])
def test_inference_loads_it_without_code_of_others(tmp_path: Path, kind: str) -> None:
    source = write_source(
        tmp_path / "source", kind, auto_map={"AutoTokenizer": ["my_tokenizer.Mine", None]},
        tokenizer_class="Mine", chat_template=CHATML,
    )  # fmt: skip
    (source / "my_tokenizer.py").write_text("raise SystemExit('it was run')")
    (source / "model.safetensors").write_text("weights")
    made = prepare(tmp_path, source, INSTRUCT)
    theirs = load(made)
    ours, original = tokenizers.read(made), tokenizers.read(source)
    assert len(theirs) == ours.size == original.size
    assert (theirs.bos_token_id, theirs.eos_token_id) == (original.bos, original.eod)
    said = [{"role": "system", "content": "S "}, {"role": "user", "content": "u"}]
    text = theirs.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    assert text == "<s>S \n\n### 指示:\nu\n\n### 応答:\n"
    said.append({"role": "assistant", "content": "a"})
    text = theirs.apply_chat_template(said, tokenize=False)
    assert text == "<s>S \n\n### 指示:\nu\n\n### 応答:\na</s>"
    expected = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    expected |= {"tokenizer.model"} if kind == "pieces" else set()
    assert {path.name for path in made.iterdir()} == expected
    assert config_of(made)["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "auto_map" not in config_of(made)
    assert "chat_template" not in config_of(made), "it is said in one place"
    if kind == "byte level":
        assert (made / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_a_sentencepiece_file_alone_is_enough(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", "pieces")
    (source / "tokenizer_config.json").unlink()
    made = prepare(tmp_path, source / "tokenizer.model", INSTRUCT)
    assert {path.name for path in made.iterdir()} == {
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "tokenizer.model"
    }  # fmt: skip
    theirs = load(made)
    assert (theirs.bos_token, theirs.eos_token, theirs.unk_token) == ("<s>", "</s>", "<unk>")
    assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)
    text = "I fold it.\n\n鍛錬"
    original = tokenizers.read(source / "tokenizer.model")
    assert theirs.encode(text, add_special_tokens=False) == original.encode([text])[0].tolist()
    assert theirs.decode(theirs.encode(text, add_special_tokens=False)) == text


def test_the_models_own_template_is_taken_as_it_is(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": CHATML}]
    for number, (stated, file, expected) in enumerate((
        (CHATML, None, CHATML),
        (named, None, CHATML),
        (None, "{{ 'file' }}\r\n", "{{ 'file' }}\r\n"),
        (CHATML, "{{ 'file' }}\r\n", "{{ 'file' }}\r\n"),
    )):  # fmt: skip
        source = write_source(tmp_path / f"{number}", "byte level", chat_template=stated)
        if file is not None:
            (source / "chat_template.jinja").write_bytes(file.encode())
        made = prepare(tmp_path, source)
        assert (made / "chat_template.jinja").read_bytes().decode() == expected


def test_a_template_that_the_tokenizer_lacks_is_said(tmp_path: Path) -> None:
    for number, stated in enumerate((None, [{"name": "tool_use", "template": "T"}])):
        source = write_source(tmp_path / f"{number}", "byte level", chat_template=stated)
        error = refusal(tmp_path, source)
        assert error.place == str(source)
        assert error.problem.startswith("has no chat template")
        assert "template: llmjp-instruct" in error.next_step


def test_llmjps_form_needs_a_bos(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", "byte level", bos_token=None, chat_template=CHATML)
    error = refusal(tmp_path, source, INSTRUCT)
    assert (error.place, "names none" in error.problem) == (PLACE, True)
    assert (prepare(tmp_path, source) / "chat_template.jinja").exists()


def test_a_broken_tokenizer_is_named_where_it_is(tmp_path: Path) -> None:
    assert "there is no such file" in refusal(tmp_path, tmp_path / "no.model").problem
    assert refusal(tmp_path, tmp_path / "nowhere").place == str(tmp_path / "nowhere")
    source = write_source(tmp_path / "source", "pieces", eos_token="<|return|>")
    error = refusal(tmp_path, source, INSTRUCT)
    assert error.place == str(source / "tokenizer_config.json")
    assert "'<|return|>' is not in the vocabulary" in error.problem
    source = write_source(tmp_path / "other", "pieces", eos_token="<|eot|>")
    error = refusal(tmp_path, source, INSTRUCT)
    assert error.place == str(source)
    assert "EOS 6 and 2" in error.problem
    source = write_source(tmp_path / "third", "byte level")
    (source / "tokenizer_config.json").write_text("[]")
    assert "is not a JSON object" in refusal(tmp_path, source, INSTRUCT).problem


def test_the_digest_is_of_all_that_ids_depend_on(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", "byte level", chat_template=CHATML)
    first = template.digest(prepare(tmp_path, source))
    assert template.digest(prepare(tmp_path, source)) == first
    found = {first, template.digest(prepare(tmp_path, source, INSTRUCT))}
    (source / "chat_template.jinja").write_text(CHATML + " ")
    found.add(template.digest(prepare(tmp_path, source)))
    config = config_of(source)
    (source / "tokenizer_config.json").write_bytes(orjson.dumps({**config, "eos_token": "<s>"}))
    found.add(template.digest(prepare(tmp_path, source)))
    whole = (source / "tokenizer.json").read_bytes()
    (source / "tokenizer.json").write_bytes(whole + b"\n")
    found.add(template.digest(prepare(tmp_path, source)))
    assert len(found) == 5
