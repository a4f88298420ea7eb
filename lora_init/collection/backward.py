"""The backward half of a pass: the gradient at each layer's output, token by token, beside what the layer read."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_init.collection.activations import ActivationHooks, Sink, input_of
from lora_init.collection.losses import Loss, count_labels, own_loss
from lora_init.errors import LoraInitError, first_line, is_out_of_memory
from lora_init.layers.masks import rows_of
from lora_init.layers.running import Forward, restoring
from lora_init.layers.targets import Target
from lora_init.layers.wrappers import Precision, reshard, run_eagerly
from lora_init.third_party_internals import goes_backward, version_of


@dataclass(eq=False)
class _Call:
    """One run of a layer in the forward pass, until its gradient comes."""

    name: str
    x: Tensor
    version: int
    tokens: Tensor | None  # the numbers of the rows that count; None for all
    out_features: int


class NoGradientsError(LoraInitError):
    """This model, these layers or these batches give no gradients to learn from; inputs can be learned from."""


class BackwardHooks:
    """Run a forward and a backward pass and hand out what layers read, and the gradients at their outputs.

    A context manager inside its `ActivationHooks`. While it lasts no weight wants a gradient, so the backward
    pass computes none; afterwards that is as before, and no `.grad` was touched. What a layer read is kept until its
    gradient is there. Layers under gradient checkpointing are checkpointed here, too.

    g_t is the gradient of the *sum* of the losses of a batch's labels: of the batch's loss times their number. So a
    token's g does not depend on the batch that it came in, sums over batches are sums over tokens, and a sum of
    g_t x_t^T over all batches, divided by all labels, is the gradient of the mean loss over all of them.

    `forward` runs the model on a batch, labels included; `loss` computes the loss from what that returns and the batch,
    by default it is the model's own.
    """

    def __init__(
        self, hooks: ActivationHooks, targets: Mapping[str, Target], forward: Forward, loss: Loss | None = None
    ) -> None:
        other = next((t for t in targets.values() if t.kernel or t.experts), None)
        if other is not None:
            raise NoGradientsError(
                f"layer {other.name!r} is a {other.kind}: gradient statistics are for linear layers. "
                "Leave it out of the targets, or collect without gradients."
            )
        self._hooks = hooks
        self._name = type(hooks.model).__name__
        self._forward = forward
        self._loss = loss
        self._sink: Sink | None = None
        self._waiting: dict[_Call, None] = {}
        self._stack = ExitStack()

    def __enter__(self) -> BackwardHooks:
        model = self._hooks.model
        reshard(model)  # the parameters that want no gradient have to be those that all others are gathered from
        with self._stack as stack:  # also where one of these raises, what was done is undone
            stack.enter_context(restoring("requires_grad", model.parameters()))
            model.requires_grad_(False)
            for name, module in self._hooks.modules.items():
                stack.callback(module.register_forward_hook(partial(self._hook, name), with_kwargs=True).remove)
            embedding = None
            with suppress(NotImplementedError):  # of a model of transformers that reads sound
                embedding = getattr(model, "get_input_embeddings", lambda: None)()
            if isinstance(embedding, nn.Module):  # a reentrant checkpoint runs backward only if its input wants one
                stack.callback(embedding.register_forward_hook(_wanting_gradient).remove)
            stack.enter_context(_checkpointed(model))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def run(self, batch: Any, sink: Sink) -> int:
        """Run one batch forward and backward; return its number of labels.

        `sink.rows` is called as by `ActivationHooks.watch`. `sink.gradient` is called in the backward pass, without
        autocast, for each run of each layer; after it, with zeros, for those that the loss does not depend on.
        """
        self._sink = sink
        try:
            with self._hooks.watch(batch, sink) as moved, run_eagerly(), torch.enable_grad():
                n_labels = count_labels(self._hooks.model, moved)
                loss = self._loss_of(moved) * n_labels  # the mean over labels -> the sum
                n_calls = len(self._waiting)
                try:
                    loss.backward()  # type: ignore[no-untyped-call]
                except RuntimeError as error:
                    if is_out_of_memory(error):
                        raise  # the caller knows which batch to make smaller
                    raise LoraInitError(
                        f"the backward pass of {self._name} failed: {first_line(error)} Some quantized layers give no "
                        "gradient of their input: collect from the model in float."
                    ) from error
            # A gradient takes its call away. If none did, all that would be learned are zeros.
            if n_calls == len(self._waiting) > 0:
                raise LoraInitError(f"the loss of {self._name} does not depend on any of the targeted layers.")
            for call in self._waiting:
                rows = rows_of(call.x, call.tokens)
                sink.gradient(call.name, rows, rows.new_zeros(len(rows), call.out_features))
        finally:
            self._sink, self._waiting = None, {}
        return n_labels

    def _loss_of(self, batch: Any) -> Tensor:
        output = self._forward(self._hooks.model, batch)
        loss = self._loss(output, batch) if self._loss else own_loss(output)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            hint = "Pass loss=, a function of what the model returns and the batch."
            if self._loss is None and isinstance(batch, Mapping) and "labels" not in batch:
                hint = (
                    f"The batch has {', '.join(map(repr, batch))} and no 'labels'. load_batches makes labels from "
                    f"columns 'messages', 'prompt' and 'completion', or 'text', and from completion=. {hint}"
                )
            where = "loss=" if self._loss else f"{self._name}.forward"
            got = type(loss).__name__
            if isinstance(loss, Tensor):
                got = f"a tensor of shape {tuple(loss.shape)}"
            raise LoraInitError(f"{where} returned {got} for a loss, expected one number. {hint}")
        value = float(loss.detach())
        if not math.isfinite(value):
            raise LoraInitError(f"the loss is {value:g}. The model produces it; statistics were not updated.")
        if not loss.requires_grad:
            raise NoGradientsError(
                f"the loss of {self._name} gives no gradient to any layer: nothing that was computed on the way keeps "
                "one. Leave torch.no_grad() and detach() out of forward= and loss=."
            )
        return loss.reshape(())

    def _hook(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor | None:
        if self._sink is None or not torch.is_grad_enabled():
            return None  # somebody else's pass, or the first run of a reentrant checkpoint
        x = input_of(name, args, kwargs).detach()
        call = _Call(name, x, version_of(x), self._hooks.masks.tokens(name, x, predicting=True), output.shape[-1])
        # A checkpoint runs its layers again in the backward pass: the call of the forward pass waits already.
        if not goes_backward():
            self._waiting[call] = None
        wanting: Tensor = _wanting_gradient(module, args, output)
        wanting.register_hook(partial(self._gradient_hook, call))  # type: ignore[no-untyped-call]
        return wanting

    def _gradient_hook(self, call: _Call, gradient: Tensor) -> None:
        if self._sink is None:
            return
        self._waiting.pop(call, None)
        if version_of(call.x) != call.version:
            raise LoraInitError(
                f"layer {call.name!r}: what it read was changed in place afterwards, so its gradient is not known."
            )
        with torch.no_grad(), Precision().off():
            self._sink.gradient(call.name, rows_of(call.x, call.tokens), rows_of(gradient, call.tokens))


def _wanting_gradient(module: nn.Module, args: Any, output: Any) -> Any:
    """Let the backward pass begin here: a copy, since operations in place are forbidden on what it begins at."""
    if not isinstance(output, Tensor) or output.requires_grad or not torch.is_grad_enabled():
        return output
    return output.detach().requires_grad_().clone()


@contextmanager
def _checkpointed(model: nn.Module) -> Iterator[None]:
    """Checkpoint the layers for which transformers would in training; in evaluation mode it does not."""
    classes = sys.modules.get("transformers.modeling_layers")
    layers = []
    for module in model.modules():
        # By sys.modules: a model of transformers has imported it, and no other model has such layers.
        is_layer = classes is not None and isinstance(module, classes.GradientCheckpointingLayer)
        if is_layer and module.gradient_checkpointing and "forward" not in vars(module):
            layers.append(module)
    with restoring("forward", layers):
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        yield
