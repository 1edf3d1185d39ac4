"""Conversations and preferences: what a line of a chat set says, read strictly.

A conversation has `messages`: a system's text or none, then user and assistant in turns, an answer
last. A preference has a prompt, which ends with a user's message, and two answers to it, in one of
these forms (the last three are TRL's):

    messages (the prompt), chosen_response, rejected_response
    chosen, rejected (lists of messages that differ in the last alone)
    prompt (a list of messages, or a text), chosen, rejected (the answers: lists or texts)

and where someone has rated the answers chosen_reward and rejected_reward. Other keys are ignored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import orjson

from tanren.config.data import ChatSet, Source
from tanren.config.errors import RequestError
from tanren.data import python_text
from tanren.data.documents import Unit, place_of, rows
from tanren.data.documents import content as file_content
from tanren.data.sources import files_of

Kind = Literal["sft", "dpo"]
Message = dict[str, str]
_ANSWERS = ("chosen_response", "rejected_response", "chosen", "rejected")
_REWARDS = {"chosen_reward": 1.0, "rejected_reward": 0.0}
_KEYS = ("messages", "prompt", *_ANSWERS, *_REWARDS)
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Conversation:
    """Messages that end with an answer; `file` and `row` (from 1) say where they are from."""

    file: int
    row: int
    place: str
    messages: list[Message]


@dataclass(frozen=True)
class Preference:
    """A prompt, which ends with a user's message, and two answers to it."""

    file: int
    row: int
    place: str
    prompt: list[Message]
    chosen: str
    rejected: str
    rewards: tuple[float, float]


def files_of_set(chat_set: ChatSet) -> list[Path]:
    """The files of a set in the order in which they are read; none of Python's documentation."""
    return files_of(chat_set)


def place(chat_set: ChatSet, files: list[Path], file: int, row: int) -> str:
    """Where a sample is from, for a person: a line of a file, or a question's number."""
    return place_of(files[file], row) if files else f"{chat_set.name}: question {row}"


def content(chat_set: ChatSet, kind: Kind) -> Iterator[str]:
    """SHA-256 of each file of a set in order; of Python's documentation that of the questions."""
    if chat_set.python_documentation:
        values = [value for _, _, value in _rows(chat_set, [], kind)]
        yield hashlib.sha256(orjson.dumps(values)).hexdigest()
    for path in files_of_set(chat_set):
        try:
            yield file_content(Unit(_source(chat_set), path))
        except OSError as error:
            raise RequestError(
                path, f"cannot be read: {error.strerror}", "check the file and its permissions"
            ) from None


def read(chat_set: ChatSet, kind: Kind) -> Iterator[Conversation | Preference]:
    """The conversations (sft) or preferences (dpo) of a set, in order.

    Raises:
        RequestError: a file is not there or not whole, or a line is none of its kind.
    """
    files = files_of_set(chat_set)
    parse = _conversation if kind == "sft" else _preference
    for file, row, value in _rows(chat_set, files, kind):
        here = place(chat_set, files, file, row)
        try:
            yield parse(file, row, here, value)
        except _ProblemError as error:
            raise RequestError(here, error.problem, error.next_step) from None


class _ProblemError(Exception):
    """What is wrong with a line, and what to do."""

    def __init__(self, problem: str, next_step: str = "mend or remove the line") -> None:
        super().__init__(problem)
        self.problem, self.next_step = problem, next_step


def _source(chat_set: ChatSet) -> Source:
    origin = {"path", "hf", "files", "python_documentation"}
    return Source(name=chat_set.name, **chat_set.model_dump(include=origin))


