"""What a run is made from and what it made, as a passport keeps it: hashes, and the chain of runs.

Nothing here reads hundreds of GB. Of what the hub brought, the manifest has every file's verified
hash; of tokens the whole index is hashed and blocks of the tokens; of weights blocks of each file.
What a passport below has hashed already, and whose size and time are the same, is not read again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import orjson

from tanren import provenance, runs
from tanren.config.errors import TanrenError
from tanren.data import hub, sources
from tanren.launch import inputs
from tanren.launch.machine import cpu_name, gpus_and_driver
from tanren.plan.paths import TRAINING_STAGES, RunFolder
from tanren.plan.plan import (
    ConvertPlan,
    ExportPlan,
    MergePlan,
    MidtrainPlan,
    Plan,
    TrainingPlan,
    TuningPlan,
)
from tanren.tokenfiles import bin_path, idx_path

# What of the environment decides how a run computes or talks. None of it is a key.
_ENVIRONMENT = re.compile(r"(CUDA|NCCL|UCX|FI|GLOO|NVTE|OMP|MKL|TORCH|PYTORCH)_[A-Z0-9_]+")
_MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja")
_TOKENIZER_FILES = hub.TOKENIZER_FILES
# How far up from a file its run folder is sought: RUN/checkpoints/iter_N, RUN/tokens/WITH/SLASHES.
_LEVELS = 5


def of_host(plan: Plan, cores: int) -> dict[str, Any]:
    """The machine (of several nodes the first), the layout and the seeds."""
    gpus, driver = gpus_and_driver() if plan.launch.device == "cuda" else ((), None)
    recipe: Any = plan.recipe
    layout = getattr(recipe, "layout", None)
    variables = {key: value for key, value in os.environ.items() if _ENVIRONMENT.fullmatch(key)}
    return {
        "machine": {
            "system": platform.platform(),
            "cpu": cpu_name(),
            "cores": cores,
            "gpus": list(gpus),
            "driver": driver,
            "environment": dict(sorted(variables.items())),
        },
        "nodes": plan.launch.nodes,
        "processes": plan.launch.processes,
        "layout": None if layout is None else layout.model_dump(mode="json"),
        "seed": getattr(recipe, "seed", None),
    }


def inputs_of(plan: Plan) -> dict[str, dict[str, Any]]:
    """A fingerprint of each thing that a plan reads, by what it is to the run.

    Each has path, files, bytes and sha256, and `sampled` where not all was read; of what the hub
    brought revision, and the hash is over the verified hashes. What is not there has `missing`.
    """
    found: dict[str, dict[str, Any]] = {}
    recipe = plan.recipe
    if not plan.made_up:
        for one in inputs.sets_of(recipe):
            if one.hf is None:
                found[f"data {one.name}"] = _collection(one)
        tokenizer = inputs.tokenizer_path(recipe)
        if tokenizer is not None:
            found["tokenizer"] = _files(Path(tokenizer), _TOKENIZER_FILES)
        for part, wanted in inputs.hub_parts(recipe).items():
            weights = part == "base" or part.startswith("model ")
            name = part if weights or part == "tokenizer" else f"data {part}"
            found[name] = _fetched(wanted)
    if isinstance(plan, MidtrainPlan) and plan.mix is not None and not plan.made_up:
        for share in plan.mix.sources:
            found[f"tokens {share.name}"] = _tokens(Path(share.prefix))
    if isinstance(plan, MidtrainPlan) and not plan.made_up:
        found["tokenizer"] = _files(RunFolder(Path(plan.data)).tokenizer, _TOKENIZER_FILES)
    if isinstance(plan, TuningPlan) and "tokenizer" not in found and plan.tokenizer:
        own = plan.tokenizer.removeprefix("hf:")
        if own.startswith("/"):
            found["tokenizer"] = _files(Path(own), _TOKENIZER_FILES)
    if isinstance(plan, ConvertPlan) and plan.tokenizer:
        found["tokenizer"] = _files(Path(plan.tokenizer), _TOKENIZER_FILES)
    for name, folder in bases(plan):
        if name not in found:
            found[name] = base(folder)
    return found


def bases(plan: Plan) -> list[tuple[str, Path]]:
    """The folders of weights that a plan starts from, by what they are to it."""
    found = []
    if isinstance(plan, TrainingPlan):
        kind, _, where = plan.start.partition(":")
        if kind in ("hf", "checkpoint") and where.startswith("/"):
            found.append(("base", Path(where)))
        found += [(f"adapters {n}", Path(path)) for n, path in enumerate(plan.adapters, 1)]
    elif isinstance(plan, ConvertPlan) and plan.recipe.source.startswith("hf:/"):
        found.append(("base", Path(plan.recipe.source.removeprefix("hf:"))))
    elif isinstance(plan, ExportPlan) and plan.iteration is not None:
        found.append(("base", RunFolder(Path(plan.source)).checkpoint(plan.iteration)))
    elif isinstance(plan, MergePlan):
        found += [(f"model {model}", Path(folder)) for model, folder in plan.folders.items()
                  if folder and folder.startswith("/")]  # fmt: skip
    return found


def base(folder: Path) -> dict[str, Any]:
    """A checkpoint (files.json, .metadata and blocks of each file) or a Hugging Face folder."""
    there = (folder / ".metadata").exists() or (folder / "weights" / ".metadata").exists()
    return _files(folder, ("**/*",) if there else _MODEL_FILES)


def _collection(one: Any) -> dict[str, Any]:
    if one.python_documentation is not None:
        version = platform.python_version()
        return {"path": f"the documentation in Python {version}",
                "sha256": hashlib.sha256(version.encode()).hexdigest()}  # fmt: skip
    try:
        files = sources.files_of(one)
        root = Path(os.path.commonpath([path.parent for path in files]))
        return {"path": one.path, **provenance.fingerprint_of(files, root)}
    except (TanrenError, OSError):
        return {"path": one.path, "missing": True}


def _fetched(wanted: hub.Wanted) -> dict[str, Any]:
    try:
        there = hub.find(wanted)
    except TanrenError:
        return {"path": str(wanted.reference), "missing": True}
    manifest = hub.read_manifest(there.folder)
    assert manifest is not None, there.folder
    files = {name: facts for name, facts in sorted(manifest.files.items()) if wanted.matches(name)}
    table = "".join(f"{name}\0{facts.sha256}\n" for name, facts in files.items())
    return {
        "path": str(there.folder),
        "revision": there.revision,
        "files": len(files),
        "bytes": sum(facts.bytes for facts in files.values()),
        "sha256": hashlib.sha256(table.encode()).hexdigest(),
        "sampled": False,
    }


def _tokens(prefix: Path) -> dict[str, Any]:
    """The index as a whole and blocks of the tokens, in one hash; each also has its own."""
    try:
        known = _known(prefix)
        pair = {
            path.suffix.removeprefix("."): _same(path, known)
            or provenance.fingerprint(path, whole=whole)
            for path, whole in ((idx_path(prefix), True), (bin_path(prefix), False))
        }
    except OSError:
        return {"path": str(prefix), "missing": True}
    both = pair["idx"]["sha256"] + pair["bin"]["sha256"]
    return {
        "path": str(prefix),
        "files": 2,
        "bytes": pair["idx"]["bytes"] + pair["bin"]["bytes"],
        "sha256": hashlib.sha256(both.encode()).hexdigest(),
        "sampled": pair["bin"]["sampled"],
        **pair,
    }


def _known(prefix: Path) -> dict[str, Any]:
    """What the run that made a pair of token files wrote down of it."""
    run = run_of(prefix)
    with contextlib.suppress(TanrenError, KeyError, IndexError, TypeError):
        passport = provenance.read_passport(run) if run else {"attempts": []}
        for attempt in reversed(passport["attempts"]):
            for one in attempt.get("made", {}).values():
                if Path(one["path"]).name == prefix.name and "idx" in one:
                    return dict(one)
    return {}


def _same(path: Path, known: dict[str, Any]) -> dict[str, Any] | None:
    one, facts = known.get(path.suffix.removeprefix("."), {}), path.stat()
    same = one.get("bytes") == facts.st_size and one.get("mtime_ns") == facts.st_mtime_ns
    return one if same else None


def _files(where: Path, patterns: Iterable[str]) -> dict[str, Any]:
    """The files of a folder that a pattern matches, or one file, as one fingerprint."""
    try:
        if where.is_file():
            return {"path": str(where), **provenance.fingerprint_of([where], where.parent)}
        files = [path for pattern in patterns for path in where.glob(pattern) if path.is_file()]
        if files:
            return {"path": str(where), **provenance.fingerprint_of(files, where)}
    except OSError:  # what is wrong with it, the stage itself will say
        pass
    return {"path": str(where), "missing": True}


def made_by(plan: Plan) -> dict[str, dict[str, Any]]:
    """A fingerprint of each thing that a run has made by now; nothing of a bench."""
    if plan.bench is not None:
        return {}
    folder, found = plan.folder, {}
    result = runs.result_of(folder) or {}
    if plan.stage == "preprocess":
        for one in result.get("sources", ()):
            found[f"tokens {one['name']}"] = {
                **_tokens(folder.tokens_of(one["name"])), "content": one.get("digest"),
            }  # fmt: skip
    if plan.stage in ("preprocess", *TRAINING_STAGES) and folder.tokenizer.is_dir():
        found["tokenizer"] = _files(folder.tokenizer, _TOKENIZER_FILES)
        template = _template(folder.tokenizer)
        if template is not None:
            found["chat template"] = template
    there = runs.iterations(folder)
    if there and isinstance(plan, ConvertPlan | TrainingPlan):
        found["checkpoint"] = base(folder.checkpoint(there[-1]))
    if isinstance(plan, ExportPlan | MergePlan) and result.get("hf"):
        found["export"] = _files(Path(result["hf"]), _MODEL_FILES)
        found["weights"] = _files(Path(result["hf"]), ("*.safetensors",))
    return {name: one for name, one in found.items() if "missing" not in one}


def _template(tokenizer: Path) -> dict[str, Any] | None:
    """The chat template's own hash."""
    file, config = tokenizer / "chat_template.jinja", tokenizer / "tokenizer_config.json"
    text = None
    if file.is_file():
        text = file.read_text()
    elif config.is_file():
        text = orjson.loads(config.read_bytes()).get("chat_template")
    if not isinstance(text, str):
        return None
    return {"path": str(tokenizer), "sha256": hashlib.sha256(text.encode()).hexdigest()}


