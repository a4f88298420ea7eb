"""The parts of the generator by hand: how weights become numbers and back, and what a bank must have."""

import math

import pytest
import torch

from lora_init.bank import generator
from lora_init.bank.generator import Decoder, Generator, HyperConv, load_generator, train_generator
from lora_init.bank.store import Bank, add_entry
from lora_init.serving.trained import Layer, Trained
from tests.conftest import refused

SHAPES = {"q": (2, 3, 4), "v": (1, 2, 5)}


def adapter(scale=1.0, seed=0):
    drawn = torch.Generator().manual_seed(seed)
    return {
        name: Layer(scale * torch.randn(r, d_in, generator=drawn), scale * torch.randn(d_out, r, generator=drawn), 1.0)
        for name, (r, d_in, d_out) in SHAPES.items()
    }


def bank_of(folder, n=2, n_prompts=9, width=5):
    bank = Bank(folder, "f", "a model", "")
    for i in range(n):
        prompts = torch.randn(n_prompts, width, generator=torch.Generator().manual_seed(i)) + i
        bank = add_entry(bank, f"e{i}", Trained({}, adapter(seed=i), {}), prompts, task=f"t{i}", data="")
    return bank


def test_layers_are_written_one_after_the_other_and_read_back():
    layers = adapter()
    flat = generator._flattened(layers)
    assert generator._shapes(layers) == SHAPES and len(flat) == generator._n_weights(SHAPES) == 2 * 7 + 7
    assert torch.equal(flat[:6], layers["q"].a.flatten()) and torch.equal(flat[6:14], layers["q"].b.T.flatten())
    found = generator._unflattened(flat, SHAPES)
    for name, layer in layers.items():
        assert (
            torch.equal(found[name].a, layer.a) and torch.equal(found[name].b, layer.b) and found[name].scaling == 1.0
        )


def test_a_token_is_ten_times_128_weights():
    for n_weights, n_tokens in ((1, 1), (1280, 1), (1281, 2)):
        assert generator._n_tokens({"q": (1, 0, n_weights)}) == n_tokens


def test_the_spread_of_a_part_is_over_its_weights_and_all_adapters():
    one, other = adapter(seed=1), adapter(seed=2)
    scales = generator._unflattened(generator._scales([*map(generator._flattened, (one, other))], SHAPES), SHAPES)
    for name in SHAPES:
        for part in ("a", "b"):
            both = torch.stack([getattr(one[name], part), getattr(other[name], part)])
            expected = both.square().mean().sqrt().expand_as(both[0])
            torch.testing.assert_close(getattr(scales[name], part), expected)
    none = generator._scales([torch.zeros(21)] * 2, SHAPES)
    assert none.tolist() == pytest.approx([1e-12] * 21)  # where all agree


def test_conditions_begin_again_where_there_are_fewer_rows():
    rows = torch.arange(6.0).reshape(3, 2)
    assert generator._conditions(rows, torch.arange(5)).tolist() == [[0, 1], [2, 3], [4, 5], [0, 1], [2, 3]]


def test_sizes_of_the_cascade():
    grid = HyperConv((3, 4, 5), (6, 7, 8))(torch.randn(2, 3, 4, 5))
    assert grid.shape == (2, 6, 7, 8)
    decoder = Decoder(23, 2)
    assert decoder.columns == 3 and len(decoder.blocks) == 3
    assert decoder(torch.randn(2, generator.N_PROMPTS, 23)).shape == (2, 2, 10, 128)
    # As many channels between the blocks as a third of the tokens, from 32 to 256.
    found = [Decoder(23, n).blocks[0].along_c.out_channels for n in (2, 99, 800)]
    assert found == [32, 33, 256]


AXES = {"along_c": "nl", "along_l": "nc", "along_n": "lc"}  # the two that each convolution moves along


