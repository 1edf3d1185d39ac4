"""A plan as a person reads it, with the scripts that would run."""

from __future__ import annotations

from collections import Counter

from rich.console import Console

from tanren import runs
from tanren.config.data import Collection, Preprocess
from tanren.config.training import Checkpointing, Dpo, Sft, Training
from tanren.launch.orders import shown
from tanren.launch.preview import Preview
from tanren.plan.cost import explained
from tanren.plan.plan import (
    ConvertPlan,
    EvaluationPlan,
    ExportPlan,
    Launch,
    MergePlan,
    MidtrainPlan,
    Plan,
    PreprocessPlan,
    TrainingPlan,
    TuningPlan,
)
from tanren.plan.site import Place
from tanren.report.mix import print_mix


def print_plan(found: Preview, screen: Console) -> None:
    """The plan as a person reads it, and the scripts that would run."""
    plan, place = found.plan, found.place
    variant = f" variant {plan.variant}" if plan.variant else ""
    rows = [
        ("run folder", shown(plan.run)),
        ("state", found.state),
        ("recipe", shown(plan.recipe_file) + variant),
    ]
    if isinstance(plan, TrainingPlan):
        rows += _training_rows(plan)
    elif isinstance(plan, ConvertPlan):
        rows.append(("base", plan.recipe.source))
        rows.append(("parameters", f"{plan.model.parameters:,}"))
    elif isinstance(plan, ExportPlan):
        rows.append(("checkpoint", _checkpoint(plan)))
    elif isinstance(plan, MergePlan):
        rows.append(("method", plan.recipe.merge_method))
        rows += [(f"model {model}", shown(folder) if folder else "not exported yet")
                 for model, folder in plan.folders.items()]  # fmt: skip
    elif isinstance(plan, EvaluationPlan):
        rows.append(("model", shown(plan.model) if plan.model else "not exported yet"))
        rows.append(("tasks", ", ".join(plan.recipe.tasks)))
        rows.append(("asked", "by the chat template" if plan.chat else "as plain text"))
    elif isinstance(plan, PreprocessPlan):
        rows += _preprocess_rows(plan.recipe)
    launch = plan.launch
    if place is None:
        rows.append(("processes", f"{launch.processes} on this machine ({launch.device})"))
    else:
        rows += _place_rows(found, place, launch)
        rows += _time_rows(plan, place, found.jobs)
    rows += [("note", note) for note in found.notes]
    rows += [("refused now", text) for text in found.refused]
    width = max(len(name) for name, _ in rows) + 2
    for name, value in rows:
        # Whole lines: a path that is cut cannot be copied.
        screen.print(f"{name:<{width}}{value}", markup=False)
    if isinstance(plan, MidtrainPlan) and plan.mix is not None:
        print_mix(plan.mix, plan.recipe, screen, by_glob=True)
    for title, script in found.scripts:
        screen.print(title, style="bold")
        screen.print(script.rstrip(), markup=False, style="dim")


def _preprocess_rows(recipe: Preprocess) -> list[tuple[str, str]]:
    """Tokenizer and sources; what several sources take from is said once, above them."""
    tokenizer = recipe.tokenizer
    trained = f"trained, {tokenizer.train.vocabulary_size:,} pieces" if tokenizer.train else ""
    rows = [
        ("tokenizer", f"hf:{tokenizer.hf}" if tokenizer.hf else tokenizer.path or trained),
        ("documents", f"beginning of sequence {'added' if recipe.prepend_bos else 'not added'}, "
         f"end {'added' if recipe.append_eod else 'not added'}"),
    ]  # fmt: skip
    shared = {hf for hf, times in Counter(s.hf for s in recipe.sources).items() if times > 1}
    above = None
    for source in recipe.sources:
        together = source.hf is not None and source.hf in shared
        if together and source.hf != above:
            rows.append(("from", f"hf:{source.hf}"))
        above = source.hf
        rows.append(
            (f"source {source.name}", " ".join(source.files) if together else _origin(source))
        )
    return rows


def _origin(source: Collection) -> str:
    if source.hf is not None:
        return f"hf:{source.hf} {' '.join(source.files)}"
    return source.path or f"Python's {source.python_documentation}"


