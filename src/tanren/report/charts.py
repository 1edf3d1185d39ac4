"""Which curves a page shows, and each as the points and the words that go into it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tanren.report.record import Record
from tanren.report.thin import Curve, smoothed, thinned, window_of

# What a curve is made of: as it is; faint, with its running mean; or measured now and then.
Kind = Literal["plain", "smoothed", "points"]


@dataclass(frozen=True)
class Line:
    """One metric of a chart. `share_of_peak` shows it as percent of what the GPU can do."""

    key: str
    label: str
    kind: Kind = "plain"
    share_of_peak: bool = False


@dataclass(frozen=True)
class Chart:
    """Curves that share an axis."""

    id: str
    title: str
    unit: str
    lines: tuple[Line, ...]


CHARTS = (
    Chart("loss", "Loss", "nats", (
        Line("loss", "training", "smoothed"), Line("held_out_loss", "held out", "points"))),
    Chart("accuracy", "Accuracy of preferences", "of pairs", (
        Line("accuracy", "training", "smoothed"), Line("held_out_accuracy", "held out", "points"))),
    Chart("margin", "Margin: chosen less rejected reward", "reward", (
        Line("margin", "training", "smoothed"), Line("held_out_margin", "held out", "points"))),
    Chart("rewards", "Rewards", "reward", (
        Line("chosen_reward", "chosen"), Line("rejected_reward", "rejected"))),
    Chart("kl", "Log-ratio to the reference", "nats", (Line("kl", "mean of both answers"),)),
    Chart("lr", "Learning rate", "", (Line("lr", "learning rate"),)),
    Chart("grad_norm", "Gradient norm", "", (Line("grad_norm", "gradient norm", "smoothed"),)),
    Chart("speed", "Tokens per second", "tokens/s", (
        Line("tokens_per_second", "speed", "smoothed"),)),
    Chart("tflops", "Model TFLOP/s per GPU", "TFLOP/s", (
        Line("tflops_per_gpu", "TFLOP/s per GPU", "smoothed"),)),
    Chart("mfu", "MFU: model FLOP/s as a share of the GPU's peak", "%", (
        Line("tflops_per_gpu", "MFU", "smoothed", share_of_peak=True),)),
    Chart("memory", "Peak memory of the first GPU", "GiB", (
        Line("peak_memory_gib", "peak memory"),)),
    Chart("blocked", "How long a save kept the training waiting", "s", (
        Line("save_blocked_seconds", "training waited", "points"),)),
    Chart("saves", "How long a checkpoint took to be published", "s", (
        Line("save_seconds", "published after", "points"),)),
    Chart("data", "Waiting for data", "s a step", (Line("data_seconds", "waited", "smoothed"),)),
    Chart("slowest", "Slowest rank over the median of its stage", "times", (
        Line("slowest_over_median", "slowest rank", "smoothed"),)),
)  # fmt: skip


def drawn(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The charts that some run has values for, as the page's script takes them."""
    found = []
    for chart in CHARTS:
        lines = [
            line
            for number, record in enumerate(records)
            for place, wanted in enumerate(chart.lines)
            for line in _lines(record, number, wanted, place, several=len(records) > 1)
        ]
        if lines:
            words = [_in_words(record, chart) for record in records]
            found.append(
                {
                    "id": chart.id, "title": chart.title, "unit": chart.unit, "lines": lines,
                    "words": " ".join(one for one in words if one),
                    "table": _table(records, chart),
                }
            )  # fmt: skip
    return found


def curve_of(record: Record, line: Line) -> Curve | None:
    """The whole curve of a line; None where the run has none."""
    curve = record.curves.get(line.key)
    if curve is None or not line.share_of_peak:
        return curve
    peak = record.peak_tflops
    return Curve(curve.steps, [100 * v / peak for v in curve.values]) if peak else None


def _lines(
    record: Record, number: int, wanted: Line, place: int, *, several: bool
) -> list[dict[str, Any]]:
    curve = curve_of(record, wanted)
    if not curve:
        return []
    whose = f"{record.name} " if several else ""

    def one(label: str, curve: Curve, kind: str) -> dict[str, Any]:
        few = thinned(curve)
        # A run has a colour, or, of a single run, a curve has one.
        return {"run": number, "place": place, "label": whose + label, "kind": kind,
                # Two points with a line between them would say that nothing happened there.
                "joined": wanted.key.startswith("held_out_") and len(few) > 2,
                "steps": list(few.steps), "values": [_short(v) for v in few.values]}  # fmt: skip

    if wanted.kind != "smoothed":
        return [one(wanted.label, curve, wanted.kind)]
    mean = smoothed(curve, window_of(curve))
    return [one(wanted.label, curve, "faint"), one(f"{wanted.label}, smoothed", mean, "plain")]


def _in_words(record: Record, chart: Chart) -> str:
    """The curves for those who listen: `tiny/sft: training from 7.64 at step 1 to 5.51 ...`."""
    parts = []
    for line in chart.lines:
        curve = curve_of(record, line)
        if curve:
            low, high = min(curve.values), max(curve.values)
            parts.append(
                f"{line.label} from {number(curve.values[0])} at step {curve.steps[0]:,} to "
                f"{number(curve.values[-1])} at step {curve.steps[-1]:,}, between {number(low)} "
                f"and {number(high)}"
            )
    return f"{record.name}: {'; '.join(parts)}." if parts else ""


def _table(records: Sequence[Record], chart: Chart) -> dict[str, Any]:
    """A dozen steps of each curve, smoothed where it is drawn so."""
    titles: list[str] = []
    columns: list[dict[int, float]] = []
    for record in records:
        for line in chart.lines:
            curve = curve_of(record, line)
            if curve:
                if line.kind == "smoothed":
                    curve = smoothed(curve, window_of(curve))
                whose = f"{record.name} " if len(records) > 1 else ""
                titles.append(whose + line.label + (", smoothed" * (line.kind == "smoothed")))
                columns.append(dict(zip(curve.steps, curve.values, strict=True)))
    fullest = max(columns, key=len)
    longest = sorted(fullest)
    places = {round(n * (len(longest) - 1) / 11) for n in range(12)}
    # Held-out values are few, and at steps of their own.
    steps = sorted({longest[at] for at in places} | {s for c in columns if len(c) <= 12 for s in c})
    rows = [
        [f"{step:,}", *(number(c[step]) if step in c else "" for c in columns)] for step in steps
    ]
    return {"titles": ["step", *titles], "rows": rows}


def _short(value: float) -> float:
    """Six digits are more than a screen shows, and a third of the page's size."""
    return float(f"{value:.6g}")


def number(value: float) -> str:
    """A value as a person reads it: `5.507`, `7,189`, `3e-05`."""
    size = abs(value)
    if size < 1e-8:
        return "0"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"
