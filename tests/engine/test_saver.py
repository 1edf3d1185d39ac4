"""A save that cannot end well ends with one message, and soon."""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from tanren import runs
from tanren.config.errors import WorkError
from tanren.convert.tensors import Stored
from tanren.convert.torch_dist import Record
from tanren.engine import writer
from tanren.engine.boxes import Chunk
from tanren.engine.saver import Saver
from tanren.engine.writer import Failed, Item, Memory, Publish, Write, Written
from tanren.plan.paths import RunFolder
from tests.conftest import wait_for


@pytest.fixture
def saver(alone: None, tmp_path: Path) -> Any:
    """A saver in the middle of iteration 5."""
    made = Saver(RunFolder(tmp_path), keep_last=2)
    made.writing = 5
    (tmp_path / "checkpoints" / "iter_0000005.partial").mkdir(parents=True)
    (tmp_path / "checkpoints" / "iter_0000003").mkdir()
    yield made
    made.abort()


def test_a_writer_keeps_nothing_of_its_trainer_open(tmp_path: Path) -> None:
    """Forked, it would hold every file, pipe and GPU of the trainer for as long as it lives."""
    with (tmp_path / "open").open("w") as file, socket.socketpair()[0]:
        process = writer.Process()
        there = Path(f"/proc/{process.pid}/fd")
        wait_for(lambda: Path(f"/proc/{process.pid}/comm").read_text() == "tanren-writer\n", 10)
        kept = {str(path.readlink()).split(":")[0] for path in there.iterdir()}
        assert file.name not in kept
        assert len(list(there.iterdir())) == 5
        assert any(name.startswith("/memfd") for name in kept)
    process.connection.close()
    wait_for(lambda: process.poll() == 1, 10)


def test_a_request_to_stop_does_not_reach_a_writer() -> None:
    process = writer.Process()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(process.pid, number)
    process.connection.send(Memory(0, ()))
    assert process.poll() is None
    process.connection.send(None)
    process.wait()
    assert process.poll() == 0


def test_a_writer_ends_with_its_trainer_whoever_holds_the_pipe() -> None:
    """A process that loads data has been forked off the trainer, too, and lives on a while."""
    script = """if True:
        import os, time
        from tanren.engine import writer
        process = writer.Process()
        loader = os.fork()
        if not loader:
            time.sleep(60)
        print(process.pid, loader, flush=True)
        time.sleep(60)
    """
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as trainer:
        assert trainer.stdout is not None
        child, loader = map(int, trainer.stdout.readline().split())
        comm = Path(f"/proc/{child}/comm")
        wait_for(lambda: comm.read_text() == "tanren-writer\n", 10)
        # Its name comes just before its wish to be killed.
        time.sleep(0.2)
        trainer.kill()
        try:
            wait_for(lambda: psutil.Process(child).status() == psutil.STATUS_ZOMBIE
                     if psutil.pid_exists(child) else True, 3)  # fmt: skip
        finally:
            os.kill(loader, signal.SIGKILL)


def test_a_stage_forks_its_writer_once_and_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_waiting", None)
    writer.fork_early()
    early = writer._waiting
    writer.fork_early()
    assert writer.take() is early is not None
    later = writer.take()
    assert later is not early
    for process in (early, later):
        process.connection.send(None)
        process.wait()


def test_a_killed_writer_is_noticed_at_once(saver: Saver) -> None:
    saver.poll()
    saver.process.kill()
    saver.process.wait()
    with pytest.raises(WorkError) as failed:
        saver.poll()
    assert failed.value.place.endswith("checkpoints/iter_0000005")
    assert "was killed (is the node out of memory?)" in failed.value.problem
    assert "it goes on from iteration 3" in failed.value.next_step
    assert [path.name for path in saver.folder.checkpoints.iterdir()] == ["iter_0000003"]


