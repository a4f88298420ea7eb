"""The adapter on a model: exactly the planned layers, ranks and scalings, or the model as it was."""

import copy
import math
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_init import build_adapter
from lora_init.adapters.directory import AdapterDirectory
from lora_init.adapters.peft_model import (
    adapter_layers,
    as_it_was,
    check_fresh,
    check_modules_to_save,
    fill_in_place,
    load_adapter,
    remember,
    with_adapter,
)
from lora_init.planning.allocate import RankAllocation
from lora_init.starts.starts import find_start
from tests.adapters.made import TASKS, logits, lora_layers, made_up_statistics, same, snapshot, uneven
from tests.conftest import MODELS, batches_for, refused, tiny_bert, tiny_gpt2, tiny_llama

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("method", ["eva", "random", "gaussian", "orthogonal"])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_output_is_unchanged_bit_for_bit(name, method):
    model, batch = MODELS[name](), batches_for(name, 1)[0]
    stats = made_up_statistics(model, task_type=TASKS[name])
    before = logits(model, batch)
    peft_model = build_adapter(stats, uneven(stats), method=method).apply(model)
    assert torch.equal(before, logits(peft_model, batch))
    # and it would not be, were B not zero
    for layer in lora_layers(peft_model).values():
        nn.init.ones_(layer.lora_B["default"].weight)
    assert not torch.equal(before, logits(peft_model, batch))


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_apply_makes_exactly_the_planned_layers(name, use_rslora):
    model = MODELS[name]()
    stats = made_up_statistics(model, task_type=TASKS[name])
    plan = uneven(stats)
    init = build_adapter(stats, plan, lora_alpha=10, use_rslora=use_rslora)
    peft_model = init.apply(model)
    layers = lora_layers(peft_model)
    assert {n: layer.r["default"] for n, layer in layers.items()} == {n: r for n, r in plan.items() if r > 0}
    assert {layer.scaling["default"] for layer in layers.values()} == {10 / (2.0 if use_rslora else 4)}
    for layer_name, (a, b) in init.weights.items():
        weight_a, weight_b = layers[layer_name].lora_A["default"].weight, layers[layer_name].lora_B["default"].weight
        assert torch.equal(weight_a, a) and torch.equal(weight_b, b)
        assert weight_a.requires_grad and weight_b.requires_grad
    trainable = sum(p.numel() for n, p in peft_model.named_parameters() if p.requires_grad and "lora_" in n)
    assert trainable == init.n_parameters() == plan.parameters
    assert sorted(init.left_out) == sorted(n for n, r in plan.items() if r == 0)


@pytest.mark.parametrize("alpha", [1, 16, 32, 7.5])
@pytest.mark.parametrize("base", [3, 6, 7, 16])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_scaling_is_the_same_in_every_layer(alpha, base, use_rslora):
    model = tiny_llama()
    stats = made_up_statistics(model, k=32)
    plan = RankAllocation({n: 1 + 2 * i for i, n in enumerate(stats)}, base)
    layers = lora_layers(build_adapter(stats, plan, lora_alpha=alpha, use_rslora=use_rslora).apply(model))
    expected = alpha / (math.sqrt(base) if use_rslora else base)
    for layer in layers.values():
        assert math.isclose(layer.scaling["default"], expected, rel_tol=1e-15)  # at most the last bit of a float


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_get_float32_adapters_and_the_same_output(dtype):
    model, batch = tiny_llama().to(dtype), batches_for("llama", 1)[0]
    stats = made_up_statistics(model)
    before = logits(model, batch)
    peft_model = build_adapter(stats, uneven(stats)).apply(model)
    assert {p.dtype for n, p in peft_model.named_parameters() if "lora_" in n} == {torch.float32}
    assert torch.equal(before, logits(peft_model, batch))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_dora_keeps_the_output_too(name):
    """The magnitudes are the norms of the same weights that they are divided by, so their ratio is exactly 1."""
    model, batch = MODELS[name](), batches_for(name, 1)[0]
    stats = made_up_statistics(model, task_type=TASKS[name])
    before = logits(model, batch)
    init = build_adapter(stats, uneven(stats), use_dora=True)
    adapted = init.apply(model)
    assert torch.equal(before, logits(adapted, batch))
    assert sum(p.numel() for n, p in adapted.named_parameters() if ".lora_" in n) == init.n_parameters()


