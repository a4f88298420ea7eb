"""A base model without weights: its class, and where its tensors are in a checkpoint, whatever form that has."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from lora_init.layers.targets import Target
from lora_init.serving.base import (
    Base,
    _class_for,
    _first_misfit,
    _places,
    build_base,
    is_for,
    is_transposed,
    merged,
    parameters_of,
    plan_merge,
    read_base,
    widths_of,
    with_changed_copies,
)
from lora_init.serving.engines import find_engine
from lora_init.serving.kept import Kept, kept_by_merge
from lora_init.serving.support import check_engine
from lora_init.serving.trained import EMBEDDING, LINEAR, Layer, Trained, read_trained, with_parameters
from tests.conftest import refused, tiny_llama
from tests.layers.made import BOTH, mixtral
from tests.serving.made import randomise, train
from tests.versions import needs_experts_by_peft


def test_the_class_of_a_base_is_the_tasks_or_the_checkpoints_and_one_without_a_class_is_refused(base, monkeypatch):
    config = AutoConfig.from_pretrained(base)
    for adapter, for_engine, name in (
        ({"task_type": "CAUSAL_LM"}, False, "LlamaForCausalLM"),
        ({"task_type": "SEQ_CLS"}, False, "LlamaForSequenceClassification"),
        ({"task_type": "SEQ_CLS"}, True, "LlamaForCausalLM"),
        ({"auto_mapping": {"base_model_class": "LlamaModel"}}, False, "LlamaModel"),
        ({"auto_mapping": {"base_model_class": "GPT2Model"}}, False, "LlamaForCausalLM"),  # of another architecture
    ):
        assert type(build_base(adapter, str(base), config, for_engine)).__name__ == name
    config.architectures = ["NoSuchModel"]
    assert type(build_base({}, str(base), config)).__name__ == "LlamaModel"
    monkeypatch.setattr("lora_init.serving.base.on_meta", lambda model_class, config, trusted: None)
    refused("'x' is of a class that transformers does not know. Name the base by base=", build_base, {}, "x", config)


def test_a_base_that_lacks_a_layer_of_the_adapter_is_refused(base, tmp_path):
    trained = read_trained(train(base, tmp_path / "trained", target_modules=["q_proj"]))
    for name, changes in (("shorter", dict(num_hidden_layers=2)), ("wider", dict(hidden_size=48))):
        tiny_llama(**changes).save_pretrained(tmp_path / name)
        layer = f"model.layers.{2 if name == 'shorter' else 0}.self_attn.q_proj"
        said = f"the adapter's layer '{layer}' is not in LlamaForCausalLM '.*{name}' with its widths. .* (base=)"
        refused(said.replace("(", r"\(").replace(")", r"\)"), read_base, str(tmp_path / name), trained)


@pytest.mark.parametrize(("a", "b", "there"), [
    ((2, 8), (6, 2), True), ((2, 9), (6, 2), False), ((2, 8), (7, 2), False), ((2, 8, 1), (6, 2, 1), False),
])  # fmt: skip
def test_a_layer_that_has_no_name_yet_has_to_be_in_the_base_too(a, b, there):
    """As experts in a file, until their parameters are known."""
    tensors = dict(zip(LINEAR, (torch.zeros(a), torch.zeros(b)), strict=True))
    trained = Trained({}, {}, {}, unnamed={"mlp.experts": tensors})
    found = _first_misfit(trained, Base("", None, {"mlp.experts": (8, 6)}, {}))
    assert found == (None if there else "mlp.experts")


def test_a_copied_weight_is_dropped_if_the_checkpoint_has_the_same(base, tmp_path):
    directory = train(base, tmp_path / "trained", target_modules=["embed_tokens", "q_proj"])
    trained = read_trained(directory)
    model = read_base(str(base), trained)
    (key,) = trained.copies
    assert with_changed_copies(trained, model).others == {}
    own = replace(trained, copies={key: trained.copies[key] + 1})  # as after new tokens
    assert with_changed_copies(own, model).others.keys() == {key}
    elsewhere = replace(trained, copies={"base_model.model.zzz.base_layer.weight": trained.copies[key]})
    assert with_changed_copies(elsewhere, model).others == elsewhere.copies  # with nothing to compare


@pytest.mark.parametrize(("of_all", "of_one", "found"), [
    ((3, 2), (3, 2), {f"experts.{expert}.up": expert for expert in range(4)}),  # a tensor for each expert
    ((4, 3, 2), (1, 3, 2), {"experts.0.up": None}),  # all in one, in another layout
    ((4, 6), (1, 6), {"experts.0.up": None}),
    ((12, 2), (3, 2), None),  # one below the other, which is no form that is read
    ((6, 4), (6, 1), None),
])  # fmt: skip
def test_experts_are_stored_one_by_one_or_first_axis_first(of_all, of_one, found):
    assert _places("experts.0.up", torch.empty(4, 2, 3), of_all, of_one) == found


def test_a_matrix_is_in_whatever_pieces_it_is_stored_in():
    assert _places("a.0.up", torch.empty(2, 3), (1, 3), (2, 3)) == {"a.0.up": None}


@needs_experts_by_peft
def test_experts_that_a_checkpoint_has_transposed_get_a_transposed_change(tmp_path):
    """Under the model's own names, with shapes alone to tell."""
    model = mixtral()
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=[], target_parameters=BOTH, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    randomise(adapted)
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "trained")
    own = {name: tensor.detach() for name, tensor in mixtral().named_parameters() if "experts" in name}
    results = []
    for transposed in (False, True):
        rest = {k: v for k, v in load_file(tmp_path / "base/model.safetensors").items() if "experts" not in k}
        stored = {name: (one.mT if transposed else one).contiguous() for name, one in own.items()}
        save_file(rest | stored, tmp_path / "base/model.safetensors", {"format": "pt"})
        trained = read_trained(tmp_path / "trained")
        base = read_base(str(tmp_path / "base"), trained)
        trained = with_parameters(trained, base.parameters)
        sources = plan_merge(base, trained)
        results.append({name: merged(stored[name].clone(), sources[name], trained, base) for name in own})
        kept = sum(kept_by_merge(base, trained, sources, "bfloat16").values(), Kept())
        assert kept.change == pytest.approx(trained.update_size**2, rel=1e-3)
    for name, weight in own.items():
        assert (results[0][name] - weight).abs().max() > 0.01
        torch.testing.assert_close(results[1][name].mT, results[0][name], atol=1e-6, rtol=1e-6)


