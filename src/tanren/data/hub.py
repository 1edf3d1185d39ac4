"""What is there of the Hugging Face hub: references, folders, manifests. Asks no network.

    DATA/hub/datasets/OWNER--NAME/0123456789ab/       files, named as in the repository
    DATA/hub/datasets/OWNER--NAME/0123456789ab.json   the manifest: written last, when all is there
    DATA/hub/datasets/OWNER--NAME/revisions.json      the commits that branches and tags once were

and the same below models/. A manifest lies beside its folder, which so stays a model's folder.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from tanren import runs
from tanren.config.errors import RequestError
from tanren.config.fields import HUB_REFERENCE, Strict
from tanren.config.load import read_user, repository

Kind = Literal["dataset", "model"]
# What belongs to a tokenizer in a model's folder; some come with a class of their own.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "*.model", "*tokenizer*.py", "chat_template.jinja",
)  # fmt: skip
MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "*tokenizer*.py")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Reference:
    """A repository of the hub at a revision: `owner/name@revision`, or `owner/name` for main."""

    kind: Kind
    name: str
    revision: str = "main"

    @property
    def pinned(self) -> bool:
        """Whether the revision is a commit, which never moves."""
        return _COMMIT.fullmatch(self.revision) is not None

    def __str__(self) -> str:
        return f"hf:{self.name}@{self.revision}"


@dataclass(frozen=True)
class Wanted:
    """Files of a repository, by globs.

    `each`: every glob must match a file. Without it one that matches is enough.
    """

    reference: Reference
    globs: tuple[str, ...]
    each: bool = True

    def matches(self, path: str) -> bool:
        """Whether a path of the repository is among them."""
        return any(matches(path, glob) for glob in self.globs)


class FetchedFile(Strict):
    """A file as it was verified."""

    bytes: int
    sha256: str


class Manifest(Strict):
    """What is whole in a fetched folder: the files that these globs match, at one commit."""

    format: Literal[1] = 1
    kind: Kind
    repository: str
    revision: str
    globs: tuple[str, ...]
    files: dict[str, FetchedFile]
    fetched: str


@dataclass(frozen=True)
class Fetched:
    """The wanted files, whole."""

    folder: Path
    revision: str
    # Sorted by their path in the repository.
    files: tuple[Path, ...]
    # What a product made from them remembers: the commit, and which of its files.
    mark: str


class NotFetchedError(RequestError):
    """The wanted files are not there, or not whole."""


def parse(text: str, kind: Kind) -> Reference:
    """Read `owner/name[@revision]`, with `hf:` before it or without.

    Raises:
        RequestError: it is none.
    """
    name, _, revision = text.removeprefix("hf:").partition("@")
    if re.fullmatch(HUB_REFERENCE, text.removeprefix("hf:")) is None:
        raise RequestError(
            text, "is neither a folder here nor a repository of the hub",
            "write hf:owner/name@revision, or the path of a folder",
        )  # fmt: skip
    return Reference(kind, name, revision or "main")


def model_of(text: str) -> Wanted:
    """What a base model is made of: config, weights and tokenizer, as far as it has them."""
    return Wanted(parse(text, "model"), MODEL_FILES, each=False)


def tokenizer_of(text: str) -> Wanted:
    """A tokenizer's files, as far as the repository has them."""
    return Wanted(parse(text, "model"), TOKENIZER_FILES, each=False)


def data_root() -> Path:
    """Where fetched data goes: $DATA, else user.toml's data, else data/ in the repository."""
    stated = os.environ.get("DATA") or read_user().data
    return Path(stated).expanduser().resolve() if stated else repository() / "data"


def repository_folder(reference: Reference) -> Path:
    """Where everything of a repository is."""
    return data_root() / "hub" / f"{reference.kind}s" / reference.name.replace("/", "--")


def folder_of(reference: Reference, commit: str) -> Path:
    """The folder of a repository's files at a commit."""
    return repository_folder(reference) / commit[:12]