def with_part_of(wrap):
    """Make a Llama with one layer in something."""
    model = tiny_llama()
    name = "model.layers.0.self_attn.q_proj"
    model.set_submodule(name, wrap(model.get_submodule(name)))
    return model


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x):
        return self.experts[0](x)


@pytest.mark.parametrize(("other", "message"), [
    (lambda: tiny_llama(num_hidden_layers=1), r"'model.layers.1.self_attn.q_proj' .* not in LlamaForCausalLM"),
    (lambda: tiny_llama(intermediate_size=64), r"gate_proj': the stat.* Linear 32 -> 48, .* Linear 32 -> 64"),
    (tiny_gpt2, r"layer 'model.layers.0.self_attn.q_proj' of the statistics \(from LlamaForCausalLM\) is not in GPT2"),
    (lambda: with_part_of(lambda layer: nn.Embedding(32, 32)), "have Linear 32 -> 32, LlamaForCausalLM has Embedding"),
    (lambda: with_part_of(torch.compile), r"parts that are compiled or wrapped, as 'model\.layers\..*_orig_mod' is"),
])  # fmt: skip
def test_another_model_is_refused_and_left_alone(other, message):
    init = build_adapter(made_up_statistics(tiny_llama()), 4)
    model = other()
    before = snapshot(model)
    refused(message, init.apply, model)
    assert same(before, snapshot(model))


def test_a_model_that_has_an_adapter_is_refused():
    model = tiny_llama()
    init = build_adapter(made_up_statistics(model), 4)
    peft_model = init.apply(model)
    for again, remover in ((peft_model, r"unload\(\) or merge_and_unload\(\)"), (model, r"delete_adapter\(\)")):
        words = f"{type(again).__name__} already has an adapter. Call its {remover} first, or give apply"
        refused(words, init.apply, again)
    model.delete_adapters = lambda names: None  # as models of diffusers have it
    refused(r"Call its delete_adapters\(\) first", init.apply, model)
    del model.delete_adapters
    restored = peft_model.unload()
    assert isinstance(init.apply(restored), peft.PeftModel)


@pytest.mark.parametrize("name", ["", "a.b", "lora_", "a", "ra"])
def test_a_name_of_an_adapter_that_peft_would_lose_is_refused(name):
    """PEFT looks for its prefix in the keys of a file, and torch takes no dot in the name of a module."""
    model = tiny_llama()
    init = build_adapter(made_up_statistics(model, ["q_proj"]), 2)
    refused(f"^adapter_name={name!r}: use a word without dots that is not a part of 'lora_'", init.apply, model, name)
    assert [*init.apply(model, "other").peft_config] == ["other"]


def test_another_convolution_is_described_by_its_kernel():
    def net(width=8, **options):
        return nn.Sequential(nn.Conv2d(4, width, (3, 5), **options), nn.ReLU())

    init = build_adapter(made_up_statistics(net(), ["0"]), 2)
    assert "0" in adapter_layers(init.apply(net()))
    ours = r"have Conv2d 4 -> 8, kernel 3x5, groups 1, Sequential has Conv2d 4 -> "
    refused(ours + "6, kernel 3x5, groups 1. Apply", init.apply, net(6))
    refused(ours + "8, kernel 3x5, groups 2. Apply", init.apply, net(groups=2))