def _checkpoint(plan: ExportPlan) -> str:
    return f"{shown(plan.source)}, " + (
        "not trained yet" if plan.iteration is None else f"iteration {plan.iteration}"
    )


def _place_rows(found: Preview, place: Place, launch: Launch) -> list[tuple[str, str]]:
    group = f", group {place.group}" if place.group else ""
    jobs, each = found.jobs, f"{place.nodes} x {place.type_name} on {place.title} for at most "
    each += f"{_number(place.hours, 'hour')}{group}"
    row = ("job", each)
    if found.parts:
        row = (
            "jobs",
            f"{found.parts} + 1, each {each}: {found.parts} make their parts of the shards, one "
            "joins them",
        )
    elif jobs > 1:
        row = ("jobs", f"{jobs}, one after the other, each {each}")
    rate = place.type.points_per_hour
    why = (
        f" for the whole time ({rate:g} a node and hour, the site's file)"
        if rate is not None
        else "; the site's file knows no points"
    )
    rows = [row, ("cost", _cost([place] * jobs) + why)]
    before = [other for _, other in found.first if other is not None]
    if before:
        names = ", ".join(name for name, _ in found.first)
        rows.append(("before it", f"{names}: at most {_cost(before)} more"))
    processes = f"{launch.processes} on {_number(launch.nodes, 'node')} ({launch.device})"
    return [*rows, ("processes", processes)]


def _cost(places: list[Place]) -> str:
    """`9.0 node-hours; 120 points` of jobs that take all the time that is asked for."""
    hours = sum(place.nodes * place.hours for place in places)
    points = [place.points for place in places if place.points is not None]
    return f"{hours:,.1f} node-hours" + (f"; {_number(sum(points), 'point')}" if points else "")


def _time_rows(plan: Plan, place: Place, jobs: int) -> list[tuple[str, str]]:
    """Whether the run's estimated time is more than its jobs have."""
    hours = plan.hours[0] if isinstance(plan, TrainingPlan) and plan.hours else 0.0
    trains = place.hours - place.save_seconds / 3600
    if hours <= jobs * trains:
        return []
    longer = ", or more HOURS=" if place.hours < place.type.walltime_hours else ""
    text = f"the run takes about {hours:.1f} hours: CHAIN={-(-hours // trains):.0f}{longer}"
    return [("too short", text)]


def _number(count: float, thing: str) -> str:
    """`1 hour`, `1.5 hours`, `28,800 points`."""
    return f"{count:,.10g} {thing}{'' if count == 1 else 's'}"


def _training_rows(plan: TrainingPlan) -> list[tuple[str, str]]:
    recipe, layout = plan.recipe, plan.recipe.layout
    fp8 = f", fp8 {recipe.fp8}" if recipe.fp8 != "none" else ""
    rows = [
        ("starts from", " with ".join((plan.start, *plan.adapters))),
        ("model", f"{recipe.model}: {plan.model.parameters:,} parameters, {plan.precision}{fp8}"),
        *(_mix_length_rows(plan) if isinstance(plan, MidtrainPlan) else []),
        *(_tuning_rows(plan) if isinstance(plan, TuningPlan) else []),
        (
            "layout",
            f"tensor {layout.tensor}, pipeline {layout.pipeline}, context {layout.context}, "
            f"data {plan.batch.data_parallel}, recompute {layout.recompute}",
        ),
        ("learning rate", _learning_rate(recipe)),
    ]
    if isinstance(plan, MidtrainPlan):
        operations = plan.model.flops_per_token(recipe.sequence_length) * plan.batch.tokens
        rows.append(("work", f"{operations:.3g} FLOP (causal half of attention counted once)"))
    if plan.memory is not None and plan.gpu_memory_gib is not None:
        rows.append(
            (
                "memory",
                f"{plan.memory.total:.0f} of {plan.gpu_memory_gib:.0f} GiB a GPU "
                f"({explained(plan.memory)})",
            )
        )
    keep = recipe.checkpoints.kept(runs.total_steps(plan))
    rows.append(("checkpoints", _rhythm(recipe.checkpoints)))
    rows.append(
        (
            "disk",
            f"{(keep + 1) * plan.checkpoint_gib:,.2f} GiB: {keep} checkpoints and one being "
            f"written, {plan.checkpoint_gib:,.2f} each",
        )
    )
    if plan.hours is not None:
        hours, assumption = plan.hours
        rows.append(
            (
                "time",
                f"{hours:,.1f} hours {assumption}"
                if hours >= 10
                else f"{hours:.2g} hours {assumption}"
                if hours >= 1 / 60
                else f"under a minute {assumption}",
            )
        )
    if isinstance(plan, MidtrainPlan) and plan.data_start:
        rows.append(("data", f"the present mix begins at iteration {plan.data_start:,}"))
    rows += [("note", note) for note in plan.notes]
    if isinstance(plan, MidtrainPlan) and plan.mix is None:
        rows.append(("mix", "tokens and epochs are known once preprocess has run"))
    return rows


