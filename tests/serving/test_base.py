"""A base model without weights: its class, and where its tensors are in a checkpoint, whatever form that has."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from lora_init.serving.base import _places, build_base, merged, plan_merge, read_base, with_changed_copies
from lora_init.serving.engines import find_engine
from lora_init.serving.support import check_engine
from lora_init.serving.trained import read_trained, with_parameters
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
    monkeypatch.setattr("lora_init.serving.base.on_meta", lambda model_class, config: None)
    refused("'x' is of a class that transformers does not know. Name the base by base=", build_base, {}, "x", config)


def test_a_base_that_lacks_a_layer_of_the_adapter_is_refused(base, tmp_path):
    trained = read_trained(train(base, tmp_path / "trained", target_modules=["q_proj"]))
    for name, changes in (("shorter", dict(num_hidden_layers=2)), ("wider", dict(hidden_size=48))):
        tiny_llama(**changes).save_pretrained(tmp_path / name)
        layer = f"model.layers.{2 if name == 'shorter' else 0}.self_attn.q_proj"
        said = f"the adapter's layer '{layer}' is not in LlamaForCausalLM '.*{name}' with its widths. .* (base=)"
        refused(said.replace("(", r"\(").replace(")", r"\)"), read_base, str(tmp_path / name), trained)


def test_a_copied_weight_that_the_checkpoint_lacks_is_not_compared(base, tmp_path):
    directory = train(base, tmp_path / "trained", target_modules=["embed_tokens", "q_proj"])
    trained = read_trained(directory)
    model = read_base(str(base), trained)
    (key,) = trained.copies
    assert with_changed_copies(trained, model).others == {}
    own = replace(trained, copies={key: trained.copies[key] + 1})  # as after new tokens
    assert with_changed_copies(own, model).others.keys() == {key}
    elsewhere = replace(own, copies={"base_model.model.zzz.base_layer.weight": own.copies[key]})
    assert with_changed_copies(elsewhere, model).others == {}


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