@pytest.mark.parametrize(("change", "words"), [
    (
        dict(target_modules=["model.layers.0.self_attn.q_proj"]),
        "^PEFT adapted other layers of LlamaForCausalLM than planned; first of 1 differences: 'model.layers.1.self_a",
    ),
    (dict(r=3, lora_alpha=6), "^layer 'model.layers.0.self_attn.q_proj': PEFT gave rank 3 and scaling 2, planned 2 an"),
    (dict(lora_alpha=6), "^layer 'model.layers.0.self_attn.q_proj': PEFT gave rank 2 and scaling 3, planned 2 and 2"),
])  # fmt: skip
def test_what_peft_makes_otherwise_than_planned_is_refused_and_taken_off(change, words, monkeypatch):
    model = tiny_llama()
    init = build_adapter(made_up_statistics(model, ["q_proj"]), 2)
    config = init.to_peft_config(model)
    assert config.r == 2 and config.lora_alpha == 4
    vars(config).update(change)
    monkeypatch.setattr(type(init), "to_peft_config", lambda self, model=None: config)
    before = snapshot(model)
    refused(words, init.apply, model)
    assert same(before, snapshot(model))


@pytest.mark.filterwarnings("ignore:Already found a")
def test_two_adapters_on_a_model_are_one_too_many_to_fill():
    model = tiny_llama()
    init = build_adapter(made_up_statistics(model, ["q_proj"]), 2)
    for name in ("first", "second"):
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"])
        peft.inject_adapter_in_model(config, model, name)  # as add_adapter does
    refused("^LlamaForCausalLM has the adapters first, second, and one is expected", fill_in_place, model, init)


def test_a_start_that_changes_the_base_is_not_filled_in_place():
    model = tiny_llama()
    init = replace(build_adapter(made_up_statistics(model, ["q_proj"]), 2), start=find_start("lora-ga"))
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]), model)
    words = (
        "^method='lora-ga' changes the base weights, and an adapter in LlamaForCausalLM is saved without them. Take a"
    )
    refused(words, fill_in_place, model, init)


def test_an_adapter_of_another_model_is_refused_and_leaves_it_as_it_was(tmp_path):
    build_adapter(made_up_statistics(tiny_llama(), ["q_proj"]), 2).save_pretrained(tmp_path / "start")
    model = tiny_gpt2()
    before, directory = snapshot(model), AdapterDirectory(tmp_path / "start")
    words = "start cannot be put on GPT2LMHeadModel: .* Name the model it was made for.$"
    refused(words, with_adapter(model, directory).__enter__)
    assert same(before, snapshot(model))


def test_hooks_that_came_meanwhile_are_gone_and_those_before_stay():
    model = tiny_llama()
    kept = model.model.embed_tokens.register_forward_hook(lambda *given: None)
    hooks = model.model.embed_tokens._forward_hooks
    with as_it_was(model):
        model.model.embed_tokens.register_forward_hook(lambda *given: None)
        model.lm_head.register_forward_pre_hook(lambda *given: None)
        kept.remove()
    assert [*hooks] == [kept.id] and model.model.embed_tokens._forward_hooks is hooks
    assert not model.lm_head._forward_pre_hooks


def test_random_weights_that_an_adapter_would_not_hold_are_refused():
    """PEFT saves the classifier of this task by itself; BERT's pooler, which a checkpoint may lack, it does not."""
    model, drawn = tiny_bert(), ["bert.pooler.dense.bias", "bert.pooler.dense.weight", "classifier.weight"]
    words = (
        "^the weights of bert.pooler.dense are new and random, and an adapter holds only the weights of classifier and "
        "score. Take them along: modules_to_save='bert.pooler.dense'."
    )
    refused(words, check_modules_to_save, model, [], "SEQ_CLS", drawn)
    refused(
        "^the weights of bert.pooler.dense,spare are", check_modules_to_save, model, [], "SEQ_CLS", ["spare.w", *drawn]
    )
    check_modules_to_save(model, ["pooler"], "SEQ_CLS", drawn)
    check_modules_to_save(model, [], "SEQ_CLS", drawn[2:])
    check_modules_to_save(model, [], "CAUSAL_LM", drawn)


