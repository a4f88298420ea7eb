"""Whether an engine serves what is being trained: `verify` in the loop, compared with earlier steps, too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_init.errors import LoraInitError, check_number, check_switches, explain, warn
from lora_init.layers.running import evaluating
from lora_init.loading.batches import check_tokenizer
from lora_init.packages import check_takes
from lora_init.serving.server import Server
from lora_init.serving.verify import AS_TRAINED, CANNOT_TELL, Ask, Local, Verification, check_prompts, diagnose

STALE = "stale"
# Where on the way from this step's answer to an earlier step's an answer has to be, how exactly that has to be
# known, and the share of the way that may be left over.
_ON_THE_WAY, _EXACTLY, _LEFT_OVER = 0.75, 0.1, 0.3


class ServingWatch:
    """Compare what an engine serves during training with the model that is trained, now and at earlier steps.

    For each noted step the watch keeps log-probabilities after the prompts, and no weights. An engine that was not
    synchronized answers as an earlier step did; the verdict then names that step. The other verdicts are as in
    `verify`. A check costs a forward pass over the prompts and one request for each prompt; if something is wrong,
    `diagnose` runs about 40 more passes.

    Args:
        tokenizer: The model's tokenizer.
        prompts: Texts or chats of the kind that is trained on. Eight are enough.
        served: A function from a prompt to log-probabilities of the next token, by the number or the text of a token;
            or the URL of an OpenAI-compatible server, which serves the adapter as `name`.
        base: The same function for the base model in that engine, to measure the engine's noise. With a URL the server
            is asked for it.
        name: With a URL, the adapter's name there. Default: the name that the server lists.
        keep: Number of noted steps to keep, each of which takes [prompts, vocabulary] float32 numbers.

    Raises:
        LoraInitError: There is no prompt, or the server does not answer.
    """

    def __init__(
        self, tokenizer: Any, prompts: Sequence[Any], served: Ask | str, base: Ask | None = None, *,
        name: str | None = None, keep: int = 16,
    ) -> None:  # fmt: skip
        check_tokenizer(tokenizer)
        check_prompts(prompts)
        check_number("keep", keep, 1, whole=True)
        if not prompts:
            raise LoraInitError("a watch needs a prompt, and got none.")
        if isinstance(served, str):
            server = Server(served)
            adapter, base_name = server.find(name or "", name)
            served = partial(server.ask, adapter)
            if base_name:
                base = partial(server.ask, base_name)
        check_takes(served, "served=", "prompt")
        if base is not None:
            check_takes(base, "base=", "prompt")
        self._tokenizer, self._prompts, self._ask, self._base, self._keep = tokenizer, [*prompts], served, base, keep
        self._kept: dict[int, Tensor] = {}  # of noted steps, [prompts, vocabulary]
        self._plain: tuple[Tensor, Tensor] | None = None  # of the base here and there, which nothing changes

    def note(self, model: Any, step: int) -> None:
        """Keep the model's present answers for a step. Call this when weights are sent to the engine.

        Args:
            model: The `PeftModel` that is trained.
            step: Number of the step; a step that was noted before is replaced.

        Raises:
            LoraInitError: The model has no adapter.
        """
        with evaluating(model):
            now = self._local(model).run(self._prompts)
        self._kept.pop(step, None)  # so that a step that is noted again is the last to be dropped
        self._kept[step] = now
        while len(self._kept) > self._keep:
            del self._kept[next(iter(self._kept))]

    def check(self, model: Any, step: int) -> Verification:
        """Check whether the engine serves a step; a step that was not noted stands for the model as it is now.

        Returns:
            The result of `verify`, with the verdict "stale" if an earlier step is served.
        """
        if step not in self._kept:
            self.note(model, step)
        with evaluating(model):
            local = self._local(model)
            now, faults = self._kept[step], local.faults()
            if self._plain is None:  # once: training changes no base
                self._plain = local.run(self._prompts, faults[0]), local.observe(self._base, self._prompts)
            (plain, at_base), local.size = self._plain, now.shape[1]  # a `Local` that has not run knows no size
            likeliest = now.topk(min(20, now.shape[1])).indices
            effect = float((now - plain).gather(1, likeliest).square().mean().sqrt())
            observed = local.observe(self._ask, self._prompts)
            run = partial(local.run, self._prompts)
            diagnosis = diagnose(observed, at_base, plain, now, effect, faults, run, local.routed)
        if diagnosis.verdict == "ignored":  # an earlier step at which B was zero would fit as well
            return diagnosis
        earlier = dict(self._kept)
        del earlier[step]
        stale = _stale(observed, now, earlier, diagnosis.noise)
        if stale is None:
            return diagnosis
        other, prompts, is_sure = stale
        if not is_sure:
            if diagnosis.verdict == AS_TRAINED:
                return diagnosis
            text = f"{diagnosis.text}; step {other} fits as well, and base= would tell them apart"
            return replace(diagnosis, text=text)
        many = f"{prompts} of {diagnosis.prompts} prompts are" if prompts < diagnosis.prompts else "it is"
        text = f"{STALE}: {many} answered as by step {other}, and step {step} was expected"
        return replace(diagnosis, verdict=STALE, text=f"{text} ({diagnosis.text})")

    def _local(self, model: Any) -> Local:
        if not isinstance(model, PeftModel):
            raise LoraInitError(f"a watch compares a model with an adapter, and this {type(model).__name__} has none.")
        local = Local(model, self._tokenizer)
        if any(layer.disable_adapters for layer in local.layers.values()):
            raise LoraInitError("the adapter is switched off here, so there is nothing to compare. Switch it on.")
        return local


def _stale(
    observed: Tensor, now: Tensor, earlier: dict[int, Tensor], noise: float | None
) -> tuple[int, int, bool] | None:
    """Find the earlier step that all prompts, or else some, are answered as by, and their number; None if none are.

    Last, whether nothing else fits as well: without the engine's noise, what is off the way has to be little.

    What is observed is projected on the way from the answer of this step (0) to that of the other (1): with noise of
    its own it is at 0, with a standard deviation of the noise over the length of the way. An engine that caches answers
    may give an earlier step's to some prompts alone.
    """
    returned, off = ~observed.isnan(), (observed - now).nan_to_num()  # prompts x vocabulary
    for as_one in (True, False):  # first all prompts are judged as one, then each for itself
        best: tuple[float, int, int, bool] | None = None
        for step, kept in earlier.items():
            way = (kept - now).where(returned, 0.0)
            # The squared length of the way; what is observed along it; what is left from its end, and from its start.
            per_prompt = (way.square(), off * way, (off - way).square(), off.square(), returned)
            sums = torch.stack([part.float().sum(1) for part in per_prompt])  # -> 5 x prompts
            if as_one:
                sums = sums.sum(1, keepdim=True)  # -> 5 x 1
            length, along, left, at_now, values = sums
            # Without a base to measure it by, noise is taken to be all that is left.
            variance = left / values if noise is None else torch.tensor(noise**2)
            of_noise = variance * values
            exact = of_noise / values < _EXACTLY**2 * length
            there = exact & (along > _ON_THE_WAY * length) & (left < _LEFT_OVER**2 * length + 4 * of_noise)
            n = int(there.sum())
            if not n:
                continue
            if as_one:
                n = len(returned)
            is_sure = noise is not None or bool((left < _LEFT_OVER**2 * length)[there].all())
            # The least of these is the step that explains most of what is off.
            candidate = (float((left - at_now)[there].sum()), step, n, is_sure)
            if best is None or candidate < best:
                best = candidate
        if best is not None:
            return best[1:]
    return None


class ServingCallback(TrainerCallback):
    """Check the engine in a training loop, and warn, or stop the run, if it does not serve what is trained.

    A step is noted when it begins and asked about when it ends: trainers that generate, such as TRL's `GRPOTrainer`,
    send the weights to their engine in between. An engine that fails or does not answer is a fault, too; each kind of
    fault is warned of once, and so is that a check cannot tell, which ends no run.

    Args:
        watch: What to ask.
        every: Number of steps between two checks.
        stop: End the run with a checkpoint, unless `save_strategy` is `"no"`. Default is to warn and to go on.
    """

    def __init__(self, watch: ServingWatch, every: int = 10, stop: bool = False) -> None:
        if not isinstance(watch, ServingWatch):
            raise LoraInitError(f"watch={watch!r}: a ServingWatch is needed.")
        check_number("every", every, 1, whole=True)
        check_switches(stop=stop)
        self.watch, self.every, self.stop = watch, every, stop
        self.found: dict[int, Verification] = {}  # by step
        self._warned: set[str] = set()  # kinds of faults

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **rest: Any
    ) -> None:
        """Note what is sent to the engine in this step."""
        if state.is_world_process_zero:
            self.watch.note(model, state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **rest: Any
    ) -> None:
        """Check what the engine serves."""
        step = state.global_step - 1  # as it was noted: the trainer counts the step before it ends
        if not state.is_world_process_zero or state.global_step % self.every:
            return
        try:
            self.found[step] = diagnosis = self.watch.check(model, step)
        except Exception as error:  # of an engine that is asked by a function: whatever that raises
            text = explain(error)
            # The kind is what stands before the first colon.
            kind, fault = text.partition(": ")[0], f"what the engine serves could not be checked: {text}"
        else:
            # An adapter that changes nothing yet, as before the first step, is no reason to say anything.
            if diagnosis.verdict == AS_TRAINED or not diagnosis.effect:
                return
            kind, fault = diagnosis.verdict, f"the engine does not serve what is trained: {diagnosis.text}"
            if kind == CANNOT_TELL:
                fault = f"what the engine serves is not known: {diagnosis.text}"
        if kind not in self._warned:
            warn(f"step {step}: {fault}")
        self._warned.add(kind)
        if self.stop and kind != CANNOT_TELL:
            control.should_training_stop = True
            control.should_save = args.save_strategy != "no"
