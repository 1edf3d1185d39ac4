"""Chat sets to conversations and preferences, in every form, and what is wrong with a line."""

from __future__ import annotations

import gzip
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import orjson
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from tanren.config.data import ChatSet
from tanren.config.errors import EXIT_REQUEST, RequestError
from tanren.data import conversations
from tanren.data.conversations import Conversation, Kind, Preference
from tests.data.fake_hub import Hub

U = {"role": "user", "content": "u"}
A = {"role": "assistant", "content": "a"}
S = {"role": "system", "content": "s"}


def lines(*values: Any) -> bytes:
    return b"".join(orjson.dumps(value) + b"\n" for value in values)


def read(path: Path | str, kind: Kind = "sft") -> list[Any]:
    return list(conversations.read(ChatSet(name="mine", path=str(path)), kind))


def messages(*values: dict[str, Any]) -> dict[str, Any]:
    return {"messages": list(values)}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (messages(U, A), [U, A]),
        (messages(S, U, A, U, A), [S, U, A, U, A]),
        (messages({"role": "system", "content": ""}, U, A), [{**S, "content": ""}, U, A]),
        (messages({**U, "name": "me"}, A) | {"id": 3}, [U, A]),
        (messages({**U, "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]},
                  A), [{**U, "content": "a b"}, A]),
        (messages({**U, "content": "\n 鍛錬\n"}, A), [{**U, "content": "\n 鍛錬\n"}, A]),
        # Others' data sets have both; a whole conversation is one.
        (messages(U, A) | {"prompt": "u", "chosen": [U, A], "rejected": [U, A]}, [U, A]),
    ],
)  # fmt: skip
def test_a_conversation_comes_as_it_is(
    tmp_path: Path, value: dict[str, Any], expected: list[dict[str, str]]
) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(value))
    [one] = read(tmp_path / "a.jsonl")
    assert isinstance(one, Conversation)
    assert one.messages == expected
    assert (one.file, one.row, one.place) == (0, 1, f"{tmp_path}/a.jsonl:1")


B = {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("value", "prompt"),
    [
        (messages(S, U) | {"chosen_response": "a", "rejected_response": "b"}, [S, U]),
        (messages(U, B, U) | {"chosen_response": "a", "rejected_response": "b"}, [U, B, U]),
        ({"chosen": [U, A], "rejected": [U, B]}, [U]),
        ({"prompt": "first", "chosen": [S, U, B, U, A], "rejected": [S, U, B, U, B]}, [S, U, B, U]),
        ({"prompt": [S, U], "chosen": [A], "rejected": [B]}, [S, U]),
        ({"prompt": "u", "chosen": [A], "rejected": [B]}, [U]),
        ({"prompt": "u", "chosen": "a", "rejected": "b"}, [U]),
        ({"prompt": [U], "chosen": A, "rejected": "b"}, [U]),
    ],
)
def test_a_preference_comes_from_every_form(
    tmp_path: Path, value: dict[str, Any], prompt: list[dict[str, str]]
) -> None:
    rated = value | {"chosen_reward": 8, "rejected_reward": -1.5}
    (tmp_path / "a.jsonl").write_bytes(lines(value, rated))
    usual, other = read(tmp_path / "a.jsonl", "dpo")
    assert isinstance(usual, Preference)
    assert (usual.prompt, usual.chosen, usual.rejected) == (prompt, "a", "b")
    assert (usual.rewards, other.rewards) == ((1.0, 0.0), (8.0, -1.5))
    assert (other.row, other.place) == (2, f"{tmp_path}/a.jsonl:2")


PAIR = {"chosen_response": "a", "rejected_response": "b"}


