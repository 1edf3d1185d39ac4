"""Checkpoints: megatron-core's torch_dist format, written in the background, published whole.

A checkpoint is written under `iter_0000500.partial`. When every rank's files are on disk, rank 0
adds a list of the files with their sizes, renames the folder, and only then moves Megatron's
tracker file: a kill at any moment leaves the last whole checkpoint in place.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.api import CheckpointException

from tanren import runs
from tanren.config.errors import RequestError, WorkError
from tanren.config.model import Model
from tanren.config.training import Lora
from tanren.convert import lora
from tanren.convert.llama import megatron_arguments
from tanren.engine.lora import adapter_keys
from tanren.engine.model import Llama
from tanren.plan.paths import PARTIAL, RunFolder

# What fresh files of Transformer Engine hold beside the weights: FP8 scales. A base that was
# converted, or saved without FP8, has none.
_OPTIONAL = "_extra_state"
_WRITER_DIED = "a writer process was killed (is the node out of memory?)"


@dataclass
class TrainingState:
    """Everything that a resumed run needs, and nothing else."""

    model: DistributedDataParallel
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler
    shape: Model
    iteration: int = 0


def _sharding(reshard: str) -> dict[str, Any]:
    """How the optimizer's state is laid out in the checkpoint.

    `layout`: like the weights, so that it loads in any layout; gathered over the data-parallel
    ranks first. `data`: each rank writes its own part; only the data-parallel size may change.
    """
    kind = {"layout": "fully_reshardable", "data": "dp_reshardable"}[reshard]
    return {"distrib_optim_sharding_type": kind}


def _layout() -> dict[str, int]:
    return {
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "data": parallel_state.get_data_parallel_world_size(with_context_parallel=True),
    }


def _random_state() -> ShardedObject:
    """This rank's random state, keyed as Megatron-LM keys it."""
    pipeline = parallel_state.get_pipeline_model_parallel_rank()
    tensor = parallel_state.get_tensor_model_parallel_rank()
    state = {
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.cuda.get_rng_state(),
        "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    return ShardedObject(
        "rng_state",
        [state],
        (
            parallel_state.get_pipeline_model_parallel_world_size(),
            parallel_state.get_tensor_model_parallel_world_size(),
        ),
        (pipeline, tensor),
        replica_id=parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )


def _training_state(
    state: TrainingState, sharding: dict[str, Any], *, loading: bool, with_random: bool
) -> dict[str, Any]:
    llama = unwrap_model(state.model)
    model = _trained(llama, llama.sharded_state_dict(metadata=sharding))
    result: dict[str, Any] = {
        "model": model,
        "optimizer": state.optimizer.sharded_state_dict(
            model, is_loading=loading, metadata=sharding
        ),
    }
    if with_random:
        result["rng_state"] = _random_state()
    if not loading:
        result |= {
            "opt_param_scheduler": state.schedule.state_dict(),
            "iteration": state.iteration,
            "checkpoint_version": 3.0,
            "layout": _layout(),
            "args": megatron_arguments(state.shape),
        }
        if llama.lora is not None:
            result["lora"] = llama.lora.model_dump(mode="json")
    return result


def _trained(model: Llama, weights: dict[str, Any]) -> dict[str, Any]:
    """Of the weights, those that a run's checkpoints hold: all, or the adapters alone."""
    adapters = adapter_keys(model)
    if not adapters:
        return weights
    # Frozen or not, FP8's scales move with what the run sees.
    kept = _OPTIONAL if model.config.fp8 else None
    return {
        key: value
        for key, value in weights.items()
        if key in adapters or (kept is not None and key.endswith(kept))
    }