def test_mlx_takes_dora_in_every_layer_or_in_none(base, tmp_path):
    trained = read_trained(train(base, tmp_path / "dora", target_modules=["q_proj"], use_dora=True))
    model = read_base(str(base), trained)
    check_engine("mlx", find_engine("mlx"), trained, model)
    name, layer = next(iter(trained.layers.items()))
    mixed = replace(trained, layers={**trained.layers, name: replace(layer, magnitude=None)})
    said = "^mlx takes DoRA in every layer or in none. Use merge_into=, without an engine"
    refused(said, check_engine, "mlx", find_engine("mlx"), mixed, model)


Q = "model.layers.0.self_attn.q_proj"


def base_of(directory):
    model = build_base({"task_type": "CAUSAL_LM"}, str(directory), AutoConfig.from_pretrained(directory))
    return Base(str(directory), model, widths_of(model), {})


def of_layers(*names, config=None, **more):
    """An adapter of layers 32 wide, which adds one to each weight."""
    return Trained(config or {}, {name: Layer(torch.ones(1, 32), torch.ones(32, 1), 1.0, **more) for name in names}, {})


def rewrite(directory, change):
    file = directory / "model.safetensors"
    save_file({name: one.clone() for name, one in change(load_file(file)).items()}, file, {"format": "pt"})


def without(*ends):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.endswith(ends)}


@pytest.mark.parametrize("change", [
    without("0.self_attn.q_proj.weight"),
    lambda tensors: tensors | {f"{Q}.weight": torch.ones(32, 31)},
    lambda tensors: tensors | {f"{Q}.weight": torch.ones(1, 32, 32)},
])  # fmt: skip
def test_a_weight_that_is_not_in_the_checkpoint_as_the_model_has_it_is_not_merged(change, base):
    assert plan_merge(base_of(base), of_layers(Q))[f"{Q}.weight"].parameter == f"{Q}.weight"
    rewrite(base, change)
    said = (
        f"^{str(base)!r} has no tensor '{Q}.weight' in its checkpoint, or in another form, so it is not merged here. PE"
    )
    refused(said, plan_merge, base_of(base), of_layers(Q))
    refused("has no tensor 'x.weight' in its", plan_merge, base_of(base), of_layers("x"))


