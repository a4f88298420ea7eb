"""The start of an adapter as a callback, for trainers that other tools make: axolotl, ms-swift, LLaMA-Factory."""

from __future__ import annotations

import inspect
import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch.utils.data import IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_init.adapters.adapter_init import AdapterInit, freeze_a
from lora_init.adapters.asked import Asked
from lora_init.adapters.directory import carried
from lora_init.adapters.doors.carriers import InPlace, Wrapped
from lora_init.adapters.doors.trainers import undisturbed
from lora_init.adapters.peft_model import fill_in_place
from lora_init.adapters.pipeline import adapter_for, choose_start
from lora_init.errors import LoraInitError


class StartCallback(TrainerCallback):
    """Start the adapter of a trainer from the trainer's own batches, when training begins.

    For a trainer that another tool makes; one of your own takes `initialize(trainer)`. The adapter is a LoRA adapter in
    a PeftModel, with the rank, alpha and layers of the tool's configuration; A is written into it, so that the
    optimizer keeps its parameters, and training sees the batches that it would have seen. A run that is resumed is left
    alone.

    Args:
        method: See `initialize`. Default: `"eva"`.
        samples: Number of examples to learn from.
        learning_rate: `"measured"` sets the trainer's to what the pass says for its steps. Without, a rate that is more
            than three times off is a warning.
        **options: Other arguments of `initialize` that leave the form of the adapter alone, such as `token_mask`.

    Raises:
        LoraInitError: An option is unknown; or when training begins, before a batch is read: there is no fresh LoRA
            adapter, it was started in another way, or the options do not agree with its configuration.

    Example:
        >>> from lora_init import StartCallback
        >>> StartCallback(sample=64)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        lora_init.errors.LoraInitError: StartCallback() has no argument sample=. Did you mean samples? ...
    """

    def __init__(
        self, method: str | None = None, samples: int = 512, learning_rate: str | None = None, **options: Any
    ) -> None:
        if not isinstance(samples, int) or samples < 1:
            raise LoraInitError(f"samples={samples!r}: a number of examples of at least 1 is needed.")
        if learning_rate not in (None, "measured"):
            raise LoraInitError(f"learning_rate={learning_rate!r}: 'measured' is expected, or none for the tool's own.")
        self.measured = learning_rate is not None
        self.asked, self.samples = Asked.by("StartCallback()", method, **options), samples
        self.start = choose_start(method, False)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None,
        train_dataloader: Any = None, **rest: Any,
    ) -> None:  # fmt: skip
        """Start the adapter."""
        if state.global_step:
            _say(state, f"the run is resumed at step {state.global_step}, and its adapter is left alone.")
            return
        carrier = Filled(model)
        data = getattr(train_dataloader, "dataset", None)
        if isinstance(data, IterableDataset) and not type(data).__module__.startswith("datasets."):
            raise LoraInitError(
                f"the data are a stream ({type(data).__name__}), of which training would miss what is read before. Use "
                "a data set with a length, or make the adapter by `lora-init init`."
            )
        each = args.train_batch_size * args.world_size
        asked = self.asked.but(max_batches=math.ceil(self.samples / each))
        with carrier.opened(asked) as asked, undisturbed(), _batches(train_dataloader, carrier.model) as batches:
            init = adapter_for(carrier, batches, asked.but(data="training batches"), None, self.start)
            carrier.put(init, "")
        rate = replace(init, steps=state.max_steps).rate
        if self.measured and rate and args.learning_rate:
            _set_rate(args, rate.rate, rest["optimizer"], rest["lr_scheduler"])
        for said in rate.far_off(args) if rate else ():
            warnings.warn(said, stacklevel=2)
        what = f"{init.method} start of {len(init.weights)} layers, from {self.samples} examples of the data at most"
        _say(state, f"{what}; the learning rate is {args.learning_rate:.2g}.")


class Filled(InPlace):
    """A PeftModel whose parameters an optimizer has already: its fresh adapter is filled."""

    base_stays = "the trainer saves the adapter without them"
    model: Any = Wrapped.model

    def __init__(self, given: Any) -> None:
        super().__init__(given)
        config = next(iter(getattr(given, "peft_config", {}).values()), None)
        if config is None or not hasattr(given, "get_base_model"):
            raise LoraInitError(
                f"StartCallback needs a PeftModel with LoRA, and the trainer has a {type(given).__name__}. Set "
                "the tool's option for LoRA."
            )
        began = getattr(config, "init_lora_weights", True)
        if began is not True or carried(config.to_dict()):
            began = "lora_init" if began is True else f"init_lora_weights={began!r}"
            raise LoraInitError(f"the adapter was started by {began} already. Leave that out, or the StartCallback.")

    def put(self, init: AdapterInit, adapter_name: str) -> Any:
        """Put the layers back and fill them."""
        self.restore()
        fill_in_place(self.given, init)
        if init.freeze_a:
            freeze_a(self.given)
        return self.given


@contextmanager
def _batches(loader: Any, model: Any) -> Iterator[Iterator[dict[str, Any]]]:
    """Read what the model takes of a loader's batches; training reads them again from the first on."""
    taken = inspect.signature(type(model).forward).parameters
    try:
        yield ({key: value for key, value in batch.items() if key in taken} for batch in loader)
    finally:
        if hasattr(loader, "end"):  # accelerate's: it would take training for a part of this pass
            loader.end()


def _set_rate(args: Any, rate: float, optimizer: Any, scheduler: Any) -> None:
    """Set the learning rate of a trainer that has its optimizer and its schedule."""
    factor, schedule = rate / args.learning_rate, getattr(scheduler, "scheduler", scheduler)  # accelerate's holds it
    for group in optimizer.param_groups:
        group |= {name: group[name] * factor for name in ("lr", "initial_lr") if name in group}
    schedule.base_lrs = [one * factor for one in schedule.base_lrs]
    args.learning_rate = rate


def _say(state: TrainerState, text: str) -> None:
    if state.is_world_process_zero:
        print(f"lora_init: {text}", file=sys.stderr)
