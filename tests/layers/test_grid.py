"""Where layers stand: kind and block, for every architecture."""

import pytest

from lora_init.layers.grid import layer_grid, layers_in, one_line_each, place_of, some, span
from lora_init.layers.targets import find_targets
from tests.conftest import MODELS


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_layer_of_every_architecture_has_a_cell_of_its_own(name):
    names = list(find_targets(MODELS[name]()).layers)
    grid = layer_grid(names)
    assert sorted(grid.cells.values()) == sorted(names)
    assert len(set(grid.kinds)) == len(grid.kinds)
    assert all(len(kind) < 30 for kind in grid.kinds)


def test_kinds_that_end_alike_and_layers_outside_blocks():
    assert layer_grid(["e.0.a.dense", "e.0.b.dense", "pooler.dense"]).kinds == ["a.dense", "b.dense", "pooler.dense"]
    assert layer_grid(["a.enc.0.x.q", "a.enc.0.y.q", "a.dec.0.x.q"]).kinds == ["a.enc x.q", "a.enc y.q", "a.dec q"]
    assert layer_grid(["h.0.up_proj", "h.0.gate_up_proj"]).kinds == ["up_proj", "gate_up_proj"]
    assert layer_grid(["enc.0.q", "dec.0.q"]).kinds == ["enc q", "dec q"]
    assert layer_grid(["h.0.q", "h.0.v", "h.1.q", "h.1.k", "h.1.v"]).kinds == ["q", "k", "v"]  # no rank for the first k
    assert layer_grid(["0.up", "1.up", "head"]).blocks == [-1, 0, 1]


def test_gate_and_up_in_one_count_twice_in_experts_alone():
    names = ("mlp.experts.gate_up_proj", "mlp.gate_up_proj", "mlp.experts.down_proj")
    assert [layers_in(f"model.layers.0.{name}") for name in names] == [2, 1, 1]


def test_a_grid_by_kind_and_block():
    names = ["h.1.q", "h.0.experts.0.up", "h.0.experts.1.up", "h.0.q", "head", "10.q"]
    grid = layer_grid(names)
    assert grid.blocks == [-1, 0, 1, 10]
    assert grid.by_kind == {
        "h 0.up": {0: "h.0.experts.0.up"}, "h 1.up": {0: "h.0.experts.1.up"}, "h q": {0: "h.0.q", 1: "h.1.q"},
        "head": {-1: "head"}, "q": {10: "10.q"},
    }  # fmt: skip
    assert list(grid.by_kind) == grid.kinds == ["h 0.up", "h 1.up", "h q", "head", "q"]


@pytest.mark.parametrize(("name", "place"), [
    ("model.layers.3.mlp.up_proj", (("model.layers", "mlp.up_proj"), 3)),
    ("12.up.0.x", (("", "up.0.x"), 12)),
    ("h.7.0", (("h", "0"), 7)),
    ("encoder.layer10.q", (("", "encoder.layer10.q"), -1)),
    ("net.5", (("", "net.5"), -1)),  # what ends the name is the layer itself
    ("lm_head", (("", "lm_head"), -1)),
])  # fmt: skip
def test_the_first_number_is_the_block(name, place):
    assert place_of(name) == place


def test_layers_and_numbers_in_words():
    assert [some("abc"[:n]) for n in (1, 2, 3)] == ["a", "a and 1 other layer", "a and 2 other layers"]
    assert [span(numbers) for numbers in ([3], [2, 2], [5, 2, 4])] == ["3", "2", "2 to 5"]
    assert one_line_each({"a": "x.", "b": "y.", "c": "x."}) == ["a and 1 other layer: x.", "b: y."]
