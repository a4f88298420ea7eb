"""Where layers stand: kind and block, for every architecture."""

import pytest

from lora_init.layers.grid import layer_grid, layers_in
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
    assert layer_grid(["e.0.a.dense", "e.0.dense", "dense"]).kinds == ["a.dense", "e dense", "dense"] or layer_grid(
        ["e.0.a.dense", "e.0.dense", "pooler.dense"]
    ).kinds == ["a.dense", "dense", "pooler.dense"]
    assert layer_grid(["enc.0.q", "dec.0.q"]).kinds == ["enc q", "dec q"]
    assert layer_grid(["h.0.q", "h.0.v", "h.1.q", "h.1.k", "h.1.v"]).kinds == ["q", "k", "v"]  # no rank for the first k
    assert layer_grid(["0.up", "1.up", "head"]).blocks == [-1, 0, 1]


def test_gate_and_up_in_one_count_twice_in_experts_alone():
    names = ("mlp.experts.gate_up_proj", "mlp.gate_up_proj", "mlp.experts.down_proj")
    assert [layers_in(f"model.layers.0.{name}") for name in names] == [2, 1, 1]
