"""Patches and experts by hand: what is cut, what is chosen, and what no adapter fits."""

import pytest
import torch
from torch import nn

from lora_init.layers import rows as rows_module
from lora_init.layers.rows import (
    Experts,
    Patches,
    check_peft,
    expert_group,
    experts_of,
    find_parameters,
    patches_of,
    routed,
)  # fmt: skip
from tests.conftest import refused


def test_patches_by_hand():
    x = torch.arange(6.0).reshape(1, 2, 3)  # two channels of three places
    assert Patches((2,), (1,), ((1, 0),)).rows(x).tolist() == [[0, 0, 0, 3], [0, 1, 3, 4], [1, 2, 4, 5]]
    assert Patches((2,), (2,), ((0, 1),)).rows(x[0]).tolist() == [[0, 1, 3, 4], [2, 0, 5, 0]]
    whole = Patches((2, 1), (1, 1), ((0, 0), (1, 2))).rows(torch.arange(4.0).reshape(1, 1, 2, 2))
    assert whole.tolist() == [[0, 0], [0, 2], [1, 3], [0, 0], [0, 0]]


@pytest.mark.parametrize(("made", "expected"), [
    (nn.Conv1d(2, 3, 4, padding="same"), Patches((4,), (1,), ((1, 2),))),
    (nn.Conv2d(2, 3, (4, 3), padding="same", dilation=2), Patches((4, 3), (1, 1), ((1, 2), (1, 1)))),
    (nn.Conv2d(2, 3, (4, 3), padding="valid"), Patches((4, 3), (1, 1), ((0, 0), (0, 0)))),
    (nn.Conv2d(2, 3, 3, stride=(1, 2), padding=(2, 1)), Patches((3, 3), (1, 2), ((2, 2), (1, 1)))),
    (nn.Conv2d(2, 3, (1, 3), dilation=(2, 1)), Patches((1, 3), (1, 1), ((0, 0), (0, 0)))),  # a kernel of 1 has no gaps
    (nn.Linear(2, 3), None),
    (nn.ConvTranspose1d(2, 3, 2), None),
])  # fmt: skip
def test_the_patches_of_a_layer(made, expected):
    assert patches_of("name", made) == expected


def test_a_sample_of_patches_is_drawn_where_there_are_more():
    rows = torch.arange(10.0).reshape(1, 1, 10)
    cut = Patches((1,), (1,), ((0, 0),))
    assert cut.rows(rows, 10).flatten().tolist() == list(range(10))
    some = cut.rows(rows, 9).flatten().tolist()
    assert len({*some}) == 9 and some == sorted(some) and some == cut.rows(rows, 9).flatten().tolist()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("release", "straight"), [
    ("0.18.1", False), ("0.18.9.dev0", False), ("0.19.0", None), ("0.19.1", True), ("0.19.2.dev0", True),
    ("0.20", True), ("1.0.0", True),
])  # fmt: skip
def test_releases_that_exchange_the_widths_of_experts_are_refused(release, straight, transposed):
    module = nn.Module()
    module.is_transposed = transposed
    if straight or (straight is False and transposed):
        check_peft("m", module, release)
    else:
        words = rf"^'m': PEFT {release} exchanges the widths of A and B of these experts. Train by 0.19.1 or newer.$"
        refused(words, check_peft, "m", module, release)


class Gated(nn.Module):
    """Three experts of transformers' interface: gate and up in one matrix."""

    is_transposed = False

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 5))
        self.down_proj = nn.Parameter(torch.randn(3, 5, 4))

    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return gate.relu() * up


def gated(**changes):
    module = Gated()
    for name, value in changes.items():
        setattr(module, name, value)
    return module


def plain(**parts):
    module = nn.Module()
    module.down_proj = nn.Parameter(torch.randn(3, 5, 4))
    for name, value in parts.items():
        setattr(module, name, value)
    return module


@pytest.mark.parametrize(("module", "ending", "widths"), [
    (gated(), "gate_up_proj", (3, 5, 8)),
    (gated(), "down_proj", (3, 4, 5)),
    (gated(is_transposed=True), "gate_up_proj", (3, 8, 5)),
    (gated(own=nn.Parameter(torch.randn(3, 8, 5))), "own", None),
    (gated(down_proj=nn.Parameter(torch.randn(5, 4))), "down_proj", None),
    (gated(down_proj=nn.Parameter(torch.ones(3, 5, 4).to(torch.int8), requires_grad=False)), "down_proj", None),
    (gated(), "absent", None),
    (plain(is_transposed=False), "down_proj", None),  # without a first matrix, or without the interface
    (plain(gate_up_proj=nn.Parameter(torch.randn(3, 8, 5))), "down_proj", None),
    (plain(gate_up_proj=nn.Parameter(torch.randn(3, 8, 5)), is_transposed=False), "down_proj", None),
])  # fmt: skip
def test_a_parameter_is_of_experts_by_the_interface_of_its_module(module, ending, widths):
    found = experts_of(f"m.{ending}", module)
    assert found is widths is None or (found.n_experts, found.in_features, found.out_features) == widths


