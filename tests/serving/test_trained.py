"""A trained adapter is read as PEFT reads it, less what its start had; a broken one is refused."""

import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from lora_init import build_adapter, collect, correct_base, export_adapter
from lora_init.layers.targets import Target
from lora_init.serving.trained import OTHER_UPDATES, Trained, read_trained, with_parameters
from tests.adapters.made import made_up_statistics
from tests.conftest import batches_for, tiny_llama
from tests.conftest import refused as one_line
from tests.serving.made import ADAPTERS, config_of, load, logits, randomise, refused, train


def test_a_started_adapter_with_zero_ranks_keeps_its_outputs(base, tmp_path):
    stats = made_up_statistics(tiny_llama(num_hidden_layers=3))
    ranks = {name: i % 4 for i, name in enumerate(stats)}
    model = build_adapter(stats, ranks).apply(load(base))
    randomise(model)
    model.save_pretrained(tmp_path / "trained")
    exported = export_adapter(tmp_path / "trained", tmp_path / "served", base=str(base))
    assert set(exported.added) == {name for name, rank in ranks.items() if not rank}
    torch.testing.assert_close(logits(load(base), tmp_path / "served"), logits(model.eval()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("factor", [1, 4])
def test_an_adapter_whose_base_gave_up_the_start_is_converted(base, tmp_path, factor):
    """Also where it was saved with another lora_alpha than its start, and a B that makes up for it."""
    start = train(base, tmp_path / "start", r=5, target_modules=["q_proj", "down_proj"])
    (start / "lora_init.json").write_text('{"method": "lora-ga"}')
    model = load(base)
    correct_base(model, start)
    model = PeftModel.from_pretrained(model, start).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "trained")
    set_alpha(tmp_path / "trained", factor * config_of(start)["lora_alpha"])
    file = tmp_path / "trained" / "adapter_model.safetensors"
    save_file({key: one / factor if "lora_B" in key else one for key, one in load_file(file).items()}, file)
    exported = export_adapter(tmp_path / "trained", tmp_path / "served", start=start)
    assert exported.rank == 16  # twice 5, rounded up
    assert (logits(model) - logits(load(base))).abs().max() > 0.01
    torch.testing.assert_close(logits(load(base), tmp_path / "served"), logits(model), atol=1e-4, rtol=1e-4)
    refused("began as lora-ga.*--start", start, tmp_path / "other")


def break_pair(directory):
    tensors = load_file(directory / "adapter_model.safetensors")
    tensors.pop(next(key for key in tensors if "lora_B" in key))
    save_file(tensors, directory / "adapter_model.safetensors")


def break_rank(directory):
    config = config_of(directory) | {"r": 3}
    (directory / "adapter_config.json").write_text(json.dumps(config))


def diverge(directory):
    tensors = load_file(directory / "adapter_model.safetensors")
    next(tensor for key, tensor in tensors.items() if "lora_B" in key)[0, 0] = math.nan
    save_file(tensors, directory / "adapter_model.safetensors")


def name_no_parameters(directory):
    (directory / "adapter_config.json").write_text(json.dumps(config_of(directory) | {"target_parameters": 3}))


def set_pattern(directory):
    (directory / "adapter_config.json").write_text(json.dumps(config_of(directory) | {"rank_pattern": {"(": 4}}))


def set_alpha(directory, alpha):
    (directory / "adapter_config.json").write_text(json.dumps(config_of(directory) | {"lora_alpha": alpha}))


def set_type(directory, dtype):
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(directory / "adapter_model.safetensors").items()}
    save_file(tensors, directory / "adapter_model.safetensors")


def set_key(directory, **config):
    (directory / "adapter_config.json").write_text(json.dumps(config_of(directory) | config))


def overflow(directory):
    """float16 holds B, and not what B is under the scaling of the other layers."""
    tensors = {key: tensor.half() for key, tensor in load_file(directory / "adapter_model.safetensors").items()}
    next(tensor for key, tensor in tensors.items() if "0.self_attn.q_proj.lora_B" in key)[0, 0] = 6e4
    save_file(tensors, directory / "adapter_model.safetensors")
    set_key(directory, alpha_pattern={"layers.0.self_attn.q_proj": 80})


