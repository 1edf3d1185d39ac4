"""A run once more, from its passport: the same code, image and data, in a runs folder of its own.

    RUNS/replays/NAME/TASK/STAGE...    the new run, under the old one's name
    RUNS/replays/NAME/TASK/...         the runs that it stands on, as links to the old files
    RUNS/replays/NAME/.recipes/        the resolved recipe
    RUNS/replays/.code/                the commits, each checked out beside this checkout

A runs folder of its own, since names are part of what a recipe refers to: `stage:midtrain` of an
sft called try2 is midtrain-try2 where there is one.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import yaml

from tanren import provenance, runs
from tanren.config.errors import RequestError, WorkError
from tanren.config.load import recipe_path, repository
from tanren.data import hub
from tanren.environments import EVERY
from tanren.images.lock import read_lock
from tanren.launch import container, origins, queue
from tanren.launch.machine import visible_gpus
from tanren.launch.orders import runs_root, shown
from tanren.plan.paths import RunFolder
from tanren.plan.plan import ExportPlan, MergePlan, Plan, differences, parse_plan
from tanren.plan.references import candidates, references

# Of a run that another stands on, these stay its own.
_OWN = (".lock", ".worker", ".submit", "STOP", "jobs.json", "order.json", "hosts", "log", "hf")
Call = Callable[[list[str], dict[str, str]], int]


@dataclass(frozen=True)
class Replay:
    """A run that is to be replayed.

    `differences` say what is gone or not what it was; None in `patch` is code without changes.
    """

    of: RunFolder
    attempt: Mapping[str, Any]
    plan: Plan
    root: Path
    differences: tuple[str, ...]
    commit: str | None
    patch: Path | None
    images: Path | None

    @property
    def folder(self) -> RunFolder:
        """Where the new run goes."""
        return RunFolder(self.root / self.plan.task / self.of.root.name)


def look(of: RunFolder, name: str | None) -> Replay:
    """Compare what a run's passport says with what is here now. Writes nothing.

    Raises:
        RequestError: the run is going, is a bench or a part, or has no passport that can be read;
            or the replay of this name is done.
    """
    attempts = provenance.read_passport(of)["attempts"]
    last = attempts[-1]
    plan = parse_plan(last["plan"], of.passport)
    _refuse_going(of)
    if plan.bench is not None or of.whole != of:
        what = "a bench, which has no result" if plan.bench else "a part of a run"
        raise RequestError(shown(of.root), f"is {what} to reproduce",
                           "name a whole run of a stage (make status lists them)")  # fmt: skip
    root = runs_root() / "replays" / (name or _free_name())
    new = RunFolder(root / plan.task / of.root.name)
    if runs.result_of(new) is not None:
        raise RequestError(shown(new.root), "is there already", "give the replay another NAME=")
    commit, patch, found = _code(of, last)
    if len({(one.get("commit") or {}).get("id") for one in attempts}) > 1:
        found.append(f"code: its {len(attempts)} attempts ran several commits; the last one's runs")
    start = getattr(plan, "data_start", 0)
    if start:
        found.append(f"data: it read others before iteration {start}; a replay reads the last ones")
    images, of_image = _image(last)
    found += of_image or _native(last)
    if "job" not in last:
        found += _machine(last)
    return Replay(
        of, last, plan, root, (*found, *_data(last, plan, of, root)), commit, patch, images
    )


def _refuse_going(of: RunFolder) -> None:
    live = queue.live_jobs(of) if of.jobs.exists() and not of.done.exists() else {}
    if runs.is_locked(of.lock) or live:
        raise RequestError(
            shown(of.root), "is still going: its passport is not closed",
            f"wait for it (make status), or make cancel RUN={of.root.parent.name}/{of.root.name}",
        )  # fmt: skip


def _free_name() -> str:
    number = 1
    while (runs_root() / "replays" / str(number)).exists():
        number += 1
    return str(number)


def _code(of: RunFolder, last: Mapping[str, Any]) -> tuple[str | None, Path | None, list[str]]:
    """The commit and the patch to run; what of them is gone."""
    commit = last.get("commit") or {}
    found = commit.get("id")
    if found is None:
        return None, None, ["code: the passport names no commit; this checkout would run"]
    words = ["git", "-C", str(repository()), "cat-file", "-e", f"{found}^{{commit}}"]
    known = subprocess.run(words, capture_output=True, check=False)
    if known.returncode:
        return None, None, [f"code: commit {found[:12]} is not in this repository; "
                            "this checkout would run"]  # fmt: skip
    if not commit.get("dirty"):
        return found, None, []
    diff = commit.get("diff")
    if diff is None:
        return found, None, ["code: the checkout was changed, and the changes were not kept"]
    patch = of.root / "diff" / diff["file"]
    if not diff["whole"]:
        return found, None, [f"code: of {diff['bytes']:,} bytes of changes the first "
                             f"{provenance.DIFF_BYTES:,} were kept"]  # fmt: skip
    if not patch.is_file() or hashlib.sha256(patch.read_bytes()).hexdigest() != diff["sha256"]:
        return found, None, [f"code: the changes are gone, or not what they were: {patch}"]
    return found, patch, []


def _image(last: Mapping[str, Any]) -> tuple[Path | None, list[str]]:
    """The folder with the image of this digest under its usual name, and what of it is gone."""
    image = last.get("image")
    if image is None:
        return None, []
    folder = container.images_folder()
    for lock in sorted(folder.glob("**/*.sif.lock.json")):
        sif = lock.with_name(lock.name.removesuffix(".lock.json"))
        if (runs.read_json(lock) or {}).get("sha256") == image["sha256"] and sif.exists():
            read_lock(sif)  # whole, by its size
            return sif, []
    return None, [f"image: {image['image']} {image['sha256'][:12]} is not in {folder}; "
                  "the image that is there, or .venv, would run"]  # fmt: skip


def _native(last: Mapping[str, Any]) -> list[str]:
    """Versions that are others now; nothing of an image, which brings its own."""
    if last.get("image") is not None:
        return []
    there = {"python": last.get("python"), **last.get("packages", {})}
    here = {"python": platform.python_version(), **provenance.versions()}
    return [f"versions: {line}" for line in differences(there, here)]


def _machine(last: Mapping[str, Any]) -> list[str]:
    """What of the machine decides the last bits, and is another now."""
    there = last.get("machine")
    if there is None:
        return ["machine: the passport does not say what it ran on"]
    keys = ("cpu", "cores", "gpus", "driver")
    plan = parse_plan(last["plan"], "plan")
    here = origins.of_host(plan, len(os.sched_getaffinity(0)))["machine"]
    was, now = ({key: one.get(key) for key in keys} for one in (there, here))
    return [f"machine: {line}" for line in differences(was, now)]


def _data(last: Mapping[str, Any], plan: Plan, of: RunFolder, root: Path) -> list[str]:
    """What the run read and is gone, or is not what it was."""
    there = last.get("inputs")
    if there is None:
        return ["data: the passport has no hashes of what the run read; it is of an older version"]
    text = orjson.dumps(last["plan"]).decode()
    found = []
    for needed, linked in _needed(plan, of, root):
        if not linked:  # it was replayed itself: what it made now is what is read
            text = text.replace(f"{needed}/", f"{root / plan.task / needed.name}/")
        elif not (needed / "plan.json").exists():
            found.append(f"data: {needed}, which it stands on, is gone")
    here = origins.inputs_of(parse_plan(orjson.loads(text), of.passport))
    for name, one in there.items():
        now = here.get(name, {"missing": True})
        if now.get("missing"):
            found.append(f"data: {name} is gone: {one.get('path')}")
        elif now.get("sha256") != one.get("sha256"):
            was, is_now = str(one.get("sha256"))[:12], str(now.get("sha256"))[:12]
            found.append(
                f"data: {name} is not what it was ({was} then, {is_now} now): {now['path']}"
            )
    return found


def _needed(plan: Plan, of: RunFolder, root: Path) -> list[tuple[Path, bool]]:
    """The old folders of the runs that a plan's recipe names, and whether they are to be linked."""
    found: list[tuple[Path, bool]] = []
    if isinstance(plan, MergePlan):  # its recipe will name the folders themselves
        return found
    stood_on = {run.root.name for run in origins.stands_on(plan)}
    for wanted in references(plan.recipe):
        names = candidates(plan.recipe, wanted, plan.variant, plan.name)
        old = next((name for name in names if name in stood_on), names[0])
        for other in names[: names.index(old)]:
            if (root / plan.task / other).exists():
                raise RequestError(
                    root / plan.task / other,
                    f"would be taken for the base, which was {old}",
                    f"rm -r {root / plan.task / other}, or another NAME=",
                )
        passport = root / plan.task / old / "passport.json"
        found.append((of.root.parent / old, not passport.exists() or passport.is_symlink()))
    return found


