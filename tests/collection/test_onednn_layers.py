"""Linear layers by another library: the same outputs and gradients, and gone afterwards."""

import pytest
import torch
from torch import nn

from lora_init.collection.backward import linear_layers_by_onednn
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
    with linear_layers_by_onednn(model):
        assert any("forward" in vars(module) for module in model.modules())
        fast = step()
    assert not any("forward" in vars(module) for module in model.modules())
    assert len(plain) == len(fast) > 5
    for one, other in zip(plain, fast, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


def test_layers_of_other_types_are_left_alone_and_an_exception_changes_nothing():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).bfloat16(), nn.Linear(3, 3).double(), nn.Conv1d(3, 3, 1))
    with pytest.raises(ZeroDivisionError), linear_layers_by_onednn(model):
        assert ["forward" in vars(layer) for layer in model] == [True, True, False, False]
        raise ZeroDivisionError
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 4), (2, 1, 3, 4), (0, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_that_trains_has_the_gradients_that_torch_gives_it(shape, bias):
    layer, x = nn.Linear(4, 7, bias=bias), torch.randn(shape, requires_grad=True)

    def gradients():
        found = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
        return [gradient.clone() for gradient in found]

    plain = gradients()
    with linear_layers_by_onednn(layer):
        for one, other in zip(gradients(), plain, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_base_weights_in_bfloat16_differ_by_rounding_alone():
    layer, x = nn.Linear(64, 32).bfloat16().requires_grad_(False), torch.randn(2, 9, 64).bfloat16().requires_grad_()
    plain = layer(x)
    (of_plain,) = torch.autograd.grad(plain.float().sum(), x)
    with linear_layers_by_onednn(layer):
        fast = layer(x)
        (of_fast,) = torch.autograd.grad(fast.float().sum(), x)
    assert fast.dtype == torch.bfloat16
    torch.testing.assert_close(fast, plain, rtol=2**-7, atol=2**-7)  # the last bit of a bfloat16
    torch.testing.assert_close(of_fast, of_plain, rtol=2**-7, atol=2**-7)


def test_under_autocast_the_layer_does_what_it_does_without():
    layer = nn.Linear(3, 3).requires_grad_(False)
    x = torch.randn(2, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = layer(x)
        with linear_layers_by_onednn(layer):
            assert torch.equal(layer(x), plain)
            assert layer(x).dtype == torch.bfloat16
