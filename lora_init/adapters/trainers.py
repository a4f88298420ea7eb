"""A trainer of transformers or TRL -> its model, its batches, the adapter it asks for; and an adapter back into it."""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from itertools import tee
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from lora_init.adapters.asked import Asked
from lora_init.adapters.config import read_adapter
from lora_init.adapters.peft_model import remember, remove_adapters
from lora_init.adapters.starts import DEFAULT, Start
from lora_init.errors import LoraInitError
from lora_init.layers.masks import IGNORED
from lora_init.layers.running import call_model
from lora_init.layers.targets import find_targets
from lora_init.loading.models import task_of
from lora_init.private_parts import forget_loader

if TYPE_CHECKING:
    from peft import PeftModel

# Their loss is what the model computes from labels. Other trainers compute their own, of two answers for example.
_PLAIN_LOSS = ("Trainer", "Seq2SeqTrainer", "SFTTrainer")
# How an SFTTrainer calls that loss; older ones have no name for it.
_OWN_LOSS = (None, "nll", "chunked_nll")

_CLASSIFIERS = tuple(f"For{what}Classification" for what in ("Sequence", "Image", "Audio", "Video"))


def is_trainer(model: Any) -> bool:
    """Return whether this is a trainer and no model, without importing transformers."""
    return hasattr(model, "get_train_dataloader") and hasattr(model, "train_dataset")


@contextmanager
def opened(trainer: Any, asked: Asked, start: Start) -> Iterator[tuple[nn.Module, Asked, Iterator[Any]]]:
    """Take a trainer's untrained adapter off its model, if it has one, and open its data; put it back on an exception.

    Yields the plain model, what was asked for with what the trainer's `peft_config` says, and the batches to come.
    """
    name, run = type(trainer).__name__, asked.run
    if trainer.optimizer is not None:
        raise LoraInitError(f"the {name} has an optimizer already. Call initialize() right after it is made.")
    if trainer.model_init is not None:
        raise LoraInitError(f"the {name} makes its model anew when training begins. Give it model= for model_init=.")
    gradients, source = start.by_gradient or run.gradients, _source_of_loss(trainer)
    if gradients and not has_plain_loss(trainer):
        raise LoraInitError(
            f"method={start.name!r}: a start from gradients needs the gradient of the training loss, and this {name} "
            f"computes a loss of its own. Take method={DEFAULT!r}, or another that reads inputs alone."
        )
    model = trainer.model
    if hasattr(model, "peft_config"):
        asked = read_adapter(model, asked, "the trainer's peft_config")
    else:
        _check_head(model, asked.given.get("target_modules", ()), name)
        asked = asked.but(task_type=asked.layers.task_type or task_of(model))
    restore = remember(model)
    try:
        if hasattr(model, "peft_config"):
            model = model.get_base_model()
            remove_adapters(model)
        taken = inspect.signature(type(model).forward).parameters
        # What a forward function does not name, Trainer hands to it all the same; TRL's trainers keep it.
        whole = source in ("Trainer", "Seq2SeqTrainer") and any(one.kind is one.VAR_KEYWORD for one in taken.values())

        def forward(model: nn.Module, batch: Any) -> Any:
            kept = {key: value for key, value in batch.items() if whole or key in taken}
            if not kept:  # DPOTrainer before TRL 0.29: prompts and answers apart
                raise LoraInitError(
                    f"a batch of {name} has {', '.join(batch)}, and {type(model).__name__} takes none of these. TRL "
                    "0.29 or newer makes whole texts; or initialize the plain model on load_batches(...)."
                )
            return call_model(model, kept, with_labels=gradients or start.by_error)  # which is checked by the loss

        asked = asked.but(data=run.data or f"training batches of {name}", forward=run.forward or forward)
        with _batches(trainer) as batches:
            yield model, asked, batches
    except BaseException:
        restore()
        raise


def classifies_by_own_loss(trainer: Any) -> bool:
    """Return whether a trainer trains a classifier by the loss that the model computes from classes."""
    config = next(iter(getattr(trainer.model, "peft_config", {}).values()), None)
    base = trainer.model if config is None else trainer.model.get_base_model()
    classifies = getattr(config, "task_type", None) == "SEQ_CLS" or type(base).__name__.endswith(_CLASSIFIERS)
    return classifies and has_plain_loss(trainer)


