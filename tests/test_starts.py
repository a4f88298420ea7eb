"""Every start: the plain model's output before the first step, the counts that are promised, and the way back."""

import pytest
import torch

from lora_init.attach import adapter_layers
from lora_init.collection import collect
from lora_init.errors import LoraInitError
from lora_init.initializers import layer_generator, random
from lora_init.prepared import a_weights, blank_spectrum
from lora_init.starts import START_NAMES, prepare
from tests.conftest import MODELS, batches_for

pytest.importorskip("peft")

TASKS = {"llama": "CAUSAL_LM", "bert": "SEQ_CLS"}
RANK = 4
EVA = [name for name in START_NAMES if name.startswith("eva")]
MOVES_RANKS = ["eva", "eva-uncentred", "eva-ranks", "eva-frozen-a"]


class Case:
    def __init__(self, name):
        self.model, self.batches, self.task = MODELS[name](), batches_for(name), TASKS[name]
        self.asked = []
        self.collected = {}

    def statistics(self, center):
        self.asked.append(center)
        if center not in self.collected:
            self.collected[center] = collect(
                self.model, self.batches, rank=RANK, rho=2.0, center=center, task_type=self.task
            )
        return self.collected[center]

    def prepare(self, start, model=None, **options):
        settings = dict(rank=RANK, lora_alpha=8, seed=0, task_type=self.task, batches=self.batches)
        return prepare(start, model or self.model, statistics=self.statistics, **settings | options)

    def logits(self, model=None):
        with torch.no_grad():
            return torch.cat([(model or self.model)(**batch).logits.flatten() for batch in self.batches])


@pytest.fixture(scope="module", params=sorted(TASKS))
def case(request):
    torch.manual_seed(0)
    return Case(request.param)


def snapshot(model):
    """All that `release` has to put back."""
    modules = {
        name: (id(module), module.training, len(module._forward_hooks), sorted(vars(module)))
        for name, module in model.named_modules()
    }
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return modules, {n: (id(t), t.data_ptr(), t.requires_grad, t.detach().clone(), t.grad) for n, t in tensors}


def assert_same(before, after):
    assert before[0] == after[0]
    assert before[1].keys() == after[1].keys()
    for name, (*facts, value, grad) in before[1].items():
        *facts_after, value_after, grad_after = after[1][name]
        assert facts == facts_after, name
        assert torch.equal(value, value_after), name
        assert grad is grad_after, name


def trained(prepared, batch):
    """Take one step that changes all trainable parameters, and leave gradients behind."""
    model = prepared.peft_model.train()
    output = model(**batch).logits
    output.float().square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)


@pytest.mark.parametrize("matched_scale", [False, True])
@pytest.mark.parametrize("start", START_NAMES)
def test_a_start_leaves_the_output_and_release_the_model(case, start, matched_scale):
    before, output = snapshot(case.model), case.logits()
    prepared = case.prepare(start, matched_scale=matched_scale)
    assert torch.equal(case.logits(prepared.peft_model), output)
    trained(prepared, case.batches[0])
    assert not torch.equal(case.logits(prepared.peft_model), output)
    prepared.release()
    assert_same(before, snapshot(case.model))
    assert torch.equal(case.logits(), output)


@pytest.mark.parametrize("start", START_NAMES)
def test_seeds(case, start):
    def a_of(seed):
        prepared = case.prepare(start, seed=seed)
        found = {name: a.detach().clone() for name, a in a_weights(prepared.peft_model).items()}
        prepared.release()
        return found

    one, again, other = a_of(0), a_of(0), a_of(1)
    assert all(torch.equal(one[name], again[name]) for name in one)
    depends = start in ("random", "gaussian", "orthogonal", "eva-ranks")
    assert [torch.equal(one[name], other[name]) for name in one] == [not depends] * len(one)


def test_every_start_is_scaled_alike_and_draws_nothing_from_training(case):
    torch.manual_seed(5)
    expected = torch.randn(3)
    for start in START_NAMES:
        for equal in (False, True):
            torch.manual_seed(5)
            prepared = case.prepare(start, equal_parameters=equal)
            assert torch.equal(torch.randn(3), expected), start
            layers = adapter_layers(prepared.peft_model).values()
            assert {layer.scaling["default"] for layer in layers} == {8 / RANK}, start
            prepared.release()


