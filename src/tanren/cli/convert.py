"""`tanren convert`: the stage by a recipe, and conversions by hand."""

from __future__ import annotations

import signal
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from typer.core import TyperGroup

from tanren.cli.command import app, terminated
from tanren.cli.stages import add_stage

if TYPE_CHECKING:
    from tanren.convert.interchange import Made


class RecipeOrConversion(TyperGroup):
    """The first word is a conversion's name; else all of them are those of the stage."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = [STAGE, *args]
        return super().parse_args(ctx, args)


STAGE = "recipe"
convert = typer.Typer(
    cls=RecipeOrConversion, no_args_is_help=True, rich_markup_mode=None,
    pretty_exceptions_enable=False,
)  # fmt: skip
app.add_typer(
    convert, name="convert",
    help="A Hugging Face base to a megatron-core checkpoint, by a recipe (RECIPE in place of "
    "COMMAND); checkpoints in and out by hand.",
    epilog="Example: bin/tanren convert recipes/tiny/convert.yaml",
)  # fmt: skip
add_stage(convert, STAGE, "convert", "The stage: what a recipe's convert.yaml says.")


class Dtype(str, Enum):
    """Types that weights are converted to."""

    bf16 = "bf16"
    fp32 = "fp32"


Source = Annotated[Path, typer.Argument(metavar="SRC", help="the folder that is read")]
Target = Annotated[Path, typer.Argument(metavar="DST", help="the folder that is made")]
Type = Annotated[
    Optional[Dtype], typer.Option("--dtype", help="of the weights; without it as they are")
]
Force = Annotated[bool, typer.Option("--force", help="replace a model that is in DST")]
Like = Annotated[
    Optional[Path],
    typer.Option("--like", help="a Hugging Face folder: its config.json, tokenizer, template"),
]
Verify = Annotated[
    bool,
    typer.Option("--verify", help="compute with both sides on the CPU, and refuse what differs"),
]
ShardSize = Annotated[
    str, typer.Option("--max-shard-size", help="of a safetensors file, e.g. 500MB")
]


@convert.command(
    "hf-to-mcore",
    epilog="Example: bin/tanren convert hf-to-mcore models/llm-jp-4-8b checkpoints/llm-jp-4-8b",
)
def hf_to_mcore(
    source: Source, target: Target, dtype: Type = None, force: Force = False,
    verify: Verify = False,
) -> None:  # fmt: skip
    """A Hugging Face folder to a megatron-core checkpoint, for any layout."""
    _by_hand("hf_to_mcore", source, target, dtype, force, verify)


@convert.command(
    "mcore-to-hf",
    epilog="Example: bin/tanren convert mcore-to-hf checkpoints/llm-jp-4-8b models/back",
)
def mcore_to_hf(
    source: Source, target: Target, dtype: Type = None, force: Force = False,
    verify: Verify = False, max_shard_size: ShardSize = "5GB", like: Like = None,
    trust: Annotated[
        bool, typer.Option("--trust", help="run what the files of SRC say, if it comes to that")
    ] = False,
) -> None:  # fmt: skip
    """A checkpoint of megatron-core or Megatron-LM, of any layout, to a Hugging Face folder."""
    _by_hand(
        "mcore_to_hf", source, target, dtype, force, verify, max_shard_size, like=like, trust=trust
    )


class Format(str, Enum):
    """NeMo's two formats."""

    nemo1 = "nemo1"
    nemo2 = "nemo2"


@convert.command(
    "hf-to-nemo",
    epilog="Example: bin/tanren convert hf-to-nemo models/llm-jp-4-8b checkpoints/llm-jp-4-8b-nemo",
)
def hf_to_nemo(
    source: Source, target: Target, dtype: Type = None, force: Force = False,
    verify: Verify = False,
    format_: Annotated[
        Format, typer.Option("--format", help="NeMo's; nemo1 also as a file DST.nemo")
    ] = Format.nemo2,
) -> None:  # fmt: skip
    """A Hugging Face folder to a NeMo checkpoint."""
    _by_hand("hf_to_nemo", source, target, dtype, force, verify, kind=format_.value)


@convert.command(
    "nemo-to-hf",
    epilog="Example: bin/tanren convert nemo-to-hf results/sft models/llm-jp-4-8b-sft",
)
def nemo_to_hf(
    source: Source, target: Target, dtype: Type = None, force: Force = False,
    verify: Verify = False, max_shard_size: ShardSize = "5GB", like: Like = None,
) -> None:  # fmt: skip
    """A checkpoint of NeMo 1 or 2, or the run that holds it, to a Hugging Face folder."""
    _by_hand("nemo_to_hf", source, target, dtype, force, verify, max_shard_size, like=like)


def _by_hand(
    name: str, source: Path, target: Path, dtype: Dtype | None, force: bool, verify: bool,
    max_shard_size: str = "5GB", **more: Any,
) -> None:  # fmt: skip
    """Run a function of convert/interchange.py or convert/nemo.py, and say what it made."""
    import time

    from tanren.launch import native
    from tanren.report import terminal

    native.complete()
    if verify:
        from tanren.stages import verify as sides

        sides.on_cpu()
    from tanren.convert import interchange, nemo

    signal.signal(signal.SIGTERM, terminated)
    shard_bytes = interchange.shard_size(max_shard_size)
    options = interchange.Options(dtype.value if dtype else None, force, shard_bytes)
    screen, began = terminal.console(), time.monotonic()
    with terminal.working(screen) as say:
        if verify:
            from tanren.report.verify import print_report

            compared = sides.comparison(
                target, lambda report: print_report(report.as_dict(), screen), say
            )
            options = replace(options, verify=compared)
        made: Made = getattr(nemo if "nemo" in name else interchange, name)(
            source, target, options, say, **more
        )
    seconds = time.monotonic() - began
    screen.print(
        f"{interchange.amount(made.parameters)} parameters, "
        f"{interchange.amount(made.size, 'G')}B in {seconds:.1f} s: {made.folder}",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
