"""A picture of curves is XML that says in words what it shows, and draws what it is given."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from tanren.report import curves_svg

SVG = "{http://www.w3.org/2000/svg}"
LOSS = {step: 12.0 - step / 20 for step in range(1, 201)}


def draw(differences: dict[int, float], limit: float = 0.005) -> ElementTree.Element:
    text = curves_svg.draw(
        "FP8 <&> bf16", ("bf16", LOSS), {"delayed": LOSS}, {"delayed": differences}, limit,
        "a description & more",
    )  # fmt: skip
    return ElementTree.fromstring(text)


def lines_of(root: ElementTree.Element) -> list[list[tuple[float, float]]]:
    found = []
    for one in root.iter(f"{SVG}polyline"):
        pairs = (pair.split(",") for pair in one.get("points", "").split())
        found.append([(float(x), float(y)) for x, y in pairs])
    return found


def test_title_and_description_are_read_to_those_who_do_not_see_it() -> None:
    root = draw({50: 0.001})
    assert root.get("role") == "img"
    ids = str(root.get("aria-labelledby")).split()
    said = {one.get("id"): one.text for one in root if one.get("id")}
    assert said == {"title": "FP8 <&> bf16", "desc": "a description & more"}
    assert sorted(ids) == sorted(str(one) for one in said)


def test_every_point_is_drawn_inside_its_panel() -> None:
    reference, other, difference = lines_of(draw({30: -0.02, 100: 0.0, 200: 0.004}))
    assert len(reference) == len(other) == 200
    assert reference == other
    assert len(difference) == 3
    top, height = curves_svg.LOSS
    assert all(top <= y <= top + height for _, y in reference)
    # A falling loss goes down the page, and steps go to the right.
    assert reference == sorted(reference)
    assert reference[0][1] < reference[-1][1]
    top, height = curves_svg.DIFFERENCE
    assert all(top <= y <= top + height for _, y in difference)
    assert difference[0][1] > difference[1][1] > difference[2][1]
    assert difference[1][1] == pytest.approx(top + height / 2, abs=0.1)


def test_the_limit_is_drawn_on_both_sides_and_named() -> None:
    root = draw({100: 0.001}, limit=0.0025)
    limits = [one for one in root.iter(f"{SVG}line") if one.get("stroke") == curves_svg.LIMIT]
    top, height = curves_svg.DIFFERENCE
    above, below = (float(str(one.get("y1"))) for one in limits)
    assert above + below == pytest.approx(2 * top + height, abs=0.2)
    assert above == pytest.approx(top + height / 2 - height / 2 / 1.3, abs=0.1)
    words = [one.text for one in root.iter(f"{SVG}text")]
    assert "limit 0.25 %" in words
    assert {"bf16", "delayed", "step"} <= set(words)


def test_numbers_at_the_ticks_differ() -> None:
    for differences in ({100: 1e-6}, {100: 0.5}):
        root = draw(differences)
        numbers = [str(one.text) for one in root.iter(f"{SVG}text")]
        found = [one for one in numbers if re.fullmatch(r"-?[\d.]+", one)]
        assert len(found) > 8
        sides = [one for one in root.iter(f"{SVG}text") if one.get("text-anchor") == "end"]
        top = curves_svg.DIFFERENCE[0]
        lower = [one.text for one in sides if float(str(one.get("y"))) > top]
        assert len(lower) == len(set(lower))


def test_a_flat_curve_has_a_range() -> None:
    flat = dict.fromkeys(range(1, 101), 2.5)
    text = curves_svg.draw("t", ("a", flat), {}, {}, 0.005, "d")
    assert len(lines_of(ElementTree.fromstring(text))) == 1
