"""Any JSON value as HTML that a person can read: what a passport says, whatever it says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

# A text of more characters, or of several lines, folds away; of a very long one the page has the
# beginning.
_INLINE, _KEPT = 160, 100_000


def as_html(value: Any) -> str:
    """Mappings and lists of them as tables, others as text; everything is escaped."""
    if isinstance(value, Mapping):
        return _mapping(value) if value else "<em>none</em>"
    if isinstance(value, list | tuple):
        return _sequence(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "<em>none</em>"
    if isinstance(value, float):
        return f"{value:,.6g}" if abs(value) < 1e6 else f"{value:,.0f}"
    return _text(str(value))


def table(titles: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """A table of texts, its first column as the rows' headers."""
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in titles)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    return (
        f'<div class="scroll"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def folded(title: str, content: str, *, is_open: bool = False) -> str:
    """A part that folds away; the content is HTML."""
    opened = "<details open>" if is_open else "<details>"
    return f"{opened}<summary>{escape(title)}</summary>{content}</details>"


def _mapping(value: Mapping[str, Any]) -> str:
    rows = []
    for key, inner in value.items():
        name = escape(str(key).replace("_", " "))
        if isinstance(inner, Mapping) and len(inner) > 8:
            content = folded(f"{len(inner)} entries", as_html(inner))
        else:
            content = as_html(inner)
        rows.append(f'<tr><th scope="row">{name}</th><td>{content}</td></tr>')
    return f'<table class="values"><tbody>{"".join(rows)}</tbody></table>'


def _sequence(value: Sequence[Any]) -> str:
    if not value:
        return "<em>none</em>"
    if not any(isinstance(inner, Mapping | list | tuple) for inner in value):
        return ", ".join(as_html(inner) for inner in value)
    items = "".join(f"<li>{as_html(inner)}</li>" for inner in value)
    return f"<ol>{items}</ol>"


def _text(text: str) -> str:
    if len(text) <= _INLINE and "\n" not in text:
        return escape(text)
    rest = len(text) - _KEPT
    more = f"\n... {rest:,} characters more are in the run folder" if rest > 0 else ""
    lines = text.count("\n") + 1
    return folded(f"{lines:,} lines" if lines > 1 else f"{len(text):,} characters",
                  f"<pre>{escape(text[:_KEPT] + more)}</pre>")  # fmt: skip
