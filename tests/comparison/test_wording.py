"""How numbers and sentences are written, and the page around them."""

import math

import pytest
from jinja2 import UndefinedError

from lora_init.comparison.wording import number, page_of, percent, say, share


def test_numbers_have_their_digits_a_real_minus_and_a_dash_where_there_is_none():
    assert [number(value) for value in (None, math.nan, -0.5, 12.34567)] == ["–", "–", "−0.5000", "12.3457"]
    assert [percent(part) for part in (0.01, 0.0099, -0.01, 0.25, 0.0)] == [
        "1.0 %", "0.99 %", "−1.0 %", "25.0 %", "0.00 %",
    ]  # fmt: skip
    assert [percent(part, "+") for part in (0.02, -0.002)] == ["+2.0 %", "−0.20 %"]
    assert [share(part) for part in (0.004, -0.125, 1.5)] == ["0 %", "−12 %", "150 %"]


def test_a_sentence_is_one_line_and_needs_each_of_its_facts():
    assert say("not_run", starts=["<a>", "b & c"]) == "Not run yet: <a>, b & c."
    with pytest.raises(UndefinedError):
        say("not_run")


def test_a_page_shows_tables_and_pictures_and_no_markup_of_others():
    text = "# A\n\n| a | b |\n| --- | ---: |\n| 1 | 2 |\n\n![one](a.png) ![two](b.png)\n\n<b>bold</b> \\\nline\n"
    page = page_of("<A>", text, {"a.png": b"<svg>"})
    assert "<title>&lt;A&gt;</title>" in page and "<h1>A</h1>" in page and "<td>1</td>" in page
    assert '<img src="data:image/svg+xml;base64,PHN2Zz4=" alt="one">' in page and '<img src="b.png"' in page
    assert "&lt;b&gt;bold&lt;/b&gt;" in page and "<br>" in page and "/>" not in page
