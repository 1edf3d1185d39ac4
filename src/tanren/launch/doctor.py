"""What this machine has and lacks for each stage, and what to do about it.

Nothing is changed, no torch is imported, and nothing that is asked may take long.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tanren.config.errors import RequestError, TanrenError
from tanren.config.load import read_site, read_user, repository
from tanren.config.site import Site, User
from tanren.data import hub
from tanren.environments import HARNESS, MERGE, NEMO, Environment
from tanren.images.definition import IMAGES, read_versions
from tanren.images.lock import check_definition, image_file
from tanren.launch import container, orders, queue
from tanren.launch.outside import Asked, Outside
from tanren.launch.quota import quota_of

State = Literal["ok", "warning", "missing"]
GIB = 2**30
# Below the first nothing can be made, below the second not much.
LEAST_GIB, LITTLE_GIB = 1.0, 20.0
_COMMANDS = {
    "pbs": ("qsub", "qstat", "qdel"),
    "gridengine": ("qsub", "qstat", "qdel"),
    "slurm": ("sbatch", "squeue", "scancel"),
}


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it is, what was found, what to do next.

    `needed`: what is asked of this machine fails without it.
    """

    what: str
    state: State
    found: str
    next_step: str = ""
    needed: bool = False


@dataclass(frozen=True)
class Group:
    """The findings that some stages need."""

    title: str
    findings: tuple[Finding, ...]


def examine(site: str | None = None, outside: Outside | None = None) -> list[Group]:
    """Look at everything.

    Args:
        site: what jobs would be submitted to; None finds it out, and for a machine that is no
            cluster nothing of a scheduler is needed.
    Raises:
        RequestError: user.toml or the site's file is wrong.
    """
    outside = outside or Outside()
    user = read_user()
    endpoint = outside.environment.get("HF_ENDPOINT") or "https://huggingface.co"
    asked = None if _offline(outside) else Asked(outside, endpoint)
    name = queue.find_site(site, user)
    return [
        Group("every stage", tuple(_everywhere(outside))),
        Group(
            "preprocess, convert, midtrain, sft, dpo, export on this machine",
            tuple(_engine(outside, on_cluster=name is not None)),
        ),
        Group("build-image, and stages in an image", tuple(_images(outside))),
        Group("jobs (submit)", tuple(_jobs(outside, name, user, stated=site is not None))),
        Group("eval", (_environment(outside, HARNESS, "lm-evaluation-harness"),)),
        Group("merge", (_environment(outside, MERGE, "mergekit"),)),
        Group("sft and dpo with engine: nemo", (_environment(outside, NEMO, "nemo-toolkit"),)),
        Group("fetch, and tracking", tuple(_network(outside, endpoint, asked))),
    ]


def lacking(groups: list[Group]) -> RequestError | None:
    """The refusal when something that is needed is missing; it names the first and counts."""
    absent = [one for group in groups for one in group.findings
              if one.needed and one.state == "missing"]  # fmt: skip
    if not absent:
        return None
    more = f" ({len(absent)} are missing)" if len(absent) > 1 else ""
    return RequestError(absent[0].what, f"{absent[0].found}{more}", absent[0].next_step)


def _everywhere(outside: Outside) -> Iterator[Finding]:
    version = ".".join(map(str, outside.python))
    old = outside.python < (3, 10)
    yield Finding(
        "Python",
        "missing" if old else "ok",
        version,
        "PYTHON=/path/to/python3.10 (or newer) make setup" if old else "",
        needed=True,
    )
    yield from _parts(outside)
    yield _checkout(outside)
    runs, data = orders.runs_root(), hub.data_root()
    yield _disk("runs", runs, "runs = in user.toml, or RUNS=", outside, needed=True)
    yield _disk("data", data, "data = in user.toml, or DATA=", outside)
    yield _disk("home", outside.home, "keep runs, data and images elsewhere (user.toml)", outside)
    for what, path in (("runs", runs), ("data", data), ("home", outside.home)):
        found = quota_of(_existing(path), outside)
        if found is not None:
            yield _quota(f"quota of {what}", found.used_gib, found.limit_gib)


