"""The command: verbs only. Everything else is imported when a verb needs it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from tanren.config.errors import TanrenError

if TYPE_CHECKING:
    from rich.console import Console

    from tanren.launch.submit import Order

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
Needs = Annotated[bool, typer.Option("--needs", help="first make the missing stages it stands on")]
Then = Annotated[Optional[str], typer.Option("--then", help="another stage to run after it")]


def _stage_verb(stage: str, does: str) -> None:
    def verb(
        recipe: RecipeFile, variant: Variant = None, name: Name = None, set_: Sets = None,
        needs: Needs = False, then: Then = None,
    ) -> None:  # fmt: skip
        from tanren.config.errors import RequestError

        if recipe.name.split(".")[0] != stage:
            raise RequestError(
                recipe, f"is not a {stage} recipe", f"tanren {recipe.name.split('.')[0]} {recipe}"
            )
        _run(recipe, variant, name, set_ or [], needs, then)

    example = f"Example: bin/tanren {stage} recipes/tiny/{stage}.yaml"
    app.command(stage, help=does, epilog=example)(verb)


_stage_verb("preprocess", "Text to tokens: tokenizer, and Megatron .bin/.idx files.")
_stage_verb("convert", "A Hugging Face base to a megatron-core checkpoint.")
_stage_verb("midtrain", "Continued pre-training. The same command again goes on where it stopped.")
_stage_verb("export", "A checkpoint to a Hugging Face folder.")


@app.command(epilog="Example: bin/tanren plan recipes/tiny/midtrain.yaml --set steps=400")
def plan(recipe: RecipeFile, variant: Variant = None, name: Name = None, set_: Sets = None) -> None:
    """Print what a stage would do, and change nothing."""
    from tanren.config.errors import RequestError
    from tanren.launch import local, submit
    from tanren.plan.plan import make_plan
    from tanren.report import terminal

    order = submit.Order(recipe, variant, name, tuple(set_ or []))
    request = submit.read_request(order)
    planned = make_plan(request)
    refusal = None
    try:
        start = submit.look(planned)
        state = (
            "done"
            if start.done
            else f"goes on from iteration {start.iteration}"
            if start.iteration
            else "new"
        )
    except RequestError as error:
        refusal, state = error, "would be refused, see below"
    waiting = [needed.recipe_file.stem for needed in submit.missing(order, request)]
    if waiting:
        state += f"; {', '.join(waiting)} must be made first (make does it, or --needs)"
    script = local.script(planned.folder, planned.launch, 1, request.machine.cores)
    terminal.print_plan(planned, state, script, terminal.console())
    if refusal is not None:
        raise refusal


def _run(
    recipe: Path, variant: str | None, name: str | None, assignments: list[str], needs: bool,
    then: str | None,
) -> None:  # fmt: skip
    from tanren.launch.submit import Order
    from tanren.report import terminal

    screen = terminal.console()
    order = Order(recipe, variant, name, tuple(assignments))
    _stage(order, needs, screen)
    if then is not None:
        after = Order(recipe.with_name(f"{then}.yaml"), variant, name, plain_if_absent=True)
        _stage(after, False, screen)


def _stage(order: Order, needs: bool, screen: Console) -> None:
    """Run one stage, and before it what it stands on if asked to."""
    from tanren.launch import submit
    from tanren.plan.plan import make_plan
    from tanren.report import terminal

    request = submit.read_request(order)
    if needs:
        for needed in submit.missing(order, request):
            _stage(needed, True, screen)
        request = submit.read_request(order)
    planned = make_plan(request)
    start = submit.look(planned)
    for change in submit.changed_files(request):
        if not (start.done or start.iteration):
            raise change
        screen.print(f"note: {change.place} {change.problem}; this run has what was there before",
                     markup=False, highlight=False)  # fmt: skip
    if start.done:
        screen.print(f"[bold]{planned.stage}[/] is done: {submit.shown(planned.run)}")
        terminal.summary(planned, screen)
        return
    submit.refuse_missing(order, request)
    if request.machine.idle_gpus and planned.launch.torchrun:
        screen.print(
            f"{request.machine.idle_gpus} GPUs stay idle: the engine needs Transformer Engine for "
            "them, and this Python has none; running on the CPU",
            highlight=False,
        )
    if start.iteration:
        screen.print(f"{planned.stage} goes on from iteration {start.iteration}")
    watch, close = terminal.watching(planned, screen)
    try:
        ending = submit.start(planned, request.machine.cores, watch)
    finally:
        close()
    if ending is not None:
        raise ending
    terminal.summary(planned, screen)


def main() -> None:
    """The entry point: errors become one message and the contract's exit codes."""
    try:
        app(standalone_mode=False)
    except TanrenError as error:
        _say(error)
        sys.exit(error.exit_code)
    except typer.Exit as done:
        sys.exit(done.exit_code)
    except typer.Abort:
        sys.exit(130)
    except Exception as error:  # typer's usage errors have an exit code; anything else is our fault
        if os.environ.get("TANREN_DEBUG"):
            raise
        code = getattr(error, "exit_code", None)
        show = getattr(error, "show", None)
        if code is not None and show is not None:
            show()
            sys.exit(2)
        from tanren.report.terminal import print_error

        print_error(f"{type(error).__name__}: {error}\n  next: TANREN_DEBUG=1 shows where")
        sys.exit(1)


def _say(error: TanrenError) -> None:
    if os.environ.get("TANREN_DEBUG"):
        import traceback

        traceback.print_exception(error)
    from tanren.report.terminal import print_error

    print_error(error.text())


if __name__ == "__main__":
    main()
