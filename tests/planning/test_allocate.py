"""Rank plans against brute force, exact oracles and laws; budgets and limits."""

import itertools
import math
import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from lora_init.collection.collect import collect
from lora_init.errors import LoraInitError
from lora_init.planning.allocate import allocate_ranks, make_steps, take_until_explained, take_while_affordable
from lora_init.statistics.statistics import Statistics
from tests.conftest import refused
from tests.planning.made import (
    PLAIN,
    QKV,
    WIDE,
    cumulative,
    distinct,
    explained,
    laws,
    spectra,
    statistics,
    vectors,
    widths3,
)

# --- EVA's rule -----------------------------------------------------------------------------------------------------


@laws
@given(spectra, st.integers(1, 3), st.sampled_from([1.0, 1.5, 2.0, 3.0]))
def test_eva_is_the_best_of_all_allocations_and_ties_go_to_the_earlier_layer(ratios, rank, rho):
    cap = min(round(rho * rank), 4)
    assume(round(rho * rank) <= 4)
    plan = allocate_ranks(statistics(ratios), rank=rank, rho=rho)
    budget = rank * len(ratios)
    best = max(explained(ratios, v) for v in vectors([cap] * len(ratios), budget))
    ranks = tuple(plan.values())
    assert explained(ratios, ranks) == best
    # Of all that are as good and spend as much: the one that prefers earlier layers.
    equal = [v for v in vectors([cap] * len(ratios), budget) if explained(ratios, v) == best and sum(v) == budget]
    worths = [sorted(((-row[j], i) for i, row in enumerate(ratios) for j in range(v[i]))) for v in equal]
    assert ranks == equal[worths.index(min(worths))]


def test_a_share_that_a_rank_reaches_exactly_is_reached():
    """Sums of floats fall short of it: 0.7 + 0.1 is less than 0.8, and all four less than 1."""
    made = statistics([[0.7, 0.1, 0.1, 0.1]] * 2)
    for share, rank in ((0.7, 1), (0.8, 2), (1.0, 4)):
        assert [*allocate_ranks(made, variance=share).values()] == [rank, rank]


def test_a_layer_may_get_nothing_and_layers_with_one_input_tie():
    ratios = {"b.0.q": [0.5, 0.25, 0.125, 0.0625], "b.0.o": [0.0, 0.0, 0.0, 0.0]}
    group_of = {"b.0.q": "b.0.q", "b.0.k": "b.0.q", "b.0.o": "b.0.o"}
    plan = allocate_ranks(statistics(ratios, [(64, 64)] * 3, group_of), rank=2, rho=2)
    assert dict(plan) == {"b.0.q": 3, "b.0.k": 3, "b.0.o": 0}
    assert dict(allocate_ranks(statistics(ratios, [(64, 64)] * 3, group_of), total_rank=5, rho=2)) == {
        "b.0.q": 3, "b.0.k": 2, "b.0.o": 0,
    }  # fmt: skip


@pytest.mark.parametrize(("allowed", "total", "expected"), [
    ((1, 3, 4, 5, 7, 8, 10), 6, (5, 1, 0)),
    ((3, 4, 5, 6, 9, 10, 11, 12), 16, (12, 4, 0)),
    ((2, 3, 7, 9, 12), 11, (9, 2, 0)),
])  # fmt: skip
def test_directions_of_equal_worth_are_taken_in_their_order(allowed, total, expected):
    """A mean over three equal numbers may be larger by its rounding than one over two: no rank may be passed over."""
    stats = statistics([[1 / 16] * 12] * 3)
    for worth in range(3, 100, 4):
        rule = dict(policy=lambda name, spectrum, worth=worth: [worth / 100] * 12)
        plan = allocate_ranks(stats, total_rank=total, rho=12, allowed_ranks=allowed, **rule)
        assert tuple(plan.values()) == expected, worth


@pytest.mark.parametrize(("worth", "allowed", "rank"), [
    (0.830631441271759, (1, 2, 3, 4, 6, 7, 9), 5),
    (0.7955683661434495, (1, 2, 4, 5, 7, 9, 10), 6),
    (0.8131231184406524, (1, 2, 4, 6, 7, 9), 4),
])  # fmt: skip
def test_no_rank_that_is_allowed_is_passed_over_where_numbers_fall_by_a_rounding_error(worth, allowed, rank):
    def rule(name, spectrum):
        return [worth - 1e-16 * i for i in range(12)]

    plan = allocate_ranks(statistics([[1 / 16] * 12] * 3), rank=rank, rho=3, allowed_ranks=allowed, policy=rule)
    assert {*plan.values()} <= {0, *allowed} and plan.total_rank <= 3 * rank