class Saver:
    """Writes checkpoints in the background while training goes on."""

    def __init__(self, folder: RunFolder, *, keep_last: int, reshard: str) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self.sharding = _sharding(reshard)
        on_gpu = torch.cuda.is_available()
        # A forked writer sees CPU tensors as they are at this moment. CUDA does not survive a
        # fork, so GPU runs keep one spawned writer that copies from the device.
        self.queue = AsyncCallsQueue(persistent=on_gpu)
        strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=2 if on_gpu else 1)
        self.strategy = FullyParallelSaveStrategyWrapper(
            strategy,
            parallel_state.get_data_parallel_group(with_context_parallel=True),
            do_cache_distribution=True,
        )
        self.writing: int | None = None
        self._idle_since: float | None = None

    def save(self, state: TrainingState) -> None:
        """Start writing a checkpoint. Every rank calls this; training goes on at once."""
        self.wait()
        if state.model.ddp_config.overlap_param_gather:
            # The last step's weights are still with the ranks that updated them: the next forward
            # pass would gather them, and the checkpoint must not be written before.
            state.model.start_param_sync(force_sync=True)
        partial = self._partial(state.iteration)
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        iteration = state.iteration
        with self._errors(iteration), _helpers_deaf_to_signals():
            request = dist_checkpointing.save(
                _training_state(state, self.sharding, loading=False, with_random=True),
                str(partial),
                self.strategy,
                async_sharded_save=True,
                content_metadata=self.sharding,
            )
            assert request is not None
            request.add_finalize_fn(lambda: self._publish(iteration))
            self.queue.schedule_async_request(request)
        self.writing = iteration

    def poll(self) -> None:
        """Publish a checkpoint that has been written by now. Every rank calls this, each step."""
        if self.writing is None:
            return
        with self._errors(self.writing):
            self._refuse_dead_writer()
            if self.queue.maybe_finalize_async_calls(blocking=False):
                self.writing = None
                self._idle_since = None

    def wait(self) -> None:
        """Block until nothing is being written."""
        while self.writing is not None:
            self.poll()
            if self.writing is not None:
                time.sleep(0.02)

    def close(self) -> None:
        """Finish what is being written and end the writer."""
        self.wait()
        self.queue.close()

    def abort(self) -> None:
        """End the writer whatever it is doing: the run has failed, and its process must end."""
        self.writing = None
        for call in self.queue.async_calls:
            call.async_caller.close(abort=True)
        # Left in the queue, a call's destructor would wait for a process that is gone.
        self.queue.async_calls.clear()
        self.queue.close(abort=True)

    def _partial(self, iteration: int) -> Path:
        final = self.folder.checkpoint(iteration)
        return final.with_name(final.name + PARTIAL)

    def _publish(self, iteration: int) -> None:
        if dist.get_rank() == 0:
            partial, final = self._partial(iteration), self.folder.checkpoint(iteration)
            runs.write_file_list(partial)
            if final.exists():
                _remove(final)
            os.replace(partial, final)
            runs.write_atomic(self.folder.latest, f"{iteration}".encode())
            self._prune(iteration)
        dist.barrier()

    def _prune(self, newest: int) -> None:
        """Remove the oldest checkpoints; iteration 0, the base, stays."""
        trained = [i for i in runs.iterations(self.folder) if 0 < i <= newest]
        for iteration in trained[: -self.keep_last]:
            _remove(self.folder.checkpoint(iteration))

    def _refuse_dead_writer(self) -> None:
        """End a save whose writer was killed: megatron-core would wait for it for ever.

        The background process starts one process a file and waits for each to report; a writer
        that the kernel killed (out of memory) never does.
        """
        if not self.queue.async_calls:
            return
        process = self.queue.async_calls[0].async_caller.process
        if process is None:
            return
        if not process.is_alive():
            if self.queue.persistent:
                raise RuntimeError(_WRITER_DIED)
            return
        try:
            children = psutil.Process(process.pid).children()
            zombies = [c for c in children if c.status() == psutil.STATUS_ZOMBIE]
        except psutil.NoSuchProcess:
            return
        if not zombies or len(zombies) < len(children):
            self._idle_since = None
            return
        now = time.monotonic()
        self._idle_since = self._idle_since or now
        if now - self._idle_since > 20:
            raise RuntimeError(_WRITER_DIED)

    def _errors(self, iteration: int) -> _SaveErrors:
        return _SaveErrors(self._partial(iteration), self.folder)


