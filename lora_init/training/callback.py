"""Start, replay and dial as one callback, for trainers that other tools make: axolotl, ms-swift, LLaMA-Factory."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_init.adapters.adapter_init import AdapterInit
from lora_init.adapters.directory import carried
from lora_init.adapters.init_config import InitConfig
from lora_init.adapters.model_handles import InPlaceHandle, PeftModelHandle
from lora_init.adapters.peft_model import fill_in_place, freeze_a, name_of_adapter
from lora_init.building.pipeline import choose, run
from lora_init.errors import LoraInitError, check_number, is_number, warn
from lora_init.keep.dial import check_dialable, dial
from lora_init.keep.replay import replayed
from lora_init.rates.learning_rate import check_measured, made_by_torch, schedule_of, shares_of
from lora_init.starts.starts import DEFAULT
from lora_init.trainers.loaders import (
    batch_of_one_process,
    check_repeats,
    examples_of_a_step,
    is_used_up,
    length_of,
    of_stream,
    without_trace,
)
from lora_init.trainers.trainers import has_own_loss, leaves_loss

# What a callback can see is the trainer's arguments, its model and optimizer, and its loader, all made by then. So the
# adapter is filled in place, and what was made for another learning rate is scaled.

_MOST_TEXTS = 512  # that the base writes before training; training goes through them again and again
_DECIDED = ("max_batches", "data", "task_type", "gradients")  # of initialize()'s options, by the trainer or `samples`
_TEXT_WEIGHT = 2.0  # of a replayed text, in examples: one beside eight, weighed 0.25, was measured


class StartCallback(TrainerCallback):
    """Start the adapter of a trainer from the trainer's own batches, when training begins.

    The callback is for trainers that another tool makes; call `initialize(trainer)` for a trainer of your own. The tool
    makes a LoRA adapter in a PeftModel, with the rank, alpha and layers of its configuration; the callback writes A
    into that adapter, so that the optimizer keeps its parameters, and training sees the same batches as without. It
    does nothing in a run that is resumed.

    Args:
        method: See `initialize`. Default: `"eva"`.
        samples: Number of examples to learn from.
        learning_rate: `"measured"` sets the trainer's rate to the one that the pass predicts for its steps. It raises
            for other optimizers than AdamW, and if the arguments name another loss than the model's own. A callback
            cannot see a loss function of the trainer's: leave this argument out there. By default the trainer keeps its
            rate, and a warning says if it is far off.
        replay: Texts of the base's own to train on beside each example, so that less is forgotten: 0.125 is one beside
            eight. A text weighs as two examples. The losses that the trainer reports are those of its data alone.
        dial: Choose how strongly each layer acts when training has ended, from the trainer's batches for evaluation, as
            `lora_init.dial` does, and save the adapter to `output_dir`. Checkpoints stay as trained.
        **options: Other arguments of `initialize` that leave the form of the adapter alone, such as `token_mask`.

    Raises:
        LoraInitError: An option is unknown or out of range; or when training begins, before a batch is read: there is
            no fresh LoRA adapter, it was started in another way, the options do not agree with its configuration, or
            `replay` or `dial` lacks what it needs.

    Example:
        >>> from lora_init import StartCallback
        >>> StartCallback(sample=64)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        lora_init.errors.LoraInitError: StartCallback() has no argument sample=. Did you mean samples? ...
    """

    def __init__(
        self, method: str | None = None, samples: int = 512, learning_rate: str | None = None, replay: float = 0.0,
        dial: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        check_number("samples", samples, 1, whole=True)
        if learning_rate is not None and not (isinstance(learning_rate, str) and learning_rate == "measured"):
            raise LoraInitError(f"learning_rate={learning_rate!r}: 'measured' is expected, or none for the tool's own.")
        if not is_number(replay) or not 0 <= replay <= 1:
            raise LoraInitError(
                f"replay={replay!r}: a share from 0 to 1 is expected; 0.125 is a text beside 8 examples."
            )
        if not isinstance(dial, bool):
            raise LoraInitError(f"dial={dial!r}: true or false is expected.")
        for name in _DECIDED:
            if name in options:
                raise LoraInitError(f"StartCallback() has no argument {name}=: the trainer decides that, or samples=.")
        self.measured, self.replay, self.dial = learning_rate is not None, replay, dial
        self.config = choose(InitConfig.from_arguments("StartCallback()", method, **options), False)
        self.samples = samples

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None,
        train_dataloader: Any = None, **rest: Any,
    ) -> None:  # fmt: skip
        """Start the adapter, unless the run is resumed; the base writes the texts to replay."""
        resumed, tokenizer = bool(state.global_step), rest.get("processing_class")
        # What can be refused is refused first: the texts take long to write.
        handle = None if resumed else FilledHandle(model)
        if self.dial:
            _check_dial(args, model)
        if self.replay:
            _check_replay(args, tokenizer)
            n = math.ceil(self._texts_until(args, state.max_steps))
            # In a run that is resumed, too: by the seed they are the same texts.
            self.texts = replayed(model, tokenizer, min(n, _MOST_TEXTS), args.seed, 1, partial(_say, state))
            _say(state, f"{len(self.texts)} texts that the base has written are replayed.")
        if handle is None:
            self._resume(model, args, state, rest)
        else:
            self._start(handle, args, state, train_dataloader, rest)

    def _resume(self, model: Any, args: Any, state: TrainerState, rest: Any) -> None:
        """Leave the adapter alone, and set the rest of the schedule to the rate that was measured at the beginning."""
        if self.config.shape.freeze_a:
            freeze_a(model, name_of_adapter(model))
        _say(state, f"the run is resumed at step {state.global_step}, and its adapter is left alone.")
        rate = rest["optimizer"].param_groups[0].get("initial_lr")  # the one that was measured, from the checkpoint
        made_for = rest["optimizer"].defaults.get("lr")
        if self.measured and rate and made_for:
            _set_shares(rate / made_for, rest["lr_scheduler"], args.lr_scheduler_kwargs)
            args.learning_rate = rate

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **rest: Any
    ) -> None:
        """Begin the gradient of the step with that of its texts."""
        if not self.replay:
            return
        # By differences of a running number: with a fraction of a text in a step, some steps have one more.
        first = int(self._texts_until(args, state.global_step))
        end = int(self._texts_until(args, state.global_step + 1))
        # Each process takes every n-th of them, and begins again where there are no more.
        texts = [self.texts[i % len(self.texts)] for i in range(first + args.process_index, end, args.world_size)]
        if not texts:
            return
        batch = {}
        for key in texts[0]:
            batch[key] = torch.cat([text[key] for text in texts]).to(model.device)  # all of one length
        share = len(texts) * args.world_size / examples_of_a_step(args)  # processes take a mean of theirs
        weight = _TEXT_WEIGHT * share
        # Its own backward pass: gradients add up, and the trainer's loss, which it reports, stays the loss of its data.
        (weight * model.train()(**batch).loss).backward()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None,
        eval_dataloader: Any = None, **rest: Any,
    ) -> None:  # fmt: skip
        """Dial the adapter. After any error it stays as trained, so that the tool saves it."""
        if not self.dial:
            return
        try:
            if eval_dataloader is None:
                raise LoraInitError(
                    "nothing was evaluated. Evaluate at least once, or take the command `lora-init dial`."
                )
            with without_trace(eval_dataloader):
                say = partial(_say, state)
                batches = _batches(eval_dataloader, model.get_base_model())
                dialed = dial(model, batches, tokenizer=rest.get("processing_class"), seed=args.seed, say=say)
        except LoraInitError as error:
            _say(state, f"not dialed, and the adapter is as trained: {error}")
            return
        model.save_pretrained(args.output_dir)  # ms-swift saves nothing but checkpoints
        for topic, text in dialed.summary().items():
            _say(state, f"dial, {topic}: {text}")

    def _texts_until(self, args: TrainingArguments, step: int) -> float:
        """Compute how many texts all processes have replayed before a step; a fraction is carried on."""
        return self.replay * examples_of_a_step(args) * step

    def _start(self, handle: FilledHandle, args: Any, state: TrainerState, train_dataloader: Any, rest: Any) -> None:
        """Fill the adapter from the first batches; set the measured rate, or warn if the trainer's is far off."""
        data = getattr(train_dataloader, "dataset", None)
        if is_used_up(data):
            raise LoraInitError(
                f"the data are a stream ({type(data).__name__}), of which training would miss what is read before. Use "
                "a data set with a length, or make the adapter by `lora-init init`."
            )
        optimizer = getattr(rest["optimizer"], "optimizer", rest["optimizer"])  # accelerate's holds the one that steps
        if "deepspeed" in f"{type(rest['optimizer']).__module__}.{type(optimizer).__module__}":
            raise LoraInitError(
                "DeepSpeed has its own copy of the weights by now, which would undo a start at the first step. Make "
                "the adapter by `lora-init init`, and train that."
            )
        check_repeats(train_dataloader)
        with without_trace(train_dataloader):
            length = length_of(args, state.max_steps, train_dataloader)
        config = self.config.with_options(max_batches=math.ceil(self.samples / batch_of_one_process(length, args)))
        with handle.opened(config) as config:
            with without_trace(train_dataloader):
                batches = _batches(train_dataloader, handle.model)
                first = next(batches, {})
                has_labels = "labels" in first  # preferences have none
                is_plain_loss = has_labels and leaves_loss(args) and not has_own_loss(handle.model)
                if config.needs_gradient and not is_plain_loss:
                    raise LoraInitError(
                        f"method={config.start.name!r}: a start from gradients needs the gradient of the training "
                        f"loss, and this one is not what the model computes from labels. Take method={DEFAULT!r}."
                    )
                # Before the pass, which is what takes long.
                if self.measured:
                    name = f"a trainer with {type(args).__name__}"
                    check_measured(type(optimizer).__name__, is_plain_loss, name, handle.model)
                    _check_one_rate(optimizer)
                    _check_schedule(rest.get("lr_scheduler"), args.lr_scheduler_kwargs)
                # The first batch was read to see what it has, and is learned from, too.
                batches = chain(filter(None, [first]), batches)  # there may be none
                init = run(handle, batches, config.with_options(data="training batches"))
            handle.put(init, "")  # now: the data may hold parameters, which are put back as they were, too
        rate = replace(init, length=of_stream(length, args, init)).rate
        if self.measured and rate and _rate_of(optimizer):
            _set_rate(rate.rate, rest["optimizer"], rest["lr_scheduler"], args.lr_scheduler_kwargs)
            args.learning_rate = rate.rate
        # With the measured rate this still compares the schedule.
        trained_at, schedule = _rate_of(optimizer), schedule_of(args, rest.get("lr_scheduler"), state.max_steps)
        if rate and is_plain_loss:
            for line in rate.far_off(trained_at, type(optimizer).__name__, schedule):
                warn(line)
        what = f"{init.method} start of {len(init.weights)} layers, from {self.samples} examples of the data at most"
        known = "" if is_plain_loss else f": none was measured for the loss of a trainer with {type(args).__name__}"
        _say(state, f"{what}; the learning rate is {trained_at:.2g}{known}.")