def test_a_copy_that_goes_on_is_waited_for_once_and_then_written(
    saver: Saver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: the writer hears of a save only when what it writes is there."""
    seen: list[Any] = []
    told: list[Any] = []
    monkeypatch.setattr(saver, "_send", seen.append)
    monkeypatch.setattr(saver.staging, "finish", lambda: seen.append("copied"))
    saver.report = lambda step, values: told.append((step, *values))
    order = Write(saver.folder.checkpoints, 0, {}, {})
    saver._order = order
    saver.poll()
    assert seen == []
    saver.before_update()
    saver.before_update()
    assert seen == ["copied", order]
    assert told == [(5, "save_blocked_seconds")]


def test_what_the_disk_refuses_is_said_plainly(saver: Saver) -> None:
    """/dev/full takes nothing."""
    partial = saver.folder.checkpoints / "iter_0000005.partial"
    (partial / "__0_0.distcp").symlink_to("/dev/full")
    saver._send(Write(partial, 0, {"rng_state/shard_0_1": b"1" * 100_000}, {}))

    def failed() -> str:
        try:
            saver.poll()
        except WorkError as error:
            return error.problem
        return ""

    problem: list[str] = []
    wait_for(lambda: bool(problem.append(failed()) or problem[-1]))
    assert problem[-1] == "the checkpoint could not be written: No space left on device"
    assert not partial.exists()


def test_what_another_rank_says_ends_this_one(
    saver: Saver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    saver.store.set("5 0", b"+")
    saver.poll()
    saver.store.set("5 1", b"-Disk quota exceeded")
    with pytest.raises(WorkError, match="another rank could not write its part: Disk quota"):
        saver.poll()
    # The other ranks hear of it, once.
    saver.writing = 5
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    with pytest.raises(WorkError) as failed:
        saver.poll()
    assert failed.value.problem.count("another rank could not write its part") == 1


def test_an_error_of_ours_keeps_its_trace(saver: Saver) -> None:
    with pytest.raises(RuntimeError, match="line 7"):
        saver._take(Failed("ours", "line 7"))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (RuntimeError("Worker failure: [Errno 122] Disk quota exceeded"), "Disk quota exceeded"),
        (RuntimeError("[enforce fail] . unexpected pos 704 vs 598"), "it is full, or over its"),
        (RuntimeError("first line\nthe reason\n"), "the reason"),
    ],
)
def test_the_reason_of_a_failed_save_is_found(error: BaseException, reason: str) -> None:
    assert reason in writer.reason(error)


def order(root: Path, iteration: int, records: list[Record], **options: Any) -> Publish:
    packed = zlib.compress(pickle.dumps(records))
    kept = {"keep_last": 2, "keep_every": None} | options
    return Publish(root, iteration, (packed,), **kept)


def test_a_part_that_is_missing_is_not_published(tmp_path: Path) -> None:
    partial = tmp_path / "checkpoints" / "iter_0000005.partial"
    partial.mkdir(parents=True)
    stored = Stored((4, 5), torch.float32)
    record = Record("weight", "__0_0.distcp", 0, 10, stored, (0, 0), (3, 5))
    with pytest.raises(AssertionError, match="weight: 15 of 20 elements"):
        writer.publish(order(tmp_path, 5, [record]))
    assert [path.name for path in partial.parent.iterdir()] == ["iter_0000005.partial"]


@pytest.mark.parametrize(
    ("every", "left"),
    [(None, [0, 50, 60]), (20, [0, 20, 40, 50, 60]), (35, [0, 50, 60])],
)
def test_the_newest_stay_and_those_at_multiples(
    tmp_path: Path, every: int | None, left: list[int]
) -> None:
    folder = RunFolder(tmp_path)
    for iteration in (0, 10, 20, 30, 40, 50):
        folder.checkpoint(iteration).mkdir(parents=True)
    folder.checkpoint(60).with_name("iter_0000060.partial").mkdir()
    writer.publish(order(tmp_path, 60, [], keep_every=every))
    assert list(runs.iterations(folder)) == left
    assert folder.latest.read_text() == "60"
    assert json.loads((folder.checkpoint(60) / "files.json").read_bytes()).keys() == {".metadata"}


def test_a_writer_widens_what_the_optimizer_keeps_short(tmp_path: Path) -> None:
    """Moments in bf16 and 16 bits of a master come to be fp32 tensors."""
    chunk = Chunk("exp_avg", (2, 3), (1, 0), (1, 3), 3)
    kept = torch.tensor([0.5, -2.0, 1.0]).bfloat16()
    remainder = torch.tensor([1, -(2**15), -1], dtype=torch.int16)
    wanted = torch.tensor([0x3F000001, 0xBFFF8000 - 2**32, 0x3F7FFFFF], dtype=torch.int32)
    memory = bytes(kept.view(torch.uint8)) + bytes(58) + bytes(remainder.view(torch.uint8))
    file = tmp_path / "memory"
    file.write_bytes(memory)
    with file.open("r+b") as opened:
        one = writer.Writer(opened.fileno())
        one.do(Memory(len(memory), (
            Item(chunk, torch.bfloat16, torch.float32, 0),
            Item(chunk, torch.bfloat16, torch.float32, 0, remainder=64),
        )))  # fmt: skip
        done = one.do(Write(tmp_path / "new", 3, {}, {"common.pt": b"x"}))
    assert isinstance(done, Written)
    records: list[Record] = pickle.loads(zlib.decompress(done.records))
    read = []
    for record in records:
        assert record.stored == Stored((2, 3), torch.float32)
        assert (record.offsets, record.sizes) == (chunk.offsets, chunk.sizes)
        with (tmp_path / "new" / record.file).open("rb") as opened:
            opened.seek(record.offset)
            read.append(torch.load(opened))
    assert [tensor.shape for tensor in read] == [(1, 3), (1, 3)]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "__3_0.distcp", "__3_1.distcp", "common.pt",
    ]  # fmt: skip
    found = [tensor[0].view(torch.int32).tolist() for tensor in read]
    assert found == [kept.float().view(torch.int32).tolist(), wanted.tolist()]


def test_a_removed_checkpoint_never_lies_half_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    folder.checkpoint(5).mkdir(parents=True)
    seen = []
    monkeypatch.setattr(
        writer.shutil, "rmtree", lambda path, **_: seen.append((path.name, path.exists()))
    )
    writer.remove(folder.checkpoint(5))
    assert ("iter_0000005.old.partial", True) in seen
    assert not folder.checkpoint(5).exists()
