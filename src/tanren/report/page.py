"""report.html: one file that says what a run was and how it went, and needs nothing else.

Curves are drawn by uPlot, whose distributed file lies in web/ with its licence (MIT).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import orjson

import tanren
from tanren import runs
from tanren.config.errors import RequestError
from tanren.launch.orders import shown
from tanren.plan.paths import RunFolder
from tanren.plan.plan import MidtrainPlan, TuningPlan, differences
from tanren.report import charts, record
from tanren.report.charts import number
from tanren.report.record import Record
from tanren.report.thin import POINTS, window_of
from tanren.report.values import as_html, folded, table

_WEB = Path(__file__).with_name("web")
_LIMIT = 8  # runs on a page: more colours nobody tells apart


def write(folders: Sequence[RunFolder], out: Path | None = None) -> Path:
    """Write the page about one run, or about several laid over one another.

    Args:
        out: where to; else into the first run's folder.
    Raises:
        RequestError: a folder cannot be read, the runs cannot be compared, or no file written.
    """
    path = out or (folders[0].report if len(folders) == 1 else folders[0].comparison)
    records = [record.read(folder) for folder in folders]
    _check_comparable(records)
    content = html(records).encode()
    try:
        runs.write_atomic(path, content)
    except OSError as error:
        raise RequestError(path, f"cannot be written: {error.strerror}",
                           "name another place: --out FILE") from None  # fmt: skip
    return path


def _check_comparable(records: Sequence[Record]) -> None:
    stages = {one.plan.stage for one in records}
    if len(records) == 1:
        return
    if len(stages) > 1:
        found = ", ".join(f"{one.name} is {one.plan.stage}" for one in records)
        raise RequestError(
            "WITH", f"runs of different stages are no curves of one kind ({found}): a loss over "
            "all tokens, over answers and over preferences are different things",
            "make report RUN=... for each, or WITH= runs of one stage",
        )  # fmt: skip
    if not all(one.trains for one in records):
        raise RequestError("WITH", f"{stages.pop()} has no curves to lay over one another",
                           "make report RUN=... for each")  # fmt: skip
    names = [one.folder.root.resolve() for one in records]
    if len(set(names)) < len(names):
        raise RequestError("WITH", "names the same run twice", "name other runs")
    if len(records) > _LIMIT:
        raise RequestError("WITH", f"makes {len(records)} runs, and a page shows {_LIMIT}",
                           "leave some out")  # fmt: skip


def html(records: Sequence[Record]) -> str:
    """The page's text."""
    drawn = charts.drawn(records)
    title = " and ".join(one.name for one in records)
    data = {
        "runs": [
            {
                "name": one.name,
                "clock": _clock(one),
                "starts": [[a.number, a.first] for a in one.attempts[1:] if a.first is not None],
            }
            for one in records
        ],
        "charts": [
            {k: c[k] for k in ("id", "title", "unit", "lines")} for c in drawn
        ],
    }  # fmt: skip
    sections = [
        _summary(records),
        _curves(records, drawn),
        *(_data(one, several=len(records) > 1) for one in records),
        *(_attempts(one, several=len(records) > 1) for one in records),
        _scores(records),
        _differences(records),
        *(_passport(one, several=len(records) > 1) for one in records),
    ]
    # Text inside a script element ends at the first `</`.
    values = orjson.dumps(data).decode().replace("<", "\\u003c")
    script = "\n".join((_WEB / name).read_text() for name in ("uPlot.iife.min.js", "page.js"))
    style = "\n".join((_WEB / name).read_text() for name in ("uPlot.min.css", "page.css"))
    made = time.strftime("%Y-%m-%d %H:%M %z")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:">
