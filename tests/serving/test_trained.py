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
from lora_init.adapters.directory import start_digest
from lora_init.files import digests_of
from lora_init.layers.targets import Target
from lora_init.loading.models import QUANTIZATIONS
from lora_init.planning.lora_config import from_patterns
from lora_init.serving.trained import (
    EMBEDDING,
    OTHER_UPDATES,
    Layer,
    Trained,
    _problem_of,
    _with_renamed_patterns,
    note_of,
    read_trained,
    scalings,
    strength_of,
    subtract,
    with_parameters,
    zero_layers,
)
from lora_init.serving.trained import config_of as settings_of
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


def pair(rank=2, d_in=3, d_out=4, scaling=1.0, **more):
    a, b = torch.arange(1.0, 1 + rank * d_in).reshape(rank, d_in), torch.ones(d_out, rank)
    return Layer(a, b, scaling, **more)


def test_zeros_are_appended_and_another_scaling_goes_into_b():
    one = Layer(torch.ones(2, 2, 3), torch.ones(2, 4, 2).bfloat16(), 3.0)
    more = one.padded(3)
    assert (one.experts, one.rank, one.widths, more.rank) == (2, 2, (3, 4), 3) and pair().experts == 0
    assert torch.equal(more.a, torch.tensor([[1.0], [1], [0]]).expand(2, 3, 3))
    assert torch.equal(more.b, torch.tensor([1.0, 1, 0]).bfloat16().expand(2, 4, 3))
    assert one.rescaled(3.0) is one
    other = one.rescaled(0.75)
    assert (other.scaling, other.b.dtype) == (0.75, torch.float32) and other.a is one.a
    assert torch.equal(other.b, torch.full((2, 4, 2), 4.0))


def test_all_layers_get_the_scaling_that_most_have():
    layers = {"a": pair(scaling=2.0), "b": pair(scaling=0.5, rank=3), "c": pair(scaling=0.5)}
    trained = Trained({}, layers, {})
    assert (trained.scaling, trained.rank, trained.n_parameters) == (2.0, 3, 2 * 14 + 21)
    one = trained.with_one_scaling()
    assert {name: layer.scaling for name, layer in one.layers.items()} == dict.fromkeys("abc", 0.5)
    assert one.layers["b"] is layers["b"] and torch.equal(one.layers["a"].b, torch.full((4, 2), 4.0))
    assert one.update_size == pytest.approx(trained.update_size)
    assert trained.layers_beside(Trained({}, {"b": pair()}, {})) == ["a", "c"]


def test_the_size_of_the_update_is_that_of_all_layers_and_experts():
    layers = {"a": pair(scaling=-2.0), "b": Layer(torch.randn(3, 2, 5), torch.randn(3, 4, 2), 0.5)}
    products = [layer.scaling * layer.b @ layer.a for layer in layers.values()]
    expected = math.sqrt(sum(float(product.square().sum()) for product in products))
    assert Trained({}, layers, {}).update_size == pytest.approx(expected)
    assert Trained({}, {"a": replace(pair(), b=torch.zeros(4, 2))}, {}).update_size == 0.0


@pytest.mark.parametrize(("layers", "nothing"), [
    ([pair()], False),
    ([pair(), pair(scaling=0.0)], False),
    ([pair(scaling=0.0), replace(pair(), b=torch.zeros(4, 2)), replace(pair(), a=torch.zeros(2, 3))], True),
])  # fmt: skip
def test_an_adapter_adds_nothing_if_no_layer_does(layers, nothing):
    assert Trained({}, dict(enumerate(layers)), {}).adds_nothing == nothing


@pytest.mark.parametrize(("settings", "found"), [
    (QUANTIZATIONS["nf4"], "nf4"),
    (QUANTIZATIONS["int8"], "int8"),
    (QUANTIZATIONS["nf4"] | {"more": 1}, "nf4"),
    ({"quant_method": "gptq"}, ""),
    (None, ""),
    ("nf4", ""),
])  # fmt: skip
def test_how_the_base_was_quantized_is_read_of_the_record(settings, found):
    config = {"auto_mapping": {"lora_init": {"provenance": {"quantisation": settings}}}}
    assert Trained(config, {}, {}).quantized == found
    for other in ({}, {"auto_mapping": {"lora_init": {}}}, {"auto_mapping": {"lora_init": {"provenance": None}}}):
        assert Trained(other, {}, {}).quantized == ""


