"""Frozen layers by another library: the same outputs and gradients, and gone afterwards."""

import pytest
import torch
from torch import nn

from lora_init.frozen_linear import frozen_layers_by_onednn
from tests.conftest import MODELS, batches_for


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_loss_and_gradients_of_an_adapter_are_the_same(name):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(MODELS[name](), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    batch = batches_for(name, n_batches=1)[0]
    batch["labels"] = torch.tensor([0, 1, 1, 0]) if name == "bert" else batch["labels"]

    def step():
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    plain = step()
    with frozen_layers_by_onednn(model):
        assert any("forward" in vars(module) for module in model.modules())
        fast = step()
    assert not any("forward" in vars(module) for module in model.modules())
    assert len(plain) == len(fast) > 5
    for one, other in zip(plain, fast, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


def test_layers_that_train_and_other_types_are_left_alone_and_an_exception_changes_nothing():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 3).double())
    model[2].requires_grad_(False)
    with pytest.raises(ZeroDivisionError), frozen_layers_by_onednn(model):
        assert ["forward" in vars(layer) for layer in model] == [False, True, False]
        raise ZeroDivisionError
    assert not any("forward" in vars(layer) for layer in model)


def test_under_autocast_the_layer_does_what_it_does_without():
    layer = nn.Linear(3, 3).requires_grad_(False)
    x = torch.randn(2, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = layer(x)
        with frozen_layers_by_onednn(layer):
            assert torch.equal(layer(x), plain)
            assert layer(x).dtype == torch.bfloat16
