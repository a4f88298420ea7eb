"""An adapter that is written at its strengths does what PEFT does at them, whatever patterns it has."""

import hashlib
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lora_init.keep.dial import strengths
from lora_init.keep.dialed import Change, Dial, Point, signed, summary_of, write_dialed
from lora_init.serving.base import read_base, with_changed_copies
from lora_init.serving.trained import read_trained, with_parameters
from tests.conftest import refused, tiny_llama
from tests.layers.made import mixtral
from tests.versions import NO_FUSED_EXPERTS

IDS = torch.arange(3, 23).reshape(2, 10)
KINDS = {
    "ranks": dict(target_modules=["q_proj", "k_proj"], rank_pattern={"layers.0.self_attn.q_proj": 9, "k_proj": 2}),
    "rsLoRA": dict(target_modules=["q_proj", "v_proj"], use_rslora=True, alpha_pattern={"v_proj": 5}),
    "embedding": dict(target_modules=["embed_tokens", "q_proj"], rank_pattern={"embed_tokens": 2}),
    "experts": dict(target_modules=["q_proj"], target_parameters=["experts.down_proj"]),
}


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto").eval()


def found(layers, weight):
    chosen = Point(sum(layers.values()) / len(layers), 1.0, 0.0, weight, layers)
    report = dict.fromkeys(("base", "trained", "chosen"), Change(1.0, 0.0, 0.1))
    return Dial("a rule", chosen, (chosen, chosen), (), report, report, (4, 4))


