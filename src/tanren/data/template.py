"""The folder of a chat tokenizer: what training tokenizes with, and what is exported for inference.

tokenizer.json           as it was, or made from the SentencePiece model
tokenizer_config.json    names PreTrainedTokenizerFast: nothing but tokenizer.json says the ids
chat_template.jinja      the model's own, or llm-jp's format
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import orjson

from tanren import runs
from tanren.config.errors import RequestError
from tanren.data import to_fast
from tanren.data import tokenizer as tokenizers

CHAT_TEMPLATE = "chat_template.jinja"
_CONFIG = "tokenizer_config.json"
# What the ids of a conversation depend on.
_FILES = ("tokenizer.json", _CONFIG, "special_tokens_map.json", "added_tokens.json", CHAT_TEMPLATE)

# The system's text stands as it is, or not at all; every answer ends with EOS.
LLMJP_INSTRUCT = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message['role'] == 'system' and loop.first -%}
        {{- message['content'] -}}
    {%- elif message['role'] == 'user' -%}
        {{- '\\n\\n### 指示:\\n' + message['content'] -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- '\\n\\n### 応答:\\n' + message['content'] + eos_token -}}
    {%- else -%}
        {{- raise_exception('a message of role ' + message['role'] + ' has no place here') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '\\n\\n### 応答:\\n' -}}
{%- endif -%}
"""


def prepare(source: Path, template: str, destination: Path, place: object) -> None:
    """Make the folder of a chat tokenizer; it appears when it is whole.

    Args:
        source: a Hugging Face folder, or a SentencePiece model.
        template: `llmjp-instruct`, or `model`: what the source brings.
        destination: the folder to make; one that is there is replaced.
        place: what a person would change: the recipe's template.
    Raises:
        RequestError: there is no such tokenizer, it lacks the template, or a token of it.
    """
    original = tokenizers.read(source)
    with runs.whole_folder(destination) as folder:
        tokenizers.copy(source, folder)
        for code in folder.glob("*.py"):
            code.unlink()
        config = _read_config(folder / _CONFIG)
        if not (folder / "tokenizer.json").is_file():
            config = _convert(original, folder, config)
        if template == "llmjp-instruct":
            (folder / CHAT_TEMPLATE).write_bytes(LLMJP_INSTRUCT.encode())
        elif not (folder / CHAT_TEMPLATE).is_file():
            (folder / CHAT_TEMPLATE).write_bytes(_stated_template(source, config).encode())
        # A class of its own may cut text in another way, here and there in versions of its library.
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        for key in ("auto_map", "chat_template"):
            config.pop(key, None)
        (folder / _CONFIG).write_bytes(orjson.dumps(config, option=orjson.OPT_INDENT_2))
        if original.bos is None and template == "llmjp-instruct":
            raise RequestError(
                place, f"llmjp-instruct begins with BOS, and the tokenizer {source} names none",
                "use template: model, or state bos_token in its tokenizer_config.json",
            )  # fmt: skip


def make_fast(folder: Path) -> None:
    """Give a folder that has a SentencePiece model alone a tokenizer.json, and its settings."""
    if (folder / "tokenizer.json").is_file() or not any(folder.glob("*.model")):
        return
    config = _convert(tokenizers.read(folder), folder, _read_config(folder / _CONFIG))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.pop("auto_map", None)
    (folder / _CONFIG).write_bytes(orjson.dumps(config, option=orjson.OPT_INDENT_2))


def digest(folder: Path) -> str:
    """SHA-256 of all that the ids of a conversation depend on."""
    result = hashlib.sha256()
    for name in _FILES:
        path = folder / name
        content = path.read_bytes() if path.is_file() else b""
        result.update(f"{name} {len(content)}\n".encode() + content)
    return result.hexdigest()


def _read_config(path: Path) -> dict[str, Any]:
    try:
        value = runs.read_json(path)
    except RequestError as error:
        raise RequestError(path, error.problem, "fetch the tokenizer again") from None
    if value is not None and not isinstance(value, dict):
        raise RequestError(path, "is not a JSON object", "fetch the tokenizer again")
    return value or {}


def _convert(
    original: tokenizers.Tokenizer, folder: Path, config: dict[str, Any]
) -> dict[str, Any]:
    """Write tokenizer.json beside a SentencePiece model; gives the settings that belong to it."""
    [model] = folder.glob("*.model")
    fast, config = to_fast.convert(model, config)
    fast.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / _CONFIG).write_bytes(orjson.dumps(config))
    try:
        made = tokenizers.read(folder)
    except RequestError as error:
        # What its settings name is not among its pieces.
        raise RequestError(original.folder / _CONFIG, error.problem, error.next_step) from None
    if (made.bos, made.eod) != (original.bos, original.eod) or not made.agrees_with(original):
        raise RequestError(
            original.folder,
            f"its tokenizer.json would not do what the SentencePiece model does (BOS {made.bos} "
            f"and {original.bos}, EOS {made.eod} and {original.eod})",
            "mend its tokenizer_config.json, or name a folder that has a tokenizer.json",
        )
    return config


def _stated_template(source: Path, config: dict[str, Any]) -> str:
    """The chat template that a tokenizer's settings state."""
    stated = config.get("chat_template")
    if isinstance(stated, list):
        # Several under names, of which inference takes this one.
        stated = {one["name"]: one["template"] for one in stated}.get("default")
    if isinstance(stated, str):
        return stated
    raise RequestError(
        source, "has no chat template, neither chat_template.jinja nor in tokenizer_config.json",
        "use template: llmjp-instruct, or name a tokenizer that has one",
    )  # fmt: skip