def adapter_dtype(trainer: Any) -> torch.dtype | None:
    """Read the type of a trainer's adapter; None if it has none. TRL makes that of a quantized model bfloat16."""
    return next((p.dtype for n, p in trainer.model.named_parameters() if ".lora_A." in n), None)


def hand_over(trainer: Any, adapted: PeftModel, dtype: torch.dtype | None) -> None:
    """Put this model into a trainer, as if it had been made with it; `dtype` was that of the adapter it had."""
    if dtype is not None:
        for name, parameter in adapted.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                parameter.data = parameter.data.to(dtype)
    elif trainer.args.gradient_checkpointing:
        adapted.enable_input_require_grads()  # as TRL does for an adapter of its own
    trainer.model = trainer.model_wrapped = trainer.callback_handler.model = adapted


def has_plain_loss(trainer: Any) -> bool:
    """Return whether a trainer trains by the loss that its model computes from labels."""
    source = _source_of_loss(trainer)
    if source not in _PLAIN_LOSS:
        return False
    function = trainer.compute_loss_func or vars(trainer).get("compute_loss")
    named = getattr(trainer.args, "loss_type", None) if source == "SFTTrainer" else None
    return not (function or trainer.args.label_smoothing_factor) and named in _OWN_LOSS


def _source_of_loss(trainer: Any) -> str:
    """Return the name of the class that says how the loss is computed."""
    return next(kind.__name__ for kind in type(trainer).__mro__ if "compute_loss" in vars(kind))


def _check_head(model: Any, target_modules: Any, trainer: str) -> None:
    """Refuse an adapter on a head by whose weight alone TRL multiplies, as TRL does."""
    taken = inspect.signature(model.forward, follow_wrapped=False).parameters  # TRL's forward is wrapped as the model's
    if not target_modules or "fused_lm_head" not in taken:
        return
    head = model.get_output_embeddings()
    selected = find_targets(model, target_modules).layers
    if any(model.get_submodule(layer) is head for layer in selected):
        raise LoraInitError(
            f"{trainer} computes its loss from the weight of the head alone, so that an adapter there would never be "
            "trained. Leave the head out of target_modules, or train it whole: modules_to_save."
        )


@contextmanager
def _batches(trainer: Any) -> Iterator[Iterator[Any]]:
    """Open a trainer's own batches, and leave no trace: the trainer will draw the same ones in the same order."""
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        # Collators draw from Python's and numpy's random numbers, too, or from a generator of their own.
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        stack.callback(setattr, trainer, "data_collator", trainer.data_collator)
        with suppress(Exception):  # what cannot be copied is used itself
            trainer.data_collator = copy.deepcopy(trainer.data_collator)
        rows = trainer.train_dataset
        # Those of datasets begin anew each time, and workers read copies.
        streams = isinstance(rows, IterableDataset) and not type(rows).__module__.startswith("datasets.")
        if streams and not trainer.args.dataloader_num_workers:
            trainer.train_dataset = _Twice(rows)
        loader = trainer.get_train_dataloader()
        if hasattr(loader, "end"):  # accelerate's: it would take training for a part of this pass
            stack.callback(loader.end)
        stack.callback(forget_loader, trainer.accelerator, loader)
        yield _labelled(trainer, loader)


class _Twice(IterableDataset[Any]):
    """Rows for the pass, and for training from the same beginning, also where they are there only once."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows
        self.streams: list[Iterator[Any]] | None = None

    def __iter__(self) -> Iterator[Any]:
        if self.streams is None:
            self.streams = list(tee(iter(self.rows)))
        return self.streams.pop() if self.streams else iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getattr__(self, name: str) -> Any:
        """Return what Trainer looks for in data, such as `set_epoch`."""
        return getattr(self.rows, name)


def _labelled(trainer: Any, loader: Any) -> Iterator[Any]:
    for batch in loader:
        if not isinstance(batch, Mapping) or not any(isinstance(value, Tensor) for value in batch.values()):
            raise LoraInitError(
                f"{type(trainer).__name__} makes its batches of tokens while it trains, so there are none to learn "
                "from yet. Initialize the plain model on load_batches(...), and give the trainer the result."
            )
        if "labels" not in batch and "completion_mask" in batch:  # of DPOTrainer: both answers count
            yield {**batch, "labels": batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED)}
        else:
            yield batch
