"""What tells models apart."""

import copy
import hashlib
import json
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lora_init.layers.identity import count_parameters, differing_config, dtype_of, fingerprint, model_config
from tests.conftest import tiny_llama


def test_fingerprints_tell_names_shapes_and_values_apart_but_not_precisions():
    model, layer = tiny_llama(), nn.Linear(2, 2)
    assert fingerprint(model) == fingerprint(copy.deepcopy(model).to(torch.bfloat16))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0] += 1.0
    assert fingerprint(model) != fingerprint(other)
    assert fingerprint(tiny_llama(num_hidden_layers=1)) != fingerprint(model)
    assert fingerprint(nn.Sequential(OrderedDict(a=layer))) != fingerprint(nn.Sequential(OrderedDict(b=layer)))


def test_a_configuration_is_known_by_what_it_computes():
    """The record of one that computes otherwise differs; of one that is stored or named otherwise, it does not."""
    model = tiny_llama()
    recorded = json.loads(json.dumps(model_config(model)))
    assert differing_config(recorded, model_config(model)) == ""
    assert differing_config({}, model_config(model)) == differing_config("x", model_config(model)) == ""  # no record
    for name, value in dict(
        _name_or_path="x", dtype="bfloat16", use_cache=False, attention_dropout=0.5, eos_token_id=7,
        architectures=["A"], id2label={0: "a"}, initializer_range=0.5,
    ).items():  # fmt: skip
        setattr(model.config, name, value)
    assert differing_config(recorded, model_config(model)) == ""
    model.config.rms_norm_eps = 0.25
    assert differing_config(recorded, model_config(model)) == "rms_norm_eps 1e-06 instead of 0.25"
    model.config.rms_norm_eps = 1e-6
    model.config.rope_parameters["rope_theta"] = 5.0
    assert differing_config(recorded, model_config(model)) == "rope_parameters.rope_theta 10000.0 instead of 5.0"
    model.config.rope_parameters["rope_theta"] = 10000.0
    model.config.sliding_window = 4  # one that was not there says nothing; from None, it does
    assert differing_config(recorded, model_config(model)) == ""
    recorded = model_config(model) | {"config.sliding_window": None}
    assert differing_config(recorded, model_config(model)) == "sliding_window None instead of 4"
    nested = model_config(model) | {"config.rope_parameters": None}
    assert differing_config(nested, model_config(model)) == "rope_parameters None instead of 'given'"
    assert model_config(nn.Linear(2, 2)) == {}
    rope = model_config(model) | {"config.rope_parameters.attention_factor": 3.0}  # holds what is set
    assert differing_config(rope, model_config(model)) == "rope_parameters.attention_factor 3.0 instead of None"
    assert differing_config(model_config(model), rope) == "rope_parameters.attention_factor None instead of 3.0"
    assert model_config(nn.ModuleDict({"body": model})) == model_config(model)
    model.config.chunk_size_feed_forward, model.config.layerdrop = 7, 0.5
    assert differing_config(rope | {"config.layerdrop": 0.1}, rope | model_config(model)) == ""


