"""What tells models apart."""

import copy
from collections import OrderedDict

import torch
from torch import nn

from lora_init.layers.identity import fingerprint
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