def _parts(outside: Outside) -> Iterator[Finding]:
    """The parts of .venv, by the markers that bin/setup leaves."""
    root = repository()
    files = [root / "containers" / "locks" / "native.txt", root / "pyproject.toml"]
    now = outside.run(["bash", "-c", 'cat "$@" | cksum', "-", *map(str, files)])
    makes = {"host": "make setup HOST_ONLY=1", "engine": "make setup", "dev": "bin/setup dev"}
    serves = {"host": "plans, submits", "engine": "runs stages", "dev": "make test, make check"}
    held = [part for part in ("dev", "engine", "host") if (root / ".venv" / f".{part}").is_file()]
    fresh = {
        part
        for part in held
        if now and (root / ".venv" / f".{part}").read_text().strip() == now.strip()
    }
    order = ("host", "engine", "dev")
    for number, part in enumerate(order):
        # A part holds those before it.
        whole = any(later in fresh for later in order[number:])
        there = any(later in held for later in order[number:])
        if whole:
            yield Finding(f".venv {part}", "ok", f"installed ({serves[part]})")
        elif there:
            yield Finding(f".venv {part}", "warning", "is of another lock than this checkout's",
                          makes[part])  # fmt: skip
        else:
            yield Finding(f".venv {part}", "warning", f"not installed ({serves[part]})",
                          makes[part])  # fmt: skip


def _checkout(outside: Outside) -> Finding:
    changed = outside.run(
        ["git", "-C", str(repository()), "status", "--porcelain", "--untracked-files=no"]
    )
    if changed is None:
        return Finding("git tree", "warning", "is no checkout that git can read: passports name no "
                       "commit", "git clone, instead of a copy")  # fmt: skip
    files = [line[3:] for line in changed.splitlines()]
    if files:
        return Finding(
            "git tree",
            "warning",
            f"{len(files)} tracked files changed ({files[0]}{', ...' if len(files) > 1 else ''})",
            "git commit, or git stash",
        )
    return Finding("git tree", "ok", "clean")


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _disk(what: str, path: Path, where: str, outside: Outside, *, needed: bool = False) -> Finding:
    there = _existing(path)
    if not outside.writable(there):
        return Finding(f"disk of {what}", "missing", f"{there} cannot be written", where,
                       needed=needed)  # fmt: skip
    free = outside.free(there) / GIB
    found = f"{free:,.1f} GiB free in {orders.shown(path)}"
    if free < LEAST_GIB:
        return Finding(f"disk of {what}", "missing", found, f"make room, or {where}", needed=needed)
    if free < LITTLE_GIB:
        return Finding(f"disk of {what}", "warning", found, f"enough for tiny; else {where}")
    return Finding(f"disk of {what}", "ok", found)


def _quota(what: str, used: float, limit: float) -> Finding:
    found = f"{used:,.1f} of {limit:,.1f} GiB used"
    if limit - used < LEAST_GIB:
        return Finding(what, "missing", found, "make room, or another folder in user.toml")
    tight = used > 0.9 * limit
    return Finding(what, "warning" if tight else "ok", found, "make room soon" if tight else "")


def _engine(outside: Outside, *, on_cluster: bool) -> Iterator[Finding]:
    """What runs stages here: .venv's torch or an image, and the GPUs."""
    count = outside.gpus()
    image = container.default_image(count)
    program = _runtime(outside)
    usable = program is not None and image_file(container.images_folder(), image).exists()
    native = outside.module("torch")
    what = "torch"
    if native or usable:
        places = [".venv"] if native else []
        places += [f"{image.name}.sif"] if usable else []
        yield Finding(what, "ok", f"in {' and '.join(places)}")
    elif on_cluster:
        yield Finding(what, "ok", "none here, and jobs need none of a login node")
    else:
        yield Finding(what, "missing", "neither in .venv nor in an image", "make setup",
                      needed=True)  # fmt: skip
    if not count:
        yield Finding(
            "GPUs",
            "ok" if on_cluster else "warning",
            "none here" if on_cluster else "none: stages run on the CPU",
            "" if on_cluster else "fine for TASK=tiny; else a machine with GPUs",
        )
        return
    yield _gpus(outside, count)
    yield _driver(outside)
    te = native and outside.module("transformer_engine")
    if te or usable:
        yield Finding("Transformer Engine", "ok", "in .venv" if te else f"in {image.name}.sif")
        if not usable:
            yield _fast_kernels(outside)
    else:
        yield Finding("Transformer Engine", "warning", f"missing: the {count} GPUs stay idle",
                      "make build-image IMAGE=train, or pip install it into .venv")  # fmt: skip