<title>{escape(title)} · tanren</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<header><h1>{escape(title)}</h1><p>{escape(_subtitle(records))} · made {made}</p>{_notices(records)}</header>
<main>
{"".join(sections)}
</main>
<footer><p>{escape(_thinning(records))}</p>
<p>tanren {escape(tanren.__version__)}. Curves by uPlot 1.6.32, © 2022 Leon Sorokin, MIT License.</p></footer>
<script type="application/json" id="page-data">{values}</script>
<script>{script}</script>
</body>
</html>
"""  # noqa: E501


def _subtitle(records: Sequence[Record]) -> str:
    if len(records) > 1:
        return f"{len(records)} runs of {records[0].plan.stage}"
    one = records[0]
    steps = one.curves.get("loss")
    done = f" · step {steps.steps[-1]:,}" if steps else ""
    of = f" of {one.total_steps:,}" if steps and one.total_steps else ""
    return f"{one.plan.stage} · {one.state}{done}{of}"


def _notices(records: Sequence[Record]) -> str:
    notices = []
    for one in records:
        if one.going:
            notices.append(f"{one.name} is still going ({one.state}). This is how it was when the "
                           "page was made; the same command makes it anew.")  # fmt: skip
        if one.trains and "loss" not in one.curves:
            notices.append(f"{one.name} has no metrics yet: no step has ended.")
        failure = runs.failure_of(one.folder) if one.state == "failed" else None
        if failure is not None:
            notices.append(f"{one.name} failed. {failure.text()}")
    return "".join(f'<p class="notice" role="status">{escape(text)}</p>' for text in notices)


def _summary(records: Sequence[Record]) -> str:
    rows = [(title, [value(one) for one in records]) for title, value in _FACTS]
    cells = [[title, *values] for title, values in rows if any(values)]
    titles = ["", *(one.name for one in records)]
    return f"<section><h2>In short</h2>{table(titles, cells, 'Key values')}</section>"


def _ends(key: str) -> Any:
    def text(one: Record) -> str:
        curve = one.curves.get(key)
        return f"{number(curve.values[0])} → {number(curve.values[-1])}" if curve else ""

    return text


def _median(key: str, unit: str) -> Any:
    def text(one: Record) -> str:
        curve = one.curves.get(key)
        if not curve:
            return ""
        # The first steps warm up.
        steady = sorted(curve.values[min(5, len(curve) - 1) :])
        return f"{number(steady[len(steady) // 2])} {unit}"

    return text


def _highest(key: str, unit: str) -> Any:
    def text(one: Record) -> str:
        curve = one.curves.get(key)
        return f"{number(max(curve.values))} {unit}".strip() if curve else ""

    return text


def _mfu(one: Record) -> str:
    curve, peak = one.curves.get("tflops_per_gpu"), one.peak_tflops
    if not curve or peak is None:
        return ""
    steady = sorted(curve.values[min(5, len(curve) - 1) :])
    return f"{steady[len(steady) // 2] / peak:.1%} of {peak:,.0f} TFLOP/s"


def _steps(one: Record) -> str:
    curve = one.curves.get("loss")
    of = f" of {one.total_steps:,}" if one.total_steps else ""
    return f"{curve.steps[-1]:,}{of}" if curve else ""


def _saves(one: Record) -> str:
    curve = one.curves.get("save_blocked_seconds")
    return f"{len(curve)}, at most {number(max(curve.values))} s waited for" if curve else ""


def _cost(one: Record) -> str:
    points = f", about {one.points:,.1f} points" if one.points is not None else ""
    return f"{one.node_hours:,.2f} node-hours{points}"


_FACTS = (
    ("state", lambda one: one.state),
    ("steps", _steps),
    ("tokens read", _highest("tokens", "")),
    ("loss", _ends("loss")),
    ("held-out loss", _ends("held_out_loss")),
    ("held-out accuracy", _ends("held_out_accuracy")),
    ("held-out margin", _ends("held_out_margin")),
    ("highest learning rate", _highest("lr", "")),
    ("speed (median step)", _median("tokens_per_second", "tokens/s")),
    ("TFLOP/s per GPU (median step)", _median("tflops_per_gpu", "TFLOP/s")),
    ("MFU (median step)", _mfu),
    ("peak memory", _highest("peak_memory_gib", "GiB")),
    ("saves", _saves),
    ("attempts", lambda one: str(len(one.attempts))),
    ("cost", _cost),
)


def _curves(records: Sequence[Record], drawn: list[dict[str, Any]]) -> str:
    if not drawn:
        return ""
    figures = []
    for chart in drawn:
        unit = f" <small>{escape(chart['unit'])}</small>" if chart["unit"] else ""
        values = table(chart["table"]["titles"], chart["table"]["rows"], chart["title"])
        figures.append(
            f'<figure id="chart-{chart["id"]}"><h3>{escape(chart["title"])}{unit}</h3>'
            f'<div class="plot" role="img" aria-label="{escape(chart["words"])}"></div>'
            f"<figcaption>{folded('Values', values)}</figcaption></figure>"
        )
    axes = "".join(
        f'<label><input type="radio" name="axis" value="{name}"{" checked" * (name == "step")}>'
        f"{title}</label>"
        for name, title in (("step", "step"), ("tokens", "tokens read"), ("hours", "hours"))
    )
    long = max(curve.steps[-1] for one in records for curve in one.curves.values()) > 1000
    axes += (
        f'<label><input type="checkbox" id="start"{" checked" * long}>without the first 2 %</label>'
    )
    return (
        "<section><h2>Curves</h2><noscript><p class='notice'>The curves need JavaScript; every "
        "figure has its values in a table below it.</p></noscript>"
        f'<fieldset id="axis"><legend>Over</legend>{axes}</fieldset>'
        '<p class="hint">Drag over a stretch to enlarge it, double-click to go back. A name in a '
        "legend hides its curve. Dashed upright lines are where another attempt goes on.</p>"
        f'<div class="figures">{"".join(figures)}</div></section>'
    )


def _heading(title: str, one: Record, several: bool) -> str:
    return f"<h2>{title}{escape(f' of {one.name}') if several else ''}</h2>"


def _data(one: Record, *, several: bool) -> str:
    plan = one.plan
    if isinstance(plan, MidtrainPlan) and plan.mix is not None:
        rows = [
            [s.name, f"{s.tokens:,}", f"{s.used:,}", f"{s.epochs:.2f}", f"{s.weight:.2%}"]
            for s in plan.mix.sources
        ]
        rows += [[name, f"{tokens:,}", "0", "", ""] for name, tokens in plan.mix.left_out.items()]
        titles = ["source", "tokens there", "used", "epochs", "of the run"]
        content = table(titles, rows, "The mix of sources that the whole run reads")
    elif isinstance(plan, TuningPlan):
        found = (runs.read_json(one.folder.examples) or {}).get("sets", [])
        keys = ("read", "too_long", "used", "dev", "samples_per_epoch", "tokens", "trained_tokens")
        rows = [[str(s["name"]), *(f"{s.get(key, 0):,}" for key in keys)] for s in found]
        titles = ["dataset", "read", "too long", "used", "dev", "an epoch", "tokens", "trained"]
        content = table(titles, rows, "The sets of conversations") if rows else ""
        if plan.recipe.epochs is not None:
            content += f"<p>{plan.recipe.epochs:g} epochs.</p>"
    elif one.result is not None:
        return f"<section>{_heading('What it made', one, several)}{as_html(one.result)}</section>"
    else:
        return ""
    return f"<section>{_heading('Data', one, several)}{content}</section>" if content else ""


def _attempts(one: Record, *, several: bool) -> str:
    rows = [
        [
            str(a.number), f"{a.first:,} to {a.last:,}" if a.first is not None else "",
            _date(a.started), _date(a.ended), a.ending, a.host, f"{a.nodes}",
            f"{a.node_hours:,.3f}",
        ]
        for a in one.attempts
    ]  # fmt: skip
    titles = ["attempt", "steps", "began", "ended", "how", "first host", "nodes", "node-hours"]
    note = f"<p>Points: {escape(one.points_note)}.</p>" if one.points_note else ""
    return (
        f"<section>{_heading('Attempts and cost', one, several)}"
        f"{table(titles, rows, 'From the start of each to its end')}"
        f"<p>Together {escape(_cost(one))}.</p>{note}</section>"
    )


def _date(stamp: str) -> str:
    return stamp.replace("T", " ")


def _differences(records: Sequence[Record]) -> str:
    if len(records) < 2:
        return ""
    first = records[0]
    parts = []
    for other in records[1:]:
        found = differences(first.plan.settings, other.plan.settings)
        items = "".join(f"<li>{escape(line)}</li>" for line in found)
        parts.append(
            f"<h3>{escape(other.name)}, here, beside {escape(first.name)}, there</h3>"
            + (f"<ul>{items}</ul>" if found else "<p>The same settings.</p>")
        )
    return f"<section><h2>What differs</h2>{''.join(parts)}</section>"


def _passport(one: Record, *, several: bool) -> str:
    entries = one.passport["attempts"]
    parts = []
    for entry in reversed(entries):
        title = f"Attempt {entry.get('attempt', '?')}, {entry.get('started', '')}"
        parts.append(folded(title, as_html(entry), is_open=entry is entries[-1] and not several))
    others = {key: value for key, value in one.passport.items() if key != "attempts"}
    return (
        f"<section>{_heading('Passport', one, several)}<p>Folder: <code>"
        f"{escape(shown(one.folder.root))}</code></p>{''.join(parts)}"
        f"{as_html(others) if others else ''}</section>"
    )


def _scores(records: Sequence[Record]) -> str:
    """What the exports of the runs score, by task and metric."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for one in records:
        for score in runs.scores_of(one.folder):
            metric = " ".join(name for name in (score["metric"], score["filter"]) if name != "none")
            spread = f" ± {number(score['stderr'])}" if score["stderr"] else ""
            value = f"{number(score['value'])}{spread} ({score['examples']} examples)"
            found.setdefault((score["task"], metric), {})[one.name] = value
    if not found:
        return ""
    cells = [[task, metric, *(values.get(one.name, "") for one in records)]
             for (task, metric), values in found.items()]  # fmt: skip
    titles = ["task", "metric", *(one.name for one in records)]
    return f"<section><h2>Evaluation</h2>{table(titles, cells, 'Scores of the export')}</section>"


