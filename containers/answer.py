#!/usr/bin/env python3
"""The program of a submission image: questions in, answers out, without a network.

    apptainer run --nv IMAGE.sif --input_path questions.jsonl --output_path answers.jsonl

A line of the input is an object with `messages` (a conversation that ends with a question),
`prompt` (a text to go on from) or `problem` (a question, as the tuning competition has it). A line
of the output is the same object with `output`, and with `error` where it could not be answered. The
output appears when it is whole. Exit codes: 0 all lines answered, 1 some have an error, 2 nothing
was done.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported, whatever the host has set

# What the image was built with: the options below that are not given.
SETTINGS = Path(__file__).with_name("answer.json")
MODEL = Path("/model")
# The weights that a check without a GPU answers a question with.
SMALL_GIB = 2
SHOWN_ERRORS = 10

# Token ids of prompts, and how many tokens each may get → token ids of answers.
Generate = Callable[[list[list[int]], list[int]], list[list[int]]]


@dataclass
class Line:
    """A line of the input, counted from 1, and what became of it."""

    number: int
    fields: dict[str, Any]
    error: str = ""
    output: str = ""
    ids: list[int] = field(default_factory=list)

    def as_json(self) -> str:
        said = {"error": self.error} if self.error else {}
        return json.dumps({**self.fields, "output": self.output, **said}, ensure_ascii=False)


class RefusedError(Exception):
    """Nothing can be done: exit code 2."""


def main(words: list[str] | None = None) -> int:
    try:
        options = parse(words)
        if options.check:
            return check(options)
        return answer_file(options)
    except RefusedError as problem:
        print(f"answer.py: {problem}", file=sys.stderr)
        return 2


def parse(words: list[str] | None) -> argparse.Namespace:
    built = json.loads(SETTINGS.read_text()) if SETTINGS.exists() else {}
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--model_path", type=Path, default=MODEL)
    parser.add_argument("--input_path", type=Path)
    parser.add_argument("--output_path", type=Path)
    parser.add_argument("--max_tokens", type=int, default=1024, help="of an answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token")
    parser.add_argument("--seed", type=int, default=0, help="of answers with a temperature")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--question", default="{problem}", help="how a `problem` is asked")
    parser.add_argument("--check", action="store_true", help="whether the model here is whole")
    parser.set_defaults(**built)
    options = parser.parse_args(words)
    if not options.check and not (options.input_path and options.output_path):
        parser.error("--input_path and --output_path are needed")
    if options.max_tokens < 1 or options.batch_size < 1 or options.temperature < 0:
        parser.error("--max_tokens and --batch_size are 1 or more, --temperature 0 or more")
    if "{problem}" not in options.question:
        parser.error("--question has no {problem} in it")
    return options


def answer_file(options: argparse.Namespace) -> int:
    lines = read_lines(options.input_path)
    partial = open_output(options.output_path, options.input_path)
    try:
        tokenizer, positions, generate = load(options)
        encode(lines, tokenizer, options.question, positions)
        answer(lines, tokenizer, generate, options.max_tokens, options.batch_size, positions)
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(line.as_json() + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, options.output_path)
    finally:
        partial.unlink(missing_ok=True)
    return report(lines, options)


def read_lines(path: Path) -> list[Line]:
    """The lines of a file; one that is no object has its error, and an empty one is none."""
    try:
        text = path.read_bytes()
    except OSError as problem:
        raise RefusedError(f"{path}: {problem.strerror}") from None
    lines = []
    for number, raw in enumerate(text.split(b"\n"), 1):
        if not raw.strip():
            continue
        try:
            value = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
        except ValueError as problem:
            lines.append(Line(number, {}, f"is not JSON: {problem}"))
            continue
        if isinstance(value, dict):
            lines.append(Line(number, value))
        else:
            lines.append(Line(number, {}, f"is not an object but {type(value).__name__}"))
    if not lines:
        raise RefusedError(f"{path}: has no lines")
    return lines


def open_output(path: Path, source: Path) -> Path:
    """The file that becomes the output; whether it can be written is known before the work."""
    if path.exists() and path.samefile(source):
        raise RefusedError(f"{path}: is the input, too")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.touch()
    except OSError as problem:
        raise RefusedError(f"{path}: cannot be written: {problem.strerror}") from None
    return partial


def load(options: argparse.Namespace) -> tuple[Any, int, Generate]:
    """The tokenizer, how many positions the model has, and the model as a function."""
    import torch
    import transformers

    folder = options.model_path
    if not (folder / "config.json").exists():
        raise RefusedError(f"{folder}: holds no model (config.json)")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(device)
    torch.manual_seed(options.seed)
    return (
        tokenizer,
        model.config.max_position_embeddings,
        lambda prompts, limits: generate(model, prompts, limits, options.temperature),
    )


def generate(
    model: Any, prompts: list[list[int]], limits: list[int], temperature: float
) -> list[list[int]]:
    """The answers to prompts of one batch, without what follows their end."""
    import torch

    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
    width = max(map(len, prompts))
    # Padded on the left, and masked: an answer then begins at the same place in every row.
    padding = min(ends, default=0)
    ids = torch.tensor([[padding] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
        if temperature
        else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    )
    with torch.inference_mode():
        result = model.generate(
            ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=max(limits),
            pad_token_id=padding, **sampling,
        )  # fmt: skip
    answers = []
    for row, limit in zip(result[:, width:].tolist(), limits, strict=True):
        end = next((place for place, token in enumerate(row) if token in ends), len(row))
        answers.append(row[: min(end, limit)])
    return answers


def encode(lines: Sequence[Line], tokenizer: Any, question: str, positions: int) -> None:
    """The token ids of each line's question; a line without one gets its error."""
    for line in lines:
        if line.error:
            continue
        try:
            line.ids = tokens_of(line.fields, tokenizer, question)
        except Exception as problem:  # a chat template may raise anything
            line.error = str(problem) or type(problem).__name__
            continue
        if len(line.ids) >= positions:
            line.error = f"has {len(line.ids):,} tokens, and the model {positions:,} positions"


