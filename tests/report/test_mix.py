"""The table of a mix as a person reads it."""

from __future__ import annotations

import io
import json
import re
import shlex
from pathlib import Path

from rich.console import Console

from tanren.config.data import Mix
from tanren.config.training import Checkpointing, Midtrain, Optimizer
from tanren.plan.mix import SourceCount, make_mixture
from tanren.report.mix import as_json, print_mix
from tests.conftest import REPOSITORY, Tanren

RECIPE = Midtrain(
    model="tiny", init="scratch", data="stage:preprocess", sequence_length=4096, global_batch=16,
    split="95,5,0", optimizer=Optimizer(lr=3e-4), checkpoints=Checkpointing(every_steps=100),
    mix=Mix(ratios={"math/*": 2.0, "old": 0.0}, max_epochs=2.2),
)  # fmt: skip
COUNTS = (
    SourceCount("web", "/web", 1_234_567_890), SourceCount("math/gsm8k", "/gsm", 2_841_494),
    SourceCount("old", "/old", 5_000),
)  # fmt: skip
SHARES = {"tokens": 10_000_000, "mix": Mix(shares={"web": 0.9, "math/*": 0.1, "old": 0.0})}


def shown(recipe: Midtrain, data_start: int = 0, *, by_glob: bool = False) -> list[str]:
    screen = io.StringIO()
    mixture = make_mixture(recipe, COUNTS, "r", data_start=data_start)
    console = Console(file=screen, width=40, soft_wrap=True, highlight=False)
    print_mix(mixture, recipe, console, by_glob=by_glob)
    return screen.getvalue().splitlines()


def test_a_mix_of_ratios() -> None:
    recipe = RECIPE.model_copy(update={"mix": RECIPE.mix.model_copy(update={"max_epochs": 3.0})})
    assert shown(recipe) == [
        "source       tokens there  ratio           used  epochs  of the run",
        "web         1,234,567,890      1  1,234,567,890    1.05      99.54%",
        "math/gsm8k      2,841,494      2      5,682,988    2.11       0.46%",
        "old                 5,000      0              0",
        "total       1,237,414,384         1,240,250,878",
        "1,240,250,878 tokens in 18,925 steps of 4,096 x 16 tokens",
    ]


def test_a_mix_of_shares_names_the_glob_that_is_spread() -> None:
    assert shown(RECIPE.model_copy(update=SHARES)) == [
        "source       tokens there       share        used  epochs  of the run",
        "web         1,234,567,890         0.9   9,024,307    0.01      90.00%",
        "math/gsm8k      2,841,494  math/* 0.1   1,002,701    0.37      10.00%",
        "old                 5,000           0           0",
        "total       1,237,414,384              10,027,008",
        "10,027,008 tokens in 153 steps of 4,096 x 16 tokens",
    ]


def test_a_mix_that_begins_later_says_where() -> None:
    last = shown(RECIPE.model_copy(update=SHARES), data_start=100)[-1]
    assert last == "3,473,408 tokens in 53 steps (from 100 to 153) of 4,096 x 16 tokens"


def test_sources_of_one_glob_may_be_one_row() -> None:
    mix = Mix(ratios={"[wm]*": 0.5, "old": 1.0}, max_epochs=1.1)
    assert shown(RECIPE.model_copy(update={"mix": mix}), by_glob=True) == [
        "source      tokens there  ratio         used  epochs  of the run",
        "[wm]* (2)  1,237,409,384    0.5  618,704,692    0.53     100.00%",
        "old                5,000      1        5,000    1.05       0.00%",
        "total      1,237,414,384         618,709,692",
        "618,709,692 tokens in 9,441 steps of 4,096 x 16 tokens",
    ]
    shares = RECIPE.model_copy(update=SHARES)
    assert shown(shares, by_glob=True) == shown(shares)


def test_programs_get_the_same() -> None:
    recipe = RECIPE.model_copy(update=SHARES)
    value = json.loads(as_json(make_mixture(recipe, COUNTS, "r"), recipe, ("a note",)))
    assert (value["tokens"], value["steps"], value["notes"]) == (10_027_008, 153, ["a note"])
    assert [source["used"] for source in value["sources"]] == [9_024_307, 1_002_701]
    assert value["left_out"] == {"old": 5_000}


def test_the_guides_table_is_what_is_printed(tmp_path: Path, bare: Tanren) -> None:
    guide = (REPOSITORY / "docs" / "data.md").read_text().split("## Mix\n")[1]
    table, printed = re.findall(r"```\n(.+?)```", guide.split("With these counts:")[1], re.DOTALL)
    (tmp_path / "counts.tsv").write_text(table)
    command, *lines = printed.splitlines()
    words = shlex.split(command.removeprefix("$ bin/tanren "))
    words[1] = str(REPOSITORY / words[1])
    done = bare(*words, cwd=tmp_path)
    assert done.code == 0, done.text
    assert done.out.splitlines() == lines
