"""Quantized bases: what rounding took is read layer by layer, and given back by the start that is made for it."""

import re
import shutil
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import lora_init
from lora_init import LoraInitError, QuantizationErrors, build_adapter, collect, export_adapter, find_targets, mean_loss
from lora_init.adapters.peft_model import adapter_layers
from lora_init.building import quantized
from lora_init.building.quantized import loss_or_distance, read_product, with_losses
from lora_init.layers.targets import Target
from lora_init.loading.models import QUANTIZATIONS, load_model
from tests.adapters.made import made_up_statistics, same, snapshot
from tests.collection.made import PackedLinear, rounded
from tests.commands import save_model
from tests.conftest import batches_for, refused, tiny_llama

DOWN = "model.layers.1.mlp.down_proj"


def plain(seed=3):
    torch.manual_seed(seed)
    return tiny_llama(hidden_size=64, intermediate_size=128)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("float")
    plain().save_pretrained(directory, max_shard_size="100KB")  # several files
    assert len(list(directory.glob("*.safetensors"))) > 1
    return directory


def load(directory, name="nf4"):
    settings = {"quantization_config": dict(QUANTIZATIONS[name]), "device_map": {"": "cpu"}}
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **settings)


def labelled_batches(n=24):
    """Batches whose labels are what the plain model predicts, so that rounding its weights raises the loss."""
    model, batches = plain(), batches_for("llama", n)
    for batch in batches:
        with torch.no_grad():
            best = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
        shifted = torch.cat([batch["labels"][:, :1], best[:, :-1]], dim=1)
        batch["labels"] = shifted.masked_fill(batch["attention_mask"] == 0, -100)
    return batches


@pytest.mark.parametrize("name", QUANTIZATIONS)
@pytest.mark.parametrize("ran", [False, True], ids=["fresh", "ran"])  # bitsandbytes packs weights when they are used
def test_errors_are_those_of_the_layers_own_dequantization(name, ran, directory):
    from bitsandbytes.functional import dequantize_4bit

    fresh, model, float_model = load(directory, name), load(directory, name), plain()
    if ran:
        with torch.no_grad():
            model(**batches_for("llama")[0])
    errors = QuantizationErrors(model, find_targets(model).layers)
    assert list(errors) == list(find_targets(float_model).layers)
    for layer in errors:
        module, weight = fresh.get_submodule(layer), float_model.get_submodule(layer).weight.detach()
        if name == "int8":
            own = module.weight.CB.float() * module.weight.SCB[:, None] / 127
        else:
            own = dequantize_4bit(module.weight.data, module.weight.quant_state).float()
        assert torch.equal(errors.weight(layer), weight)
        # In the kernel for this processor steps and scales are bfloat16: 2^-7 of a weight, where rounding takes 2^-3.
        torch.testing.assert_close(errors[layer], weight - own, atol=2.0**-7 * float(weight.abs().max()), rtol=0)


def test_errors_of_any_layer_that_multiplies(directory):
    model = plain()
    layer = PackedLinear(model.get_submodule(DOWN))
    layer.qweight //= 10
    layer.qweight *= 10
    model.set_submodule(DOWN, layer)
    errors = QuantizationErrors(model, {DOWN: find_targets(model, [DOWN]).layers[DOWN]}, directory)
    torch.testing.assert_close(errors[DOWN], plain().get_submodule(DOWN).weight.detach() - layer.qweight / 1000)


