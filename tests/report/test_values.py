"""Any JSON value as HTML."""

from __future__ import annotations

from tanren.report.values import as_html, table


def test_whatever_a_passport_says_is_shown_and_escaped() -> None:
    value = {
        "commit": {"id": "abc", "dirty": False}, "gpus": ["H200 <1>", "H200"], "driver": None,
        "patch": "line <one>\nline two", "nested": [{"a": 1.25}, {"b": [1, 2]}], "none": {},
    }  # fmt: skip
    text = as_html(value)
    for expected in ("abc", ">no<", "H200 &lt;1&gt;, H200", "line &lt;one&gt;", "1.25", "1, 2"):
        assert expected in text, expected
    assert "<one>" not in text
    assert "<summary>2 lines</summary>" in text


def test_a_very_long_text_is_cut_and_says_so() -> None:
    text = as_html("x" * 100_250)
    assert text.count("x") < 100_010
    assert "250 characters more are in the run folder" in text


def test_a_tables_first_column_heads_its_rows() -> None:
    text = table(["run", "loss"], [["a<b", "1"], ["c", "2"]], "Losses")
    assert text.count('<th scope="col">') == 2
    assert '<th scope="row">a&lt;b</th><td>1</td>' in text
    assert "<caption>Losses</caption>" in text
