"""The token cache: made once of what is there, whole or not at all, and mapped into memory."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from tanren import runs
from tanren.config.data import ChatSet
from tanren.config.errors import RequestError, WorkError
from tanren.data import conversations, examples
from tanren.data.chat import Chat, Example
from tests.data import chat_folders
from tests.data.test_conversations import lines, messages

CONVERSATIONS = [
    messages({"role": "user", "content": f"fold it {n} times"},
             {"role": "assistant", "content": "\nI fold it." if n % 2 else "I fold."},
             {"role": "user", "content": "again"}, {"role": "assistant", "content": f"{n}"})
    for n in range(5)
]  # fmt: skip
PAIRS = [
    messages({"role": "user", "content": f"fold it {n} times"})
    | {"chosen_response": f"I fold {n}.", "rejected_response": "no", "chosen_reward": n + 0.5}
    for n in range(5)
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_folders.prepare(tmp_path_factory.mktemp("chat"), "merging", "llmjp-instruct")


@pytest.fixture
def chat_set(tmp_path: Path) -> ChatSet:
    (tmp_path / "a.jsonl").write_bytes(lines(*CONVERSATIONS[:3]))
    (tmp_path / "b.jsonl").write_bytes(b"\n" + lines(*CONVERSATIONS[3:]))
    return ChatSet(name="mine", path=f"{tmp_path}/*.jsonl")


def nothing_to_do() -> Chat:
    raise AssertionError("it was tokenized before")


def make(chat_set: ChatSet, tokenizer: Path, cache: Path, **more: Any) -> Path:
    return examples.make(
        chat_set, more.get("kind", "sft"), tokenizer,
        more.get("chat", lambda: Chat(tokenizer)), cache,
    )  # fmt: skip


def test_what_is_read_back_is_what_was_tokenized(
    tmp_path: Path, chat_set: ChatSet, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examples, "_BATCH", 2)
    folder = make(chat_set, tokenizer, tmp_path / "cache")
    found = examples.read(folder, chat_set, "sft")
    expected = Chat(tokenizer).conversations(list(conversations.read(chat_set, "sft")))  # type: ignore[arg-type]
    assert [len(one) for one in expected] == [1, 2, 1, 2, 1], "merges make several examples"
    assert len(found) == len(expected) == 5
    for sample, mine in enumerate(expected):
        read = found.examples_of(sample)
        assert len(read) == len(mine)
        for ours, theirs in zip(read, mine, strict=True):
            assert isinstance(ours.tokens, np.memmap)
            assert (ours.tokens.dtype, ours.trained.dtype) == (np.int32, np.bool_)
            assert ours.tokens.tolist() == theirs.tokens.tolist()
            assert ours.trained.tolist() == theirs.trained.tolist()
    assert found.lengths.tolist() == [len(one.tokens) for mine in expected for one in mine]
    trained = [int(one.trained.sum()) for mine in expected for one in mine]
    assert found.counts.tolist() == trained
    places = [f"{tmp_path}/{name}" for name in ("a.jsonl:1", "a.jsonl:2", "a.jsonl:3",
                                                "b.jsonl:2", "b.jsonl:3")]  # fmt: skip
    assert [found.place(sample) for sample in range(5)] == places
    assert found.end_ids == (1,)
    assert found.rewards.shape == (0, 2)
    with pytest.raises(ValueError, match="read-only"):
        found.tokens[0] = 1


def test_a_preference_is_two_examples_and_its_rewards(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(*PAIRS))
    chat_set = ChatSet(name="mine", path=f"{tmp_path}/a.jsonl")
    found = examples.read(
        make(chat_set, tokenizer, tmp_path / "cache", kind="dpo"), chat_set, "dpo"
    )
    assert np.diff(found.samples).tolist() == [2] * 5
    assert found.rewards.tolist() == [[n + 0.5, 0.0] for n in range(5)]
    chosen, rejected = found.examples_of(3)
    chat = Chat(tokenizer)
    assert [text for text, trained in chat.pieces(chosen) if trained] == ["I fold 3.</s>"]
    assert [text for text, trained in chat.pieces(rejected) if trained] == ["no</s>"]


def test_it_is_tokenized_once(
    tmp_path: Path, chat_set: ChatSet, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(chat_set, tokenizer, tmp_path / "cache")
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    monkeypatch.setattr(conversations, "read", nothing_to_do)
    monkeypatch.setattr(runs, "locked", nothing_to_do)
    assert make(chat_set, tokenizer, tmp_path / "cache", chat=nothing_to_do) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    assert len(examples.read(folder, chat_set, "sft")) == 5


def test_its_name_is_the_content_and_nothing_else(
    tmp_path: Path, chat_set: ChatSet, tokenizer: Path
) -> None:
    cache = tmp_path / "cache"
    folder = make(chat_set, tokenizer, cache)
    assert len({path.name for path in folder.iterdir()}) == 8
    # What the recipe says of how much is read, and where the files are, is no content.
    moved = tmp_path / "moved"
    moved.mkdir()
    for name, new in (("a", "x"), ("b", "y")):
        (moved / f"{new}.jsonl").write_bytes((tmp_path / f"{name}.jsonl").read_bytes())
    other = ChatSet(name="other", path=str(moved), max_samples=1, split_dev=False, upsampling=2.0)
    assert make(other, tokenizer, cache, chat=nothing_to_do) == folder
    assert examples.read(folder, other, "sft").place(3) == f"{moved}/y.jsonl:2"

    (moved / "x.jsonl").write_bytes(lines(*CONVERSATIONS[:3]).replace(b"fold", b"cold"))
    changed = make(other, tokenizer, cache)
    (moved / "x.jsonl").write_bytes((tmp_path / "b.jsonl").read_bytes())
    (moved / "y.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes())
    swapped = make(other, tokenizer, cache)
    chatml = chat_folders.prepare(tmp_path / "chatml", "merging", "chatml")
    with_chatml = make(chat_set, chatml, cache)
    assert len({folder, changed, swapped, with_chatml}) == 4


def test_a_set_without_a_line_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n\n")
    with pytest.raises(RequestError, match="dataset mine holds no line"):
        make(ChatSet(name="mine", path=f"{tmp_path}/a.jsonl"), tokenizer, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, chat_set: ChatSet, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: object) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(conversations, "file_content", broken)
    with pytest.raises(RequestError, match="cannot be read: Input/output error") as caught:
        make(chat_set, tokenizer, tmp_path / "cache")
    assert caught.value.place == f"{tmp_path}/a.jsonl"


def test_what_is_not_whole_does_not_count(
    tmp_path: Path, chat_set: ChatSet, tokenizer: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = make(chat_set, tokenizer, tmp_path / "cache")
    whole = (folder / "trained.bin").read_bytes()
    (folder / "trained.bin").write_bytes(whole[:-1])
    monkeypatch.setattr(examples, "_QUIET_SECONDS", 0.0)
    with pytest.raises(WorkError, match="is not whole on"), caplog.at_level(logging.WARNING):
        examples.read(folder, chat_set, "sft", wait_seconds=0.2)
    assert "waiting to see" in caplog.text
    assert make(chat_set, tokenizer, tmp_path / "cache") == folder
    assert (folder / "trained.bin").read_bytes() == whole


# A tokenizer that takes its time, writes down that it was asked, and may die.
PROGRAM = """
import logging, os, sys, time
from pathlib import Path
import numpy as np
from tanren.config.data import ChatSet
from tanren.data import examples
from tanren.data.chat import Example