@pytest.mark.parametrize("large_bias", [0.0, 100.0])
def test_weights_that_the_checkpoint_has_transposed(tmp_path, large_bias):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=4, n_positions=64)
    float_model = GPT2LMHeadModel(config).eval()
    for block in float_model.transformer.h:
        nn.init.constant_(block.attn.c_proj.bias, large_bias)  # a square weight
    float_model.save_pretrained(tmp_path)
    model = load(tmp_path)
    errors = QuantizationErrors(model, find_targets(model).layers)
    bias = model.transformer.h[0].attn.c_proj.bias
    for name in errors:
        weight = float_model.get_submodule(name).weight.detach().T
        assert torch.equal(errors.weight(name), weight)
        assert 0.05 < float(errors[name].norm() / weight.norm()) < 0.2
    assert model.transformer.h[0].attn.c_proj.bias is bias and bool((bias == large_bias).all())
    batch = batches_for("gpt2")[0]
    with torch.no_grad(), errors.undone():
        torch.testing.assert_close(model(**batch).logits, float_model(**batch).logits, atol=1e-4, rtol=1e-4)


def test_initialize_gives_the_quantized_model_its_loss_back(directory):
    model, batches = load(directory), labelled_batches()
    aside = labelled_batches(40)[24:]
    quantized, exact = mean_loss(model, aside), mean_loss(plain(), aside)
    adapted = lora_init.initialize(model, batches, rank=16, rho=1, method="qera")
    assert mean_loss(adapted, aside) < quantized - 0.4 * (quantized - exact)
    assert adapted.peft_config["default"].r == 16


@pytest.mark.parametrize("options", [dict(lora_alpha=16), dict(lora_alpha=3), dict(lora_alpha=3, use_rslora=True)])
def test_the_scaling_is_divided_out(options, directory):
    model, batches = load(directory), labelled_batches(4)
    stats, errors = collect(model, batches, rank=4, rho=1), QuantizationErrors(model, find_targets(model).layers)
    products = []
    for given in ({}, options):
        init = build_adapter(stats, 4, "qera", errors=errors, **given)
        a, b = init.weights[DOWN]
        products.append(init.scaling * b @ a)
    torch.testing.assert_close(products[0], products[1], rtol=1e-4, atol=1e-6)
    assert all(after < before for before, after in init.errors.values())


def test_a_correction_that_does_not_lower_the_loss_is_refused(directory):
    model, batches = load(directory), labelled_batches(8)
    for batch in batches:  # labels that the plain model finds unlikely: rounding lowers their loss
        batch["labels"] = batch["labels"].clone()
    stats = collect(model, batches[4:], rank=4, rho=1)
    errors = QuantizationErrors(model, stats.targets)
    init = build_adapter(stats, 4, "qera", errors={name: -errors[name] for name in errors})
    loss_of = loss_or_distance(model, errors, batches[:4])
    refused("nothing to gain", with_losses, model, init, errors, loss_of)
    assert with_losses(model, init, errors, loss_of, unchecked=True).share_closed < 0
    half = build_adapter(stats, 4, "qera", errors={name: -errors[name].bfloat16() for name in errors})
    torch.testing.assert_close(half.weights[DOWN].a, init.weights[DOWN].a, rtol=0.1, atol=0.1)
    refused("all finite", build_adapter, stats, 4, "qera", errors={name: errors[name] / 0 for name in errors})


def check_refused(message, model, directory, layers=None):
    errors = QuantizationErrors(model, find_targets(model, layers or "all-linear").layers, directory)
    refused(message, lambda: errors[next(iter(errors))])