def test_gradients_are_put_back_and_those_that_came_meanwhile_are_gone():
    layer = nn.Linear(2, 3)
    kept = layer.weight.grad = torch.ones(3, 2)
    restore = remember(layer)
    layer(torch.ones(1, 2)).sum().backward()
    layer.weight.grad = None
    restore()
    assert layer.weight.grad is kept and layer.bias.grad is None


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_a_failure_in_the_middle_leaves_the_model_as_it_was(monkeypatch, error):
    from peft.tuners.lora import LoraModel

    model, batch = tiny_llama(), batches_for("llama", 1)[0]
    model.model.embed_tokens.weight.requires_grad = False
    before, output = snapshot(model), logits(model, batch)
    init = build_adapter(made_up_statistics(model), 4)
    create, calls = LoraModel._create_and_replace, []

    def fail_at_the_fifth(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise error
        return create(self, *args, **kwargs)

    monkeypatch.setattr(LoraModel, "_create_and_replace", fail_at_the_fifth)
    with pytest.raises(type(error)):
        init.apply(model)
    assert same(before, snapshot(model)) and torch.equal(output, logits(model, batch))
    monkeypatch.undo()
    assert isinstance(init.apply(model), peft.PeftModel)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_models(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    wide = dict(hidden_size=64, intermediate_size=128)  # 4-bit blocks hold 64 numbers
    tiny_llama(**wide).save_pretrained(tmp_path / "model")
    stats = made_up_statistics(tiny_llama(**wide), task_type="CAUSAL_LM")
    init = build_adapter(stats, uneven(stats))
    batch = batches_for("llama", 1)[0]

    def quantized():
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map="cpu", dtype=torch.float32,
            quantization_config=BitsAndBytesConfig(**{f"load_in_{bits}bit": True}),
        )  # fmt: skip

    model = quantized()
    before = logits(model, batch)
    assert torch.equal(before, logits(init.apply(model), batch))
    # in training mode from the start: bitsandbytes repacks 4-bit weights at the first evaluation on a CPU
    peft_model = init.apply(quantized()).train()
    peft_model(**batch).loss.backward()
    layers = lora_layers(peft_model)
    assert set(layers) == set(init.ranks)
    assert all(layer.lora_B["default"].weight.grad.abs().sum() > 0 for layer in layers.values())


@pytest.mark.parametrize("weights", [False, True])
def test_weights_are_copied_only_where_that_is_asked_for(weights):
    model = nn.Linear(3, 2)
    restore, before = remember(model, weights) if weights else remember(model), model.weight.detach().clone()
    model.weight.data += 1.0
    model.weight.requires_grad_(False)
    restore()
    assert model.weight.requires_grad and torch.equal(model.weight, before if weights else before + 1.0)
    data = model.weight.data
    restore = remember(model, weights=True)
    model.half()
    restore()
    assert model.weight.data_ptr() == data.data_ptr() and model.weight.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:Already found a")
def test_an_adapter_is_fresh_until_one_of_its_numbers_was_trained():
    """Layers of another adapter say nothing of it; of an embedding A is zero before training, and B is not."""
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]))
    model.add_adapter("used", peft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    layers = adapter_layers(model)
    check_fresh(layers, "default", "it", "Begin anew.")
    words = "^it is no fresh one: B is not zero. Begin anew.$"
    refused(words, check_fresh, layers, "used", "it", "Begin anew.")
    last = layers["model.layers.1.self_attn.q_proj"].lora_B["default"].weight
    embedding = layers["model.embed_tokens"].lora_embedding_A["default"]
    for weight in (last, embedding):
        weight.data[0, 0] = 1.0
        refused(words, check_fresh, layers, "default", "it", "Begin anew.")
        weight.data[0, 0] = 0.0


def test_where_a_is_shorter_the_rest_of_the_layer_stays():
    """Also on a model that does not hold the configuration of its adapter."""
    model = tiny_llama()
    stats = made_up_statistics(model, ["q_proj"])
    init = build_adapter(stats, RankAllocation(dict(zip(stats, (2, 4), strict=True)), 4), lora_alpha=8)
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]), model)
    vars(model).pop("peft_config", None)
    before = {name: layer.lora_A["default"].weight.clone() for name, layer in adapter_layers(model).items()}
    fill_in_place(model, init)
    for (name, layer), rank in zip(adapter_layers(model).items(), (2, 4), strict=True):
        a = layer.lora_A["default"].weight
        assert torch.equal(a[:rank], init.weights[name].a) and torch.equal(a[rank:], before[name][rank:])


