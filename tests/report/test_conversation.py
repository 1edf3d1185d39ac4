"""An example and the table of a run's sets, as a person reads them."""

from __future__ import annotations

import io
from dataclasses import asdict

from rich.console import Console

from tanren.data.selection import Row
from tanren.report.conversation import print_example, print_sets

PIECES = [
    ("<s>You are [bold]a smith[/bold].\n\n### 指示:\nfold 12 of it\n\n### 応答:\n", False),
    ("I fold 12.</s>", True),
    ("\n\n### 指示:\n" + "again and " * 12 + "again\n\n### 応答:\n", False),
    ("鍛錬</s>", True),
]


def shown(*, terminal: bool) -> str:
    screen = Console(
        file=io.StringIO(), force_terminal=terminal, width=60, no_color=False,
        color_system="standard" if terminal else None,
    )  # fmt: skip
    print_example("chat.jsonl:7", PIECES, screen, tokens=1234, trained=17)
    file = screen.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_a_pipe_has_the_text_as_it_is_with_marks_around_what_is_trained() -> None:
    title, text = shown(terminal=False).split("\n", 1)
    assert title == "chat.jsonl:7  1,234 tokens, 17 trained"
    assert text == (f"{PIECES[0][0]}⟦I fold 12.</s>⟧{PIECES[2][0]}⟦鍛錬</s>⟧\n"), (
        "no line is broken, nothing is taken for markup"
    )


def test_a_terminal_has_it_in_colour() -> None:
    text = shown(terminal=True)
    assert "\x1b[32mI fold 12.</s>\x1b[0m" in text
    assert "\x1b[32m鍛錬</s>\x1b[0m" in text
    assert "⟦" not in text
    assert "[bold]a smith[/bold]" in text
    assert text.count("\x1b[32m") == 2


def test_the_table_of_the_sets() -> None:
    rows = [
        Row(name="gsm8k", read=7473, too_long=3228, used=7369, dev=100, samples_per_epoch=11053,
            examples=7370, tokens=1287581, trained_tokens=729493),
        Row(name="jaster/jnli [dev]", read=40, too_long=0, used=36, dev=4, samples_per_epoch=36,
            examples=36, tokens=2000, trained_tokens=400),
    ]  # fmt: skip
    screen = Console(file=io.StringIO(), width=40)
    print_sets([asdict(row) for row in rows], screen)
    file = screen.file
    assert isinstance(file, io.StringIO)
    assert file.getvalue().splitlines() == [
        "dataset             read  too long   used  dev  an epoch  examples     tokens  trained",
        "gsm8k              7,473     3,228  7,369  100    11,053     7,370  1,287,581  729,493",
        "jaster/jnli [dev]     40         0     36    4        36        36      2,000      400",
        "total              7,513     3,228  7,405  104    11,089     7,406  1,289,581  729,893",
    ]
    screen = Console(file=io.StringIO(), width=40)
    print_sets([asdict(rows[0])], screen)
    assert isinstance(screen.file, io.StringIO)
    assert len(screen.file.getvalue().splitlines()) == 2, "the total of one is itself"