def test_what_is_not_read_is_refused_in_one_line(directory, tmp_path):
    model = load(directory)
    refused("cannot be read", QuantizationErrors, model, find_targets(model).layers, tmp_path / "nothing")
    other = tmp_path / "wider"
    tiny_llama(hidden_size=64, intermediate_size=192).save_pretrained(other)
    said = r"layer 'model.layers.0.mlp.gate_proj', a Linear4bit.*\[192, 64\]"
    refused(said, QuantizationErrors, model, find_targets(model).layers, other)
    same_shapes = tmp_path / "other"
    plain(seed=4).save_pretrained(same_shapes)
    check_refused(r"\|W - Q\| is 1\.\d+ \|W\|.*0\.3 at most", model, same_shapes)
    doubled = tmp_path / "doubled"
    shutil.copytree(directory, doubled)
    for file in doubled.glob("*.safetensors"):
        save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    check_refused("0.50", model, doubled)
    for file in doubled.glob("*.safetensors"):
        save_file({name: tensor * torch.nan for name, tensor in load_file(file).items()}, file)
    check_refused(r"\|W - Q\| is nan \|W\|", model, doubled)
    check_refused("it was not quantized", plain(), directory)
    with torch.device("meta"), pytest.raises(LoraInitError, match="not in memory"):
        QuantizationErrors(plain(), find_targets(plain()).layers, directory)
    refused("loaded from", QuantizationErrors, plain(), find_targets(plain()).layers)
    model.config.quantization_config.to_json_file(str(tmp_path / "q.json"))
    saved = tmp_path / "quantized"
    model.save_pretrained(saved)
    refused("is quantized", QuantizationErrors, model, find_targets(model).layers, saved)
    refused("is quantized already", load_model, str(save_model(model, saved)), quantize="nf4")


class Raises(nn.Linear):
    def forward(self, x):
        raise RuntimeError("no kernel for this processor")


class Squares(nn.Linear):
    def forward(self, x):
        return super().forward(x) ** 2


class Narrow(nn.Linear):
    def forward(self, x):
        return super().forward(x)[:, :3]


@pytest.mark.parametrize(("kind", "message"), [
    (Raises, "^here: what it multiplies by cannot be read: no kernel for this processor.$"),
    (Squares, "^here: it does not compute the product of its input with a matrix, .* Leave it out of the targets.$"),
    (Narrow, "^here: it does not compute the product"),
    (nn.Linear, None),
])  # fmt: skip
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_that_computes_no_product_is_refused_and_keeps_its_bias(kind, message, bias):
    model = nn.Sequential(kind(4, 6, bias))
    target, before = find_targets(nn.Sequential(nn.Linear(4, 6))).layers["0"], model[0].bias
    if message is None:
        torch.testing.assert_close(read_product(model[0], target, torch.float32, "here"), model[0].weight)
        model[0].weight.data[2, 3] = torch.nan
        message = "^here: it does not compute the product"
    refused(message, read_product, model[0], target, torch.float32, "here")
    assert model[0].bias is before and (before is not None) == bias


class Dropping(nn.Linear):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class Bare(nn.Module):
    """A layer without any parameter or buffer."""

    def __init__(self, matrix):
        super().__init__()
        self.matrices = [matrix]

    def forward(self, x):
        return x @ self.matrices[0].T


def test_a_layer_is_read_as_it_is_used_and_draws_no_random_number():
    layer, state = Dropping(4, 6).train(), torch.random.get_rng_state()
    target = Target("0", "Linear", 4, 6)
    torch.testing.assert_close(read_product(layer, target, torch.float32, "here"), layer.weight)
    assert layer.training and torch.equal(torch.random.get_rng_state(), state)
    torch.testing.assert_close(read_product(Bare(layer.weight), target, torch.float32, "here"), layer.weight)


def test_a_float_model_of_16_bits_may_have_been_rounded(directory):
    model = rounded(plain()).bfloat16()
    errors = QuantizationErrors(model, find_targets(model).layers, directory)
    wanted = plain().get_submodule(DOWN).weight - model.get_submodule(DOWN).weight.float()
    torch.testing.assert_close(errors[DOWN], wanted)
    check_refused(r"\|W - Q\| is 1\.\d+ \|W\|.*quantization makes 0\.9 at most", rounded(plain(seed=4)), directory)


def test_a_packed_weight_that_lost_nothing_has_an_error_of_zero(tmp_path):
    model = plain()
    layer = PackedLinear(model.get_submodule(DOWN))
    model.get_submodule(DOWN).weight.data = layer.qweight / 1000
    model.save_pretrained(tmp_path)
    model.set_submodule(DOWN, layer)
    errors = QuantizationErrors(model, {DOWN: find_targets(model, [DOWN]).layers[DOWN]}, tmp_path)
    assert float(errors[DOWN].abs().max()) < 1e-6


