"""Rank plans against brute force, exact oracles and laws; budgets and limits; the plan's file and its snippets."""

import csv
import io
import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lora_init.errors import LoraInitError
from lora_init.layers.targets import Target, find_targets
from lora_init.planning.allocate import RankAllocation, allocate_ranks
from lora_init.planning.budgets import parse_count
from lora_init.planning.plan import load_plan, save_plan
from lora_init.planning.policies import POLICIES
from lora_init.planning.snippets import FORMATS, snippet
from lora_init.statistics.spectrum import Spectrum
from lora_init.statistics.statistics import Provenance, Statistics
from tests.conftest import tiny_llama

# Plans take a millisecond, but two cores are shared: no deadline.
laws = settings(deadline=None, max_examples=60)
QKV = ("q_proj", "k_proj", "v_proj")


def statistics(ratios, widths=None, group_of=None, batch_ratios=None, total=1.0, **provenance):
    """Statistics whose layers have exactly these explained-variance ratios and (d_in, d_out); no components."""
    ratios = ratios if isinstance(ratios, dict) else {f"h.{i}.up": row for i, row in enumerate(ratios)}
    widths = widths or [(64, 64)] * len(ratios)
    groups = {
        name: Spectrum(
            torch.zeros(len(row), 1), torch.tensor(row, dtype=torch.float64) * total, total, torch.zeros(1), 9
        )
        for name, row in ratios.items()
    }
    known = {"model_id": "some/model", "model_class": "LlamaForCausalLM", "fingerprint": "f1", "data": "some data"}
    return Statistics(
        groups,
        group_of or {name: name for name in ratios},
        {name: Target(name, "Linear", *width) for name, width in zip(group_of or ratios, widths, strict=True)},
        Provenance(**(known | {"target_modules": "all-linear"} | provenance)),
        batch_ratios=batch_ratios,
    )


def cumulative(row):
    return np.concatenate([[0.0], np.cumsum(row)])


def explained(ratios, ranks):
    return sum(cumulative(row)[rank] for row, rank in zip(ratios, ranks, strict=True))


def vectors(caps, budget, costs=None):
    """Every rank vector under the caps and the budget."""
    costs = costs or [1] * len(caps)
    for ranks in itertools.product(*(range(cap + 1) for cap in caps)):
        if sum(rank * cost for rank, cost in zip(ranks, costs, strict=True)) <= budget:
            yield ranks


# Falling ratios of 2 to 4 layers, coarse enough for exact ties, and as sums exact in floats.
spectra = st.integers(2, 4).flatmap(
    lambda n: st.lists(
        st.lists(st.integers(0, 16), min_size=4, max_size=4).map(lambda r: [x / 64 for x in sorted(r, reverse=True)]),
        min_size=n,
        max_size=n,
    )
)
# The same without ties, for laws that a tie-break would disturb.
distinct = st.permutations(range(1, 129)).map(
    lambda p: [sorted((x / 1024 for x in p[4 * i : 4 * i + 4]), reverse=True) for i in range(3)]
)
widths3 = st.lists(st.tuples(st.integers(8, 40), st.integers(1, 40)), min_size=3, max_size=3)


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


def test_eva_is_what_sorting_all_components_gives():
    random = np.random.default_rng(0)
    ratios = -np.sort(-random.dirichlet(np.ones(40), size=9), axis=1)[:, :32]
    plan = allocate_ranks(statistics(ratios.tolist()), rank=16, rho=2.0)
    best = sorted((-value, i) for i, row in enumerate(ratios) for value in row)[: 16 * 9]
    assert list(plan.values()) == [sum(i == layer for _, i in best) for layer in range(9)]
    assert plan.rank == 16 and plan.total_rank == 16 * 9


def test_rho_1_is_uniform():
    plan = allocate_ranks(statistics([[0.9, 0.05, 0, 0], [0.3, 0.3, 0.2, 0.2]]), rank=3, rho=1)
    assert list(plan.values()) == [3, 3]


def test_a_layer_may_get_nothing_and_layers_with_one_input_tie():
    ratios = {"b.0.q": [0.5, 0.25, 0.125, 0.0625], "b.0.o": [0.0, 0.0, 0.0, 0.0]}
    group_of = {"b.0.q": "b.0.q", "b.0.k": "b.0.q", "b.0.o": "b.0.o"}
    plan = allocate_ranks(statistics(ratios, [(64, 64)] * 3, group_of), rank=2, rho=2)
    assert dict(plan) == {"b.0.q": 3, "b.0.k": 3, "b.0.o": 0}
    assert dict(allocate_ranks(statistics(ratios, [(64, 64)] * 3, group_of), total_rank=5)) == {
        "b.0.q": 3, "b.0.k": 2, "b.0.o": 0,
    }  # fmt: skip


