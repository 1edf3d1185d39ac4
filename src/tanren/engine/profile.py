"""Traces one step with torch.profiler, and measures what this device can do at best."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile, schedule

from tanren.engine.timeline import Interval, Kernel, Step
from tanren.engine.timing import DATA, OPTIMIZER

logger = logging.getLogger("tanren")
_STEP, _HEAD = "tanren.step", "tanren.head"
_OURS = (_STEP, _HEAD, DATA, OPTIMIZER)
# Calls of CUDA's runtime and driver, such as cudaLaunchKernel and cuLaunchKernelEx.
_LAUNCH = re.compile(r"^(cuda|cu)[A-Z]")
_DEVICE_WORK = ("kernel", "concurrent_kernel", "gpu_memcpy", "gpu_memset")
# torch's RecordScope: an operator of the forward pass, a node of the backward pass.
_FUNCTION, _BACKWARD = 0, 1


class StepTracer:
    """Traces one step of a training on the first rank; the one before it warms the tracer up."""

    def __init__(self, step: int, model: torch.nn.Module, device: torch.device) -> None:
        """The number of the step, from 1, is that of the step to trace."""
        self.step, self.device = step, device
        self._model = unwrap_model(model)
        self._first = dist.get_rank() == 0
        self._profile: Any = None
        self.traced: Step | None = None

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        """What a step runs in; every rank calls this."""
        if step == self.step - 1 and self._first:
            activities = [ProfilerActivity.CPU]
            activities += [ProfilerActivity.CUDA] if self.device.type == "cuda" else []
            self._profile = profile(
                activities=activities, schedule=schedule(wait=0, warmup=1, active=1, repeat=1)
            )
            self._profile.start()
        if step != self.step:
            yield
            return
        if self._first:
            self._profile.step()
        self._settle()
        with self._head_marked(), record_function(_STEP):
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize()
        if self._first:
            self._profile.stop()
            events = self._profile.profiler.kineto_results.events()
            self.traced = read(events, on_gpu=self.device.type == "cuda")
            self._profile = None

    def _settle(self) -> None:
        """All ranks begin the step together, with nothing left on the GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @contextmanager
    def _head_marked(self) -> Iterator[None]:
        """What a forward pass does behind the decoder is the head: logits and losses."""
        if not self._model.post_process:
            yield
            return
        marks: list[Any] = []

        def begin(*_: Any) -> None:
            marks.append(record_function(_HEAD))
            marks[-1].__enter__()

        def end(*_: Any) -> None:
            if marks:
                marks.pop().__exit__(None, None, None)

        hooks = [
            self._model.decoder.register_forward_hook(begin),
            self._model.register_forward_hook(end),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def read(events: list[Any], *, on_gpu: bool) -> Step:
    """A traced step from kineto's events.

    What was launched by the forward pass of the head is known by its range; by its backward pass,
    since a node of autograd has the sequence number of the operator that it belongs to.

    Args:
        on_gpu: kernels are the device's; else operators that no other calls.
    """
    ours: dict[str, list[Interval]] = {name: [] for name in _OURS}
    operators: list[Any] = []
    backward: list[Any] = []
    launches: dict[int, int] = {}
    began: dict[int, int] = {}
    work: list[Any] = []
    for event in events:
        name = event.name()
        if str(event.device_type()).endswith("CPU"):
            if name in ours:
                ours[name].append(_interval(event))
            elif _LAUNCH.match(name):
                launches[event.correlation_id()] = event.start_ns()
            elif not event.is_user_annotation():
                operators.append(event)
                began[event.correlation_id()] = event.start_ns()
                if event.scope() == _BACKWARD:
                    backward.append(event)
        elif name not in ours and _is_work(event):
            work.append(event)
    (window,) = ours[_STEP]
    head = ours[_HEAD] + _backward_of(ours[_HEAD], operators, backward)
    if on_gpu:
        kernels = [
            Kernel(
                event.name(), *_interval(event),
                launched=launches.get(
                    event.correlation_id(),
                    began.get(event.linked_correlation_id(), event.start_ns()),
                ),
            )
            for event in work
        ]  # fmt: skip
    else:
        kernels = [
            Kernel(e.name(), *_interval(e), launched=e.start_ns()) for e in _outermost(operators)
        ]
    return Step(
        window, kernels, ranges={"optimizer": ours[OPTIMIZER], "head": head}, waits=ours[DATA]
    )


def _interval(event: Any) -> Interval:
    return event.start_ns(), event.start_ns() + event.duration_ns()


def _is_work(event: Any) -> bool:
    """Whether an event of the device is a kernel or a copy, and no mark."""
    kind = getattr(event, "activity_type", str)()
    # Not every version of torch says it, or in words.
    if isinstance(kind, str) and kind:
        return kind in _DEVICE_WORK
    return not event.is_user_annotation() and not event.name().startswith("ProfilerStep")


def _backward_of(
    ranges: list[Interval], operators: list[Any], backward: list[Any]
) -> list[Interval]:
    """When autograd went through the nodes that the operators in these ranges made."""
    own = set()
    ordered = sorted(ranges)
    at = 0
    for event in sorted(operators, key=lambda one: one.start_ns()):
        while at < len(ordered) and ordered[at][1] <= event.start_ns():
            at += 1
        inside = at < len(ordered) and ordered[at][0] <= event.start_ns()
        if inside and event.scope() == _FUNCTION and event.sequence_nr() >= 0:
            own.add((event.start_thread_id(), event.sequence_nr()))
    return [
        _interval(event)
        for event in backward
        if (event.fwd_thread_id(), event.sequence_nr()) in own
    ]


def _outermost(operators: list[Any]) -> list[Any]:
    """The operators that no other calls, thread by thread; autograd's own nodes are none."""
    found, until = [], dict[int, int]()
    for event in sorted(operators, key=lambda one: (one.start_ns(), -one.duration_ns())):
        thread, (start, end) = event.start_thread_id(), _interval(event)
        if (
            "::" in event.name()
            and "autograd::" not in event.name()
            and (start >= until.get(thread, 0))
        ):
            found.append(event)
            until[thread] = end
    return found


@dataclass(frozen=True)
class Rates:
    """What this device does at best, measured: matrix products in TFLOP/s, copies in GB/s.

    `fp8_tflops` is None where it has no FP8.
    """

    gemm_tflops: float
    fp8_tflops: float | None
    copy_gb_per_second: float
    size: int


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Multiply large matrices of random numbers and copy a large tensor, for about half a second.

    Random, since products of zeros draw less power and run at a higher clock.
    """
    on_gpu = device.type == "cuda"
    size, repeats = (8192, 150) if on_gpu else (1024, 10)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    seconds = _seconds(lambda: torch.mm(a, b, out=product), repeats, on_gpu)
    fp8 = _fp8_seconds(a, b, repeats) if on_gpu else None
    source = torch.empty(2**29 if on_gpu else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _seconds(lambda: target.copy_(source), 20, on_gpu)
    rates = Rates(
        gemm_tflops=2 * size**3 / seconds / 1e12,
        fp8_tflops=2 * size**3 / fp8 / 1e12 if fp8 else None,
        # It is read and written.
        copy_gb_per_second=2 * source.numel() / copy / 1e9,
        size=size,
    )
    if on_gpu:
        del a, b, product, source, target
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return rates


def _fp8_seconds(a: torch.Tensor, b: torch.Tensor, repeats: int) -> float | None:
    """Of one FP8 product (E4M3, one scale a matrix); None where there is none."""
    if torch.cuda.get_device_capability() < (8, 9):
        return None
    one = torch.ones((), device=a.device)
    # The second matrix is column by column, as Hopper wants it.
    left, right = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()

    def multiply() -> torch.Tensor:
        return torch._scaled_mm(
            left, right, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    try:
        return _seconds(multiply, repeats, on_gpu=True)
    except RuntimeError as error:  # not every build of torch has it
        logger.warning("the rate of FP8 products is left out: %s", error)
        return None


def _seconds(work: Callable[[], Any], repeats: int, on_gpu: bool) -> float:
    """Of one repetition, after some to warm up."""
    for _ in range(max(repeats // 10, 2)):
        work()
    if on_gpu:
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        work()
    if on_gpu:
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / repeats