def manifest_file(folder: Path) -> Path:
    return folder.with_name(folder.name + ".json")


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a fetched folder; None where there is none: the folder is not whole."""
    path = manifest_file(folder)
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise RequestError(
            path, f"is no manifest of this version of tanren: {error.errors()[0]['msg']}",
            f"rm {path}, and fetch again: files that are there are checked and kept",
        ) from None  # fmt: skip


def commit_of(reference: Reference) -> str | None:
    """The commit that a reference means; None while its branch or tag was never asked for."""
    if reference.pinned:
        return reference.revision
    known = runs.read_json(repository_folder(reference) / "revisions.json") or {}
    found = known.get(reference.revision)
    return None if found is None else str(found["commit"])


def remember(reference: Reference, commit: str, when: str) -> None:
    """Write down what a branch or a tag is, so that later fetches take the same."""
    path = repository_folder(reference) / "revisions.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    known = runs.read_json(path) or {}
    runs.write_json(path, {**known, reference.revision: {"commit": commit, "asked": when}})


def find(wanted: Wanted) -> Fetched:
    """The wanted files, from the manifest and the sizes on disk.

    Raises:
        NotFetchedError: they are not there, or not whole.
    """
    commit = commit_of(wanted.reference)
    if commit is None:
        raise _not_fetched(wanted, "is not fetched yet")
    folder = folder_of(wanted.reference, commit)
    manifest = read_manifest(folder)
    if manifest is None:
        begun = folder.is_dir()
        raise _not_fetched(wanted, "was not fetched to its end" if begun else "is not fetched yet")
    absent = [glob for glob in wanted.globs if glob not in manifest.globs]
    if absent:
        raise _not_fetched(wanted, f"the files {', '.join(absent)} of it are not fetched yet")
    files = {path: facts for path, facts in manifest.files.items() if wanted.matches(path)}
    broken = [path for path, facts in files.items() if size_of(folder / path) != facts.bytes]
    if broken:
        raise _not_fetched(wanted, f"is not whole any more: {shortened(broken)} in {folder}")
    return Fetched(
        folder, commit, tuple(folder / path for path in sorted(files)), _mark(commit, files)
    )


def size_of(path: Path) -> int | None:
    """Bytes of a file; None where there is none."""
    return path.stat().st_size if path.is_file() else None


def _not_fetched(wanted: Wanted, problem: str) -> NotFetchedError:
    words = ["bin/tanren", "fetch", str(wanted.reference), "--kind", wanted.reference.kind]
    for glob in wanted.globs if wanted.each else ():
        words += ["--files", f"'{glob}'"]
    return NotFetchedError(
        wanted.reference, problem, f"make fetch TASK=... (or {' '.join(words)}), on a machine "
        "that reaches the hub",
    )  # fmt: skip


def _mark(commit: str, files: dict[str, FetchedFile]) -> str:
    # The commit says their content, which was verified.
    digest = hashlib.sha256(repr(sorted(files)).encode()).hexdigest()[:8]
    size = sum(facts.bytes for facts in files.values())
    return f"{commit}: {len(files)} files of {size:,} bytes ({digest})"


def matches(path: str, glob: str) -> bool:
    """Whether a repository's path matches a glob: `*` stays in a folder, `**` spans folders."""
    return _matches(path.split("/"), glob.split("/"))


def _matches(names: list[str], globs: list[str]) -> bool:
    if not globs:
        return not names
    if globs[0] == "**":
        return any(_matches(names[start:], globs[1:]) for start in range(len(names) + 1))
    return (
        bool(names) and fnmatch.fnmatchcase(names[0], globs[0]) and _matches(names[1:], globs[1:])
    )


def shortened(names: Iterable[str], most: int = 3) -> str:
    """The first names of many, and how many there are."""
    listed = list(names)
    rest = f", ... ({len(listed)} in all)" if len(listed) > most else ""
    return ", ".join(listed[:most]) + rest
