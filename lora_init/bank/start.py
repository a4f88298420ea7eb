"""From a bank and examples of a new task to an adapter that starts where others ended.

Two questions are kept apart. Which update: the nearest adapter, a mean, a mixture or a generated one; a function of
`WAYS` each. How far towards it: `find_step_size` decides by the loss, and refuses an update that lowers it nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeAlias

from torch import Tensor, nn

from lora_init.adapters.adapter_init import AdapterInit
from lora_init.adapters.init_config import SCALING, Shape
from lora_init.adapters.peft_model import check_plain
from lora_init.bank.generator import balanced, load_generator
from lora_init.bank.mixture import MOST_ADAPTERS, find_weights, stack
from lora_init.bank.similarity import Neighbour, neighbours
from lora_init.bank.store import Bank
from lora_init.building.step_size import NoStepError, find_step_size
from lora_init.errors import LoraInitError, did_you_mean
from lora_init.layers.identity import count_parameters, fingerprint
from lora_init.layers.targets import find_targets
from lora_init.layers.wrappers import class_name, model_id, unwrapped
from lora_init.loading.models import task_of
from lora_init.planning.lora_config import scaling_of
from lora_init.serving.trained import Layer
from lora_init.starts.starts import BANK_WAY, BANK_WAYS
from lora_init.statistics.statistics import Provenance


@dataclass(frozen=True, eq=False)
class BankStart:
    """A start from a bank."""

    init: AdapterInit  # the adapter, B other than zero
    neighbours: Sequence[Neighbour]  # the tasks of the bank, the nearest first
    weights: Mapping[str, float]  # of each adapter that is in it; empty for one that was generated
    passes: int = 0  # how often the loss was measured for the weights


def start_from_bank(
    bank: Bank,
    model: nn.Module,
    embeddings: Tensor,
    loss_of: Callable[[nn.Module], float] | None,
    by: str = BANK_WAY,
    *,
    rank: int = 16,
    shape: Shape | None = None,
    order: Sequence[Neighbour] = (),
) -> BankStart:
    """Start an adapter from the adapters of a bank, and step as far towards it as lowers the loss most.

    `by` is a way of `STARTS`, `order` what `neighbours` returned, by default for the embeddings. Without `loss_of`
    there are no labelled examples, and the adapter is taken at its full size, unchecked; with a `gamma` of the shape
    the update is divided by that. Of the shape this and `lora_alpha` count.
    """
    if by not in BANK_WAYS:
        raise LoraInitError(f"{{by}} is unknown. {did_you_mean(by, BANK_WAYS)}", by=by)
    check_plain(model, "start_from_bank()")
    model = unwrapped(model)
    bank.check_base(fingerprint(model), class_name(model))
    shape, order = shape or Shape(), order or neighbours(bank, embeddings)
    provenance = Provenance(
        model_id=model_id(model),
        model_class=class_name(model),
        fingerprint=bank.fingerprint,
        target_modules=[],
        n_parameters=count_parameters(model),
        task_type=task_of(model),
        data=f"adapters of {', '.join(bank.tasks)}",
    )
    adapter_of = partial(mixed_adapter, model, provenance, by)  # an update -> an adapter with it
    weigh: Weigh = None
    if loss_of is not None:
        weigh = partial(find_weights, model, build=adapter_of, loss_of=loss_of)
    update = WAYS[by](bank, [neighbour.name for neighbour in order], embeddings, weigh)
    # A sum of adapters has the sum of their ranks, and its best approximation of this rank is what the start is.
    cut = {name: balanced(layer, rank) for name, layer in update.layers.items()}
    build = partial(adapter_of, cut, rank, shape.lora_alpha or SCALING * rank)  # gamma -> the adapter
    try:
        if loss_of is None:
            init = build(shape.gamma or 1.0)
        else:  # from 1 on: the update at its full size was good where it was trained
            init = find_step_size(model, build, loss_of, shape.gamma, first=1.0)
    except NoStepError as error:
        raise LoraInitError(
            f"{bank.path}: take none. No size of the adapter by {by!r} lowers the loss on the examples set aside "
            f"(nearest: {order[0].in_words()}). Use --method eva, or a bank of tasks like yours."
        ) from error
    return BankStart(init, order, update.weights, update.passes)


Weigh: TypeAlias = "Callable[..., tuple[list[float], int]] | None"


@dataclass(frozen=True)
class Update:
    """What a start takes from a bank, as the functions below make it.

    They get the bank, the names of its adapters, the nearest first, the embeddings of the new task's prompts, and what
    finds weights of adapters by the loss, see `find_weights`; None if there are no labelled examples.
    """

    layers: Mapping[str, Layer]  # A and B of each layer, of scaling 1
    weights: Mapping[str, float] = field(default_factory=dict)  # of each adapter that is in it
    passes: int = 0  # how often the loss was measured for the weights


def nearest(bank: Bank, names: Sequence[str], embeddings: Tensor, weigh: Weigh) -> Update:
    """Take the adapter whose data are closest."""
    return mean(bank, names[:1], embeddings, weigh)


def mean(bank: Bank, names: Sequence[str], embeddings: Tensor, weigh: Weigh) -> Update:
    """Take all adapters in equal parts."""
    shares = dict.fromkeys(names, 1.0 / len(names))
    return Update(stack([bank.layers(name) for name in names], [*shares.values()]), shares)


def mixture(bank: Bank, names: Sequence[str], embeddings: Tensor, weigh: Weigh) -> Update:
    """Weight the nearest so that the loss is lowest."""
    if weigh is None:
        raise LoraInitError("a mixture is chosen by the loss on labelled examples, and there are none. Take nearest.")
    adapters = [bank.layers(name) for name in names[:MOST_ADAPTERS]]
    shares, passes = weigh(adapters)
    return Update(stack(adapters, shares), dict(zip(names, shares, strict=False)), passes)  # names may be more


def generated(bank: Bank, names: Sequence[str], embeddings: Tensor, weigh: Weigh) -> Update:
    """Generate it by the bank's generator."""
    return Update(load_generator(bank).generate(embeddings))


WAYS: Mapping[str, Callable[..., Update]] = {way.__name__: way for way in (nearest, mixture, generated, mean)}


def mixed_adapter(
    model: nn.Module,
    provenance: Provenance,
    by: str,
    update: Mapping[str, Layer],
    rank: int = 1,
    lora_alpha: float = 1.0,
    gamma: float | None = None,
) -> AdapterInit:
    """Put an update of scaling 1 into an adapter, perhaps over gamma, half of its scaling in A and half in B."""
    layers = find_targets(model, list(update), task_type=provenance.task_type).layers
    targets = {name: target for name, target in layers.items() if name in update}  # in model order
    for name, layer in update.items():
        d_in, d_out = layer.widths
        if name not in targets or (d_in, d_out) != (targets[name].in_features, targets[name].out_features):
            raise LoraInitError(f"the bank has an adapter of {name!r}, {d_in} -> {d_out}, which is none of this model.")
    # The model adds scaling * B A, and the update is to be added as it is, over gamma. Both factors are divided by the
    # same number, so that they stay of one size.
    root = 1.0
    if gamma is not None:
        root = (gamma * scaling_of(lora_alpha, rank, False)) ** 0.5
    return AdapterInit(
        weights={name: update[name].weights.times(1.0 / root) for name in targets},
        targets=targets,
        rank=rank,
        lora_alpha=lora_alpha,
        start=BANK_WAYS[by],
        provenance=replace(provenance, target_modules=sorted(targets), rank=rank),
        gamma=gamma,
    )