def test_the_rows_of_each_expert_by_hand():
    module, hidden = Gated(), torch.randn(4, 5)
    chosen = torch.tensor([[0, 2], [2, 0], [0, 0], [2, 2]])
    first, second = (Experts(f"m.{name}", module, 3, *widths) for name, widths in
                     (("gate_up_proj", (5, 8)), ("down_proj", (4, 5))))  # fmt: skip
    rows = list(first.rows(hidden, chosen))
    assert [expert for expert, _ in rows] == [None, 0, 2]  # nothing went to the second one
    for (_, found), places in zip(rows, ([0, 1, 2, 3], [0, 1, 2], [0, 1, 3]), strict=True):
        assert torch.equal(found, hidden[places])
    inside = {}
    for expert, places in ((0, [0, 1, 2]), (2, [0, 1, 3])):
        inside[expert] = module._apply_gate(hidden[places] @ module.gate_up_proj[expert].T)
    rows = dict(second.rows(hidden, chosen))
    assert [*rows] == [0, 2, None]
    for expert, expected in (inside | {None: torch.cat([*inside.values()])}).items():
        torch.testing.assert_close(rows[expert], expected)
    torch.testing.assert_close(first.output(hidden, 1, chosen), hidden @ module.gate_up_proj[1].T)
    of_two = inside[0] @ module.down_proj[0].T  # one of two that are added up
    torch.testing.assert_close(second.output(inside[0], 0, chosen), of_two / 2**0.25)
    assert expert_group("m.up", 3) == "m.up.3"


@pytest.mark.parametrize("bias", [None, torch.randn(2, 8)])
def test_experts_without_a_gate_have_their_activation_alone(bias):
    module, hidden, chosen = gated(), torch.randn(4, 5), torch.tensor([[1], [0], [1], [1]])
    del module.gate_up_proj
    module.up_proj, module.act_fn, module.up_proj_bias = nn.Parameter(torch.randn(2, 8, 5)), torch.tanh, bias
    rows = dict(Experts("m.down_proj", module, 2, 8, 5).rows(hidden, chosen))
    for expert, places in ((0, [1]), (1, [0, 2, 3])):
        inside = hidden[places] @ module.up_proj[expert].T + (0.0 if bias is None else bias[expert])
        torch.testing.assert_close(rows[expert], inside.tanh())


def test_the_first_tensor_of_each_type_is_meant():
    hidden, chosen = torch.ones(2, 4), torch.zeros(2, 3).long()
    for args, kwargs in (((chosen, hidden), {}), ((None, hidden, hidden + 1), {"x": chosen, "y": chosen + 1})):
        rows, experts = routed("m", args, kwargs)
        assert torch.equal(rows, hidden) and torch.equal(experts, chosen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.float8_e4m3fn])
def test_weights_of_two_bytes_are_adapted_and_those_of_one_are_refused(dtype):
    owner = nn.Module()
    owner.own = nn.Parameter(torch.ones(2, 3).to(dtype), requires_grad=False)
    modules = {"": nn.Module(), "m": owner}
    if dtype.itemsize > 1:
        assert find_parameters(modules, ["own"], [], "Model") == {"m.own": None}
    else:
        said = rf"^target_parameters selects 'm.own', which is quantized \({dtype}\), and PEFT adds to weights in float"
        refused(said, find_parameters, modules, ["own"], [], "Model")


def test_experts_are_refused_for_the_release_of_peft_that_is_installed(monkeypatch):
    modules = {"m": Gated()}
    for release in ("0.18.0", "0.19.0"):
        monkeypatch.setattr(rows_module, "version", {"peft": release}.__getitem__)
        refused(f"^'m.down_proj': PEFT {release} ex", find_parameters, modules, ["down_proj"], [], "Model")
    monkeypatch.setattr(rows_module, "version", {"peft": "0.19.1"}.__getitem__)
    found = find_parameters(modules, ["down_proj", "gate_up_proj"], [], "Model")
    assert [*found] == ["m.gate_up_proj", "m.down_proj"] and found["m.down_proj"].in_features == 4
