"""Text to token files: Megatron's bytes, whoever and however many make them."""

from __future__ import annotations

import os
import resource
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import psutil
import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from tanren.config.data import Source
from tanren.config.errors import RequestError, WorkError
from tanren.data import indexed, shards, tokenize
from tanren.data import tokenizer as tokenizers
from tanren.data.documents import units
from tanren.data.shards import Maker, Settings
from tanren.data.tokenize import Job, Progress

TEXTS = [f"{number}: 鍛錬 " + "the smith folds the steel " * (number % 5) for number in range(300)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tokenizers.Tokenizer:
    return tokenizers.train(TEXTS, 400, tmp_path_factory.mktemp("tokenizer"))


def lines(texts: list[str]) -> bytes:
    return b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts)


@pytest.fixture
def job(tmp_path: Path, tokenizer: tokenizers.Tokenizer) -> Job:
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS[:200]))
    (tmp_path / "b.jsonl").write_bytes(lines(["", *TEXTS[200:]]))
    names = ("one", "two/of two")
    return Job(
        sources=(Source(name="one", path=f"{tmp_path}/*.jsonl"),
                 Source(name="two", path=f"{tmp_path}/b.jsonl")),
        prefixes=tuple(tmp_path / "tokens" / name for name in names),
        tokenizer=tokenizer.folder, settings=Settings(), shards=tmp_path / "shards", workers=1,
        unit_bytes=2000,
    )  # fmt: skip


def quiet(_: Progress) -> None:
    pass


def pair(prefix: Path) -> tuple[bytes, bytes]:
    return indexed.bin_path(prefix).read_bytes(), indexed.idx_path(prefix).read_bytes()


@pytest.mark.parametrize("settings", [Settings(), Settings(False, True), Settings(True, True)])
def test_the_files_are_those_of_megatron_fed_document_by_document(
    tmp_path: Path, job: Job, tokenizer: tokenizers.Tokenizer, settings: Settings
) -> None:
    builder = IndexedDatasetBuilder(f"{tmp_path}/theirs.bin", dtype=DType.optimal_dtype(400))
    documents = 0
    for text in TEXTS:
        [ids] = tokenizer.encode([text])
        whole = [tokenizer.bos] * settings.prepend_bos + ids.tolist()
        whole += [tokenizer.eod] * settings.append_eod
        builder.add_document(torch.tensor(whole), [len(whole)])
        documents += 1
    builder.finalize(f"{tmp_path}/theirs.idx")
    [one, two] = tokenize.run(replace(job, settings=settings), quiet)
    assert pair(job.prefixes[0]) == pair(tmp_path / "theirs")
    assert (one.documents, one.empty, one.skipped) == (documents, 1, 0)
    assert one.tokens == indexed.check(job.prefixes[0]).tokens
    assert indexed.check(job.prefixes[1]) == indexed.Counts(two.documents, two.tokens)
    assert two.documents == 100
    assert not job.shards.exists()


def test_the_result_depends_neither_on_workers_nor_on_where_files_are_cut(job: Job) -> None:
    first = tokenize.run(job, quiet)
    files = [pair(prefix) for prefix in job.prefixes]
    again = tokenize.run(replace(job, workers=3), quiet)
    assert again == first
    assert [pair(prefix) for prefix in job.prefixes] == files
    tokenize.run(replace(job, unit_bytes=64 << 20), quiet)
    assert [pair(prefix) for prefix in job.prefixes] == files


def test_nodes_make_parts_that_are_found(job: Job) -> None:
    """Each of three makes its third; whoever joins makes nothing more."""
    tokenize.run(job, quiet)
    files = [pair(prefix) for prefix in job.prefixes]
    total = sum(len(units(source, job.unit_bytes)) for source in job.sources)
    assert sum(tokenize.run_part(job, part, 3, quiet) for part in range(3)) == total
    made = {path.name: path.stat().st_mtime_ns for path in job.shards.glob("*.bin")}
    assert len(made) < total, "the text of b.jsonl is in both sources, and made once"
    seen: list[Progress] = []

    def watch(progress: Progress) -> None:
        seen.append(progress)
        now = {path.name: path.stat().st_mtime_ns for path in job.shards.glob("*.bin")}
        assert now == made

    tokenize.run(job, watch)
    assert [pair(prefix) for prefix in job.prefixes] == files
    assert [progress.done for progress in seen] == list(range(1, total + 1))
    assert seen[-1].tokens == sum(indexed.check(prefix).tokens for prefix in job.prefixes)


def test_an_interrupted_job_goes_on_with_what_it_has(job: Job) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize.run(job, interrupt)
    kept = {path.name: path.stat().st_mtime_ns for path in job.shards.glob("*.json")}
    assert len(kept) >= 3
    assert not any(prefix.parent.exists() for prefix in job.prefixes), "no half source is there"

    def watch(_: Progress) -> None:
        now = {path.name: path.stat().st_mtime_ns for path in job.shards.glob("*.json")}
        assert kept.items() <= now.items()

    whole = tokenize.run(replace(job, shards=job.shards.with_name("other")), quiet)
    files = [pair(prefix) for prefix in job.prefixes]
    assert tokenize.run(job, watch) == whole
    assert [pair(prefix) for prefix in job.prefixes] == files


