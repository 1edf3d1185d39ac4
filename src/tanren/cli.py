"""The command: verbs only. Everything else is imported when a verb needs it."""

from __future__ import annotations

import os
import signal
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from tanren.config.errors import EXIT_STOPPED, EXIT_TERMINATED, TanrenError

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


class HubKind(str, Enum):
    """What a repository of the hub holds."""

    dataset = "dataset"
    model = "model"


def _order(
    recipe: Path, variant: str | None, name: str | None, sets: list[str] | None,
    runtime: str | None, binds: list[str] | None, site: str | None, nodes: int | None,
    hours: float | None, type_: str | None, reservation: str | None,
    after: list[str] | None = None, chain: int = 1, parts: int | None = None,
    allow_dirty: bool = False,
) -> Order:  # fmt: skip
    """The options of a verb as one value. SET="user.group=g" is user.toml's for this once."""
    from tanren.launch.submit import Order
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


def _stage_verb(stage: str, does: str) -> None:
    def verb(
        recipe: RecipeFile, variant: Variant = None, name: Name = None, set_: Sets = None,
        runtime: Runtime = None, bind: Binds = None, site: SiteName = None, nodes: Nodes = None,
        hours: Hours = None, type_: Type = None, reservation: Reservation = None,
        after: AfterJobs = None, chain: Chain = 1, parts: Parts = None, needs: Needs = False,
        then: Then = None, allow_dirty: Dirty = False,
    ) -> None:  # fmt: skip
        from tanren.config.errors import RequestError

        if recipe.name.split(".")[0] != stage:
            raise RequestError(
                recipe, f"is not a {stage} recipe", f"tanren {recipe.name.split('.')[0]} {recipe}"
            )
        order = _order(
            recipe, variant, name, set_, runtime, bind, site, nodes, hours, type_, reservation,
            after, chain, parts, allow_dirty,
        )  # fmt: skip
        _run(order, needs, then)

    example = f"Example: bin/tanren {stage} recipes/tiny/{stage}.yaml"
    app.command(stage, help=does, epilog=example)(verb)


_stage_verb("preprocess", "Text to tokens: tokenizer, and Megatron .bin/.idx files.")
_stage_verb("convert", "A Hugging Face base to a megatron-core checkpoint.")
_stage_verb("midtrain", "Continued pre-training. The same command again goes on where it stopped.")
_stage_verb("sft", "Supervised fine-tuning on conversations. The same command again goes on.")
_stage_verb("dpo", "Tuning on preferences. The same command again goes on where it stopped.")
_stage_verb("export", "A checkpoint to a Hugging Face folder.")
_stage_verb("eval", "The scores of an export, by lm-evaluation-harness.")


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

    order = _order(recipe, variant, name, set_, runtime, bind, site, nodes, hours, type_,
                   reservation, allow_dirty=allow_dirty)  # fmt: skip
    measured = Bench(steps=steps, real=real, save=save)
    _stage(replace(order, bench=measured), False, terminal.console())


