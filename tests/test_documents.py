"""The documents name commands, options and messages that exist, and the READMEs say the same."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from typer.main import get_command

from tanren.cli import app
from tests.conftest import REPOSITORY

READMES = [REPOSITORY / "README.md", REPOSITORY / "README.ja.md"]
PAGES = [
    *READMES,
    REPOSITORY / "recipes" / "README.md",
    *sorted((REPOSITORY / "docs").glob("*.md")),
]
MAKEFILE = (REPOSITORY / "Makefile").read_text()
# What is read from the environment and not by the Makefile.
ENVIRONMENT = {"RUNS", "IMAGES", "DATA", "DEBIAN_MIRROR", "TMPDIR", "PIP_INDEX_URL", "TANREN_DEBUG"}
# Tasks that a reader makes; of the others the recipe must be there.
READERS_TASKS = {"mine", "TASK", "..."}
# Words of a sentence that stand for a target or a verb.
STAND_IN = {"STAGE"}


def fences(text: str) -> list[str]:
    """The lines of a page's code blocks, without their indentation."""
    found, inside = [], False
    for line in text.splitlines():
        if line.strip().startswith("```"):
            inside = not inside
        elif inside:
            found.append(line.strip())
    assert not inside
    return found


def commands(text: str) -> Iterator[list[str]]:
    """Each `make ...`, `bin/tanren ...` and recipe of a page, in blocks and in sentences."""
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S))
    lines = [*fences(text), *spans]
    for line in lines:
        for part in re.split(r"&&", line):
            if re.match(r"(make|bin/tanren|recipes/\S+\.yaml)( |$)", part.strip()):
                yield shlex.split(part, comments=True)


@cache
def variables(target: str) -> set[str]:
    """The variables that a target's recipe takes from the command line."""
    rule = re.search(rf"^{target}:.*\n((?:\t.*\n?)+)", MAKEFILE, re.MULTILINE)
    assert rule, f"the Makefile has no target {target}"
    found, seen, waiting = set(), set(), [rule[1]]
    while waiting:
        for name in re.findall(r"\$[({]?\$?([A-Za-z_][A-Za-z_0-9]*)", waiting.pop()):
            definition = re.search(rf"^{name} = (.*)$", MAKEFILE, re.MULTILINE)
            if definition and name not in seen:
                seen.add(name)
                waiting.append(definition[1])
            elif name.isupper():
                found.add(name)
    return found


TANREN = get_command(app)


def parse(words: list[str]) -> None:
    """Read a tanren command as the command itself does, without running it."""
    command = TANREN
    while hasattr(command, "commands"):
        if command.name == "convert" and words[0] not in command.commands:
            words.insert(0, "recipe")
        verb = words.pop(0)
        assert verb in command.commands, f"tanren has no verb {verb}"
        command = command.commands[verb]
    command.make_context(command.name, words)