def _rows(
    chat_set: ChatSet, files: list[Path], kind: Kind
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    if chat_set.python_documentation:
        values = python_text.questions() if kind == "sft" else python_text.preferences()
        for number, value in enumerate(values, 1):
            yield 0, number, value
        return
    for number, path in enumerate(files):
        for row, value in rows(Unit(_source(chat_set), path), _KEYS, _stop):
            yield number, row, value


def _stop(error: RequestError) -> None:
    raise RequestError(error.place, error.problem, "mend the line or remove it, or fetch the file")


def _conversation(file: int, row: int, here: str, value: dict[str, Any]) -> Conversation:
    if value.get("messages") is None:
        raise _not_of_its_kind(value, "messages")
    messages = _messages(value["messages"], "messages")
    if messages[-1]["role"] != "assistant":
        if any(value.get(key) is not None for key in _ANSWERS):
            raise _not_of_its_kind(value, "messages")
        raise _ProblemError(
            f"ends with a message of role {messages[-1]['role']}, and with no answer",
            "end messages with one of role assistant",
        )
    return Conversation(file, row, here, messages)


def _preference(file: int, row: int, here: str, value: dict[str, Any]) -> Preference:
    if value.get("chosen_response") is not None or value.get("rejected_response") is not None:
        prompt = _messages(value.get("messages"), "messages")
        answers = [_answer(value.get(key), key) for key in _ANSWERS[:2]]
    elif value.get("chosen") is not None or value.get("rejected") is not None:
        prompt, answers = _trl(value)
    else:
        raise _not_of_its_kind(value, "chosen_response and rejected_response")
    if prompt[-1]["role"] != "user":
        raise _ProblemError(
            f"the prompt ends with a message of role {prompt[-1]['role']}",
            "end it with one of role user: the answers are chosen and rejected",
        )
    chosen, rejected = answers
    if chosen.strip() == rejected.strip():
        raise _ProblemError("chosen and rejected are the same answer", "remove the line")
    return Preference(file, row, here, prompt, chosen, rejected, _rewards(value))


def _trl(value: dict[str, Any]) -> tuple[list[Message], list[str]]:
    """A prompt and its answers where chosen and rejected are lists of messages, or texts."""
    stated, sides = value.get("prompt"), [value.get("chosen"), value.get("rejected")]
    if isinstance(stated, str):
        stated = [{"role": "user", "content": stated}]
    prompts, answers = [], []
    for key, side in zip(("chosen", "rejected"), sides, strict=True):
        if isinstance(side, list) and len(side) > 1:
            messages = _messages(side, key)
            if messages[-1]["role"] != "assistant":
                raise _ProblemError(f"{key} ends with no answer", "end it with role assistant")
            prompts.append(messages[:-1])
            answers.append(messages[-1]["content"])
            continue
        if stated is None:
            raise _ProblemError(
                f"has no prompt, and {key} is an answer alone",
                "state prompt, or the whole conversation in chosen and rejected",
            )
        prompts.append(_messages(stated, "prompt"))
        answers.append(_answer(side[0] if isinstance(side, list) and side else side, key))
    if prompts[0] != prompts[1]:
        raise _ProblemError(
            "chosen and rejected differ before their last messages",
            "only their answers may differ: both are answers to one prompt",
        )
    return prompts[0], answers


def _messages(value: Any, key: str) -> list[Message]:
    """Messages in order: a system's text or none, then user and assistant in turns."""
    if not isinstance(value, list) or not value:
        raise _ProblemError(f"{key} is no list of messages but {_kind_of(value)}")
    messages = [_message(one, f"message {number} of {key}") for number, one in enumerate(value, 1)]
    system = messages[0]["role"] == "system"
    for number, message in enumerate(messages[system:]):
        expected = ("user", "assistant")[number % 2]
        if message["role"] != expected:
            raise _ProblemError(
                f"message {number + system + 1} of {key} is of role {message['role']}, and the "
                f"turn is the {expected}'s",
                "put a system's text first or leave it out, then user and assistant in turns",
            )
    if len(messages) == system:
        raise _ProblemError(f"{key} has a system's text alone", "add what the user says")
    return messages


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict) or not {"role", "content"} <= set(value):
        keys = ", ".join(value) if isinstance(value, dict) else _kind_of(value)
        raise _ProblemError(f"{where} has no role and content but {keys}")
    role = value["role"]
    if role not in _ROLES:
        raise _ProblemError(f"{where} is of role {role!r}; known are {', '.join(_ROLES)}")
    content = _text(value["content"], where)
    if not content.strip() and role != "system":
        what = "an empty answer" if role == "assistant" else "empty"
        raise _ProblemError(f"{where} is {what}", "write it, or remove the line")
    return {"role": role, "content": content}


def _answer(value: Any, key: str) -> str:
    """An answer as a message, or as its text alone."""
    if not isinstance(value, dict):
        value = {"role": "assistant", "content": value}
    answer = _message(value, key)
    if answer["role"] != "assistant":
        raise _ProblemError(
            f"{key} is no answer but of role {answer['role']}", "answers are of role assistant"
        )
    return answer["content"]


def _text(value: Any, where: str) -> str:
    """A text, as it is or in parts."""
    if isinstance(value, list):
        parts: list[Any] = [part.get("text") if isinstance(part, dict) else part for part in value]
        if parts and all(isinstance(part, str) for part in parts):
            return "".join(parts)
    if not isinstance(value, str):
        raise _ProblemError(f"{where} is no text but {_kind_of(value)}")
    return value


def _rewards(value: dict[str, Any]) -> tuple[float, float]:
    found = []
    for key, usual in _REWARDS.items():
        stated = value.get(key)
        if stated is not None and (isinstance(stated, bool) or not isinstance(stated, int | float)):
            raise _ProblemError(f"{key} is no number but {_kind_of(stated)}")
        found.append(usual if stated is None else float(stated))
    return found[0], found[1]


def _not_of_its_kind(value: dict[str, Any], wanted: str) -> _ProblemError:
    """The words for a conversation among preferences, the reverse, and what is neither."""
    if wanted == "messages" and any(value.get(key) is not None for key in _ANSWERS):
        return _ProblemError(
            "is a preference (chosen and rejected), and sft reads conversations",
            "give this set to a dpo recipe, or name a set with messages that end with an answer",
        )
    if wanted != "messages" and value.get("messages") is not None:
        return _ProblemError(
            "is a conversation without chosen and rejected answers, and dpo reads preferences",
            "give this set to an sft recipe, or name a set of preferences",
        )
    return _ProblemError(
        f"has no {wanted}; it has {', '.join(key for key in value) or 'no keys'}",
        "a conversation has messages; a preference chosen_response and rejected_response as well",
    )


def _kind_of(value: Any) -> str:
    """A value's kind in JSON's words."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false",
             int: "a number", float: "a number", type(None): "nothing"}  # fmt: skip
    return names.get(type(value), type(value).__name__)