def test_a_packed_weight_of_zeros_has_an_error_of_zero(tmp_path):
    model = plain()
    torch.nn.init.zeros_(model.get_submodule(DOWN).weight)
    model.save_pretrained(tmp_path)
    model.set_submodule(DOWN, PackedLinear(model.get_submodule(DOWN)))
    errors = QuantizationErrors(model, {DOWN: find_targets(model, [DOWN]).layers[DOWN]}, tmp_path)
    assert float(errors[DOWN].abs().max()) == 0


def test_a_square_weight_is_undone_before_anything_else_was_read(directory):
    model, name = plain(), "model.layers.0.self_attn.q_proj"
    layer = PackedLinear(model.get_submodule(name))
    model.set_submodule(name, layer)
    errors = QuantizationErrors(model, {name: find_targets(model, [name]).layers[name]}, directory)
    rows = torch.randn(3, 64)
    with errors.undone():
        torch.testing.assert_close(layer(rows), rows @ plain().get_submodule(name).weight.T)


def test_a_layer_that_is_missing_in_part_or_unknown_to_the_checkpoint_is_refused(directory):
    model = plain()
    model.extra = nn.Linear(64, 64)
    extra = find_targets(model, ["extra"]).layers
    words = re.escape(f"layer 'extra', a Linear: its weight [64, 64] is not in '{directory}'. Name the float model")
    refused(f"^{words}", QuantizationErrors, model, extra, directory)
    model.extra.weight = nn.Parameter(torch.empty(64, 64, device="meta"))
    refused("^layer 'extra', a Linear: its weights are not in memory", QuantizationErrors, model, extra, directory)


def test_what_has_no_whole_matrix_is_refused_before_anything_is_read(directory):
    model = plain()
    model.conv = nn.Conv2d(3, 4, 2)
    said = "^layer 'conv', a Conv2d: only linear layers can be corrected. Leave it out of the targets.$"
    refused(said, QuantizationErrors, model, find_targets(model, ["conv"]).layers, directory)
    experts = {"experts": Target("experts", "Parameter", 8, 8, experts=2)}
    refused("^layer 'experts', a Parameter: only linear", QuantizationErrors, model, experts, directory)
    model.lm_head.weight.full_tensor = lambda: None  # as torch's DTensor has it, of which a process holds a part
    said = "^processes hold a part of each weight, and errors are read from whole ones. Use one.$"
    refused(said, QuantizationErrors, model, find_targets(model).layers, directory)


