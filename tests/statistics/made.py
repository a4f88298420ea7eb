"""Models, batches and helpers that several tests of statistics need."""

import torch

from lora_init import ExactPCA, collect
from tests.conftest import batches_for, tiny_llama


def llama():
    torch.manual_seed(0)
    return tiny_llama()


def passed(model=None, batches=None, targets=("q_proj", "k_proj", "down_proj", "embed_tokens"), **settings):
    settings = dict(rank=4, rho=2.0, data="d") | settings
    batches = batches_for("llama") if batches is None else batches
    return collect(model or llama(), batches, list(targets), **settings)


def spectrum_of(width=12, k=4, n=200, mean=3.0):
    # Condition 1e4, and a mean far larger than the spread of most directions.
    rows = torch.randn(n, width, dtype=torch.float64) * torch.logspace(1, -3, width, dtype=torch.float64) + mean
    return ExactPCA(k).partial_fit(rows).spectrum()


def dense(spectrum):
    v, m, rest = spectrum.components.double(), spectrum.mean.double(), spectrum.noise_variance
    return (
        v.T @ torch.diag(spectrum.explained_variance - rest) @ v + torch.outer(m, m) + rest * torch.eye(len(m)).double()
    )