def saved(model, directory):
    """An adapter as if it were trained, read from its files, and its base."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.normal_(std=0.3)
    model.save_pretrained(directory)
    trained = read_trained(directory)
    return trained, read_base(trained.base, trained)


@pytest.mark.parametrize("form", ["uniform", "in B", "in alpha_pattern"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_is_written_does_what_peft_does_at_these_strengths(kind, form, tmp_path, monkeypatch):
    if kind == "experts" and NO_FUSED_EXPERTS:
        pytest.skip("fused experts: transformers 5.0 and PEFT 0.19.1")
    (mixtral() if kind == "experts" else tiny_llama()).save_pretrained(tmp_path / "base")
    model = get_peft_model(load(tmp_path), LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8} | KINDS[kind]))
    trained, base = saved(model, tmp_path / "trained")
    trained = with_parameters(trained, base.parameters)
    layers = {name: 0.6 if form == "uniform" else 0.5 * i for i, name in enumerate(trained.layers)}
    with strengths(model.eval(), layers):
        expected = model(IDS).logits
    weight = None if form == "uniform" else 1.0
    in_pattern = form == "in alpha_pattern"
    picture = SimpleNamespace(savefig=lambda file: file.write_bytes(b"a picture"))
    monkeypatch.setattr(Dial, "plot", lambda dialed: picture)
    path = write_dialed(tmp_path / "out", trained, base, found(layers, weight), alpha_pattern=in_pattern)
    written = PeftModel.from_pretrained(load(tmp_path), path).eval()
    torch.testing.assert_close(written(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    tensors = load_file(path / "adapter_model.safetensors")
    assert sum("lora_" in key and "A" in key for key in tensors) == sum(map(bool, layers.values()))
    if in_pattern:  # weights are as trained
        before = load_file(tmp_path / "trained/adapter_model.safetensors")
        assert all(torch.equal(before[key], tensor) for key, tensor in tensors.items())
    assert "a rule" in (path / "README.md").read_text() and (path / "dial.png").read_bytes() == b"a picture"
    digest = {
        "adapter_model.safetensors": hashlib.sha256((path / "adapter_model.safetensors").read_bytes()).hexdigest()
    }
    told = {"sha256": digest} | json.loads(json.dumps(found(layers, weight).to_dict()))
    assert json.loads((path / "dial.json").read_text()) == told
    refused("exists", write_dialed, tmp_path / "out", trained, base, found(layers, weight))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert write_dialed("~/home", trained, base, found(layers, weight)) == tmp_path / "home"
    assert write_dialed(tmp_path / "out", trained, base, Dial.unmeasured("another rule", layers), True) == path
    card = (path / "README.md").read_text()  # without numbers there is no picture
    assert "another rule" in card and "png" not in card and not (path / "dial.png").exists()


@pytest.mark.parametrize("form", ["uniform", "in B", "in alpha_pattern"])
@torch.no_grad()
def test_rows_that_were_set_before_training_stay_whatever_the_strength(form, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    model = load(tmp_path)
    model.lm_head.weight[60:] = torch.randn(4, 32)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "lm_head"])
    model = get_peft_model(model, config)
    trained, base = saved(model, tmp_path / "trained")
    trained = with_changed_copies(trained, base)
    layers = {name: 0.6 if form == "uniform" else 0.4 * (name != "lm_head") for name in trained.layers}
    with strengths(model.eval(), layers):
        expected = model(IDS).logits
    dialed = found(layers, None if form == "uniform" else 1.0)
    path = write_dialed(tmp_path / "out", trained, base, dialed, alpha_pattern=form == "in alpha_pattern")
    written = PeftModel.from_pretrained(load(tmp_path), path).eval()
    torch.testing.assert_close(written(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    # A scaling of 0 could not be divided by again, as another dial or an export does.
    assert all(layer.scaling > 0 for layer in read_trained(path).layers.values())


@pytest.mark.parametrize(("change", "text"), [
    (Change(2.0, -0.5, 0.25), "2.000 (-0.500 ± 0.250, -20.0 %)"),
    (Change(1.5, 0.5, 0.0625), "1.500 (+0.500 ± 0.062, +50.0 %)"),
    (Change(0.5, 0.5, 0.25), "0.500 (+0.500 ± 0.250)"),  # above a loss of 0
    (Change(1.0, -0.0004, 0.0), "1.000 (+0.000 ± 0.000, +0.0 %)"),
])  # fmt: skip
def test_a_change_is_written_with_its_sign_and_its_share(change, text):
    assert str(change) == text


def test_a_difference_that_rounds_to_nothing_has_no_minus():
    assert [signed(one, 1) for one in (-0.04, 0.04, -0.06, 1.0)] == ["+0.0", "+0.0", "-0.1", "+1.0"]


BASE, TRAINED = Change(3.0, 1.0, 0.5), Change(2.0, 0.0, 0.0)
KEPT = Change(1.0, 0.0, 0.0), Change(1.5, 0.5, 0.125)
CURVE = tuple(Point(i / 2, 3.0 - i, i / 4, None, {"a": i / 2, "b": i / 2}) for i in range(3))
FITTED = Point(0.625, 2.25, 0.125, 3.0, {"a": 0.25, "b": 1.0})


def measured(**more):
    """A dial whose numbers are all different, of layers that were fitted."""
    task = {"base": BASE, "trained": TRAINED, "uniform": Change(2.25, 0.25, 0.1), "chosen": Change(2.125, 0.125, 0.1)}
    keep = {
        "base": KEPT[0],
        "trained": KEPT[1],
        "uniform": Change(1.25, 0.25, 0.1),
        "chosen": Change(1.125, 0.125, 0.1),
    }
    return Dial("a rule", FITTED, CURVE, (FITTED,), task, keep, (7, 8), ("one", "two"), (21, 24), **more)


def test_a_dial_is_told_in_words_and_as_plain_values():
    rows = {
        "strength": "one for each of 2 layers, 0.25 to 1.00, mean 0.62",
        "chosen by": "a rule",
        "task": "3.000 base, 2.000 as trained, 2.125 (+0.125 ± 0.100, +6.2 %) now",
        "text to keep": "1.000 base, 1.500 (+0.500 ± 0.125, +50.0 %) as trained, 1.125 (+0.125 ± 0.100, +12.5 %) now",
        "at one strength": "2.250 (+0.250 ± 0.100, +12.5 %) task, 1.250 (+0.250 ± 0.100, +25.0 %) text to keep",
        "measured on": "7 and 8 other examples of 21 and 24 that were read; ± is a 95 % interval",
        "note 1": "one",
        "note 2": "two",
    }
    assert measured().summary() == rows
    values = measured().to_dict()
    curve = [{"strength": i / 2, "task": 3.0 - i, "rise": i / 4, "weight": None} for i in range(3)]
    fitted = {"strength": 0.625, "task": 2.25, "rise": 0.125, "weight": 3.0, "layers": {"a": 0.25, "b": 1.0}}
    assert (values["curve"], values["fitted"], values["chosen"]) == (tuple(curve), (fitted,), fitted)
    assert (values["rule"], values["examples"], values["read"]) == ("a rule", (7, 8), (21, 24))
    assert values["task"]["base"] == {"loss": 3.0, "change": 1.0, "error": 0.5}
    del values["read"]  # as in older files
    assert summary_of(values)["measured on"] == "7 and 8 other examples; ± is a 95 % interval"


def test_a_dial_without_data_has_its_strength_alone():
    dialed = Dial.unmeasured("a rule", {"a": 0.5, "b": 0.5})
    rows = {"strength": "0.5 in all layers", "chosen by": "a rule", "measured on": "nothing: no data were given"}
    assert dialed.summary() == rows and dialed.strengths == {"a": 0.5, "b": 0.5}
    assert dialed.to_dict() == {
        "rule": "a rule", "chosen": {"strength": 0.5, "weight": None, "layers": {"a": 0.5, "b": 0.5}},
        "curve": (), "fitted": (), "task": {}, "keep": {}, "examples": (0, 0), "notes": (), "read": (0, 0),
    }  # fmt: skip


@pytest.mark.parametrize("weight", [None, 1.0])
def test_the_picture_is_a_file(weight, tmp_path):
    found({"a": 0.4, "b": 0.8}, weight).plot().savefig(tmp_path / "dial.png")
    assert (tmp_path / "dial.png").stat().st_size > 1000


def test_the_picture_has_each_point_where_it_was_measured():
    figure = measured().plot()
    left, right = figure.axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in left.lines}
    assert lines == {"task": [[0, 0], [0.5, -1], [1, -2]], "text to keep": [[0, 0], [0.5, 0.25], [1, 0.5]]}
    points = {bars.get_label(): bars.lines[0].get_xydata().tolist() for bars in right.containers}
    assert points == {
        "one strength": [[0.25, 2], [0.5, 1]], "one for each layer": [[0.125, 2.25]], "chosen": [[0.125, 2.25]],
    }  # fmt: skip
    assert [(text.get_text(), text.xy) for text in right.texts] == [(" 0.5", (0.25, 2.0)), (" 1", (0.5, 1.0))]
    assert [axes.get_xlabel() for axes in (left, right)] == [
        "strength, the same in all layers", "rise of the loss on text to keep",
    ]  # fmt: skip
    assert [axes.get_ylabel() for axes in (left, right)] == ["loss above the base's", "loss on the task"]
    assert [[text.get_text() for text in axes.get_legend().texts] for axes in (left, right)] == [[*lines], [*points]]
    assert figure.get_suptitle() == "Examples to choose by: a rule"
    unfitted = replace(measured(), fitted=()).plot().axes[1]
    assert [text.get_text() for text in unfitted.get_legend().texts] == ["one strength", "chosen"]
    assert not replace(measured(), rule="at $x^2$").plot()._suptitle.get_parse_math()  # a rule is plain text
