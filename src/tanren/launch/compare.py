"""Two runs of one stage side by side: in what they differ, and where their curves part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tanren import provenance, runs
from tanren.config.errors import RequestError
from tanren.launch.orders import shown
from tanren.plan.paths import RunFolder
from tanren.plan.plan import differences

CURVES = ("loss", "held_out_loss", "grad_norm")


@dataclass(frozen=True)
class Compared:
    """What `compare` finds.

    `groups` are the differences (`field A there, B here`) by what they are of; `there` is the first
    run. `curves` are values by step of each run. `parts_at` is the first step whose loss differs,
    None where no step does.
    """

    stage: str
    groups: Mapping[str, list[str]]
    curves: Mapping[str, tuple[dict[int, float], dict[int, float]]]
    parts_at: int | None
    notes: list[str] = field(default_factory=list)

    @property
    def common_steps(self) -> list[int]:
        """The steps that both runs have written down."""
        there, here = self.curves["loss"]
        return sorted(there.keys() & here.keys())

    @property
    def same_result(self) -> bool:
        """Whether all that both made, losses and products, is equal bit for bit."""
        there, here = self.curves["loss"]
        return not self.groups["result"] and there == here


def compare(there: RunFolder, here: RunFolder) -> Compared:
    """Compare two runs; neither is touched.

    Raises:
        RequestError: they are of different stages, or one has no passport that can be read.
    """
    one, other = (provenance.read_passport(folder)["attempts"][-1] for folder in (there, here))
    stages = [str(attempt["plan"].get("stage")) for attempt in (one, other)]
    if stages[0] != stages[1]:
        raise RequestError(
            f"{shown(there.root)}, {shown(here.root)}",
            f"are runs of different stages ({stages[0]} and {stages[1]})",
            "name two runs of one stage (make status lists them)",
        )
    facts = [_facts(attempt) for attempt in (one, other)]
    groups = {name: differences(facts[0][name], facts[1][name]) for name in facts[0]}
    groups["packages"] = _packages(one, other)
    groups["scores"] = differences(_scores(there), _scores(here))
    pairs = {key: (runs.curve(there.metrics, key), runs.curve(here.metrics, key)) for key in CURVES}
    losses, others = pairs["loss"]
    parts_at = [step for step in sorted(losses.keys() & others.keys())
                if losses[step] != others[step]]  # fmt: skip
    notes = [note for folder in (there, here) for note in _notes(folder)]
    return Compared(stages[0], groups, pairs, parts_at[0] if parts_at else None, notes)


def _facts(attempt: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What of an attempt is compared, in the groups that a person asks for."""
    plan, commit = attempt["plan"], attempt.get("commit") or {}
    recipe = dict(plan.get("recipe", {}))
    layout = recipe.pop("layout", None)
    if "iteration" in plan:  # of an export, what `latest` was
        recipe["iteration"] = plan["iteration"]
    machine = dict(attempt.get("machine") or {})
    return {
        "recipe": {**recipe, "shape": plan.get("model")},
        "code": {
            "commit": commit.get("id"),
            "changes": (commit.get("diff") or {}).get("sha256") or commit.get("dirty"),
        },
        "data": _hashes(attempt.get("inputs")),
        "layout": {
            "layout": layout,
            "micro_batch": (plan.get("batch") or {}).get("micro_batch"),
            "launch": plan.get("launch"),
        },
        "image": {
            "image": (attempt.get("image") or {}).get("sha256", "none"),
            "python": (attempt.get("process") or attempt).get("python"),
        },
        "machine": {**machine, "torch": (attempt.get("process") or {}).get("torch")},
        "result": _hashes(attempt.get("made")),
    }


def _hashes(things: Mapping[str, Any] | None) -> dict[str, Any]:
    """The beginning of each thing's hash: enough to tell two apart."""
    return {
        name: "missing" if one.get("missing") else str(one.get("sha256"))[:12]
        for name, one in (things or {}).items()
    }


def _scores(folder: RunFolder) -> dict[str, Any]:
    """What `make eval` found of the run's export, or of this evaluation."""
    return {
        " ".join(name for name in (one["task"], one["metric"], one["filter"]) if name != "none"):
            one["value"]
        for one in runs.scores_of(folder)
    }  # fmt: skip


def _packages(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Versions that differ, of all packages where both runs say so."""
    there, here = ((attempt.get("process") or {}).get("packages") for attempt in (one, other))
    if there is None or here is None:
        there, here = one.get("packages"), other.get("packages")
    return differences(there, here) if there and here else []


def _notes(folder: RunFolder) -> list[str]:
    found = []
    if runs.is_locked(folder.lock):
        found.append(f"{shown(folder.root)} is still going: this is as far as it is")
    elif runs.result_of(folder) is None:
        found.append(f"{shown(folder.root)} is not done")
    if _torn(folder.metrics):
        found.append(f"{shown(folder.metrics)} ends in a torn line, which is left out")
    return found


def _torn(path: Path) -> bool:
    if not path.exists() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) != b"\n"
