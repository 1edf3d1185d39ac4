"""What a Hugging Face folder answers: `python -m tanren.stages.generate FOLDER PROMPT`.

Or `--file PROMPTS.jsonl --output ANSWERS.jsonl`: lines with a prompt or the messages of a chat, and
the same lines with answers, in their order.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson
import torch

from tanren import runs
from tanren.config.errors import RequestError, TanrenError

_FORM = 'write {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}'
Asked = str | list[dict[str, str]]


def generate(folder: Path, prompt: str, tokens: int, *, chat: bool, seed: int = 0) -> str:
    """The model's answer to a prompt, the same at every call.

    Args:
        folder: a model, or a PEFT folder beside its base.
        chat: ask by the folder's chat template; else the text goes on from the prompt.
    """
    ((text, answer),) = answers(folder, [prompt], tokens, chat=chat, seed=seed, batch=1)
    # Of a chat the answer alone; of a text all of it.
    return answer if chat else text


def answers(
    folder: Path, asked: Sequence[Asked], tokens: int, *, chat: bool, seed: int, batch: int
) -> Iterator[tuple[str, str]]:
    """Each prompt with what comes after it, and that alone, in their order.

    Prompts of a batch are padded on the left, so that each goes on at its own end. What one answers
    depends, through the random numbers, on the others of its batch.

    Args:
        asked: prompts, or lists of messages, which are always asked by the chat template.
        tokens: of each answer, at most.
        chat: ask prompts by the chat template, too.
        batch: how many at a time.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    pad = tokenizer.eos_token_id
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(where)
    transformers.set_seed(seed)
    for start in range(0, len(asked), batch):
        rows = [_ids(tokenizer, one, chat=chat) for one in asked[start : start + batch]]
        width = max(map(len, rows))
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=where)
        mask = torch.tensor(
            [[0] * (width - len(row)) + [1] * len(row) for row in rows], device=where
        )
        with torch.no_grad():
            result = model.generate(
                ids, max_new_tokens=tokens, do_sample=True, temperature=0.7, top_p=0.9,
                attention_mask=mask, pad_token_id=pad,
            )  # fmt: skip
        for row, given in zip(result, rows, strict=True):
            text = _text(tokenizer, row[width - len(given) :])
            # A tokenizer may leave the first space of an answer out where it has the answer alone.
            answer = text.removeprefix(_text(tokenizer, given))
            yield text, answer if not chat else _text(tokenizer, row[width:])


def _text(tokenizer: Any, ids: Any) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def _ids(tokenizer: Any, one: Asked, *, chat: bool) -> list[int]:
    if isinstance(one, str) and not chat:
        return list(tokenizer(one)["input_ids"])
    messages = [{"role": "user", "content": one}] if isinstance(one, str) else one
    filled = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True
    )  # fmt: skip
    return list(filled["input_ids"])


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of prompts, each checked.

    Raises:
        RequestError: with the file and the line.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RequestError(path, f"cannot be read: {error.strerror}", "check PROMPTS=") from None
    found = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise RequestError(f"{path}:{number}", f"is not JSON: {error}", _FORM) from None
        if not isinstance(value, dict) or not _is_asked(value):
            raise RequestError(f"{path}:{number}", "asks nothing that can be read", _FORM)
        found.append(value)
    if not found:
        raise RequestError(path, "holds no prompt", _FORM)
    return found


def _is_asked(value: dict[str, Any]) -> bool:
    if ("prompt" in value) == ("messages" in value):
        return False
    if "prompt" in value:
        return isinstance(value["prompt"], str) and value["prompt"] != ""
    messages = value["messages"]
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(
            isinstance(one, dict)
            and one.keys() == {"role", "content"}
            and all(isinstance(part, str) for part in one.values())
            for one in messages
        )
    )


def answer_file(
    folder: Path, file: Path, output: Path, tokens: int, *, chat: bool, seed: int, batch: int,
    watch: Callable[[int, int], None] = lambda done, of: None,
) -> int:  # fmt: skip
    """Answer a file of prompts; the answers' file appears when it is whole.

    Returns:
        how many there were.
    Raises:
        RequestError: a line cannot be read, or messages are asked of a model without a template.
    """
    lines = read_prompts(file)
    if any("messages" in line for line in lines) and not chat:
        raise RequestError(
            file, "asks by messages, and a midtrained model has no chat template",
            'write {"prompt": "..."}, or STAGE=sft',
        )  # fmt: skip
    asked = [line["messages"] if "messages" in line else line["prompt"] for line in lines]
    written = []
    for line, (_, answer) in zip(
        lines, answers(folder, asked, tokens, chat=chat, seed=seed, batch=batch), strict=True
    ):
        written.append(orjson.dumps({**line, "answer": answer}) + b"\n")
        watch(len(written), len(lines))
    runs.write_atomic(output, b"".join(written))
    return len(written)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="tanren generate")
    parser.add_argument("folder", type=Path)
    parser.add_argument("prompt", nargs="?")
    parser.add_argument("--file", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chat", action="store_true")
    given = parser.parse_args(arguments)
    if given.file is not None:
        try:
            answer_file(
                given.folder, given.file, given.output, given.tokens, chat=given.chat,
                seed=given.seed, batch=given.batch,
                watch=lambda done, of: print(f"{done} of {of}", file=sys.stderr),
            )  # fmt: skip
        except TanrenError as error:
            sys.stdout.buffer.write(orjson.dumps(error.as_dict()))
            return error.exit_code
        return 0
    text = generate(given.folder, given.prompt, given.tokens, chat=given.chat, seed=given.seed)
    sys.stdout.write(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
