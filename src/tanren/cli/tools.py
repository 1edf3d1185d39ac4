"""What leaves no run behind: data fetched or looked at, a model's answers, this machine."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Optional

import typer

from tanren.cli.command import (
    Binds,
    Name,
    RecipeFile,
    Runtime,
    Sets,
    SiteName,
    Variant,
    app,
    order_of,
)


@app.command(epilog="Example: bin/tanren mix recipes/tiny/midtrain.yaml --set mix.max_epochs=2")
def mix(
    recipe: RecipeFile, variant: Variant = None, set_: Sets = None,
    counts: Annotated[
        Optional[Path],
        typer.Option("--counts", help="a table of NAME<TAB>TOKENS in place of the data's counts"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:  # fmt: skip
    """Print what a recipe's mix takes of each source, also before there is data."""
    from tanren.launch.mix import compile_mix
    from tanren.report import mix as table
    from tanren.report import terminal

    order = order_of(recipe, variant, None, set_, None, None, None, None, None, None, None)
    read, mixture, notes = compile_mix(order, counts)
    screen = terminal.console()
    if as_json:
        screen.print(table.as_json(mixture, read, notes), markup=False)
        return
    table.print_mix(mixture, read, screen)
    for note in notes:
        screen.print(f"note: {note}", markup=False)


class HubKind(str, Enum):
    """What a repository of the hub holds."""

    dataset = "dataset"
    model = "model"


@app.command(epilog="Example: bin/tanren fetch recipes/tiny")
def fetch(
    targets: Annotated[
        list[str],
        typer.Argument(metavar="TARGET...", help="recipes, recipes/TASK, hf:owner/name@revision"),
    ],
    variant: Variant = None,
    files: Annotated[
        Optional[list[str]],
        typer.Option("--files", help="of hf:..., a glob; ** spans folders; repeatable"),
    ] = None,
    kind: Annotated[
        HubKind, typer.Option("--kind", help="of hf:..., dataset or model")
    ] = HubKind.dataset,
    verify: Annotated[bool, typer.Option("--verify", help="hash again what is there")] = False,
    update: Annotated[
        bool, typer.Option("--update", help="ask anew what branches and tags are")
    ] = False,
    workers: Annotated[int, typer.Option("--workers", min=1, help="files at a time")] = 8,
) -> None:
    """Fetch what recipes take from the Hugging Face hub; what is there is not fetched again."""
    from tanren.launch import fetching
    from tanren.report import terminal

    screen = terminal.console()
    wanted = fetching.of_targets(targets, variant, kind.value, tuple(files or ()))
    for one in wanted:
        found = fetching.fetch_shown(
            one, lambda: terminal.fetching(screen), screen.print,
            workers=workers, verify=verify, update=update,
        )  # fmt: skip
        screen.print(f"  {found.folder}", markup=False)
    if not wanted:
        screen.print("nothing to fetch: these recipes take nothing from the hub")


@app.command(
    epilog="Example: bin/tanren tokenize --input 'text/*.jsonl.gz' --tokenizer llm-jp.model "
    "--output-prefix tokens/web --append-eod"
)
def tokenize(
    input_: Annotated[str, typer.Option("--input", help="a file, a quoted glob, or a folder")],
    tokenizer: Annotated[
        Path, typer.Option("--tokenizer", help="a Hugging Face folder, or a SentencePiece model")
    ],
    output_prefix: Annotated[Path, typer.Option("--output-prefix", help="of the .bin and .idx")],
    workers: Annotated[
        Optional[int], typer.Option("--workers", min=1, help="processes; without it one a core")
    ] = None,
    append_eod: Annotated[bool, typer.Option("--append-eod", help="after each document")] = False,
    prepend_bos: Annotated[bool, typer.Option("--prepend-bos", help="before each one")] = False,
    text_key: Annotated[str, typer.Option("--text-key", help="where a line has its text")] = "text",
    skip: Annotated[
        bool, typer.Option("--skip-errors", help="pass over lines that are no documents")
    ] = False,
) -> None:
    """Text to Megatron's .bin/.idx by hand, without a recipe; the same command again goes on."""
    from tanren.launch import native
    from tanren.report import terminal

    native.complete()
    from tanren.data import tokenize as tokenizing
    from tanren.data.shards import Settings

    settings = Settings(append_eod, prepend_bos, "skip" if skip else "stop")
    screen = terminal.console()
    with terminal.working(screen) as report:
        made = tokenizing.by_hand(
            input_, tokenizer, output_prefix, settings, text_key=text_key,
            workers=workers or tokenizing.cores(),
            watch=lambda now: report(terminal.tokenized(vars(now))),
        )  # fmt: skip
    screen.print(f"{made.documents:,} documents, {made.tokens:,} tokens: {output_prefix}.bin, .idx"
                 f"   ({made.empty:,} empty, {made.skipped:,} lines passed over)")  # fmt: skip