class FilledHandle(InPlaceHandle):
    """A PeftModel whose parameters an optimizer has already: its fresh adapter is filled."""

    base_stays = "the trainer saves the adapter without them"
    model: Any = PeftModelHandle.model

    def __init__(self, given: Any) -> None:
        super().__init__(given)
        config = next(iter(getattr(given, "peft_config", {}).values()), None)
        if config is None or not hasattr(given, "get_base_model"):
            raise LoraInitError(
                f"StartCallback needs a PeftModel with LoRA, and the trainer has a {type(given).__name__}. Set "
                "the tool's option for LoRA."
            )
        method = getattr(config, "init_lora_weights", True)
        if method is not True or carried(config.to_dict()):
            started_by = "lora_init"
            if method is not True:
                started_by = f"init_lora_weights={method!r}"
            raise LoraInitError(
                f"the adapter was started by {started_by} already. Leave that out, or the StartCallback."
            )

    def put(self, init: AdapterInit, adapter_name: str) -> Any:
        """Put the layers back and fill them."""
        self.restore()
        fill_in_place(self.given, init)
        return self.given


def _batches(loader: Any, model: Any) -> Iterator[dict[str, Any]]:
    """Read what the model takes of a loader's batches."""
    taken = inspect.signature(type(model).forward).parameters
    # An expression and not a `yield`: the loader is opened here, before anything else draws random numbers.
    return ({key: value for key, value in batch.items() if key in taken} for batch in loader)