def run_of(path: Path) -> RunFolder | None:
    """The run folder that a path lies in; None where no run made it."""
    for parent in [path, *path.parents][: _LEVELS + 1]:
        if os.path.exists(parent / "passport.json") and os.path.exists(parent / "plan.json"):  # noqa: PTH110
            return RunFolder(parent)
    return None


def stands_on(plan: Plan) -> list[RunFolder]:
    """The runs whose products a plan reads, each once."""
    paths = [path for _, path in bases(plan)]
    if isinstance(plan, MidtrainPlan):
        paths.append(Path(plan.data))
    if isinstance(plan, ConvertPlan | TuningPlan) and plan.tokenizer:
        paths.append(Path(plan.tokenizer.removeprefix("hf:")))
    found = [run_of(path) for path in paths if path.is_absolute()]
    own = plan.folder.root.resolve()
    kept = {run.root.resolve(): run for run in found if run and run.root.resolve() != own}
    return list(kept.values())


def chain(plan: Plan) -> list[dict[str, Any]]:
    """The passports of the runs that a plan stands on, each with those that it stands on.

    Of each: run, stage, commit, image, identity, the passport's hash, what it made, and `from`. A
    stage that reads text has `text`, its inputs.
    """
    found = []
    for run in stands_on(plan):
        try:
            last = provenance.read_passport(run)["attempts"][-1]
        except TanrenError:
            continue
        below = last.get("plan", {})
        reads_text = {k: v for k, v in last.get("inputs", {}).items() if k.startswith("data ")}
        found.append(
            {
                "run": str(run.root),
                "stage": below.get("stage"),
                "passport": hashlib.sha256(run.passport.read_bytes()).hexdigest(),
                "attempt": last.get("attempt"),
                "commit": {k: v for k, v in last.get("commit", {}).items() if k in ("id", "dirty")},
                "image": (last.get("image") or {}).get("sha256"),
                "identity": (runs.result_of(run) or {}).get("identity"),
                "made": {k: v.get("sha256") for k, v in last.get("made", {}).items()},
                **({"text": reads_text} if reads_text else {}),
                "from": last.get("from", []),
            }
        )
    return found
