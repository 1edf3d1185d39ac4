"""How a stage runs inside an image. Nothing else knows Apptainer's or SingularityCE's command line.

The host stays out: a clean environment with a list of what may pass, a home of its own, no cwd, an
image that cannot be written, and only the folders that the run needs, each checked to exist.
"""

from __future__ import annotations

import glob
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tanren.config.errors import RequestError
from tanren.config.load import read_user, repository
from tanren.config.schema import Recipe
from tanren.data import hub
from tanren.images.builder import Builder, Places
from tanren.images.definition import IMAGES, Image, image_named
from tanren.images.lock import Lock, check_definition, image_file
from tanren.launch import inputs

RUNTIMES = ("apptainer", "singularity", "native")
HOME = "/home/tanren"
# What passes from the host into a container when it is set; a pattern passes every name that
# begins so. Keys and tokens are named here and stand in no file.
PASSED = (
    "CUDA_VISIBLE_DEVICES", "HF_ENDPOINT", "HF_HOME", "HF_HUB_OFFLINE", "HF_TOKEN", "JOB_ID",
    "PBS_JOBID", "SLURM_JOB_ID", "TANREN_DEADLINE", "TANREN_DEBUG", "WANDB_API_KEY",
    "WANDB_BASE_URL", "WANDB_ENTITY", "WANDB_MODE", "WANDB_PROJECT", "http_proxy", "https_proxy",
    "no_proxy",
)  # fmt: skip
PASSED_PATTERNS = ("FI_", "GLOO_", "NCCL_", "UCX_")


@dataclass(frozen=True)
class Runtime:
    """A container program on this machine."""

    name: str
    binary: Path
    version: str

    @property
    def builder(self) -> Builder:
        return Builder(self.binary, self.version)


@dataclass(frozen=True)
class Container:
    """An image, and how to run something in it."""

    runtime: Runtime
    image: Path
    lock: Lock
    gpu: bool
    # Folders that are there under the same path inside: (path, may be written).
    binds: tuple[tuple[Path, bool], ...] = ()


@cache
def find(wanted: str | None = None) -> Runtime | None:
    """The container program of this machine, Apptainer first; None where there is none."""
    for name in (wanted,) if wanted else RUNTIMES[:2]:
        found = shutil.which(name)
        if found:
            said = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
            if said.returncode:
                raise RequestError(found, f"does not start: {said.stderr.strip()}",
                                   "ask the site, or use RUNTIME=native")  # fmt: skip
            return Runtime(name, Path(found).absolute(), said.stdout.strip())
    return None


def require(wanted: str | None = None) -> Runtime:
    """The container program of this machine.

    Raises:
        RequestError: there is none; the message says how to get one.
    """
    runtime = find(wanted)
    if runtime is None:
        raise RequestError(
            wanted or "apptainer, singularity",
            "is not on this machine" if wanted else "neither is on this machine",
            "on a cluster load the site's module (module avail); on your own machine install "
            "Apptainer (Ubuntu: add-apt-repository ppa:apptainer/ppa && apt install apptainer; "
            "Fedora, RHEL with EPEL: dnf install apptainer); or RUNTIME=native where the stage may "
            "run without an image",
        )
    return runtime


def images_folder() -> Path:
    """Where images are: $IMAGES, else user.toml's images, else images/ in the repository."""
    stated = os.environ.get("IMAGES") or read_user().images
    return Path(stated).expanduser().resolve() if stated else repository() / "images"


def places(gpu: bool) -> Places:
    """Where a build reads and writes on this machine."""
    user, images = read_user(), images_folder()
    cache = os.environ.get("TANREN_CACHE") or user.cache
    return Places(
        images=images,
        # Beside the images, which are large as well: a home of 25 GB is no place for layers.
        cache=Path(cache).expanduser().resolve() if cache else images / ".cache",
        scratch=Path(os.environ.get("TMPDIR") or "/tmp"),
        debian_mirror=os.environ.get("DEBIAN_MIRROR") or user.debian_mirror,
        gpu=gpu,
    )


def default_image(gpus: int, own: str | None = None) -> Image:
    """The image that stages run in on a machine with so many GPUs, or `own`, a stage's own one."""
    return IMAGES[own or ("train" if gpus else "cpu")]


def choose(wanted: str | None, gpus: int, own: str | None = None) -> Container | None:
    """The container that stages run in here; None for this machine's own Python.

    Without a wish: the image for this machine (train where there are GPUs, else cpu) where both it
    and a container program are there.

    Args:
        own: the image of a stage that has one to itself (merge, nemo).
    Raises:
        RequestError: the wish cannot be met, or the image is not this checkout's.
    """
    wanted = wanted or os.environ.get("RUNTIME") or None
    if wanted is not None and wanted not in RUNTIMES:
        raise RequestError(f"RUNTIME={wanted}", "there is no such runtime", " or ".join(RUNTIMES))
    if wanted == "native":
        return None
    image = default_image(gpus, own)
    path = image_file(images_folder(), image)
    if wanted is None and not (path.exists() and find()):
        return None
    runtime = require(wanted)
    return Container(runtime, path, check_definition(path, image), bool(gpus) and own != "merge")


