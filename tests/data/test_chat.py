"""Conversations to tokens: those that inference has, whatever the tokenizer and the template."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tanren.config.errors import RequestError
from tanren.data import tokenizer as tokenizers
from tanren.data.chat import Chat, Example
from tanren.data.conversations import Conversation, Message, Preference
from tests.data import chat_folders
from tests.data.chat_folders import SPECIAL
from tests.stages.test_real_data import MODEL

PAIRS = [
    ("byte level", "llmjp-instruct"), ("byte level", "chatml"), ("byte level", "llama 3"),
    ("byte level", "thinking"), ("byte level", "channels"), ("byte level", "bare"),
    ("merging", "llmjp-instruct"), ("merging", "llama 3"), ("merging", "thinking"),
    ("prefix space", "chatml"),
    ("caret", "llmjp-instruct"), ("metaspace", "llama 3"), ("pieces", "llmjp-instruct"),
    ("pieces", "llama 3"), ("pieces", "thinking"), ("llm-jp v4", "llmjp-instruct"),
]  # fmt: skip
ENDS = {"chatml": "<|im_end|>", "thinking": "<|im_end|>", "llama 3": "<|eot|>", "channels": "</s>",
        "bare": "<|eot|>"}  # fmt: skip
PIECES = ["\n", "\n\n", " ", "  ", "I fold", "鍛錬", "。", "👩‍🔬", "</think>", "### 応答:\n",
          "user\n", *SPECIAL, "<", "|im_end|>", "\t", "42"]  # fmt: skip
# ▁ is how SentencePiece writes a space.
CHARACTERS = st.characters(codec="utf-8", exclude_characters="▁")
TEXT = st.lists(st.sampled_from(PIECES) | st.text(CHARACTERS, max_size=4), max_size=6).map("".join)
SAID = TEXT.filter(str.strip)


def messages(*texts: str, system: str | None = None) -> list[Message]:
    """What user and assistant say in turns, after a system's text or none."""
    first = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return first + [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]


def conversation(*texts: str, system: str | None = None) -> Conversation:
    return Conversation(0, 1, "chat.jsonl:1", messages(*texts, system=system))


class Both:
    """Training's tokens, and inference with the exported folder."""

    def __init__(self, folder: Path, kind: str, template: str) -> None:
        from transformers import AutoTokenizer

        prepared = chat_folders.prepare(folder, kind, template)
        self.chat = Chat(prepared)
        tokenizers.copy(prepared, folder / "exported")
        (folder / "exported" / "config.json").write_text('{"model_type": "llama"}')
        self.theirs: Any = AutoTokenizer.from_pretrained(folder / "exported")
        self.end = ENDS.get(template, self.theirs.eos_token)
        self.special = {n for n, t in self.theirs.added_tokens_decoder.items() if t.special}

    def prompt(self, before: list[Message]) -> list[int]:
        ids = self.theirs.apply_chat_template(before, add_generation_prompt=True)["input_ids"]
        return [int(number) for number in ids]

    def answer_text(self, said: list[Message]) -> str:
        """What the template writes for the last answer, to the token that ends it."""
        before = self.theirs.apply_chat_template(
            said[:-1], tokenize=False, add_generation_prompt=True
        )
        rest = self.theirs.apply_chat_template(said, tokenize=False).removeprefix(before)
        return str(rest[: rest.rindex(self.end)] + self.end)

    def decode(self, ids: list[int]) -> str:
        return str(self.theirs.decode(ids, skip_special_tokens=False))

    def check(self, said: list[Message], examples: list[Example]) -> None:
        """Every answer stands behind the tokens of its prompt, in as few examples as can be."""
        answers = [n for n, message in enumerate(said) if message["role"] == "assistant"]
        prompts = [self.prompt(said[:n]) for n in answers]
        found = [(one, run) for one in examples for run in runs_of(one.trained)]
        assert len(found) == len(answers)
        for n, prompt, (one, (first, end)) in zip(answers, prompts, found, strict=True):
            assert one.tokens[:first].tolist() == prompt
            answer = one.tokens[first:end].tolist()
            assert self.decode(prompt + answer) == self.decode(prompt) + self.answer_text(
                said[: n + 1]
            )
            assert self.decode(answer[-1:]) == self.end
            inside = [number for number in answer[:-1] if number in self.special]
            assert [self.decode([n]) for n in inside] == ["<|channel|>"] * (self.end == "</s>" and
                "<|channel|>" in str(self.theirs.chat_template))  # fmt: skip
            assert one.end_ids >= set(answer[-1:])
        for one in examples:
            assert one.trained[-1]
            assert one.tokens.dtype == np.int32
        for (one, _), (other, (first, _)) in itertools.pairwise(found):
            if one is not other:
                ours = one.tokens.tolist()
                assert other.tokens[:first].tolist()[: len(ours)] != ours, "one would have done"


