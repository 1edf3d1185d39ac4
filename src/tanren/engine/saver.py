"""Checkpoints written while training goes on: megatron-core's torch_dist format, published whole.

Weights and optimizer state stay as they are from one update to the next. So a save begins to copy
this rank's share to host memory, beside the next forward and backward pass, and training waits
only where the next update would come before the copy's end. A process of its own
(tanren.engine.writer) then writes the files under `iter_0000500.partial`. When every rank's are on
disk, that of rank 0 adds a list of the files with their sizes, renames the folder, and only then
moves Megatron's tracker file: a kill at any moment leaves the last whole checkpoint in place.

Ranks tell each other through the process group's store that they are done: no collective runs.
"""

from __future__ import annotations

import io
import itertools
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedObject, is_main_replica
from megatron.core.utils import unwrap_model
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from tanren import runs
from tanren.config.errors import WorkError
from tanren.convert.mcore import FORMAT
from tanren.engine import shards
from tanren.engine.boxes import Chunk
from tanren.engine.checkpoint import (
    TrainingState,
    common_state,
    random_state,
    trained_weights,
)
from tanren.engine.staging import ALIGNMENT, Staging
from tanren.engine.writer import Failed, Item, Memory, Publish, Published, Write, Written, take
from tanren.plan.paths import PARTIAL, RunFolder

logger = logging.getLogger("tanren")

_WRITER_DIED = "the process that writes it was killed (is the node out of memory?)"
_ELSEWHERE = "another rank could not write its part: "
# Savers of one process group, so that none takes another's word in the store.
_number = itertools.count()