BROKEN = {
    **{
        key: (partial(set_key, **{key: {"any": 1}}), f"was trained with {key}; only plain LoRA, rsLoRA and DoRA are ex")
        for key in OTHER_UPDATES
    },
    "beyond its type": (overflow, "q_proj': torch.float16 cannot hold it under one scaling for all layers"),
    "a rank in words": (lambda d: set_key(d, rank_pattern={"q_proj": "four"}), "rank_pattern is {'q_proj': 'four'}"),
    "alpha of 0": (lambda d: set_alpha(d, 0), "lora_alpha is 0, expected between"),
    "infinite alpha": (lambda d: set_alpha(d, math.inf), "lora_alpha is inf, expected"),
    "alpha is no number": (lambda d: set_alpha(d, math.nan), "lora_alpha is nan, expected"),
    "alpha beyond float32": (lambda d: set_alpha(d, 1e308), r"lora_alpha is 1e\+308, expected between 1e-30 and 1e30"),
    "float8": (lambda d: set_type(d, torch.float8_e4m3fn), r"layer '.*' is torch.float8_e4m3fn, and A and B are float"),
    "int8": (lambda d: set_type(d, torch.int8), r"layer '.*' is torch.int8, and A and B are float32, float16 or"),
    "complex": (lambda d: set_type(d, torch.complex64), r"layer '.*' is torch.complex64, and A and B are float"),
    "diverged": (diverge, "layer '.*' holds NaN or infinite numbers"),
    "a pattern": (set_pattern, r"a key of the pattern {'\(': 4} is no regular expression: missing \)"),
    "no parameters": (name_no_parameters, "adapter_config.json is damaged: target_parameters is no list of names"),
    "not there": (lambda directory: directory.rename(directory.with_name("gone")), "no such adapter directory"),
    "no config": (lambda directory: (directory / "adapter_config.json").unlink(), "has no adapter_config.json"),
    "no tensors": (lambda d: (d / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    "half a pair": (break_pair, r"layer '.*' has no lora_B.weight"),
    "other ranks": (break_rank, r"A is \[4, 48\] and B \[32, 4\], and adapter_config.json says rank 3"),
    "truncated": (lambda d: (d / "adapter_model.safetensors").write_bytes(b"\x00" * 9), "is damaged"),
    "other method": (lambda d: (d / "adapter_config.json").write_text('{"peft_type": "LOHA"}'), "type LOHA"),
    "no JSON": (lambda d: (d / "adapter_config.json").write_text("{"), "is not JSON"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_adapter_is_one_line_and_nothing_is_written(name, base, tmp_path):
    trained = train(base, tmp_path / "trained", **ADAPTERS["plain"])
    damage, message = BROKEN[name]
    damage(trained)
    refused(message, trained, tmp_path / "served")


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    """A base, and two starts whose base must give them up; the second has the name of PEFT's own adapter."""
    home = tmp_path_factory.mktemp("starts")
    tiny_llama().save_pretrained(home / "base")
    batches = [batch | {"labels": batch["labels"]} for batch in batches_for("llama")]
    for name, n in (("start", 4), ("default", 2)):
        stats = collect(load(home / "base"), batches[:n], ["q_proj", "v_proj"], rank=2, gradients=True, progress=False)
        build_adapter(stats, 2, "lora-ga").save_pretrained(home / name)
    return home


def started(home, name, move=0.05):
    """Train from a start, by numbers in place of training."""
    model = load(home / "base")
    correct_base(model, home / name)
    model = PeftModel.from_pretrained(model, home / name, is_trainable=True).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.add_(move * torch.randn_like(parameter))
    return model


def test_what_peft_converted_is_exported_if_it_is_what_was_trained(starts, tmp_path):
    def convert(model, by, name):
        model.save_pretrained(tmp_path / name, path_initial_model_for_weight_conversion=str(starts / by))
        return tmp_path / name

    model = started(starts, "start")
    export_adapter(convert(model, "start", "right"), tmp_path / "served", base=str(starts / "base"))
    expected = logits(model)
    assert (expected - logits(load(starts / "base"))).abs().max() > 0.01
    torch.testing.assert_close(logits(load(starts / "base"), tmp_path / "served"), expected, atol=1e-4, rtol=1e-4)
    for by, trained, said in (
        ("start", started(starts, "default"), "was converted from another start than its own. Export what was trained"),
        ("start", started(starts, "start", move=0.0), "adds nothing: it was never trained, or converted from a direct"),
        ("default", started(starts, "default"), "adds nothing: .* Save it without a conversion, and name the start by"),
    ):
        refused(said, convert(trained, by, f"{by} {said[:8]}"), tmp_path / "other", base=str(starts / "base"))


def test_a_start_that_is_not_the_adapters_own_is_not_subtracted(starts, tmp_path):
    model = started(starts, "start")
    model.save_pretrained(tmp_path / "trained")
    there = tmp_path / "trained", tmp_path / "served"
    refused("default' holds other numbers than those that this adapter began with", *there, start=starts / "default")
    dora = train(starts / "base", tmp_path / "dora", target_modules=["q_proj"], use_dora=True)
    set_key(dora, init_lora_weights="pissa")
    refused(r"start=.*: an adapter with DoRA cannot give up", dora, tmp_path / "served", start=starts / "start")
    plain = tmp_path / "plain"
    build_adapter(made_up_statistics(tiny_llama()), 2).save_pretrained(plain)
    fits = "plain fits the plain base already, since its start left that alone or PEFT has converted it"
    refused(fits, plain, tmp_path / "served", start=starts / "start", base=str(starts / "base"))


def test_a_parameter_that_the_file_has_nothing_for_is_named(starts):
    """`target_parameters` may select more than was saved."""
    pair = {"lora_A.weight": torch.ones(2, 8), "lora_B.weight": torch.ones(8, 2)}
    trained = Trained({"r": 2, "lora_alpha": 2}, {}, {}, {}, {"experts": pair})
    here, missing = Target("experts.down_proj", "", 8, 8), Target("experts.gate_proj", "", 8, 8)
    assert list(with_parameters(trained, {"experts": here}).layers) == ["experts"]
    said = "target_parameters selects 'experts.gate_proj', and adapter_model.safetensors holds nothing for it. The ada"
    one_line(said, with_parameters, trained, {"experts": here, "experts.base_layer": missing})
    one_line(
        "adapter_config.json is damaged", with_parameters, replace(trained, config={"r": 2, "lora_alpha": "x"}), {}
    )


def test_reading_scales_as_peft_does(base, tmp_path):
    trained = train(base, tmp_path / "trained", **ADAPTERS["rsLoRA with ranks"])
    layers = read_trained(trained).layers
    model = PeftModel.from_pretrained(load(base), trained)
    for name, layer in layers.items():
        module = model.get_base_model().get_submodule(name)
        assert layer.rank == module.r["default"] and math.isclose(layer.scaling, module.scaling["default"])
    updates = [model.get_base_model().get_submodule(name).get_delta_weight("default") for name in layers]
    size = math.sqrt(sum(float(update.double().square().sum()) for update in updates))
    assert math.isclose(read_trained(trained).update_size, size, rel_tol=1e-5)
