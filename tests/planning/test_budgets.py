"""Budgets: what each is in ranks, parameters or bytes, in words, and what one rank costs."""

import numpy as np
import pytest

from lora_init.planning.budgets import Budget, bytes_per_parameter, choose_budget, costs
from tests.conftest import refused

COUNTS = dict(n_layers=3, default_rank=5, n_parameters=1001, dtype="bfloat16", coverage="total")


@pytest.mark.parametrize(("given", "budget", "words"), [
    ({}, Budget("rank", 5, "ranks", 15), "rank=5"),
    ({"rank": "2"}, Budget("rank", 2, "ranks", 6), "rank=2"),
    ({"total_rank": 7}, Budget("total_rank", 7, "ranks", 7), "total_rank=7"),
    ({"parameters": "1.5k"}, Budget("parameters", 1500, "parameters", 1500), "parameters=1,500"),
    ({"parameters": "0.5B"}, Budget("parameters", 500_000_000, "parameters", 500_000_000), "parameters=500,000,000"),
    ({"parameters": "2g"}, Budget("parameters", 2 * 10**9, "parameters", 2 * 10**9), "parameters=2,000,000,000"),
    ({"parameters": 10**12}, Budget("parameters", 10**12, "parameters", 10**12), "parameters=1,000,000,000,000"),
    ({"fraction": 0.0105}, Budget("fraction", 0.0105, "parameters", 10), "fraction=0.0105"),  # not above what was asked
    ({"fraction": 1}, Budget("fraction", 1.0, "parameters", 1001), "fraction=1.0"),
    ({"megabytes": 2.0000006}, Budget("megabytes", 2.0000006, "bytes", 2_000_001, "bfloat16"),
     "megabytes=2.0000006 in bfloat16"),
    ({"megabytes": 3}, Budget("megabytes", 3.0, "bytes", 3_000_000, "bfloat16"), "megabytes=3.0 in bfloat16"),
    ({"variance": 1}, Budget("variance", 1.0, "variance", 1.0, coverage="total"), "variance=1.0 over all layers"),
])  # fmt: skip
def test_each_budget_is_a_limit_in_a_unit(given, budget, words):
    found = choose_budget(dict.fromkeys(("rank", "megabytes")) | given, **COUNTS)
    assert found == budget and str(found) == words and type(found.limit) is type(budget.limit)
    assert found.option == {budget.kind: budget.asked}


def test_a_share_of_every_layer_says_so():
    every = choose_budget({"variance": 0.5}, **COUNTS | {"coverage": "every-layer"})
    assert str(every) == "variance=0.5 in every layer"


@pytest.mark.parametrize(("kind", "most"), [("fraction", "1"), ("variance", "1"), ("megabytes", "1,000,000,000,000")])
@pytest.mark.parametrize("value", [0, -0.5, float("nan"), "0.5", 1.1e12])
def test_a_share_or_a_size_is_a_number_above_zero(kind, most, value):
    words = f"^{kind}=.*: a number above 0 and not above {most} is needed.$"
    refused(words, choose_budget, {kind: value}, **COUNTS)


def test_all_budgets_that_were_given_are_named():
    refused("^rank=1 and variance=2 are 2 budgets. Give one.$", choose_budget, {"rank": 1, "variance": 2}, **COUNTS)
    given = {"rank": 1, "fraction": 0.5, "megabytes": 2}
    refused("^rank=1 and fraction=0.5 and megabytes=2 are 3 budgets. Give one.$", choose_budget, given, **COUNTS)


def test_a_fraction_of_an_unknown_size_is_refused():
    words = (
        "^fraction=0.5 needs the size of the base model, which these statistics do not hold. Give parameters= "
        "instead, or collect them again.$"
    )
    refused(words, choose_budget, {"fraction": 0.5}, **COUNTS | {"n_parameters": 0})
    assert choose_budget({"fraction": 1.0}, **COUNTS | {"n_parameters": 1}).limit == 1


@pytest.mark.parametrize(("kind", "unit", "dtype", "each"), [
    ("total_rank", "ranks", "float32", [1, 1]),
    ("variance", "variance", "float32", [1, 1]),
    ("fraction", "parameters", "float16", [30, 50]),
    ("megabytes", "bytes", "float16", [60, 100]),
    ("megabytes", "bytes", "bfloat16", [60, 100]),
    ("megabytes", "bytes", "float32", [120, 200]),
])  # fmt: skip
def test_a_rank_costs_the_unit_of_its_budget(kind, unit, dtype, each):
    found = costs(Budget(kind, 1, unit, 1, dtype), np.array([30, 50]))
    assert found.tolist() == each and found.dtype == np.int64


def test_a_type_of_no_adapter_is_refused():
    refused("dtype='float' is unknown. Did you mean float32", bytes_per_parameter, "float")
