"""What tells models apart."""

import copy
import json
from collections import OrderedDict

import torch
from torch import nn

from lora_init.layers.identity import differing_config, fingerprint, model_config
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
    pair.config = changed.config = {"width": 3}  # somebody's own says nothing of what is inside
    assert differing_config(model_config(pair), model_config(changed)).endswith("rms_norm_eps 1e-06 instead of 0.5")


def test_saved_buffers_are_part_of_a_model():
    norm = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    norm.register_buffer("not_saved", torch.ones(2), persistent=False)
    before = json.loads(json.dumps(model_config(norm)))
    norm.not_saved.add_(1)
    norm.num_batches_tracked = 5
    assert differing_config(before, model_config(norm)) == ""
    assert "config.saved buffers" not in model_config(norm.to("meta")) and differing_config(before, {}) == ""
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