@pytest.mark.parametrize("training", [True, False])
def test_what_is_put_on_a_model_is_in_its_mode(training, tmp_path):
    """Layers of the adapter, modules that are trained whole, and the PeftModel itself."""
    model = tiny_bert().train(training)
    init = build_adapter(made_up_statistics(model, ["query"], task_type="SEQ_CLS"), 2, lora_dropout=0.1)
    init.save_pretrained(tmp_path / "start", model=model)
    for adapted in (
        init.apply(copy.deepcopy(model)),
        load_adapter(copy.deepcopy(model), AdapterDirectory(tmp_path / "start"), trainable=True),
    ):
        assert any("modules_to_save.default" in name for name, _ in adapted.named_modules())
        assert {module.training for module in adapted.modules()} == {training}


def test_a_linear_layer_of_another_class_takes_the_adapter_of_one():
    """As a quantized one does."""
    model = with_part_of(lambda layer: nn.modules.linear.NonDynamicallyQuantizableLinear(32, 32, bias=False))
    init = build_adapter(made_up_statistics(tiny_llama(), ["q_proj"]), 2)
    assert adapter_layers(init.apply(model)).keys() == init.weights.keys()
    model, init = tiny_gpt2(), build_adapter(made_up_statistics(tiny_gpt2(), ["c_attn"]), 2)
    model.transformer.h[0].attn.c_attn = nn.Linear(32, 96)  # whose weight is the other way round
    refused("have Conv1D 32 -> 96, GPT2LMHeadModel has Linear 32 -> 96", init.apply, model)


@pytest.mark.parametrize(("make", "names", "options"), [
    (tiny_llama, ["q_proj", "embed_tokens"], {}),
    (tiny_llama, ["q_proj"], dict(use_dora=True)),
    (tiny_gpt2, ["c_attn", "lm_head"], {}),
])  # fmt: skip
def test_peft_says_nothing_about_an_adapter_that_was_put_on_as_planned(make, names, options, tmp_path):
    init = build_adapter(made_up_statistics(make(), names, model_id="org/name"), 2, **options)
    init.save_pretrained(tmp_path / "start")
    model = make()
    model.config._name_or_path = "mine"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)  # between releases of transformers and PEFT
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings")
        with with_adapter(model, AdapterDirectory(tmp_path / "start")) as adapted:
            assert adapter_layers(adapted)
        assert adapter_layers(init.apply(model))


@pytest.mark.parametrize(("change", "place"), [
    (lambda tensors, name: tensors.pop(name), "on the model"),
    (lambda tensors, name: tensors.update({name.replace("0", "9"): tensors[name].clone()}), "in the file"),
])  # fmt: skip
def test_a_tensor_that_the_file_or_the_model_has_alone_is_named(change, place, tmp_path):
    build_adapter(made_up_statistics(tiny_llama(), ["q_proj"]), 2).save_pretrained(tmp_path / "start")
    file = tmp_path / "start" / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors, "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight")
    save_file(dict(tensors.items()), file)
    words = f"start does not fit LlamaForCausalLM: 1 tensors are only {place}, the first is '.*lora_B.weight'. Name the"
    refused(words, load_adapter, tiny_llama(), AdapterDirectory(tmp_path / "start"), trainable=True)


def test_a_module_that_there_is_not_is_refused_with_the_nearest_names():
    for wrong in ("q_prooj", "self_attn.q_prooj"):
        words = f"^modules_to_save='{wrong}' is no module of LlamaForCausalLM. Closest: q_proj, "
        refused(words, check_modules_to_save, tiny_llama(), [wrong])
    words = "^modules_to_save='zzz' is no module of LlamaForCausalLM.$"
    refused(words, check_modules_to_save, tiny_llama(), ["zzz"])