# --- Policies -------------------------------------------------------------------------------------------------------


@laws
@given(spectra, st.integers(1, 10))
def test_uniform_is_as_even_as_can_be(ratios, total):
    total = min(total, 4 * len(ratios))
    plan = allocate_ranks(statistics(ratios), total_rank=total, policy="uniform")
    even = [v for v in vectors([4] * len(ratios), total) if sum(v) == total]
    least = min(sum(r * r for r in v) for v in even)
    assert tuple(plan.values()) == max(v for v in even if sum(r * r for r in v) == least)


@laws
@given(distinct, st.integers(1, 12))
def test_proportional_is_nearest_to_proportion(ratios, total):
    plan = allocate_ranks(statistics(ratios), total_rank=total, rho=12, policy="proportional", max_rank=4)
    effective = [1 / sum(x * x for x in row) for row in ratios]

    def distance(v):  # Sainte-Lague: among vectors of equal sum, this orders as sum((r - share)^2 / claim) does
        return sum(r * r / e for r, e in zip(v, effective, strict=True))

    best = min(distance(v) for v in vectors([4] * 3, total) if sum(v) == total)
    assert plan.total_rank == total
    assert distance(plan.values()) == pytest.approx(best, rel=1e-12)


def knapsack(ratios, costs, budget):
    """Exact optimum by dynamic programming over (layer, spent)."""
    best = {0: 0.0}
    for row, cost in zip(ratios, costs, strict=True):
        after = {}
        for spent, value in best.items():
            for rank, share in enumerate(cumulative(row)):
                total = spent + rank * cost
                if total <= budget:
                    after[total] = max(after.get(total, 0.0), value + share)
        best = after
    return max(best.values())


@laws
@given(distinct, widths3, st.integers(80, 900))
def test_cost_aware_is_within_one_step_of_the_exact_knapsack(ratios, widths, budget):
    stats = statistics(ratios, widths)
    costs = [a + b for a, b in widths]
    budget = max(min(budget, 4 * sum(costs)), *costs)
    plan = allocate_ranks(stats, parameters=budget, policy="cost-aware", rho=1e6, max_rank=4)
    best = knapsack(ratios, costs, budget)
    value = explained(ratios, plan.values())
    assert plan.parameters <= budget
    assert best - max(max(row) for row in ratios) - 1e-12 <= value <= best + 1e-12


@laws
@given(spectra)
def test_a_function_is_a_policy_and_only_counts_matter(ratios):
    stats = statistics(ratios)
    by_name = dict(zip(stats, ratios, strict=True))

    def backwards(name, spectrum):
        assert spectrum.explained_variance.shape == (4,)
        return by_name[name][::-1]

    plan = allocate_ranks(stats, rank=2, policy=backwards)
    assert dict(plan) == dict(allocate_ranks(stats, rank=2, rho=2))
    assert plan.policy == "backwards"


# --- Laws -----------------------------------------------------------------------------------------------------------


def steps_left(plan, grid, caps, costs):
    """Cost of the next allowed rank of each layer, and what it adds."""
    for rank, cap, cost in zip(plan.values(), caps, costs, strict=True):
        following = [r for r in grid if rank < r <= cap]
        if following:
            yield (following[0] - rank) * cost


@laws
@given(
    distinct,
    widths3,
    st.sampled_from(PLAIN),
    st.sampled_from(["total_rank", "parameters", "megabytes"]),
    st.integers(1, 900),
    st.sampled_from([(1, 2, 3, 4), (2, 4), (1, 4), (3,), (3, 4)]),
    st.integers(1, 4),
)
def test_the_sum_never_exceeds_the_budget_and_no_further_step_fits(ratios, widths, policy, kind, amount, grid, top):
    costs = [1] * 3 if kind == "total_rank" else [a + b for a, b in widths]
    amount = min(amount, 4 * sum(costs))
    allowed = [r for r in grid if r <= top]
    assume(allowed and amount >= allowed[0] * max(costs))
    budget = {"megabytes": amount * 2 / 1e6, "dtype": "bfloat16"} if kind == "megabytes" else {kind: amount}
    plan = allocate_ranks(
        statistics(ratios, widths), rho=1e6, policy=policy, allowed_ranks=grid, max_rank=top, **budget
    )
    spent = plan.total_rank if kind == "total_rank" else plan.parameters
    assert spent == sum(r * c for r, c in zip(plan.values(), costs, strict=True))
    assert plan.spent == (2 * spent if kind == "megabytes" else spent)
    assert set(plan.values()) <= {0, *allowed}
    assert spent <= amount
    assert all(spent + cost > amount for cost in steps_left(plan, allowed, [top] * 3, costs))