@pytest.mark.parametrize(("changes", "config", "said"), [
    (lambda tensors: tensors, {}, ""),
    (lambda tensors: tensors, {"ensure_weight_tying": True}, "ensure_weight_tying keeps two adapters equal"),
    (lambda tensors: {name.replace("embed_tokens", "wte"): one for name, one in tensors.items()}, {},
     "'.*' has its tied embeddings under other names in its checkpoint"),
])  # fmt: skip
def test_tied_embeddings_have_a_source_each_or_are_not_merged(changes, config, said, tmp_path):
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    rewrite(tmp_path, changes)
    first, last = "model.embed_tokens.weight", "lm_head.weight"
    model = base_of(tmp_path)
    assert model.tied and model.embedding_weights == (first, last)
    trained = replace(of_layers(Q, config=config), others={f"base_model.model.{last}": torch.ones(64, 32)})
    if said:
        refused(f"^{said}, so it is not merged here. PEFT's merge_and_unload", plan_merge, model, trained)
    else:
        found = plan_merge(model, trained)
        assert (found[last].name, found[last].parameter, found[first].parameter) == (first, last, "")
    assert last not in plan_merge(model, of_layers(Q, config=config))  # nothing of them changes


def test_a_weight_trained_in_another_size_is_refused_with_what_to_do(base):
    for name, rows, how in (
        ("model.embed_tokens", 70, r"After new tokens: call resize_token_embeddings\(\) on the base"),
        ("lm_head", 70, r"After new tokens: call resize_token_embeddings\(\) on the base"),
        ("model.norm", 7, r"Load it so \(num_labels=\)"),
    ):
        trained = replace(of_layers(Q), others={f"base_model.model.{name}.weight": torch.ones(rows, 32)})
        shapes = r"\[\d+, 32\] in the adapter and \[(64, )?32\]"
        said = f"^'{name}.weight' is {shapes} in '.*'. {how}, save it, and merge into that"
        refused(said, plan_merge, base_of(base), trained)


@needs_experts_by_peft
def test_experts_that_are_not_all_there_or_have_lengths_are_not_merged(tmp_path):
    mixtral().save_pretrained(tmp_path)
    name = "model.layers.0.mlp.experts.down_proj"
    layers = {name: Layer(torch.ones(4, 1, 24), torch.ones(4, 32, 1), 1.0)}
    model, trained = base_of(tmp_path), Trained({}, layers, {})
    pieces = {place: one for place, one in plan_merge(model, trained).items() if one.parameter}
    saved = "model.layers.0.block_sparse_moe.experts.{}.w2.weight"
    assert {place: one.expert for place, one in pieces.items()} == {saved.format(i): i for i in range(4)}
    assert {(one.parameter, one.piece) for one in pieces.values()} == {(name, saved.format(0))}
    lengths = Trained({}, {name: replace(layers[name], magnitude=torch.ones(32))}, {})
    refused(f"^DoRA: '.*' has '{name}' in another form in its checkpoint, so it is not", plan_merge, model, lengths)
    rewrite(tmp_path, lambda tensors: tensors | {saved.format(3): torch.ones(32, 23)})
    refused(f"^'.*' has no tensor '{name}' in its checkpoint, or in", plan_merge, base_of(tmp_path), trained)
    rewrite(tmp_path, without("experts.3.w2.weight"))
    refused(f"^'.*' has no tensor '{name}' in its checkpoint, or in", plan_merge, base_of(tmp_path), trained)


def test_a_copy_is_kept_where_no_checkpoint_is_here_or_a_quantized_one(base):
    key, weight = "base_model.model.model.embed_tokens.base_layer.weight", "model.embed_tokens.weight"
    trained = replace(of_layers(Q), copies={key: load_file(base / "model.safetensors")[weight]})
    model = base_of(base)
    assert with_changed_copies(trained, model).others == {}
    assert {*with_changed_copies(trained, replace(model, source="somebody/else")).others} == {key}
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    assert {*with_changed_copies(trained, model).others} == {key}


@pytest.mark.parametrize("ends", [LINEAR, EMBEDDING])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_a_start_changed_is_put_back_before_it_is_compared(ends, dtype, base):
    name = "lm_head" if ends == LINEAR else "model.embed_tokens"
    key = f"base_model.model.{name}.base_layer.weight"
    weight = load_file(base / "model.safetensors")[f"{name}.weight"]
    d_out, d_in = weight.shape if ends == LINEAR else weight.shape[::-1]
    began = Layer(torch.randn(4, d_in, dtype=dtype), torch.randn(d_out, 4, dtype=dtype), 0.5, ends)
    taken = 0.5 * began.b.float() @ began.a.float()
    taken = taken if ends == LINEAR else taken.T
    start = Trained({}, {name: began}, {})
    for own, changed in ((weight, False), (torch.cat([weight[:60], weight[60:] + 0.5]), True)):
        trained = replace(start, copies={key: (own - taken).to(dtype)})
        found = with_changed_copies(trained, base_of(base), start).others
        assert bool(found) == changed and with_changed_copies(trained, base_of(base)).others
        if changed:
            torch.testing.assert_close(found[key], own.to(dtype), atol=1e-6 if dtype == torch.float32 else 0.05, rtol=0)
    packed = replace(start, copies={key: torch.zeros(7, 1, dtype=torch.uint8)})  # as of a head in four bits
    assert with_changed_copies(packed, base_of(base), start).others == packed.copies


