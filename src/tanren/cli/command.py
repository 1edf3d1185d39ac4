"""The command itself, the options that verbs share, and how it ends."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from tanren.config.errors import EXIT_TERMINATED, TanrenError, is_yours, of_system

if TYPE_CHECKING:
    from tanren.launch.orders import Order

app = typer.Typer(
    add_completion=False, no_args_is_help=True, rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="From text to a tuned Hugging Face model: one recipe, one command a stage.",
)  # fmt: skip

# typer reads these at run time, on Python 3.10 too, so Optional stays.
RecipeFile = Annotated[Path, typer.Argument(help="the stage's recipe, recipes/TASK/STAGE.yaml")]
Variant = Annotated[
    Optional[str], typer.Option("--variant", help="takes STAGE.VARIANT.yaml, which lies beside it")
]
Name = Annotated[Optional[str], typer.Option("--name", help="a run folder of its own for a trial")]
Sets = Annotated[
    Optional[list[str]],
    typer.Option("--set", help="change a field, e.g. --set optimizer.lr=1.0e-4; repeatable"),
]
Runtime = Annotated[
    Optional[str],
    typer.Option("--runtime", help="apptainer, singularity or native; else by what is there"),
]
Binds = Annotated[
    Optional[list[str]],
    typer.Option("--bind", help="a folder that a container sees as well; repeatable"),
]
SiteName = Annotated[
    Optional[str], typer.Option("--site", help="a file's name in recipes/sites, or local")
]
Nodes = Annotated[Optional[int], typer.Option("--nodes", min=1, help="nodes of the job")]
Hours = Annotated[
    Optional[float], typer.Option("--hours", min=0.001, help="the longest that the job may take")
]
Type = Annotated[Optional[str], typer.Option("--type", help="one of the site's resource types")]
Reservation = Annotated[Optional[str], typer.Option("--reservation", help="its name on the site")]
AfterJobs = Annotated[
    Optional[list[str]], typer.Option("--after", help="a job that must end well first; repeatable")
]
Chain = Annotated[int, typer.Option("--chain", min=1, help="cut the run into so many jobs")]
Parts = Annotated[
    Optional[int],
    typer.Option("--parts", min=2, help="preprocess by so many nodes, a job each, and one to join"),
]
Dirty = Annotated[
    bool, typer.Option("--allow-dirty", help="submit code that no commit holds; the run keeps it")
]
Needs = Annotated[bool, typer.Option("--needs", help="first make the missing stages it stands on")]
Then = Annotated[Optional[str], typer.Option("--then", help="another stage to run after it")]


def order_of(
    recipe: Path, variant: str | None, name: str | None, sets: list[str] | None,
    runtime: str | None, binds: list[str] | None, site: str | None, nodes: int | None,
    hours: float | None, type_: str | None, reservation: str | None,
    after: list[str] | None = None, chain: int = 1, parts: int | None = None,
    allow_dirty: bool = False,
) -> Order:  # fmt: skip
    """The options of a verb as one value. SET="user.group=g" is user.toml's for this once."""
    from tanren.launch.orders import Order
    from tanren.plan.site import Wish

    own = [text for text in sets or [] if text.startswith("user.")]
    stage, dot, named = recipe.stem.partition(".")
    if dot and variant is None:  # midtrain.50B.yaml as a program is midtrain.yaml's variant 50B
        recipe, variant = recipe.with_name(f"{stage}{recipe.suffix}"), named
    return Order(
        recipe, variant, name,
        assignments=tuple(text for text in sets or [] if text not in own),
        runtime=runtime,
        binds=tuple(binds or []),
        site=site,
        wish=Wish(nodes, hours, type_, reservation),
        after=tuple(after or []),
        chain=chain,
        parts=parts,
        user=tuple(text.removeprefix("user.") for text in own),
        allow_dirty=allow_dirty,
    )  # fmt: skip


def main() -> None:
    """The entry point: errors become one message and the contract's exit codes."""
    try:
        code = app(prog_name="tanren", standalone_mode=False)
        # An exit code of a verb comes back as a value here; verbs that just end return None.
        sys.exit(code if isinstance(code, int) else 0)
    except TanrenError as error:
        _say(error)
        sys.exit(error.exit_code)
    except typer.Abort:
        sys.exit(130)
    except Exception as error:  # typer's usage errors have an exit code; anything else is our fault
        if os.environ.get("TANREN_DEBUG"):
            raise
        if isinstance(error, OSError) and is_yours(error):
            found = of_system(error, "the disk of the run")
            _say(found)
            sys.exit(found.exit_code)
        code = getattr(error, "exit_code", None)
        show = getattr(error, "show", None)
        if code is not None and show is not None:
            show()
            if "argument 'RUN" in getattr(error, "format_message", str)():
                print("  next: make status lists the runs; RUN=tiny/midtrain", file=sys.stderr)
            sys.exit(2)
        from tanren.report.terminal import print_error

        print_error(f"{type(error).__name__}: {error}\n  next: TANREN_DEBUG=1 shows where")
        sys.exit(1)


def terminated(number: int, frame: object) -> None:
    """For verbs that undo what is half made: SIGTERM ends them as Ctrl-C does."""
    raise typer.Exit(EXIT_TERMINATED)


def _say(error: TanrenError) -> None:
    if os.environ.get("TANREN_DEBUG"):
        import traceback

        traceback.print_exception(error)
    from tanren.report.terminal import print_error

    print_error(error.text())
