"""The runs of the FP8 gate: ordinary runs of a stage under names of their own, and their curves."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tanren import runs
from tanren.config.errors import RequestError, WorkError
from tanren.config.training import Midtrain, Sft
from tanren.launch import container, orders, reading, submit
from tanren.launch.machine import compute_capability, this_machine, visible_gpus
from tanren.launch.orders import Order, shown
from tanren.plan import gate
from tanren.plan.gate import BF16, CONTROL, SCALINGS, Comparison, Curves
from tanren.plan.make import make_plan
from tanren.plan.paths import TRAINING_STAGES, RunFolder, run_name, stage_name
from tanren.plan.plan import Machine, read_plan


@dataclass(frozen=True)
class Trial:
    """One run of the gate: in bf16, or by an FP8 recipe."""

    scaling: str
    order: Order

    @property
    def folder(self) -> RunFolder:
        name = run_name(_stage(self.order), self.order.variant, self.order.name)
        return RunFolder(orders.runs_root() / _task(self.order) / name)

    @property
    def is_done(self) -> bool:
        """Whether it has been run, with the settings that it would have now.

        Raises:
            RequestError: its folder is of other settings.
        """
        if not self.folder.plan.exists():
            return False
        # As if this were the machine that it was begun on: a login node may compare what GPUs did.
        launch = read_plan(self.folder.plan).launch
        gpus = launch.processes if launch.device == "cuda" else 0
        machine = Machine(gpus=gpus, nodes=launch.nodes)
        return submit.look(make_plan(reading.read_request(self.order, machine))).done


def trials(
    order: Order, stated: tuple[str, ...], steps: int, *, control: bool = False
) -> list[Trial]:
    """The run in bf16, and one for each FP8 recipe.

    Args:
        stated: FP8 recipes; none for the recipe's own.
        control: after them another one in bf16, which shows what chance does.
    Raises:
        RequestError: the recipe is of no such stage, or stands on a run that follows its name; or
            there are too few steps to compare.
    """
    if steps < gate.FEWEST_STEPS:
        raise RequestError(
            f"--steps {steps}",
            f"leaves no {gate.END} steps for the end behind the first {gate.SKIPPED}",
            f"at least --steps {gate.FEWEST_STEPS}",
        )
    stage, recipe = orders.recipe_of(order)
    if not isinstance(recipe, Midtrain | Sft):
        raise RequestError(
            order.recipe_file, f"is a {stage} recipe, and the gate compares losses of training",
            "take midtrain.yaml or sft.yaml",
        )  # fmt: skip
    orders.refuse_given(order, recipe)
    if stage_name(recipe.init) in TRAINING_STAGES:
        raise RequestError(
            f"{order.recipe_file}: init",
            f"{recipe.init} is found by the run's name, and the gate's runs have their own",
            "--set init=checkpoint:FOLDER/iter_0000500, for sft with --set tokenizer=FOLDER",
        )
    return [
        Trial(
            scaling,
            replace(
                order,
                name="-".join([*([order.name] if order.name else []), "gate", scaling]),
                assignments=(*order.assignments, *gate.changes(recipe, scaling, steps)),
            ),
        )
        for scaling in (BF16, *gate.scalings(stated, recipe), *[CONTROL] * control)
    ]


def check(all_trials: list[Trial], pending: list[Trial]) -> None:
    """Refuse at once what would be refused, or fail, once the first run is done.

    Raises:
        RequestError: no GPU of this machine can do it, or a run does not fit.
    """
    order = pending[0].order
    inside = container.choose(order.runtime, visible_gpus())
    machine = this_machine(in_image=inside is not None)
    needed = max(gate.CAPABILITY.get(trial.scaling, 0.0) for trial in all_trials[1:])
    capability = compute_capability() if machine.gpus else 0.0
    if capability is not None and capability < needed:
        has = "has none"
        if machine.idle_gpus:
            has = "has no Transformer Engine for its GPUs"
        elif machine.gpus:
            has = f"has {capability:g}"
        raise RequestError(
            "the FP8 gate",
            f"needs GPUs of compute capability {needed:g} (H100, H200), and this machine {has}",
            "run it where they are, or SITE=...; finished runs are compared anywhere",
        )
    for trial in pending:
        make_plan(reading.read_request(trial.order))


def drop_checkpoints(trial: Trial) -> None:
    """Remove the weights of a finished run: its curves are what it was run for.

    Several runs of a large model would otherwise fill a disk, and nobody goes on from them.
    """
    assert runs.result_of(trial.folder) is not None, trial.folder
    shutil.rmtree(trial.folder.checkpoints, ignore_errors=True)


def read_curves(trial: Trial) -> Curves:
    """What a finished run has written down.

    Raises:
        WorkError: steps are missing.
    """
    file = trial.folder.metrics
    keys = ("loss", "grad_norm", "tokens_per_second", "held_out_loss")
    loss, grad_norm, rate, held_out = (runs.curve(file, key) for key in keys)
    steps = read_plan(trial.folder.plan).settings["steps"]
    if any(sorted(one) != list(range(1, steps + 1)) for one in (loss, grad_norm, rate)):
        raise WorkError(
            file, f"has not every step from 1 to {steps}", f"rm -r {shown(trial.folder.root)}, and "
            "the same command makes it again",
        )  # fmt: skip
    return Curves(loss, grad_norm, rate, held_out)


def write(
    order: Order, all_trials: list[Trial], compared: dict[str, Comparison], limit: float,
    failed: dict[str, str],
) -> Path:  # fmt: skip
    """Write gate.json: what was compared, and how it came out.

    Args:
        limit: a share of 1.
        failed: of the runs that did not come to their end, why.
    Returns:
        its folder, `$RUNS/TASK/gate[.sft][.VARIANT][-NAME]/`.
    """
    name = run_name("gate", order.variant, order.name, _stage(order))
    folder = orders.runs_root() / _task(order) / name
    value: dict[str, Any] = {
        "task": _task(order),
        "stage": _stage(order),
        "variant": order.variant,
        "limit": limit,
        "window": gate.WINDOW,
        "skipped": gate.SKIPPED,
        "end": gate.END,
        "runs": {trial.scaling: trial.folder.root.name for trial in all_trials},
        "device": (runs.result_of(all_trials[0].folder) or {}).get("device"),
        "passed": {
            trial.scaling: trial.scaling in compared and compared[trial.scaling].passes(limit)
            for trial in all_trials
            if trial.scaling in SCALINGS
        },
        "failed": failed,
        "compared": {
            scaling: {**vars(one), "by_step": {str(k): v for k, v in one.by_step.items()}}
            for scaling, one in compared.items()
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    runs.write_json(folder / "gate.json", value)
    return folder


def _stage(order: Order) -> str:
    return order.recipe_file.name.split(".")[0]


def _task(order: Order) -> str:
    return order.recipe_file.resolve().parent.name