@pytest.mark.parametrize("change", ["text", "tokenizer", "eod", "text_key"])
def test_a_shard_of_something_else_is_not_taken(
    tmp_path: Path, job: Job, tokenizer: tokenizers.Tokenizer, change: str
) -> None:
    [unit, *_] = units(job.sources[0], job.unit_bytes)
    assert unit.path is not None
    first = Maker(tokenizer, Settings(), tmp_path)(unit)
    assert Maker(tokenizer, Settings(), tmp_path)(unit).key == first.key
    settings = Settings(append_eod=change != "eod")
    if change == "text":
        data = unit.path.read_bytes()
        unit.path.write_bytes(data.replace(b"steel", b"sword", 1))
    elif change == "tokenizer":
        tokenizer = tokenizers.train(TEXTS, 399, tmp_path / "smaller")
    elif change == "text_key":
        unit.path.write_bytes(unit.path.read_bytes().replace(b'"text"', b'"body"'))
        unit = replace(unit, source=Source(name="one", path="x", text_key="body"))
    second = Maker(tokenizer, settings, tmp_path)(unit)
    assert second.key != first.key
    assert shards.read(tmp_path, first.key) == first


def test_a_shard_that_is_not_whole_is_made_again(
    tmp_path: Path, job: Job, tokenizer: tokenizers.Tokenizer
) -> None:
    [unit, *_] = units(job.sources[0], job.unit_bytes)
    shard = Maker(tokenizer, Settings(), tmp_path)(unit)
    tokens = tmp_path / f"{shard.key}.bin"
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:-2])
    assert shards.read(tmp_path, shard.key) is None
    assert Maker(tokenizer, Settings(), tmp_path)(unit) == shard
    assert tokens.read_bytes() == whole


def test_lines_that_are_no_documents_stop_or_are_passed_over_and_written_down(job: Job) -> None:
    path = Path(str(job.sources[1].path))
    path.write_bytes(path.read_bytes() + b'{"body": 1}\n' + lines(["last"]) + b"{\n")
    with pytest.raises(RequestError, match=r"has no text under 'text'; it has body") as caught:
        tokenize.run(job, quiet)
    assert caught.value.place == f"{path}:102"
    assert "on_error: skip" in caught.value.next_step
    job = replace(job, settings=Settings(on_error="skip"), workers=2)
    [one, two] = tokenize.run(job, quiet)
    assert (one.skipped, two.skipped, two.documents) == (2, 2, 101)
    log = job.prefixes[1].with_name("of two.skipped.jsonl")
    assert [orjson.loads(line)["place"] for line in log.read_bytes().splitlines()] == [
        f"{path}:102", f"{path}:104",
    ]  # fmt: skip


@pytest.mark.parametrize("text", [b"", b"\n \t\r\n\n", b'{"text": ""}\n'])
def test_a_source_without_text_is_an_error(job: Job, text: bytes) -> None:
    Path(str(job.sources[1].path)).write_bytes(text)
    with pytest.raises(RequestError, match="source two holds no text") as caught:
        tokenize.run(job, quiet)
    assert caught.value.place == job.sources[1].path


def test_a_worker_that_is_killed_is_told_and_its_work_done_again(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(progress: Progress) -> None:
        if progress.done == 2:
            for child in psutil.Process().children():
                if "spawn_main" in " ".join(child.cmdline()):
                    child.send_signal(signal.SIGKILL)

    with pytest.raises(WorkError, match="a worker was killed") as caught:
        tokenize.run(job, kill)
    assert "run the same command again" in caught.value.next_step
    assert len(tokenize.run(job, quiet)) == 2


def test_a_full_disk_is_told_and_the_same_command_goes_on(job: Job) -> None:
    """Played by a limit on the size of files, which the workers inherit."""
    whole = tokenize.run(job, quiet)
    files = [pair(prefix) for prefix in job.prefixes]
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (800, hard))
    try:
        with pytest.raises(WorkError, match="File too large") as caught:
            tokenize.run(job, quiet)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, hard))
    assert "run the same command again" in caught.value.next_step
    assert [pair(prefix) for prefix in job.prefixes] == files, "what was there is untouched"
    assert tokenize.run(job, quiet) == whole


def test_workers_end_with_the_process_that_is_killed(job: Job, tmp_path: Path) -> None:
    """As a scheduler does at the walltime: no process stays behind to write."""
    ready, stays = os.pipe()
    child = os.fork()
    if not child:
        os.setsid()
        tokenize.run(
            replace(job, unit_bytes=500), lambda _: (os.write(stays, b"x"), signal.pause())[1]
        )
        os._exit(0)
    os.read(ready, 1)
    family = psutil.Process(child).children(recursive=True)
    assert family
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive


def test_progress_is_told_for_each_shard(job: Job) -> None:
    seen: list[Any] = []
    [one, two] = tokenize.run(job, seen.append)
    assert seen[-1].done == seen[-1].total == len(seen)
    assert seen[-1].tokens == one.tokens + two.tokens
    assert {progress.doing for progress in seen} == {"one", "two"}
