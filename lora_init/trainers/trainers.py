"""A trainer of transformers: its model, its batches, the loss it trains by; and its adapter put back into it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from itertools import tee
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers.trainer_utils import has_length

from lora_init.adapters.init_config import InitConfig
from lora_init.adapters.model_handles import ModelHandle, handle_of
from lora_init.errors import LoraInitError
from lora_init.layers.running import call_model
from lora_init.loading.models import task_of
from lora_init.rates.learning_rate import check_measured, reads_text, schedule_of
from lora_init.rates.training_length import TrainingLength
from lora_init.starts.starts import DEFAULT
from lora_init.third_party_internals import forget_loader, written_in
from lora_init.trainers.loaders import (
    check_repeats,
    examples_of_a_step,
    is_used_up,
    length_of,
    of_stream,
    without_trace,
)
from lora_init.trainers.put_back import undisturbed

if TYPE_CHECKING:
    from lora_init.adapters.adapter_init import AdapterInit

# Their loss is what the model computes from labels. Other trainers compute their own.
_PLAIN_LOSS = ("Trainer", "Seq2SeqTrainer")
# How arguments name the loss that the model computes from labels; most trainers' have no name for it.
_OWN_LOSS = (None, "nll", "chunked_nll")
# Libraries whose trainers are known here: what else overrides a method may do anything in it.
_KNOWN = ("transformers", "trl", "sentence_transformers")
_CLASSIFIERS = tuple(f"For{what}Classification" for what in ("Sequence", "Image", "Audio", "Video"))


class TrainerIntegration:
    """A trainer before `train()`, and the handle of its model.

    This class is for a `Trainer` of transformers and classes made from it. The subclass of a library overrides what is
    different there: `batches`; `forward` for another loss, with `gives_loss` if it returns the loss that is trained by;
    `find_handle` where the model is inside another object. For a trainer that is not made from transformers' it also
    overrides `opened`, `check`, `hand_over`, `set_rate` and the properties: they read what a `Trainer` has.
    """

    advice = "Check columns and collator; remove_unused_columns=False keeps what a collator reads."

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.name = trainer, type(trainer).__name__
        self.handle = self.find_handle()

    def find_handle(self) -> ModelHandle:
        """Find how the trainer's model holds an adapter."""
        return handle_of(self.trainer.model)

    @property
    def classifies(self) -> bool:
        """Whether the trainer trains a classifier by the loss that the model computes from classes."""
        config = next(iter(getattr(self.trainer.model, "peft_config", {}).values()), None)
        is_of_task = getattr(config, "task_type", None) == "SEQ_CLS"
        # A model without an adapter has no task type yet, only its class.
        is_of_class = type(self.handle.model).__name__.endswith(_CLASSIFIERS)
        return (is_of_task or is_of_class) and self.has_plain_loss

    @property
    def has_plain_loss(self) -> bool:
        """Whether the trainer trains by the loss that its model computes from labels."""
        return self.source_of_loss in _PLAIN_LOSS and not self.changes_loss

    @property
    def changes_loss(self) -> bool:
        """Whether a function or smoothing of labels stands between the model's loss and the one that is trained by."""
        # Methods that were put on the trainer itself, and not on a class of its own: see `source_of_loss` for these.
        if {"compute_loss", "training_step"} & {*vars(self.trainer)} or self.trainer.compute_loss_func:
            return True
        return not leaves_loss(self.trainer.args) or has_own_loss(self.handle.model)

    @property
    def gives_loss(self) -> bool:
        """Whether `forward` gives the loss that is trained by."""
        return self.has_plain_loss

    @property
    def is_main_process(self) -> bool:
        """Whether this process reports, of all that train together."""
        return bool(self.trainer.is_world_process_zero())

    @property
    def batch_size(self) -> int:
        """Number of examples in a batch of one process."""
        return int(self.trainer.args.per_device_train_batch_size)

    @property
    def is_measured(self) -> bool:
        """Whether rates were measured for what it trains: models of text, by their own loss."""
        return self.has_plain_loss and reads_text(self.handle.model)

    @cached_property
    def length(self) -> TrainingLength | None:
        """How long it will train, by its own count of steps; None if neither its arguments nor its data say so."""
        args, counted = self.trainer.args, self.trainer.set_initial_training_values
        with _loader(self.trainer) as loader:
            if not has_length(getattr(loader, "dataset", None)):  # a stream, of which only the arguments say how long
                if args.max_steps <= 0:
                    return None
                return length_of(args, args.max_steps, loader)
            given = {"args": args, "dataloader": loader, "total_train_batch_size": examples_of_a_step(args)}
            taken = inspect.signature(counted).parameters  # transformers 4 has the last one
            steps = counted(**{name: given[name] for name in given if name in taken})[-1]
            return length_of(args, steps, loader)

    def length_after(self, init: AdapterInit, own_data: bool) -> TrainingLength | None:
        """How long it will train: a pass over its own data may tell more of a stream."""
        return of_stream(self.length, self.trainer.args, init) if own_data else self.length

    @property
    def optimizer(self) -> str:
        """The optimizer that it will train with, by the name of its setting or class."""
        methods = ("create_optimizer", "get_optimizer_cls_and_kwargs", "create_optimizer_and_scheduler")
        if any(map(self._has_own, methods)):
            return f"that {self.name} makes itself"
        given, setting = getattr(self.trainer, "optimizer_cls_and_kwargs", None), self.trainer.args.optim
        if given:  # the class and its arguments: it goes before the setting
            return getattr(given[0], "__name__", str(given[0]))
        return str(getattr(setting, "value", setting))

    @property
    def learning_rate(self) -> float | None:
        """The rate that it will train with; None if its optimizer has one of its own that is not known yet."""
        given = getattr(self.trainer, "optimizer_cls_and_kwargs", None)
        rate: float | None = self.trainer.args.learning_rate
        if given:
            rate = given[1].get("lr")
        return rate

    def set_rate(self, rate: float) -> None:
        """Set the rate in the trainer's arguments, and in the optimizer's where it was given one with arguments."""
        self.trainer.args.learning_rate = rate
        if given := getattr(self.trainer, "optimizer_cls_and_kwargs", None):
            # Another dictionary: the caller may use theirs for a second trainer.
            self.trainer.optimizer_cls_and_kwargs = (given[0], given[1] | {"lr": rate})

    @property
    def schedule(self) -> str:
        """The schedule of its rate, see `schedule_of`; or that a method of one's own makes it."""
        if self._has_own("create_scheduler") or self._has_own("create_optimizer_and_scheduler"):
            return f"that {self.name} makes itself"
        length = self.length
        return schedule_of(self.trainer.args, self.trainer.lr_scheduler, length.steps if length else 0)

    def check_rate(self) -> None:
        """Refuse to set a rate for an optimizer, or a loss, that none was measured for."""
        check_measured(self.optimizer, self.has_plain_loss, self.name, self.handle.model)

    def _has_own(self, method: str) -> bool:
        """Return whether a method of the trainer is of one's own, and not of a library that is known here."""
        function = getattr(self.trainer, method, None)
        return function is not None and not _is_known(function)

    @property
    def source_of_loss(self) -> str:
        """The name of the library's class that says how the loss is computed; empty where a class of one's own does."""
        methods = ("compute_loss", "training_step")
        # The first class, from the trainer's own upwards, that defines one of them.
        kind = next(kind for kind in type(self.trainer).__mro__ if {*methods} & {*vars(kind)})
        if not _is_known(kind):
            return ""
        # Of a library's class a patch may have put another function in the place of its own.
        for name in methods:
            if name in vars(kind) and not _is_known(getattr(kind, name)):
                return ""
        return kind.__name__

    @contextmanager
    def opened(self, config: InitConfig) -> Iterator[tuple[InitConfig, Iterator[Any]]]:
        """Take the trainer's untrained adapter off its model, if it has one, and open its data.

        Yields the options with what the trainer's `peft_config` says, and the batches to come. The block ends
        with `put`; on an exception all is as it was.
        """
        self.check(config)
        trainer, run = self.trainer, config.run
        if self.handle.wraps_anew:
            config = config.with_options(task_type=config.layers.task_type or task_of(self.handle.model))
        with self.handle.opened(config) as config:
            forward = run.forward or self.forward(with_labels=config.needs_gradient or config.start.needs_error)
            data = run.data or f"training batches of {self.name}"
            # Before the loader is made, which holds the data set.
            _keep_for_training(trainer)
            with _loader(trainer) as loader:
                check_repeats(loader)
                yield config.with_options(data=data, forward=forward), self.batches(loader)

    def check(self, config: InitConfig) -> None:
        """Refuse a trainer that has begun, and a start that its loss cannot give."""
        if self.trainer.optimizer is not None:
            raise LoraInitError(f"the {self.name} has an optimizer already. Call initialize() right after it is made.")
        if self.trainer.model_init is not None:
            raise LoraInitError(
                f"the {self.name} makes its model anew when training begins. Give it model= for model_init=."
            )
        if self.trainer.train_dataset is None and not self._has_own("get_train_dataloader"):
            raise LoraInitError(f"the {self.name} has no train_dataset to learn from. Make it with one.")
        self.handle.check(config.start)
        if config.needs_gradient and not self.gives_loss:
            raise LoraInitError(
                f"method={config.start.name!r}: a start from gradients needs the gradient of the training loss, and "
                f"this {self.name} computes a loss of its own. Take method={DEFAULT!r}, or another that reads inputs "
                "alone."
            )

    def forward(self, with_labels: bool) -> Any:
        """Return how a batch is run, `with_labels` so that there is a loss."""
        taken = inspect.signature(type(self.handle.model).forward).parameters
        # What a forward function does not name, Trainer hands to it all the same; others keep it.
        whole = self.source_of_loss in _PLAIN_LOSS and any(one.kind is one.VAR_KEYWORD for one in taken.values())

        def forward(model: nn.Module, batch: Any) -> Any:
            kept = {key: value for key, value in batch.items() if whole or key in taken}
            needed = getattr(model, "main_input_name", None)
            # Embeddings, or an encoder's outputs, stand in for tokens.
            has_input = any(key == needed or key.endswith(("embeds", "outputs")) for key in kept)
            wants = ""
            if not kept:
                wants = "takes none of these"
            elif needed and not has_input:
                wants = f"needs {needed}"
            if wants:
                raise LoraInitError(
                    f"a batch of {self.name} has {', '.join(batch)}, and {type(model).__name__} {wants}. {self.advice}"
                )
            return call_model(model, kept, with_labels=with_labels)

        return forward

    def batches(self, loader: Any) -> Iterator[Any]:
        """Read batches as the model takes them."""
        for batch in loader:
            if not isinstance(batch, Mapping) or not any(isinstance(value, Tensor) for value in batch.values()):
                raise LoraInitError(
                    f"{self.name} makes its batches of tokens while it trains, so there are none to learn "
                    "from yet. Initialize the plain model on load_batches(...), and give the trainer the result."
                )
            yield batch

    def hand_over(self, adapted: Any) -> None:
        """Put this model into the trainer, as if it had been made with it."""
        trainer = self.trainer
        if self.handle.wraps_anew and trainer.args.gradient_checkpointing:
            model: Any = self.handle.model
            model.enable_input_require_grads()  # as trainers do for an adapter of their own
        # Everywhere that a trainer keeps it from the moment that it is made.
        trainer.model = trainer.model_wrapped = trainer.callback_handler.model = adapted


