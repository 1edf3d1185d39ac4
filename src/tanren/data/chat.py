"""Conversations to tokens: exactly those that inference has, with the answers marked for the loss.

A conversation's k-th answer is trained behind the tokens P that `apply_chat_template` gives for the
messages before it (`add_generation_prompt=True`), as the tokens A that a generation would add: the
answer's text, cut into pieces on its own, and the special token that ends the turn. Where the next
answer's P begins with P + A, both answers are in one example. Where it does not (the tokenizer
merges across the border, or the template drops reasoning from earlier answers), the example ends,
and another begins with that P. So no answer is trained behind tokens that inference never has.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import tokenizers

from tanren.config.errors import RequestError
from tanren.data.conversations import Conversation, Message, Preference
from tanren.data.template import CHAT_TEMPLATE

Tokens = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]
# Stands for the n-th special token in an answer while the template is at work; a code point that
# Unicode keeps from texts, and that no template strips.
_MARK = "\ufdd0"
_MARKED = re.compile(f"{_MARK}(\\d+){_MARK}")


@dataclass(frozen=True)
class Example:
    """Tokens [n] and which of them [n] the loss is on; the last one always is."""

    tokens: Tokens
    trained: Mask

    @property
    def end_ids(self) -> set[int]:
        """The special tokens that end its answers."""
        ends = self.trained & ~np.append(self.trained[1:], False)
        return set(self.tokens[ends].tolist())


@dataclass(frozen=True)
class _Turn:
    """An answer: the text before it, and its own parts.

    A part is the id of a special token, or a text and whether a stretch of text begins with it.
    """

    place: str
    prompt: str
    parts: list[int | tuple[str, bool]]


class Chat:
    """A tokenizer with a template, as `template.prepare` made its folder."""

    def __init__(self, folder: Path) -> None:
        import transformers

        self.template = folder / CHAT_TEMPLATE
        self._tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(
            folder, local_files_only=True
        )
        self._whole: tokenizers.Tokenizer = self._tokenizer.backend_tokenizer
        self._whole.no_truncation()
        self._whole.no_padding()
        self._inside = _without_prefix(self._whole)
        added = self._whole.get_added_tokens_decoder()
        self._ids = {token.content: number for number, token in added.items() if token.special}
        # The longest first: so the tokenizer finds them.
        self._names = [_MARK, *sorted(self._ids, key=len, reverse=True)]
        self._special = re.compile(f"({'|'.join(map(re.escape, self._names[1:]))})")
        self._escaped = re.compile("|".join(map(re.escape, self._names)))
        self._added = tuple(token.content for token in added.values())

    def conversations(self, batch: Sequence[Conversation]) -> list[list[Example]]:
        """The examples of each conversation: one, or several where the template wants it.

        Raises:
            RequestError: the template does not render a conversation, or not so that its answers
                can be told from the rest.
        """
        turns = [
            [
                self._turn(one.place, one.messages[:number], message["content"])
                for number, message in enumerate(one.messages)
                if message["role"] == "assistant"
            ]
            for one in batch
        ]
        encoded = iter(self._encode([turn for mine in turns for turn in mine]))
        return [_examples([next(encoded) for _ in mine]) for mine in turns]

    def pairs(self, batch: Sequence[Preference]) -> list[tuple[Example, Example]]:
        """The chosen and the rejected answer of each preference, each behind the same prompt.

        Raises:
            RequestError: as with `conversations`, or both answers have the same tokens.
        """
        turns = [
            self._turn(one.place, one.prompt, answer)
            for one in batch
            for answer in (one.chosen, one.rejected)
        ]
        made = [_examples([each])[0] for each in self._encode(turns)]
        pairs = list(zip(made[::2], made[1::2], strict=True))
        for one, (chosen, rejected) in zip(batch, pairs, strict=True):
            if np.array_equal(chosen.tokens, rejected.tokens):
                raise RequestError(
                    one.place, "chosen and rejected are the same answer to the template",
                    "remove the line",
                )  # fmt: skip
        return pairs

    def pieces(self, example: Example) -> list[tuple[str, bool]]:
        """The text of an example in stretches that are trained or not, special tokens visible."""
        borders = np.flatnonzero(np.diff(example.trained)) + 1
        found, before = [], ""
        for first, end in zip([0, *borders], [*borders, len(example.tokens)], strict=True):
            # From the beginning: a tokenizer may decode a stretch on its own in another way.
            text = self._whole.decode(example.tokens[:end].tolist(), skip_special_tokens=False)
            found.append((text.removeprefix(before), bool(example.trained[first])))
            before = text
        return found

    # Text ---------------------------------------------------------------------------------------

    def _render(self, place: str, messages: list[Message], *, prompt: bool) -> str:
        import jinja2

        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=prompt
                )
            )
        except jinja2.TemplateSyntaxError as error:
            raise RequestError(
                self.template,
                f"is no template: {error}",
                "mend it, or use template: llmjp-instruct",
            ) from None
        except (jinja2.TemplateError, TypeError) as error:
            raise RequestError(
                place, f"the template {self.template} does not take it: {error}",
                "mend the conversation, or use another template",
            ) from None  # fmt: skip

    def _turn(self, place: str, before: list[Message], answer: str) -> _Turn:
        prompt = self._render(place, before, prompt=True)
        # What looks like a special token in an answer is text: it must not end the turn.
        escaped = self._escaped.sub(lambda found: self._mark(found[0]), answer)
        message = {"role": "assistant", "content": escaped}
        whole = self._render(place, [*before, message], prompt=False)
        if not whole.startswith(prompt):
            raise RequestError(
                self.template,
                f"writes a conversation with its answer in another way than the prompt for it "
                f"({place}: {_differing(prompt, whole)})",
                "use template: llmjp-instruct, or mend the template",
            )
        # Texts at even places, special tokens at odd ones.
        texts = self._special.split(whole[len(prompt) :])
        last = max((n for n in range(0, len(texts), 2) if texts[n].strip()), default=None)
        if last is None:
            raise RequestError(
                place, f"the template {self.template} leaves nothing of its answer",
                "mend the line or remove it",
            )  # fmt: skip
        if last == len(texts) - 1:
            raise RequestError(
                self.template,
                f"ends an answer with no special token: {texts[last][-20:]!r} ({place})",
                "a model learns from it when to stop: end answers with eos_token in the template",
            )
        parts: list[int | tuple[str, bool]] = []
        for number, text in enumerate(texts[: last + 2]):
            if number % 2:
                parts.append(self._ids[text])
            elif text:
                begins = number > 0 or prompt.endswith(self._added)
                head, *tail = self._unmarked(text)
                parts += [(head, begins), *((more, False) for more in tail)]
        return _Turn(place, prompt, parts)

    def _mark(self, name: str) -> str:
        return f"{_MARK}{self._names.index(name)}{_MARK}"

    def _unmarked(self, text: str) -> list[str]:
        """A text with what was marked, in pieces that hold no special token's text as a whole."""
        pieces = [""]
        for number, part in enumerate(_MARKED.split(text)):
            name = self._names[int(part)] if number % 2 else part
            pieces[-1] += name[:1] if number % 2 else name
            if number % 2:
                pieces.append(name[1:])
        return pieces

    # Tokens -------------------------------------------------------------------------------------

    def _encode(self, turns: Sequence[_Turn]) -> list[tuple[list[int], list[int]]]:
        """P and A of each turn."""
        texts = [part for turn in turns for part in turn.parts if isinstance(part, tuple)]
        prompts = _encode_each(self._whole, (turn.prompt for turn in turns))
        inside = _encode_each(self._inside, (text for text, begins in texts if not begins))
        outside = _encode_each(self._after_special, (text for text, begins in texts if begins))
        special = set(self._ids.values())
        result = []
        for turn in turns:
            answer: list[int] = []
            for part in turn.parts:
                if isinstance(part, int):
                    answer.append(part)
                    continue
                text, begins = part
                ids = (outside if begins else inside)[text]
                if not special.isdisjoint(ids):
                    raise RequestError(
                        turn.place,
                        "the tokenizer makes a special token of the answer's text "
                        f"({self._whole.decode(ids, skip_special_tokens=False)[:80]!r})",
                        "take it out of the answer",
                    )
                answer += ids
            result.append((prompts[turn.prompt], answer))
        return result

    @cached_property
    def _after_special(self) -> tokenizers.Tokenizer:
        """How text behind a special token is cut: some tokenizers put a space before it."""
        name = next(iter(self._ids))
        behind = self._whole.encode(f"{name}a", add_special_tokens=False).ids[1:]
        plain = self._inside.encode("a", add_special_tokens=False).ids
        return self._inside if behind == plain else self._whole


