"""Effects in a layout of starts and seeds: against scipy, against known effects, and with runs that are missing."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy import stats

from lora_init.comparison.effects import Effect, detectable, effects, unlike_spreads

STARTS = ("random", "a", "b", "c", "d")


def layout(rng, n_seeds=4, noise=1.0):
    """Losses without any effect, and a seed that moves all of them."""
    values = rng.normal(0, noise, (len(STARTS), n_seeds)) + rng.normal(0, 5, n_seeds)
    return pd.DataFrame(values, STARTS, range(n_seeds))


def test_one_start_alone_is_the_paired_t_test():
    losses = layout(np.random.default_rng(0)).loc[["random", "a"]]
    ends = stats.ttest_rel(losses.loc["a"], losses.loc["random"]).confidence_interval(0.95)
    found = effects(losses, "random")["a"]
    # The critical value is right to a few thousandths.
    assert (found.low, found.high) == pytest.approx((ends.low, ends.high), abs=2e-3 * (ends.high - ends.low))


@pytest.mark.parametrize(("n_starts", "n_seeds"), [(1, 2), (4, 2), (4, 5)])
def test_what_can_be_shown_is_known_before_any_run(n_starts, n_seeds):
    losses = layout(np.random.default_rng(3), n_seeds).iloc[: n_starts + 1]
    residuals = losses - losses.mean() - losses.mean(axis=1).to_numpy()[:, None] + losses.to_numpy().mean()
    noise = np.sqrt(np.square(residuals.to_numpy()).sum() / (n_starts * (n_seeds - 1)))
    found = effects(losses, "random")["a"].detectable / noise
    assert detectable(n_starts, n_seeds) == pytest.approx(found, rel=5e-3)  # of the critical value
    assert detectable(n_starts, 1) is detectable(0, n_seeds) is None


@pytest.mark.parametrize("confidence", [0.5, 0.99])
def test_an_interval_has_the_confidence_that_is_asked_for(confidence):
    losses = layout(np.random.default_rng(0)).loc[["random", "a"]]
    ends = stats.ttest_rel(losses.loc["a"], losses.loc["random"]).confidence_interval(confidence)
    found = effects(losses, "random", confidence)["a"]
    assert (found.low, found.high) == pytest.approx((ends.low, ends.high), abs=2e-3 * (ends.high - ends.low))


@pytest.mark.parametrize(("low", "high", "outcome"), [
    (-2.0, -1.0, "better"), (1.0, 2.0, "worse"), (-2.0, 0.0, "no difference shown"), (0.0, 2.0, "no difference shown"),
])  # fmt: skip
def test_what_an_interval_says_is_the_same_as_a_share_of_a_reference(low, high, outcome):
    effect = Effect((low + high) / 2, low, high)
    assert effect.outcome == effect.over(4.0).outcome == outcome and effect.detectable == (high - low) / 2
    assert effect.over(4.0) == Effect((low + high) / 8, low / 4, high / 4)


def test_many_starts_have_the_critical_value_of_dunnett():
    """Scipy's test is for one-way layouts: the residuals of two-way ones have fewer degrees of freedom."""
    losses = layout(np.random.default_rng(0), 6)
    residuals = losses - losses.mean() - losses.mean(axis=1).to_numpy()[:, None] + losses.to_numpy().mean()
    freedom = 4 * 5
    error = np.sqrt(np.square(residuals.to_numpy()).sum() / freedom * 2 / 6)
    found = effects(losses, "random")
    # Dunnett's table for 4 comparisons with a control and 20 degrees of freedom, two-sided: 2.65.
    for start in STARTS[1:]:
        assert found[start].mean == pytest.approx((losses.loc[start] - losses.loc["random"]).mean())
        assert (found[start].high - found[start].mean) / error == pytest.approx(2.65, abs=0.01)


def test_runs_that_are_missing_do_no_harm():
    losses = layout(np.random.default_rng(1), 6, noise=0.01)
    losses.loc["a"] -= 1.0
    whole = effects(losses, "random")
    losses.loc["a", 0] = losses.loc["b", 5] = losses.loc["random", 2] = np.nan
    found = effects(losses, "random")
    assert found["a"].mean == pytest.approx(-1.0, abs=0.03) and found["a"].high < -0.9
    assert set(found) == set(whole) and found["a"].high - found["a"].mean > whole["a"].high - whole["a"].mean


