"""What a bench measured, as a person reads it."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from tanren.launch.orders import shown
from tanren.plan.paths import RunFolder

_NAMES = {
    "gemm": "matrix products", "gemm_fp8": "matrix products, FP8", "attention": "attention",
    "head": "head: logits and loss", "norm": "norms, sums before them", "fp8_cast": "FP8 casts",
    "optimizer": "optimizer", "elementwise": "elementwise, copies", "other": "other kernels",
    "communication_exposed": "communication, exposed", "data_wait": "waits for data",
    "idle": "idle: no kernel",
}  # fmt: skip
_SHOWN, _NAME_WIDTH = 8, 60


def print_bench(found: dict[str, Any], folder: RunFolder, screen: Console) -> None:
    """Speed, memory and start; the split of a step; the most expensive kernels; the floor."""

    def say(line: str, style: str | None = None) -> None:
        screen.print(line.rstrip(), markup=False, style=style)

    for name, value in _rows(found):
        say(f"  {name:<11}{value}")
    profile = found["profile"]
    step = profile["step_milliseconds"]
    say(f"one step, profiled: {step:,.1f} ms"
        f"   ({profile['kernels_traced']:,} {'kernels' if found['gpus'] else 'operators'})",
        "bold")  # fmt: skip
    for name, part in profile["categories"].items():
        if part["milliseconds"]:
            say(f"  {_NAMES[name]:<26}{part['milliseconds']:>10,.1f} ms {part['share']:>7.1%}")
    hidden = profile["communication_overlapped_milliseconds"]
    if hidden:
        say(f"  beside these, communication under computation {hidden:,.1f} ms")
    say("the most expensive", "bold")
    for cost in profile["most_expensive"][:_SHOWN]:
        title = cost["name"]
        title = title if len(title) <= _NAME_WIDTH else title[: _NAME_WIDTH - 3] + "..."
        say(f"  {cost['milliseconds']:>10,.1f} ms {cost['calls']:>7,} x  {title}   "
            f"[{cost['category']}]")  # fmt: skip
    for line in _floor(found):
        say(line)
    say(f"  all of it  {shown(folder.bench)}")


def _rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    speed, tflops, seconds = (
        found[key] for key in ("tokens_per_second_per_gpu", "tflops_per_gpu", "step_seconds")
    )
    layout, start, steps = found["layout"], found["start"], found["steps"]
    where = f"{found['gpus']} x {found['device']}" if found["gpus"] else (
        f"the CPU, processes: {found['processes']}"
    )  # fmt: skip
    fp8 = f", fp8 {found['fp8']}" if found["fp8"] != "none" else ""
    size = found["parameters"]
    size = f"{size / 1e9:,.2f} B" if size >= 1e9 else f"{size / 1e6:,.1f} M"
    made_up = "random tokens and weights" if found["data"] == "random" else "the recipe's own data"
    unit = "GPU" if found["gpus"] else "process"
    mfu = (
        f"   MFU {found['mfu']:.1%} of {found['peak_tflops']:,.0f} ({found['peak_of']})"
        if found["mfu"]
        else ""
    )
    rows = [
        ("on", f"{where}: tensor {layout['tensor']}, pipeline {layout['pipeline']}, context "
         f"{layout['context']}, data {layout['data']}, recompute {layout['recompute']}"),
        ("model", f"{found['model']}, {size}; {found['precision']}{fp8}; {made_up}; attention by "
         f"{found['attention']}, products by {found['products']}"),
        ("batch", f"{found['global_batch']} of {found['sequence_length']:,} tokens, micro batch "
         f"{found['micro_batch']}, {found['accumulation']} a step"),
        ("speed", f"{speed['median']:,.0f} tokens/s a {unit} ({speed['min']:,.0f} to "
         f"{speed['max']:,.0f}), {_number(tflops['median'])} TFLOP/s{mfu}"),
        ("step", f"{seconds['median']:.3f} s ({seconds['min']:.3f} to {seconds['max']:.3f}; "
         f"{steps['timed']} of {steps['all']} steps), of it {found['data_seconds']['median']:.3f} "
         "waiting for data"),
    ]  # fmt: skip
    if found["peak_memory_gib"]:
        rows.append(("memory", f"{found['peak_memory_gib']:.1f} GiB at most"))
    phases = ", ".join(f"{name} {own:.1f}" for name, own in start["phases"].items())
    rows.append(("start", f"{start['seconds']:.1f} s to the first step ({phases}), which took "
                 f"{start['first_step_seconds']:.1f} s"))  # fmt: skip
    if found["save_blocked_seconds"] is not None:
        rows.append(("save", f"held up training for {found['save_blocked_seconds']:.2f} s"))
    return rows


def _number(value: float) -> str:
    return f"{value:,.1f}" if value >= 10 else f"{value:.3f}"


def _floor(found: dict[str, Any]) -> list[str]:
    profile = found["profile"]
    floor, rates = profile["floor_milliseconds"], profile["measured"]
    categories = profile["categories"]
    products = sum(categories[name]["milliseconds"] for name in ("gemm", "gemm_fp8"))
    head = categories["head"]["milliseconds"]
    fp8 = f" ({rates['fp8_tflops']:,.0f} in FP8)" if rates["fp8_tflops"] else ""
    achieved = profile["layer_gemm_tflops"]
    rate = f", at {_number(achieved)} TFLOP/s" if achieved else ""
    return [
        f"  floor      products of {rates['size']} x {rates['size']} run at "
        f"{_number(rates['gemm_tflops'])} TFLOP/s here{fp8}, copies at "
        f"{rates['copy_gb_per_second']:,.0f} GB/s; at these rates a step needs",
        f"             matrix products {floor['gemm']:,.1f} ms; it took {products:,.1f} in the "
        f"layers{rate}, {head:,.1f} in the head with the loss",
        f"             attention {floor['attention']:,.1f} ms; it took "
        f"{categories['attention']['milliseconds']:,.1f}",
        f"             elementwise {floor['elementwise']:,.1f} ms, optimizer "
        f"{floor['optimizer']:,.1f} ms; the whole step took {profile['step_milliseconds']:,.1f}",
    ]
