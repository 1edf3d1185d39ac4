"""Every name inside a run folder. Nothing else spells them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tanren.config.errors import RequestError
from tanren.config.schema import STAGES

# The stages whose product depends on the variant and the name that a person gives a run. The
# others prepare what several runs share.
TRAINING_STAGES = ("midtrain", "sft", "dpo")
PREPARING_STAGES = ("preprocess", "convert")
# What has a folder a training stage, and a variant and a name like it.
EXPORTS = ("export", "export.sft", "export.dpo")
# Stages of an environment of their own, whatever image or Python the others run in.
APART_STAGES = ("eval",)


def run_name(stage: str, variant: str | None, name: str | None, of: str | None = None) -> str:
    """`midtrain`, `midtrain.100B`, `midtrain.100B-try2`; of a bench `bench.midtrain.100B`.

    Args:
        of: the stage that is exported or evaluated: `export`, `export.sft.100B-try2`, `eval.sft`.
    """
    whose = f".{of}" if of not in (None, "midtrain") else ""
    return stage + whose + (f".{variant}" if variant else "") + (f"-{name}" if name else "")


def examples_cache(runs: Path, task: str) -> Path:
    """Where the tokens of a task's conversations are kept, by what they were made from."""
    return runs / task / "cache"


@dataclass(frozen=True)
class Part:
    """One of the parts that a stage is cut into, counted from 1."""

    number: int
    of: int

    @property
    def name(self) -> str:
        """`3of8`, the name of its folder."""
        return f"{self.number}of{self.of}"


def part_named(name: str) -> Part | None:
    """The part that a folder's name states; None for other names, which begin with a stage's."""
    found = re.fullmatch(r"(\d+)of(\d+)", name)
    return Part(int(found[1]), int(found[2])) if found else None