logging.basicConfig(level=logging.INFO, format="%(message)s")
folder, dies = Path(sys.argv[1]), sys.argv[2] == "dies"
examples._BATCH = 2

class Slow:
    calls = 0
    def conversations(self, batch):
        self.calls += 1
        with (folder / "asked").open("a") as file:
            file.write("asked\\n")
        time.sleep(0.4)
        if dies and self.calls == 2:
            os.kill(os.getpid(), 9)
        return [[Example(np.arange(3, dtype=np.int32), np.array([False, True, True]))]] * len(batch)

chat_set = ChatSet(name="mine", path=f"{folder}/*.jsonl")
print(examples.make(chat_set, "sft", folder / "tokenizer", Slow, folder / "cache"))
"""


@pytest.fixture
def start(tmp_path: Path, chat_set: ChatSet) -> Callable[[str], subprocess.Popen[str]]:
    (tmp_path / "tokenizer").mkdir()
    return lambda how: subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path), how], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip


def test_a_kill_leaves_nothing_that_counts(
    tmp_path: Path, chat_set: ChatSet, start: Callable[[str], subprocess.Popen[str]]
) -> None:
    killed = start("dies")
    killed.communicate()
    assert killed.returncode == -9
    assert (tmp_path / "asked").read_text() == "asked\n" * 2
    [left] = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert left.name.endswith(".partial")
    assert (left / "tokens.bin").exists()
    again = start("lives")
    out, _ = again.communicate()
    folder = Path(out.strip())
    assert again.returncode == 0
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == [folder]
    assert len(examples.read(folder, chat_set, "sft", wait_seconds=0.0)) == 5
    assert (tmp_path / "asked").read_text() == "asked\n" * 5, "from the beginning"


def test_two_at_once_make_it_once(
    tmp_path: Path, chat_set: ChatSet, start: Callable[[str], subprocess.Popen[str]]
) -> None:
    both = [start("lives"), start("lives")]
    said = [one.communicate() for one in both]
    assert [one.returncode for one in both] == [0, 0]
    assert said[0][0] == said[1][0]
    assert (tmp_path / "asked").read_text() == "asked\n" * 3
    assert sum("mine: 5 conversations, 15 tokens" in err for _, err in said) == 1
    assert len(examples.read(Path(said[0][0].strip()), chat_set, "sft", wait_seconds=0.0)) == 5


def test_whoever_comes_later_is_told_to_wait(
    tmp_path: Path, chat_set: ChatSet, tokenizer: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make(chat_set, tokenizer, tmp_path / "cache")
    (folder / "facts.json").rename(tmp_path / "facts.json")
    caplog.set_level(logging.INFO)

    class Late:
        """While this one waits another finishes."""

        def __enter__(self) -> None:
            (tmp_path / "facts.json").rename(folder / "facts.json")

        def __exit__(self, *_: object) -> None: ...

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "is_locked", lambda _: True)
        patch.setattr(runs, "locked", lambda *_, **__: Late())
        assert make(chat_set, tokenizer, tmp_path / "cache", chat=nothing_to_do) == folder
    assert "mine: waiting for another process" in caplog.text


def test_the_facts_say_what_it_holds(tmp_path: Path, chat_set: ChatSet, tokenizer: Path) -> None:
    folder = make(chat_set, tokenizer, tmp_path / "cache")
    facts = orjson.loads((folder / "facts.json").read_bytes())
    found = examples.read(folder, chat_set, "sft")
    assert (facts["samples"], facts["examples"], facts["tokens"]) == (5, 7, len(found.tokens))
    assert facts["files"] == {
        path.name: path.stat().st_size for path in folder.iterdir() if path.suffix == ".bin"
    }
    assert isinstance(found.example(6), Example)