@contextmanager
def _loader(trainer: Any) -> Iterator[Any]:
    """Open a trainer's own data, and leave no trace: the trainer will draw the same batches in the same order."""
    with undisturbed(), ExitStack() as stack:
        loader = trainer.get_train_dataloader()
        stack.callback(forget_loader, trainer.accelerator, loader)
        stack.enter_context(without_trace(loader))
        yield loader


def _keep_for_training(trainer: Any) -> None:
    """Keep the rows of a stream that the pass reads, for training to begin with them, too."""
    rows = trainer.train_dataset
    if is_used_up(rows) and not trainer.args.dataloader_num_workers:  # workers read copies
        trainer.train_dataset = _Twice(rows)


def _is_known(made: Any) -> bool:
    """Return whether a class or function, and what a function wraps, is of a library whose trainers are known here."""
    return all(module.partition(".")[0] in _KNOWN for module in written_in(made))


def has_own_loss(model: nn.Module) -> bool:
    """Return whether a model computes its loss by a function of somebody's own."""
    function = getattr(model, "loss_function", None)
    return function is not None and not _is_known(function)


def leaves_loss(args: Any) -> bool:
    """Return whether a trainer's arguments leave the loss to the model, as it computes it from labels."""
    # Arguments of trainers by preferences, such as DPO's and KTO's, have a beta.
    smooths, of_preferences = args.label_smoothing_factor, hasattr(args, "beta")
    return not smooths and not of_preferences and getattr(args, "loss_type", None) in _OWN_LOSS


class _Twice(IterableDataset[Any]):
    """Rows for the pass, and for training from the same beginning, also where they are there only once."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows
        self.streams: list[Iterator[Any]] | None = None

    def __iter__(self) -> Iterator[Any]:
        # One stream for the pass and one for the first epoch; `tee` keeps what only one of them has read.
        if self.streams is None:
            self.streams = list(tee(iter(self.rows)))
        if self.streams:
            return self.streams.pop()
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getattr__(self, name: str) -> Any:
        """Return what Trainer looks for in data, such as `set_epoch`."""
        return getattr(self.rows, name)
