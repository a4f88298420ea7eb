"""How far a command is, and how long the rest may take."""

import pytest

from lora_init import progress
from lora_init.progress import Progress, duration, time_left


def test_the_rest_takes_as_long_as_the_parts_so_far_took_on_average(monkeypatch):
    clock, said = iter([100.0, 110.0, 116.0, 120.0]), []
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    work = Progress(4, said.append)
    for text, parts in (("one", 1.0), ("half", 0.5), ("all", 2.5)):
        work.ended(text, parts)
    # After one of four parts in 10 s three are left; after 1.5 in 16 s 2.5 are, of 10.7 s each.
    assert said == ["one; about 30 s left", "half; about 27 s left", "all"]


def test_each_part_counts_once_where_nothing_else_is_said(monkeypatch):
    clock, said = iter([0.0, 2.0, 4.0]), []
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    work = Progress(3, said.append)
    work.ended("one"), work.ended("two")
    assert said == ["one; about 4 s left", "two; about 2 s left"]


@pytest.mark.parametrize(("seconds", "text"), [
    (0.0, "1 s"), (0.5, "1 s"), (1.6, "2 s"), (59.4, "59 s"), (60.0, "1 min"), (90.0, "1.5 min"), (3599.0, "60 min"),
    (3600.0, "1 h"), (5400.0, "1.5 h"), (36_000.0, "10 h"),
])  # fmt: skip
def test_a_time_has_the_largest_unit_that_it_fills(seconds, text):
    assert duration(seconds) == text and time_left(seconds) == (f"; about {text} left" if seconds else "")


def test_after_the_last_part_no_time_is_left():
    assert time_left(0.0) == time_left(-3.0) == ""