def test_a_weight_whose_start_was_saved_in_16_bits_is_the_base_s_own_as_far_as_these_tell(base):
    key, weight = "base_model.model.lm_head.base_layer.weight", load_file(base / "model.safetensors")["lm_head.weight"]
    began = Layer(torch.randn(4, weight.shape[1]), torch.randn(weight.shape[0], 4), 0.5)
    copied = weight - 0.5 * began.b @ began.a
    start = Trained({}, {"lm_head": replace(began, a=began.a.bfloat16(), b=began.b.bfloat16())}, {})
    for own, changed in ((copied, False), (copied + torch.arange(64)[:, None] // 63, True)):
        assert bool(with_changed_copies(replace(start, copies={key: own}), base_of(base), start).others) == changed


def test_a_copy_in_another_type_is_the_same_if_it_is_rounded_alone(base):
    weight = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    for copied, changed in ((weight.bfloat16(), False), (weight[:-1], True), (weight + 1, True)):
        trained = replace(of_layers(Q), copies={key: copied})
        assert bool(with_changed_copies(trained, base_of(base)).others) == changed


class Towers(torch.nn.Module):
    def get_input_embeddings(self):
        raise NotImplementedError


def test_a_base_tells_its_class_and_its_embeddings():
    config = SimpleNamespace(tie_word_embeddings=True, architectures=None)
    towers = Towers()
    towers.config = config
    base = Base("x", towers, {}, {})
    assert (base.embeddings, base.tied, base.architecture) == (("", ""), False, "Towers")
    config.architectures = ["CLIPModel", "Other"]
    assert base.architecture == "CLIPModel"
    for tied in (False, True):
        model = Base("x", tiny_llama(tie_word_embeddings=tied), {}, {})
        assert (model.embeddings, model.tied) == (("model.embed_tokens", "lm_head"), tied)
    bare = Base("x", tiny_llama(tie_word_embeddings=True).model, {}, {})  # without an output embedding
    assert (bare.embeddings, bare.tied) == (("embed_tokens", ""), False)


def test_widths_are_those_of_linear_layers_and_embeddings_however_they_are_stored():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Embedding(5, 6), torch.nn.Conv1d(3, 4, 1), Conv1D(7, 8))
    assert widths_of(model) == {"0": (3, 4), "1": (5, 6), "3": (8, 7)}
    assert [is_transposed(one) for one in model] == [False, True, False, True]


@pytest.mark.parametrize(("adapter", "saved", "name"), [
    ({}, "LlamaForCausalLM", "None"),
    ({"auto_mapping": {"base_model_class": "LlamaModel"}}, "LlamaForCausalLM", "LlamaModel"),
    ({"task_type": "CAUSAL_LM", "auto_mapping": {"base_model_class": "LlamaModel"}}, "MistralForCausalLM",
     "MistralForCausalLM"),
    ({"task_type": "CAUSAL_LM"}, "LlamaModel", "AutoModelForCausalLM"),
    ({"task_type": "SEQ_CLS"}, "LlamaForCausalLM", "AutoModelForSequenceClassification"),
    ({"task_type": "OTHER"}, "LlamaForCausalLM", ""),
])  # fmt: skip
def test_the_class_that_a_task_asks_for_is_the_checkpoints_where_that_is_of_the_task(adapter, saved, name):
    assert _class_for(adapter, saved, SimpleNamespace()) == name


def test_a_class_is_for_the_models_of_its_configuration():
    config = tiny_llama().config
    classes = ["LlamaForCausalLM", "LlamaModel", "MistralModel", "LlamaConfig", "Nothing"]
    assert [is_for(name, config) for name in classes] == [True, True, False, None, None]
    outer = SimpleNamespace(get_text_config=lambda: config)  # of a multimodal model
    assert is_for("LlamaModel", outer) is True and is_for("MistralModel", outer) is False


def test_the_weight_of_a_linear_layer_is_adapted_as_the_layer_is():
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    found = parameters_of(tiny_llama(), {"target_parameters": ["q_proj.weight"]})
    assert found == {name: Target(f"{name}.weight", "Linear", 32, 32) for name in names}
