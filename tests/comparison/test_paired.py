"""Paired differences: SciPy by another route, a planted winner and a planted tie, and what one pair may say."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lora_init.comparison.findings import paired_difference


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=2, max_size=12))
def test_the_interval_is_that_of_the_paired_t_test(pairs):
    ours, theirs = zip(*pairs, strict=True)
    if np.std(np.subtract(ours, theirs)) < 1e-6:
        return  # SciPy warns of lost digits there
    found = paired_difference(dict(enumerate(ours)), dict(enumerate(theirs)))
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    # Both are exact up to float64 rounding of numbers near 5.
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-9, abs=1e-9)
    # The outcome agrees with the p-value of the test, which paired_difference never computes.
    p = stats.ttest_rel(ours, theirs).pvalue
    if abs(p - 0.05) > 1e-9:
        assert (found.outcome in ("better", "worse")) == (p < 0.05)


def test_by_hand():
    # Differences 1, 2, 3: mean 2, standard deviation 1, and t(0.975, 2) = 4.302653 from a printed table.
    found = paired_difference({0: 2.0, 1: 3.0, 2: 4.0}, {0: 1.0, 1: 1.0, 2: 1.0})
    assert (found.mean, found.n) == (2.0, 3)
    assert found.high - 2 == pytest.approx(4.302653 / math.sqrt(3), abs=1e-6)


@pytest.mark.parametrize(("sign", "word"), [(-1, "better"), (1, "worse")])
def test_a_planted_winner_wins_through_noise_that_seeds_share(sign, word):
    random = np.random.default_rng(0)
    base = random.normal(0, 1, 5)  # far more than the difference: only pairing can find it
    ours = base + sign * 0.05 + random.normal(0, 0.01, 5)
    found = paired_difference(dict(enumerate(ours)), dict(enumerate(base)))
    assert found.outcome == word
    assert found.low < sign * 0.05 < found.high
    assert stats.ttest_ind(ours, base).pvalue > 0.5  # unpaired, nothing would show


def test_a_planted_tie_is_called_a_winner_in_one_case_of_twenty():
    random = np.random.default_rng(0)
    calls = [
        paired_difference(dict(enumerate(a)), dict(enumerate(b))).outcome
        for a, b in random.normal(size=(2000, 2, 3))
    ]  # fmt: skip
    wrong = 1 - calls.count("no difference shown") / len(calls)
    assert wrong == pytest.approx(0.05, abs=0.015)  # three standard errors of a share of 0.05 in 2000


def test_seeds_that_only_one_has_are_left_out():
    found = paired_difference({0: 1.0, 1: 2.0, 7: 9.0}, {1: 1.0, 0: 0.5, 8: 0.0})
    assert found.differences == {0: 0.5, 1: 1.0}


def test_one_pair_and_no_pair_allow_no_statement():
    one = paired_difference({0: 1.0}, {0: 100.0})
    assert (one.outcome, one.mean, one.low, one.high) == ("no statement", -99.0, None, None)
    none = paired_difference({0: 1.0}, {1: 2.0})
    assert (none.outcome, none.mean, none.n) == ("no statement", None, 0)


def test_the_same_run_twice_is_no_winner():
    same = {0: 0.1, 1: 0.2}
    assert paired_difference(same, same).outcome == "no difference shown"