def test_planning_reads_no_components_and_needs_no_model():
    class NoComponents(Statistics):
        def __getitem__(self, name):
            raise AssertionError("components were read")

    stats = statistics([[0.5, 0.2], [0.4, 0.3]])
    blind = NoComponents(stats._groups, stats.group_of, stats.targets, stats.provenance)
    assert dict(allocate_ranks(blind, rank=1)) == dict(allocate_ranks(stats, rank=1))


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


def test_effective_rank_counts_equal_directions():
    gains, _ = POLICIES["proportional"](np.array([[0.25] * 4, [0.5, 0.5, 0, 0], [0.0] * 4]), np.ones(3))
    assert gains[:, 0] * 0.5 == pytest.approx([4, 2, 0])


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


def test_cost_aware_prefers_the_narrow_layer_and_eva_does_not():
    stats = statistics([[0.40, 0.30], [0.35, 0.25]], [(64, 936), (64, 36)])
    assert list(allocate_ranks(stats, parameters=1000, policy="cost-aware", rho=99).values()) == [0, 2]
    assert list(allocate_ranks(stats, parameters=1000, policy="eva", rho=99).values()) == [1, 0]


@laws
@given(spectra)
def test_a_function_is_a_policy_and_only_counts_matter(ratios):
    stats = statistics(ratios)
    by_name = dict(zip(stats, ratios, strict=True))
    plan = allocate_ranks(stats, rank=2, policy=lambda name, spectrum: by_name[name][::-1])
    assert dict(plan) == dict(allocate_ranks(stats, rank=2))
    assert plan.policy == "<lambda>"


def test_a_function_gets_the_layer_and_its_spectrum():
    stats = statistics([[0.5, 0.2], [0.4, 0.3]])

    def last_layers_first(name, spectrum):
        assert spectrum.explained_variance.shape == (2,)
        return torch.full((2,), float(name.split(".")[1]))

    assert list(allocate_ranks(stats, rank=1, policy=last_layers_first).values()) == [0, 2]


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
    st.sampled_from(sorted(POLICIES)),
    st.sampled_from(["total_rank", "parameters"]),
    st.integers(1, 900),
    st.sampled_from([(1, 2, 3, 4), (2, 4), (1, 4), (3,), (3, 4)]),
    st.integers(1, 4),
)
def test_the_sum_never_exceeds_the_budget_and_no_further_step_fits(ratios, widths, policy, kind, amount, grid, top):
    costs = [1] * 3 if kind == "total_rank" else [a + b for a, b in widths]
    amount = min(amount, 4 * sum(costs))
    allowed = [r for r in grid if r <= top]
    assume(allowed and amount >= allowed[0] * max(costs))
    plan = allocate_ranks(
        statistics(ratios, widths), rho=1e6, policy=policy, allowed_ranks=grid, max_rank=top, **{kind: amount}
    )
    spent = plan.total_rank if kind == "total_rank" else plan.parameters
    assert spent == plan.spent == sum(r * c for r, c in zip(plan.values(), costs, strict=True))
    assert set(plan.values()) <= {0, *allowed}
    assert spent <= amount
    assert all(spent + cost > amount for cost in steps_left(plan, allowed, [top] * 3, costs))


def test_what_does_not_fit_is_passed_over_for_what_does():
    stats = statistics([[0.5], [0.4], [0.3], [0.2]], [(5, 5), (3, 2), (3, 2), (2, 1)])
    assert list(allocate_ranks(stats, parameters=9, rho=9).values()) == [0, 1, 0, 1]


def test_a_step_that_does_not_fit_is_not_skipped_within_its_layer():
    stats = statistics([[0.25, 0.25, 0.25, 0.2], [0.1, 0.1, 0.1, 0.1]])
    assert list(
        allocate_ranks(
            stats, total_rank=2, rho=9, allowed_ranks=(3, 4), overrides={"h.1.up": {"allowed_ranks": (1,)}}
        ).values()
    ) == [0, 1]


def test_rounding_breaks_no_tie():
    stats = statistics([[0.1, 0.0], [0.3, 0.1]])  # 0.3 + 0.1 - 0.3 is more than 0.1
    assert list(allocate_ranks(stats, total_rank=2).values()) == [1, 1]
    stats = statistics([[0.1] * 4] * 2)  # and (0.1 + 0.1 + 0.1) / 3 is too
    assert list(allocate_ranks(stats, total_rank=3, rho=9, allowed_ranks=(1, 4)).values()) == [1, 1]


@laws
@given(distinct, st.sampled_from(sorted(POLICIES)), st.integers(1, 11))
def test_more_ranks_never_take_rank_from_any_layer(ratios, policy, total):
    small, large = (
        allocate_ranks(statistics(ratios), total_rank=t, policy=policy, rho=1e6, max_rank=4) for t in (total, total + 1)
    )
    assert all(small[name] <= large[name] for name in small)
    assert small.explained_variance <= large.explained_variance


