"""Times, shares, counts and numbers: what is written in one of the ways that the help names is read as that."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_init.cli.compare import read_seconds
from lora_init.cli.options import read_numbers, read_share
from lora_init.planning.budgets import parse_count
from tests.conftest import refused

UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


@given(st.lists(st.sampled_from([*UNITS]), min_size=1, unique=True), st.integers(0, 999), st.sampled_from(["", " "]))
def test_a_time_is_the_sum_of_its_parts(units, n, space):
    assert read_seconds(space.join(f"{n}{unit}" for unit in units)) == n * sum(UNITS[unit] for unit in units)
    assert read_seconds(f"{n}.5{units[0]}") == (n + 0.5) * UNITS[units[0]]


@pytest.mark.parametrize("text", ["", "5", "h", "1x", "1h30", "1h-30m", "-1h", "1.h", "1h,30m", "infh", "1e3s"])
def test_no_time(text):
    refused(f"--time {text!r}: expected a duration such as", read_seconds, text)


@given(st.integers(0, 10_000))
def test_a_share_is_the_same_in_per_cent(n):
    assert read_share("--lose", f"{n / 100}%") == pytest.approx(n / 10_000, rel=1e-12)
    assert read_share("--lose", str(n / 10_000)) == n / 10_000


@pytest.mark.parametrize("text", ["", "%", "2%%", "half", "2 per cent", "%2"])
def test_no_share(text):
    refused("--lose .*: expected a share such as 2% or 0.02", read_share, "--lose", text)


@given(st.integers(1, 10**12))
def test_a_count_is_exact_in_every_way_of_writing_it(n):
    ways = [n, str(n), f"{n:,}", f" {n} "]
    ways += [
        f"{n // size}.{n % size:0{digits}d}{suffix}" for suffix, size, digits in (("k", 10**3, 3), ("M", 10**6, 6))
    ]
    assert [parse_count(way, "parameters") for way in ways] == [n] * len(ways)


@pytest.mark.parametrize(
    "value", [0, -1, 1.5, 10**12 + 1, "", "M", "1.5", "1,00", "1e-3", "nan", "inf", "0.1k5", "2G2"]
)
def test_no_count(value):
    refused("parameters=.*: a whole number from 1 to 10\\^12 is needed", parse_count, value, "parameters")


@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=4), st.lists(st.integers(0, 9), min_size=1, max_size=4))
def test_lists_of_numbers(floats, integers):
    assert read_numbers("--learning-rates", ",".join(map(repr, floats)), float) == floats
    assert read_numbers("--seeds", ",".join(map(str, integers)), int) == integers


@pytest.mark.parametrize(
    ("text", "kind", "what"),
    [("", float, "numbers"), ("1,,2", float, "numbers"), ("1;2", float, "numbers"), ("1.5", int, "whole numbers")],
)
def test_no_numbers(text, kind, what):
    refused(f"--seeds .*: expected {what} separated by commas", read_numbers, "--seeds", text, kind)
