"""Measures the steps of a training while they run, and writes bench.json."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model

from tanren import runs
from tanren.config.training import Dpo
from tanren.engine import products, timing
from tanren.engine.checkpoint import TrainingState
from tanren.engine.profile import Rates, StepTracer, measure_rates
from tanren.engine.saver import Saver
from tanren.engine.step import Feed, Work
from tanren.engine.timeline import CATEGORIES, Step, most_expensive, split
from tanren.plan.bench import Bench, least_work
from tanren.plan.cost import peak_tflops
from tanren.plan.plan import TrainingPlan

_KERNELS = 25


def saver_of(bench: Bench) -> type[Saver]:
    """A saver that saves behind one step, so that it is seen what that costs, or never."""
    only = bench.save_step if bench.save else None

    class BenchSaver(Saver):
        def prepare(self, state: TrainingState) -> None:
            if only is not None:
                super().prepare(state)

        def save(self, state: TrainingState) -> None:
            if state.iteration == only:
                super().save(state)

    return BenchSaver


def rates_of(plan: TrainingPlan, device: torch.device) -> Rates:
    """What the device does at best in the plan's precision; every rank measures, to stay alike."""
    dtype = torch.bfloat16 if plan.precision == "bf16" else torch.float32
    rates = measure_rates(device, dtype)
    timing.startup.reached("large matrix products")
    return rates