def _examples(turns: Iterable[tuple[list[int], list[int]]]) -> list[Example]:
    """Answers in one example as long as the tokens before each are those that inference has."""
    made: list[tuple[list[int], list[bool]]] = []
    for prompt, answer in turns:
        if made and prompt[: len(made[-1][0])] == made[-1][0]:
            tokens, trained = made[-1]
            between = prompt[len(tokens) :]
            tokens += between + answer
            trained += [False] * len(between) + [True] * len(answer)
        else:
            made.append((prompt + answer, [False] * len(prompt) + [True] * len(answer)))
    return [
        Example(np.array(tokens, dtype=np.int32), np.array(trained, dtype=np.bool_))
        for tokens, trained in made
    ]


def _encode_each(backend: tokenizers.Tokenizer, texts: Iterable[str]) -> dict[str, list[int]]:
    """The ids of texts, each encoded once, on all cores."""
    unique = list(dict.fromkeys(texts))
    encoded = backend.encode_batch_fast(unique, add_special_tokens=False)
    return {text: one.ids for text, one in zip(unique, encoded, strict=True)}


def _without_prefix(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer for text that goes on from other text: it puts no space before it."""
    value: dict[str, Any] = orjson.loads(backend.to_str())
    before = orjson.dumps([value["normalizer"], value["pre_tokenizer"]])
    value["normalizer"] = _drop_prefix(value["normalizer"], "normalizers")
    value["pre_tokenizer"] = _drop_prefix(value["pre_tokenizer"], "pretokenizers")
    if orjson.dumps([value["normalizer"], value["pre_tokenizer"]]) == before:
        return backend
    return tokenizers.Tokenizer.from_str(orjson.dumps(value).decode())


def _drop_prefix(step: dict[str, Any] | None, steps: str) -> dict[str, Any] | None:
    """A normalizer or pre-tokenizer in JSON without what it puts before a text."""
    if step is None:
        return None
    kind = step["type"]
    if kind == "Sequence":
        kept = [_drop_prefix(one, steps) for one in step[steps]]
        return {**step, steps: [one for one in kept if one is not None]}
    if kind == "Prepend" or (kind == "Replace" and _puts_before(step)):
        return None
    if kind == "Metaspace":
        return {**step, "prepend_scheme": "never"}
    if kind == "ByteLevel":
        return {**step, "add_prefix_space": False}
    return step


def _puts_before(step: dict[str, Any]) -> bool:
    """Whether a replacement puts something before a text, as llm-jp's do: `^` by ▁."""
    pattern = step["pattern"]
    if "Regex" not in pattern:
        return False
    replace = tokenizers.normalizers.Replace(tokenizers.Regex(pattern["Regex"]), step["content"])
    done = str(replace.normalize_str("a"))
    return done != "a" and done.endswith("a")


def _differing(prompt: str, whole: str) -> str:
    """Where two texts part."""
    pairs = zip(prompt, whole, strict=False)
    at = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(prompt), len(whole)))
    return f"{prompt[at : at + 20]!r} in the prompt, {whole[at : at + 20]!r} with the answer"