def tokens_of(fields: dict[str, Any], tokenizer: Any, question: str) -> list[int]:
    """What the model reads of a line.

    Raises:
        ValueError: the line asks nothing.
    """
    messages, text = fields.get("messages"), fields.get("prompt")
    if messages is None and isinstance(text, list):
        messages, text = text, None
    if messages is None and text is None:
        problem = fields.get("problem")
        if not isinstance(problem, str) or not problem:
            raise ValueError("has neither messages nor a prompt nor a problem")
        text = question.replace("{problem}", problem)
        if tokenizer.chat_template:
            messages = [{"role": "user", "content": text}]
    if messages is None:
        if not isinstance(text, str) or not text:
            raise ValueError("its prompt is no text")
        return list(tokenizer(text)["input_ids"])
    if not tokenizer.chat_template:
        raise ValueError("has messages, and the model has no chat template")
    whole = isinstance(messages, list) and all(
        isinstance(one, dict) and isinstance(one.get("role"), str)
        and isinstance(one.get("content"), str) for one in messages
    )  # fmt: skip
    if not messages or not whole:
        raise ValueError("its messages are no list of objects with role and content")
    if messages[-1]["role"] == "assistant":
        raise ValueError("its last message is the assistant's: there is nothing to answer")
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return list(asked["input_ids"])


def answer(
    lines: Sequence[Line], tokenizer: Any, generate: Generate, max_tokens: int, batch_size: int,
    positions: int,
) -> None:  # fmt: skip
    """Answer every line that has a question, the longest first: what memory allows shows early."""
    waiting = sorted((line for line in lines if not line.error), key=lambda line: -len(line.ids))
    asked, done, began = len(waiting), 0, 0
    while began < asked:
        batch = waiting[began : began + batch_size]
        limits = [min(max_tokens, positions - len(line.ids)) for line in batch]
        try:
            answers = generate([line.ids for line in batch], limits)
        except RuntimeError as problem:  # CUDA's out of memory is one
            if "out of memory" not in str(problem):
                raise
            empty_cache()
            if len(batch) > 1:
                batch_size = len(batch) // 2
                print(f"answer.py: out of memory; batches of {batch_size} now", file=sys.stderr)
                continue
            batch[0].error = f"does not fit into memory ({len(batch[0].ids):,} tokens)"
        else:
            for line, ids in zip(batch, answers, strict=True):
                line.output = tokenizer.decode(ids, skip_special_tokens=True)
                done += 1
        began += len(batch)
        print(f"answer.py: {done:,} of {asked:,} answered", file=sys.stderr)


def empty_cache() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def report(lines: Sequence[Line], options: argparse.Namespace) -> int:
    wrong = [line for line in lines if line.error]
    for line in wrong[:SHOWN_ERRORS]:
        print(f"answer.py: {options.input_path}:{line.number}: {line.error}", file=sys.stderr)
    if len(wrong) > SHOWN_ERRORS:
        print(f"answer.py: ... and {len(wrong) - SHOWN_ERRORS:,} more lines", file=sys.stderr)
    print(f"{len(lines) - len(wrong):,} of {len(lines):,} lines answered: {options.output_path}")
    return 1 if wrong else 0


def check(options: argparse.Namespace) -> int:
    """Whether the model is whole, and, where it is small or a GPU is here, whether it answers."""
    import torch
    from safetensors import safe_open

    folder = options.model_path
    files = sorted(folder.glob("*.safetensors"))
    held = set()
    for file in files:
        # A file that was cut off fails here.
        with safe_open(file, "pt") as tensors:
            held |= set(tensors.keys())
    index = folder / "model.safetensors.index.json"
    if index.exists():
        absent = sorted(set(json.loads(index.read_text())["weight_map"]) - held)
        if absent:
            raise RefusedError(f"{folder}: lacks {len(absent)} tensors, {absent[0]} the first")
    if not held:
        raise RefusedError(f"{folder}: holds no weights")
    gib = sum(file.stat().st_size for file in files) / 2**30
    print(f"check submission: {len(held)} tensors, {gib:.2f} GiB")
    if gib > SMALL_GIB and not torch.cuda.is_available():
        print("check submission: no GPU here, the model was not asked anything")
        return 0
    options.max_tokens = min(options.max_tokens, 16)
    tokenizer, positions, generate = load(options)
    lines = [Line(1, {"problem": "1+1"})]
    encode(lines, tokenizer, options.question, positions)
    answer(lines, tokenizer, generate, options.max_tokens, 1, positions)
    if lines[0].error:
        raise RefusedError(lines[0].error)
    print(f"check submission: asked {options.question.replace('{problem}', '1+1')!r}, "
          f"it answers {lines[0].output!r}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