A, B = torch.ones(2, 3), torch.ones(4, 2)
PAIR = {"lora_A.weight": A, "lora_B.weight": B}
NOT_READ = "which no plain LoRA has. Only lora_A and lora_B are read."
PROBLEMS = [
    (PAIR, ""),
    ({"lora_embedding_A": A, "lora_embedding_B": B}, ""),
    (PAIR | {"lora_magnitude_vector": torch.ones(4)}, ""),
    ({"lora_B.weight": B}, "has no lora_A.weight. The adapter is incomplete; save it again."),
    ({"lora_embedding_A": A}, "has no lora_embedding_B. The adapter is incomplete; save it again."),
    (PAIR | {"lora_embedding_A": A, "lora_embedding_B": B}, f"has lora_A.weight, {NOT_READ}"),
    (PAIR | {"lora_B.bias": torch.ones(4)}, f"has lora_B.bias, {NOT_READ}"),
    ({"lora_A.x.weight": A, "lora_B.x.weight": B},
     "has lora_A.x.weight for lora_A.weight. `lora-init export --rename` writes names that fit."),
    (PAIR | {"lora_A.weight": torch.ones(2, 3, 1, 1)}, "is a convolution, which the engines read no adapter of. Call "
     "PEFT's merge_and_unload() and serve the model that it returns."),
    (PAIR | {"lora_B.weight": B.int()},
     "is torch.int32, and A and B are float32, float16 or bfloat16. Save it again in one of these."),
    (PAIR | {"lora_B.weight": B * math.inf},
     "holds NaN or infinite numbers: its training went wrong. Save a checkpoint from before."),
    *((PAIR | {"lora_B.weight": B.to(dtype)}, "") for dtype in (torch.float64, torch.float16, torch.bfloat16)),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "problem"), PROBLEMS)
def test_what_is_no_a_and_b_is_described(tensors, problem):
    assert _problem_of(tensors) == problem


@pytest.mark.parametrize(("given", "rank", "alpha"), [({}, 8, 8), ({"r": 6, "lora_alpha": 7}, 6, 7)])
def test_renamed_layers_and_parameters_keep_the_ranks_and_alphas_of_their_old_names(given, rank, alpha):
    """A pattern may also have been written for a new name."""
    patterns = {"rank_pattern": {"experts.down": 3, "^emb": 5, "new.h.up": 2}, "alpha_pattern": {"h.experts.up": 4}}
    linear = [f"{name}.lora_A.weight" for name in ("h.experts.base_layer", "h.experts", "h.up")]
    parts = [*linear, "emb.lora_embedding_A"]
    config = {"target_parameters": ["h.experts.up", "h.experts.down"], "bias": "none"} | patterns | given
    renames = {key: f"base_model.model.new.{key}" for key in parts}
    found = _with_renamed_patterns(config, [*parts, "other.weight"], renames)
    names = ["new.h.experts.down", "new.h.experts.up", "new.h.up", "new.emb"]
    assert [*from_patterns(found["rank_pattern"], names, None).values()] == [3, rank, 2, 5]
    assert [*from_patterns(found["alpha_pattern"], names, None).values()] == [alpha, 4, alpha, alpha]
    assert found | patterns == config
    assert _with_renamed_patterns({"bias": "none"}, parts, renames)["rank_pattern"].keys() >= {"^new\\.emb"}


@pytest.mark.parametrize(("config", "found"), [
    ({"r": 8, "lora_alpha": 16}, {"h.up": 4.0, "h.down": 1.0}),
    ({"r": 8}, {"h.up": 2.0, "h.down": 0.5}),  # 8 is PEFT's default
    ({"lora_alpha": 16, "use_rslora": True}, {"h.up": 8.0, "h.down": 4.0}),
    ({"lora_alpha": 16, "alpha_pattern": {"h.up": 2, "up": 3}}, {"h.up": 0.5, "h.down": 1.0}),
])  # fmt: skip
def test_scalings_are_of_layers_with_a_rank(config, found):
    assert scalings(config, {"h.up": 4, "h.none": 0, "h.down": 16}) == found
    one_line("^adapter_config.json is damaged: ", scalings, config | {"lora_alpha": "x", "alpha_pattern": {}}, {"a": 1})


def test_layers_without_an_adapter_get_zeros_where_their_kind_has_one():
    widths = {f"h.{i}.{kind}": (3, 4) for i in range(3) for kind in ("up", "emb", "head")}
    layers = {"h.0.up": pair(scaling=3.0), "h.1.emb": pair(ends=EMBEDDING)}
    trained = Trained({}, layers, {"base_model.model.h.2.up.bias": torch.ones(4)})
    zeros = zero_layers(trained, widths)
    assert [*zeros] == ["h.1.up"] and zeros["h.1.up"].scaling == 3.0
    assert torch.equal(zeros["h.1.up"].a, torch.zeros(1, 3)) and torch.equal(zeros["h.1.up"].b, torch.zeros(4, 1))


def test_what_a_start_began_with_is_appended_with_the_opposite_sign():
    trained, start = (
        Trained({}, {"h": pair(scaling=2.0)}, {}),
        Trained({}, {"h": pair(3, scaling=0.5), "more": pair()}, {}),
    )
    both = subtract(trained, start, {}, "START").layers["h"]
    before, after = start.layers["h"], trained.layers["h"]
    assert both.rank == 5 and both.scaling == 2.0
    torch.testing.assert_close(both.scaling * both.b @ both.a, 2 * after.b @ after.a - before.b @ before.a / 2)
    digest = start_digest({name: layer.weights for name, layer in start.layers.items()})
    assert subtract(trained, start, {"start": digest}, "START").layers["h"].rank == 5
    one_line("^start='START' holds other numbers than those that", subtract, trained, start, {"start": "x"}, "START")
    said = "^start='START' has no layer 'h' of these widths. It is another's start"
    experts = Layer(torch.ones(1, 2, 3), torch.ones(1, 4, 2), 1.0)
    for other in ({"more": pair()}, {"h": pair(d_in=4)}, {"h": pair(d_out=5)}, {"h": experts}):
        one_line(said, subtract, trained, Trained({}, other, {}), {}, "START")


