"""What `engine: nemo` does not do, refused before anything runs."""

from __future__ import annotations

from tanren.config.errors import RequestError
from tanren.config.training import Tuning
from tanren.plan.plan import Request
from tanren.plan.training import Start

_MEGATRON = "--set engine=megatron"


def check_nemo(request: Request, recipe: Tuning, base: Start) -> None:
    """Refuse what only the engine of megatron-core does.

    Raises:
        RequestError: the first of it.
    """
    place, layout = str(request.recipe_file), recipe.layout
    cuts = [name for name in ("tensor", "pipeline") if getattr(layout, name) > 1]
    refused = [
        (
            "lora",
            recipe.lora is not None,
            "adapters are trained by engine: megatron alone",
            f"--set lora=null, or {_MEGATRON}",
        ),
        (
            "init",
            bool(base.adapters),
            f"{recipe.init} was tuned by LoRA, and engine: nemo begins from whole weights",
            f"make export, and init: hf: with its folder; or {_MEGATRON}",
        ),
        (
            "fp8",
            recipe.fp8 != "none",
            f"{recipe.fp8} is offered by engine: megatron alone",
            f"--set fp8=none, or {_MEGATRON}",
        ),
        (
            "attention",
            recipe.attention == "flash4",
            f"{recipe.attention} is offered by engine: megatron alone",
            f"--set attention=auto, or {_MEGATRON}",
        ),
        (
            "linear",
            recipe.linear == "quack",
            f"{recipe.linear} is offered by engine: megatron alone",
            f"--set linear=auto, or {_MEGATRON}",
        ),
        (
            f"layout.{cuts[0] if cuts else ''}",
            bool(cuts),
            "engine: nemo spreads a model over data-parallel GPUs alone, their optimizer shared",
            f"{' '.join(f'--set layout.{name}=1' for name in cuts)}, or {_MEGATRON}",
        ),
        (
            "optimizer.moments",
            recipe.optimizer.moments != "fp32",
            f"{recipe.optimizer.moments} is offered by engine: megatron alone",
            f"--set optimizer.moments=fp32, or {_MEGATRON}",
        ),
        (
            "engine",
            request.bench is not None,
            "a bench measures engine: megatron",
            f"{_MEGATRON}; benchmarks/nemo.py compares both",
        ),
    ]
    for field, is_so, problem, next_step in refused:
        if is_so:
            raise RequestError(f"{place}: {field}", problem, next_step)
