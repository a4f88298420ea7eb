"""Policies that other packages bring."""

from functools import partial

import pytest

from lora_init import LoraInitError, Policy, allocate_ranks
from lora_init.cli.ranks import read_variants
from lora_init.planning.policies import POLICIES, find_policy, policy_names
from tests.conftest import refused
from tests.planning.made import llama_like


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