@pytest.mark.parametrize("bias", [None, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_layer_that_is_undone_computes_in_the_type_of_its_rows(dtype, bias, directory):
    model, rows = plain(), torch.randn(3, 128, dtype=dtype)
    expected = rows.float() @ model.get_submodule(DOWN).weight.T
    layer = PackedLinear(model.get_submodule(DOWN))
    layer.bias = None
    if bias is not None:
        layer.bias = nn.Parameter(torch.randn(64).to(bias))
        expected = expected + layer.bias.float()
    model.set_submodule(DOWN, layer)
    errors = QuantizationErrors(model, {DOWN: find_targets(model, [DOWN]).layers[DOWN]}, directory)
    with errors.undone():
        found = layer(rows)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0.0, atol=4 * torch.finfo(dtype).eps)  # numbers up to 3


@pytest.mark.parametrize("masked", [True, False])
def test_without_a_loss_the_distance_to_the_outputs_of_the_whole_weights_counts(masked, directory):
    """One minus the cosine, of each token that is no padding, by hand."""
    model, batches = plain(), batches_for("llama", 2)
    layer = PackedLinear(model.get_submodule(DOWN))
    layer.qweight //= 20
    layer.qweight *= 20
    model.set_submodule(DOWN, layer)
    errors = QuantizationErrors(model, {DOWN: find_targets(model, [DOWN]).layers[DOWN]}, directory)
    data, cosines = [], []
    for batch in batches:
        batch["attention_mask"][0, :3] = 0
        data.append({"input_ids": batch["input_ids"]} | ({"attention_mask": batch["attention_mask"]} if masked else {}))
        with torch.no_grad():
            got, wanted = (one(**data[-1]).logits for one in (model, plain()))
        kept = batch["attention_mask"].bool() if masked else torch.ones_like(batch["input_ids"]).bool()
        cosines.append(torch.cosine_similarity(got[kept], wanted[kept], dim=-1))
    expected = 1 - float(torch.cat(cosines).mean())
    assert expected > 1e-4
    distance = loss_or_distance(model, errors, data)
    assert distance(model) == pytest.approx(expected, rel=1e-3) and 0.0 <= distance(plain()) < 1e-6
    refused("^no batch is left to measure the loss on. Give more examples.$", loss_or_distance, model, errors, [])


def test_the_distance_of_a_model_that_takes_and_returns_tensors():
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5)).train()
    other, batches = nn.Linear(4, 6).eval(), [torch.randn(3, 4), torch.randn(2, 4)]
    distance = loss_or_distance(
        model, SimpleNamespace(undone=nullcontext), batches, forward=lambda model, batch: model(batch)
    )
    rows = torch.cat(batches)
    expected = 1 - torch.cosine_similarity(model[0](rows), other(rows), dim=-1).mean().item()
    assert distance(model) == pytest.approx(0, abs=1e-6) and distance(other) == pytest.approx(expected, rel=1e-3)
    assert model.training


def test_a_mask_of_tokens_says_nothing_of_outputs_that_are_one_for_each_text():
    batch = {"x": torch.randn(3, 4), "attention_mask": torch.ones(3, 7)}
    distance = loss_or_distance(
        nn.Linear(4, 2), SimpleNamespace(undone=nullcontext), [batch], forward=lambda model, batch: (model(batch["x"]),)
    )
    assert 0 <= distance(nn.Linear(4, 2)) <= 2


def test_export_knows_which_base_an_adapter_is_for(directory, tmp_path):
    model, batches = load(directory), labelled_batches(8)
    stats = collect(model, batches, rank=4, rho=1, task_type="CAUSAL_LM")
    errors = dict(QuantizationErrors(model, stats.targets))
    init = build_adapter(stats, 4, "qera", errors=errors)
    start, trained = init.save_pretrained(tmp_path / "start", model=model), tmp_path / "trained"
    adapted = init.apply(model)
    generator = torch.Generator().manual_seed(0)
    learned = {}
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # training
            learned[name] = 0.01 * torch.randn(parameter.shape, generator=generator)
            parameter.data += learned[name]
    with torch.no_grad():  # before it is saved: on this processor bitsandbytes 0.50.2 damages packed weights then
        expected = adapted.eval()(**batches[0]).logits
    adapted.save_pretrained(trained)
    start_share = export_adapter(start, tmp_path / "start served").error_share
    served = export_adapter(trained, tmp_path / "served")  # for the same quantized base: as it is
    on_quantized = PeftModel.from_pretrained(load(directory), served.path)
    with torch.no_grad():  # with gradients it takes another kernel, of other rounding
        torch.testing.assert_close(on_quantized(**batches[0]).logits, expected, atol=1e-3, rtol=1e-3)
    with pytest.raises(LoraInitError, match="float weights, which lack nothing"):
        export_adapter(trained, tmp_path / "merged", merge_into=str(directory))
    merged = export_adapter(trained, tmp_path / "merged", merge_into=str(directory), start=start)
    change = AutoModelForCausalLM.from_pretrained(merged.path).get_submodule(DOWN).weight
    a = adapted.get_submodule(f"base_model.model.{DOWN}").lora_A["default"].weight
    wanted = init.scaling * learned[f"base_model.model.{DOWN}.lora_B.default.weight"] @ a
    torch.testing.assert_close(change, plain().get_submodule(DOWN).weight + wanted, atol=1e-5, rtol=1e-4)
    assert init.error_size == pytest.approx(float(sum(e.square().sum() for e in errors.values())) ** 0.5, rel=1e-4)
    size = float(sum((init.scaling * (b @ a)).square().sum() for a, b in init.weights.values())) ** 0.5
    assert start_share == pytest.approx(init.error_size / size, rel=1e-4)
    assert merged.error_share > 0 and served.error_share > 0


