"""Adapters that `add_adapter` of transformers and diffusers has put into a model: filled in place."""

import copy
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model

import lora_init
from lora_init.adapters.init_config import InitConfig
from lora_init.adapters.model_handles import handle_of
from lora_init.adapters.peft_model import adapter_layers, fill_in_place
from tests.adapters.made import made_up_statistics
from tests.conftest import batches_for, refused, tiny_bert, tiny_llama
from tests.trainers.made import CONFIG, add_adapter


def test_the_layers_are_filled_and_stay_the_same_objects():
    plain, batches = tiny_llama(), batches_for("llama")
    model = add_adapter(copy.deepcopy(plain))
    with torch.no_grad():
        before = model(**batches[0]).logits
    parameters = {name: id(p) for name, p in model.named_parameters()}
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert lora_init.initialize(model, batches) is model
    assert {name: id(p) for name, p in model.named_parameters()} == parameters  # an optimizer may hold them
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable
    assert torch.equal(model(**batches[0]).logits, before)
    expected = lora_init.initialize(plain, batches, rank=4, rho=1, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    theirs = adapter_layers(expected)
    for name, layer in adapter_layers(model).items():
        assert torch.equal(layer.lora_A["default"].weight, theirs[name].lora_A["default"].weight)
        assert layer.scaling == theirs[name].scaling


def used():
    model = add_adapter(tiny_llama())
    for layer in adapter_layers(model).values():
        layer.lora_B["default"].weight.data += 1.0
    return model


def applied(model, ranks=4, alpha=8, targets=("q_proj", "v_proj"), **more):
    stats = lora_init.collect(tiny_llama(), batches_for("llama"), [*targets], rank=8)
    return lora_init.build_adapter(stats, ranks, lora_alpha=alpha, **more).apply(model)


def filled(model, **options):
    return lora_init.initialize(model, batches_for("llama"), **options)


def twice(model):
    inject_adapter_in_model(LoraConfig(**CONFIG), model, "second")
    return model


def with_two():
    return twice(add_adapter(tiny_llama()))


def fresh():
    return add_adapter(tiny_llama())


REFUSED = {
    "in use": (lambda: filled(used()), "the adapter on the model is no fresh one: B is not zero"),
    "in use, applied": (lambda: applied(used()), "the adapter on LlamaForCausalLM is no fresh one"),
    "two": (lambda: filled(with_two()), "has the adapters default, second"),
    "two, applied": (lambda: applied(with_two()), "has the adapters default, second, and one is expected"),
    "ranks that move": (lambda: filled(fresh(), rho=2), "rho=2: the adapter on Llama.* keeps the rank"),
    "another rank": (lambda: filled(fresh(), rank=8), "rank=8: the adapter on the model decides that"),
    "a config": (lambda: filled(fresh(), config=LoraConfig()), "this one has an adapter with a Lora"),
    "changes the base": (
        lambda: filled(fresh(), method="lora-ga"), "an adapter from add_adapter.. is saved without"
    ),
    "ranks, applied": (lambda: applied(fresh(), 8, 16), "has rank 4 and scaling 2, the start 8 and 2"),
    "scaling, applied": (lambda: applied(fresh(), 4, 4), "scaling 2, the start 4 and 1"),
    "layers, applied": (
        lambda: applied(fresh(), targets=["q_proj", "k_proj"]),
        "has other layers than the start; first of 4",
    ),
    "a PeftModel": (
        lambda: filled(get_peft_model(tiny_llama(), LoraConfig(**CONFIG))), r"has an adapter. Call its unload\(\)"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_filled_is_refused(case):
    make, message = REFUSED[case]
    refused(message, make)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.filterwarnings("ignore:batch 1 failed")
def test_a_pass_that_ends_early_leaves_the_adapter_that_was_there(error):
    def ends_early():
        yield batches_for("llama")[0]
        raise error

    model = fresh()
    before = {name: (type(module), id(module)) for name, module in model.named_modules()}
    with pytest.raises(error):
        lora_init.initialize(model, ends_early())
    assert {name: (type(module), id(module)) for name, module in model.named_modules()} == before


def test_transformers_saves_and_loads_what_was_filled(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    model = add_adapter(type(tiny_llama()).from_pretrained(tmp_path / "base"))
    lora_init.initialize(model, batches_for("llama"))
    for layer in adapter_layers(model).values():
        layer.lora_B["default"].weight.data.normal_()
    try:
        model.save_pretrained(tmp_path / "adapter")
    except ValueError as error:
        pytest.skip(f"transformers cannot save an adapter of its own with this PEFT: {error}")
    again = type(model).from_pretrained(tmp_path / "base")
    again.load_adapter(str(tmp_path / "adapter"))
    batch = batches_for("llama")[0]
    assert torch.equal(model.eval()(**batch).logits, again.eval()(**batch).logits)


def test_a_start_whose_b_is_not_zero_is_filled_in_with_it():
    stats = lora_init.collect(
        tiny_llama(), batches_for("llama"), ["q_proj", "v_proj"], rank=4, gradients=True, progress=False
    )
    init = lora_init.build_adapter(stats, 4, "lora-one", lora_alpha=8)
    model = fresh()
    fill_in_place(model, init)
    for name, layer in adapter_layers(model).items():
        a, b = init.weights[name]
        assert b.any()
        assert torch.equal(layer.lora_A["default"].weight, a) and torch.equal(layer.lora_B["default"].weight, b)


def test_a_rho_of_one_says_what_the_layers_have():
    model = fresh()
    assert filled(model, rho=1) is model


# What a user freezes of an adapter on a classifier, or lets train; whether A counts as frozen; whether the head trains.
FROZEN = {
    "nothing": ([], False, None),
    "one A": (["layer.0.attention.self.query.lora_A"], False, None),
    "one B": (["layer.0.attention.self.query.lora_B"], False, None),
    "all A": ([".lora_A."], True, None),
    "the head": ([".modules_to_save."], False, False),
    "a part of the head": ([".modules_to_save.default.bias"], False, None),
    "all": ([""], False, None),
}


@pytest.mark.parametrize("case", FROZEN)
def test_what_trains_of_an_adapter_stays_so_and_its_type_too(case):
    frozen, freeze_a, trains_head = FROZEN[case]
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = get_peft_model(tiny_bert(), config)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.bfloat16()
        if "LayerNorm.weight" in name:
            parameter.requires_grad_(True)
    fresh = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and not any(part in name for part in frozen))
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    handle = handle_of(model)
    with handle.opened(InitConfig()) as options:
        assert (options.shape.freeze_a, handle.trains_head) == (freeze_a, trains_head)
        stats = made_up_statistics(handle.model, ["query", "value"], task_type="SEQ_CLS")
        adapted = handle.put(lora_init.build_adapter(stats, 2, lora_alpha=4, freeze_a=freeze_a), "other")
    after = {name.replace(".other.", ".default."): one for name, one in adapted.named_parameters()}
    if case == "all":  # it was loaded to be served, and is to be trained now
        before = {name: trains and "LayerNorm" not in name for name, trains in fresh.items()}
    assert {name: parameter.requires_grad for name, parameter in after.items()} == before
    assert {parameter.dtype for name, parameter in after.items() if ".lora_" in name} == {torch.bfloat16}


@pytest.mark.parametrize("freeze_a", [True, False])
def test_a_is_frozen_on_an_adapter_that_is_there_where_it_is_asked_for(freeze_a):
    handle = handle_of(get_peft_model(tiny_llama(), LoraConfig(**CONFIG)))
    with handle.opened(InitConfig()):
        stats = made_up_statistics(handle.model, CONFIG["target_modules"])
        adapted = handle.put(lora_init.build_adapter(stats, 4, lora_alpha=8, freeze_a=freeze_a), "default")
    for name, parameter in adapted.named_parameters():
        assert parameter.requires_grad is (".lora_B." in name or (".lora_A." in name and not freeze_a)), name


@pytest.mark.parametrize("name", ["default", "mine"])
def test_a_is_frozen_in_an_adapter_of_any_name(name):
    """One from `add_adapter` has its own."""
    model = tiny_llama()
    inject_adapter_in_model(LoraConfig(**CONFIG), model, name)
    model._hf_peft_config_loaded = True
    lora_init.initialize(model, batches_for("llama"), freeze_a=True)
    trains = {layer: parameter.requires_grad for layer, parameter in model.named_parameters() if ".lora_" in layer}
    assert len(trains) == 8 and all(flag is (f".lora_B.{name}." in layer) for layer, flag in trains.items())


def test_an_adapter_that_is_filled_keeps_its_name():
    model = fresh()
    words = "^adapter_name='other': the adapter on LlamaForCausalLM is named 'default', and keeps its name. Leave"
    refused(words, filled, model, adapter_name="other")
    assert [*adapter_layers(filled(model, adapter_name="default"))] == [*adapter_layers(fresh())]


@pytest.mark.parametrize("name", ["mine.x", "a", "", 1, ["mine"]])
def test_a_name_that_peft_cannot_save_is_refused_before_a_batch_is_read(name):
    words = re.escape(f"adapter_name={name!r}: use a word without dots that is not a part of 'lora_'.")
    refused(words, lora_init.initialize, tiny_llama(), iter([]), adapter_name=name)
    refused(words, handle_of(get_peft_model(tiny_llama(), LoraConfig(**CONFIG))).name_of_adapter, name)


@pytest.mark.parametrize(("asked_for", "name"), [(None, "mine"), ("other", "other"), ("mine", "mine")])
def test_a_fresh_adapter_that_is_replaced_leaves_its_name(asked_for, name):
    handle = handle_of(get_peft_model(tiny_llama(), LoraConfig(**CONFIG), adapter_name="mine"))
    assert handle.name_of_adapter(asked_for) == name
    assert handle_of(tiny_llama()).name_of_adapter(asked_for) == (asked_for or "default")