def test_parameter_counts(case):
    def count(start, **options):
        prepared = case.prepare(start, **options)
        counted = sum(p.numel() for p in prepared.peft_model.parameters() if p.requires_grad)
        assert prepared.trainable_parameters == counted
        sizes = [(sum(layer.base_layer.weight.shape)) for layer in adapter_layers(prepared.peft_model).values()]
        prepared.release()
        return counted, prepared.ranks, max(sizes)

    expected, ranks, step = count("random")
    assert ranks is None
    for start in START_NAMES:
        plain, ranks, _ = count(start)
        equal, equal_ranks, _ = count(start, equal_parameters=True)
        if start not in MOVES_RANKS:
            assert plain == equal == expected and ranks is None
            continue
        assert sum(ranks.values()) <= RANK * len(case.statistics(True))
        assert max(ranks.values()) <= 2 * RANK and len(set(ranks.values())) > 1
        full = start == "eva-frozen-a" and all(own == 2 * RANK for own in equal_ranks.values())
        assert equal <= expected and (full or equal > expected - step), start
    assert count("eva-frozen-a")[0] < 0.7 * expected


def test_frozen_a_trains_b_alone(case):
    prepared = case.prepare("eva-frozen-a")
    named = dict(prepared.peft_model.named_parameters())
    assert not any(p.requires_grad for n, p in named.items() if "lora_A" in n)
    assert all(p.requires_grad for n, p in named.items() if "lora_B" in n)
    prepared.release()


def test_a_of_the_starts_from_data(case):
    """eva has the ranks and the directions, eva-ranks only the ranks, eva-rho1 only the directions."""

    def a_of(start):
        prepared = case.prepare(start)
        found = {name: a.detach().clone() for name, a in a_weights(prepared.peft_model).items()}
        prepared.release()
        return found

    eva, uniform, ranks, uncentred = map(a_of, ["eva", "eva-rho1", "eva-ranks", "eva-uncentred"])
    stats = case.statistics(True)
    assert {n: len(a) for n, a in eva.items()} == {n: len(a) for n, a in ranks.items()}
    for name, a in eva.items():
        assert torch.equal(a, stats[name].components[: len(a)])
        assert torch.equal(uniform[name], stats[name].components[:RANK])
        width = a.shape[1]
        assert torch.equal(ranks[name], random(blank_spectrum(width), len(a), layer_generator(0, name)))
    second_moment = case.statistics(False)
    for name, a in uncentred.items():
        assert torch.equal(a, second_moment[name].components[: len(a)])
    assert any(not torch.equal(eva[name][:1], uncentred[name][:1]) for name in eva if name in uncentred)


@pytest.mark.parametrize("start", START_NAMES)
def test_matched_scale(case, start):
    prepared = case.prepare(start, matched_scale=True)
    weights = a_weights(prepared.peft_model)
    energy = 0.0
    for name, a in weights.items():
        expected = random(blank_spectrum(a.shape[1]), len(a), layer_generator(0, name))
        assert float(a.detach().norm()) == pytest.approx(float(expected.norm()), rel=1e-6)
        energy += float(a.detach().square().sum())
    assert prepared.a_scale == pytest.approx((energy / sum(map(len, weights.values()))) ** 0.5, rel=1e-5)
    prepared.release()


def test_only_starts_from_data_ask_for_statistics():
    case = Case("llama")
    for start in START_NAMES:
        case.asked.clear()
        case.prepare(start).release()
        expected = [] if start not in EVA else [not start.endswith("uncentred")]
        assert case.asked == expected, start


def test_an_unknown_start_is_refused(case):
    with pytest.raises(LoraInitError, match=r"start 'evva' is unknown. Closest: 'eva'"):
        case.prepare("evva")


def test_a_start_that_fails_leaves_the_model(case):
    before = snapshot(case.model)
    for options in (dict(lora_alpha=-1), dict(rank=1000), dict(target_modules=["nosuchlayer"])):
        with pytest.raises(LoraInitError):
            case.prepare("random", **options)
    assert_same(before, snapshot(case.model))
