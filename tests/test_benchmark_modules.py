"""Benchmarks are run by hand; what they use of the package has to be there all the same."""

import importlib
from pathlib import Path

import pytest
import torch

from lora_init.collection.collect import collect
from lora_init.comparison import workbench
from lora_init.statistics.incremental_svd import IncrementalSVD
from tests.conftest import batches_for, tiny_llama

MODULES = sorted(file.stem for file in (Path(__file__).parent.parent / "benchmarks").glob("[!_]*.py"))


@pytest.mark.parametrize("name", MODULES)
def test_it_can_be_imported(name):
    importlib.import_module(f"benchmarks.{name}")


def test_statistics_of_ideas_weight_rows_by_a_power_of_the_gradient(monkeypatch):
    from benchmarks import ideas

    monkeypatch.setattr(IncrementalSVD, "project", IncrementalSVD.project)
    monkeypatch.setattr(workbench, "collect", workbench.collect)
    model, settings = tiny_llama(), {"rank": 4, "gradients": True, "target_modules": ["q_proj"]}
    plain = collect(model, batches_for("llama"), **settings)
    ideas.vary(0.0, "labels")
    flat = collect(model, batches_for("llama"), **settings)
    for name in plain:
        spectrum = flat.gradient(name).weighted  # of the rows themselves, not centred
        share = (spectrum.n_samples - 1) / spectrum.n_samples
        about_zero = plain[name].total_variance * share + float(plain[name].mean.square().sum())
        assert spectrum.total_variance * share == pytest.approx(about_zero, rel=1e-4)
        assert not torch.allclose(spectrum.components, plain.gradient(name).weighted.components, atol=0.1)
