"""The verbs of the stages, how fast one is, and what it would do."""

from __future__ import annotations

from typing import Annotated

import typer

from tanren.cli.command import (
    AfterJobs,
    Binds,
    Chain,
    Dirty,
    Hours,
    Name,
    Needs,
    Nodes,
    Parts,
    RecipeFile,
    Reservation,
    Runtime,
    Sets,
    SiteName,
    Then,
    Type,
    Variant,
    app,
    order_of,
)
from tanren.cli.run import run_order, run_stage


def add_stage(group: typer.Typer, verb_name: str, stage: str, does: str) -> None:
    """Add a stage's verb to the command, or to a group of it."""

    def verb(
        recipe: RecipeFile, variant: Variant = None, name: Name = None, set_: Sets = None,
        runtime: Runtime = None, bind: Binds = None, site: SiteName = None, nodes: Nodes = None,
        hours: Hours = None, type_: Type = None, reservation: Reservation = None,
        after: AfterJobs = None, chain: Chain = 1, parts: Parts = None, needs: Needs = False,
        then: Then = None, allow_dirty: Dirty = False,
    ) -> None:  # fmt: skip
        from tanren.config.errors import RequestError

        if recipe.name.split(".")[0] != stage:
            from tanren.config.load import read_yaml
            from tanren.config.schema import STAGES

            if not recipe.exists():
                read_yaml(recipe)  # which says so, and what there is
            named = recipe.name.split(".")[0]
            raise RequestError(
                recipe, f"is not a {stage} recipe",
                f"tanren {named} {recipe}" if named in STAGES else f"name a task's {stage}.yaml",
            )  # fmt: skip
        order = order_of(
            recipe, variant, name, set_, runtime, bind, site, nodes, hours, type_, reservation,
            after, chain, parts, allow_dirty,
        )  # fmt: skip
        run_order(order, needs, then)

    example = f"Example: bin/tanren {stage} recipes/tiny/{stage}.yaml"
    group.command(verb_name, help=does, epilog=example)(verb)


# convert is a group of verbs, in cli/convert.py.
STAGE_VERBS = {
    "preprocess": "Text to tokens: tokenizer, and Megatron .bin/.idx files.",
    "midtrain": "Continued pre-training. The same command again goes on where it stopped.",
    "sft": "Supervised fine-tuning on conversations. The same command again goes on.",
    "dpo": "Tuning on preferences. The same command again goes on where it stopped.",
    "export": "A checkpoint to a Hugging Face folder.",
    "merge": "A soup: one Hugging Face model from several, by mergekit.",
    "eval": "The scores of an export, by lm-evaluation-harness.",
}
for name, does in STAGE_VERBS.items():
    add_stage(app, name, name, does)


@app.command(epilog="Example: bin/tanren bench recipes/tiny/midtrain.yaml --set micro_batch=4")
def bench(
    recipe: RecipeFile,
    steps: Annotated[
        int, typer.Option("--steps", min=4, help="in all; the last one is profiled")
    ] = 12,
    real: Annotated[
        bool, typer.Option("--real", help="the recipe's own data and base, in place of random ones")
    ] = False,
    save: Annotated[bool, typer.Option("--save", help="one checkpoint in the middle")] = False,
    variant: Variant = None, name: Name = None, set_: Sets = None, runtime: Runtime = None,
    bind: Binds = None, site: SiteName = None, nodes: Nodes = None, hours: Hours = None,
    type_: Type = None, reservation: Reservation = None, allow_dirty: Dirty = False,
) -> None:  # fmt: skip
    """How fast a training stage is on this machine, and where a step's time goes."""
    from dataclasses import replace

    from tanren.plan.bench import Bench
    from tanren.report import terminal

    order = order_of(recipe, variant, name, set_, runtime, bind, site, nodes, hours, type_,
                   reservation, allow_dirty=allow_dirty)  # fmt: skip
    measured = Bench(steps=steps, real=real, save=save)
    run_stage(replace(order, bench=measured), False, terminal.console())


@app.command(epilog="Example: bin/tanren plan recipes/tiny/midtrain.yaml --set steps=400")
def plan(
    recipe: RecipeFile, variant: Variant = None, name: Name = None, set_: Sets = None,
    runtime: Runtime = None, bind: Binds = None, site: SiteName = None, nodes: Nodes = None,
    hours: Hours = None, type_: Type = None, reservation: Reservation = None,
    after: AfterJobs = None, chain: Chain = 1, parts: Parts = None, allow_dirty: Dirty = False,
) -> None:  # fmt: skip
    """Print what a stage would do, and change nothing."""
    from tanren.launch.preview import preview
    from tanren.report import terminal
    from tanren.report.plan import print_plan

    found = preview(order_of(recipe, variant, name, set_, runtime, bind, site, nodes, hours, type_,
                             reservation, after, chain, parts, allow_dirty))  # fmt: skip
    print_plan(found, terminal.console())
    if found.other is not None:
        raise found.other