def _fast_kernels(outside: Outside) -> Finding:
    """What a .venv may lack and the image has: without it a Hopper GPU trains, slower."""
    pins = read_versions(IMAGES["train"], repository()).pins
    packages = {"flash-attn-4": "flash_attn", "quack-kernels": "quack"}
    missing = [name for name, module in packages.items() if not outside.module(module)]
    if missing:
        wanted = " ".join(
            f'"{name}{"[cu13]" if name == "flash-attn-4" else ""}=={pins[name]}"'
            for name in packages
        )
        return Finding("fast kernels", "warning", f"{' and '.join(missing)} missing in .venv: "
                      "slower on Hopper GPUs", f".venv/bin/pip install {wanted}")  # fmt: skip
    return Finding("fast kernels", "ok", f"{' and '.join(packages)} in .venv")


def _gpus(outside: Outside, count: int) -> Finding:
    listed = outside.run(
        ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    )
    if listed is None:
        return Finding("GPUs", "missing", f"{count} in the machine, and nvidia-smi does not answer",
                       "ask the site: the driver does not work", needed=True)  # fmt: skip
    rows = [line.split(", ") for line in listed.splitlines() if line.count(", ") == 1]
    kinds = sorted({f"{name} {float(memory) / 1024:,.0f} GiB" for name, memory in rows})
    found = f"{len(rows)} x {', '.join(kinds)}"
    if len(rows) != count:
        return Finding("GPUs", "missing", f"the driver shows {len(rows)} of {count}",
                       "ask the site: one has fallen off the bus", needed=True)  # fmt: skip
    if len(kinds) > 1:
        return Finding("GPUs", "warning", found, "CUDA_VISIBLE_DEVICES=, GPUs of one kind")
    return Finding("GPUs", "ok", found, "")


def _driver(outside: Outside) -> Finding:
    """The driver's CUDA against that of the train image.

    Within a major version every driver runs every CUDA (NVIDIA, CUDA Compatibility, minor version
    compatibility); an older one needs the compatibility package that NGC images carry.
    """
    said = outside.run(["nvidia-smi"]) or ""
    word = next((line for line in said.splitlines() if "CUDA" in line and "Version:" in line), "")
    now = word.rpartition("Version:")[2].split("|")[0].strip()
    wanted = read_versions(IMAGES["train"]).cuda
    assert wanted is not None
    if not now.replace(".", "").isdigit():
        return Finding("driver", "warning", "does not say which CUDA it has", "nvidia-smi")
    found = f"CUDA {now}, the train image has {wanted}"
    if int(now.split(".")[0]) < int(wanted.split(".")[0]):
        return Finding(
            "driver", "warning", found,
            "works where the image's compatibility package knows this driver (GPUs of data "
            "centres); make doctor GPUS=1 RUNTIME=apptainer tries it, else a newer driver",
        )  # fmt: skip
    return Finding("driver", "ok", found)


def _runtime(outside: Outside) -> tuple[str, str] | None:
    """The container program and what it says of itself."""
    for name in container.RUNTIMES[:2]:
        if outside.which(name):
            said = outside.run([name, "--version"])
            return name, (said or "").strip()
    return None


