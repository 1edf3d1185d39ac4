"""Loss curves and their relative differences as one SVG file that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from xml.sax.saxutils import escape

Curve = Mapping[int, float]

WIDTH, LEFT, RIGHT = 860, 76, 24
# Top and height of the panels.
LOSS, DIFFERENCE = (92, 240), (392, 150)
# Dark grey for what is compared with; then colours that colour-blind eyes tell apart (Okabe and
# Ito), each with dashes of its own for printers that have none.
REFERENCE = ("#3d3d3d", "")
OTHERS = (("#0072b2", ""), ("#c04f00", "7 3"), ("#00805f", "2 3"), ("#8a5a9c", "1 4"))
INK, FAINT, LIMIT = "#1f1f1f", "#dcdcdc", "#b3001b"


def draw(
    title: str, reference: tuple[str, Curve], others: Mapping[str, Curve],
    differences: Mapping[str, Curve], limit: float, description: str,
) -> str:  # fmt: skip
    """Two panels over the same steps: the losses, and what lies between them.

    Args:
        reference: the name and the loss by step of what the others are compared with.
        differences: relative ones by step, shares of 1.
        limit: on both sides of zero, a share of 1.
        description: the picture in words, for those who do not see it.
    """
    losses = {reference[0]: reference[1], **others}
    styles = dict(zip(losses, (REFERENCE, *OTHERS), strict=False))
    last = max(max(curve) for curve in losses.values())
    low, high = _range(value for curve in losses.values() for value in curve.values())
    percent = {name: {k: 100 * v for k, v in one.items()} for name, one in differences.items()}
    reach = max([1.3 * 100 * limit, *(1.1 * abs(v) for one in percent.values() for v in
                 one.values())])  # fmt: skip
    upper = _Panel(*LOSS, last, low, high)
    lower = _Panel(*DIFFERENCE, last, -reach, reach)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="600" '
        f'viewBox="0 0 {WIDTH} 600" role="img" aria-labelledby="title desc" '
        'font-family="Helvetica, Arial, sans-serif" font-size="14">',
        f'<title id="title">{escape(title)}</title>',
        f'<desc id="desc">{escape(description)}</desc>',
        f'<rect width="{WIDTH}" height="600" fill="#ffffff"/>',
        _text(LEFT, 30, title, size=18, weight="bold"),
        *_legend(styles),
        *upper.frame("loss (nats a token)"),
        *(upper.line(curve, *styles[name]) for name, curve in losses.items()),
        *lower.frame(f"relative difference to {reference[0]} (%)"),
        *(lower.level(sign * 100 * limit) for sign in (1, -1)),
        _text(WIDTH - RIGHT, lower.y(100 * limit) - 5, f"limit {100 * limit:g} %", anchor="end",
              colour=LIMIT),
        *(lower.line(curve, *styles[name]) for name, curve in percent.items()),
        *lower.steps(),
        "</svg>",
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


class _Panel:
    """A rectangle with steps from 0 to `last` across and values from `low` to `high` upwards."""

    def __init__(self, top: int, height: int, last: int, low: float, high: float) -> None:
        self.top, self.height = top, height
        self.last, self.low, self.high = last, low, high

    def x(self, step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / self.last

    def y(self, value: float) -> float:
        return self.top + self.height * (self.high - value) / (self.high - self.low)

    def frame(self, name: str) -> list[str]:
        """The panel's name, and a line with a number for each tick."""
        found = [_text(LEFT, self.top - 10, name)]
        for value, label in _ticks(self.low, self.high):
            found.append(_rule(LEFT, self.y(value), WIDTH - RIGHT, self.y(value), FAINT))
            found.append(_text(LEFT - 8, self.y(value) + 5, label, anchor="end"))
        bottom = self.top + self.height
        return [*found, _rule(LEFT, bottom, WIDTH - RIGHT, bottom, INK)]

    def steps(self) -> list[str]:
        """The steps below the panel."""
        bottom = self.top + self.height
        found = [
            _text(self.x(value), bottom + 20, label, anchor="middle")
            for value, label in _ticks(0, self.last)
        ]
        return [*found, _text((LEFT + WIDTH - RIGHT) / 2, bottom + 42, "step", anchor="middle")]

    def level(self, value: float) -> str:
        return _rule(LEFT, self.y(value), WIDTH - RIGHT, self.y(value), LIMIT, dashes="8 4")

    def line(self, curve: Curve, colour: str, dashes: str) -> str:
        points = " ".join(f"{self.x(k):.1f},{self.y(v):.1f}" for k, v in sorted(curve.items()))
        dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
        return (
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6" '
            f'stroke-linejoin="round"{dashed}/>'
        )


def _legend(styles: Mapping[str, tuple[str, str]]) -> list[str]:
    found, x = [], float(LEFT)
    for name, (colour, dashes) in styles.items():
        found.append(_rule(x, 53, x + 34, 53, colour, dashes=dashes, width=2.5))
        found.append(_text(x + 42, 58, name))
        x += 42 + 8.5 * len(name) + 28
    return found


def _text(
    x: float, y: float, words: str, *, anchor: str = "start", size: int = 14,
    weight: str = "normal", colour: str = INK,
) -> str:  # fmt: skip
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
        f'font-weight="{weight}" fill="{colour}">{escape(words)}</text>'
    )


def _rule(
    x: float, y: float, to_x: float, to_y: float, colour: str, *, dashes: str = "",
    width: float = 1.0,
) -> str:  # fmt: skip
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return (
        f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}" stroke="{colour}" '
        f'stroke-width="{width:g}"{dashed}/>'
    )


def _range(values: Iterable[float]) -> tuple[float, float]:
    """The least and the largest value, with a little room."""
    found = list(values)
    low, high = min(found), max(found)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Round values, four to nine of them, with as many digits as tell them apart."""
    raw = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.8)
    digits = max(0, -math.floor(math.log10(step)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [(n * step, f"{n * step:.{digits}f}") for n in range(first, last + 1)]
