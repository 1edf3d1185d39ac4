"""Checkpoints in and out by hand, without a recipe: `tanren convert hf-to-mcore` and back."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tanren import runs
from tanren.config.errors import RequestError
from tanren.config.model import Model
from tanren.convert import audit, folders, hf, legacy, llama, llama_config, mcore, megatron
from tanren.convert.tensors import Cast, Tensors
from tanren.data import tokenizer as tokenizers
from tanren.plan.paths import RunFolder, iteration_of

# A checkpoint that no training made, as Megatron-LM calls it: its tracker takes no iteration 0.
RELEASE = "release"
# Of a checkpoint's folder: config.json and tokenizer of the model, for the way back.
HF = "hf"
_TRACKER = "latest_checkpointed_iteration.txt"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

Say = Callable[[str], None]
# Compares what a Hugging Face folder computes with what these tensors under megatron-core's names
# do, and raises where they differ. Those of the folder are rounded to the type first, if there is
# one. (stages/verify.py has it, which is above this.)
Verify = Callable[[Path, Tensors, Model, torch.dtype | None], None]


@dataclass(frozen=True)
class Options:
    """What both ways take.

    Args:
        dtype: bf16 or fp32; None leaves each tensor as it is.
        force: replace a result that is there.
        max_shard_bytes: of a safetensors file.
        verify: what compares both sides before the result gets its name.
    """

    dtype: str | None = None
    force: bool = False
    max_shard_bytes: int = hf.MAX_SHARD_BYTES
    verify: Verify | None = None


@dataclass(frozen=True)
class Made:
    """What a conversion made, and of how many parameters and bytes."""

    folder: Path
    parameters: int
    size: int


def amount(number: int, billion: str = "B") -> str:
    """`8.59 B` or `2.4 M`: for people. A billion bytes are a `G`."""
    return f"{number / 1e9:.2f} {billion}" if number >= 10**9 else f"{number / 1e6:.1f} M"


def shard_size(text: str) -> int:
    """Bytes from `5GB`, `500MB` or `2GiB`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([A-Za-z]*)", text.strip())
    unit = _UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None or not float(found[1]):
        raise RequestError("--max-shard-size", f"is {text!r}", "state a size, e.g. 5GB or 500MB")
    return int(float(found[1]) * unit)


def hf_to_mcore(source: Path, target: Path, options: Options, say: Say) -> Made:
    """A Hugging Face folder to a torch_dist checkpoint that Megatron-LM's --load takes.

    `target` holds release/, the tracker file and, in hf/, what the way back needs besides.

    Raises:
        RequestError: something is not right with the folders, the files or the model.
        WorkError: the disk did not take it.
    """
    source = folders.read_from(source)
    final = folders.write_to(target, source, force=options.force)
    model = llama_config.model_of(hf.read_config(source), source / "config.json")
    with hf.open_model(source) as stored:
        audit.check_base(source, stored, model)
        tensors = llama.to_mcore(model, cast(stored, options.dtype), source)
        folders.check_room(final, sizes(tensors))
        say(f"writing {amount(model.parameters)} parameters")
        with folders.alone(final), runs.whole_folder(final) as partial:
            mcore.write_base(model, tensors, partial / RELEASE, place=source)
            write_hf_part(partial / HF, model, tensors, source)
            (partial / _TRACKER).write_text(RELEASE)
            if options.verify is not None:
                with mcore.open_checkpoint(partial / RELEASE) as written:
                    options.verify(source, written, model, hf.DTYPES.get(options.dtype or ""))
    return Made(final, model.parameters, sum(sizes(tensors)))


def write_hf_part(folder: Path, model: Model, tensors: Tensors, source: Path) -> None:
    """Write what a Hugging Face folder has beside its tensors into a checkpoint's folder."""
    folder.mkdir()
    tokenizer = source if tokenizers.is_there(source) else None
    hf.write_settings(folder, model, kind_of(tensors), tokenizer, source)


