"""What a pass over somebody's data changes is put back, object by object; what may be large or is a model's is not."""

import random
import threading
from collections import Counter, OrderedDict, defaultdict, deque
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from lora_init.trainers.put_back import put_back, put_back_values, undisturbed

GLOBAL, OTHER = random.Random(1), [0]


def drawn():
    """Draw a number of each kind that a collator may draw."""
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_random_numbers_are_drawn_again():
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    first = drawn()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    with undisturbed():
        assert drawn() == first
        drawn()
    assert drawn() == first


class Own:
    """An object of somebody's own, which holds something."""

    def __init__(self, held=None):
        self.held = held

    def method(self):
        return self.held


class Slots:
    __slots__ = ("held", "never")

    def __init__(self):
        self.held = 1


class Inherits(Slots):
    __slots__ = ("more",)

    def __init__(self):
        super().__init__()
        self.more = [1]


class Private:
    """An object with one slot alone, which is named without a list, and is private."""

    __slots__ = "__held"

    def __init__(self):
        self.__held = [1]

    def change(self):
        self.__held.append(2)
        self.__held = None

    def values(self):
        return self.__held


@dataclass(frozen=True)
class Frozen:
    held: list = field(default_factory=list)


def rebind(one):
    one.held, one.new = 5, 6


def change_slots(one):
    one.held = 5
    one.more.append(2)
    one.more = None


def reorder(one):
    first = next(iter(one))
    one[first] = one.pop(first)
    one["new"] = 1


def function(items, generator=random.Random(2), *, counts=Counter()):  # noqa: B006, B008
    return GLOBAL.random(), OTHER, generator, counts


def counting():
    n, kept, first = 0, [1], None

    def count():
        nonlocal n, first
        n += 1
        first = first or n
        kept.append(n)
        return n, len(kept)

    return count


function.n = 0


STATES = {
    torch.Generator: lambda one: one.get_state().tolist(),
    np.random.RandomState: lambda one: str(one.get_state()),
    np.random.Generator: lambda one: one.bit_generator.state,
    random.Random: lambda one: one.getstate(),
    (torch.Tensor, np.ndarray): lambda one: one.tolist(),
    dict: lambda one: [(key, state(value)) for key, value in one.items()],
    (list, tuple, deque): lambda one: [state(value) for value in one],
    partial: lambda one: state([one.args, one.keywords]),
    Inherits: lambda one: state([one.held, one.more]),
    Private: lambda one: state(one.values()),
}


def state(one):
    """Return what an object is, as plain values."""
    for kind, values_of in STATES.items():
        if isinstance(one, kind):
            return values_of(one)
    return state(vars(one)) if hasattr(one, "__dict__") else deepcopy(one)


CHANGES = {
    "a list": ([1, 2], lambda one: one.append(3)),
    "a deque": (deque([1, 2]), lambda one: one.rotate()),
    "a set": ({1, 2}, lambda one: one.add(3)),
    "a dict and its order": ({"a": 1, "b": 2}, reorder),
    "an ordered dict": (OrderedDict(a=1, b=2), reorder),
    "a dict with a default": (defaultdict(int, a=1), lambda one: one["new"]),
    "a counter": (Counter(a=1), lambda one: one.update("ab")),
    "what a list holds": ([[1], (2, [3])], lambda one: (one[0].append(3), one[1][1].clear())),
    "what a dict holds": ({"a": {"b": [1]}}, lambda one: one["a"]["b"].append(3)),
    "a tensor": (torch.zeros(3), lambda one: one.add_(1)),
    "an array": (np.zeros(3), lambda one: one.fill(1.0)),
    "torch's generator": (torch.Generator().manual_seed(0), lambda one: torch.rand(1, generator=one)),
    "numpy's generator": (np.random.default_rng(0), lambda one: one.random()),
    "numpy's older one": (np.random.RandomState(0), lambda one: one.rand()),
    "Python's": (random.Random(0), lambda one: one.random()),
    "attributes": (Own([1]), rebind),
    "an attribute that is deleted": (Own([1]), lambda one: delattr(one, "held")),
    "what an attribute holds": (Own([1]), lambda one: one.held.append(2)),
    "what is replaced and changed": (Own([1]), lambda one: (one.held.append(2), rebind(one))),
    "slots, also of a class above": (Inherits(), change_slots),
    "a private slot": (Private(), Private.change),
    "a frozen object": (Frozen([1]), lambda one: (one.held.append(2), object.__setattr__(one, "held", 3))),
    "eight objects deep": (Own(Own(Own(Own(Own(Own(Own(Own(1)))))))), lambda one: setattr(deep(one, 7), "held", 2)),
    "containers are no objects": (Own([Own({"a": Own(1)})]), lambda one: rebind(one.held[0].held["a"])),
    "a thousand values": ([1] * 1000, lambda one: one.append(3)),
}  # fmt: skip