@pytest.mark.parametrize(
    ("kind", "value", "problem"),
    [
        ("sft", messages(A, U), "message 1 of messages is of role assistant, and the turn is the"),
        ("sft", messages(U, U, A), "message 2 of messages is of role user, and the turn is the as"),
        ("sft", messages(U, A, S, A), "message 3 of messages is of role system"),
        ("sft", messages(S, A), "message 2 of messages is of role assistant"),
        ("sft", messages(S), "messages has a system's text alone"),
        ("sft", messages(U), "ends with a message of role user, and with no answer"),
        ("sft", messages(U, {**A, "content": " \n"}), "message 2 of messages is an empty answer"),
        ("sft", messages({**U, "content": ""}, A), "message 1 of messages is empty"),
        (
            "sft",
            messages({**U, "content": None}, A),
            "message 1 of messages is no text but nothing",
        ),
        (
            "sft",
            messages({**U, "content": [{"type": "image"}]}, A),
            "message 1 of messages is no text but a list",
        ),
        ("sft", messages({"role": "tool", "content": "x"}, A), "is of role 'tool'; known are"),
        ("sft", messages({"from": "human", "value": "x"}), "has no role and content but from, val"),
        ("sft", messages("u"), "message 1 of messages has no role and content but a text"),
        ("sft", {"messages": "u"}, "messages is no list of messages but a text"),
        ("sft", {"messages": []}, "messages is no list of messages but a list"),
        ("sft", {"text": "u"}, "has no messages; it has text"),
        ("sft", [U, A], "is no object but list"),
        ("sft", messages(U) | PAIR, "is a preference (chosen and rejected), and sft reads convers"),
        ("sft", {"chosen": [U, A], "rejected": [U, B]}, "is a preference (chosen and rejected)"),
        ("dpo", messages(U, A), "is a conversation without chosen and rejected answers"),
        ("dpo", {"text": "u"}, "has no chosen_response and rejected_response; it has text"),
        ("dpo", messages(U, A) | PAIR, "the prompt ends with a message of role assistant"),
        ("dpo", messages(U) | PAIR | {"rejected_response": "a "}, "chosen and rejected are the sa"),
        (
            "dpo",
            messages(U) | PAIR | {"rejected_response": " "},
            "rejected_response is an empty answer",
        ),
        ("dpo", messages(U) | {"chosen_response": "a"}, "rejected_response is no text but nothing"),
        ("dpo", PAIR, "messages is no list of messages but nothing"),
        ("dpo", messages(U) | PAIR | {"chosen_reward": "1"}, "chosen_reward is no number but a te"),
        ("dpo", messages(U) | PAIR | {"chosen_reward": True}, "chosen_reward is no number but tru"),
        ("dpo", {"chosen": [U, A], "rejected": [S, U, B]}, "chosen and rejected differ before th"),
        ("dpo", {"chosen": "a", "rejected": "b"}, "has no prompt, and chosen is an answer alone"),
        ("dpo", {"prompt": "u", "chosen": [U], "rejected": [B]}, "chosen is no answer but of role"),
        ("dpo", {"chosen": [U, A, U], "rejected": [U, B]}, "chosen ends with no answer"),
        ("dpo", {"chosen": [U, A]}, "has no prompt, and rejected is an answer alone"),
    ],
)
def test_a_line_that_is_wrong_is_named(
    tmp_path: Path, kind: Kind, value: Any, problem: str
) -> None:
    good = messages(U, A) if kind == "sft" else messages(U) | PAIR
    (tmp_path / "a.jsonl").write_bytes(lines(good) + b"\n" + lines(value))
    with pytest.raises(RequestError) as caught:
        read(tmp_path / "a.jsonl", kind)
    assert caught.value.place == f"{tmp_path}/a.jsonl:3"
    assert problem in caught.value.problem
    assert caught.value.next_step
    assert caught.value.exit_code == EXIT_REQUEST


def test_a_file_of_the_other_kind_says_where_it_belongs(tmp_path: Path) -> None:
    (tmp_path / "sft.jsonl").write_bytes(lines(messages(U, A)))
    (tmp_path / "dpo.jsonl").write_bytes(lines(messages(U) | PAIR))
    for kind, file, recipe in (("sft", "dpo.jsonl", "a dpo recipe"),
                               ("dpo", "sft.jsonl", "an sft recipe")):  # fmt: skip
        with pytest.raises(RequestError) as caught:
            read(tmp_path / file, kind)  # type: ignore[arg-type]
        assert f"give this set to {recipe}" in caught.value.next_step