def refuse(replay: Replay, force: bool) -> None:
    """Refuse what would not be the same run.

    Raises:
        RequestError: naming all that differs.
    """
    if replay.differences and not force:
        lines = "".join(f"\n    {line}" for line in replay.differences)
        raise RequestError(
            shown(replay.of.root), f"cannot be made again as it was:{lines}",
            "bring it back, or FORCE=1 (--force): the new passport then says all this",
        )  # fmt: skip


def prepare(replay: Replay, force: bool) -> tuple[list[str], dict[str, str]]:
    """Make the new run's surroundings; the command that runs it, and its environment."""
    plan, folder = replay.plan, replay.folder
    code = _checked_out(replay) if replay.commit else repository()
    for old, linked in _needed(plan, replay.of, replay.root):
        if linked and old.is_dir():
            _link(old, folder.root.parent / old.name, weights=not isinstance(plan, ExportPlan))
    recipe = replay.root / ".recipes" / plan.task / f"{plan.stage}.yaml"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    values = dict(replay.attempt["plan"]["recipe"])
    if isinstance(plan, ExportPlan):
        values["iteration"] = plan.iteration  # the newest then
    if isinstance(plan, MergePlan):
        there = {model: folder for model, folder in plan.folders.items() if folder is not None}
        values = plan.recipe.with_models(there).model_dump(mode="json")
    text = f"# What {replay.of.root} was made by, resolved.\n" + yaml.safe_dump(values)
    runs.write_atomic(recipe_path(recipe, plan.variant), text.encode())
    model = values.get("model")
    shape = code / "recipes" / "models" / f"{model}.yaml"
    if model and not shape.exists():  # a recipe of one's own that no commit holds
        shape.write_text(yaml.safe_dump(replay.attempt["plan"]["model"]))
    if not folder.passport.exists():
        folder.root.mkdir(parents=True, exist_ok=True)
        origin = {
            "of": str(replay.of.root),
            "passport": hashlib.sha256(replay.of.passport.read_bytes()).hexdigest(),
            "attempt": replay.attempt["attempt"],
            "forced": force and bool(replay.differences),
            "differences": list(replay.differences),
        }
        runs.write_json(
            folder.passport, {"format": provenance.FORMAT, "attempts": [], "replay": origin}
        )
    return _words(replay, code, recipe), _environment(replay)


