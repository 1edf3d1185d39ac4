"""The command as a person types it: help, exit codes, from any folder, as an entry script."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tanren import runs
from tanren.cli import command
from tanren.plan.paths import RunFolder
from tests.conftest import RECIPES, REPOSITORY, Tanren

STAGES = ("preprocess", "convert", "midtrain", "export")


@pytest.mark.parametrize("verb", [*STAGES, "plan", "mix"])
def test_help_ends_with_an_example_that_plans(bare: Tanren, verb: str) -> None:
    done = bare(verb, "--help")
    assert done.out.startswith(f"Usage: tanren {verb} "), done.out
    assert done.code == 0
    example = done.out.rstrip().splitlines()[-1].strip()
    assert example.startswith(f"Example: bin/tanren {verb} recipes/tiny/")
    words = example.split()[2:]
    path = REPOSITORY / words[1]
    assert bare("plan", str(path), *words[2:]).code == 0


def test_without_a_verb_the_verbs_are_named(bare: Tanren) -> None:
    done = bare()
    assert all(stage in done.text for stage in STAGES)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("midtrian", "x.yaml"), "No such command 'midtrian'"),
        (("midtrain", str(RECIPES / "midtrain.yaml"), "--nmae", "a"), "No such option"),
        (("midtrain",), "Missing argument"),
        (("midtrain", str(RECIPES / "convert.yaml")), "is not a midtrain recipe"),
        (("convert", str(RECIPES / "midtrain.yaml")), "is not a convert recipe"),
        (("convert", "--name", "x", str(RECIPES / "midtrain.yaml")), "is not a convert recipe"),
        (("midtrain", "/no/such/recipe.yaml"), "/no/such/recipe.yaml: there is no such file"),
        (("report",), "next: make status lists the runs"),
        (("logs",), "next: make status lists the runs"),
        (("convert", "hf-to-mcore", "x"), "Missing argument 'DST'"),
        (("convert", "mcore-to-hf", "x", "y", "--dtype", "fp8"), "'fp8' is not one of"),
        (("plan", "recipes/tiny/nothing.yaml"), "the file's name is not that of a stage"),
    ],
)
def test_a_wrong_command_line_has_code_2_and_no_trace(
    bare: Tanren, words: tuple[str, ...], message: str
) -> None:
    done = bare(*words)
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.text


def test_a_recipe_runs_as_a_program_from_any_folder(bare: Tanren, tmp_path: Path) -> None:
    """By its first line, as `apptainer exec IMAGE recipes/tiny/midtrain.yaml` does."""
    environment = os.environ | {
        "PATH": f"{REPOSITORY / 'bin'}:{os.environ['PATH']}", "RUNS": str(tmp_path / "runs"),
        "TANREN_PYTHON": sys.executable,
    }  # fmt: skip
    done = subprocess.run(
        [str(RECIPES / "midtrain.yaml"), "--set", "steps=400"],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "stands on preprocess, which has not been made" in done.stderr
    assert "bin/tanren preprocess" in done.stderr


def test_a_variants_file_is_the_variant(bare: Tanren, tmp_path: Path) -> None:
    shutil.copytree(RECIPES, tmp_path / "tiny")
    variant = tmp_path / "tiny" / "midtrain.big.yaml"
    variant.write_text("base: midtrain.yaml\nsteps: 400\n")
    for words in ((str(variant),), (str(RECIPES / "midtrain.yaml"),)):
        done = bare("plan", *words)
        assert done.code == 0, done.text
        ending = "midtrain.big" if words[0] == str(variant) else "midtrain"
        assert done.out.splitlines()[0].split()[-1] == str(bare.runs / "tiny" / ending)
    done = bare("midtrain", str(variant))
    assert f"tanren: {bare.runs / 'tiny' / 'midtrain.big'}: stands on preprocess" in done.err


def test_a_plan_says_that_the_run_is_at_work(bare: Tanren) -> None:
    plan = ("plan", str(RECIPES / "midtrain.yaml"), "--bind", "/data")
    folder = RunFolder(bare.runs / "tiny" / "midtrain")
    runs.make(folder)
    with runs.locked(folder.lock):
        lines = bare(*plan).out.splitlines()
    assert lines[1].split(maxsplit=1)[1].startswith("new; running now; preprocess, convert must")
    assert "note           BIND=/data changes nothing: the stage runs in no container" in lines
    assert "running now" not in bare(*plan).out


def test_a_base_that_is_still_to_be_given_stops_everything_before_it(bare: Tanren) -> None:
    recipe = REPOSITORY / "recipes" / "v4-dolmino" / "midtrain.50B.yaml"
    for words in (("midtrain", str(recipe), "--needs", "--then", "export"),
                  ("pipeline", str(recipe.parent), "--stages", "preprocess,midtrain",
                   "--variant", "50B")):  # fmt: skip
        done = bare(*words)
        assert done.code == 2, done.text
        assert "v4-dolmino/midtrain.yaml: init: is `given`" in done.err
    assert not bare.runs.exists()


def make(*words: str) -> list[str]:
    """The lines that make prints; it must not take this for a part of `make test`."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    done = subprocess.run(
        ["make", *words], cwd=REPOSITORY, env=environment, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    return done.stdout.splitlines()