@app.command(epilog="Example: bin/tanren show sft tiny --n 3")
def show(
    stage: Annotated[str, typer.Argument(metavar="sft|dpo")],
    task: Annotated[str, typer.Argument(metavar="TASK", help="a folder in recipes, or its path")],
    n: Annotated[int, typer.Option("--n", min=1, help="examples of each data set")] = 3,
    variant: Variant = None, name: Name = None, set_: Sets = None, runtime: Runtime = None,
    bind: Binds = None,
) -> None:  # fmt: skip
    """Examples as the model is trained on them, with what the loss is on marked."""
    import orjson

    from tanren.config.errors import RequestError
    from tanren.config.load import repository
    from tanren.launch import fetching, orders, reading, tools
    from tanren.plan.make import make_plan
    from tanren.plan.plan import TuningPlan
    from tanren.report import conversation, terminal

    folder = Path(task) if Path(task).is_dir() else repository() / "recipes" / task
    order = order_of(folder / f"{stage}.yaml", variant, name, set_, runtime, bind, "local", None,
                   None, None, None)  # fmt: skip
    request = reading.read_request(order)
    planned = make_plan(request)
    if not isinstance(planned, TuningPlan):
        raise RequestError(f"show {stage}", "shows no conversations", "tanren show sft|dpo TASK")
    orders.refuse_given(order, request.recipe)
    if planned.tokenizer is None:
        reading.refuse_missing(order, request)
    screen = terminal.console()
    fetching.fetch_missing(request.recipe, lambda: terminal.fetching(screen), screen.print)
    given = planned.model_dump_json().encode()
    for line in tools.output_of(order, "tanren.stages.show", [str(n)], given).splitlines():
        one = orjson.loads(line)
        conversation.print_example(
            one["title"], one["pieces"], screen, tokens=one["tokens"], trained=one["trained"]
        )


@app.command(epilog="Example: bin/tanren generate recipes/tiny/sft.yaml --prompt 'What is a list?'")
def generate(
    recipe: RecipeFile,
    prompt: Annotated[Optional[str], typer.Option("--prompt", help="what a person asks")] = None,
    prompts: Annotated[
        Optional[Path],
        typer.Option("--prompts", help="a .jsonl of prompts or messages; answers go beside it"),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="of --prompts, at a time")] = 16,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="of the answer, at most")] = 200,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    variant: Variant = None, name: Name = None, runtime: Runtime = None, bind: Binds = None,
) -> None:  # fmt: skip
    """What the newest export of a run answers, or how it goes on from a text (midtrain)."""
    from dataclasses import replace

    from tanren.config.errors import RequestError
    from tanren.launch import tools
    from tanren.report import terminal

    if bool(prompt) == (prompts is not None):
        raise RequestError(
            "--prompt", "is empty" if prompts is None else "and --prompts are two things to answer",
            'make generate STAGE=sft PROMPT="...", or PROMPTS=file.jsonl',
        )  # fmt: skip
    order = order_of(recipe, variant, name, None, runtime, bind, "local", None, None, None, None)
    stage = order.recipe_file.stem
    export = str(tools.newest_export(order))
    words = ["--tokens", str(tokens), "--seed", str(seed)]
    words += ["--chat"] if tools.asks_by_template(stage, Path(export)) else []
    if prompts is not None:
        file, output = prompts.absolute(), tools.answers_file(prompts.absolute())
        words += ["--file", str(file), "--output", str(output), "--batch", str(batch)]
        # A container sees the folder of the prompts as well, where the answers go.
        order = replace(order, binds=(*order.binds, str(file.parent)))
        tools.output_of(order, "tanren.stages.generate", [export, *words], gpus=True)
        terminal.console().print(f"answers: {output}", markup=False, soft_wrap=True)
        return
    assert prompt
    words = [export, prompt, *words]
    answer = tools.output_of(order, "tanren.stages.generate", words).decode()
    terminal.console().print(answer.rstrip(), markup=False)


@app.command(epilog="Example: bin/tanren doctor --site local")
def doctor(
    site: SiteName = None,
    gpus: Annotated[
        bool, typer.Option("--gpus", help="measure every GPU and what joins them, a minute or two")
    ] = False,
    runtime: Runtime = None, bind: Binds = None,
) -> None:  # fmt: skip
    """What this machine has and lacks for each stage, and what to do; changes nothing."""
    from tanren.launch import doctor as doctors
    from tanren.launch import health
    from tanren.report import terminal
    from tanren.report.doctor import print_groups

    screen = terminal.console()
    groups = doctors.examine(site)
    print_groups(groups, screen)
    if gpus:
        measured = health.examine(runtime, tuple(bind or ()))
        print_groups([measured], screen)
        groups.append(measured)
    refusal = doctors.lacking(groups)
    if refusal is not None:
        raise refusal