def test_files_are_read_in_order_whatever_they_are(tmp_path: Path) -> None:
    values = [messages({**U, "content": f"{n}"}, A) for n in range(6)]
    (tmp_path / "a.jsonl").write_bytes(lines(*values[:2]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines(values[2])))
    (tmp_path / "c.json.zst").write_bytes(zstandard.compress(lines(values[3])))
    more = [{**value, "chosen": None, "source": "x"} for value in values[4:]]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(more), tmp_path / "d.parquet", row_group_size=1
    )
    found = read(tmp_path)
    assert [one.messages[0]["content"] for one in found] == ["0", "1", "2", "3", "4", "5"]
    assert [(one.file, one.row) for one in found] == [
        (0, 1),
        (0, 2),
        (1, 1),
        (2, 1),
        (3, 1),
        (3, 2),
    ]
    assert [Path(one.place).name for one in found[-2:]] == ["d.parquet row 1", "d.parquet row 2"]
    files = conversations.files_of_set(ChatSet(name="mine", path=str(tmp_path)))
    assert len(files) == 4


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(messages(U, A)) + b"{\n")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines(messages(U, A)))[:-4])
    table = pyarrow.Table.from_pylist([{"text": "u"}])
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    for name, place, problem in (
        ("a.jsonl", "a.jsonl:2", "is not JSON"),
        ("b.jsonl.gz", "b.jsonl.gz", "breaks off"),
        ("c.parquet", "c.parquet", "has no column 'messages' or 'prompt'"),
        ("d.jsonl", "d.jsonl", "no file of source mine is there"),
    ):
        with pytest.raises(RequestError) as caught:
            read(tmp_path / name)
        assert (caught.value.place, problem in caught.value.problem) == (
            f"{tmp_path}/{place}",
            True,
        )
        assert "on_error" not in caught.value.next_step, "a chat set has no such setting"


def test_a_set_of_the_hub_is_read_where_it_was_fetched(fake_hub: Hub) -> None:
    from tanren.data.fetch import fetch
    from tanren.data.hub import Wanted, parse

    files = {"data/a.jsonl": lines(messages(U, A)), "README.md": b""}
    fake_hub.repository("datasets/someone/chat").commit(files)
    chat_set = ChatSet(name="mine", hf="someone/chat", files=("data/*.jsonl",))
    with pytest.raises(RequestError, match="is not fetched yet"):
        list(conversations.read(chat_set, "sft"))
    fetch(Wanted(parse("someone/chat", "dataset"), ("data/*.jsonl",)))
    [one] = conversations.read(chat_set, "sft")
    assert one.place.endswith("data/a.jsonl:1")


def test_the_content_of_a_set_is_that_of_its_files(tmp_path: Path) -> None:
    def content(path: Path) -> list[str]:
        return list(conversations.content(ChatSet(name="mine", path=str(path)), "sft"))

    (tmp_path / "a.jsonl").write_bytes(lines(messages(U, A)))
    table = pyarrow.Table.from_pylist([messages(U, A)])
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    first = content(tmp_path)
    assert len(set(first)) == 2
    (tmp_path / "c.jsonl").write_bytes(lines(messages(U, A)))
    assert content(tmp_path) == [*first, first[0]]
    # The same bytes of data under another column's name.
    pyarrow.parquet.write_table(table.rename_columns(["talks"]), tmp_path / "b.parquet")
    assert content(tmp_path)[1] != first[1]


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_python_answers_questions_about_its_library(kind: Literal["sft", "dpo"]) -> None:
    chat_set = ChatSet(name="python", python_documentation="docstrings")
    found: list[Any] = list(conversations.read(chat_set, kind))
    assert len(found) > (1500 if kind == "sft" else 700)
    assert [one.row for one in found[:3]] == [1, 2, 3]
    assert found[2].place == "python: question 3"
    assert list(conversations.content(chat_set, kind)) == list(
        conversations.content(chat_set, kind)
    )
    if kind == "sft":
        answers = [one.messages[-1]["content"] for one in found]
        questions = [one.messages[0]["content"] for one in found]
    else:
        answers = [one.chosen for one in found]
        questions = [one.prompt[0]["content"] for one in found]
        assert all(one.rejected != one.chosen for one in found)
    assert len(set(answers)) == len(set(questions)) == len(found)
    assert all(answer.endswith(".") and "\n" not in answer for answer in answers)
    # Whoever reads one and its neighbour reads two ways to ask.
    assert all(a.split()[:2] != b.split()[:2] for a, b in pairwise(questions[:40]))
    assert "Serialize ``obj`` to a JSON formatted ``str``." in answers