@app.command(epilog="Example: bin/tanren plan recipes/tiny/midtrain.yaml --set steps=400")
def plan(
    recipe: RecipeFile, variant: Variant = None, name: Name = None, set_: Sets = None,
    runtime: Runtime = None, bind: Binds = None, site: SiteName = None, nodes: Nodes = None,
    hours: Hours = None, type_: Type = None, reservation: Reservation = None, parts: Parts = None,
) -> None:  # fmt: skip
    """Print what a stage would do, and change nothing."""
    from tanren.config.errors import RequestError
    from tanren.launch import clusters, fetching, local, queue, submit
    from tanren.launch import parts as parts_of
    from tanren.plan.make import make_plan
    from tanren.report import terminal
    from tanren.report.plan import print_plan

    order = _order(recipe, variant, name, set_, runtime, bind, site, nodes, hours, type_,
                   reservation, parts=parts)  # fmt: skip
    place = clusters.place_for(order)
    request = submit.read_request(order, queue.machine_of(place) if place else None)
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
    inside = submit.container_for(order, request, place.type.gpus if place else None)
    meeting = local.Meeting("THE_FIRST_HOST", queue.FIRST_PORT)
    script = local.script(planned.folder, planned.launch, 1, request.machine.cores, inside, meeting)
    scripts = [("on each node" if place else "job script", script)]
    if place:
        text = queue.script(planned.folder, place, request.task)
        scripts.insert(0, (f"job script for {place.site.scheduler}", text))
    if place and parts:
        cut = parts_of.cut(request, parts)
        done = sum(submit.look(part).done for _, part in cut)
        state += f"; {done} of {parts} parts are done" if done else ""
        text = queue.script(cut[0][1].folder, place, request.task)
        scripts.insert(0, (f"job script for {place.site.scheduler}, part 1 of {parts}", text))
    notes = fetching.notes(request.recipe, request.task)
    print_plan(planned, state, place, notes, scripts, terminal.console(), parts or 0)
    if refusal is not None:
        raise refusal


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

    order = _order(recipe, variant, None, set_, None, None, None, None, None, None, None)
    read, mixture, notes = compile_mix(order, counts)
    screen = terminal.console()
    if as_json:
        screen.print(table.as_json(mixture, read, notes), markup=False)
        return
    table.print_mix(mixture, read, screen)
    for note in notes:
        screen.print(f"note: {note}", markup=False)


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
    from tanren.launch import fetching, submit, tools
    from tanren.plan.make import make_plan
    from tanren.plan.plan import TuningPlan
    from tanren.report import conversation, terminal

    folder = Path(task) if Path(task).is_dir() else repository() / "recipes" / task
    order = _order(folder / f"{stage}.yaml", variant, name, set_, runtime, bind, "local", None,
                   None, None, None)  # fmt: skip
    request = submit.read_request(order)
    planned = make_plan(request)
    if not isinstance(planned, TuningPlan):
        raise RequestError(f"show {stage}", "shows no conversations", "tanren show sft|dpo TASK")
    submit.refuse_given(order, request.recipe)
    if planned.tokenizer is None:
        submit.refuse_missing(order, request)
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
    order = _order(recipe, variant, name, None, runtime, bind, "local", None, None, None, None)
    stage = order.recipe_file.stem
    export = str(tools.newest_export(order))
    words = ["--tokens", str(tokens), "--seed", str(seed)]
    words += [] if stage == "midtrain" else ["--chat"]
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


@app.command(epilog="Example: bin/tanren submission recipes/tiny/dpo.yaml --max-tokens 512")
def submission(
    recipe: RecipeFile,
    base: Annotated[
        Optional[str],
        typer.Option("--base", help="train or cpu, the image below; else train where it is built"),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="of an answer; as what follows, a default")
    ] = 1024,
    temperature: Annotated[float, typer.Option("--temperature", min=0)] = 0.0,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 16,
    question: Annotated[
        str, typer.Option("--question", help="how a line's problem is asked")
    ] = "{problem}",
    variant: Variant = None, name: Name = None, runtime: Runtime = None,
) -> None:  # fmt: skip
    """An image that answers with a run's newest export: jsonl in, jsonl out, no network."""
    from tanren.config.errors import RequestError
    from tanren.images.submission import Settings, base_image, build
    from tanren.launch import container, tools
    from tanren.launch.machine import visible_gpus
    from tanren.launch.submit import shown
    from tanren.plan.paths import RunFolder
    from tanren.report import terminal

    if "{problem}" not in question:
        raise RequestError("--question", "has no {problem} in it", "'Answer: {problem}'")
    order = _order(recipe, variant, name, None, runtime, None, "local", None, None, None, None)
    model = tools.newest_export(order)
    target = RunFolder(model.parents[1]).submission / f"{model.name}.sif"
    tool, places = container.require(runtime), container.places(gpu=bool(visible_gpus()))
    below = base_image(places.images, base)
    settings = Settings(
        max_tokens=max_tokens, temperature=temperature, batch_size=batch_size, question=question
    )
    screen = terminal.console()
    signal.signal(signal.SIGTERM, _terminated)
    with terminal.working(screen) as report:
        lock = build(model, target, below, settings, tool.builder, places, report)
    terminal.print_image(target, lock, screen)
    gpu = below[1].image == "train"
    screen.print(f"  try it     {tool.name} run {'--nv ' if gpu else ''}--net --network none "
                 f"{shown(target)} --input_path IN.jsonl --output_path OUT.jsonl",
                 markup=False, soft_wrap=True)  # fmt: skip
    if not gpu:
        screen.print("  note       its torch is the CPU's; with BASE=train it uses a GPU")


image = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Container images.")
app.add_typer(image, name="image")
ImageName = Annotated[
    Optional[str],
    typer.Argument(metavar="[IMAGE]", help="train, te19, nemo, merge or cpu; else this machine's"),
]


@image.command("build", epilog="Example: bin/tanren image build cpu")
def image_build(name: ImageName = None, runtime: Runtime = None) -> None:
    """Build an image: packages, %test, lock. A build that fails leaves the one before."""
    from tanren.images.build import build
    from tanren.images.definition import image_named
    from tanren.images.lock import image_file
    from tanren.launch import container
    from tanren.launch.machine import visible_gpus
    from tanren.report import terminal

    wanted = image_named(name) if name else container.default_image(visible_gpus())
    tool, places = container.require(runtime), container.places(gpu=bool(visible_gpus()))
    screen = terminal.console()
    screen.print(
        f"building {wanted.name} with {tool.version}   log {places.images / wanted.name}.build.log"
    )
    # A scheduler's or a shell's SIGTERM ends a build as Ctrl-C does: nothing half stays.
    signal.signal(signal.SIGTERM, _terminated)
    with terminal.working(screen) as report:
        lock, notes = build(wanted, tool.builder, places, report)
    terminal.print_image(image_file(places.images, wanted), lock, screen)
    for note in notes:
        screen.print(f"  note       {note}")


@image.command("info", epilog="Example: bin/tanren image info cpu")
def image_info(name: ImageName = None, runtime: Runtime = None) -> None:
    """What an image is: its lock, and the labels inside it, compared."""
    from tanren.images.build import info
    from tanren.images.definition import image_named
    from tanren.images.lock import image_file
    from tanren.launch import container
    from tanren.launch.machine import visible_gpus
    from tanren.report import terminal

    places = container.places(gpu=False)
    wanted = image_named(name) if name else container.default_image(visible_gpus())
    path = image_file(places.images, wanted)
    lock, labels = info(path, container.require(runtime).builder, places.cache)
    terminal.print_image(path, lock, terminal.console(), labels)


@image.command("lock", epilog="Example: bin/tanren image lock train --upgrade")
def image_lock(
    names: Annotated[
        Optional[list[str]],
        typer.Argument(
            metavar="[LOCK]...", help="images, native (.venv), eval or debian; else all"
        ),
    ] = None,
    upgrade: Annotated[bool, typer.Option("--upgrade", help="take the newest versions")] = False,
) -> None:
    """Write containers/locks anew: exact versions and hashes."""
    from tanren.images.definition import IMAGES, image_named
    from tanren.images.lock import renew_system_lock
    from tanren.images.requirements import renew
    from tanren.launch import container
    from tanren.launch.submit import shown
    from tanren.report import terminal

    wanted = names or ["native", "eval", *IMAGES]
    python = [name for name in wanted if name != "debian"]
    for name in python:
        if name not in ("native", "eval"):
            image_named(name)
    changed = renew(python, upgrade=upgrade)
    if "debian" in wanted:
        changed += renew_system_lock(container.images_folder())
    screen = terminal.console()
    for path in changed:
        screen.print(f"changed {shown(path)}")
    if not changed:
        screen.print("the locks are what they were")