def test_a_step_that_does_not_fit_is_not_skipped_within_its_layer():
    stats = statistics([[0.25, 0.25, 0.25, 0.2], [0.1, 0.1, 0.1, 0.1]])
    grids = {"h.0.up": {"allowed_ranks": (3, 4)}, "h.1.up": {"allowed_ranks": (1,)}}
    assert list(allocate_ranks(stats, total_rank=2, rho=9, overrides=grids).values()) == [0, 1]


def small_steps():
    """Two layers that share a rank, of 0, 1 or 3, and one with a rank of 1 at least."""
    allowed = np.array([[1, 1, 0, 1], [0, 1, 1, 1]], dtype=bool)
    gains = np.array([[0.5, 0.25, 0.125], [0.25, 0.125, 0.0625], [0.5, 0.25, 0.0]])
    return make_steps(allowed, np.array([0, 0, 1]), gains, np.array([1.0, 2.0, 4.0]), np.array([10, 20, 5]))


def test_steps_by_hand():
    steps = small_steps()
    assert (steps.unit.tolist(), steps.rank.tolist()) == ([0, 0, 1, 1], [1, 3, 2, 3])
    assert (steps.start.tolist(), steps.width.tolist()) == ([0, 1], [1, 2, 1, 1])
    assert steps.cost.tolist() == [30, 60, 5, 5] and steps.cost.dtype == np.int64
    # Worth per weight: of both layers together, and of a step of two ranks in the mean.
    assert steps.priority.tolist() == [0.75 / 3, (0.375 + 0.1875) / 2 / 3, 0.25 / 4, 0.0]
    assert steps.in_order().tolist() == [0, 1, 2, 3] and steps.top.tolist() == [3, 3, 3]
    assert steps.ranks_after(np.array([True, False, False, True])).tolist() == [1, 1, 2]


@pytest.mark.parametrize(("budget", "taken"), [
    (0, [0, 0, 0, 0]), (4, [0, 0, 0, 0]), (5, [0, 0, 1, 0]), (29, [0, 0, 1, 1]), (30, [1, 0, 0, 0]), (35, [1, 0, 1, 0]),
    (89, [1, 0, 1, 1]), (90, [1, 1, 0, 0]), (100, [1, 1, 1, 1]),
])  # fmt: skip
def test_a_unit_whose_next_step_is_too_dear_stays_where_it_is(budget, taken):
    assert take_while_affordable(small_steps(), budget).astype(int).tolist() == taken


@pytest.mark.parametrize(("share", "n_taken"), [
    (0.25, 0), (0.5, 0), (0.625, 1), (1.25, 1), (1.3, 2), (1.8125, 2), (1.9, 3), (2.0625, 3), (2.1, 4),
])  # fmt: skip
def test_steps_are_taken_until_a_share_is_reached(share, n_taken):
    """The third layer begins at rank 1, where it explains a half; beyond what there is, all steps are taken."""
    explained = np.array([[0.0, 0.75, 1.125, 1.3125], [0.0, 0.5, 0.75, 0.75]])
    assert take_until_explained(small_steps(), explained, share).tolist() == [i < n_taken for i in range(4)]


# --- Budgets --------------------------------------------------------------------------------------------------------


@laws
@given(spectra, st.sampled_from([0.25, 0.5, 0.75, 0.9]))
def test_variance_takes_the_fewest_ranks(ratios, share):
    stats = statistics(ratios)
    caps = [4] * len(ratios)
    every = [v for v in vectors(caps, 99) if all(cumulative(r)[k] >= share for r, k in zip(ratios, v, strict=True))]
    total = [v for v in vectors(caps, 99) if explained(ratios, v) >= share * len(ratios)]
    for coverage, reaching in (("every-layer", every), ("total", total)):
        if not reaching:
            refused("out of reach", allocate_ranks, stats, variance=share, coverage=coverage)
            continue
        plan = allocate_ranks(stats, variance=share, coverage=coverage)
        assert tuple(plan.values()) in reaching
        assert plan.total_rank == min(sum(v) for v in reaching)
        reached = [cumulative(r)[k] for r, k in zip(ratios, plan.values(), strict=True)]
        assert plan.spent == pytest.approx(min(reached) if coverage == "every-layer" else np.mean(reached), abs=1e-9)


MIXED = {
    "h.0.up": [0.4, 0.2, 0.1, 0.05], "h.0.down": [0.3, 0.2, 0.1, 0.05],
    "h.1.up": [0.25, 0.1, 0.05, 0.05], "h.1.down": [0.2, 0.1, 0.05, 0.02],
}  # fmt: skip
THIN = [(8, 24), (24, 8)] * 2  # 32 parameters a rank