def _clock(one: Record) -> dict[str, list[float]]:
    """Enough of the clock to lay curves over tokens or hours; between points it is straight."""
    steps, every = one.clock.steps, max(len(one.clock.steps) // POINTS, 1)
    starts = {a.first for a in one.attempts}
    kept = [at for at in range(len(steps))
            if at % every == 0 or at == len(steps) - 1 or steps[at] in starts]  # fmt: skip
    return {
        "step": [steps[at] for at in kept],
        "tokens": [one.clock.tokens[at] for at in kept],
        "hours": [round(one.clock.hours[at], 5) for at in kept],
    }


def _thinning(records: Sequence[Record]) -> str:
    lengths = [len(one.curves["loss"]) for one in records if "loss" in one.curves]
    if not lengths:
        return ""
    windows = sorted({window_of(one.curves["loss"]) for one in records if "loss" in one.curves})
    text = f"Smoothed is the exponential mean over {' or '.join(map(str, windows))} steps. "
    if max(lengths) > POINTS:
        return text + (
            f"Of {max(lengths):,} steps a curve shows {POINTS:,} points: of each stretch of about "
            f"{2 * max(lengths) // POINTS:,} steps the smallest and the largest value, so that no "
            "peak is lost. Means were taken before. Every step is in metrics.jsonl."
        )
    return text + "Every step is shown."


def cheap(folder: RunFolder) -> bool:
    """Whether the page of a run is made in about a second: by the size of its metrics."""
    try:
        return folder.metrics.stat().st_size < 8 * 2**20
    except FileNotFoundError:
        return True
