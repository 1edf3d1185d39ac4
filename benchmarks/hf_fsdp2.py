"""What one would use without tanren: transformers' LLaMA under PyTorch's FSDP2, measured alike.

    PYTHONPATH=src torchrun --nproc-per-node 4 benchmarks/hf_fsdp2.py --model llmjp4-8b \\
        --accumulation 16 --out hf.json

fp32 master weights, gradients and Adam moments, sharded over the ranks; bf16 in the forward and
backward pass, gradients reduced in fp32 (PyTorch's `fully_shard`, one group a decoder layer and one
for the rest). The attention is flash_attn's where it is installed, else PyTorch's own; the loss is
transformers'. Weights are random: how fast steps are does not depend on them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from tanren.config.load import read_model
from tanren.config.model import Model
from tanren.convert.llama_config import config_of
from tanren.plan.cost import PEAK_TFLOPS
from tanren.tokenfiles import bin_path


def main(words: Sequence[str] | None = None) -> None:
    options = read_options(words)
    shape = read_model(options.model)
    if shape.tied_embeddings:
        sys.exit(f"--model {options.model}: tied embeddings are not measured here")
    device = join()
    model = build(shape, options, device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1,
        fused=device.type == "cuda",
    )  # fmt: skip
    batches = rows(shape, options, device)
    steps = [
        step(model, optimizer, batches, options, number, device)
        for number in range(1, options.steps + 1)
    ]
    found = summary(shape, options, steps, device)
    if dist.get_rank() == 0:
        text = json.dumps(found, indent=2)
        if options.out:
            options.out.write_text(text + "\n")
        print(text)
    dist.destroy_process_group()


def read_options(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="transformers under FSDP2, measured")
    parser.add_argument("--model", required=True, help="a shape in recipes/models")
    parser.add_argument("--sequence", type=int, default=4096)
    parser.add_argument("--micro-batch", type=int, default=1, help="rows of a rank at a time")
    parser.add_argument("--accumulation", type=int, default=1, help="micro batches of a step")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warm-up", type=int, default=2, help="steps that are not counted")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--data", type=Path, help="PREFIX of a .bin; else random tokens")
    parser.add_argument("--out", type=Path, help="a JSON file")
    parser.add_argument("--attention", choices=("sdpa", "flash_attention_2", "eager"))
    parser.add_argument("--checkpointing", action="store_true", help="recompute decoder layers")
    parser.add_argument("--compile", action="store_true", help="torch.compile each decoder layer")
    parser.add_argument("--liger", action="store_true", help="the fused kernels of liger_kernel")
    parser.add_argument(
        "--keep-gathered", action="store_true",
        help="weights stay gathered through a step: 2 bytes a parameter more (ZeRO-2)",
    )  # fmt: skip
    parser.add_argument(
        "--late-reduce", action="store_true",
        help="gradients are reduced once a step: 4 bytes a parameter more, less communication",
    )  # fmt: skip
    options = parser.parse_args(words)
    if options.steps <= options.warm_up:
        parser.error(f"--steps {options.steps}: --warm-up {options.warm_up} leaves none to measure")
    if options.attention is None:
        flash = torch.cuda.is_available() and importlib.util.find_spec("flash_attn")
        options.attention = "flash_attention_2" if flash else "sdpa"
    return options


def join() -> torch.device:
    """Join torchrun's process group, or one of this process alone; this rank's device."""
    group: dict[str, Any] = {}
    if "RANK" not in os.environ:
        group = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    if not torch.cuda.is_available():
        dist.init_process_group("gloo", **group)
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device, **group)
    return device


def build(shape: Model, options: argparse.Namespace, device: torch.device) -> torch.nn.Module:
    """The model with random weights, sharded over all ranks. It is never whole on any of them."""
    if options.liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    config = transformers.LlamaConfig(**{**config_of(shape), "use_cache": False})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation=options.attention, dtype=torch.float32
        )
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    share = partial(
        fully_shard, mesh=mesh,
        mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
    )  # fmt: skip
    for layer in model.model.layers:
        if options.compile:
            layer.compile()
        share(layer, reshard_after_forward=not options.keep_gathered)
    share(model)
    model.to_empty(device=device)
    torch.manual_seed(1234 + dist.get_rank())
    for parameter in model.parameters():
        own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        with torch.no_grad():
            if parameter.dim() == 1:
                own.fill_(1.0)  # norms; a LLaMA has no biases
            else:
                own.normal_(0.0, shape.init_std)
    # Its frequencies are a buffer outside the checkpoint: computed, and `to_empty` has lost them.
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.train()  # type: ignore[no-any-return]


def rows(shape: Model, options: argparse.Namespace, device: torch.device) -> Iterator[torch.Tensor]:
    """Micro batches of this rank for ever, [micro batch, sequence] of token ids."""
    rank, world = dist.get_rank(), dist.get_world_size()
    size = (options.micro_batch, options.sequence)
    if options.data is None:
        generator = torch.Generator(device).manual_seed(rank)
        while True:
            yield torch.randint(shape.vocabulary_size, size, generator=generator, device=device)
    dtype = "<u2" if shape.vocabulary_size < 65500 else "<i4"
    tokens = np.memmap(bin_path(options.data), dtype=dtype, mode="r")
    whole = len(tokens) // (size[0] * size[1])
    if whole < world:
        sys.exit(f"--data {options.data}: {len(tokens):,} tokens are no micro batch for each rank")
    blocks = tokens[: whole * size[0] * size[1]].reshape(whole, *size)
    at = rank
    while True:
        yield torch.from_numpy(blocks[at % whole].astype(np.int64)).to(device)
        at += world


def step(
    model: Any, optimizer: torch.optim.Optimizer, batches: Iterator[torch.Tensor],
    options: argparse.Namespace, number: int, device: torch.device,
) -> dict[str, float]:  # fmt: skip
    """One optimizer step: its loss, the mean over this rank's tokens, its norm and its seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    began = time.perf_counter()
    total = torch.zeros((), device=device)
    for micro in range(options.accumulation):
        last = micro == options.accumulation - 1
        model.set_reshard_after_backward(last or not options.keep_gathered)
        model.set_requires_gradient_sync(last or not options.late_reduce)
        tokens = next(batches)
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        (loss / options.accumulation).backward()
        total += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    found = {
        "loss": float(total) / options.accumulation,
        "grad_norm": float(norm.full_tensor() if isinstance(norm, DTensor) else norm),
    }
    if device.type == "cuda":
        torch.cuda.synchronize()
    found["seconds"] = time.perf_counter() - began
    if dist.get_rank() == 0:
        shown = "  ".join(f"{name} {value:.4f}" for name, value in found.items())
        print(f"step {number}/{options.steps}  {shown}", file=sys.stderr, flush=True)
    return found