@pytest.mark.parametrize("some", [["random", "a"], list(STARTS)])
def test_a_seed_that_no_start_has_or_one_alone_changes_nothing(some):
    """Whatever it ends at: a single run of a seed is fitted by the level of that seed."""
    losses = layout(np.random.default_rng(2)).loc[some]
    before = effects(losses, "random")
    losses[[8, 9]] = np.nan
    losses.loc["a", 9] = 50.0
    found = effects(losses, "random")
    for start, effect in before.items():
        assert (found[start].mean, found[start].low, found[start].high) == pytest.approx(
            (effect.mean, effect.low, effect.high), rel=1e-6
        )


def test_of_four_starts_with_the_same_seed_one_that_scatters_is_known_and_of_three_none():
    losses = layout(np.random.default_rng(0), 6, noise=0.01)
    losses.loc["a"] += 3.0 * np.arange(6) ** 2
    assert list(unlike_spreads(losses.iloc[:4])) == ["a"] and unlike_spreads(losses.iloc[:3]) == {}


@pytest.mark.parametrize("n_starts", [4, 5])
def test_a_start_scatters_as_many_times_as_much_as_its_distances_from_the_others_say(n_starts):
    losses = layout(np.random.default_rng(0), 6, noise=0.01).iloc[:n_starts]
    losses.loc["a", 1] += 0.3
    residuals = losses.sub(losses.mean(axis=1), axis=0)
    residuals -= residuals.mean()
    apart = {start: residuals.loc[start] - residuals.drop(index=start).median() for start in losses.index}
    spreads = {start: np.var(one, ddof=1) for start, one in apart.items()}
    # The median of the variances of six normal numbers is as much below their mean as that of chi-squared with 5.
    usual = np.median([spread for start, spread in spreads.items() if start != "a"]) / (stats.chi2.median(5) / 5)
    assert unlike_spreads(losses) == pytest.approx({"a": np.sqrt(spreads["a"] / usual)})


def test_fewer_than_two_pairs_have_no_effect():
    losses = layout(np.random.default_rng(0))
    losses.loc["a", [0, 1, 2]] = np.nan
    assert set(effects(losses, "random")) == {"b", "c", "d"}
    assert effects(losses, "nobody") == {}
    assert effects(losses[[0]], "random") == {}


def test_equal_losses_have_an_interval_of_no_width():
    losses = pd.DataFrame(0.5, ["random", "a"], range(3))
    found = effects(losses, "random")["a"]
    assert (found.low, found.high) == pytest.approx((0.0, 0.0), abs=1e-8) and found.low < 0.0 < found.high


@pytest.mark.parametrize("start", ["a", "random"])
def test_a_start_that_nearly_diverged_once_is_not_pooled(start):
    losses = layout(np.random.default_rng(0), noise=0.01)
    before = effects(losses, "random")
    losses.loc[start, 1] += 3.0
    assert list(unlike_spreads(losses)) == [start] and unlike_spreads(losses)[start] > 50
    found = effects(losses, "random")
    halves = {name: (effect.high - effect.low) / 2 for name, effect in found.items()}
    errors = {name: stats.sem(losses.loc[name] - losses.loc["random"]) for name in found}
    own = {name for name in found if halves[name] == pytest.approx(stats.t.ppf(1 - 0.05 / 8, 3) * errors[name])}
    assert own == ({"a"} if start == "a" else set(STARTS[1:]))
    if start == "a":
        assert found["b"].high - found["b"].low < 1.5 * (before["b"].high - before["b"].low)
        # The others are compared as if it were not there, with the share of the errors that it leaves.
        alone = effects(losses.drop(index="a"), "random", 1 - 0.05 * 3 / 4)
        for name in STARTS[2:]:
            assert (found[name].low, found[name].high) == pytest.approx((alone[name].low, alone[name].high), rel=1e-6)


def test_a_start_that_is_compared_alone_has_the_freedom_of_its_own_pairs():
    losses = layout(np.random.default_rng(0), noise=0.01, n_seeds=8)
    losses.loc["a", 1] += 3.0
    losses.loc["a", 5:] = np.nan  # five pairs are left
    assert list(unlike_spreads(losses)) == ["a"]
    found, own = effects(losses, "random")["a"], (losses.loc["a"] - losses.loc["random"]).dropna()
    assert found.high - found.mean == pytest.approx(stats.t.ppf(1 - 0.05 / 8, 4) * stats.sem(own))


def test_of_two_starts_with_the_same_seed_neither_is_said_to_scatter():
    losses = layout(np.random.default_rng(0), noise=0.01, n_seeds=8)
    losses.loc[STARTS[2:], 3:] = np.nan
    losses.loc["a", 5] += 3.0
    assert unlike_spreads(losses) == {}
    losses.loc["a", 2] += 3.0  # the others have that seed
    assert list(unlike_spreads(losses)) == ["a"]


