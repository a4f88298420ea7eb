"""How a model holds an adapter: not yet, inside a PeftModel, or in layers that a library's `add_adapter` has put in.

A pass reads the plain model, and an adapter that is there already has settings to keep. So whoever initializes a model
goes through its handle: `opened` reads the settings and takes an untrained adapter off, `put` puts the new one on in
the way that the holder expects.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lora_init.adapters.adapter_init import AdapterInit
from lora_init.adapters.config import read_adapter
from lora_init.adapters.init_config import InitConfig
from lora_init.adapters.measured_rate import any_trains
from lora_init.adapters.peft_model import (
    adapter_layers,
    check_adapter_name,
    is_filled,
    name_of_adapter,
    remember,
    remove_adapters,
)
from lora_init.errors import LoraInitError
from lora_init.layers.targets import HEADS, heads_of, new_heads
from lora_init.layers.wrappers import unwrapped, without_adapter
from lora_init.loading.models import task_of
from lora_init.starts.starts import Start


class ModelHandle:
    """A plain model, which becomes a PeftModel; subclasses do the same steps for models that have an adapter."""

    in_place = False  # its adapter keeps its layers and their rank
    wraps_anew = True  # there was no adapter
    base_stays = ""  # why the base weights must stay as they are
    trains_head: bool | None = None  # whether a head trains beside an adapter that stays; None without one

    def __init__(self, given: Any) -> None:
        self.given = given  # as `initialize` gets it

    @property
    def model(self) -> nn.Module:
        """The model whose layers take the adapter."""
        model: nn.Module = self.given
        return model

    def read(self, config: InitConfig) -> InitConfig:
        """Add what an adapter that is there says; refuse one that is in use."""
        return config

    def name_of_adapter(self, asked_for: str | None) -> str:
        """Return PEFT's name for the adapter to come: what is asked for, or what one that is there is called."""
        if asked_for is None:
            return name_of_adapter(self.given)
        check_adapter_name(asked_for)
        return asked_for

    def check(self, start: Start) -> None:
        """Refuse a start that changes the base where that would be lost."""
        if start.corrects_base and self.base_stays:
            raise LoraInitError(
                f"method={start.name!r} changes the base weights, and {self.base_stays}. Take a start at B = 0."
            )

    def feed(self, batches: Any, config: InitConfig) -> tuple[Any, InitConfig]:
        """Return batches as a pass reads them, and how it does."""
        return batches, config

    @contextmanager
    def opened(self, config: InitConfig) -> Iterator[InitConfig]:
        """Take an untrained adapter off while the block runs, which ends with `put`; put it back on an exception."""
        config, self.restore = self.read(config), remember(self.model)  # refused settings leave nothing to restore
        if self.in_place:
            base = without_adapter(unwrapped(self.given))
            self.trains_head = any_trains(base, new_heads(base))
        try:
            if not self.wraps_anew:
                remove_adapters(self.model)
            yield config
        except BaseException:  # also where the user interrupts the pass
            self.restore()
            raise

    def put(self, init: AdapterInit, adapter_name: str) -> Any:
        """Put the adapter on, and return what there is to train."""
        return init.apply(self.model, adapter_name)


class PeftModelHandle(ModelHandle):
    """A PeftModel with a fresh adapter. A new PeftModel around the same model replaces it."""

    wraps_anew = False

    @property
    def model(self) -> nn.Module:
        """The model inside the PeftModel."""
        model: nn.Module = self.given.get_base_model()
        return model

    def read(self, config: InitConfig) -> InitConfig:
        """Read the LoraConfig, what trains, and the type that TRL has given to the adapter of a quantized model."""
        read = read_adapter(self.given, config, "the trainer's peft_config")
        self.dtype: Any = None
        self.trains: dict[str, bool] = {}
        for name, parameter in _without_name(self.given):
            self.trains[name] = parameter.requires_grad
            if ".lora_A." in name:  # all of an adapter have one type
                self.dtype = parameter.dtype
        parts = (".lora_A.", ".lora_B.", ".modules_to_save.")
        a, b, whole = ([trains for name, trains in self.trains.items() if part in name] for part in parts)
        if not any((*a, *b)):  # loaded to be served, so that nothing of it says what is to be trained
            self.trains = {}
        elif not any(a):
            read = read.with_options(freeze_a=True)
        if self.trains and whole and not any(whole):
            self.trains_head = False
        return read

    def put(self, init: AdapterInit, adapter_name: str) -> Any:
        """Put the adapter on, in the type of the one before; what the user has frozen, or lets train, stays so."""
        adapted = super().put(init, adapter_name)
        for name, parameter in _without_name(adapted):
            if ".lora_A." in name or ".lora_B." in name:
                parameter.data = parameter.data.to(self.dtype)  # the parameter itself stays
                parameter.requires_grad &= self.trains.get(name, True)
            elif name in self.trains:
                parameter.requires_grad_(self.trains[name])
        return adapted


def _without_name(peft_model: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of a PeftModel, without the adapter's name in theirs, which a new adapter may not have."""
    (adapter,) = peft_model.peft_config
    for name, parameter in peft_model.named_parameters():
        yield name.replace(f".{adapter}.", "."), parameter


class InPlaceHandle(ModelHandle):
    """A model with LoRA layers from `add_adapter` of transformers or diffusers, which are filled."""

    in_place, wraps_anew = True, False
    base_stays = "an adapter from add_adapter() is saved without them"

    def name_of_adapter(self, asked_for: str | None) -> str:
        """Return the name that the adapter has, and refuse another one: its layers stay."""
        own = super().name_of_adapter(None)
        if asked_for not in (None, own):
            raise LoraInitError(
                f"adapter_name={asked_for!r}: the adapter on {type(self.given).__name__} is named {own!r}, and keeps "
                "its name. Leave adapter_name out."
            )
        return own

    def read(self, config: InitConfig) -> InitConfig:
        """Read the LoraConfig; every layer has its rank, as the libraries' files expect."""
        if config.ranks.rho not in (None, 1):  # an adapter that is filled keeps its tensors, and so its ranks
            raise LoraInitError(
                f"rho={config.ranks.rho:g}: the adapter on {type(self.given).__name__} keeps the rank that its layers "
                "have. Leave rho out, or give the plain model."
            )
        read = read_adapter(self.given, config, "the adapter on the model")
        self._check_heads(read.layers.task_type)
        return read.with_options(rho=1.0)

    def _check_heads(self, task_type: str | None) -> None:
        """Refuse an adapter on a classifier's head: that begins at random, and a pass leaves it to be trained whole."""
        task, base = task_of(self.model), without_adapter(unwrapped(self.model))
        heads = [name for name in heads_of(base) if name in adapter_layers(self.model)]
        if heads and task in HEADS and task_type is None:
            raise LoraInitError(
                f"the adapter has a LoRA layer on {heads[0]!r}, which begins at random and is not saved with it. Set "
                f"task_type={task!r} in the LoraConfig, and it is trained whole."
            )

    def put(self, init: AdapterInit, adapter_name: str) -> Any:
        """Put the layers back and fill them."""
        self.restore()  # `opened` took them off for the pass
        return super().put(init, adapter_name)


def handle_of(model: Any) -> ModelHandle:
    """Find how a model holds an adapter."""
    if hasattr(model, "get_base_model"):
        return PeftModelHandle(model)
    if is_filled(model):
        return InPlaceHandle(model)
    return ModelHandle(model)
