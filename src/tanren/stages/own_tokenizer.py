"""The tokenizer that a run keeps: what is trained with it is exported and tuned with it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tanren import runs
from tanren.config.errors import RequestError
from tanren.data import tokenizer as tokenizers
from tanren.plan.paths import RunFolder
from tanren.plan.plan import MidtrainPlan, read_plan
from tanren.stages.convert import check_tokenizers


def keep(plan: MidtrainPlan, data: Path) -> None:
    """Copy the data's tokenizer to the run; the data may be made again, with another one.

    Raises:
        RequestError: the run goes on, and was trained with another one.
    """
    own = plan.folder.tokenizer
    if own.is_dir():
        check_tokenizers(own, str(data), plan.recipe_file, "train new data under a new NAME=")
        return
    partial = own.with_name(own.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizers.copy(data, partial)
    os.replace(partial, own)


def of(folder: RunFolder) -> Path:
    """The folder of the tokenizer that a training was made with.

    Raises:
        RequestError: the run is of before runs kept theirs, and its data were made again since.
    """
    trained = read_plan(folder.plan)
    if folder.tokenizer.is_dir() or not isinstance(trained, MidtrainPlan):
        return folder.tokenizer
    data = RunFolder(Path(trained.data))
    there = (runs.result_of(data) or {}).get("identity")
    if there != trained.settings["inputs"]["data"]:
        raise RequestError(
            folder.root,
            f"keeps no tokenizer, and {data.root} is not what it was trained on any more",
            f"bring the tokenizer that it was trained with into {folder.tokenizer}",
        )
    return data.tokenizer


def check_base(start: str) -> None:
    """Refuse a run's checkpoint as a base if nothing is left of its tokenizer.

    Args:
        start: of a plan.
    Raises:
        RequestError: see `of`.
    """
    kind, _, where = start.partition(":")
    folder = RunFolder(Path(where).parent.parent)
    if kind == "checkpoint" and folder.plan.is_file():
        of(folder)
