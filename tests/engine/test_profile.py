"""Reading a trace as kineto gives it on a GPU: which host range launched which kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from tanren.engine.profile import read
from tanren.engine.timeline import categorized, split


@dataclass
class Event:
    """What of torch's _KinetoEvent is looked at; an attribute is a method there."""

    title: str
    start: int
    end: int
    kind: Any = "cpu_op"
    correlation: int = 0
    linked: int = 0
    sequence: int = -1
    record_scope: int = 0
    thread: int = 1
    forward_thread: int = 0

    def name(self) -> str:
        return self.title

    def device_type(self) -> str:
        device = self.kind in ("kernel", "gpu_memcpy", "gpu_user_annotation", "cuda_sync")
        return "DeviceType.CUDA" if device else "DeviceType.CPU"

    def start_ns(self) -> int:
        return self.start

    def duration_ns(self) -> int:
        return self.end - self.start

    def correlation_id(self) -> int:
        return self.correlation

    def linked_correlation_id(self) -> int:
        return self.linked

    def sequence_nr(self) -> int:
        return self.sequence

    def scope(self) -> int:
        return self.record_scope

    def start_thread_id(self) -> int:
        return self.thread

    def fwd_thread_id(self) -> int:
        return self.forward_thread

    def is_user_annotation(self) -> bool:
        return "user_annotation" in str(self.kind)

    def activity_type(self) -> Any:
        return self.kind


GEMM = "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT"
# The host runs ahead: everything is launched before 100, and runs on the device from 100 on.
EVENTS = [
    Event("tanren.step", 0, 1000, "user_annotation"),
    Event("tanren.data", 1, 5, "user_annotation"),
    Event("aten::mm", 10, 14, sequence=7, correlation=1),
    Event("cuLaunchKernelEx", 12, 13, "cuda_driver", correlation=901, linked=1),
    Event("tanren.head", 20, 30, "user_annotation"),
    Event("LinearFunction", 21, 25, sequence=8, correlation=2),
    Event("cudaLaunchKernel", 22, 23, "cuda_runtime", correlation=902, linked=2),
    # The backward pass, in a thread of its own: the head's node first, another's after it.
    Event("LinearFunctionBackward", 40, 50, sequence=8, record_scope=1, thread=2, forward_thread=1),
    Event("cudaLaunchKernel", 45, 46, "cuda_runtime", correlation=903),
    Event("MmBackward0", 50, 60, sequence=7, record_scope=1, thread=2, forward_thread=1),
    # Neither runtime nor driver say when this was launched; its operator does.
    Event("aten::mm", 52, 55, correlation=4, thread=2),
    # Recomputed in that thread, whose numbers are its own.
    Event("OtherBackward", 60, 65, sequence=8, record_scope=1, thread=2, forward_thread=2),
    Event("cudaLaunchKernel", 61, 62, "cuda_runtime", correlation=905),
    Event("tanren.optimizer", 80, 90, "user_annotation"),
    Event("cudaLaunchKernel", 85, 86, "cuda_runtime", correlation=906),
    Event(GEMM, 100, 200, "kernel", correlation=901, linked=1),
    Event(GEMM, 200, 230, "kernel", correlation=902, linked=2),
    Event(GEMM, 230, 300, "kernel", correlation=903),
    Event(GEMM, 300, 400, "kernel", correlation=904, linked=4),
    Event(GEMM, 400, 500, "kernel", correlation=905),
    Event("axpy", 500, 600, "kernel", correlation=906),
    Event("tanren.head", 200, 230, "gpu_user_annotation"),
    Event("ProfilerStep#1", 0, 1000, "gpu_user_annotation"),
    Event("Event Sync", 600, 900, "cuda_sync"),
    Event("Memcpy DtoH (Device -> Pinned)", 600, 610, "gpu_memcpy", correlation=907),
]  # fmt: skip


def without_kinds(events: list[Event]) -> list[Event]:
    """As versions of torch give them that say kinds by a number."""

    class Numbered(Event):
        def activity_type(self) -> Any:
            return 5

    return [Numbered(**vars(event)) for event in events if event.kind != "cuda_sync"]


@pytest.mark.parametrize("events", [EVENTS, without_kinds(EVENTS)])
def test_a_kernel_belongs_to_what_launched_it(events: list[Event]) -> None:
    step = read(events, on_gpu=True)
    assert (step.window, list(step.waits)) == ((0, 1000), [(1, 5)])
    found = [(category, kernel.start) for category, kernel in categorized(step)]
    assert found == [
        ("gemm", 100), ("head", 200), ("head", 230), ("gemm", 300), ("gemm", 400),
        ("optimizer", 500), ("elementwise", 600),
    ]  # fmt: skip
    spent = {name: time for name, time in split(step).nanoseconds.items() if time}
    assert spent == {
        "gemm": 300, "head": 100, "optimizer": 100, "elementwise": 10, "data_wait": 4,
        "idle": 1000 - 514,
    }  # fmt: skip


def test_on_a_cpu_an_operator_counts_once_with_what_it_calls() -> None:
    events = [
        Event("tanren.step", 0, 100, "user_annotation"),
        Event("LinearFunction", 5, 50),
        Event("aten::matmul", 10, 40),
        Event("aten::mm", 15, 35),
        Event("aten::add_", 42, 48),
        Event("autograd::engine::evaluate_function: X", 60, 90),
        Event("aten::mul", 60, 70, thread=2),
        Event("aten::bmm", 65, 85),
    ]
    step = read(events, on_gpu=False)
    assert [(kernel.name, kernel.start) for kernel in step.kernels] == [
        ("aten::matmul", 10), ("aten::add_", 42), ("aten::mul", 60), ("aten::bmm", 65),
    ]  # fmt: skip