@contextmanager
def _helpers_deaf_to_signals() -> Iterator[None]:
    """Start processes that a request to stop does not reach.

    Schedulers and torchrun send SIGTERM to the whole process group. The trainer takes it as a
    request to save; the processes that do the saving would die of it. A blocked signal stays
    pending here and is inherited as blocked there, so none is lost.
    """
    # Started within, the tracker would unblock what it finds blocked.
    resource_tracker.ensure_running()
    requests = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, requests)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _SaveErrors:
    """Turns what goes wrong in a save into one message, and leaves no half checkpoint behind."""

    def __init__(self, partial: Path, folder: RunFolder) -> None:
        self.partial, self.folder = partial, folder

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not isinstance(
            error, OSError | RuntimeError | CheckpointingException | CheckpointException
        ):
            return
        reason = _disk_problem(error)
        shutil.rmtree(self.partial, ignore_errors=True)
        kept = runs.iterations(self.folder)
        rest = f"goes on from iteration {kept[-1]}" if kept else "starts anew"
        raise WorkError(
            self.partial.with_suffix(""),
            f"the checkpoint could not be written: {reason}",
            f"make room, or mend what it says, and run the same command again: it {rest}",
        ) from error


def _disk_problem(error: BaseException) -> str:
    """The reason of a failed save in a person's words, from anywhere in the chain of causes."""
    text = f"{error!r} {error}"
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
        if os.strerror(code) in text or f"Errno {code}]" in text:
            return os.strerror(code)
    if "unexpected pos" in text:
        # torch's archive writer noticed first; the system's own word is lost.
        return "the disk took fewer bytes than were written: it is full, or over its quota"
    cause = error.__cause__ or error.__context__
    if cause is not None and cause is not error:
        return _disk_problem(cause)
    if isinstance(error, CheckpointException) and not error.failures:
        return "another rank could not write its part"
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint so that a kill half-way leaves nothing under its final name."""
    going = checkpoint.with_name(checkpoint.name + ".old" + PARTIAL)
    shutil.rmtree(going, ignore_errors=True)
    os.replace(checkpoint, going)
    shutil.rmtree(going, ignore_errors=True)


def load_base(model: torch.nn.Module, checkpoint: Path, recipe_file: str) -> None:
    """Load weights alone, from a checkpoint of any layout. Adapters stay as they are.

    Raises:
        RequestError: a tensor is missing or has another shape; each is named with both shapes.
    """
    llama = unwrap_model(model)
    adapters = adapter_keys(llama)
    weights = llama.sharded_state_dict()
    wanted = {"model": {key: value for key, value in weights.items() if key not in adapters}}
    _check_shapes(wanted, checkpoint, recipe_file)
    loaded = _load(wanted, checkpoint)
    _load_model(llama, loaded["model"], without=adapters)


def load(state: TrainingState, checkpoint: Path) -> None:
    """Load a run's own checkpoint, whatever layout it was saved in.

    That of a run with adapters holds these alone: load its base before.
    """
    llama = unwrap_model(state.model)
    common = dist_checkpointing.load_common_state_dict(str(checkpoint))
    saved_layout, here = common["layout"], _layout()
    sharding = dist_checkpointing.serialization.load_content_metadata(preloaded_state_dict=common)
    model_parallel = ("tensor", "pipeline")
    moved = [k for k in model_parallel if saved_layout[k] != here[k]]
    if moved and sharding["distrib_optim_sharding_type"] == "dp_reshardable":
        was = ", ".join(f"{k} {saved_layout[k]}" for k in model_parallel)
        now = ", ".join(f"{k} {here[k]}" for k in model_parallel)
        raise RequestError(
            checkpoint,
            f"was saved with checkpoints.reshard: data under {was}, and this is {now}",
            "resume in the layout it was saved in",
        )
    _check_adapters(llama, lora.settings_in(common), checkpoint)
    wanted = _training_state(state, sharding, loading=True, with_random=not moved)
    loaded = _load(wanted, checkpoint)
    frozen = {name for name, weight in llama.named_parameters() if not weight.requires_grad}
    _load_model(llama, loaded["model"], without=frozen)
    state.optimizer.load_state_dict(loaded["optimizer"])
    state.schedule.load_state_dict(common["opt_param_scheduler"])
    state.iteration = int(common["iteration"])
    (random,) = loaded.get("rng_state", [None])
    # A GPU's random state means nothing to a CPU, nor the other way round.
    if random is not None and _same_kind(random):
        torch.set_rng_state(random["torch_rng_state"])
        torch.cuda.set_rng_state(random["cuda_rng_state"])
        tensor_parallel.get_cuda_rng_tracker().set_states(random["rng_tracker_states"])


def _same_kind(random: dict[str, Any]) -> bool:
    """Whether a saved random state is one of this kind of device."""
    return len(random["cuda_rng_state"]) == len(torch.cuda.get_rng_state())


def _load(wanted: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    logging.getLogger("megatron.core.dist_checkpointing").setLevel(logging.ERROR)
    loaded, missing, _ = dist_checkpointing.load(
        wanted, str(checkpoint), strict=StrictHandling.RETURN_ALL
    )
    del missing  # shape and presence were checked; what is left are Transformer Engine's scales
    assert isinstance(loaded, dict)
    return loaded


def _check_adapters(model: Llama, saved: Lora | None, checkpoint: Path) -> None:
    """Refuse adapters of another kind; their dropout changes nothing that is saved."""
    there, here = (
        "no adapters"
        if each is None
        else f"adapters of rank {each.rank}, alpha {each.alpha:g}, beside {' '.join(each.linears)}"
        for each in (saved, model.lora)
    )
    if there != here:
        raise RequestError(
            checkpoint,
            f"was saved with {there}, and this run has {here}",
            "set lora back to what it was, or start the run under a new NAME=",
        )


def _load_model(model: Llama, weights: dict[str, Any], without: set[str]) -> None:
    problems = model.load_state_dict(weights, strict=False)
    wrong = [
        key
        for key in [*problems.missing_keys, *problems.unexpected_keys]
        if not key.endswith(_OPTIONAL) and key not in without
    ]
    assert not wrong, f"weights that were not loaded: {wrong}"


def _check_shapes(wanted: dict[str, Any], checkpoint: Path, recipe_file: str) -> None:
    """Compare what the model wants with what the checkpoint has, before reading a tensor."""
    there = dist_checkpointing.load_tensors_metadata(str(checkpoint))
    problems = []
    # The layers are parts of one stacked tensor, which need be named only once.
    for tensor in {tensor.key: tensor for tensor in _sharded_tensors(wanted)}.values():
        if tensor.key.endswith(_OPTIONAL):
            continue
        found = there.get(tensor.key)
        if found is None:
            problems.append(f"{tensor.key} is not in it")
        elif tuple(found.global_shape) != tuple(tensor.global_shape):
            problems.append(
                f"{tensor.key} is {list(found.global_shape)} there and "
                f"{list(tensor.global_shape)} in the recipe's model"
            )
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise RequestError(
            f"{recipe_file}: init",
            f"the checkpoint {checkpoint} does not fit: {'; '.join(problems[:3])}{more}",
            "make the recipe's model that of the checkpoint, or name another checkpoint",
        )


def _sharded_tensors(value: Any) -> list[ShardedTensor]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    found: list[ShardedTensor] = []
    for leaf in nested_values(value):
        if isinstance(leaf, ShardedTensorFactory):
            found += _sharded_tensors(leaf.build())
        elif isinstance(leaf, ShardedTensor):
            found.append(leaf)
    return found