@laws
@given(distinct, widths3, st.integers(80, 900), st.integers(1, 60), st.sampled_from([(1, 2, 3, 4), (2, 4), (1, 4)]))
def test_more_parameters_never_explain_less_under_cost_aware(ratios, widths, budget, more, grid):
    stats = statistics(ratios, widths)
    exists = 4 * sum(a + b for a, b in widths)
    assume(2 * max(a + b for a, b in widths) <= budget and budget + more <= exists)
    small, large = (
        allocate_ranks(stats, parameters=b, policy="cost-aware", rho=1e6, allowed_ranks=grid)
        for b in (budget, budget + more)
    )
    assert small.explained_variance <= large.explained_variance + 1e-12


@laws
@given(distinct, st.sampled_from(["eva", "cost-aware"]), st.permutations(range(3)), st.integers(1, 12))
def test_permuting_layers_permutes_ranks(ratios, policy, order, total):
    names = [f"h.{i}.up" for i in range(3)]
    plain = dict(zip(names, ratios, strict=True))
    moved = {names[i]: ratios[i] for i in order}
    plans = [
        allocate_ranks(statistics(r), total_rank=total, policy=policy, rho=1e6, max_rank=4) for r in (plain, moved)
    ]
    assert dict(plans[0]) == dict(plans[1])


# Powers of two, exact in floats: another factor changes last digits, and so may break an exact tie the other way.
@laws
@given(spectra, st.sampled_from(sorted(POLICIES)), st.integers(-60, 60), st.integers(1, 8))
def test_scaling_all_variances_changes_nothing(ratios, policy, power, total):
    one, other = (
        allocate_ranks(statistics(ratios, total=t), total_rank=total, policy=policy, rho=1e6, max_rank=4)
        for t in (1.0, 2.0**power)
    )
    assert dict(one) == dict(other)


@laws
@given(distinct, st.integers(1, 12), st.sampled_from(sorted(POLICIES)))
def test_tied_layers_have_one_rank_in_each_block(ratios, total, policy):
    rows = {f"h.{block}.{kind}": ratios[i] for block in (0, 1) for i, kind in enumerate(QKV)}
    assume(2 * total >= 3)
    plan = allocate_ranks(statistics(rows), total_rank=2 * total, policy=policy, tie=QKV, rho=1e6, max_rank=4)
    for block in (0, 1):
        assert len({plan[f"h.{block}.{kind}"] for kind in QKV}) == 1
    assert 2 * total - 3 < plan.total_rank <= 2 * total


# --- Budgets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "count"),
    [("2.5M", 2_500_000), ("2.3m", 2_300_000), ("800k", 800_000), ("1_000", 1000), ("1,000,000", 10**6),
     (" 7 B ", 7 * 10**9), (12, 12), (12.0, 12), (np.int64(5), 5), ("4.1M", 4_100_000)],
)  # fmt: skip
def test_counts_are_read_exactly(text, count):
    assert parse_count(text, "parameters") == count


def test_budgets_in_ranks_parameters_and_shares_agree():
    stats = statistics([[0.4, 0.2, 0.1, 0.05]] * 4, [(64, 36)] * 4, n_parameters=1_000_000)
    expected = dict(allocate_ranks(stats, rank=2))
    for budget in ({"total_rank": 8}, {"parameters": 800}, {"parameters": "0.8k"}, {"fraction": 0.0008}):
        assert dict(allocate_ranks(stats, **budget)) == expected, budget


@laws
@given(spectra, st.sampled_from([0.25, 0.5, 0.75, 0.9]))
def test_variance_takes_the_fewest_ranks(ratios, share):
    stats = statistics(ratios)
    caps = [4] * len(ratios)
    every = [v for v in vectors(caps, 99) if all(cumulative(r)[k] >= share for r, k in zip(ratios, v, strict=True))]
    total = [v for v in vectors(caps, 99) if explained(ratios, v) >= share * len(ratios)]
    for coverage, reaching in (("every-layer", every), ("total", total)):
        if not reaching:
            with pytest.raises(LoraInitError, match="out of reach"):
                allocate_ranks(stats, variance=share, coverage=coverage)
            continue
        plan = allocate_ranks(stats, variance=share, coverage=coverage)
        assert tuple(plan.values()) in reaching
        assert plan.total_rank == min(sum(v) for v in reaching)
        assert plan.spent >= share - 1e-12