def test_tokens_count_where_they_decide_what_a_module_computes():
    from transformers import CLIPTextConfig, CLIPTextModel, RobertaConfig, RobertaModel

    sizes = dict(vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    one, other = (RobertaModel(RobertaConfig(**sizes, pad_token_id=token)) for token in (1, 2))
    said = differing_config(json.loads(json.dumps(model_config(one))), model_config(other))
    assert said == "padding of embeddings.position_embeddings 1 instead of 2"
    sizes = dict(vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    one, other = (model_config(CLIPTextModel(CLIPTextConfig(**sizes, eos_token_id=token))) for token in (3, 4))
    assert differing_config(one, other).endswith("3 instead of 4")
    llama = tiny_llama()
    before = model_config(llama)
    llama.config.pad_token_id = 5
    assert differing_config(before, model_config(llama)) == ""
    before["config.mask_token_id"], llama.config.mask_token_id = 4, 5  # by which ESM scales its embeddings
    assert differing_config(before, model_config(llama)) == "mask_token_id 4 instead of 5"


def test_padding_and_parting_count_where_a_module_keeps_them():
    from transformers import (
        BigBirdConfig,
        BigBirdForQuestionAnswering,
        CTRLConfig,
        CTRLForSequenceClassification,
        XLMConfig,
        XLMModel,
    )

    xlm = dict(vocab_size=32, emb_dim=8, n_layers=1, n_heads=2)
    ctrl = dict(vocab_size=32, n_embd=8, dff=8, n_layer=1, n_head=2)
    bird = dict(vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    for make, key in (
        (lambda token: XLMModel(XLMConfig(**xlm, pad_token_id=token)), "padding of texts of the model"),
        (lambda token: CTRLForSequenceClassification(CTRLConfig(**ctrl, pad_token_id=token)), "pad_token_id"),
        (lambda token: BigBirdForQuestionAnswering(BigBirdConfig(**bird, sep_token_id=token)), "parting of the model"),
    ):
        one, other = (json.loads(json.dumps(model_config(make(token)))) for token in (3, 4))
        said = differing_config(one, other)
        assert said.startswith(key) and said.endswith("3 instead of 4")


def test_all_models_that_a_module_of_ones_own_holds_count():
    other = tiny_llama(rms_norm_eps=0.5)
    pair, changed = (nn.ModuleDict({"a": tiny_llama(), "b": b}) for b in (tiny_llama(), other))
    assert differing_config(model_config(pair), model_config(changed)) == "b.rms_norm_eps 1e-06 instead of 0.5"
    assert not any(".model." in name for name in model_config(pair))  # a part has no configuration of its own
    pair.config = changed.config = {"width": 3}  # somebody's own says nothing of what is inside
    assert differing_config(model_config(pair), model_config(changed)).endswith("rms_norm_eps 1e-06 instead of 0.5")


def test_saved_buffers_are_part_of_a_model():
    norm = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    norm.register_buffer("not_saved", torch.ones(2), persistent=False)
    before = json.loads(json.dumps(model_config(norm)))
    norm.not_saved.add_(1)
    norm[1].num_batches_tracked.add_(5)
    norm.adapted = nn.ModuleDict({"lora_A": nn.BatchNorm1d(2)})  # an adapter's, which is not the base's
    assert differing_config(before, model_config(norm)) == ""
    assert "config.saved buffers" not in model_config(norm.to("meta")) and differing_config(before, {}) == ""
    half = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.BatchNorm1d(2).to("meta"))
    assert "config.saved buffers" not in model_config(half)  # some values alone are those of no model
    norm = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    norm[1].running_mean.add_(1)
    assert differing_config(before, model_config(norm)).startswith("saved buffers ")


def test_the_token_that_a_classifier_ends_a_row_by_counts():
    from transformers import LlamaConfig, LlamaForSequenceClassification

    sizes = dict(vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    made = [LlamaForSequenceClassification(LlamaConfig(**sizes, pad_token_id=token)) for token in (0, 2, None)]
    first, second, unknown = map(model_config, made)
    assert differing_config(first, second) == "pad_token_id of score 0 instead of 2"
    assert differing_config(first, unknown) == ""


class SeveralTexts:
    """A configuration of two models of text, or, with one, of a model of text and another."""

    pad_token_id, eos_token_id, model_type = 3, 4, "odd"

    def __init__(self, text=None):
        self.text = text

    def to_dict(self):
        return {"width": 2}

    def get_text_config(self):
        if self.text is None:
            raise ValueError("several")
        return self.text


@pytest.mark.parametrize(
    ("text", "tokens"), [(None, (3, 4)), (SimpleNamespace(pad_token_id=7, eos_token_id=[1]), (7,))]
)
def test_the_tokens_of_heads_are_those_of_the_text_or_of_all_where_there_are_several(text, tokens):
    model = nn.ModuleDict({"score": nn.Linear(2, 2), "classification_head": nn.Linear(2, 2), "classifier": nn.ReLU()})
    model.config = SeveralTexts(text)
    names = ("config.pad_token_id of score", "config.eos_token_id of classification_head")
    assert model_config(model) == {"config.width": 2, **dict(zip(names, tokens, strict=False))}


def test_places_of_tokens_in_modules_have_names():
    model = nn.ModuleDict(
        {"position_table": nn.Embedding(4, 2, padding_idx=1), "table": nn.Embedding(4, 2, padding_idx=2)}
    )
    model.eos_token_id, model["table"].pad_index, model["table"].sep_token_id = 5, 6, [7]
    assert model_config(model) == {
        "config.end of the model": 5, "config.padding of position_table": 1, "config.padding of texts of table": 6,
    }  # fmt: skip


class Packed(torch.Tensor):
    """A weight as some libraries keep it: nothing can be read of it before it is unpacked."""

    def reshape(self, *shape):
        raise NotImplementedError("no reshape of what is packed")

    def dequantize(self):
        return self.as_subclass(torch.Tensor)


def test_the_fingerprint_of_a_weight_in_a_class_of_its_own_is_that_of_its_numbers():
    def layer(weight):
        made = nn.Linear(2, 3, bias=False)
        made.weight = nn.Parameter(weight, requires_grad=False)
        return made

    weight = torch.arange(6.0).reshape(3, 2)
    packed = layer(weight.as_subclass(Packed))
    assert type(packed.weight) is Packed
    assert fingerprint(packed) == fingerprint(layer(weight)) != fingerprint(layer(weight + 1))


def test_parameters_are_counted_once_and_unpacked():
    layer = nn.Linear(3, 4)
    shared = nn.ModuleDict({"a": layer, "b": layer, "c": nn.Linear(2, 2, bias=False)})
    assert count_parameters(shared) == 3 * 4 + 4 + 4
    shared["c"].weight.quant_state = SimpleNamespace(shape=torch.Size([8, 5]))  # as bitsandbytes keeps 4-bit weights
    assert count_parameters(shared) == 3 * 4 + 4 + 40


def test_the_type_of_a_model_is_that_of_its_first_weight_in_floats():
    assert dtype_of(tiny_llama().bfloat16()) == "bfloat16" and dtype_of(nn.Linear(2, 2)) == "float32"
    assert dtype_of(nn.ReLU()) == ""
    packed = nn.Linear(2, 2)
    packed.weight = nn.Parameter(torch.ones(2, 2).to(torch.int8), requires_grad=False)
    packed.bias.data = packed.bias.data.half()
    assert dtype_of(packed) == "float16"


def test_a_fingerprint_is_a_hash_of_sixteen_values_of_each_weight():
    """Written out, so that no release of ours gives a model another one: files are known by it."""
    layer = nn.Linear(7, 5)
    digest = hashlib.sha256()
    for name, weight in (("weight", layer.weight), ("bias", layer.bias)):
        flat = weight.detach().flatten()
        places = [int(i * (len(flat) - 1) / 15) for i in range(16)]
        digest.update(f"{name}:{tuple(weight.shape)};".encode())
        digest.update(flat[places].bfloat16().view(torch.int16).numpy().tobytes())
    assert fingerprint(layer) == digest.hexdigest()[:32]
    with torch.device("meta"):  # of which shapes alone are known
        away = nn.Linear(7, 5)
    assert fingerprint(away) == hashlib.sha256(b"weight:(5, 7);bias:(5,);").hexdigest()[:32]
    empty = nn.Module()
    empty.weight = nn.Parameter(torch.zeros(2, 0))
    assert fingerprint(empty) == hashlib.sha256(b"weight:(2, 0);").hexdigest()[:32]


class Configured(nn.Module):
    def __init__(self, **config):
        super().__init__()
        self.config = config


def test_a_configuration_is_flat_and_leaves_out_what_computes_nothing():
    config = dict(
        width=3, name_or_path="x", _private=1, torch_dtype="x", use_cache=True, dropout=0.1, token_dropout=True,
        attn_pdrop=0.1, pad_token_id=0, decoder_start_token_id=1, sizes=(1, 2), kinds=["a"], odd=object(),
        inner={"deep": {"x": None}, "bos_token_id": 3}, output_hidden_states=True, output_size=4,
    )  # fmt: skip
    assert model_config(Configured(**config)) == {
        "config.width": 3, "config.token_dropout": True, "config.decoder_start_token_id": 1, "config.sizes": [1, 2],
        "config.inner": "given", "config.inner.deep": "given", "config.inner.deep.x": None, "config.kinds": ["a"],
        "config.output_size": 4,
    }  # fmt: skip
    frozen = type("FrozenDict", (dict,), {"__module__": "diffusers.configuration_utils"})
    whole = nn.ModuleDict({"a": Configured(x=1)})  # which a configuration of diffusers is of
    whole.config = frozen(y=2)
    assert model_config(whole) == {"config.y": 2}
    pair = nn.ModuleDict({"a": Configured(x=1), "b": nn.ModuleDict({"c": Configured(x=2)})})
    assert model_config(pair) == {"config.x": 1, "config.b.c": "given", "config.b.c.x": 2}


@pytest.mark.parametrize(("recorded", "config", "said"), [
    ({"config.a": 1}, {"config.a": 2}, "a 1 instead of 2"),
    ({"config.a": 1}, {}, ""),
    ({}, {"config.a": 2}, ""),
    ({"other": 1}, {"other": 1}, ""),
    ({"rows": 1}, {}, ""),
    ({"config.b": 1, "config.a": 1}, {"config.a": 2, "config.b": 2}, "a 1 instead of 2"),  # in the order of the model
    ({"config.a": "x" * 99}, {"config.a": None}, f"a '{'x' * 59} instead of None"),
    ({"config.r": "given", "config.r.t": 1}, {"config.r": "given"}, "r.t 1 instead of None"),
    ({"config.r": "given", "config.r.t": 1, "config.r.model_type": "m"},
     {"config.r": "given", "config.r.model_type": "m"}, ""),  # a whole configuration of another version
    ({"config.r": None, "config.r.t": 1}, {"config.r": None}, ""),
])  # fmt: skip
def test_the_first_entry_that_differs_is_said(recorded, config, said):
    assert differing_config(recorded, config) == said