def deep(one, n):
    for _ in range(n):
        one = one.held
    return one


@pytest.mark.parametrize("kind", CHANGES)
def test_what_is_changed_is_put_back(kind):
    held, change = CHANGES[kind]
    before = state(held)
    with ExitStack() as stack:
        put_back(held, stack, set())
        change(held)
        assert state(held) != before
    assert state(held) == before


def read_only():
    numbers = np.zeros(2)
    numbers.flags.writeable = False
    return numbers


LEFT = {
    "nine objects deep": (
        Own(Own(Own(Own(Own(Own(Own(Own(Own(1))))))))), lambda one: setattr(deep(one, 8), "held", 2)
    ),
    "more than a thousand values": ([[1]] * 1001, lambda one: one[0].append(2)),
    "a module": (nn.Linear(2, 2), lambda one: setattr(one, "new", 1)),
    "what is learned": (nn.Parameter(torch.zeros(2)), lambda one: one.data.add_(1)),
    "a million numbers and one": (torch.zeros(1_000_001, dtype=torch.bool), lambda one: one.fill_(True)),
    "as many in an array": (np.zeros(1_000_001, dtype=bool), lambda one: one.fill(True)),
}  # fmt: skip


@pytest.mark.parametrize("kind", LEFT)
def test_what_is_too_far_or_too_large_or_a_models_stays_as_it_is(kind):
    held, change = LEFT[kind]
    with ExitStack() as stack:
        put_back(held, stack, set())
        change(held)
        after = vars(held) if isinstance(held, nn.Module) else held
        after = after if isinstance(held, (torch.Tensor, np.ndarray)) else state(after)
    now = vars(held) if isinstance(held, nn.Module) else held
    assert bool((now == after).all()) if isinstance(held, (torch.Tensor, np.ndarray)) else state(now) == after


def test_numbers_that_cannot_be_written_to_are_passed_over():
    held = [read_only(), torch.zeros(1).expand(3), torch.zeros(2, device="meta"), torch.eye(2).to_sparse()]
    held += [
        torch.zeros(2, requires_grad=True),
        torch.zeros(3, 3)[:, 0],
        threading.Lock(),
        torch.inference_mode()(torch.zeros)(2),
    ]
    with ExitStack() as stack:
        put_back(held, stack, set())
    assert len(held) == 8


def test_a_million_numbers_are_put_back():
    held = [torch.zeros(1_000_000, dtype=torch.bool), np.zeros(1_000_000, dtype=bool)]
    with ExitStack() as stack:
        put_back(held, stack, set())
        held[0].fill_(True), held[1].fill(True)
    assert not held[0].any() and not held[1].any()


def test_what_a_function_draws_and_counts_by_is_put_back():
    bound, made = Own([1]), counting()
    part = partial(function, [1], counts=Counter(b=1))
    held = [function, bound.method, made, part]

    def now():
        return (
            state([function.__defaults__, function.__kwdefaults__, vars(function), GLOBAL, part, bound]),
            [cell.cell_contents for cell in made.__closure__],
        )

    before, other = deepcopy(now()), len(OTHER)
    with ExitStack() as stack:
        put_back(held, stack, set())
        _, _, generator, counts = function([])
        (
            generator.random(),
            counts.update("a"),
            bound.held.append(2),
            part.args[0].append(3),
            part.keywords["counts"].clear(),
        )
        function.n = 5
        assert made() == (1, 2) and made() == (2, 3)
        OTHER.append(1)  # of the globals of a function only generators are looked at
    assert now() == before and len(OTHER) == other + 1
    assert made() == (1, 2)


def test_what_several_hold_is_put_back_once_to_what_it_was_at_first():
    circle = Own([1])
    circle.held.append(circle)
    shared = [1]
    with ExitStack() as stack:
        seen = set()
        put_back([shared, circle], stack, seen)
        shared.append(2)
        put_back([shared], stack, seen)
        circle.held.clear()
    assert shared == [1] and circle.held == [1, circle]


def test_plain_values_of_a_trainer_are_put_back_and_what_it_gets_stays():
    trainer, model = Own([1]), nn.Linear(2, 2)
    trainer.n, trainer.inner, trainer.nothing = 1, Own(1), None
    with ExitStack() as stack:
        put_back_values(trainer, stack, set())
        put_back_values(model, stack, set())
        put_back_values(3, stack, set())
        trainer.n, trainer.nothing, trainer.model = 2, 5, model
        trainer.held.append(2)
        trainer.inner.held = model.training = 7
        inner = trainer.inner = Own(2)
    assert (trainer.n, trainer.nothing, trainer.held, trainer.model) == (1, None, [1], model)
    assert trainer.inner is inner and model.training == 7
