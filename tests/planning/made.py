"""Statistics that are made up, so that plans can be compared with what they must be."""

import itertools

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st

from lora_init.layers.targets import Target, find_targets
from lora_init.planning.allocate import allocate_ranks
from lora_init.planning.policies import POLICIES
from lora_init.statistics.spectrum import Spectrum
from lora_init.statistics.statistics import Provenance, Statistics
from tests.conftest import tiny_llama

# Plans take a millisecond, but two cores are shared: no deadline.
laws = settings(deadline=None, max_examples=60)
QKV = ("q_proj", "k_proj", "v_proj")
PLAIN = [name for name, policy in POLICIES.items() if not policy.needs_gradient]
WIDE = [[0.2, 0.1, 0.05, 0.02]] * 3


def statistics(ratios, widths=None, group_of=None, total=1.0, **provenance):
    """Statistics whose layers have exactly these explained-variance ratios and (d_in, d_out); no components."""
    ratios = ratios if isinstance(ratios, dict) else {f"h.{i}.up": row for i, row in enumerate(ratios)}
    widths = widths or [(64, 64)] * len(group_of or ratios)
    groups = {
        name: Spectrum(
            torch.zeros(len(row), 1), torch.tensor(row, dtype=torch.float64) * total, total, torch.zeros(1), 9
        )
        for name, row in ratios.items()
    }
    known = {"model_id": "some/model", "model_class": "LlamaForCausalLM", "fingerprint": "f1", "data": "some data"}
    known |= {"target_modules": "all-linear", "rank": 1}
    return Statistics(
        groups,
        group_of or {name: name for name in ratios},
        {name: Target(name, "Linear", *width) for name, width in zip(group_of or ratios, widths, strict=True)},
        Provenance(**(known | provenance)),
    )


KINDS = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (64, 32),
    "mlp.up_proj": (64, 128),
    "mlp.down_proj": (128, 64),
}


def llama_like(n_blocks, k=8, **provenance):
    random = np.random.default_rng(0)
    rows, widths = {}, []
    for block in range(n_blocks):
        for kind, width in KINDS.items():
            rows[f"model.layers.{block}.{kind}"] = sorted(random.dirichlet(np.full(k + 4, 0.5)).tolist())[::-1][:k]
            widths.append(width)
    return statistics(rows, widths, n_samples=500, n_batches=5, **provenance)


def model_and_statistics(task_type=None):
    """A tiny Llama and statistics of all its layers, the ratios of which are made up."""
    model = tiny_llama()
    targets = find_targets(model).layers
    random = np.random.default_rng(0)
    rows = {name: sorted(random.dirichlet(np.ones(12)).tolist(), reverse=True)[:8] for name in targets}
    stats = statistics(rows, task_type=task_type)
    stats.targets.update(targets)
    return model, stats


def full_plan(**changes):
    rows = {f"h.{i}.{kind}": [0.3 / (i + 1), 0.2, 0.1, 0.05] for i in range(2) for kind in QKV}
    stats = statistics(rows, n_samples=1000, **changes)
    return stats, allocate_ranks(
        stats, rho=2, parameters=1000, tie=QKV[:2], overrides={"*.v_proj": {"max_rank": np.int64(1)}},
        exclude=["h.1.v_proj"],
    )  # fmt: skip


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