def test_the_config_says_what_engines_and_peft_need_to_know():
    kept = {
        "alora_invocation_tokens": [1], "bias": "all", "ensure_weight_tying": True, "fan_in_fan_out": True,
        "lora_bias": True, "lora_dropout": 0.5, "modules_to_save": ["head"], "revision": "main",
        "task_type": "CAUSAL_LM", "trainable_token_indices": [2], "use_dora": True,
    }  # fmt: skip
    given = kept | {
        "r": 9,
        "lora_alpha": 9,
        "use_rslora": True,
        "rank_pattern": {"x": 1},
        "base_model_name_or_path": "b",
    }
    experts = Layer(torch.ones(3, 4, 2), torch.ones(3, 5, 4), 2.0)
    trained = Trained(given, {"h.up": pair(scaling=2.0), "h.experts.down": experts}, {})
    written = settings_of(trained, ["up"])
    assert {key: written.get(key) for key in kept} == kept and "auto_mapping" not in written
    others = {key: value for key, value in written.items() if key not in kept}
    assert others == {
        "peft_type": "LORA", "base_model_name_or_path": "b", "r": 4, "lora_alpha": 8,
        "rank_pattern": {"^(?:h\\.up)$": 2}, "alpha_pattern": {"^(?:h\\.up)$": 4}, "target_modules": ["up"],
        "init_lora_weights": True, "target_parameters": ["h.experts.down"], "inference_mode": True,
    }  # fmt: skip
    theirs, ours = {"base_model_class": "LlamaModel"}, {"lora_init": {"method": "eva"}}
    assert settings_of(replace(trained, config={"auto_mapping": theirs}), ["up"])["auto_mapping"] == theirs
    assert "auto_mapping" not in settings_of(replace(trained, config={"auto_mapping": ours}), ["up"])


def test_the_strengths_of_a_dial_are_told_while_its_record_fits(tmp_path):
    chosen = {"strength": 0.625, "weight": None, "layers": {"a": 0.625, "b": 0.625}}
    assert strength_of({"chosen": chosen}) == "0.625 in all layers"
    chosen |= {"weight": 3.0, "layers": {"a": 0.25, "b": 1.0}}
    said = "one for each of 2 layers, 0.25 to 1.00, mean 0.62"
    assert strength_of({"chosen": chosen}) == said and note_of(tmp_path) == ()
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    digests = digests_of(tmp_path, ["adapter_model.safetensors"])
    (tmp_path / "dial.json").write_text(json.dumps({"chosen": chosen, "sha256": digests}))
    assert note_of(tmp_path) == (f"its strength is the dial's: {said}",)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"others")
    assert note_of(tmp_path) == ()


def test_all_tensors_have_the_names_that_peft_gives_them():
    layers = {
        "h.up": pair(magnitude=torch.ones(4)), "emb": pair(ends=EMBEDDING),
        "h.experts.down": Layer(torch.arange(12.0).reshape(2, 2, 3), torch.arange(16.0).reshape(2, 4, 2), 1.0),
    }  # fmt: skip
    layers["h.up"] = replace(layers["h.up"].rescaled(0.5), a=layers["h.up"].a.half())
    trained = Trained({}, layers, {"other": torch.ones(1)})
    found, prefix = trained.tensors(), "base_model.model."
    assert {name: (tensor.dtype, [*tensor.shape]) for name, tensor in found.items()} == {
        "other": (torch.float32, [1]),
        f"{prefix}h.up.lora_A.weight": (torch.float16, [2, 3]),
        f"{prefix}h.up.lora_B.weight": (torch.float16, [4, 2]),
        f"{prefix}h.up.lora_magnitude_vector": (torch.float32, [4]),
        f"{prefix}emb.lora_embedding_A": (torch.float32, [2, 3]),
        f"{prefix}emb.lora_embedding_B": (torch.float32, [4, 2]),
        f"{prefix}h.experts.lora_A.weight": (torch.float32, [4, 3]),
        f"{prefix}h.experts.lora_B.weight": (torch.float32, [4, 4]),
    }
    assert all(tensor.is_contiguous() for tensor in found.values())
    assert torch.equal(found[f"{prefix}h.up.lora_B.weight"], torch.full((4, 2), 2.0).half())
    assert found[f"{prefix}h.experts.lora_B.weight"][0].tolist() == [0.0, 8.0, 1.0, 9.0]  # by rank, then by expert
    assert trained.other_shapes == {"other": torch.Size([1])}