@cache
def made_by(target: str, given: tuple[str, ...]) -> list[str]:
    """The words after bin/tanren that make would run."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(["make", "-n", target, *given], cwd=REPOSITORY, env=clean, check=True,
                          capture_output=True, text=True)  # fmt: skip
    _, found, line = done.stdout.partition("bin/tanren ")
    # What the shell would take from the environment is there as make hands it on.
    values = dict(word.split("=", 1) for word in given)
    line = re.sub(r"\"\$([A-Z_]+)\"", lambda m: shlex.quote(values.get(m[1], "")), line)
    return shlex.split(line.splitlines()[0]) if found else []


def check_make(words: list[str]) -> None:
    words = [word for word in words if word != "..."]
    target, *given = words
    if target in STAND_IN:
        return
    known = variables(target) | ENVIRONMENT
    for word in given:
        name, equals, _ = word.partition("=")
        assert equals, f"make {target}: {word} is no VAR=value"
        assert name in known, f"make {target} takes no {name}"
    of_shell = {word.split("=")[0] for word in given} & ENVIRONMENT
    given = [word for word in given if word.split("=")[0] not in of_shell]
    parsed = made_by(target, tuple(given))
    if parsed:
        check_tanren(parsed)


def test_make_knows_the_variables_that_it_reads_and_no_others() -> None:
    (line,) = (line for line in MAKEFILE.splitlines() if line.startswith("known := "))
    known = line.removeprefix("known := ").split()
    read = set(re.findall(r"\$[({]([A-Z][A-Z0-9_]*)[)},]", MAKEFILE)) | {"PROMPT", "QUESTION"}
    assert known == sorted(read - {"MAKEFILE_LIST", "MAKECMDGOALS"})


def test_a_variable_that_a_target_has_no_use_for_is_refused() -> None:
    (line,) = (line for line in MAKEFILE.splitlines() if line.startswith("known := "))
    known = line.removeprefix("known := ").split()
    targets = MAKEFILE.split(".PHONY: ")[1].splitlines()[0].split()
    assert len(targets) > 30
    for target in targets:
        asked = [str(REPOSITORY / "bin" / "idle-variables"), target, " ".join(known)]
        idle = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()
        assert set(idle) == set(known) - variables(target), target
    asked = ["make", "-n", "midtrain", "NAME=x", "STEPS=10", "FP8=delayed"]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(asked, cwd=REPOSITORY, env=clean, capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 2
    assert "make midtrain has no use for STEPS FP8; fields of a recipe are SET=" in done.stderr


@pytest.mark.parametrize("given", [["NODE=2"], ["NODES=2", "NAEM=x"]])
def test_a_variable_that_make_does_not_know_is_refused(given: list[str]) -> None:
    asked = ["make", "-n", "plan", "SET=a=b c=d", "PIP_INDEX_URL=x", *given]
    done = subprocess.run(asked, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    name = given[-1].split("=")[0]
    assert f"there is no variable {name}; make help shows those that there are" in done.stderr
    known = subprocess.run(asked[:-1], cwd=REPOSITORY, capture_output=True, check=False)
    assert known.returncode == 0


def check_tanren(words: list[str]) -> None:
    if not words or words[0] in STAND_IN:
        return
    if len(words) == 1 and " " not in words[0] and words[0] in TANREN.commands:
        return  # a verb that a sentence names
    for word in words:
        task = re.match(r"recipes/([^/]+)(/[a-z]+[.\w]*\.yaml)?$", word)
        if task and task[1] not in READERS_TASKS:
            assert (REPOSITORY / word).exists(), word
    parse(list(words))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_command_of_a_page_exists_and_takes_its_options(page: Path) -> None:
    seen = set()
    for words in commands(page.read_text()):
        if tuple(words) in seen:
            continue
        seen.add(tuple(words))
        try:
            if words[0] == "make" and len(words) > 1:
                check_make(words[1:])
            elif words[0] == "bin/tanren":
                check_tanren(words[1:])
            elif words[0] != "make":
                assert (REPOSITORY / words[0]).exists()
                if len(words) > 1:
                    check_tanren([Path(words[0]).name.split(".")[0], *words])
        except BaseException as error:
            raise AssertionError(f"{page.name}: {shlex.join(words)}: {error}") from error
    if page in READMES:
        assert len(seen) > 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    # In a comment may be what is not there yet.
    text = re.sub(r"<!--.*?-->", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in link:
            assert (page.parent / link).exists(), link


def test_both_readmes_have_the_same_commands_and_files() -> None:
    """A comment may differ, and the order of the blocks."""
    found = [
        [re.sub(r"\s+#( .*)?$", "", line) for line in fences(page.read_text())] for page in READMES
    ]
    assert sorted(found[0]) == sorted(found[1])
    assert len(found[0]) > 40
    english, japanese = (
        sorted({tuple(words) for words in commands(page.read_text())}) for page in READMES
    )
    assert english == japanese
    links = [set(re.findall(r"\]\(([^)]+)\)", page.read_text())) for page in READMES]
    assert links[0] == links[1]


def test_the_readmes_hours_are_those_of_the_recipes() -> None:
    source = (REPOSITORY / "recipes" / "README.md").read_text()
    rows = []
    for page in READMES:
        text = page.read_text()
        table = [re.split(r" *\| *", line) for line in text.splitlines() if line.startswith("| `")]
        rows.append([(row[1], row[4]) for row in table if re.search(r"\d (h|min)\b", row[4])])
    assert [hours for _, hours in rows[0]] == [hours for _, hours in rows[1]]
    assert len(rows[0]) == 8
    for name, hours in rows[0]:
        task = name.split("`")[1]
        lines = [line for line in source.splitlines() if line.startswith(f"| `{task}`")]
        for time in hours.split("; "):
            assert any(re.search(rf"\b{re.escape(time)}\b", line) for line in lines), (name, time)


@cache
def messages() -> list[str]:
    """Every text of the source, with … for a value in it, and bin/'s scripts."""
    found = [path.read_text() for path in sorted((REPOSITORY / "bin").iterdir())]
    for path in sorted((REPOSITORY / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.append("".join(
                    str(part.value) if isinstance(part, ast.Constant) else "…"
                    for part in node.values
                ))  # fmt: skip
    return found


def test_every_message_of_the_troubles_is_one_that_the_source_has() -> None:
    text = (REPOSITORY / "docs" / "troubleshooting.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) >= 40
    for row in rows:
        cells = row.strip("| ").split(" | ")
        assert len(cells) == 3, row
        quoted = re.fullmatch(r"`([^`]+)`", cells[0])
        assert quoted, row
        assert any(quoted[1] in message for message in messages()), quoted[1]
