"""Policies that other packages bring."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from lora_init import LoraInitError, Policy, allocate_ranks
from lora_init.cli.ranks import read_variants
from lora_init.planning.policies import POLICIES, find_policy, policy_names
from lora_init.planning.spectra import stack_spectra
from tests.conftest import refused
from tests.planning.made import llama_like, statistics


@pytest.fixture
def packages(installed):
    return partial(installed, "lora_init.policies")


def doubled(numbers, widths):
    return 2.0 * numbers / widths[:, None]


def test_a_policy_of_another_package_is_used_by_its_name(packages):
    packages(narrow=Policy(doubled), mirrored=Policy(lambda numbers, widths: numbers[:, ::-1]))
    assert policy_names() == (*POLICIES, "narrow", "mirrored")
    stats = llama_like(2)
    plan = allocate_ranks(stats, parameters=4000, policy="narrow")
    assert dict(plan) == dict(allocate_ranks(stats, parameters=4000, policy="cost-aware")) and plan.policy == "narrow"
    assert dict(allocate_ranks(stats, rank=4, policy="mirrored")) == dict(allocate_ranks(stats, rank=4, rho=2))
    assert read_variants(["narrow"], {"rank": 4})["narrow"]["policy"] == "narrow"


def test_worths_by_hand():
    """Three layers; the last one's rows are constant, and it claims nothing."""
    ratios, widths = np.array([[0.5, 0.5], [0.6, 0.0], [0.0, 0.0]]), np.array([4.0, 16.0, 9.0])
    falling = [2.0, 2 / 3]  # 1 / (j - 1/2)
    worths = {name: policy.function(ratios, widths) for name, policy in POLICIES.items()}
    np.testing.assert_allclose(worths.pop("uniform"), [falling] * 3)
    np.testing.assert_allclose(worths.pop("proportional"), np.outer([2.0, 1 / 0.36, 0.0], falling))
    np.testing.assert_allclose(worths.pop("gora"), np.outer([0.25, 0.15, 0.0], falling))
    assert all(worth is ratios for worth in worths.values())
    assert {name for name, policy in POLICIES.items() if policy.per_parameter} == {
        "cost-aware",
        "gradient-per-parameter",
    }
    assert {name for name, policy in POLICIES.items() if policy.needs_gradient} == {
        "gradient", "gradient-per-parameter", "gora",
    }  # fmt: skip


def test_a_layer_of_few_components_is_worth_nothing_beyond_them():
    stats = statistics({"a": [0.5, 0.25], "b": [0.4, 0.3, 0.2], "c": [0.0]}, [(6, 2), (5, 5), (1, 2)], total=0.0)
    stats.groups["b"] = replace(stats.groups["b"], total_variance=1.0, explained_variance=torch.tensor([0.4, 0.3, 0.2]))
    found = stack_spectra(stats, ["b", "a", "c"])
    assert found.names == ["b", "a", "c"] and found.widths.tolist() == [10, 8, 3] and found.most_collected == 3
    np.testing.assert_allclose(found.ratios, [[0.4, 0.3, 0.2], [0, 0, 0], [0, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(found.reached, [[0, 0.4, 0.7, 0.9], [1, 1, 1, 1], [1, 1, 1, 1]], rtol=1e-6)
    np.testing.assert_allclose(found.reached_at(np.array([2, 0, 3])), [0.7, 1.0, 1.0], rtol=1e-6)
    assert found.collected.tolist() == [3, 2, 1] and found.starved.tolist() == [False, True, False]


@pytest.mark.parametrize(("about", "starved"), [
    (dict(rank=1, n_samples=0), [True, False]),
    (dict(rank=3, n_samples=0), [True, False]),
    (dict(rank=4, n_samples=0), [True, True]),  # four were asked for, and there are three
    (dict(rank=2, settings={"rho": 1.75}), [True, True]),
    (dict(rank=2, settings={"rho": 1.5}), [True, False]),
    (dict(rank=1, n_samples=4), [True, True]),  # no more than four rows
    (dict(rank=1, n_samples=5), [True, False]),
])  # fmt: skip
def test_a_layer_is_starved_that_has_fewer_than_were_asked_for(about, starved):
    stats = statistics({"a": [0.5, 0.25], "b": [0.4, 0.3, 0.2]}, **about)
    assert stack_spectra(stats, ["a", "b"]).starved.tolist() == starved
    assert stack_spectra(stats, []).ratios.shape == (0, 0)


@pytest.mark.parametrize(("policy", "said"), [
    (Policy(lambda numbers: numbers), r"its function takes \(numbers\), and is called with \(numbers, widths\)"),
    (Policy(doubled, reads=lambda: [1.0]), r"its reads takes \(\), and is called with \(statistics, name\)"),
    (doubled, "theirs:THING is no lora_init.Policy"),
    (ImportError("no jax"), "cannot be imported: ImportError: no jax."),
    (Policy(lambda numbers, widths: numbers[:1]), r"'odd' returned numbers of shape \(1, 8\), 8 of them finite"),
    (Policy(lambda numbers, widths: 1 / 0), "policy 'odd' raised ZeroDivisionError: division by zero"),
])  # fmt: skip
def test_what_is_wrong_with_one_is_one_line_with_its_name(packages, policy, said):
    packages(odd=policy)
    assert "odd" in refused(said, allocate_ranks, llama_like(2), rank=4, policy="odd")
    assert find_policy("eva") is POLICIES["eva"]


def test_worths_are_told_apart_to_the_last_digit():
    def rule(name, spectrum):
        return [0.5 + 1e-12 * (name == "b")]

    assert dict(allocate_ranks(statistics({"a": [0.5], "b": [0.5]}), total_rank=1, policy=rule)) == {"a": 0, "b": 1}


def test_one_that_has_a_name_of_ours_is_not_used(packages):
    packages(eva=Policy(doubled))
    with pytest.warns(UserWarning, match="policy 'eva' of an unknown package is not used"):
        assert find_policy("eva") is POLICIES["eva"]


def test_a_rule_of_ones_own_that_refuses_is_heard_in_its_own_words():
    def rule(name, spectrum):
        raise LoraInitError("this rule takes no {rank}.", rank=4)

    assert refused("^this rule takes no rank=4.$", allocate_ranks, llama_like(2), rank=4, policy=rule)
    named = "^layer 'model.layers.0.self_attn.q_proj': the policy raised ZeroDivisionError: division by zero"
    refused(named, allocate_ranks, llama_like(2), rank=4, policy=lambda name, spectrum: 1 / 0)
