"""How large inputs and outputs of layers are: what a learning rate follows from."""

import pytest
import torch
from torch import nn

from lora_init import collect
from tests.adapters.made import batches, tiny
from tests.conftest import tiny_llama


def test_sizes_are_those_of_the_tokens_that_count_without_the_bias():
    model, data = tiny(), batches(3)
    whole, hidden = torch.cat(data), tiny()[:2](torch.cat(data))
    found = collect(model, data, rank=2).sizes
    assert found["0"].input == pytest.approx(float(whole.abs().sum(1).mean()), rel=1e-6)
    assert found["0"].output == pytest.approx(float((whole @ model[0].weight.T).square().mean().sqrt()), rel=1e-6)
    assert found["2"].output == pytest.approx(float((hidden @ model[2].weight.T).square().mean().sqrt()), rel=1e-6)


def test_sizes_are_of_rows_however_they_are_laid_out():
    flat = batches(3)
    laid = [rows.reshape(2, -1, 2, rows.shape[-1]) for rows in flat]
    one, two = (collect(tiny(), data, rank=2).sizes for data in (flat, laid))
    assert {name: pytest.approx(pair, rel=1e-6) for name, pair in one.items()} == two


def test_padding_does_not_count():
    llama, tokens = tiny_llama(), {"input_ids": torch.randint(3, 64, (4, 12))}
    padded = {**tokens, "input_ids": nn.functional.pad(tokens["input_ids"], (0, 5), value=7)}
    padded["attention_mask"] = nn.functional.pad(torch.ones_like(tokens["input_ids"]), (0, 5))
    one, two = (collect(llama, [batch], rank=2).sizes for batch in (tokens, padded))
    assert {name: pytest.approx(pair, rel=1e-4) for name, pair in one.items()} == two


def test_a_batch_that_failed_leaves_no_trace_in_the_sizes():
    def forward(model, batch):
        model[0](batch) if len(batch) == 4 else model(batch)
        if len(batch) == 4:  # when one layer has run
            raise RuntimeError("broken")

    bad = [*batches(2), torch.ones(4, 16, dtype=torch.float64), *batches(4)[2:]]
    found = collect(tiny(), bad, rank=2, skip_bad_batches=1, forward=forward)
    assert found.sizes == collect(tiny(), batches(), rank=2).sizes
