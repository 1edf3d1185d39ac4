"""An export's scores: lm-evaluation-harness, in its own environment, and what it found as one list.

The harness has no part in ours: it is given a file of settings and writes a file of results.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import orjson

from tanren import runs
from tanren.config.errors import RequestError, TanrenError, WorkError
from tanren.environments import HARNESS
from tanren.plan.paths import RunFolder
from tanren.plan.plan import EvaluationPlan, digest

logger = logging.getLogger("tanren")
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def run(plan: EvaluationPlan, attempt: int) -> None:
    """Run the harness on the export, and write `scores.json`.

    Raises:
        RequestError: a task is not there, or its data. WorkError: the harness fails.
    """
    assert plan.model is not None
    python, folder = HARNESS.require(), plan.folder.harness
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    settings = folder / "settings.yaml"
    # JSON is YAML, too; a path with a comma survives it, which it does not on a command line.
    settings.write_bytes(orjson.dumps(_asked(plan, folder), option=orjson.OPT_INDENT_2))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHONNOUSERSITE": "1", **(OFFLINE if plan.recipe.offline else {})}
    logger.info("asking %s for %s", plan.model, ", ".join(plan.recipe.tasks))
    # Paths in a local task are from its folder, wherever the command is called from.
    done = subprocess.run(
        [str(python), "-m", "lm_eval", "run", "--config", str(settings)],
        env=environment, cwd=plan.recipe.task_folder or folder, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if done.returncode:
        raise _failure(plan, attempt, done.returncode)
    found = sorted(folder.rglob("results_*.json"))
    if not found:
        raise WorkError(folder, "the harness ended well and wrote no results", "see the log")
    scores = read_scores(found[-1], plan)
    _write(plan, _results(found[-1]), scores)
    runs.mark_done(
        plan.folder,
        {
            "identity": digest(plan.settings),
            "iteration": plan.iteration,
            "hf": plan.model,
            "scores": [{key: one[key] for key in ("task", "metric", "filter", "value", "stderr")}
                       for one in scores],
        },
    )  # fmt: skip


def _asked(plan: EvaluationPlan, folder: Path) -> dict[str, Any]:
    """The harness's settings, under its own names."""
    recipe = plan.recipe
    model = Path(str(plan.model))
    adapters = runs.read_json(model / "adapter_config.json")
    weights = {"pretrained": str(model)} if adapters is None else {
        "pretrained": adapters["base_model_name_or_path"], "peft": str(model)
    }  # fmt: skip
    asked = {
        "model": "hf",
        "model_args": weights | {"dtype": "auto"},
        "tasks": list(recipe.tasks),
        "include_path": recipe.task_folder,
        "num_fewshot": recipe.shots,
        "limit": recipe.limit,
        "batch_size": recipe.batch_size,
        "apply_chat_template": plan.chat,
        "device": "cuda:0" if plan.launch.device == "cuda" else "cpu",
        "seed": [recipe.seed] * 4,
        "output_path": str(folder),
        "log_samples": True,
    }
    return {key: value for key, value in asked.items() if value is not None}


def read_scores(path: Path, plan: EvaluationPlan) -> list[dict[str, Any]]:
    """The scores in a results file of the harness, by task, metric and filter.

    Returns:
        entries with task, metric, filter, value, stderr (None where it has none), higher_is_better,
        examples (None for a group of tasks), shots, task_version, limit and chat.
    Raises:
        WorkError: a task has no score, or one that is not a number.
    """
    results, scores = _results(path), []
    for task, row in results["results"].items():
        own = []
        for key, value in row.items():
            metric, comma, filter_ = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise WorkError(path, f"{task}: {metric} is {value}, which is no score",
                                "the samples are beside it; more LIMIT=, or without")  # fmt: skip
            stderr = row.get(f"{metric}_stderr,{filter_}")
            own.append({
                "task": task,
                "metric": metric,
                "filter": filter_,
                "value": float(value),
                "stderr": float(stderr) if isinstance(stderr, int | float) else None,
                "higher_is_better": results.get("higher_is_better", {}).get(task, {}).get(metric),
                "examples": results.get("n-samples", {}).get(task, {}).get("effective"),
                "shots": results.get("n-shot", {}).get(task),
                "task_version": results.get("versions", {}).get(task),
                "limit": plan.recipe.limit,
                "chat": plan.chat,
            })  # fmt: skip
        if not own and task not in results.get("group_subtasks", {}):
            raise WorkError(path, f"{task} has no score", "does its YAML name a metric?")
        scores += own
    return scores


def _results(path: Path) -> dict[str, Any]:
    """What the harness wrote; it writes NaN as Python's own json does, and orjson refuses that."""
    found: dict[str, Any] = json.loads(path.read_bytes())
    return found


def _write(plan: EvaluationPlan, results: dict[str, Any], scores: list[dict[str, Any]]) -> None:
    """scores.json: these scores, and those of other tasks that are of the same export."""
    facts = {
        "format": 1,
        "model": plan.model,
        "iteration": plan.iteration,
        "export": plan.settings["inputs"]["export"],
        "harness": results.get("lm_eval_version"),
        "transformers": results.get("transformers_version"),
    }
    before = runs.read_json(plan.folder.scores) or {}
    now = {one["task"] for one in scores}
    same = all(before.get(key) == facts[key] for key in ("format", "export", "harness"))
    kept = [one for one in before.get("scores", []) if same and one["task"] not in now]
    runs.write_json(plan.folder.scores, facts | {"scores": kept + scores})


def _failure(plan: EvaluationPlan, attempt: int, code: int) -> TanrenError:
    """What the end of the harness's log says, for a person."""
    log = RunFolder(plan.folder.root).log(attempt)
    lines = log.read_text(errors="replace").splitlines()[-200:] if log.exists() else []
    said = [line.strip() for line in lines if line.strip()]
    last = said[-1] if said else "no word"
    unknown = [line for line in said if "not found" in line.lower() and "task" in line.lower()]
    if unknown:
        where = plan.recipe.task_folder or "no task_folder in the recipe"
        return RequestError(
            f"tasks: {', '.join(plan.recipe.tasks)}", unknown[-1],
            f"{HARNESS.python()} -m lm_eval ls tasks   lists the harness's own; local ones "
            f"are in {where}",
        )  # fmt: skip
    offline = ("offline", "couldn't reach", "localentrynotfound", "connectionerror")
    if plan.recipe.offline and any(word in line.lower() for line in said[-30:] for word in offline):
        return RequestError(
            f"tasks: {', '.join(plan.recipe.tasks)}", f"their data is not here: {last}",
            'where there is a network SET="offline=false" LIMIT=1 fetches it; or a local task',
        )  # fmt: skip
    return WorkError(
        log, f"lm-evaluation-harness ended with code {code}: {last}", "see the log above that line"
    )