def test_make_has_a_line_of_help_for_every_target() -> None:
    text = (REPOSITORY / "Makefile").read_text()
    phony = text.split(".PHONY: ")[1].splitlines()[0].split()
    helped = [line.split()[1] for line in make("help") if line.startswith("  make ")]
    assert sorted(helped) == sorted(phony)


def test_make_passes_its_variables_on() -> None:
    words = ["TASK=mine", "VARIANT=big", "NAME=a", "SET=optimizer.lr=1.0e-4 steps=5",
             "RUNTIME=apptainer", "BIND=/data /gs"]  # fmt: skip
    assert make("-n", "midtrain", *words)[-1].split("&& ")[1].split() == [
        "bin/tanren",
        "midtrain",
        "recipes/mine/midtrain.yaml",
        "--variant",
        "'big'",
        "--name",
        "'a'",
        "--set",
        "'optimizer.lr=1.0e-4'",
        "--set",
        "'steps=5'",
        "--runtime",
        "'apptainer'",
        "--bind",
        "'/data'",
        "--bind",
        "'/gs'",
        "--needs",
        "--then",
        "export",
    ]
    assert "image build te19" in make("-n", "build-image", "IMAGE=te19")[-1]
    assert "--set 'iteration=80'" in make("-n", "export", "ITER=80")[-1]
    gate = make("-n", "fp8-gate", "STAGE=sft", "STEPS=120", "FP8=delayed blockwise", "SITE=abci3")
    assert gate[-1].split("&& ")[1].split() == [
        "bin/tanren", "gate", "recipes/tiny/sft.yaml", "--steps", "120", "--fp8", "'delayed'",
        "--fp8", "'blockwise'", "--site", "'abci3'", "--needs",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "tanren: the disk of the run: No space left on device.\n"
            "  next: free some space, or name a larger disk (RUNS=, DATA=, TMPDIR=); the same "
            "command goes on\n",
        ),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "/ours"),
            "tanren: FileNotFoundError: [Errno 2] No such file or directory: '/ours'\n"
            "  next: TANREN_DEBUG=1 shows where\n",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/runs/tiny"),
            "tanren: /runs/tiny: Permission denied.\n"
            "  next: mend that and run the same command again\n",
        ),
    ],
)
def test_what_the_system_refuses_is_said_with_what_to_do(
    error: OSError, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(**_: object) -> None:
        raise error

    monkeypatch.setattr(command, "app", fails)
    monkeypatch.delenv("TANREN_DEBUG", raising=False)
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == said