@app.command(epilog="Example: bin/tanren shell cpu --bind /data")
def shell(
    name: ImageName = None, runtime: Runtime = None, bind: Binds = None
) -> None:  # fmt: skip
    """A shell in an image, with the repository and the runs in it."""
    from tanren.launch import container
    from tanren.launch.machine import visible_gpus
    from tanren.launch.submit import runs_root

    container.open_shell(name, runtime, visible_gpus(), runs_root(), tuple(bind or ()))


def _run(order: Order, needs: bool, then: str | None) -> None:
    from dataclasses import replace

    from tanren.plan.site import Wish
    from tanren.report import terminal

    screen, stage = terminal.console(), order.recipe_file.stem
    jobs = _stage(order, needs, screen)
    if then is not None:
        recipe = order.recipe_file.with_name(f"{then}.yaml")
        # An export's recipe says the midtraining's; of other stages it makes a folder of its own.
        of = () if stage == "midtrain" else (f"of=stage:{stage}",)
        after = replace(
            order, recipe_file=recipe, assignments=of, plain_if_absent=True, wish=Wish(), chain=1,
            parts=None, after=jobs[-1:],
        )  # fmt: skip
        _stage(after, False, screen)


def _stage(order: Order, needs: bool, screen: Console) -> tuple[str, ...]:
    """Run one stage, and before it what it stands on if asked to; on a cluster, submit them.

    Returns:
        the scheduler's jobs of the stage; none where it ran here or is done.
    """
    from tanren.launch import clusters, fetching, parts, submit
    from tanren.plan.make import make_plan
    from tanren.report import terminal

    place = clusters.place_for(order)
    if place is not None:
        return clusters.send(order, place, needs, screen.print)
    request = submit.read_request(order)
    submit.refuse_given(order, request.recipe)
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
        return ()
    submit.refuse_missing(order, request)
    parts.refuse_at_work(planned.folder)
    for note in planned.notes:
        screen.print(f"note: {note}", markup=False, highlight=False)
    submit.check_disk(planned)
    changed = submit.uncommitted()
    if changed:
        screen.print(f"note: {changed}", markup=False, highlight=False)
    if fetching.fetch_missing(request.recipe, lambda: terminal.fetching(screen), screen.print):
        request = submit.read_request(order)
        planned = make_plan(request)
    inside = submit.container_for(order, request)
    submit.make_ready(planned.stage, inside)
    if request.machine.idle_gpus and planned.launch.engine:
        screen.print(
            f"{request.machine.idle_gpus} GPUs stay idle: the engine needs Transformer Engine for "
            "them, and this Python has none; running on the CPU",
            highlight=False,
        )
    if start.iteration:
        screen.print(f"{planned.stage} goes on from iteration {start.iteration}")
    watch, close = terminal.watching(planned, screen)
    try:
        ending = submit.start(planned, request.machine.cores, inside, watch)
    finally:
        close()
    if ending is not None:
        raise ending
    terminal.summary(planned, screen)
    return ()


