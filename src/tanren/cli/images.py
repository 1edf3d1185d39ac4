"""Container images: built, named, locked, opened, and with a model in them."""

from __future__ import annotations

import signal
from typing import Annotated, Optional

import typer

from tanren.cli.command import (
    Binds,
    Name,
    RecipeFile,
    Runtime,
    Variant,
    app,
    order_of,
    terminated,
)


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
    from tanren.launch.orders import shown
    from tanren.plan.paths import RunFolder
    from tanren.report import terminal

    if "{problem}" not in question:
        raise RequestError("--question", "has no {problem} in it", "'Answer: {problem}'")
    order = order_of(recipe, variant, name, None, runtime, None, "local", None, None, None, None)
    model = tools.newest_export(order)
    target = RunFolder(model.parents[1]).submission / f"{model.name}.sif"
    tool, places = container.require(runtime), container.places(gpu=bool(visible_gpus()))
    below = base_image(places.images, base)
    settings = Settings(
        max_tokens=max_tokens, temperature=temperature, batch_size=batch_size, question=question
    )
    screen = terminal.console()
    signal.signal(signal.SIGTERM, terminated)
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
    signal.signal(signal.SIGTERM, terminated)
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
    from tanren.images.requirements import APART, renew
    from tanren.launch import container
    from tanren.launch.orders import shown
    from tanren.report import terminal

    wanted = names or [*APART, *IMAGES]
    python = [name for name in wanted if name != "debian"]
    for name in python:
        if name not in APART:
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
    from tanren.launch.orders import runs_root

    container.open_shell(name, runtime, visible_gpus(), runs_root(), tuple(bind or ()))