def _words(replay: Replay, code: Path, recipe: Path) -> list[str]:
    plan, job = replay.plan, replay.attempt.get("job")
    words = [str(code / "bin" / "tanren"), plan.stage, str(recipe)]
    words += ["--variant", plan.variant] if plan.variant else []
    words += ["--name", plan.name] if plan.name else []
    if replay.attempt.get("image") is None:
        words += ["--runtime", "native"]
    else:
        words += ["--bind", str(replay.of.root.parents[1])]
    if job is None:
        return [*words, "--site", "local"]
    words += ["--site", job["site"], "--nodes", str(job["nodes"])]
    return [*words, "--type", job["type"], "--hours", str(job["hours"])]


def _environment(replay: Replay) -> dict[str, str]:
    own = str(repository() / "src")
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    found = {key: value for key, value in os.environ.items() if key not in ("RUNTIME", "SITE")}
    found |= {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path not in ("", own)),
        "RUNS": str(replay.root),
        "DATA": str(hub.data_root()),
        "IMAGES": str(_images(replay)),
        "TANREN_PYTHON": sys.executable,
        "ALLOW_DIRTY": "1",
    }
    # The replay's own checkout has none of these.
    for environment in EVERY:
        found.setdefault(environment.variable, str(environment.python()))
    user = repository() / "user.toml"
    if user.is_file():
        found.setdefault("TANREN_USER", str(user))
    if replay.plan.launch.device == "cpu" and visible_gpus():
        found["CUDA_VISIBLE_DEVICES"] = ""
    return found