@app.command(epilog="Example: bin/tanren pipeline recipes/tiny --stages convert,midtrain,export")
def pipeline(
    task: Annotated[Path, typer.Argument(help="a recipe folder, recipes/TASK")],
    stages: Annotated[str, typer.Option("--stages", help="in their order, with commas")],
    variant: Variant = None, name: Name = None, runtime: Runtime = None, bind: Binds = None,
    set_: Sets = None, site: SiteName = None, nodes: Nodes = None, hours: Hours = None,
    type_: Type = None, reservation: Reservation = None, after: AfterJobs = None, chain: Chain = 1,
    allow_dirty: Dirty = False,
) -> None:  # fmt: skip
    """Several stages, one after the other; on a cluster all are submitted with dependencies.

    Sizes and fields (--nodes, --set ...) are the training stages'.
    """
    from dataclasses import replace

    from tanren.config.errors import RequestError
    from tanren.config.schema import STAGES
    from tanren.launch import submit
    from tanren.plan.paths import PREPARING_STAGES, TRAINING_STAGES
    from tanren.plan.site import Wish
    from tanren.report import terminal

    wanted = [stage for stage in stages.split(",") if stage]
    for stage in wanted:
        if stage not in STAGES:
            raise RequestError(
                f"--stages {stages}", f"{stage} is no stage", f"the stages are {', '.join(STAGES)}"
            )
    given = _order(task / "stage.yaml", variant, name, set_, runtime, bind, site, nodes, hours,
                   type_, reservation, after, chain, allow_dirty=allow_dirty)  # fmt: skip
    orders = []
    for number, stage in enumerate(wanted):
        order = replace(given, recipe_file=task / f"{stage}.yaml", plain_if_absent=True)
        if stage not in TRAINING_STAGES:
            order = replace(order, assignments=(), wish=Wish(), chain=1)
        if stage in PREPARING_STAGES:
            order = replace(order, variant=None, name=None)
        if number:
            order = replace(order, after=())
        submit.refuse_given(order, submit.recipe_of(order)[1])
        orders.append(order)
    screen = terminal.console()
    for order in orders:
        _stage(order, False, screen)


@app.command(epilog="Example: bin/tanren gate recipes/tiny/midtrain.yaml --fp8 delayed,blockwise")
def gate(
    recipe: RecipeFile,
    steps: Annotated[int, typer.Option("--steps", min=1, help="of each run")] = 200,
    fp8: Annotated[
        Optional[list[str]],
        typer.Option("--fp8", help="delayed,tensorwise,blockwise; else the recipe's or tensorwise"),
    ] = None,
    limit: Annotated[
        float, typer.Option("--limit", min=0.001, help="of a relative difference, in percent")
    ] = 0.5,
    control: Annotated[
        bool, typer.Option("--control", help="bf16 a second time: how far chance alone leads")
    ] = False,
    variant: Variant = None, name: Name = None, set_: Sets = None, runtime: Runtime = None,
    bind: Binds = None, site: SiteName = None, nodes: Nodes = None, hours: Hours = None,
    type_: Type = None, reservation: Reservation = None, needs: Needs = False,
    allow_dirty: Dirty = False,
) -> None:  # fmt: skip
    """Whether FP8 trains as bf16 does: the same steps in each, and their losses compared.

    The learning rate stays at its peak after the warm-up. Of a finished run the curves stay and the
    weights go. Exit code 1 says that FP8 is refused.
    """
    from tanren.config.errors import WorkError
    from tanren.launch import clusters
    from tanren.launch import gate as gates
    from tanren.plan.gate import CONTROL, compare
    from tanren.report import gate as report
    from tanren.report import terminal

    screen = terminal.console()
    order = _order(recipe, variant, name, set_, runtime, bind, site, nodes, hours, type_,
                   reservation, allow_dirty=allow_dirty)  # fmt: skip
    stated = tuple(one for text in fp8 or [] for one in text.split(",") if one)
    trials = gates.trials(order, stated, steps, control=control)
    pending = [trial for trial in trials if not trial.is_done]
    if pending and clusters.place_for(order) is not None:
        for trial in pending:
            _stage(trial.order, needs, screen)
        screen.print("once they are done, the same command compares them")
        return
    if pending:
        gates.check(trials, pending)
    failed: dict[str, str] = {}
    for trial in pending:
        try:
            _stage(trial.order, needs, screen)
        except TanrenError as error:
            # One that was stopped goes on; and without bf16 there is nothing to compare with.
            if trial is trials[0] or error.exit_code == EXIT_STOPPED:
                raise
            failed[trial.scaling] = f"{error.place}: {error.problem}"
        else:
            gates.drop_checkpoints(trial)  # before the next one needs the room
    finished = [trial for trial in trials if trial.scaling not in failed]
    for trial in finished:
        gates.drop_checkpoints(trial)  # those that jobs have left
    curves = {trial.scaling: gates.read_curves(trial) for trial in finished}
    bf16, *others = (trial.scaling for trial in trials)
    compared = {one: compare(curves[bf16], curves[one]) for one in others if one in curves}
    share = limit / 100
    folder = gates.write(order, trials, compared, share, failed)
    svg = report.picture(f"{folder.parent.name}/{recipe.stem}", curves, compared, share)
    (folder / "gate.svg").write_text(svg)
    report.print_gate(compared, failed, steps, share, screen)
    screen.print(f"  {folder / 'gate.json'}, gate.svg", markup=False)
    refused = [
        one
        for one in others
        if one != CONTROL and (one in failed or not compared[one].passes(share))
    ]
    if refused:
        advice = "--set fp8=none, or try the others: --fp8 delayed,tensorwise,blockwise"
        if not control:
            advice += "; --control shows how far apart two runs in bf16 are"
        raise WorkError(
            "the FP8 gate",
            f"refuses {', '.join(refused)}: the loss is not that of bf16 within {limit:g} %",
            advice,
        )