class Saver:
    """Writes checkpoints in the background while training goes on. Every rank has one."""

    def __init__(
        self,
        folder: RunFolder,
        *,
        keep_last: int,
        keep_every: int | None = None,
        report: Callable[[int, dict[str, Any]], None] = lambda step, values: None,
    ) -> None:
        """Take this rank's writer, and remove what a killed run left half-written.

        Args:
            keep_last: how many checkpoints stay; those at multiples of `keep_every` steps besides.
            report: takes what a save cost, and the iteration of that.
        """
        self.folder, self.keep_last, self.keep_every = folder, keep_last, keep_every
        self.report = report
        self.writing: int | None = None
        self.process = take()
        self._connection = self.process.connection
        self.staging = Staging(self.process.memory)
        self._shards: list[shards.Shard] | None = None
        self._objects: dict[str, bytes] = {}
        self._order: Write | None = None
        self._publishing = False
        self._began = self._blocked = 0.0
        self._closed = False
        if dist.get_rank() == 0:
            for left in folder.checkpoints.glob(f"*{PARTIAL}"):
                shutil.rmtree(left, ignore_errors=True)
        # The first rank's number for all of them, once it has removed what was left.
        number = [next(_number)]
        dist.broadcast_object_list(number)
        # Its stubs know no bytes.
        self.store: Any = PrefixStore(f"checkpoints {number[0]}", _get_default_store())

    def prepare(self, state: TrainingState) -> None:
        """Find out what this rank writes, and make room for it; `save` does it if nobody has.

        The optimizer's state is allocated for it. Weights must not be loaded after this.
        """
        if self._shards is not None:
            return
        weights = trained_weights(unwrap_model(state.model))
        self._objects = _mine(shards.objects(weights).values())
        self._shards = [one for one in shards.shards(state.optimizer, weights) if one.first]
        items: list[Item] = []
        size = 0
        for shard in self._shards:
            tensors = self._tensors(state, shard)
            places = {}
            for kind, tensor in tensors.items():
                places[kind] = size
                size += _aligned(tensor.nbytes)
            items += _items(shard, tensors, places)
        self.staging.allocate(size)
        self._send(Memory(size, tuple(items)))
        self.staging.lock()

    def _tensors(self, state: TrainingState, shard: shards.Shard) -> dict[str, torch.Tensor]:
        return {"weight": shards.weight(shard), **shards.state(state.optimizer, shard)}

    def save(self, state: TrainingState) -> None:
        """Begin a checkpoint. Every rank calls this; training goes on at once."""
        self._began = time.perf_counter()
        self.wait()
        self.prepare(state)
        assert self._shards is not None
        files = {}
        if dist.get_rank() == 0:
            files = {"common.pt": _pickled(common_state(state)), "metadata.json": FORMAT}
        # Before the copy begins: FP8 scales wait for all that the device does.
        blobs = self._blobs(state)
        tensors = []
        place = 0
        for shard in self._shards:
            for tensor in self._tensors(state, shard).values():
                tensors.append((tensor, place))
                place += _aligned(tensor.nbytes)
        self.staging.copy(tensors)
        self.writing, self._publishing = state.iteration, False
        self._order = Write(self._partial(state.iteration), dist.get_rank(), blobs, files)
        self._blocked = time.perf_counter() - self._began
        if self.staging.copied is None:
            self.before_update()

    def before_update(self) -> None:
        """Wait until what the last save copies is copied: an update would change it."""
        if self._order is None:
            return
        began = time.perf_counter()
        self.staging.finish()
        order, self._order = self._order, None
        self._send(order)
        self._blocked += time.perf_counter() - began
        assert self.writing is not None
        self.report(self.writing, {"save_blocked_seconds": round(self._blocked, 3)})

    def poll(self) -> None:
        """See how far the writing is. Every rank calls this, each step; it does not wait."""
        if self.writing is None:
            return
        while self._connection.poll():
            try:
                answer = self._connection.recv()
            except (EOFError, OSError):
                break
            self._take(answer)
        if self.writing is not None and self.process.poll() is not None:
            self._fail(_WRITER_DIED)
        if self.writing is None or self._order is not None:
            return
        if dist.get_rank() == 0:
            self._publish_when_written()
        elif self.store.check([self._key("outcome")]):
            outcome = self.store.get(self._key("outcome")).decode()
            if outcome:
                self._fail(_ELSEWHERE + outcome.removeprefix(_ELSEWHERE))
            self.writing = None

    def _take(self, answer: Written | Published | Failed) -> None:
        """What the writer says."""
        if isinstance(answer, Written):
            self.store.set(self._key(dist.get_rank()), b"+" + answer.records)
        elif isinstance(answer, Failed):
            if answer.trace is not None:
                raise RuntimeError(f"in the process that writes checkpoints: {answer.trace}")
            self._fail(answer.reason)
        else:
            self._published(answer)

    def _publish_when_written(self) -> None:
        keys = [self._key(rank) for rank in range(dist.get_world_size())]
        if self._publishing or not self.store.check(keys):
            return
        answers = [self.store.get(key) for key in keys]
        for answer in answers:
            if not answer.startswith(b"+"):
                self._fail(_ELSEWHERE + answer[1:].decode())
        self._publishing = True
        assert self.writing is not None
        records = tuple(answer[1:] for answer in answers)
        self._send(
            Publish(self.folder.root, self.writing, records, self.keep_last, self.keep_every)
        )
        for key in keys:
            self.store.delete_key(key)

    def _published(self, answer: Published) -> None:
        """Rank 0's word that the checkpoint has its name."""
        assert self.writing is not None
        self.store.set(self._key("outcome"), b"")
        seconds, size = time.perf_counter() - self._began, answer.size / 2**30
        self.report(
            self.writing,
            {
                "save_seconds": round(seconds, 3),
                "save_gib": round(size, 3),
                "save_gib_per_second": round(size / seconds, 3),
            },
        )
        self.writing = None

    def wait(self) -> None:
        """Block until nothing is being written."""
        while self.writing is not None:
            self.before_update()
            self.poll()
            if self.writing is not None:
                time.sleep(0.01)

    def close(self) -> None:
        """Finish what is being written and end the writer."""
        if self._closed:
            return
        self.wait()
        # What keeps the store may be the first rank: it waits until all have its last word.
        dist.barrier()
        self._closed = True
        self._send(None)
        self.process.wait()
        self.staging.close()

    def abort(self) -> None:
        """End the writer whatever it is doing: the run has failed, and its process must end."""
        self.writing = None
        self.process.kill()
        self.process.wait()

    def _blobs(self, state: TrainingState) -> dict[str, bytes]:
        """What is no tensor: random state, and Transformer Engine's FP8 scales."""
        model = unwrap_model(state.model)
        scales = self._objects
        if model.config.fp8:
            # Without FP8 they are empty, and always the same.
            scales = _mine(shards.objects(trained_weights(model)).values())
        return scales | _mine([random_state()])

    def _partial(self, iteration: int) -> Path:
        final = self.folder.checkpoint(iteration)
        return final.with_name(final.name + PARTIAL)

    def _key(self, what: object) -> str:
        return f"{self.writing} {what}"

    def _send(self, order: Memory | Write | Publish | None) -> None:
        try:
            self._connection.send(order)
        except OSError:
            self._fail(_WRITER_DIED)

    def _fail(self, reason: str) -> None:
        """End the run with one message, on every rank, and leave no half checkpoint behind."""
        if self.writing is None:
            raise WorkError(self.folder.checkpoints, reason, "run the same command again")
        rank, partial = dist.get_rank(), self._partial(self.writing)
        self.store.set(self._key(rank), b"-" + reason.encode())
        if rank == 0:
            self.store.set(self._key("outcome"), reason.encode())
        shutil.rmtree(partial, ignore_errors=True)
        kept = runs.iterations(self.folder)
        rest = f"goes on from iteration {kept[-1]}" if kept else "starts anew"
        raise WorkError(
            partial.with_suffix(""),
            f"the checkpoint could not be written: {reason}",
            f"make room, or mend what it says, and run the same command again: it {rest}",
        )


def _items(
    shard: shards.Shard, tensors: dict[str, torch.Tensor], places: dict[str, int]
) -> Iterator[Item]:
    """What the writer makes of the tensors of a shard, box by box."""
    for part in shard.parts:
        for chunk in part.chunks(shard.start, shard.end):
            for kind, tensor in tensors.items():
                place = places[kind] + (chunk.first - shard.start) * tensor.itemsize
                if kind == "weight":
                    yield Item(chunk, tensor.dtype, tensor.dtype, place)
                    continue
                name = shards.STATE_NAME.format(kind=kind, name=chunk.name)
                named = Chunk(name, chunk.shape, chunk.offsets, chunk.sizes, chunk.first)
                if tensor.dtype != torch.int16:
                    yield Item(named, tensor.dtype, torch.float32, place)
                    continue
                weight = places["weight"] + (chunk.first - shard.start) * 2
                yield Item(named, torch.bfloat16, torch.float32, weight, remainder=place)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _mine(objects: Iterable[ShardedObject]) -> dict[str, bytes]:
    """The objects that this rank writes, as megatron-core stores them, by their keys."""
    return {
        one.unique_key: _pickled([one.data]) for one in objects if is_main_replica(one.replica_id)
    }


def _pickled(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()