@pytest.mark.parametrize(("arguments", "ranks", "rank", "spent", "settings"), [
    ({}, (1, 1, 1, 1), 1, 4, dict(rho=1.0)),
    (dict(rank=2), (2, 2, 2, 2), 2, 8, dict(rho=1.0)),
    (dict(rank=2, policy="proportional"), (1, 1, 2, 4), 2, 8, dict(rho=2.0)),
    (dict(rank=2, rho=2), (3, 3, 1, 1), 2, 8, dict(rho=2)),
    (dict(rank=2, rho=9, max_rank=3), (3, 3, 1, 1), 2, 8, dict(rho=9, max_rank=3)),
    (dict(rank=2, policy="uniform", multiple_of=2), (2, 2, 2, 2), 2, 8, dict(multiple_of=2)),
    (dict(total_rank=5, rho=4, tie=("up", "down"), exclude="h.1.up"), (2, 2, 0, 1), 2, 5,
     dict(rho=4, tie=("up", "down"), exclude="h.1.up")),
    (dict(total_rank=6, rho=3, uniform_per_kind=True), (2, 1, 2, 1), 2, 6, dict(rho=3, uniform_per_kind=True)),
    (dict(total_rank=3, rho=4, allowed_ranks=[1]), (1, 1, 1, 0), 1, 3, dict(rho=4, allowed_ranks=[1])),
    (dict(parameters=210, rho=2), (2, 2, 1, 1), 2, 192, dict(rho=2)),
    (dict(fraction=0.25, rho=2, policy="cost-aware"), (3, 2, 1, 1), 2, 224, dict(rho=2)),
    (dict(megabytes=5e-4, dtype="bfloat16", rho=3, min_rank=1), (3, 2, 1, 1), 2, 448, dict(rho=3, min_rank=1)),
    (dict(variance=0.3, overrides={"down": {"min_rank": 2}}), (1, 2, 2, 2), 2, 0.3,
     dict(overrides={"down": {"min_rank": 2}})),
    (dict(variance=0.3, tie=("up", "down")), (1, 1, 2, 2), 2, 0.3, dict(tie=("up", "down"))),
    (dict(variance=0.4, coverage="total"), (3, 2, 1, 1), 2, 0.4125, {}),
    (dict(variance=0.1, coverage="total", min_rank=1), (1, 1, 1, 1), 1, 0.2875, dict(min_rank=1)),
])  # fmt: skip
def test_a_small_plan_by_hand(arguments, ranks, rank, spent, settings):
    """All that a plan says, for each budget: three layers out of four compete by what they explain."""
    stats = statistics(MIXED, THIN, rank=1, n_parameters=1000)
    plan = allocate_ranks(stats, **arguments)
    assert tuple(plan.values()) == ranks and list(plan) == list(plan.targets) == list(plan.explained) == list(MIXED)
    assert (plan.rank, plan.settings, plan.notes) == (rank, settings, ())
    assert plan.spent == pytest.approx(spent, rel=1e-12)
    assert plan.policy == arguments.get("policy", "eva") and plan.provenance is stats.provenance
    explained = [cumulative(row)[taken] for row, taken in zip(MIXED.values(), ranks, strict=True)]
    assert list(plan.explained.values()) == pytest.approx(explained, rel=1e-12)
    assert plan.excluded == (("h.1.up",) if "exclude" in arguments else ())


def test_a_plan_of_less_than_half_a_rank_a_layer_has_rank_1():
    """PEFT takes no other as the rank of an adapter, which alphas are relative to."""
    plan = allocate_ranks(statistics(MIXED, THIN, rank=1, n_parameters=1000), parameters=40, rho=9)
    assert sum(plan.values()) == 1 and plan.rank == 1


def test_what_nobody_can_spend_is_noted():
    stats = replace(statistics(MIXED, THIN, rank=1), unsupported={"embed": "Embedding", "table": "Parameter"})
    plan = allocate_ranks(stats, parameters=10**4, max_rank=2, rho=1e6)
    unspent = "9,744 of 10,000 parameters stay unspent: every layer has the largest rank that the limits and rho allow."
    left_out = "parameters=10,000 does not count embed, table: PEFT adds an adapter of the average rank there."
    assert plan.notes == (unspent, left_out) and plan.unsupported == {"embed": "Embedding", "table": "Parameter"}
    assert allocate_ranks(stats, total_rank=4, max_rank=2).notes == ()  # what is counted in ranks counts layers alone
    assert allocate_ranks(stats, variance=0.2).notes == ()
    assert allocate_ranks(stats, megabytes=1e-3).notes == (
        left_out.replace("parameters=10,000", "megabytes=0.001 in float32"),
    )