def test_a_matrix_is_read_in_parts_of_which_the_last_is_smaller(monkeypatch):
    monkeypatch.setattr(quantized, "_ROWS", 3)
    layer = torch.nn.Linear(8, 5, bias=False)
    read = quantized._outputs_for_units(layer, 8, torch.float32, torch.device("cpu"))
    assert torch.equal(read, layer.weight)


def packed(kind=torch.uint8, n=8, scales=0):
    layer = nn.Linear(4, 2)
    layer.register_buffer("packed", torch.zeros(n, dtype=kind))
    layer.register_buffer("steps", torch.zeros(scales, dtype=torch.uint8))
    return layer


@pytest.mark.parametrize(("layer", "bits"), [
    (packed(n=8), 8), (packed(torch.int32, n=2), 8), (packed(n=8, scales=1), 8), (packed(n=8, scales=2), 0),
    (packed(n=7), 0), (packed(n=4), 4), (packed(n=4, scales=1), 4), (packed(n=4, scales=2), 0), (packed(n=3), 0),
    (nn.Linear(4, 2), 0), (packed(torch.float16, n=8), 0), (nn.Sequential(packed()), 0),
])  # fmt: skip
def test_the_bits_of_a_weight_are_those_that_its_numbers_take_with_their_scales(layer, bits):
    assert quantized._bits(layer, Target("x", "Linear", 4, 2)) == bits


def measured_with(losses, unchecked=False):
    """Check an adapter by losses that are known, and note where each was measured."""
    model, seen, inside = tiny_llama(), [], []
    errors = SimpleNamespace(undone=lambda: noting(inside))

    def loss_of(measured):
        seen.append((measured is model, bool(inside), bool(adapter_layers(measured))))
        return losses[len(seen) - 1]

    init = build_adapter(made_up_statistics(model, ["q_proj"]), 2)
    before = snapshot(model)
    try:
        return with_losses(model, init, errors, loss_of, unchecked)
    finally:
        assert same(before, snapshot(model))
        assert seen == [(True, False, False), (True, True, False), (False, False, True)]


@contextmanager
def noting(inside):
    inside.append(1)
    yield
    inside.clear()


def test_the_losses_are_those_of_the_quantized_the_whole_and_the_corrected_model():
    checked = measured_with([3.0, 2.0, 2.5])
    assert (checked.losses, checked.exact_loss, checked.share_closed) == ((3.0, 2.5), 2.0, 0.5)
    for after in (3.0, 3.5, float("nan")):
        said = refused(".", measured_with, [3.0, 2.0, after])
        assert said == (
            f"method 'eva': on the examples set aside the loss is 3 in the quantized model and {after:.5g} with the "
            "correction, so there is nothing to gain; with the weights as they were it is 2. Give more data of the "
            "kind that the model is for, or pass unchecked=True."
        )
    assert measured_with([3.0, 2.0, 3.5], unchecked=True).losses == (3.0, 3.5)


def test_a_model_with_a_loss_is_measured_by_it():
    model, batches = tiny_llama(), batches_for("llama", 2)
    measure = loss_or_distance(model, None, iter(batches))
    assert measure(model) == mean_loss(model, batches)

    def forward(model, batch):
        return model(**{key: value for key, value in batch.items() if key != "labels"})

    def loss(output, batch):
        return output.logits.square().mean()

    own = loss_or_distance(model, None, batches, forward, loss)
    assert own(model) == mean_loss(model, batches, forward, loss) != measure(model)
