"""Quantized bases on a CPU: each library where it is installed, and any other by the interface of its layers."""

import math

import pytest
import torch

from lora_init import Statistics, build_adapter, collect, find_targets, initialize, learning_rate
from lora_init.layers.identity import count_parameters, fingerprint
from tests.collection.made import PackedLinear, hqq_4bit, plain
from tests.conftest import batches_for

# HQQ's layers are no nn.Linear, so to PEFT they are not among "all-linear".
NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("quantized")
    plain().save_pretrained(directory)
    return directory


def bitsandbytes_4bit(directory):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return AutoModelForCausalLM.from_pretrained(directory, quantization_config=config, device_map={"": "cpu"})


def bitsandbytes_8bit(directory, dtype=torch.float32):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": {"": "cpu"}, "dtype": dtype}
    return AutoModelForCausalLM.from_pretrained(directory, **options)


def torchao_8bit(directory):
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import AutoModelForCausalLM, TorchAoConfig

    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    return AutoModelForCausalLM.from_pretrained(directory, quantization_config=config, device_map={"": "cpu"})


LIBRARIES = [bitsandbytes_4bit, bitsandbytes_8bit, torchao_8bit, hqq_4bit]
every_library = pytest.mark.parametrize("load", LIBRARIES, ids=lambda load: load.__name__)


@every_library
def test_statistics_are_close_to_those_of_the_plain_model(load, directory):
    model, batches = load(directory), batches_for("llama")
    stats, expected = collect(model, batches, NAMES, rank=2), collect(plain(), batches, NAMES, rank=2)
    assert list(stats) == list(expected)
    for name in expected:
        assert stats[name].n_samples == expected[name].n_samples
        assert stats.targets[name].in_features == expected.targets[name].in_features
        # Four bits move a weight by a tenth of its size, and the rows of the later layers with it.
        assert stats.total_variance(name) == pytest.approx(expected.total_variance(name), rel=0.1)
    assert count_parameters(model) == count_parameters(plain()) or load is hqq_4bit  # HQQ's weights are no parameters


@pytest.mark.parametrize("gradients", [False, True])
def test_outliers_that_eight_bit_layers_take_out_and_put_back_split_no_group(gradients, directory):
    """In float16 they do that in the tensor itself, which raises its version; the first batch has none."""
    model, batches = bitsandbytes_8bit(directory, torch.float16), batches_for("llama")
    norm = model.model.layers[0].input_layernorm

    def outliers(module, args, output):
        nonlocal n_calls
        n_calls += 1
        return output * (100.0 if n_calls > 1 else 1.0)

    n_calls = 0
    norm.register_forward_hook(outliers)
    stats = collect(model, batches, NAMES, rank=2, gradients=gradients)
    assert stats.group_of["model.layers.0.self_attn.k_proj"] == "model.layers.0.self_attn.q_proj"
    assert stats.provenance.n_batches == len(batches) and len(stats.gradients) == gradients * len(stats)


@every_library
def test_an_adapter_from_the_quantized_model_itself(load, directory, tmp_path):
    model, batches = load(directory), batches_for("llama")
    before = fingerprint(model)
    stats = collect(model, batches, NAMES, rank=2)
    assert before == stats.provenance.fingerprint == fingerprint(load(directory))
    again = Statistics.load(stats.save(tmp_path / "stats.safetensors"))
    build_adapter(again, 2).apply(model)


@every_library
@pytest.mark.parametrize("names", [NAMES, ["q_proj", "v_proj"], NAMES[4:]])
def test_its_rate_is_that_of_the_plain_model(load, names, directory):
    batches, rates = batches_for("llama"), []
    for model in (load(directory), plain()):
        made = build_adapter(collect(model, batches, names, rank=2), 2)
        rates += [made.rate.share, learning_rate(made.apply(model), batches, steps=48).share]
    assert rates == [rates[0]] * 4 and rates[0] == pytest.approx(len(names) / len(NAMES))


@every_library
def test_a_start_from_its_gradients(load, directory):
    model = initialize(load(directory), batches_for("llama"), rank=2, method="lora-one", target_modules=NAMES)
    assert model(**batches_for("llama")[0]).logits.isfinite().all()


class Packed(torch.Tensor):
    """A weight as torchao has it: said to be of floats, without what is done with these."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.split:
            raise NotImplementedError
        return super().__torch_function__(function, types, args, kwargs or {})


def test_a_weight_that_is_no_plain_tensor_leaves_the_importance_unknown():
    model = plain()
    layer = model.get_submodule(DOWN)
    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Packed), requires_grad=False)
    found = collect(model, batches_for("llama"), ["down_proj"], rank=2, gradients=True).gradients
    assert [math.isnan(found[name].importance) for name in (DOWN.replace("1", "0"), DOWN)] == [False, True]


def packed():
    model = plain()
    for name in find_targets(model).layers:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, PackedLinear(model.get_submodule(name)))
    return model
