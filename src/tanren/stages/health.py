"""How fast each GPU of this machine is: `python -m tanren.stages.health DEVICE COUNT`.

The first process imports no torch. It starts one process a GPU for the matrix product, so that one
that is broken or hangs takes no other with it, and then one a GPU for the all-reduce, with those
that are left. It prints one JSON object; who is slow is for whoever reads it to say.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    import torch

# A process imports torch, meets the others, and measures for a second or two.
LIMIT_SECONDS = 120.0
_WINDOWS = 5


def measure(device: str, count: int, python: str, limit: float = LIMIT_SECONDS) -> dict[str, Any]:
    """Measure every GPU alone, then those that work together.

    Args:
        device: cuda, or cpu, where processes stand for GPUs and gloo for NCCL.
        python: what starts the processes.
        limit: seconds for each of the two rounds.
    Returns:
        by "gpus" a list with "index", "tflops" (bf16; on a CPU fp32), "pair_gbps" (the bus
        bandwidth, GB/s, of its better pair; None for fewer than three) and "error" (None when
        all went well); by "all_reduce_gbps" the bus bandwidth over all that work, and by "error"
        why there is none.
    """
    words = [python, "-m", "tanren.stages.health"]
    gpus = []
    alone = _round([[*words, "matmul", device, str(i)] for i in range(count)], limit)
    for index, answer in enumerate(alone):
        gpus.append({"index": index, "tflops": answer.get("tflops"), "pair_gbps": None,
                     "error": answer.get("error")})  # fmt: skip
    working = [index for index in range(count) if gpus[index]["error"] is None]
    result: dict[str, Any] = {"gpus": gpus, "all_reduce_gbps": None, "error": None}
    if len(working) < 2:
        return result
    with tempfile.TemporaryDirectory() as folder:
        store, size = str(Path(folder) / "store"), str(len(working))
        commands = [[*words, "reduce", device, str(index), str(rank), size, store]
                    for rank, index in enumerate(working)]  # fmt: skip
        together = _round(commands, limit)
    for index, answer in zip(working, together, strict=True):
        gpus[index]["pair_gbps"] = answer.get("pair_gbps")
        if "error" in answer:
            result["error"] = f"GPU {index}: {answer['error']}"
    if result["error"] is None:
        result["all_reduce_gbps"] = min(answer["gbps"] for answer in together)
    return result


def _round(commands: list[list[str]], limit: float) -> list[dict[str, Any]]:
    """What each of some processes answers; those that are not done in time are ended."""
    started = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        for command in commands
    ]
    deadline, answers = time.monotonic() + limit, []
    for process in started:
        try:
            out, err = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            # Not waited for: a process that a broken GPU holds in the kernel does not even die.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            answers.append({"error": f"no answer within {limit:g} s"})
            continue
        try:
            answers.append(orjson.loads(out.splitlines()[-1]))
        except (IndexError, orjson.JSONDecodeError):
            last = err.decode(errors="replace").strip().splitlines()[-1:] or ["no word"]
            answers.append({"error": f"ended with code {process.returncode}: {last[0]}"})
    return answers


def matmul(device: str, index: int) -> dict[str, Any]:
    """TFLOP/s of one large matrix product: the median of some windows, after a warm-up."""
    import torch

    where, size, seconds = _device(device, index), (8192 if device == "cuda" else 256), 0.2
    if device == "cpu":
        torch.set_num_threads(1)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    a, b = (torch.randn(size, size, device=where, dtype=dtype) for _ in range(2))
    checked = (a[:64].float() @ b.float()).cpu()
    rates = []
    for window in range(_WINDOWS + 1):
        done, began = 0, time.monotonic()
        while time.monotonic() - began < seconds / (1 if device == "cuda" else 20):
            for _ in range(10):
                product = a @ b
            _wait(where)
            done += 10
        if window:  # the first one warms up
            rates.append(2 * size**3 * done / (time.monotonic() - began) / 1e12)
    # A GPU that computes wrongly is worse than a slow one: bf16 rounds to one part in 256.
    off = float((product[:64].float().cpu() - checked).abs().max() / checked.abs().max())
    if not off < 0.01:
        return {"error": f"computes wrongly: a product is off by {off:.3g} of its largest element"}
    return {"tflops": sorted(rates)[len(rates) // 2]}


def all_reduce(device: str, index: int, rank: int, size: int, store: str) -> dict[str, Any]:
    """Bus bandwidth in GB/s of an all-reduce over all, and of this rank's better pair.

    The bus bandwidth is 2(n-1)/n times the bytes over the time, NCCL's own measure, which does not
    depend on the number of ranks n. A ring is as slow as its slowest link for all of its ranks; of
    pairs of neighbours, a slow rank has two slow ones, and its neighbours have another each.
    """
    import torch
    from torch import distributed

    where = _device(device, index)
    distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo", init_method=f"file://{store}", rank=rank,
        world_size=size, timeout=timedelta(seconds=LIMIT_SECONDS / 2),
        device_id=where if device == "cuda" else None,
    )  # fmt: skip
    elements = 2**26 if device == "cuda" else 2**18
    values = torch.ones(elements, device=where)
    distributed.all_reduce(values)
    if float(values[0]) != size or float(values[-1]) != size:
        return {"error": f"an all-reduce of ones over {size} gives {float(values[0])}"}
    result = {"gbps": _bandwidth(values, None, size, where)}
    if size > 2:
        pairs = [(r, (r + 1) % size) for r in range(size)]
        own = []
        for pair in pairs:
            group = distributed.new_group(list(pair))
            if rank in pair:
                own.append(_bandwidth(values, group, 2, where))
            # One pair at a time: what is measured is a link and not a switch.
            distributed.barrier()
        result["pair_gbps"] = max(own)
    distributed.destroy_process_group()
    return result


def _bandwidth(values: torch.Tensor, group: Any, size: int, where: torch.device) -> float:
    from torch import distributed

    times = []
    for repeat in range(_WINDOWS + 2):
        values.fill_(1.0)
        distributed.barrier(group)
        _wait(where)
        began = time.monotonic()
        for _ in range(5):
            distributed.all_reduce(values, group=group)
        _wait(where)
        if repeat > 1:  # the first ones connect and warm up
            times.append((time.monotonic() - began) / 5)
    bytes_ = values.numel() * values.element_size()
    return 2 * (size - 1) / size * bytes_ / sorted(times)[len(times) // 2] / 1e9


def _device(device: str, index: int) -> torch.device:
    import torch

    if device == "cpu":
        return torch.device("cpu")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _wait(where: torch.device) -> None:
    import torch

    if where.type == "cuda":
        torch.cuda.synchronize(where)


def main(words: list[str]) -> int:
    kind, *rest = words
    if kind in ("matmul", "reduce"):
        try:
            if kind == "matmul":
                answer = matmul(rest[0], int(rest[1]))
            else:
                index, rank, size = map(int, rest[1:4])
                answer = all_reduce(rest[0], index, rank, size, rest[4])
        except Exception as error:  # whatever a broken GPU throws is the answer
            answer = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
        sys.stdout.buffer.write(orjson.dumps(answer) + b"\n")
        sys.stdout.flush()
        os._exit(0)  # a communicator that hangs must not keep the process
    result = measure(kind, int(rest[0]), sys.executable)
    sys.stdout.buffer.write(orjson.dumps(result) + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