def summary(
    shape: Model, options: argparse.Namespace, steps: list[dict[str, float]], device: torch.device
) -> dict[str, Any]:
    """What was measured, under the names that tanren's own measurements have."""
    world = dist.get_world_size()
    peak = torch.zeros(1, dtype=torch.float64, device=device)
    if device.type == "cuda":
        peak.fill_(torch.cuda.max_memory_allocated() / 2**30)
        dist.all_reduce(peak, dist.ReduceOp.MAX)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    best = next((value for gpu, value in PEAK_TFLOPS.items() if name.startswith(gpu)), None)
    own = options.sequence * options.micro_batch * options.accumulation
    seconds = [one["seconds"] for one in steps[options.warm_up :]]
    operations = shape.flops_per_token(options.sequence)
    tflops = [own * operations / one / 1e12 for one in seconds]
    return {
        "of": "transformers, FSDP2",
        "model": options.model,
        "parameters": shape.parameters,
        "data": "real" if options.data else "random",
        "device": name,
        "gpus": world if device.type == "cuda" else 0,
        "processes": world,
        "precision": "bf16",
        "fp8": "none",
        "attention": options.attention,
        "checkpointing": options.checkpointing,
        "compile": options.compile,
        "liger": options.liger,
        "keep_gathered": options.keep_gathered,
        "late_reduce": options.late_reduce,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "sequence_length": options.sequence,
        "micro_batch": options.micro_batch,
        "global_batch": options.micro_batch * options.accumulation * world,
        "accumulation": options.accumulation,
        "steps": {"all": len(steps), "warm_up": options.warm_up, "timed": len(seconds)},
        "tokens_per_step": own * world,
        "step_seconds": spread(seconds, 4),
        "tokens_per_second_per_gpu": spread([own / one for one in seconds], 1),
        "tflops_per_gpu": spread(tflops, 2),
        "mfu": round(statistics.median(tflops) / best, 4) if best else None,
        "peak_memory_gib": round(float(peak), 2) if float(peak) else None,
        "seconds": [round(one["seconds"], 4) for one in steps],
        "loss": [one["loss"] for one in steps],
        "grad_norm": [one["grad_norm"] for one in steps],
    }


def spread(values: Sequence[float], digits: int) -> dict[str, float]:
    """The middle, the least and the largest."""
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
    }


if __name__ == "__main__":
    main()