def _images(outside: Outside) -> Iterator[Finding]:
    program = _runtime(outside)
    if program is None:
        yield Finding(
            "container program",
            "warning",
            "neither apptainer nor singularity",
            "module avail on a cluster, else install Apptainer; stages also run in .venv",
        )
    elif not program[1]:
        yield Finding(
            "container program", "missing", f"{program[0]} does not start", "ask the site"
        )
    else:
        yield Finding("container program", "ok", program[1])
    folder = container.images_folder()
    free = outside.free(_existing(folder)) / GIB
    for image in IMAGES.values():
        path = image_file(folder, image)
        needs = read_versions(image).build_gib
        build = f"make build-image IMAGE={image.name}"
        if path.exists():
            try:
                lock = check_definition(path, image)
            except TanrenError as error:
                yield Finding(path.name, "warning", error.problem, error.next_step or build)
            else:
                yield Finding(path.name, "ok", f"of this checkout, built {lock.built}")
            continue
        room = "" if free >= needs else f", and {free:,.0f} GiB are free of {needs:,.0f} for it"
        yield Finding(path.name, "warning", f"not built{room} ({image.purpose})", build)


def _jobs(outside: Outside, name: str | None, user: User, *, stated: bool) -> Iterator[Finding]:
    if name is None:
        yield Finding("site", "ok", "this machine is no cluster: stages run here (SITE=... names "
                      "one)")  # fmt: skip
        return
    site: Site = read_site(name)
    yield Finding("site", "ok", f"{Path(name).stem} ({site.scheduler})")
    absent = [word for word in _COMMANDS[site.scheduler] if not outside.which(word)]
    if absent:
        yield Finding(
            "scheduler",
            "missing",
            f"no {', '.join(absent)} on this machine",
            "log in to the cluster's login node, or SITE=local",
            needed=stated,
        )
    else:
        yield Finding("scheduler", "ok", ", ".join(_COMMANDS[site.scheduler]))
    if user.group:
        yield Finding("group", "ok", user.group)
    elif site.group_required:
        yield Finding("group", "missing", "user.toml states none, and this site charges one",
                      'write group = "..." into user.toml', needed=True)  # fmt: skip
    else:
        yield Finding("group", "ok", "none, and this site needs none")
    train = image_file(container.images_folder(), IMAGES["train"])
    if site.types[site.gpu_type].gpus and not train.exists():
        yield Finding(
            "image for jobs",
            "missing",
            f"no {train}",
            "make build-image IMAGE=train, or RUNTIME=native where .venv has Transformer Engine",
        )


def _environment(outside: Outside, environment: Environment, name: str) -> Finding:
    """Whether the environment that a stage has to itself is there."""
    python, makes = environment.python(outside.environment), f"make env-{environment.part}"
    if not outside.which(str(python)):
        return Finding(name, "warning", f"no {orders.shown(python)}", makes)
    if not environment.is_current(python):
        return Finding(name, "warning", "is of another lock than this checkout's", makes)
    return Finding(name, "ok", environment.pinned())


def _offline(outside: Outside) -> bool:
    return outside.environment.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def _network(outside: Outside, endpoint: str, asked: Asked | None) -> Iterator[Finding]:
    if asked is None:
        yield Finding("hub", "warning", "HF_HUB_OFFLINE is set: nothing is fetched",
                      "unset HF_HUB_OFFLINE to fetch")  # fmt: skip
    else:
        problem = asked.problem()
        if problem is None:
            yield Finding("hub", "ok", f"{endpoint} answers")
        else:
            yield Finding(
                "hub",
                "warning",
                f"{endpoint}: {problem}",
                "https_proxy=, or HF_ENDPOINT= of a mirror; make fetch elsewhere",
            )
    # Whether they are set, and nothing else of them.
    for key, without in (("HF_TOKEN", "open repositories alone can be fetched"),
                         ("WANDB_API_KEY", "curves stay in the run folder")):  # fmt: skip
        if outside.environment.get(key):
            yield Finding(key, "ok", "is set")
        else:
            yield Finding(
                key, "warning", f"is not set: {without}", f"export {key}=... if you want it"
            )