def test_constant_rows_need_no_rank_to_be_explained():
    stats = statistics([[0.5, 0.25], [0.0, 0.0]])
    stats._variances["h.1.up"] = (torch.zeros(2, dtype=torch.float64), 0.0)
    plan = allocate_ranks(stats, variance=0.6)
    assert list(plan.values()) == [2, 0]
    assert plan.explained["h.1.up"] == 1.0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_megabytes_are_those_of_the_file_that_peft_writes(tmp_path, dtype):
    from peft import get_peft_model

    stats = model_and_statistics()[1]
    for megabytes in (0.008, 0.0101, 0.0123):
        plan = allocate_ranks(stats, megabytes=megabytes, dtype=dtype, rho=1e6, max_rank=8)
        config = {}
        exec(snippet(plan, "peft"), config)
        adapted = get_peft_model(tiny_llama(), config["config"]).to(getattr(torch, dtype))
        adapted.save_pretrained(tmp_path / f"{megabytes}")
        size = (tmp_path / f"{megabytes}" / "adapter_model.safetensors").stat().st_size
        assert round(plan.megabytes(dtype) * 1e6) == plan.spent == size <= megabytes * 1e6
        # What is left would not pay for one more rank of the narrowest layer, with its share of the header.
        cheapest = min(t.parameters(1) for t in stats.targets.values()) * (4 if dtype == "float32" else 2)
        assert megabytes * 1e6 - size < cheapest + 300


# --- Limits ---------------------------------------------------------------------------------------------------------


def check_limits(plan, stats, least=0, most=4, multiple=1, allowed=None):
    for rank in plan.values():
        assert (rank == 0 and least == 0) or (least <= rank <= most)
        assert rank % multiple == 0
        assert rank == 0 or allowed is None or rank in allowed


@laws
@given(distinct, st.integers(0, 2), st.integers(2, 4), st.sampled_from([1, 2]), st.integers(6, 12))
def test_limits_hold_and_the_rest_is_the_best_there_is(ratios, least, most, multiple, total):
    stats = statistics(ratios)
    limits = dict(min_rank=least, max_rank=most, multiple_of=multiple)
    plan = allocate_ranks(stats, total_rank=total, rho=1e6, **limits)
    check_limits(plan, stats, least, most, multiple)
    grid = [r for r in range(5) if r % multiple == 0 and (r == 0 or least <= r <= most) and (r > 0 or least == 0)]
    fitting = [v for v in itertools.product(grid, repeat=3) if sum(v) <= total]
    # With steps of one size greedy is exact.
    if multiple == 1 and least < 2:
        assert explained(ratios, plan.values()) == pytest.approx(max(explained(ratios, v) for v in fitting))
    else:
        step = max(sum(row[:2]) for row in ratios)
        assert explained(ratios, plan.values()) >= max(explained(ratios, v) for v in fitting) - step


@laws
@given(distinct, st.integers(2, 12))
def test_allowed_ranks_are_the_only_ones(ratios, total):
    plan = allocate_ranks(statistics(ratios), total_rank=max(total, 2), rho=1e6, allowed_ranks=(4, 2))
    check_limits(plan, None, allowed=(2, 4))
    fitting = [v for v in itertools.product((0, 2, 4), repeat=3) if sum(v) <= total]
    assert explained(ratios, plan.values()) == pytest.approx(max(explained(ratios, v) for v in fitting))


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


def test_excluded_layers_do_not_count_in_the_average():
    rows = {f"h.{i}.{kind}": [0.3, 0.2, 0.1, 0.05] for i in range(3) for kind in ("up", "down")}
    assert allocate_ranks(statistics(rows), rank=2, exclude="down").total_rank == 2 * 3


def test_ties_of_several_kinds():
    rows = {f"h.{i}.{k}": [0.3, 0.2, 0.1, 0.05] for i in range(2) for k in (*QKV, "gate", "up", "down")}
    plan = allocate_ranks(statistics(rows), rank=2, tie=[QKV, ("gate", "up")])
    for i in range(2):
        assert plan[f"h.{i}.q_proj"] == plan[f"h.{i}.k_proj"] == plan[f"h.{i}.v_proj"]
        assert plan[f"h.{i}.gate"] == plan[f"h.{i}.up"]


def test_what_limits_leave_unspent_is_said():
    plan = allocate_ranks(statistics([[0.4, 0.3, 0.2, 0.1]] * 3), rank=3, max_rank=2)
    assert list(plan.values()) == [2, 2, 2]
    assert plan.notes == ("3 of 9 ranks stay unspent: every layer has the largest rank that the limits allow.",)


def test_layers_that_saw_too_few_rows_use_what_was_found():
    plan = allocate_ranks(statistics([[0.4, 0.3, 0.2, 0.1], [0.6, 0.4]], n_samples=1000), rank=3, rho=1.34)
    assert list(plan.values()) == [4, 2]
    assert any("'h.1.up' got all the components that were found: too few rows" in note for note in plan.notes)
    few = allocate_ranks(statistics([[0.4, 0.3], [0.6, 0.4]], n_samples=3), rank=16)
    assert list(few.values()) == [2, 2] and any("'h.0.up' and 1 other layer got all" in note for note in few.notes)