def test_what_a_further_step_would_cost_more_than_is_left_is_not_noted():
    """One layer is at its largest rank, and the others would take more if there were more."""
    plan = allocate_ranks(statistics(MIXED, THIN), parameters=106, rho=2, overrides={"h.0.up": {"max_rank": 1}})
    assert tuple(plan.values()) == (1, 1, 1, 0) and plan.notes == ()


def test_ranks_that_are_all_fixed_are_a_plan():
    plan = allocate_ranks(statistics(WIDE), total_rank=3, rho=2, max_rank=0, overrides={"h.1.up": {"rank": 2}})
    assert tuple(plan.values()) == (0, 2, 0)
    unspent = "1 of 3 ranks stay unspent: every layer has the largest rank that the limits and rho allow."
    assert plan.notes == (unspent,)


def test_layers_of_unequal_width_each_have_their_own_largest_rank_and_cost():
    stats = statistics(WIDE, [(8, 8), (64, 64), (32, 32)])
    words = "the cheapest step costs 16 parameters.$"
    refused(words, allocate_ranks, stats, parameters=15, rho=2)
    words = "^rank=65 lets a layer have rank 64, .* Collect again with rank 64 and rho=2, or ask for less"
    refused(words, allocate_ranks, stats, rank=65, rho=2)
    assert dict(allocate_ranks(stats, rank=2, rho=9e18)) == dict(allocate_ranks(stats, rank=2, rho=32))


def test_of_many_equal_layers_the_first_ones_get_the_ranks():
    """More of them than a sort by insertion takes, which keeps the order of what is equal by itself."""
    plan = allocate_ranks(statistics([[0.4, 0.3, 0.2, 0.1]] * 40), total_rank=60, rho=2)
    assert tuple(plan.values()) == (2,) * 20 + (1,) * 20


def test_what_more_to_collect_is_said_in_full():
    stats = statistics(MIXED, THIN)
    told = refused("^rank=3 lets", allocate_ranks, stats, rank=3, rho=2)
    assert told == (
        "rank=3 lets a layer have rank 6, and 'h.0.up' and 1 other layer would take more than the 4 components that "
        "were collected. Collect again with rank 3 and rho=2, or ask for less, or allocate with max_rank=4."
    )
    plan = allocate_ranks(stats, parameters=32 * 11, rho=2)
    assert plan.notes == (told.replace("rank=3 lets", "parameters=352 lets").replace(" and 1 other layer", ""),)


def test_a_rule_without_a_name_is_a_custom_one():
    rule = partial(lambda worth, name, spectrum: [worth] * 4, 0.5)
    plan = allocate_ranks(statistics(MIXED), total_rank=2, policy=rule)
    assert plan.policy == "custom" and list(plan.values()) == [1, 1, 0, 0] and plan.settings == {"rho": 2.0}


# --- Limits ---------------------------------------------------------------------------------------------------------


@laws
@given(distinct, st.integers(0, 2), st.integers(2, 4), st.sampled_from([1, 2]), st.integers(6, 12))
def test_limits_hold_and_the_rest_is_the_best_there_is(ratios, least, most, multiple, total):
    stats = statistics(ratios)
    limits = dict(min_rank=least, max_rank=most, multiple_of=multiple)
    plan = allocate_ranks(stats, total_rank=total, rho=1e6, **limits)
    assert all((rank == 0 == least or least <= rank <= most) and rank % multiple == 0 for rank in plan.values())
    grid = [r for r in range(5) if r % multiple == 0 and (r == 0 or least <= r <= most) and (r > 0 or least == 0)]
    fitting = [v for v in itertools.product(grid, repeat=3) if sum(v) <= total]
    # With steps of one size greedy is exact.
    if multiple == 1 and least < 2:
        assert explained(ratios, plan.values()) == pytest.approx(max(explained(ratios, v) for v in fitting))
    else:
        step = max(sum(row[:2]) for row in ratios)
        assert explained(ratios, plan.values()) >= max(explained(ratios, v) for v in fitting) - step