def _check_replay(args: TrainingArguments, tokenizer: Any) -> None:
    if args.fp16 or args.deepspeed or args.fsdp:
        raise LoraInitError("replay adds to the gradients, which fp16, DeepSpeed and FSDP hold in forms of their own.")
    if tokenizer is None:
        raise LoraInitError("replay needs a tokenizer to write texts with: pass the trainer its processing_class.")


def _check_dial(args: TrainingArguments, model: Any) -> None:
    # By its value: transformers has an enumeration, and a tool may have put a text there.
    if str(getattr(args.eval_strategy, "value", args.eval_strategy)) == "no":
        raise LoraInitError(
            "dial needs an eval data set, and eval_strategy steps or epoch: it chooses on held-out batches."
        )
    if args.world_size > 1:
        raise LoraInitError(
            "dial works in one process. Leave it out, and take the command `lora-init dial` afterwards."
        )
    config = next(iter(getattr(model, "peft_config", {}).values()), None)
    if config is not None:
        check_dialable(config.to_dict(), config.modules_to_save or (), "the adapter to dial")


def _rate_of(optimizer: Any) -> float:
    """Return the rate that an optimizer was made with; one of one's own need not have the trainer's."""
    return _rate_of_group(optimizer.param_groups[0])


def _rate_of_group(group: Mapping[str, Any]) -> float:
    # A schedule keeps the rate that it began with beside the one of now, which warm-up has lowered.
    return float(group.get("initial_lr", group["lr"]))