@pytest.mark.slow
def test_false_winners_are_rare_over_all_starts_together():
    rng = np.random.default_rng(0)
    wrong = [any(effect.high < 0 for effect in effects(layout(rng), "random").values()) for _ in range(150)]
    # Of the 5 % half is at this end; three standard errors more.
    assert np.mean(wrong) < 0.025 + 3 * np.sqrt(0.025 * 0.975 / 150)


# Runs that are missing, by start and seed; two seeds at least are left to each.
holes = st.sets(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=7)


def with_any_holes(missing, seed):
    losses = layout(np.random.default_rng(seed), 6).iloc[:4]
    for start, column in missing:
        losses.iloc[start, column] = np.nan
    return losses


def with_holes(missing, seed):
    losses = with_any_holes(missing, seed)
    pairs = losses.notna() & losses.loc["random"].notna()
    assume(pairs.sum(axis=1).min() >= 2 and losses.notna().any().all() and not unlike_spreads(losses))
    return losses


@settings(max_examples=10, deadline=None)
@given(holes, st.integers(0, 100))
@pytest.mark.slow
def test_with_any_runs_missing_effects_are_those_of_least_squares(missing, seed):
    """The model that is fitted, written down anew: a number for each seed, one for each start but the reference."""
    losses = with_holes(missing, seed)
    cells = [(start, column) for start in losses.index for column in losses if pd.notna(losses.loc[start, column])]
    names = [*losses.columns, *losses.index[1:]]
    design = np.array([[float(name in (start, column)) for name in names] for start, column in cells])
    values = np.array([losses.loc[cell] for cell in cells])
    fitted, left, rank, _ = np.linalg.lstsq(design, values, rcond=None)
    freedom = len(cells) - rank
    errors = np.sqrt(np.diag(np.linalg.inv(design.T @ design)) * left.sum() / freedom)
    found = effects(losses, "random")
    assert [*found] == [*losses.index[1:]]
    factors = []
    for start, mean, error in zip(losses.index[1:], fitted[6:], errors[6:], strict=True):
        assert found[start].mean == pytest.approx(mean, abs=1e-9)
        assert found[start].high - mean == pytest.approx(mean - found[start].low, rel=1e-6)
        factors.append(found[start].detectable / error)
    # One factor for all: above that of a single comparison, at most Bonferroni's.
    assert factors == pytest.approx([factors[0]] * 3, rel=1e-6)
    assert 0.98 * stats.t.ppf(1 - 0.05 / 2, freedom) < factors[0] < 1.02 * stats.t.ppf(1 - 0.05 / 6, freedom)


@settings(max_examples=6, deadline=None)
@given(holes, st.integers(0, 100), st.permutations(range(6)), st.sampled_from([0.01, -1.0, 30.0]))
@pytest.mark.slow
def test_effects_follow_what_is_done_to_all_losses(missing, seed, order, factor):
    losses = with_holes(missing, seed)
    plain = effects(losses, "random")
    moved = losses.iloc[::-1, order] * factor + np.arange(6)[None, :] * 100.0  # a seed may do what it likes to all
    moved.loc["a"] += 2.0
    found = effects(moved, "random")
    assert found.keys() == plain.keys()
    for start, effect in plain.items():
        ends = sorted([factor * effect.low, factor * effect.high])
        expected = np.array([factor * effect.mean, *ends]) + 2.0 * (start == "a")
        # The critical value is right to a few thousandths.
        assert [found[start].mean, found[start].low, found[start].high] == pytest.approx(
            expected, abs=5e-3 * abs(factor) * (effect.high - effect.low) + 1e-9
        )


# The third had one start called unlike as soon as it was shifted, by what the shift did to medians of three starts.
@example({(0, 1), (0, 3)}, 3, 1.0)
@example({(1, 0)}, 2, 30.0)
@example({(0, 0), (0, 1), (0, 3), (0, 5)}, 70, 0.01)
@settings(max_examples=20, deadline=None)
@given(holes, st.integers(0, 100), st.sampled_from([0.01, -1.0, 30.0]))
def test_whose_losses_scatter_does_not_depend_on_what_a_start_or_a_seed_does_to_all(missing, seed, factor):
    losses = with_any_holes(missing, seed)
    losses.loc["b"] *= 40.0
    shifts = np.arange(6)[None, :] * 100.0 + np.arange(4)[:, None] * 7.0
    found = unlike_spreads(losses.iloc[::-1] * factor + shifts)
    assert found == pytest.approx(unlike_spreads(losses), rel=1e-6)
