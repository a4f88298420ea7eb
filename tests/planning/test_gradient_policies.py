"""Ranks by what the loss says: by hand, and where it was planted."""

import pytest
import torch
from torch import nn

import lora_init
from lora_init.collection.collect import collect
from lora_init.planning.allocate import allocate_ranks
from lora_init.statistics.gradient_spectrum import GradientSpectrum
from tests.collection.made import labelled
from tests.conftest import refused, tiny_llama

RANK = 4


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, batches = tiny_llama(), labelled("llama")
    # All directions, so that what is tested is the start and not the decomposition.
    return model, batches, collect(model, batches, rank=16, rho=3.0, gradients=True, center=False)


class Three(nn.Module):
    """q, k and v read one tensor; the loss weighs what they say as it is told."""

    def __init__(self, weights):
        super().__init__()
        for name in "qkv":
            setattr(self, name, nn.Linear(12, 12, bias=False))
        self.k.weight = nn.Parameter(self.q.weight.detach().clone())
        self.weights = weights

    def forward(self, x):
        return sum(weight * getattr(self, name)(x).square().sum(-1).mean() for name, weight in self.weights.items())


def planted_statistics(q, k, v):
    torch.manual_seed(0)
    model = Three({"q": q, "k": k, "v": v})
    data = [torch.randn(64, 12) * 0.8 ** torch.arange(12) for _ in range(8)]
    return collect(model, data, rank=4, gradients=True, tolerance=0.0, loss=lambda output, batch: output)


@pytest.mark.parametrize("policy", ["gradient", "gradient-per-parameter", "gora"])
def test_q_k_and_v_differ_where_the_loss_does_and_tie_where_it_does_not(policy):
    stats = planted_statistics(1.0, 1.0, 0.1)
    ranks = allocate_ranks(stats, rank=4, policy=policy)
    assert abs(ranks["q"] - ranks["k"]) <= 1 and ranks["v"] < ranks["k"] and sum(ranks.values()) == 12
    # Whoever is last in the order of the layers gets less only where the budget ends in a tie.
    assert allocate_ranks(stats, rank=4, policy="eva")["v"] == 4
    tied = allocate_ranks(stats, rank=4, policy=policy, tie=("q", "k", "v"))
    assert set(tied.values()) == {4}
    other = allocate_ranks(planted_statistics(0.1, 0.1, 1.0), rank=4, policy=policy)
    assert other["v"] > other["q"] and other["v"] > other["k"]


def test_policies_by_hand(case):
    """The greedy rule: the best total of squared gradient for a budget of ranks, or of parameters."""
    stats = case[2]
    gains = {name: stats.gradient(name).weighted.explained_variance for name in stats}
    plan = allocate_ranks(stats, rank=RANK, policy="gradient")
    best = torch.cat([gain[: 2 * RANK] for gain in gains.values()]).sort(descending=True).values[: RANK * len(stats)]
    assert float(sum(gains[n][:r].sum() for n, r in plan.items())) == pytest.approx(float(best.sum()), rel=1e-9)
    per_parameter = allocate_ranks(stats, parameters=2000, policy="gradient-per-parameter")
    cost = {name: target.cost for name, target in stats.targets.items()}
    taken = min(float(gains[n][r - 1]) / cost[n] for n, r in per_parameter.items() if r)
    left = max((float(gains[n][r]) / cost[n] for n, r in per_parameter.items() if r < min(len(gains[n]), 5)), default=0)
    spare = 2000 - per_parameter.parameters
    assert taken >= left or spare < max(cost.values())


def test_gora_by_hand(case):
    """Ranks in proportion to |W * G| / sqrt(d_in + d_out), which leaves no layer further than one rank from it."""
    stats = case[2]
    claims = {n: stats.gradient(n).importance / stats.targets[n].cost ** 0.5 for n in stats}
    plan = allocate_ranks(stats, rank=RANK, rho=10.0, policy="gora")
    share = RANK * len(stats) / sum(claims.values())
    assert len(set(plan.values())) > 1
    for name, rank in plan.items():
        assert abs(rank - min(share * claims[name], 48)) <= 1.0


def test_gora_needs_plain_weights(case):
    stats = case[2]
    gone = {n: GradientSpectrum(**{**vars(stats.gradient(n)), "importance": 0.0}) for n in stats}
    blind = lora_init.Statistics(
        {n: stats[n] for n in stats}, {n: n for n in stats}, stats.targets, stats.provenance, gradients=gone
    )
    refused("worth nothing, since the weights are quantized", allocate_ranks, blind, rank=2, policy="gora")


def test_gora_needs_the_weights_that_a_merge_does_not_have(case):
    """A merge of one part with itself would count rows twice, so the parts are two."""
    model, batches, _ = case
    options = dict(rank=2, rho=3.0, gradients=True, tolerance=0.0)
    parts = [
        collect(model, part, ["q_proj"], data=str(i), **options) for i, part in enumerate((batches[:2], batches[2:]))
    ]
    merged = parts[0].merge(parts[1])
    words = (
        "^policy='gora': the importance of 'model.layers.0.self_attn.q_proj' is unknown. .* a merge of statistics does"
    )
    refused(words, allocate_ranks, merged, rank=2, policy="gora")
    assert allocate_ranks(merged, rank=2, policy="gradient").total_rank == 4
