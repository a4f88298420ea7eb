"""Python objects put back as they were: what a pass over somebody's data draws, counts and shuffles is undone."""

from __future__ import annotations

import copy
import inspect
import logging
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from types import CellType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from lora_init.third_party_internals import cells_of

GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_FEW = 1000  # values of a container: what keeps a state has no more, and data have
_MOST_NUMBERS = 1_000_000  # of a tensor or array, for the same reason
_VALUES = (bool, int, float, str, tuple, list, deque, set, dict, Tensor, np.ndarray)
_CONTAINERS = (list, deque, set, dict, OrderedDict, defaultdict, Counter)  # one's own may refuse to be changed
_FUNCTIONS = (FunctionType, MethodType, partial)
_LEFT_ALONE = (nn.Module, type, ModuleType, logging.Logger, Trainer, TrainingArguments, *GENERATORS, *_FUNCTIONS)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Draw random numbers, of torch, numpy and Python, as collators do, that will be drawn again after the block."""
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))  # of the processor alone, where collators draw
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        yield


def put_back(held: Any, stack: ExitStack, seen: set[int], depth: int = 8) -> None:
    """Let the stack put back what drawing changes: generators of random numbers, counters, lists in their order.

    Objects are looked into so deep, and containers of few values; models, trainers and modules of Python are not.
    """
    # Objects hold each other in circles. What several hold is put back once, to what it was at first.
    if id(held) in seen:
        return
    seen.add(id(held))
    # A stack undoes the last first: what an object holds is put back before the object itself.
    if putting := _state_of(held):
        stack.callback(*putting)
    for one in _inside(held):
        put_back(one, stack, seen, depth)
    if depth and not isinstance(held, (*_VALUES, *_LEFT_ALONE)):
        own, slots = getattr(held, "__dict__", {}), _slots(held)
        # Attributes may be bound anew, added or deleted: so the dictionary is refilled, and not updated.
        stack.callback(_refill, own, dict(own))
        for name, value in slots.items():
            stack.callback(object.__setattr__, held, name, value)  # also of an object that is frozen
        for value in (*slots.values(), *own.values()):
            put_back(value, stack, seen, depth - 1)


def put_back_values(holder: Any, stack: ExitStack, seen: set[int]) -> None:
    """Let the stack put back plain values of an object, as of a trainer, which gets its model meanwhile."""
    own = {} if isinstance(holder, nn.Module) else getattr(holder, "__dict__", {})
    # Updated, and not refilled: what the holder gets meanwhile, such as its model, stays.
    stack.callback(own.update, {name: one for name, one in own.items() if one is None or isinstance(one, _VALUES)})
    for value in own.values():
        put_back(value, stack, seen, 0)


def _slots(held: Any) -> dict[str, Any]:
    # Each class has its own alone, under the names by which they are reached: a private slot's begins with its class. A
    # slot that was never set has no value.
    slotted = [vars(kind) for kind in type(held).__mro__ if "__slots__" in vars(kind)]
    names = [name for own in slotted for name, one in own.items() if isinstance(one, MemberDescriptorType)]
    return {name: getattr(held, name) for name in names if hasattr(held, name)}


def _state_of(held: Any) -> tuple[Any, ...]:
    """Return a function, with its arguments, that makes a value what it is now; nothing for what does not change."""
    if isinstance(held, (torch.Generator, np.random.RandomState)):
        return held.set_state, held.get_state()
    if isinstance(held, np.random.Generator):
        return setattr, held.bit_generator, "state", held.bit_generator.state
    if isinstance(held, random.Random):
        return held.setstate, held.getstate()
    if type(held) in _CONTAINERS:  # exactly, see there
        return _refill, held, copy.copy(held)
    if isinstance(held, (Tensor, np.ndarray)) and _can_be_set(held):
        return _set, held, held.detach().clone() if isinstance(held, Tensor) else held.copy()
    if isinstance(held, FunctionType):
        # A closure counts in its cells. Other values there are looked into as what the function holds.
        return _fill, [(cell, value) for cell, value in cells_of(held) if value is None or isinstance(value, _VALUES)]
    return ()


def _inside(held: Any) -> list[Any]:
    """Return the values of a container that has few, and what a function holds or draws by."""
    if isinstance(held, (list, deque, set, dict, tuple)):
        return [*(held.values() if isinstance(held, dict) else held)] if len(held) <= _FEW else []
    # `functools.partial` and methods keep what they are called with where `vars` does not show it.
    if isinstance(held, partial):
        return [held.func, held.args, held.keywords]
    if isinstance(held, MethodType):
        return [held.__self__, held.__func__]
    if not isinstance(held, FunctionType):
        return []
    named: list[Any] = []
    with suppress(ValueError):  # of a variable that is not set yet
        named = [*inspect.getclosurevars(held).globals.values()]
    own = [held.__defaults__, held.__kwdefaults__, vars(held), *(value for _, value in cells_of(held))]
    # Of its globals only the generators that it draws by: the others are of its whole module.
    return own + [one for one in named if isinstance(one, GENERATORS)]


def _fill(cells: list[tuple[CellType, Any]]) -> None:
    for cell, value in cells:
        cell.cell_contents = value


def _can_be_set(numbers: Any) -> bool:
    """Check whether numbers are few enough to be a state, and can be written to."""
    if isinstance(numbers, np.ndarray):
        return bool(numbers.flags.writeable) and numbers.size <= _MOST_NUMBERS
    # A tensor that expands another has several entries in one place, and cannot be written to at once.
    whole = numbers.layout is torch.strided and numbers.is_contiguous() and not numbers.is_meta
    return whole and not (numbers.requires_grad or numbers.is_inference()) and numbers.numel() <= _MOST_NUMBERS


def _set(numbers: Any, held: Any) -> None:
    numbers[...] = held  # in place, for whoever else holds them


def _refill(container: Any, held: Any) -> None:
    container.clear()  # in place, and a dictionary gets its order back, too
    (container.extend if isinstance(container, (list, deque)) else container.update)(held)
