"""Fetches repositories of the Hugging Face hub: pinned, in parallel, verified, gone on with.

huggingface_hub downloads. What it leaves open is done here: which commit, which files, whether they
fit on the disk, whether their content is what the hub states, and a manifest when all is whole.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from tanren import runs
from tanren.config.errors import RequestError, WorkError
from tanren.data import hub
from tanren.data.hub import Fetched, FetchedFile, Manifest, Reference, Wanted
from tanren.data.hub_errors import explained

WORKERS = 8
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Progress:
    """How far a fetch is. `total_bytes` counts what was there already, too."""

    doing: str
    files: int = 0
    total_files: int = 0
    bytes: int = 0
    total_bytes: int = 0


Report = Callable[[Progress], None]


@dataclass(frozen=True)
class _Listed:
    """A file as the hub states it: its size, and one hash of its content."""

    path: str
    bytes: int
    algorithm: str
    digest: str


def fetch(
    wanted: Wanted, report: Report = lambda _: None, say: Callable[[str], None] = lambda _: None,
    *, workers: int = WORKERS, verify: bool = False, update: bool = False,
) -> Fetched:  # fmt: skip
    """The wanted files, fetched where they are not there. Whole files of an earlier try are kept.

    Args:
        report: called from several threads, one at a time.
        say: called with what a person should know: a branch that moved, a file fetched again.
        verify: hash again what is there, and fetch what has changed.
        update: ask anew which commit a branch or a tag is.
    Raises:
        RequestError: no such repository, revision or file; a login is needed; the disk is too
            small; the hub must not be asked (HF_HUB_OFFLINE).
        WorkError: the hub does not answer, or a file is not what the hub states.
    """
    reference = wanted.reference
    before = commit = hub.commit_of(reference)
    if commit is None or (update and not reference.pinned):
        commit = _ask_commit(reference)
    if before is None:
        hub.remember(reference, commit, _now())
    at_commit = replace(wanted, reference=replace(reference, revision=commit))
    folder = hub.folder_of(reference, commit)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        found = hub.find(at_commit)
    except hub.NotFetchedError as absent:
        found = _complete(wanted, at_commit, folder, report, workers, absent.problem)
    if verify:
        changed = _changed(found, folder, report, workers)
        if changed:
            problem = f"changed since it was fetched: {hub.shortened(changed)}"
            say(f"{reference} {problem}; fetched again")
            found = _complete(wanted, at_commit, folder, report, workers, problem)
    if before not in (None, commit):
        hub.remember(reference, commit, _now())
        say(f"{reference} moved from {before} to {commit}; the old files stay in "
            f"{hub.folder_of(reference, str(before))}")  # fmt: skip
    return found


def _complete(
    wanted: Wanted, at_commit: Wanted, folder: Path, report: Report, workers: int, problem: str
) -> Fetched:
    """Download what is not there and write the manifest."""
    if _offline():
        raise RequestError(
            wanted.reference, f"{problem}, and HF_HUB_OFFLINE forbids to ask the hub",
            f"unset HF_HUB_OFFLINE, or fetch elsewhere and copy {folder.parent}",
        )  # fmt: skip
    with runs.locked(folder.with_name(folder.name + ".lock")):
        report(Progress("asking the hub for its list of files"))
        listed = _chosen(wanted, _list(at_commit.reference))
        manifest = hub.read_manifest(folder)
        known = manifest.files if manifest else {}
        for file in listed:
            if hub.size_of(folder / file.path) not in (None, file.bytes):
                (folder / file.path).unlink()
        _check_disk(wanted.reference, folder, listed)
        _remove_torn(folder)
        verified = _download(at_commit.reference, folder, listed, known, report, workers)
        whole = Manifest(
            kind=wanted.reference.kind,
            repository=wanted.reference.name,
            revision=at_commit.reference.revision,
            globs=tuple(sorted({*(manifest.globs if manifest else ()), *wanted.globs})),
            files=dict(sorted({**known, **verified}.items())),
            fetched=_now(),
        )
        runs.write_json(hub.manifest_file(folder), orjson.loads(whole.model_dump_json()))
    return hub.find(at_commit)


def _ask_commit(reference: Reference) -> str:
    if _offline():
        raise RequestError(
            reference, "HF_HUB_OFFLINE forbids to ask which commit it is",
            f"unset HF_HUB_OFFLINE, or name a commit: hf:{reference.name}@COMMIT",
        )  # fmt: skip
    with explained(reference):
        info = _api().repo_info(
            reference.name, repo_type=reference.kind, revision=reference.revision
        )
    return str(info.sha)


@functools.cache
def _list(reference: Reference) -> list[_Listed]:
    """Every file of a repository at a commit; asked once, however many sources take from it."""
    from huggingface_hub.hf_api import RepoFile

    with explained(reference):
        entries = _api().list_repo_tree(
            reference.name, recursive=True, revision=reference.revision, repo_type=reference.kind
        )
        files = [entry for entry in entries if isinstance(entry, RepoFile)]
    return [
        _Listed(file.path, file.lfs.size, "sha256", file.lfs.sha256)
        if file.lfs
        else _Listed(file.path, file.size, "git", file.blob_id)
        for file in files
    ]


def _chosen(wanted: Wanted, listed: list[_Listed]) -> list[_Listed]:
    unmatched = [
        glob for glob in wanted.globs if not any(hub.matches(f.path, glob) for f in listed)
    ]
    if unmatched and (wanted.each or len(unmatched) == len(wanted.globs)):
        raise RequestError(
            wanted.reference,
            f"no file matches {' or '.join(unmatched)}; it has "
            f"{hub.shortened(sorted(file.path for file in listed), 8) or 'no file at all'}",
            "* stays in a folder, ** spans folders: FOLDER/**/*.jsonl",
        )
    return [file for file in listed if wanted.matches(file.path)]


def _check_disk(reference: Reference, folder: Path, listed: list[_Listed]) -> None:
    needed = sum(file.bytes for file in listed if hub.size_of(folder / file.path) is None)
    free = shutil.disk_usage(folder.parent).free
    if needed > free:
        raise RequestError(
            folder.parent,
            f"{reference} needs {needed / 2**30:,.1f} GiB more, and {free / 2**30:,.1f} are free",
            "free some space, or DATA= on a larger disk",
        )


def _remove_torn(folder: Path) -> None:
    """Remove what a killed download left: huggingface_hub never takes it up again."""
    for torn in (folder / ".cache" / "huggingface").rglob("*.incomplete"):
        torn.unlink(missing_ok=True)


class _Tally:
    """Counts files and bytes for all threads, and tells them to stop."""

    def __init__(self, report: Report, doing: str, files: int, total_bytes: int) -> None:
        self._report, self._doing = report, doing
        self._total_files, self._total_bytes = files, total_bytes
        self._files = self._bytes = 0
        self._lock = threading.Lock()
        self._stopped = False

    def add(self, count: int, *, files: int = 0) -> None:
        if self._stopped:
            raise InterruptedError("Ctrl-C")
        with self._lock:
            self._bytes += count
            self._files += files
            self._report(Progress(
                self._doing, self._files, self._total_files, self._bytes, self._total_bytes
            ))  # fmt: skip

    def stop(self) -> None:
        self._stopped = True


def _download(
    reference: Reference, folder: Path, listed: list[_Listed], known: dict[str, FetchedFile],
    report: Report, workers: int,
) -> dict[str, FetchedFile]:  # fmt: skip
    """Bring every listed file and check its content, several at a time."""
    tally = _Tally(report, f"fetching {reference.name}", len(listed), sum(f.bytes for f in listed))

    def bring(file: _Listed) -> FetchedFile:
        there = known.get(file.path)
        if there and there.bytes == hub.size_of(folder / file.path) == file.bytes:
            tally.add(file.bytes, files=1)
            return there
        counted = _download_one(reference, folder, file, tally)
        result = _verified(folder, file)
        tally.add(file.bytes - counted, files=1)
        return result

    done = _in_parallel(bring, listed, workers, tally)
    return {file.path: facts for file, facts in zip(listed, done, strict=True)}


def _in_parallel(
    work: Callable[[Any], Any], items: Iterable[Any], workers: int, tally: _Tally
) -> list[Any]:
    """The results of `work` in the order of the items.

    After an error nothing new is begun, and what is under way comes to its end: a file that is torn
    off would be fetched from its beginning again. Ctrl-C ends at once.
    """
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException as error:
            if not isinstance(error, Exception):
                tally.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return [future.result() for future in futures]


def _download_one(reference: Reference, folder: Path, file: _Listed, tally: _Tally) -> int:
    """Bring a file that is not there; the bytes that the tally was told of."""
    from huggingface_hub import hf_hub_download

    counted = 0

    class Bar:
        """The part of tqdm that huggingface_hub uses for one file."""

        def __init__(self, *_: object, **__: object) -> None: ...
        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None: ...
        def close(self) -> None: ...
        def update(self, count: float | None = 1) -> None:
            nonlocal counted
            counted += int(count or 0)
            tally.add(int(count or 0))

        # xet counts what comes over the network apart from what reaches the disk.
        def update_transfer(self, count: float | None = 1) -> None: ...
        def set_postfix_str(self, *_: object, **__: object) -> None: ...
        def set_transfer_postfix_str(self, *_: object, **__: object) -> None: ...

    with explained(reference, file.path):
        hf_hub_download(
            reference.name, file.path, repo_type=reference.kind, revision=reference.revision,
            local_dir=folder, endpoint=_endpoint(), tqdm_class=Bar,
        )  # fmt: skip
    return counted


def _verified(folder: Path, file: _Listed) -> FetchedFile:
    """The facts of a file that has the hub's content; one that has not is removed."""
    path = folder / file.path
    sha256 = _hash(path, hashlib.sha256())
    # What is not large the hub states by the name that git gives its content.
    git = hashlib.sha1(b"blob %d\0" % file.bytes, usedforsecurity=False)
    stated = sha256 if file.algorithm == "sha256" else _hash(path, git)
    size = path.stat().st_size
    if (size, stated) != (file.bytes, file.digest):
        path.unlink()
        raise WorkError(
            path,
            f"is not what the hub states: {file.algorithm} {stated} of {size:,} bytes came, and it "
            f"states {file.digest} of {file.bytes:,}",
            "the same command fetches it again; if that fails, a mirror (HF_ENDPOINT) or a proxy "
            "changes files",
        )
    return FetchedFile(bytes=size, sha256=sha256)


def _hash(path: Path, digest: Any) -> str:
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return str(digest.hexdigest())


def _changed(found: Fetched, folder: Path, report: Report, workers: int) -> list[str]:
    """Hash what is there; what is no longer what was fetched is removed, and named."""
    manifest = hub.read_manifest(folder)
    assert manifest is not None, folder
    paths = [str(path.relative_to(folder)) for path in found.files]
    total = sum(manifest.files[path].bytes for path in paths)
    tally = _Tally(report, f"verifying {manifest.repository}", len(paths), total)

    def same(path: str) -> bool:
        facts = manifest.files[path]
        sha256 = _hash(folder / path, hashlib.sha256())
        tally.add(facts.bytes, files=1)
        return sha256 == facts.sha256

    verdicts = _in_parallel(same, paths, workers, tally)
    changed = [path for path, good in zip(paths, verdicts, strict=True) if not good]
    for path in changed:
        (folder / path).unlink()
    return changed


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _api() -> Any:
    from huggingface_hub import HfApi
    from huggingface_hub.utils import logging

    # Its warnings name long addresses; what matters of them comes as one of our errors.
    logging.set_verbosity_error()
    return HfApi(endpoint=_endpoint())


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.is_offline_mode())


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
