"""The tokenizer that a run keeps: what is trained with it is exported and tuned with it."""

from __future__ import annotations

from pathlib import Path

from tanren import runs
from tanren.config.errors import RequestError
from tanren.data import tokenizer as tokenizers
from tanren.plan.paths import RunFolder
from tanren.plan.plan import MidtrainPlan, read_plan


def keep(plan: MidtrainPlan, data: Path) -> None:
    """Copy the data's tokenizer to the run; the data may be made again, with another one.

    Raises:
        RequestError: the run goes on, and was trained with another one.
        WorkError: the disk is full.
    """
    own = plan.folder.tokenizer
    if own.is_dir() and any(runs.iterations(plan.folder)):
        there, here = tokenizers.read(own), tokenizers.read(data)
        if not there.agrees_with(here):
            raise RequestError(
                plan.folder.root,
                f"was trained with {own} ({there.size} pieces), and the data are made with {data} "
                f"({here.size} pieces)",
                "train these data under a new NAME=",
            )
        return
    with runs.whole_folder(own) as partial:
        tokenizers.copy(data, partial)


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