def mcore_to_hf(
    source: Path, target: Path, options: Options, say: Say, *, like: Path | None = None,
    trust: bool = False,
) -> Made:  # fmt: skip
    """A checkpoint of megatron-core or Megatron-LM to a Hugging Face folder.

    Args:
        source: a checkpoint, the folder above several (its newest is taken), or a run folder.
        like: a Hugging Face folder whose config.json and tokenizer are the model's. Without it
            what lies in hf/ beside the checkpoint, else what its arguments say.
        trust: run what the pickles in the checkpoint name; see `unpickle`.
    Raises:
        RequestError: something is not right with the folders, the files or the model.
        WorkError: the disk did not take it.
    """
    source = folders.read_from(source)
    final = folders.write_to(target, source, force=options.force)
    checkpoint = newest(source)
    base = folders.read_from(like) if like else beside(checkpoint)
    say(f"reading {checkpoint}")
    stated = llama_config.model_of(hf.read_config(base), base / "config.json") if base else None
    with megatron.open_any(checkpoint, trust=trust, like=stated) as opened:
        model = opened.model
        tensors = cast(llama.to_hf(model, opened.tensors, checkpoint), options.dtype)
        folders.check_room(final, sizes(tensors))
        say(f"writing {amount(model.parameters)} parameters")
        tokenizer = base if base and tokenizers.is_there(base) else opened.tokenizer

        def verify(partial: Path) -> None:
            if options.verify is not None:
                options.verify(partial, cast(opened.tensors, options.dtype), model, None)

        with folders.alone(final):
            hf.write_model(
                final, model, tensors, tokenizer=tokenizer, base=base,
                max_shard_bytes=options.max_shard_bytes, verify=verify,
            )  # fmt: skip
    return Made(final, model.parameters, sum(sizes(tensors)))


def newest(source: Path) -> Path:
    """The checkpoint that a folder is, or the newest of those that it holds."""
    if (source / ".metadata").exists() or legacy.is_legacy(source):
        found = source
    else:
        above = source / "checkpoints" if (source / "checkpoints").is_dir() else source
        tracker = above / _TRACKER
        if tracker.exists():
            said = tracker.read_text(errors="replace").strip()
            found = above / (f"iter_{int(said):07d}" if said.isdecimal() else said)
        else:
            there = [(number, path) for path in above.iterdir() if (number := iteration_of(path))]
            found = max(there)[1] if there else above
    if legacy.is_legacy(found):
        return found
    megatron.check_backend(found)
    problem = runs.checkpoint_problem(found, foreign=True)
    if problem:
        raise RequestError(
            found, f"is no torch_dist checkpoint: {problem}",
            "name a checkpoint's folder (iter_0000500), or the one that it is in",
        )  # fmt: skip
    return found


def beside(checkpoint: Path) -> Path | None:
    """The Hugging Face folder that says what a checkpoint's model is; None where none is known."""
    if (checkpoint.parent / HF / "config.json").exists():
        return checkpoint.parent / HF
    run = RunFolder(checkpoint.parent.parent)
    # A conversion by a recipe says what it was made from; a training says its base in its plan.
    stated = (runs.read_json(run.done) or {}).get("hf") or (runs.read_json(run.plan) or {}).get(
        "hf_source"
    )
    if not stated or not Path(stated).joinpath("config.json").exists():
        return None
    return Path(stated)


def cast(tensors: Tensors, dtype: str | None) -> Tensors:
    """The tensors in the type that was asked for."""
    return tensors if dtype is None else Cast(tensors, hf.DTYPES[dtype])


def sizes(tensors: Tensors) -> list[int]:
    return [one.nbytes for one in tensors.stored.values()]


def kind_of(tensors: Tensors) -> torch.dtype:
    """The type that a config.json states: that of the first tensor, the embedding."""
    return next(iter(tensors.stored.values())).dtype
