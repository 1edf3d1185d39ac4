"""The first examples of a plan: `python -m tanren.stages.show N < plan.json`.

Prints a JSON line for each: where it is from, its tokens, and stretches of text with whether
they are trained on.
"""

from __future__ import annotations

import sys
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import orjson
from pydantic import TypeAdapter

from tanren.config.data import ChatSet
from tanren.config.errors import TanrenError
from tanren.data import conversations
from tanren.data.chat import Chat, Example
from tanren.data.conversations import Kind
from tanren.plan.plan import DpoPlan, SftPlan, TuningPlan
from tanren.stages import tuning


def examples(plan: TuningPlan, each: int) -> list[dict[str, Any]]:
    """The first examples of each set."""
    kind: Kind = plan.stage
    with tempfile.TemporaryDirectory() as own:
        folder = tuning.make_tokenizer(plan, Path(own) / "tokenizer")
        chat = Chat(folder)
        return [line for one in plan.recipe.datasets for line in _of_set(chat, one, kind, each)]


def _of_set(chat: Chat, one: ChatSet, kind: Kind, each: int) -> list[dict[str, Any]]:
    samples: list[Any] = list(islice(conversations.read(one, kind), each))
    made = chat.conversations(samples) if kind == "sft" else chat.pairs(samples)
    found = []
    for sample, mine in zip(samples, made, strict=True):
        titles = ("chosen", "rejected") if kind == "dpo" else ("",) * len(mine)
        for title, example in zip(titles, mine, strict=True):
            found.append(_line(chat, sample.place, title, example))
    return found


def _line(chat: Chat, place: str, title: str, example: Example) -> dict[str, Any]:
    return {
        "title": f"{place} {title}".rstrip(),
        "tokens": len(example.tokens),
        "trained": int(example.trained.sum()),
        "pieces": chat.pieces(example),
    }


def main(arguments: list[str]) -> int:
    plan: TuningPlan = TypeAdapter[Any](SftPlan | DpoPlan).validate_json(sys.stdin.buffer.read())
    try:
        for line in examples(plan, int(arguments[0])):
            sys.stdout.buffer.write(orjson.dumps(line) + b"\n")
    except TanrenError as error:
        sys.stdout.buffer.write(orjson.dumps(error.as_dict()))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