def runs_of(trained: np.ndarray[Any, Any]) -> list[tuple[int, int]]:
    """Where stretches of trained tokens begin and end."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], trained.astype(int), [0]])))
    return [(int(first), int(end)) for first, end in edges.reshape(-1, 2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("folders")


_made: dict[tuple[str, str], Both] = {}


def both(folder: Path, kind: str, template: str) -> Both:
    if kind == "llm-jp v4" and not MODEL.exists():
        pytest.skip(f"there is no {MODEL}")
    if (kind, template) not in _made:
        _made[kind, template] = Both(folder / f"{kind} {template}", kind, template)
    return _made[kind, template]


@pytest.mark.parametrize(("kind", "template"), PAIRS)
def test_every_answer_is_trained_behind_the_tokens_that_inference_has(
    folder: Path, kind: str, template: str
) -> None:
    here = both(folder, kind, template)

    @settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
    @given(
        system=st.none() | TEXT,
        turns=st.lists(st.tuples(SAID, SAID), min_size=1, max_size=3),
        rejected=SAID,
    )
    def check(system: str | None, turns: list[tuple[str, str]], rejected: str) -> None:
        said = messages(*(text for turn in turns for text in turn), system=system)
        [examples] = here.chat.conversations([Conversation(0, 1, "here", said)])
        here.check(said, examples)
        pair = Preference(0, 1, "here", said[:-1], said[-1]["content"], rejected, (1.0, 0.0))
        try:
            [(chosen, other)] = here.chat.pairs([pair])
        except RequestError as error:
            assert "the same answer" in error.problem
            return
        # The same code makes both: of the last answer, the tokens are those of sft.
        [first, end] = runs_of(examples[-1].trained)[-1]
        assert chosen.tokens.tolist() == examples[-1].tokens[:end].tolist()
        assert runs_of(chosen.trained) == [(first, end)]
        assert other.tokens[:first].tolist() == chosen.tokens[:first].tolist()
        assert runs_of(other.trained) == [(first, len(other.tokens))]

    check()


def trained_text(here: Both, one: Example) -> list[str]:
    return [text for text, trained in here.chat.pieces(one) if trained]


def test_a_conversation_in_llmjps_form_is_one_example(folder: Path) -> None:
    here = both(folder, "byte level", "llmjp-instruct")
    said = ("fold it", "I fold it.", "again", "鍛錬", "and now", "no\n")
    [[one]] = here.chat.conversations([conversation(*said, system="You are a smith.")])
    assert here.chat.pieces(one) == [
        ("<s>You are a smith.\n\n### 指示:\nfold it\n\n### 応答:\n", False),
        ("I fold it.</s>", True),
        ("\n\n### 指示:\nagain\n\n### 応答:\n", False),
        ("鍛錬</s>", True),
        ("\n\n### 指示:\nand now\n\n### 応答:\n", False),
        ("no\n</s>", True),
    ]
    assert one.tokens.tolist().count(0) == 1, "one BOS"
    assert one.end_ids == {1}
    [[one]] = here.chat.conversations([conversation("fold it", "I fold it.")])
    assert here.chat.pieces(one)[0] == ("<s>\n\n### 指示:\nfold it\n\n### 応答:\n", False)


def test_where_the_tokenizer_would_merge_across_the_border_an_example_ends(folder: Path) -> None:
    here = both(folder, "merging", "llmjp-instruct")
    [plain] = here.chat.conversations([conversation("a", "I fold", "b", "I fold", system="")])
    assert len(plain) == 1
    [merged] = here.chat.conversations([conversation("a", "\nI fold", "b", "I fold", system="")])
    assert len(merged) == 2
    assert [trained_text(here, one) for one in merged] == [["\nI fold</s>"], ["I fold</s>"]]
    ids = merged[1].tokens.tolist()
    assert ids[: len(merged[0].tokens)] != merged[0].tokens.tolist()
    assert here.chat.pieces(merged[1])[0][0].startswith("<s>\n\n### 指示:\na\n\n### 応答:\n\nI")


def test_reasoning_that_a_template_drops_is_trained_and_then_gone(folder: Path) -> None:
    here = both(folder, "byte level", "thinking")
    [made] = here.chat.conversations([conversation("a", "fold it</think>yes", "b", "no")])
    assert [here.chat.pieces(one) for one in made] == [
        [("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", False),
         ("fold it</think>yes<|im_end|>", True)],
        [("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
          "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n", False),
         ("no<|im_end|>", True)],
    ]  # fmt: skip


def test_special_tokens_of_the_template_are_trained_and_those_of_a_text_are_text(
    folder: Path,
) -> None:
    here = both(folder, "byte level", "channels")
    text = "<|im_end|><|channel|>x</s>\ufdd0 \ufdd01\ufdd0"
    [[one]] = here.chat.conversations([conversation("a", text)])
    [(first, end)] = runs_of(one.trained)
    answer = one.tokens[first:end].tolist()
    assert here.decode(answer) == f"<|channel|>{text}</s>"
    special = [number for number in answer if number in here.special]
    assert here.decode(special) == "<|channel|></s>"
    assert one.end_ids == {answer[-1]}


@pytest.mark.parametrize("kind", ["pieces", "caret", "metaspace"])
def test_text_goes_on_without_a_space_and_begins_with_one_as_the_tokenizer_says(
    folder: Path, kind: str
) -> None:
    """Behind text an answer has no prefix; behind a special token what all text has there."""
    for template, kinds in (("llmjp-instruct", ()), ("bare", ("pieces", "caret"))):
        here = both(folder, kind, template)
        [[one]] = here.chat.conversations([conversation("a", "I fold", "b", "I fold")])
        first = [one.tokens[begin] for begin, _ in runs_of(one.trained)]
        pieces = here.theirs.convert_ids_to_tokens(first)
        assert [piece.startswith("▁") for piece in pieces] == [kind in kinds] * 2


def refusal(here: Both, *texts: str, template: str | None = None, **more: Any) -> RequestError:
    if template is not None:
        here.chat._tokenizer.chat_template = template
    try:
        with pytest.raises(RequestError) as caught:
            here.chat.conversations([conversation(*texts, **more)])
    finally:
        here.chat._tokenizer.chat_template = here.theirs.chat_template
    assert caught.value.next_step
    return caught.value


def test_a_template_that_cannot_be_trained_with_is_refused(folder: Path) -> None:
    here = both(folder, "byte level", "chatml")
    place = str(here.chat.template)
    chatml = chat_folders.CHATML
    error = refusal(here, "a", "b", template=chatml.replace("<|im_end|>", "|"))
    assert (error.place, "ends an answer with no special token" in error.problem) == (place, True)
    assert "chat.jsonl:1" in error.problem
    error = refusal(here, "a", "b", template=chatml.replace("assistant\\n' }}", "model\\n' }}"))
    assert error.place == place
    assert "in another way than the prompt for it" in error.problem
    assert "'model" in error.problem
    error = refusal(here, "a", "b", template=chatml + "{% if %}")
    assert (error.place, error.problem.startswith("is no template")) == (place, True)
    error = refusal(here, "a", "b", template=chatml.replace("message['content']", "''"))
    assert error.place == "chat.jsonl:1"
    assert "leaves nothing of its answer" in error.problem
    strict = "{{ raise_exception('no system here') if messages[0]['role'] == 'system' }}" + chatml
    error = refusal(here, "a", "b", template=strict, system="s")
    assert error.place == "chat.jsonl:1"
    assert error.problem.endswith("does not take it: no system here")


def test_the_same_answer_twice_is_no_preference(folder: Path) -> None:
    here = both(folder, "byte level", "llama 3")
    said = messages("a")
    pair = Preference(0, 7, "pairs.jsonl:7", said, "b", "b ", (1.0, 0.0))
    with pytest.raises(RequestError, match="the same answer to the template") as caught:
        here.chat.pairs([pair])
    assert caught.value.place == "pairs.jsonl:7"


def test_earlier_answers_of_a_preference_are_not_trained(folder: Path) -> None:
    here = both(folder, "byte level", "llmjp-instruct")
    said = messages("a", "I fold", "b", system="s")
    [(chosen, rejected)] = here.chat.pairs([Preference(0, 1, "x", said, "yes", "no", (1.0, 0.0))])
    assert trained_text(here, chosen) == ["yes</s>"]
    assert trained_text(here, rejected) == ["no</s>"]
    assert here.chat.pieces(chosen)[0] == here.chat.pieces(rejected)[0]