def test_overrides_and_exclude_select_by_name_ending_and_wildcard():
    rows = {f"h.{i}.{kind}": [0.3, 0.2, 0.1, 0.05] for i in range(3) for kind in ("up", "down")}
    plan = allocate_ranks(
        statistics(rows),
        total_rank=9,
        rho=2,
        overrides={"*.down": {"max_rank": 1}, "h.2.down": {"rank": 4}, "up": {"multiple_of": 2}},
        exclude=["h.1.*"],
    )
    # h.2.down is fixed at 4; of the 5 left, 4 go to the two up layers (0.25 a rank) and 1 to h.0.down (0.3) first.
    assert dict(plan) == {"h.0.up": 2, "h.0.down": 1, "h.1.up": 0, "h.1.down": 0, "h.2.up": 2, "h.2.down": 4}
    assert plan.excluded == ("h.1.up", "h.1.down")
    assert plan.settings["exclude"] == ["h.1.*"]
    assert allocate_ranks(statistics(rows), rank=2, exclude="down").total_rank == 2 * 3  # of those that take part


def test_what_is_excluded_does_not_count_in_what_a_plan_explains():
    rows = {"up": [0.3, 0.2], "down": [0.6, 0.1], "gate": [0.5, 0.4]}
    plan = allocate_ranks(statistics(rows), rank=1, exclude="gate")
    assert plan.explained_variance == pytest.approx((0.3 + 0.6) / 2)


def test_ties_that_have_a_layer_in_common_are_one_tie():
    rows = {"q": [0.5, 0.2, 0.1], "k": [0.1, 0.05, 0.01], "v": [0.01, 0.005, 0.001], "up": [0.4, 0.3, 0.2]}
    for ties in ([("k", "v"), ("q", "k")], [("q", "k"), ("k", "v")]):
        plan = allocate_ranks(statistics(rows), total_rank=7, rho=3, max_rank=3, tie=ties)
        assert plan["q"] == plan["k"] == plan["v"]


@laws
@given(distinct, distinct, st.sampled_from(PLAIN), st.integers(2, 24), st.sampled_from([1, 2]), st.booleans())
def test_layers_of_a_unit_have_one_rank_and_there_is_no_better_plan(one, other, policy, total, multiple_of, per_kind):
    rows = {f"h.{block}.{kind}": rows[i] for block, rows in enumerate((one, other)) for i, kind in enumerate(QKV)}
    blocks = [[f"h.{block}.{kind}" for kind in QKV] for block in (0, 1)]
    units = list(zip(*blocks, strict=True)) if per_kind else blocks
    step = multiple_of * len(units[0])
    assume(total >= step)
    options = dict(total_rank=total, policy=policy, rho=1e6, multiple_of=multiple_of, max_rank=4)
    plan = allocate_ranks(statistics(rows), **options, **({"uniform_per_kind": True} if per_kind else {"tie": QKV}))
    assert all(len({plan[name] for name in unit}) == 1 for unit in units)
    assert plan.total_rank <= total and (min(plan.values()) == 4 or plan.total_rank + step > total)
    if policy == "eva":
        possible = [
            sum(cumulative(rows[name])[rank] for unit, rank in zip(units, ranks, strict=True) for name in unit)
            for ranks in itertools.product(range(0, 5, multiple_of), repeat=len(units))
            if sum(ranks) * len(units[0]) <= total
        ]
        assert explained(rows.values(), plan.values()) == pytest.approx(max(possible))