@dataclass(frozen=True)
class RunFolder:
    """The folder `$RUNS/TASK/STAGE[.VARIANT][-NAME]/` of one run.

    A part of a stage has one like it below the stage's: lock, log, marks and plan of its own.
    """

    root: Path

    @property
    def parts(self) -> Path:
        """Where the folders of the run's parts are."""
        return self.root / "parts"

    def part(self, part: Part) -> RunFolder:
        return RunFolder(self.parts / part.name)

    @property
    def whole(self) -> RunFolder:
        """The run that this is a part of; itself where it is no part."""
        return RunFolder(self.root.parents[1]) if part_named(self.root.name) else self

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def passport(self) -> Path:
        return self.root / "passport.json"

    def diff(self, attempt: int) -> Path:
        """What no commit holds of the code that an attempt ran."""
        return self.root / "diff" / f"{attempt}.patch"

    @property
    def job(self) -> Path:
        return self.root / "job.sh"

    @property
    def order(self) -> Path:
        """What was asked for, frozen when it was submitted to a scheduler."""
        return self.root / "order.json"

    @property
    def jobs(self) -> Path:
        """The scheduler's jobs of this run."""
        return self.root / "jobs.json"

    def segment(self, number: int) -> Path:
        """The script of a chain's job, from 1."""
        return self.job if number == 1 else self.root / f"job.{number}.sh"

    @property
    def job_log(self) -> Path:
        """What the jobs of a run said, one after the other, beside the logs of their attempts."""
        return self.root / "log" / "job.log"

    @property
    def node(self) -> Path:
        """What a job runs on each of its nodes."""
        return self.root / "node.sh"

    @property
    def stop(self) -> Path:
        """A request to save and end, from whoever cannot send a signal."""
        return self.root / "STOP"

    def log(self, attempt: int) -> Path:
        return self.root / "log" / f"{attempt}.log"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def wandb(self) -> Path:
        """Which run of Weights & Biases this one is, and how much of the metrics it has."""
        return self.root / "wandb.json"

    @property
    def wandb_log(self) -> Path:
        return self.root / "log" / "wandb.log"

    @property
    def report(self) -> Path:
        """The page about this run."""
        return self.root / "report.html"

    @property
    def comparison(self) -> Path:
        """The page that lays other runs over this one."""
        return self.root / "comparison.html"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def latest(self) -> Path:
        """Megatron's tracker: the number of the newest whole checkpoint."""
        return self.checkpoints / "latest_checkpointed_iteration.txt"

    def checkpoint(self, iteration: int) -> Path:
        return self.checkpoints / f"iter_{iteration:07d}"

    @property
    def hf(self) -> Path:
        return self.root / "hf"

    def export(self, iteration: int) -> Path:
        return self.hf / f"iter_{iteration:07d}"

    @property
    def hf_base(self) -> Path:
        """A base model that the recipe itself made."""
        return self.hf / "base"

    @property
    def hf_merged(self) -> Path:
        """The soup that a merge has made."""
        return self.hf / "merged"

    @property
    def mergekit(self) -> Path:
        """What mergekit was asked for."""
        return self.root / "mergekit.json"

    @property
    def submission(self) -> Path:
        """Where the images are that answer with an export of this run."""
        return self.root / "submission"

    @property
    def tokenizer(self) -> Path:
        return self.root / "tokenizer"

    @property
    def tokens(self) -> Path:
        return self.root / "tokens"

    def tokens_of(self, source: str) -> Path:
        """The prefix of a source's .bin and .idx."""
        return self.tokens / source

    @property
    def shards(self) -> Path:
        """Tokens in the making, those of all parts; gone when they are made."""
        return self.whole.root / "shards"

    @property
    def index_cache(self) -> Path:
        """Where megatron-core keeps the sample order of a blend."""
        return self.root / "cache"

    @property
    def kernels(self) -> Path:
        """Where compiled kernels are kept for every run of the task."""
        return self.root.parent / "cache" / "kernels"

    @property
    def bench(self) -> Path:
        """What a bench measured."""
        return self.root / "bench.json"

    @property
    def made_up(self) -> RunFolder:
        """Where a bench has random tokens, as preprocess has real ones."""
        return RunFolder(self.root / "random")

    @property
    def evaluation(self) -> RunFolder:
        """Of a training, where the scores of its export are."""
        stage = re.split(r"[.-]", self.root.name)[0]
        rest = self.root.name.removeprefix(stage)
        return RunFolder(self.root.with_name(run_name("eval", None, None, of=stage) + rest))

    @property
    def scores(self) -> Path:
        """What an evaluation found: a list of scores, by task, metric and filter."""
        return self.root / "scores.json"

    @property
    def harness(self) -> Path:
        """What lm-evaluation-harness was asked, and what it wrote itself."""
        return self.root / "harness"

    @property
    def examples(self) -> Path:
        """What sft and dpo found in their data sets, and the steps that these make."""
        return self.root / "examples.json"

    @property
    def done(self) -> Path:
        return self.root / "DONE"

    @property
    def failed(self) -> Path:
        return self.root / "FAILED"

    @property
    def stopped(self) -> Path:
        return self.root / "STOPPED"

    @property
    def lock(self) -> Path:
        return self.root / ".lock"


# What a whole checkpoint holds beside megatron-core's own files: the size of each file.
CHECKPOINT_FILES = "files.json"
# A checkpoint being written; it gets its final name when it is whole.
PARTIAL = ".partial"


def iteration_of(folder: Path) -> int | None:
    """The iteration that a checkpoint folder's name states; None for other names."""
    digits = folder.name.removeprefix("iter_")
    return int(digits) if folder.name.startswith("iter_") and digits.isdigit() else None


def stage_name(stage_reference: str) -> str:
    """What stands behind `stage:`."""
    return stage_reference.removeprefix("stage:")


def is_run_of(stage: str, folder_name: str) -> bool:
    """Whether a folder has the name of a run of this stage, of any variant and name."""
    return folder_name == stage or folder_name.startswith((stage + ".", stage + "-"))


def stage_of(folder_name: str) -> str:
    """The stage of a run folder's name (`midtrain.100B-try2` → `midtrain`)."""
    for stage in STAGES:
        if is_run_of(stage, folder_name):
            return stage
    raise RequestError(
        f"stage:{folder_name}", "names no stage", f"the stages are {', '.join(STAGES)}"
    )
