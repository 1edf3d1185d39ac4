"""What a step's time went into, from the timeline of its kernels: pure arithmetic over intervals.

Times are nanoseconds of one clock.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

Interval = tuple[int, int]

COMMUNICATION, DATA_WAIT, IDLE = "communication_exposed", "data_wait", "idle"
# What computes. An instant at which two of them run is the earlier one's.
COMPUTE = (
    "gemm", "gemm_fp8", "attention", "head", "norm", "fp8_cast", "optimizer", "elementwise",
    "other",
)  # fmt: skip
# They add up to the step.
CATEGORIES = (*COMPUTE, COMMUNICATION, DATA_WAIT, IDLE)

_FP8 = r"e4m3|e5m2|fp8|float8"
# By a kernel's name, or on a CPU an operator's; the first that fits. cuBLAS names its newest
# kernels by their types: nvjet_tst_... multiplies bf16, nvjet_qqtst_... FP8 (q: E4M3, r: E5M2).
_NAMES = tuple(
    (category, re.compile(pattern, re.IGNORECASE))
    for category, pattern in (
        (COMMUNICATION, r"nccl|gloo:|c10d::|userbuffers|multimem|nvshmem"),
        ("attention", r"flash|sdpa|fmha|attn|attention|scaled_dot_product"),
        ("optimizer", r"multi_tensor|adam"),
        ("head", r"online_softmax|cross_entropy|element_mul_kernel|nll_loss"),
        ("norm", r"rms_?norm|layer_?norm|normalization|\bnorm_(fwd|bwd|forward|backward)"),
        ("gemm_fp8", rf"nvjet(_sm\d+)?_[qr]|_scaled_mm|(gemm|cutlass|xmma).*({_FP8})"
                     rf"|({_FP8}).*gemm"),
        ("gemm", r"nvjet|gemm|gemv|xmma|cutlass|cublas|splitk|matmul"
                 r"|aten::(mm|addmm|bmm|baddbmm|addbmm|linear|einsum)\b|mkldnn_linear"),
        ("fp8_cast", rf"^(?!aten::).*transpose|quantize|amax|scale_inv|swizzle|{_FP8}"),
        ("elementwise", r"elementwise|copy|mem(cpy|set)|swiglu|silu|gelu|rope|rota(ry|te)|triton_"
                        r"|catarray|reduce|fill|index|gather|scatter|embedding|softmax|gated|nvfuser|fused"
                        r"|aten::"),
    )
)  # fmt: skip


def category_of(name: str) -> str:
    """The category of a kernel (on a CPU of an operator) by its name alone."""
    return next((category for category, names in _NAMES if names.search(name)), "other")


@dataclass(frozen=True)
class Kernel:
    """A kernel, or a copy: when it ran on the device, and when the host launched it."""

    name: str
    start: int
    end: int
    launched: int


@dataclass(frozen=True)
class Step:
    """One step as it was traced.

    `ranges` are intervals of the host, by what it did in them: a kernel that was launched in one of
    a category's is of that category, whatever its name, unless it is communication. `waits` are the
    host's waits for data.
    """

    window: Interval
    kernels: Sequence[Kernel]
    ranges: Mapping[str, Sequence[Interval]] = field(default_factory=dict)
    waits: Sequence[Interval] = ()


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same times, ascending, none twice."""
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        elif end > start:
            found.append((start, end))
    return found


def _covers(intervals: Sequence[Interval], moment: int) -> bool:
    """Whether a moment lies in one of these, which are a union."""
    at = bisect_right(intervals, (moment, 2**63)) - 1
    return at >= 0 and intervals[at][0] <= moment < intervals[at][1]


def categorized(step: Step) -> list[tuple[str, Kernel]]:
    """The kernels that ran in the step, each with its category."""
    ranges = {category: union(intervals) for category, intervals in step.ranges.items()}
    begin, end = step.window
    found = []
    for kernel in step.kernels:
        if kernel.end <= begin or kernel.start >= end:
            continue
        category = category_of(kernel.name)
        if category != COMMUNICATION:
            category = next(
                (name for name, own in ranges.items() if _covers(own, kernel.launched)), category
            )
        found.append((category, kernel))
    return found


@dataclass(frozen=True)
class Split:
    """Nanoseconds of a step by category, which add up to it; and what of the communication ran
    beside a kernel that computes, which is not among them.
    """

    nanoseconds: dict[str, int]
    overlapped: int

    @property
    def step(self) -> int:
        return sum(self.nanoseconds.values())

    def share(self, category: str) -> float:
        return self.nanoseconds[category] / self.step


def split(step: Step) -> Split:
    """Give each instant of a step to one category.

    Communication is exposed where nothing computes. Where nothing runs at all, the time is a wait
    for data if the host waits for data, else idle.
    """
    begin, end = step.window
    rank = {category: at for at, category in enumerate(CATEGORIES)}
    changes: list[tuple[int, int, int]] = []  # (moment, category, +1 or -1)
    intervals = [(rank[category], kernel.start, kernel.end)
                 for category, kernel in categorized(step)]  # fmt: skip
    intervals += [(rank[DATA_WAIT], *wait) for wait in step.waits]
    for category, first, last in intervals:
        if max(first, begin) < min(last, end):
            changes += [(max(first, begin), category, 1), (min(last, end), category, -1)]
    changes.sort()
    active = [0] * len(CATEGORIES)
    spent = [0] * len(CATEGORIES)
    overlapped, before = 0, begin
    for moment, category, change in [*changes, (end, rank[IDLE], 0)]:
        if moment > before:
            now = next((at for at, count in enumerate(active) if count), rank[IDLE])
            spent[now] += moment - before
            if active[rank[COMMUNICATION]] and now < rank[COMMUNICATION]:
                overlapped += moment - before
            before = moment
        active[category] += change
    return Split(dict(zip(CATEGORIES, spent, strict=True)), overlapped)


@dataclass
class Cost:
    """The kernels of one name together."""

    name: str
    category: str
    calls: int = 0
    nanoseconds: int = 0


def most_expensive(step: Step, count: int) -> list[Cost]:
    """The names whose kernels took the longest together, the longest first."""
    costs: dict[tuple[str, str], Cost] = {}
    for category, kernel in categorized(step):
        cost = costs.setdefault((kernel.name, category), Cost(kernel.name, category))
        cost.calls += 1
        cost.nanoseconds += kernel.end - kernel.start
    return sorted(costs.values(), key=lambda cost: -cost.nanoseconds)[:count]