def test_layers_with_fewer_directions_than_rank_are_warned_of_once():
    with pytest.warns(UserWarning, match=r"^'h.1.up' got as many ranks as the data has directions.") as said:
        plan = allocate_ranks(statistics([[0.4, 0.3, 0.2, 0.1], [0.6, 0.4]], n_samples=1000), rank=3, rho=1.34)
    assert list(plan.values()) == [4, 2] and not plan.notes and len(said) == 1
    with pytest.warns(UserWarning, match="'h.0.up' and 1 other layer got as many"):
        few = allocate_ranks(statistics([[0.4, 0.3], [0.6, 0.4]], n_samples=3), rank=16)
    assert list(few.values()) == [2, 2] and few.notes == ()  # a warning has said it
    with pytest.warns(UserWarning, match="'h.1.up' got as many"):
        one = allocate_ranks(statistics([[0.4, 0.3, 0.2, 0.1], [0.6, 0.4]], n_samples=1000), rank=8, max_rank=4)
    assert list(one.values()) == [4, 2] and one.notes == ()
    with pytest.warns(UserWarning, match="'h.1.up' got as many"):
        least = allocate_ranks(statistics([[0.3, 0.2, 0.1, 0.1], [0.6]]), rank=2, rho=2, min_rank=2)
    assert list(least.values()) == [3, 1]  # min_rank asks for what the data does not have
    with pytest.warns(UserWarning, match="'h.1.up' got as many"):  # and more than the average rank
        allocate_ranks(statistics([[0.3, 0.2, 0.1, 0.1], [0.6]]), total_rank=3, min_rank=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is said where there is enough for the rank
        allocate_ranks(statistics([[0.4, 0.3, 0.2, 0.1], [0.6, 0.4]], n_samples=1000), rank=2, rho=2)
        allocate_ranks(statistics([[0.4, 0.3, 0.2, 0.1], [0.6]]), variance=0.6)


@pytest.mark.parametrize("n_rows", [2, 5, 10, 16])
@pytest.mark.parametrize("copies", [1, 4])
def test_too_little_data_is_one_rule_however_little_it_is(n_rows, copies):
    model = torch.nn.Sequential(torch.nn.Linear(64, 32))
    rows = torch.randn(n_rows, 64)
    stats = collect(model, [rows] * copies, rank=16, progress=False)
    with pytest.warns(UserWarning, match="'0' got as many ranks as the data has directions"):
        assert dict(allocate_ranks(stats)) == {"0": n_rows - 1}


def test_more_in_one_layer_than_was_collected_is_an_error_only_if_it_matters():
    greedy = [[0.4, 0.2, 0.1, 0.05], [0.01, 0.01, 0.01, 0.01], [0.01, 0.01, 0.01, 0.01]]
    with pytest.raises(LoraInitError, match=r"rank 6, and 'h.0.up' would take .* the 4 components .* rho=3, or"):
        allocate_ranks(statistics(greedy), rank=2, rho=3)
    assert allocate_ranks(statistics(greedy), rank=2, rho=2)["h.0.up"] == 4
    even = statistics([[0.25, 0.25, 0.01, 0.01]] * 3)
    assert list(allocate_ranks(even, rank=2, rho=3).values()) == [2, 2, 2]
    note = allocate_ranks(statistics(greedy), parameters=128 * 6, rho=3).notes[0]
    assert "'h.0.up' would take more than the 4 components" in note


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(rank=0), "rank=0: a whole number from 1"),
    (dict(rank=2.5), r"rank=2.5: a whole number from 1 to 10\^12 is needed, such as"),
    (dict(rank=True), "rank=True: a whole number"),
    (dict(rank=None, parameters=[1]), r"parameters=\[1\]: a whole number"),
    (dict(rank=5), "rank=5 lets a layer have rank 10, .* more than the 4 components .* Collect again with rank 5"),
    (dict(rank="2.5"), "rank='2.5': a whole number"),
    (dict(rank=10**20), f"rank={10**20}: a whole number from 1 to"),
    (dict(total_rank=10**20), f"total_rank={10**20}: a whole number from 1 to"),
    (dict(parameters="1e30"), "parameters='1e30': a whole number from 1 to"),
    (dict(megabytes=1e300), r"megabytes=1e\+300: a number above 0 and not above 1,000,000,000,000 is needed"),
    (dict(rank="eight"), "rank='eight': a whole number"),
    (dict(rank=65), "rank=65 lets a layer have rank 64, .* Collect again with rank 64 and rho=2.0, or ask"),
    (dict(rank=5, policy="uniform"), "rank=5 lets a layer have rank 64, .* Collect again with rank 5, or"),
    (dict(rho=0.5), "rho=0.5, expected a number of at least 1"),
    (dict(rho=math.inf), "rho=inf, expected a number of at least 1"),
    (dict(rank=2, parameters="1M"), "rank=2 and parameters='1M' are 2 budgets. Give one."),
    (dict(parameters="2.5Q"), "parameters='2.5Q': a whole number"),
    (dict(parameters="2,5M"), "parameters='2,5M': a whole number"),
    (dict(parameters="nan"), "parameters='nan': a whole number"),
    (dict(parameters="0"), "parameters='0': a whole number from 1"),
    (dict(parameters="1M"), "parameters=1000000 lets a layer have rank 64, and .* more than the 4 components"),
    (dict(parameters=100), "parameters=100 buys no rank in any layer: the cheapest step costs 128"),
    (dict(megabytes=0), "megabytes=0: a number above 0"),
    (dict(megabytes=1, dtype="int4"), "dtype='int4' is unknown. Choose from float32"),
    (dict(megabytes=1e-5), "buys no rank"),
    (dict(fraction=0.01), "needs the size of the base model"),
    (dict(fraction=1.5), "fraction=1.5: a number above 0 and not above 1 is needed"),
    (dict(variance=0.9), "out of reach: .* too little in 3 of 3 layers, least in 'h.0.up': 0.3700"),
    (dict(variance=0.9, coverage="total"), "out of reach: .* explains 0.3700 on average"),
    (dict(variance=0.9, coverage="some"), "coverage='some' is unknown"),
    (dict(rank=2, dtype="float16"), "dtype='float16' is for the budget megabytes. Leave it out."),
    (dict(variance=0.9, dtype="x"), "dtype='x' is for the budget megabytes. Leave it out."),
    (dict(megabytes=1, coverage="total"), "coverage='total' is for the budget variance. Leave it out."),
    (dict(policy="best"), "policy='best' is unknown. Choose from uniform, eva"),
    (dict(policy=lambda n, s: [1, math.nan, 1, 1]), r"layer 'h.0.up': .* shape \(4,\), 3 of them finite"),
    (dict(policy=lambda n, s: [1, 2]), r"shape \(2,\), 2 of them finite. Expected finite ones of shape \(4,\)"),
    (dict(policy=lambda n, s: "no"), "layer 'h.0.up': the policy raised ValueError: could not"),
    (dict(policy=lambda s: 1), r"takes \(s\), and is called with \(name, spectrum\)"),
    (dict(min_rank=3, max_rank=2), r"min_rank=3 is above max_rank=2. Lower it"),
    (dict(min_rank=6), r"no possible rank: 'h.0.up' \(min_rank=6; at most 4\).* the components collected"),
    (dict(rank=2, rho=1, min_rank=3), r"\(min_rank=3; at most 2\).* rho x average rank allow. Relax"),
    (dict(min_rank=3, rank=2), "min_rank binds: .* 3 layers, cost 9 ranks, 3 more than rank=2 gives"),
    (dict(min_rank=1, max_rank=3, multiple_of=4), r"\(min_rank=1, max_rank=3, multiple_of=4; at most 4\)"),
    (dict(min_rank=1, allowed_ranks=(8, 16)), r"allowed_ranks=\(8, 16\); at most 4\)"),
    (dict(max_rank=0), "the limits leave every layer at rank 0"),
    (dict(multiple_of=0), "multiple_of=0, expected a whole number of at least 1"),
    (dict(max_rank="8"), "max_rank='8', expected a whole number"),
    (dict(allowed_ranks=[]), r"allowed_ranks=\[\]: a list of ranks above 0"),
    (dict(allowed_ranks=8), "allowed_ranks=8: a list of ranks"),
    (dict(allowed_ranks="8,16"), "allowed_ranks='8,16': a list of ranks"),
    (dict(overrides="up"), "overrides='up': a mapping"),
    (dict(exclude=3), "exclude=3: a name, an ending or a wildcard"),
    (dict(tie=3), "tie=3: a name"),
    (dict(tie="up"), "ties nothing"),
    (dict(overrides={"*.down": {"max_rank": 1}}), r"overrides=.\*.down. matches no layer. Names end in up"),
    (dict(overrides={"*.upp": {"max_rank": 1}}), r"overrides=.\*.upp. matches no layer. Closest: up"),
    (dict(overrides={"up": {"maximum": 1}}), r"overrides\['up'\]: 'maximum' is no limit. Choose from rank, "),
    (dict(overrides={"up": 8}), "overrides={'up': 8}: a mapping such as"),
    (dict(exclude="upp"), "exclude=.upp. matches no layer. Closest: up"),
    (dict(exclude="up"), "exclude='up' leaves none of 3 layers"),
    (dict(tie=("up", "down")), "'down' matches no layer"),
    (dict(tie=("up",)), "ties nothing: no two of these"),
    (dict(tie=("*.up", "up")), "must be how names end"),
])  # fmt: skip
def test_bad_input_is_one_clear_line(arguments, message):
    budgets = {"rank", "total_rank", "parameters", "megabytes", "fraction", "variance"}
    if not budgets & arguments.keys():
        arguments = {"rank": 2} | arguments
    refused(message, allocate_ranks, statistics(WIDE), **{"rho": 2.0} | arguments)


@pytest.mark.parametrize(
    ("stats", "message"),
    [("x.st", r"needed, from collect or Statistics.load\(path\), not str"),
     (torch.nn.Linear(2, 2), "not Linear"),
     (Statistics({}, {}, {}, statistics(WIDE).provenance), "Statistics of layers are needed")],
)  # fmt: skip
def test_what_is_no_statistics_is_one_clear_line(stats, message):
    refused(message, allocate_ranks, stats)


def test_rows_that_do_not_differ_start_nothing():
    model, batches = torch.nn.Sequential(torch.nn.Linear(4, 4)), [torch.ones(8, 4)] * 2
    stats = collect(model, batches, rank=2)
    refused(r"no layer has a direction to start from: its rows \(16 in all\) do not differ", allocate_ranks, stats)