def _rhythm(checkpoints: Checkpointing) -> str:
    when = [
        _number(count, thing)
        for count, thing in (
            (checkpoints.every_steps, "step"), (checkpoints.every_minutes, "minute"),
        ) if count is not None
    ]  # fmt: skip
    kept = f"every {' or '.join(when)}, the newest {checkpoints.keep_last} stay"
    every = checkpoints.keep_every
    return f"{kept}, and those at multiples of {every:,} steps" if every else kept


def _learning_rate(recipe: Training) -> str:
    lr, min_lr, schedule = recipe.optimizer.lr, recipe.optimizer.min_lr, recipe.schedule
    rate = f"{lr:g}" if schedule.style == "constant" else f"{lr:g} → {min_lr:g}"
    decay = ""
    if schedule.decay_steps:
        decay = (
            f", {schedule.decay_style} over the last {schedule.decay_steps}"
            if schedule.style == "WSD"
            else f" over {schedule.decay_steps} steps"
        )
    elif schedule.constant_steps:
        decay = f", constant over the last {schedule.constant_steps}"
    return f"{rate}, {schedule.style}{decay}, warm-up {schedule.warmup_steps}"


def _mix_length_rows(plan: MidtrainPlan) -> list[tuple[str, str]]:
    batch = plan.batch
    return [
        ("steps", f"{batch.steps:,} x {batch.tokens_per_step:,} tokens = {batch.tokens:,} tokens"),
        (
            "batch",
            f"{plan.recipe.global_batch} = data parallel {batch.data_parallel} x micro batch "
            f"{batch.micro_batch} x accumulation {batch.accumulation}",
        ),
    ]


def _tuning_rows(plan: TuningPlan) -> list[tuple[str, str]]:
    recipe = plan.recipe
    counted = (
        f"{recipe.global_batch} {'packed ' if recipe.packing else ''}rows of "
        f"{recipe.sequence_length:,} tokens"
        if isinstance(recipe, Sft)
        else f"{recipe.global_batch} pairs, packed into rows of {recipe.row_length:,} tokens"
    )
    length = (f"{plan.steps:,}" if plan.steps else "known once the data is read") + (
        f" ({recipe.epochs:g} epochs)" if recipe.epochs else ""
    )
    rows = [("steps", length), ("batch", counted)]
    if isinstance(recipe, Dpo):
        rows.append(("loss", f"{recipe.preference.loss}, beta {recipe.preference.beta:g}"))
    if recipe.lora is not None:
        rows.append(
            ("LoRA", f"rank {recipe.lora.rank}, alpha {recipe.lora.alpha:g}, on "
             f"{', '.join(recipe.lora.targets)}")
        )  # fmt: skip
    tokenizer = shown(plan.tokenizer) if plan.tokenizer else "the base's"
    rows.append(("tokenizer", f"{tokenizer}, template {recipe.template}"))
    rows.append(("too long", f"{recipe.too_long} what is over {recipe.sequence_length:,} tokens"))
    for one in recipe.datasets:
        limit = f", at most {one.max_samples:,}" if one.max_samples is not None else ""
        times = f", {one.upsampling:g} times" if one.upsampling != 1 else ""
        dev = "" if one.split_dev else ", none held out"
        rows.append((f"data {one.name}", f"{_origin(one)}{limit}{times}{dev}"))
    return rows