RunName = Annotated[str, typer.Argument(metavar="RUN", help="a run folder, or TASK/RUN")]


@app.command(hidden=True)
def job(run: Path, segment: Annotated[int, typer.Option("--segment")] = 1) -> None:
    """What a scheduler's job calls on its first node."""
    from tanren.launch import job as jobs
    from tanren.plan.paths import RunFolder
    from tanren.plan.plan import TrainingPlan, read_plan
    from tanren.report import terminal

    screen = terminal.console()
    ending = jobs.run(
        RunFolder(run), segment, lambda plan: terminal.watching(plan, screen)[0], screen.print
    )
    if ending is not None:
        raise ending
    done = read_plan(RunFolder(run).plan)
    if done.bench is not None:
        # Nobody waits at a terminal: it goes to the job's log.
        terminal.summary(done, screen)
    elif isinstance(done, TrainingPlan):
        terminal.print_report(done.folder, screen, write=True)


@app.command(epilog="Example: bin/tanren status")
def status() -> None:
    """Every run: its state, its job, how far it is."""
    from tanren.launch import clusters
    from tanren.launch.submit import runs_root
    from tanren.report import terminal

    root = runs_root()
    terminal.print_status(clusters.status(root), root, terminal.console())


@app.command(epilog="Example: bin/tanren report tiny/midtrain tiny/midtrain-hot")
def report(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="a run folder, or TASK/RUN; others laid over it"),
    ],
    out: Annotated[
        Optional[Path], typer.Option("--out", help="a file; else in the first run's folder")
    ] = None,
) -> None:
    """One HTML file about a run, or about several compared, that opens without a network."""
    from tanren.launch import clusters
    from tanren.launch.submit import runs_root, shown
    from tanren.report import page, terminal

    root = runs_root()
    path = page.write([clusters.folder_of(run, root) for run in runs], out)
    terminal.console().print(f"  report     {shown(path)}", markup=False)


@app.command("wandb-sync", epilog="Example: bin/tanren wandb-sync tiny/midtrain")
def wandb_sync(run: RunName) -> None:
    """Send Weights & Biases what it has not yet of a run's metrics; needs a key and a network."""
    from tanren import tracking
    from tanren.launch import clusters
    from tanren.launch.submit import runs_root
    from tanren.report import terminal

    sent = tracking.sync(clusters.folder_of(run, runs_root()))
    terminal.console().print(f"  {sent.lines:,} lines sent, {sent.there:,} are there"
                             f"{': ' + sent.url if sent.url else ''}", markup=False)  # fmt: skip


@app.command(epilog="Example: bin/tanren cancel tiny/midtrain")
def cancel(
    run: RunName, now: Annotated[bool, typer.Option("--now", help="without saving")] = False
) -> None:
    """End a run's jobs; a training stage saves first."""
    from tanren.launch import clusters, queue
    from tanren.launch.submit import runs_root
    from tanren.report import terminal

    terminal.console().print(queue.cancel(clusters.folder_of(run, runs_root()), now=now))