def test_more_in_one_layer_than_was_collected_is_an_error_only_if_it_matters():
    greedy = [[0.4, 0.2, 0.1, 0.05], [0.01, 0.01, 0.01, 0.01], [0.01, 0.01, 0.01, 0.01]]
    with pytest.raises(LoraInitError, match=r"rank 6, and 'h.0.up' would compete .* 4 components .* rho=2,"):
        allocate_ranks(statistics(greedy), rank=2, rho=3)
    assert allocate_ranks(statistics(greedy), rank=2, rho=2)["h.0.up"] == 4
    even = statistics([[0.25, 0.25, 0.01, 0.01]] * 3)
    assert list(allocate_ranks(even, rank=2, rho=3).values()) == [2, 2, 2]
    note = allocate_ranks(statistics(greedy), parameters=128 * 6, rho=3).notes[0]
    assert "'h.0.up' would compete for more than the 4 components" in note


WIDE = [[0.2, 0.1, 0.05, 0.02]] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(rank=0), "rank=0: a budget of at least 1"),
        (dict(rank=-3), "rank=-3: a budget of at least 1"),
        (dict(rank=2.5), "rank=2.5 is not a whole number"),
        (dict(rank=True), "rank=True is not a whole number"),
        (dict(rank=None, parameters=[1]), "not a whole number"),
        (dict(rank=5), "rank=5 asks for an average rank of 5, and at most 4 components .* Collect again with rank=5"),
        (dict(rank=65), "layer 'h.0.up': rank=65 is larger than its input width 64"),
        (dict(rho=0.5), "rho=0.5: a number of at least 1"),
        (dict(rho=math.nan), "rho=nan: a number of at least 1"),
        (dict(rank=2, parameters="1M"), "rank=2 and parameters='1M' are 2 budgets. Give one."),
        (dict(parameters="2.5Q"), "parameters='2.5Q' is not a count"),
        (dict(parameters="0"), "a budget of at least 1 is needed"),
        (dict(parameters="1M"), "at most 4 components per layer were collected, which cost 1,536 parameters"),
        (dict(parameters=100), "parameters=100 buys no rank in any layer: the cheapest step costs 128"),
        (dict(megabytes=0), "megabytes=0: a number above 0"),
        (dict(megabytes=1, dtype="int4"), "dtype='int4' is unknown. Choose from float32"),
        (dict(megabytes=1e-5), "buys no rank"),
        (dict(fraction=0.01), "needs the size of the base model"),
        (dict(fraction=1.5), "fraction=1.5 is a share"),
        (dict(variance=0.9), "reach in 3 of 3 layers, furthest in 'h.0.up': rank 4, .* explains 0.3700, which is 0.53"),
        (dict(variance=0.9, coverage="total"), "explains 0.3700, 0.5300 less"),
        (dict(variance=0.9, coverage="some"), "coverage='some' is unknown"),
        (dict(policy="best"), "policy='best' is unknown. Choose from uniform, eva"),
        (dict(policy=lambda n, s: [1, math.nan, 1, 1]), "layer 'h.0.up': the policy returned nan for component 1"),
        (dict(policy=lambda n, s: [1, 2]), r"scores of shape \(2,\), and \(4,\) is needed"),
        (dict(policy=lambda n, s: "no"), "the policy failed, or returned no numbers"),
        (dict(min_rank=3, max_rank=2), "layer 'h.0.up': min_rank=3 is 1 above max_rank=2"),
        (dict(min_rank=6), "min_rank=6 is 2 above the 4 components collected"),
        (dict(rank=2, rho=1, min_rank=3), "min_rank=3 is 1 above 2, which is rho x average rank = 1 x 2"),
        (dict(min_rank=3, rank=2), "min_rank binds: .* 3 layers, cost 9 ranks, 3 more than rank=2 gives"),
        (dict(min_rank=1, max_rank=3, multiple_of=4),
         "multiple_of=4 allows no rank from min_rank=1 to 3; the next, 4, is 1 above max_rank=3"),
        (dict(min_rank=1, allowed_ranks=(8, 16)),
         r"allowed_ranks=\(8, 16\) allows no rank from min_rank=1 to 4; the next, 8, is 4 above the 4 components"),
        (dict(max_rank=0), "the limits leave every layer at rank 0"),
        (dict(multiple_of=0), "multiple_of=0: a whole number of at least 1"),
        (dict(max_rank="8"), "max_rank='8': a whole number"),
        (dict(allowed_ranks=[]), r"allowed_ranks=\[\] allows no rank above 0"),
        (dict(overrides={"*.down": {"max_rank": 1}}), r"overrides: '\*.down' matches no layer. Names end in up"),
        (dict(overrides={"*.upp": {"max_rank": 1}}), r"overrides: '\*.upp' matches no layer. Closest: up"),
        (dict(overrides={"up": {"maximum": 1}}), r"overrides\['up'\]: 'maximum' is no limit. Choose from rank, "),
        (dict(overrides={"up": 8}), r"overrides\['up'\]=8: a mapping"),
        (dict(exclude="upp"), "exclude: 'upp' matches no layer. Closest: up"),
        (dict(exclude="up"), "exclude='up' leaves none of 3 layers"),
        (dict(tie=("up", "down")), "'down' matches no layer"),
        (dict(tie=("up",)), "ties nothing: no two of these"),
        (dict(tie=("*.up", "up")), "must be how names end"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(arguments, message):
    budgets = {"rank", "total_rank", "parameters", "megabytes", "fraction", "variance"}
    if not budgets & arguments.keys():
        arguments = {"rank": 2} | arguments
    with pytest.raises(LoraInitError, match=message) as error:
        allocate_ranks(statistics(WIDE), **arguments)
    assert "\n" not in str(error.value)


def test_conflicting_ties():
    rows = {f"h.0.{kind}": [0.3, 0.2, 0.1, 0.05] for kind in QKV}
    with pytest.raises(LoraInitError, match=r"both hold layer 'h.0.k_proj'"):
        allocate_ranks(statistics(rows), rank=2, tie=[QKV[:2], QKV[1:]])
    overrides = {"q_proj": {"min_rank": 3}, "k_proj": {"max_rank": 1}}
    with pytest.raises(
        LoraInitError, match=r"'h.0.q_proj' needs rank 3 or more, 'h.0.k_proj' takes at most 1: 2 apart"
    ):
        allocate_ranks(statistics(rows), rank=2, tie=QKV, overrides=overrides)


# --- Accounting and uncertainty -------------------------------------------------------------------------------------


@laws
@given(distinct, widths3)
def test_the_accounting_is_exact(ratios, widths):
    plan = allocate_ranks(statistics(ratios, widths), rank=2)
    assert plan.total_rank == sum(plan.values())
    assert plan.parameters == sum(rank * (a + b) for rank, (a, b) in zip(plan.values(), widths, strict=True))
    assert plan.explained_variance == pytest.approx(explained(ratios, plan.values()) / 3)


def test_a_cut_within_the_sampling_error_is_said_and_another_is_not():
    ratios = {"h.0.up": [0.5, 0.1001, 0.01], "h.1.up": [0.4, 0.0999, 0.02], "h.2.up": [0.9, 0.09, 0.001]}
    noisy = {name: torch.tensor([row, row], dtype=torch.float64) for name, row in ratios.items()}
    still = allocate_ranks(statistics(ratios, batch_ratios=noisy), total_rank=4)
    assert not still.unsettled and "the last 2 batches" in still.error_source
    for name in ("h.0.up", "h.1.up"):  # 0.1 +- 0.001: standard error 0.001
        noisy[name][0, 1] += 0.001
        noisy[name][1, 1] -= 0.001
    plan = allocate_ranks(statistics(ratios, batch_ratios=noisy), total_rank=4)
    assert dict(plan) == {"h.0.up": 2, "h.1.up": 1, "h.2.up": 1}
    assert dict(plan.unsettled) == {"h.0.up": (1, 2), "h.1.up": (1, 2)}
    assert plan.notes[-1].startswith("The rank of 2 of 3 layers could be another within two standard errors")


def test_without_batches_the_error_is_a_bound_from_the_rows():
    ratios = [[0.5, 0.1001, 0.01], [0.4, 0.0999, 0.02]]
    few, many = (allocate_ranks(statistics(ratios, n_samples=n), total_rank=3) for n in (1000, 10**9))
    assert set(few.unsettled) == {"h.0.up", "h.1.up"} and not many.unsettled
    assert "1,000 rows taken as independent: a lower bound" in few.error_source
    assert allocate_ranks(statistics(ratios), total_rank=3).error_source == ""


# --- The plan's file ------------------------------------------------------------------------------------------------


def full_plan(**changes):
    rows = {f"h.{i}.{kind}": [0.3 / (i + 1), 0.2, 0.1, 0.05] for i in range(2) for kind in QKV}
    stats = statistics(rows, n_samples=1000, **changes)
    return stats, allocate_ranks(
        stats, parameters=1000, tie=QKV[:2], overrides={"*.v_proj": {"max_rank": 1}}, exclude="h.1.q_proj"
    )


def test_a_plan_survives_its_file(tmp_path):
    stats = full_plan()[0]
    plan = allocate_ranks(
        stats, parameters=1000, tie=QKV[:2], overrides={"*.v_proj": {"max_rank": np.int64(1)}}, exclude=["h.1.v_proj"]
    )
    loaded = load_plan(save_plan(plan, tmp_path / "plan.json"))
    assert dict(loaded) == dict(plan) and list(loaded) == list(plan)
    for name in ("rank", "targets", "explained", "policy", "budget", "provenance", "excluded", "unsettled", "notes"):
        assert getattr(loaded, name) == getattr(plan, name), name
    assert loaded.settings["overrides"] == {"*.v_proj": {"max_rank": 1}}
    assert loaded.parameters == plan.parameters and loaded.spent == plan.spent
    loaded.check(stats)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_a_plan_made_by_hand_survives_its_file(tmp_path):
    target = Target("a", "Linear", 8, 8)
    plan = RankAllocation({"a": 3}, 3, {"a": target}, {"a": 0.5})
    assert dict(load_plan(save_plan(plan, tmp_path / "plan.json"))) == {"a": 3}


def test_a_plan_for_another_model_is_refused():
    stats, plan = full_plan()
    other = full_plan(fingerprint="f2", model_id="other/model")[0]
    with pytest.raises(
        LoraInitError, match=r"made for some/model \(fingerprint f1\), .* another: .* other/model \(f2\)"
    ):
        plan.check(other)
    with pytest.raises(LoraInitError, match=r"names layer 'h.0.q_proj', which the statistics do not have"):
        RankAllocation(dict(plan), 2).check(statistics(WIDE))
    plan.check(stats)


def damaged(content, *path, value):
    for key in path[:-1]:
        content = content[key]
    content[path[-1]] = value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: damaged(c, "format_version", value=2), "format version 2, and this lora_init reads 1"),
        (lambda c: damaged(c, "format", value="x"), "is not a plan of lora_init"),
        (lambda c: damaged(c, "layers", "h.0.q_proj", "rank", value=-1), "damaged: .*'h.0.q_proj' has rank=-1"),
        (lambda c: damaged(c, "layers", "h.0.q_proj", "rank", value="9"), "damaged: .*'h.0.q_proj' has rank='9'"),
        (lambda c: damaged(c, "layers", "h.0.q_proj", "rank", value=65), "rank 65 and input width 64"),
        (lambda c: damaged(c, "rank", value=0), "damaged: .*rank=0"),
        (lambda c: damaged(c, "layers", value=[]), "damaged"),
        (lambda c: damaged(c, "budget", value={"a": 1}), "damaged"),
        (lambda c: c.pop("policy"), "damaged: KeyError 'policy'"),
    ],
)
def test_a_damaged_plan_is_refused(tmp_path, change, message):
    path = save_plan(full_plan()[1], tmp_path / "plan.json")
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(LoraInitError, match=message):
        load_plan(path)