@pytest.mark.parametrize(("part", "tap"), [(part, tap) for part in AXES for tap in range(2)])
def test_a_hyper_convolution_reads_the_neighbours_along_two_axes(part, tap):
    """All three copy, but for one that takes what stands before, along one of its axes."""
    layer, grid = HyperConv((4, 5, 6), (4, 5, 6)), torch.rand(2, 4, 5, 6)
    for name in AXES:
        convolution = getattr(layer, name)
        torch.nn.init.zeros_(convolution.weight)
        torch.nn.init.zeros_(convolution.bias)
        place = (1, 1) if name != part else ((0, 1), (1, 0))[tap]
        for channel in range(len(convolution.weight)):
            torch.nn.init.ones_(convolution.weight[channel, channel][place])
    axis = 1 + "nlc".index(AXES[part][tap])
    before = torch.cat([torch.zeros_like(grid.narrow(axis, 0, 1)), grid.narrow(axis, 0, grid.shape[axis] - 1)], axis)
    torch.testing.assert_close(layer(grid), before)
    torch.testing.assert_close(layer(-grid), -1e-4 * before)  # through two that leak a hundredth


def test_what_is_generated_is_scaled_and_moved():
    """A decoder of zeros makes the mean of the bank, and one of ones the mean and a spread."""

    class Same(torch.nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def forward(self, condition):
            self.seen = condition
            return torch.full((1, 1, 10, 128), self.value)

    center, scale = torch.arange(21.0), torch.full((21,), 0.5)
    shift, spread = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0])
    made = Generator(Same(2.0), SHAPES, center, scale, shift, spread, ["t"], 0.5)
    found = made.generate(torch.tensor([[3.0, 2.0], [1.0, 6.0]]))
    assert torch.equal(generator._flattened(found), center + 1.0)
    assert made.decoder.seen.shape == (1, generator.N_PROMPTS, 2)
    assert made.decoder.seen[0, :3].tolist() == [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A bank of two tasks and a generator after two steps, with what it said of them."""
    bank, said = bank_of(tmp_path_factory.mktemp("small") / "bank"), []
    torch.manual_seed(5)
    state = torch.get_rng_state()
    found = train_generator(bank, steps=2, seed=3, say=lambda *step: said.append(step))
    return bank, found, said, torch.equal(torch.get_rng_state(), state)


def test_a_training_says_each_step_and_leaves_the_callers_random_state(small):
    _, found, said, untouched = small
    assert untouched and [step for step, _ in said] == [1, 2] and all(loss > 0 for _, loss in said)
    assert found.tasks == ["t0", "t1"] and found.shapes == {"q": (2, 3, 4), "v": (2, 2, 5)}
    assert not found.decoder.training and found.explained < 1.0


def test_the_same_seed_trains_the_same_and_another_does_not(small):
    bank, found, said, _ = small
    for seed, same in ((3, True), (4, False)):
        torch.manual_seed(9)  # whatever the caller's is
        losses = {}
        again = train_generator(bank, steps=2, seed=seed, say=losses.__setitem__)
        pairs = zip(again.decoder.parameters(), found.decoder.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs) is same and (losses == dict(said)) is same


def test_statistics_of_the_bank_are_those_of_all_its_entries(small):
    bank, found, _, _ = small
    prompts = torch.cat([bank.embeddings(name) for name in bank.entries])
    torch.testing.assert_close(found.shift, prompts.mean(0))
    torch.testing.assert_close(found.spread, prompts.std(0))
    adapters = generator.aligned(bank, min(entry.rank for entry in bank.entries.values()))
    flat = torch.stack([generator._flattened(one) for one in adapters.values()])
    torch.testing.assert_close(found.center, flat.mean(0))
    torch.testing.assert_close(found.scale, generator._scales([*(flat - flat.mean(0))], found.shapes))


def test_a_generator_comes_back_from_its_bank(small):
    bank, found, _, _ = small
    path = found.save(bank)
    assert path == bank.path / "generator.safetensors"
    back = load_generator(bank)
    for name in ("center", "scale", "shift", "spread"):
        assert torch.equal(getattr(back, name), getattr(found, name))
    assert (back.shapes, back.tasks, back.explained) == (found.shapes, found.tasks, found.explained)
    assert not back.decoder.training
    prompts = torch.randn(4, 5)
    for name, layer in found.generate(prompts).items():
        again = back.generate(prompts)[name]
        assert torch.equal(again.a, layer.a) and torch.equal(again.b, layer.b) and not layer.a.requires_grad


def test_numbers_of_prompts_are_counted_from_their_mean_in_their_spread(tmp_path, monkeypatch):
    bank, seen = bank_of(tmp_path / "bank", n_prompts=16), []

    class Silent(torch.nn.Module):
        """It writes the mean of the bank, whatever the prompts."""

        def __init__(self, *sizes):
            super().__init__()
            self.zero = torch.nn.Parameter(torch.zeros(1, 1, 10, 128))

        def forward(self, condition):
            return 0.0 * self.zero

    plain = generator._conditions
    monkeypatch.setattr(generator, "Decoder", Silent)
    monkeypatch.setattr(generator, "_conditions", lambda rows, chosen: seen.append(rows) or plain(rows, chosen))
    found = train_generator(bank, steps=16)
    assert found.explained == pytest.approx(0.0, abs=1e-6)  # as much as a mean does
    rows = torch.cat([*{rows.data_ptr(): rows for rows in seen}.values()])
    assert len(rows) == 32
    torch.testing.assert_close(rows.mean(0), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(rows.std(0), torch.ones(5))


def test_a_dimension_that_is_the_same_in_all_prompts_is_no_nan(tmp_path, monkeypatch):
    prompts = generator._prompts
    monkeypatch.setattr(generator, "_prompts", lambda bank: {
        name: torch.cat([rows[:, :4], torch.ones(len(rows), 1)], 1) for name, rows in prompts(bank).items()
    })  # fmt: skip
    losses = {}
    found = train_generator(bank_of(tmp_path / "bank"), steps=2, say=losses.__setitem__)
    assert math.isfinite(found.explained) and all(map(math.isfinite, losses.values()))


def test_adapters_are_turned_towards_the_first_and_do_what_they_did(tmp_path):
    bank = bank_of(tmp_path / "bank", n=3)
    found = generator.aligned(bank, 2)
    for name, layers in found.items():
        for place, layer in bank.layers(name).items():
            torch.testing.assert_close(layers[place].b @ layers[place].a, layer.b @ layer.a, atol=1e-5, rtol=1e-5)
    first = found["e0"]
    for name in ("e1", "e2"):
        for place, layer in found[name].items():
            # Nearest where what both have in common is symmetric, and its values are no less than zero.
            common = first[place].a @ layer.a.T + first[place].b.T @ layer.b
            torch.testing.assert_close(common, common.T, atol=1e-4, rtol=1e-4)
            assert torch.linalg.eigvalsh(common).min() > -1e-4


def test_two_of_several_adapters_may_be_the_same_and_two_prompts_are_enough(tmp_path):
    bank = bank_of(tmp_path / "bank", n_prompts=2)
    for name in bank.entries:
        prompts = torch.randn(2, 5)
        bank = add_entry(bank, f"{name}-again", Trained({}, bank.layers(name), {}), prompts, task="again", data="")
    assert train_generator(bank, steps=1).tasks == ["t0", "t1", "again"]


def test_the_last_eighth_of_the_prompts_is_never_trained_on(tmp_path, monkeypatch):
    bank = bank_of(tmp_path / "bank", n_prompts=16)
    plain, seen = generator._conditions, {True: [], False: []}

    def watched(rows, chosen):
        seen[torch.is_grad_enabled()].append(len(rows))
        return plain(rows, chosen)

    monkeypatch.setattr(generator, "_conditions", watched)
    train_generator(bank, steps=3)
    assert seen == {True: [14] * 3, False: [2] * 2}


def test_adapters_are_cut_to_the_rank_that_is_asked_for(tmp_path):
    bank = bank_of(tmp_path / "bank")
    assert math.prod(train_generator(bank, 1, steps=1).shapes["q"]) == 1 * 3 * 4
    low = {name: Layer(layer.a[:1], layer.b[:, :1].contiguous(), 1.0) for name, layer in adapter(seed=5).items()}
    both = add_entry(bank, "low", Trained({}, low, {}), torch.randn(9, 5), task="low", data="")
    assert train_generator(both, steps=1).shapes["q"] == (1, 3, 4)  # the least of all
    alone = Bank(tmp_path / "bank", "f", "a model", "", {"e0": bank.entries["e0"]})
    words = "^.*bank has one task, and a generator learns from what differs. Add another task.$"
    refused(words, train_generator, alone, steps=1)
