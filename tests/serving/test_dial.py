"""Strengths do what merged weights do, their gradient is that of finite differences, and a model is left as it was."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lora_init.serving.dial import STRONGEST, example_losses, fit_strengths, label_losses, strengths
from tests.conftest import batches_for, tiny_gpt2, tiny_llama, tiny_t5

KINDS = {
    "plain": (tiny_llama, dict(target_modules=["q_proj", "down_proj"])),
    "rsLoRA": (tiny_llama, dict(target_modules=["q_proj", "v_proj"], use_rslora=True, rank_pattern={"q_proj": 3})),
    "alphas": (tiny_llama, dict(target_modules=["q_proj", "v_proj"], alpha_pattern={"layers.1.self_attn.v_proj": 3})),
    "embedding": (tiny_llama, dict(target_modules=["embed_tokens", "q_proj"])),
    "Conv1D": (tiny_gpt2, dict(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "encoder-decoder": (tiny_t5, dict(target_modules=["q", "wo"])),
}  # fmt: skip


def trained_model(kind="plain", dtype=torch.float64):
    make, settings = KINDS[kind]
    model = get_peft_model(make(), LoraConfig(**{"r": 4, "lora_alpha": 8, "lora_dropout": 0.1} | settings)).to(dtype)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    return model, batches_for("t5" if kind == "encoder-decoder" else "llama")


def own_strengths(model):
    """Another strength for each layer, 0 among them."""
    names = [
        name.removesuffix(".lora_A") for name, _ in model.get_base_model().named_modules() if name.endswith("lora_A")
    ]
    return {name: 0.4 * i for i, name in enumerate(names)}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_strengths_do_what_a_share_of_the_merged_update_does(kind):
    model, batches = trained_model(kind)
    chosen = own_strengths(model)
    with strengths(model, chosen):
        found = example_losses(model, batches)
    with strengths(model, 0.0), model.disable_adapter():
        base = example_losses(model, batches)
    with strengths(model, 0.0):
        torch.testing.assert_close(example_losses(model, batches), base, atol=0, rtol=0)
    updates = {name: model.get_base_model().get_submodule(name).get_delta_weight("default") for name in chosen}
    plain = model.unload()
    for name, value in chosen.items():
        plain.get_submodule(name).weight += value * updates[name]
    expected = example_losses(plain, batches)
    assert (expected - base).abs().max() > 1e-3  # there is something to get wrong
    # token losses are computed in float32, of logits in float64
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-6)


def mean(losses, labelled):
    return losses.sum() / labelled.sum()


@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_takes_the_steps_of_adam_on_the_true_gradient(kind):
    model, batches = trained_model(kind)
    start, (task, keep) = own_strengths(model), (batches[:2], batches[2:])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainable = [p.requires_grad for p in model.parameters()]
    model.train()
    found = fit_strengths(model, task, keep, 0.5, start, steps=3)
    assert model.training and trainable == [p.requires_grad for p in model.parameters()]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    values = {name: torch.tensor(value, requires_grad=True) for name, value in start.items()}
    adam = torch.optim.Adam(values.values(), lr=0.06)
    model.eval()
    for step in range(3):
        adam.param_groups[0]["lr"] = 0.06 * (1 - step / 3)
        adam.zero_grad()
        with strengths(model, values):
            sum(w * mean(*label_losses(model, part[step % 2])) for w, part in ((1, task), (0.5, keep))).backward()
        adam.step()
        for value in values.values():
            value.data.clamp_(0, STRONGEST)
    assert found == pytest.approx({name: value.item() for name, value in values.items()}, abs=1e-4)
    assert found != pytest.approx(start, abs=1e-2)


def test_the_gradient_of_a_strength_is_that_of_finite_differences():
    model, (batch, *_) = trained_model()
    model.eval()
    chosen = own_strengths(model)
    name = [*chosen][-1]
    value = torch.tensor(chosen[name], dtype=torch.float64, requires_grad=True)
    with strengths(model, chosen | {name: value}):
        (slope,) = torch.autograd.grad(mean(*label_losses(model, batch)), value)
    ends = []
    for shift in (-0.02, 0.02):
        with strengths(model, chosen | {name: chosen[name] + shift}), torch.no_grad():
            ends.append(float(mean(*label_losses(model, batch))))
    assert float(slope) == pytest.approx((ends[1] - ends[0]) / 0.04, rel=0.02)  # losses are float32


def test_strengths_are_taken_back_after_an_error():
    model, batches = trained_model()
    expected = example_losses(model, batches)
    with pytest.raises(RuntimeError, match="stop"), strengths(model, 0.3):
        assert not torch.equal(example_losses(model, batches), expected)
        raise RuntimeError("stop")
    assert torch.equal(example_losses(model, batches), expected)