class Measuring:
    """One bench, from its first step to its file."""

    def __init__(
        self, plan: TrainingPlan, bench: Bench, state: TrainingState, feed: Feed,
        rates: Rates, device: torch.device,
    ) -> None:  # fmt: skip
        self.plan, self.bench, self.feed, self.rates = plan, bench, feed, rates
        self.device = device
        model = unwrap_model(state.model)
        self.attention, self.products = model.attention, model.products
        self._tracer = StepTracer(bench.steps, state.model, device)

    def around(self, step: int) -> AbstractContextManager[None]:
        """What a step, counted from 1, runs in."""
        return self._tracer.around(step)

    def write(self) -> None:
        """Write what was measured; every rank calls this after the last step."""
        peak = torch.zeros(1, dtype=torch.float64, device=self.device)
        if self.device.type == "cuda":
            peak.fill_(torch.cuda.max_memory_allocated() / 2**30)
            dist.all_reduce(peak, dist.ReduceOp.MAX)
        if dist.get_rank() == 0:
            assert self._tracer.traced is not None
            found = self._found(self._tracer.traced)
            found["peak_memory_gib"] = round(float(peak), 2) if float(peak) else None
            runs.write_json(self.plan.folder.bench, found)

    def _found(self, traced: Step) -> dict[str, Any]:
        plan, bench, world = self.plan, self.bench, dist.get_world_size()
        recipe, layout = plan.recipe, plan.recipe.layout
        seconds = runs.curve(plan.folder.metrics, "seconds")
        waits = runs.curve(plan.folder.metrics, "data_seconds")
        works = {step: _between(self.feed, step) for step in (*bench.timed, bench.steps)}
        tflops = [works[step].flops / seconds[step] / world / 1e12 for step in bench.timed]
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        peak = peak_tflops(name, recipe.fp8)
        return {
            "format": 1,
            "task": plan.task, "stage": plan.stage, "model": recipe.model,
            "parameters": plan.model.parameters,
            "data": "real" if bench.real else "random",
            "device": name, "gpus": world if self.device.type == "cuda" else 0,
            "processes": world, "precision": plan.precision, "fp8": recipe.fp8,
            "attention": self.attention, "products": self.products,
            "layout": layout.model_dump(mode="json") | {"data": plan.batch.data_parallel},
            "sequence_length": recipe.sequence_length, "micro_batch": plan.batch.micro_batch,
            "global_batch": recipe.global_batch,
            "accumulation": self.feed.accumulation(bench.steps - 1),
            "steps": {"all": bench.steps, "warm_up": bench.warm_up, "timed": len(bench.timed)},
            "tokens_per_step": statistics.median(works[step].tokens for step in bench.timed),
            "step_seconds": _spread([seconds[step] for step in bench.timed], 4),
            "tokens_per_second_per_gpu": _spread(
                [works[step].tokens / seconds[step] / world for step in bench.timed], 1
            ),
            "tflops_per_gpu": _spread(tflops, 2),
            "mfu": round(statistics.median(tflops) / peak, 4) if peak else None,
            "peak_tflops": peak, "peak_of": "bf16" if recipe.fp8 == "none" else "fp8",
            "data_seconds": _spread([waits[step] for step in bench.timed], 4),
            "start": {
                "seconds": round(timing.startup.seconds, 2),
                "phases": {key: round(own, 2) for key, own in timing.startup.phases.items()},
                "first_step_seconds": seconds[1],
            },
            "save_blocked_seconds": _blocked(plan) if bench.save else None,
            "profile": self._profile(traced, works[bench.steps]),
        }  # fmt: skip

    def _profile(self, traced: Step, work: Work) -> dict[str, Any]:
        plan, rates = self.plan, self.rates
        parts = split(traced)
        costs = most_expensive(traced, _KERNELS)
        least = least_work(
            plan.model, plan.recipe, precision=plan.precision,
            data_parallel=plan.batch.data_parallel, tokens=work.tokens,
            predicted=work.predicted, flops=work.flops,
            swiglu_inside=self.products == products.PACKAGE,
        )  # fmt: skip
        gemm = parts.nanoseconds["gemm"] + parts.nanoseconds["gemm_fp8"]
        head = parts.nanoseconds["head"]
        layer_rate = head_rate = rates.gemm_tflops
        if plan.recipe.fp8 != "none" and rates.fp8_tflops:
            layer_rate = rates.fp8_tflops
            if not isinstance(plan.recipe, Dpo):
                # Of the head's three products two are of FP8.
                head_rate = 3 / (1 / rates.gemm_tflops + 2 / rates.fp8_tflops)
        multiplied = least["layer_flop"] + least["head_flop"]
        return {
            "step_milliseconds": parts.step / 1e6,
            "kernels_traced": len(traced.kernels),
            "categories": {
                name: {"milliseconds": parts.nanoseconds[name] / 1e6, "share": parts.share(name)}
                for name in CATEGORIES
            },
            "communication_overlapped_milliseconds": parts.overlapped / 1e6,
            # The head's are among its own time, with the losses.
            "layer_gemm_tflops": least["layer_flop"] / gemm / 1e3 if gemm else None,
            "gemm_and_head_tflops": multiplied / (gemm + head) / 1e3 if gemm + head else None,
            "measured": asdict(rates),
            "least": least,
            "floor_milliseconds": {
                "gemm": 1e-9 * (
                    least["layer_flop"] / layer_rate + least["head_flop"] / head_rate
                ),
                "attention": 1e-9 * least["attention_flop"] / rates.gemm_tflops,
                "elementwise": 1e-6 * least["elementwise_bytes"] / rates.copy_gb_per_second,
                "optimizer": 1e-6 * least["optimizer_bytes"] / rates.copy_gb_per_second,
            },
            "most_expensive": [
                {
                    "name": cost.name, "category": cost.category, "calls": cost.calls,
                    "milliseconds": cost.nanoseconds / 1e6,
                    "share": cost.nanoseconds / parts.step,
                }
                for cost in costs
            ],
        }  # fmt: skip


def _between(feed: Feed, step: int) -> Work:
    """What one step, counted from 1, is."""
    before, after = feed.work(step - 1), feed.work(step)
    return Work(
        after.tokens - before.tokens,
        after.flops - before.flops,
        after.predicted - before.predicted,
    )


def _spread(values: Sequence[float], digits: int) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
    }


def _blocked(plan: TrainingPlan) -> float | None:
    """How long the one save held up training."""
    blocked = runs.curve(plan.folder.metrics, "save_blocked_seconds")
    return max(blocked.values(), default=None)