def test_no_plan_at_all(tmp_path):
    with pytest.raises(LoraInitError, match="could not be read: No such file"):
        load_plan(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(LoraInitError, match="is not JSON, so it is no plan"):
        load_plan(tmp_path / "plan.json")
    with pytest.raises(LoraInitError, match="could not be written: No such file"):
        save_plan(full_plan()[1], tmp_path / "no" / "plan.json")


def test_a_later_version_may_know_more_about_the_origin(tmp_path):
    path = save_plan(full_plan()[1], tmp_path / "plan.json")
    content = json.loads(path.read_text())
    content["provenance"]["moon_phase"] = "full"
    path.write_text(json.dumps(content))
    assert load_plan(path).provenance == full_plan()[1].provenance


# --- Snippets -------------------------------------------------------------------------------------------------------


def model_and_statistics(task_type=None):
    """A tiny Llama and statistics of all its layers, the ratios of which are made up."""
    model = tiny_llama()
    targets = find_targets(model).layers
    random = np.random.default_rng(0)
    rows = {name: sorted(random.dirichlet(np.ones(12)).tolist(), reverse=True)[:8] for name in targets}
    stats = statistics(rows, task_type=task_type)
    stats.targets.update(targets)
    return model, stats


def ranks_and_scalings(config):
    from peft import get_peft_model

    adapted = get_peft_model(tiny_llama(), config)
    layers = {name: module for name, module in adapted.named_modules() if hasattr(module, "lora_A")}
    names = [name.removeprefix("base_model.model.") for name in layers]
    ranks = [module.lora_A["default"].weight.shape[0] for module in layers.values()]
    return dict(zip(names, ranks, strict=True)), {module.scaling["default"] for module in layers.values()}


def allocated(stats):
    plan = allocate_ranks(stats, rank=4, overrides={"layers.0.self_attn.k_proj": {"rank": 0}})
    assert 0 in plan.values() and len(set(plan.values())) > 3
    return plan, {name: rank for name, rank in plan.items() if rank}


@pytest.mark.parametrize(("use_rslora", "scaling"), [(False, 24 / 4), (True, 24 / math.sqrt(4))])
def test_peft_reads_its_snippet_as_exactly_the_plan(use_rslora, scaling):
    plan, expected = allocated(model_and_statistics("CAUSAL_LM")[1])
    names = {}
    exec(snippet(plan, "peft", lora_alpha=24, use_rslora=use_rslora), names)
    ranks, scalings = ranks_and_scalings(names["config"])
    assert ranks == expected
    assert list(scalings) == pytest.approx([scaling] * len(scalings))
    assert names["config"].task_type == "CAUSAL_LM"
    assert "lora_alpha=24,\n" in snippet(plan, "peft", lora_alpha=24.0)


def test_axolotl_gets_what_it_forwards_to_peft():
    from peft import LoraConfig

    plan, expected = allocated(model_and_statistics()[1])
    text = snippet(plan, "axolotl", lora_alpha=8)
    config = yaml.safe_load(text)
    assert config["adapter"] == "lora" and "axolotl 0.18 or newer" in text
    # As axolotl 0.19 does in loaders/adapter.py.
    ranks, scalings = ranks_and_scalings(
        LoraConfig(
            r=config["lora_r"],
            lora_alpha=config["lora_alpha"],
            target_modules=config["lora_target_modules"],
            rank_pattern=config["lora_rank_pattern"],
            alpha_pattern=config["lora_alpha_pattern"],
        )
    )
    assert ranks == expected and scalings == {2.0}
    assert all(type(alpha) is int for alpha in config["lora_alpha_pattern"].values())  # PositiveInt in its schema


def test_axolotl_cannot_have_fractions_of_alpha():
    plan, _ = allocated(model_and_statistics()[1])
    with pytest.raises(LoraInitError, match=r"whole numbers for alpha, .* a lora_alpha that is a multiple of 4"):
        snippet(plan, "axolotl", lora_alpha=6)
    with pytest.raises(LoraInitError, match="Turn use_rslora off"):
        snippet(plan, "axolotl", lora_alpha=8, use_rslora=True)


def test_llama_factory_gets_one_rank_or_a_finished_adapter():
    from peft import LoraConfig

    stats = model_and_statistics()[1]
    plan, _ = allocated(stats)
    text = snippet(plan, "llama-factory", lora_alpha=24, plan_path="p.json")
    assert "LLaMA-Factory has no rank_pattern" in text
    assert "lora-init init MODEL DATA --ranks p.json --lora-alpha 24 --output adapter" in text
    assert yaml.safe_load(text) == {
        "finetuning_type": "lora", "adapter_name_or_path": "adapter", "create_new_adapter": False,
    }  # fmt: skip
    same = allocate_ranks(stats, rank=4, policy="uniform")
    config = yaml.safe_load(snippet(same, "llama-factory", lora_alpha=24))
    # As LLaMA-Factory 0.9 does: lora_target is split at commas.
    ranks, scalings = ranks_and_scalings(
        LoraConfig(
            r=config["lora_rank"], lora_alpha=config["lora_alpha"], target_modules=config["lora_target"].split(",")
        )
    )
    assert ranks == dict(same) and scalings == {6.0}


def test_a_name_that_ends_another_is_told_apart():
    from peft import LoraConfig, get_peft_model
    from torch import nn

    model = nn.ModuleDict(
        {"h": nn.ModuleList([nn.Linear(8, 8)]), "tower": nn.ModuleDict({"h": nn.ModuleList([nn.Linear(8, 8)])})}
    )
    targets = {name: Target(name, "Linear", 8, 8) for name in ("h.0", "tower.h.0")}
    names = {}
    exec(snippet(RankAllocation({"h.0": 2, "tower.h.0": 0}, 4, targets), "peft"), names)
    assert isinstance(names["config"], LoraConfig)
    adapted = get_peft_model(model, names["config"])
    with_adapter = [name for name, module in adapted.named_modules() if hasattr(module, "lora_A")]
    assert with_adapter == ["base_model.model.h.0"]


def test_csv_and_json_hold_every_layer():
    plan, _ = allocated(model_and_statistics()[1])
    rows = list(csv.DictReader(io.StringIO(snippet(plan, "csv"))))
    assert {row["layer"]: int(row["rank"]) for row in rows} == dict(plan)
    assert sum(int(row["parameters"]) for row in rows) == plan.parameters
    content = json.loads(snippet(plan, "json"))
    assert {name: layer["rank"] for name, layer in content["layers"].items()} == dict(plan)
    assert content["totals"]["parameters"] == plan.parameters


def test_unknown_formats_and_empty_plans():
    plan, _ = allocated(model_and_statistics()[1])
    with pytest.raises(LoraInitError, match=r"format='toml' is unknown. Choose from peft, axolotl"):
        snippet(plan, "toml")
    nothing = replace(plan, ranks=dict.fromkeys(plan, 0))
    for tool in FORMATS:
        with pytest.raises(LoraInitError, match="no layer any rank"):
            snippet(nothing, tool)


def test_what_is_in_a_name_stays_in_a_comment():
    stats = model_and_statistics()[1]
    plan = replace(allocated(stats)[0], provenance=replace(stats.provenance, data="a\nimport os  # b"))
    assert "\nimport os" not in snippet(plan, "peft") + snippet(plan, "axolotl")