def _check_one_rate(optimizer: Any) -> None:
    """Refuse an optimizer whose groups have rates of their own."""
    if len(set(map(_rate_of_group, optimizer.param_groups))) > 1:
        raise LoraInitError(
            "learning_rate='measured': the optimizer has several rates, as LoRA+ has, and nothing was measured for "
            "that. Leave it out, and tune them."
        )


def _check_schedule(scheduler: Any, kwargs: Any) -> None:
    """Refuse schedules that hold rates of their own beside the optimizer's."""
    own = torch.optim.lr_scheduler
    made = made_by_torch(scheduler)
    has_least_rate = bool(getattr(made, "eta_min", 0) or any(getattr(made, "min_lrs", ())))
    if not {"min_lr", "min_lr_rate"} & {*(kwargs or {})}:  # given ready, it no longer says which of them it was made by
        settings = (getattr(function, "keywords", {}) for function in shares_of(made))
        has_least_rate = has_least_rate or any(one.get("min_lr_rate") for one in settings)
    if has_least_rate or isinstance(made, (own.OneCycleLR, own.CyclicLR, own.SequentialLR, own.ChainedScheduler)):
        raise LoraInitError(
            f"learning_rate='measured': {type(made).__name__} has rates of its own, which would stay. Take a schedule "
            "of transformers by lr_scheduler_type, or leave it out, and tune them."
        )


def _set_rate(rate: float, optimizer: Any, scheduler: Any, kwargs: Any) -> None:
    """Set the learning rate of an optimizer and its schedule, which multiplies the rates that it began with."""
    factor, schedule = rate / _rate_of(optimizer), made_by_torch(scheduler)
    # The rates of the groups by a factor, since warm-up has begun: `lr` is not the peak rate by now.
    for group in optimizer.param_groups:
        for name in ("lr", "initial_lr"):
            if name in group:
                group[name] = group[name] * factor  # not in place: both may be one tensor
    _set_shares(factor, schedule, kwargs)
    # The share that a schedule ends at may be a part of the first step, too, as of cosine_warmup_with_min_lr.
    for group, function in zip(optimizer.param_groups, shares_of(schedule), strict=False):
        group["lr"] = group["initial_lr"] * function(schedule.last_epoch)
    # By its state, which every schedule of torch gives and takes.
    state = schedule.state_dict()
    if "base_lrs" in state:
        state["base_lrs"] = [lr * factor for lr in state["base_lrs"]]
    if "_last_lr" in state:
        state["_last_lr"] = [group["lr"] for group in optimizer.param_groups]
    schedule.load_state_dict(state)


def _set_shares(factor: float, scheduler: Any, kwargs: Any) -> None:
    """Let a schedule end where it did, though the rate is another by a factor than the one that it was made for."""
    schedule = made_by_torch(scheduler)
    # Rates that a schedule ends at are shares of the one that it was made for.
    shares = {"lr_init": factor}
    if "min_lr" in (kwargs or {}):  # without it the share itself was given, and holds of any rate
        shares["min_lr_rate"] = 1 / factor
    functions = {id(function): function for function in shares_of(schedule)}  # groups share one
    for function in functions.values():
        settings = getattr(function, "keywords", {})  # transformers makes them by functools.partial
        for name, share in shares.items():
            if name in settings:
                settings[name] = settings[name] * share


def _say(state: TrainerState, text: str) -> None:
    if state.is_world_process_zero:
        print(f"lora_init: {text}", file=sys.stderr)