def _images(replay: Replay) -> Path:
    """The folder where the new run finds the old one's image under its usual name."""
    folder, sif = container.images_folder(), replay.images
    if sif is None:
        return folder
    name = f"{replay.attempt['image']['image']}.sif"
    if sif == folder / name:
        return folder
    own = replay.root / ".images"
    own.mkdir(parents=True, exist_ok=True)
    for old, new in ((sif, name), (sif.with_name(f"{sif.name}.lock.json"), f"{name}.lock.json")):
        if not (own / new).exists():
            (own / new).symlink_to(old)
    return own


def _link(old: Path, new: Path, *, weights: bool) -> None:
    """Stand for a run that another is made from: a folder of links, so that the run is not touched.

    Args:
        weights: link what it has exported, too; an export writes there itself.
    """
    new.mkdir(parents=True, exist_ok=True)
    children = [path for path in old.iterdir() if path.name not in _OWN]
    for child in children:
        if not (new / child.name).is_symlink():
            (new / child.name).symlink_to(child)
    if weights and (old / "hf").is_dir() and not (new / "hf").exists():
        (new / "hf").symlink_to(old / "hf")


def _checked_out(replay: Replay) -> Path:
    """The run's commit, with its changes, beside this checkout, which is left as it is.

    A clone that borrows this repository's objects: it writes nothing into its .git.
    """
    assert replay.commit is not None
    wanted = (replay.attempt["commit"].get("diff") or {}).get("sha256") if replay.patch else None
    name = replay.commit[:12] + (f"-{wanted[:8]}" if wanted else "")
    folder = replay.root.parent / ".code" / name
    if folder.is_dir() and _holds(folder, replay.commit, wanted):
        return folder
    with runs.whole_folder(folder) as partial:
        _git("clone", "--quiet", "--shared", "--no-checkout", str(repository()), str(partial))
        _git("-C", str(partial), "checkout", "--quiet", "--detach", replay.commit)
        if replay.patch is not None:
            _git("-C", str(partial), "apply", "--binary", str(replay.patch))
    return folder


def _holds(folder: Path, commit: str, diff: str | None) -> bool:
    found = provenance.git_commit(folder, folder.with_name(f"{folder.name}.patch"))
    return found["id"] == commit and (found.get("diff") or {}).get("sha256") == diff


def _git(*words: str) -> None:
    done = subprocess.run(["git", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join(done.stderr.split())
        raise WorkError(f"git {words[0] if words[0] != '-C' else words[2]}", said or "failed",
                        "mend that and run the same command again")  # fmt: skip


def call(words: list[str], environment: dict[str, str]) -> int:
    """Run the command of the old code; its words go to this terminal."""
    sys.stdout.flush()
    return subprocess.run(words, env=environment, check=False).returncode