@app.command(epilog="Example: bin/tanren logs tiny/midtrain --follow")
def logs(
    run: RunName, follow: Annotated[bool, typer.Option("--follow", help="as tail -f does")] = False
) -> None:
    """The newest log of a run."""
    from tanren.launch import clusters
    from tanren.launch.submit import runs_root

    log = clusters.newest_log(clusters.folder_of(run, runs_root()))
    sys.stdout.flush()
    os.execvp("tail", ["tail", "-n", "40", *(["-F"] if follow else []), str(log)])


@app.command(epilog="Example: bin/tanren reproduce tiny/midtrain")
def reproduce(
    run: RunName,
    force: Annotated[
        bool, typer.Option("--force", help="although something differs; the passport says what")
    ] = False,
    name: Annotated[
        Optional[str], typer.Option("--name", help="of the replay; else a number")
    ] = None,
) -> None:
    """A run once more from its passport: its commit, image and data, in a new run folder.

    The run is not touched. What it stands on is taken from where it is, or from the replay of the
    same name where that has it.
    """
    from tanren.launch import clusters
    from tanren.launch import compare as comparing
    from tanren.launch import reproduce as replays
    from tanren.launch.submit import check_name, runs_root, shown
    from tanren.report import compare as report
    from tanren.report import terminal

    screen = terminal.console()
    if name is not None:
        check_name(name)
    replay = replays.look(clusters.folder_of(run, runs_root()), name)
    replays.refuse(replay, force)
    for line in replay.differences:
        screen.print(f"note: {line}", markup=False)
    words, environment = replays.prepare(replay, force)
    code = replays.call(words, environment)
    if code:
        raise typer.Exit(code)
    if not replay.folder.done.exists():
        screen.print(f"once it is done: bin/tanren diff {run} {shown(replay.folder.root)}")
        return
    compared = comparing.compare(replay.of, replay.folder)
    for line in compared.groups["result"]:
        screen.print(f"  made       {line}", markup=False)
    report.print_curves(compared, screen)
    same = "is the same, bit for bit" if compared.same_result else "is not the same"
    screen.print(f"{shown(replay.folder.root)} {same}", markup=False)


@app.command(epilog="Example: bin/tanren diff tiny/midtrain tiny/midtrain-try2")
def diff(
    one: Annotated[str, typer.Argument(metavar="RUN_A", help="a run folder, or TASK/RUN")],
    other: Annotated[str, typer.Argument(metavar="RUN_B", help="another run of the same stage")],
) -> None:
    """In what two runs of a stage differ, and their loss curves side by side."""
    from tanren.launch import clusters
    from tanren.launch.compare import compare
    from tanren.launch.submit import runs_root
    from tanren.report import terminal
    from tanren.report.compare import print_compared

    there, here = (clusters.folder_of(run, runs_root()) for run in (one, other))
    print_compared(compare(there, here), one, other, terminal.console())


def main() -> None:
    """The entry point: errors become one message and the contract's exit codes."""
    try:
        code = app(standalone_mode=False)
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
        code = getattr(error, "exit_code", None)
        show = getattr(error, "show", None)
        if code is not None and show is not None:
            show()
            sys.exit(2)
        from tanren.report.terminal import print_error

        print_error(f"{type(error).__name__}: {error}\n  next: TANREN_DEBUG=1 shows where")
        sys.exit(1)


def _terminated(number: int, frame: object) -> None:
    raise typer.Exit(EXIT_TERMINATED)


def _say(error: TanrenError) -> None:
    if os.environ.get("TANREN_DEBUG"):
        import traceback

        traceback.print_exception(error)
    from tanren.report.terminal import print_error

    print_error(error.text())


if __name__ == "__main__":
    main()