def binds(
    recipe: Recipe | None, runs: Path, wishes: Iterable[str] = ()
) -> tuple[tuple[Path, bool], ...]:
    """The folders that a run needs: the repository, the runs, what the recipe and the user name.

    Fetched data is there in every run: a later stage takes tokenizer and config from the base.

    Raises:
        RequestError: a folder is not there.
    """
    found = {repository(): False, runs: True}
    home = os.environ.get("HF_HOME")
    named = [*read_user().binds, *wishes, *([home] if home else [])]
    for wish in named:
        path = Path(wish).expanduser().absolute()
        if not path.exists():
            raise RequestError(f"bind {wish}", "there is no such folder on this machine",
                               "check BIND=, or binds in user.toml")  # fmt: skip
        found[path] = True
    for pattern in inputs.paths(recipe) if recipe is not None else ():
        for folder in _folders_behind(pattern):
            found.setdefault(folder, False)
    if hub.data_root().is_dir():
        found.setdefault(hub.data_root(), False)
    # A parent first: what lies in it is mounted over it.
    return tuple(sorted(found.items()))


def _folders_behind(pattern: str) -> set[Path]:
    """The folders of the files that a pattern matches, and those that its links lead to.

    A Hugging Face cache holds links into another folder, which must be there too.
    """
    found = set()
    for match in map(Path, glob.glob(pattern, recursive=True)):
        found.add(match if match.is_dir() else match.parent)
        for file in match.iterdir() if match.is_dir() else [match]:
            if file.is_symlink() and file.exists():
                found.add(file.resolve().parent)
    return found


def command(container: Container, words: Sequence[str], folder: Path) -> list[str]:
    """The command that runs `words` in an image, in `folder`, as a word list.

    Its home is written as shell text; see `shell_line`.
    """
    result = [str(container.runtime.binary), "exec", "--cleanenv", "--no-mount", "cwd"]
    result += ["--nv"] if container.gpu else []
    result += ["--home", f"{_HOST_HOME}:{HOME}", "--pwd", str(folder)]
    for path, writable in container.binds:
        if any(character in str(path) for character in ",:"):
            raise RequestError(
                path, "cannot be bound: its name has a comma or a colon", "rename it"
            )
        result += ["--bind", f"{path}:{path}" + ("" if writable else ":ro")]
    return [*result, str(container.image), *words]


def open_shell(
    name: str | None, wanted: str | None, gpus: int, runs: Path, wishes: tuple[str, ...]
) -> None:
    """Replace this process by a shell in an image.

    Raises:
        RequestError: there is no container program, or no such image.
    """
    image = image_named(name) if name else default_image(gpus)
    runtime = require(wanted if wanted != "native" else None)
    path = image_file(images_folder(), image)
    lock = check_definition(path, image)
    runs.mkdir(parents=True, exist_ok=True)
    inside = Container(runtime, path, lock, bool(gpus), binds(None, runs, wishes))
    sys.stdout.flush()
    os.execvp("bash", ["bash", "-c", script_of(inside, ["bash", "--norc"])])


def script_of(inside: Container, words: Sequence[str]) -> str:
    """A shell script that becomes words in an image, with the repository's code."""
    environment = {"PYTHONPATH": str(repository() / "src"), "RUNTIME": "native"}
    line = shell_line(command(inside, words, repository()))
    return "\n".join([*prologue(environment), f"exec {line}"])


# Node-local, and never the user's home: what programs keep there is gone with the job.
_HOST_HOME = "@HOME@"
_HOST_HOME_SHELL = '"${TMPDIR:-/tmp}/tanren-home-$UID"'


# The rank of a node among a job's nodes, known on the node alone.
NODE_RANK = "@NODE_RANK@"


def shell_line(words: Sequence[str]) -> str:
    """A word list as one line of a shell script, with what only the node knows as its variables."""

    def quoted(word: str) -> str:
        if word.startswith(_HOST_HOME):
            return _HOST_HOME_SHELL + shlex.quote(word.removeprefix(_HOST_HOME))
        return '"$node_rank"' if word == NODE_RANK else shlex.quote(word)

    return " ".join(map(quoted, words))


def prologue(environment: dict[str, str]) -> list[str]:
    """The lines of a job script that make what passes into the container.

    Both programs' names are set: on some sites `singularity` is Apptainer under its old name.
    """
    lines = ["# Into the container pass these and nothing else of the environment."]
    for key, value in environment.items():
        quoted = shlex.quote(value)
        lines.append(f"export APPTAINERENV_{key}={quoted} SINGULARITYENV_{key}={quoted}")
    patterns = " ".join(f'"${{!{pattern}@}}"' for pattern in PASSED_PATTERNS)
    names = " ".join(name for name in PASSED if name not in environment)
    return [
        *lines,
        f"for name in {names} {patterns}; do",
        "    if [[ -v $name ]]; then",
        '        export "APPTAINERENV_$name=${!name}" "SINGULARITYENV_$name=${!name}"',
        "    fi",
        "done",
        "unset APPTAINER_BIND APPTAINER_BINDPATH SINGULARITY_BIND SINGULARITY_BINDPATH",
        f"mkdir -p {_HOST_HOME_SHELL}",
    ]
