"""From a model and a batch to the rows that each layer receives. Hooks carry rows; they do no maths."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_init.errors import LoraInitError
from lora_init.layers.masks import TokenMasks
from lora_init.layers.rows import Experts, Patches, expert_group, experts_of, patches_of, routed
from lora_init.layers.running import evaluating, on_device_of
from lora_init.layers.targets import output_embedding
from lora_init.layers.wrappers import Precision, class_name, is_offloaded, is_sharded
from lora_init.third_party_internals import goes_backward, version_of

# (layer name, positional and keyword arguments of the layer) -> rows [n, d_in]
RowsFunction = Callable[[str, tuple[Any, ...], dict[str, Any]], Tensor]


class Sink:
    """Receives the tensors of a pass, and must not keep them. This one ignores them."""

    def rows(self, group: str, rows: Tensor) -> None:
        """Take the rows [n, d_in] that a group has read in a run of its layers."""

    def output(self, layer: str, y: Tensor, tokens: Tensor | None) -> None:
        """Take what a layer has computed without its bias, [..., d_out], and which rows of it count; None for all."""

    def gradient(self, layer: str, x: Tensor, g: Tensor) -> None:
        """Take what a layer has read [n, d_in] and the gradient at its output [n, d_out], of the tokens that count."""


class _EndOfPass(BaseException):
    """Ends a forward pass in which nothing more is needed. Not an Exception, so that no model catches it."""


class ActivationHooks:
    """Hand the input rows of chosen layers to a function, one forward pass at a time.

    A context manager: inside it the model is in evaluation mode and has hooks; after it hooks and the mode of every
    submodule are as before, also after an exception. Layers that read the same tensor object form a group, named after
    the first of them to run; a group takes each tensor once. Of a convolution the rows are patches, see `Patches`; a
    fused parameter of experts, see `Experts`, has a group for each expert and one for all experts. A pass ends before
    the output embedding (`lm_head`) and the loss, unless the output embedding is itself a layer to watch. Layers that
    read the same tensor when they were first seen, and others later, are refused: their rows would be mixed.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],  # to watch, by name; a fused parameter of experts by its own
        masks: TokenMasks,
        rows: RowsFunction | None = None,  # instead of the masks; layers are not grouped then
        to_the_end: bool = False,  # for something comes after the output embedding
    ) -> None:
        self.model = model
        self.modules = modules
        self.masks = masks
        self.group_of: dict[str, str] = {}
        self._rows = rows
        self._experts: dict[str, Experts] = {}
        self._patches: dict[str, Patches | None] = {}
        for name, module in modules.items():
            experts = experts_of(name, module)
            if experts is not None:
                self._experts[name] = experts
            self._patches[name] = patches_of(name, module)
        head = output_embedding(model)
        to_the_end |= any(head is module for module in modules.values())
        # Sharded and offloaded weights are put away at the end of a pass, so such a pass runs to its end.
        to_the_end |= is_sharded(model) or is_offloaded(model)
        self._head: nn.Module | None = None
        if isinstance(head, nn.Module) and not to_the_end:
            self._head = head
        self._stack = ExitStack()
        self._batch: Any = None
        self._sink: Sink | None = None

    def __enter__(self) -> ActivationHooks:
        with self._stack as stack:  # also where one of these raises, what was done is undone
            stack.enter_context(evaluating(self.model))
            self._add_hooks(stack)
            self._stack = stack.pop_all()
        return self

    def _add_hooks(self, stack: ExitStack) -> None:
        stack.callback(self.model.register_forward_pre_hook(self._start_call, with_kwargs=True).remove)
        for handle in self.masks.hooks():
            stack.callback(handle.remove)
        for name, module in self.modules.items():
            stack.callback(module.register_forward_pre_hook(partial(self._hook, name), with_kwargs=True).remove)
            # A module of experts returns their weighted sum: what each computes is worked out from its rows.
            if self._rows is None and name not in self._experts:
                after = partial(self._output_hook, name)
                stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        if self._head is not None:
            # Before other hooks there, which would begin what is not to run.
            stack.callback(self._head.register_forward_pre_hook(self._end_pass, prepend=True).remove)

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @contextmanager
    def watch(self, batch: Any, sink: Sink) -> Iterator[Any]:
        """Call `sink.rows` for every group that gets rows in a forward pass inside the block.

        Yields the batch on the model's device. The sink is called inside the pass, without autocast and gradients, with
        the rows of the tokens that count.
        """
        batch = on_device_of(self.model, batch)
        if self._rows is None:
            self.masks.start(batch)
        self._batch, self._sink = batch, sink
        # Tensors read in this pass: id and way of reading -> (weak reference, version, groups). Weak: no activation is
        # kept, and an id that Python gave to a second tensor is told from the first.
        self._read: dict[tuple[int, Patches | None], tuple[weakref.ref[Tensor], int, list[str]]] = {}
        self._inputs: dict[str, list[list[str]]] = {}  # the groups of what each layer read
        try:
            with suppress(_EndOfPass):
                yield batch
            # Not in `finally`: a pass that failed has not run all layers, and its own error is the one to raise.
            self._check_groups()
        finally:
            self._batch, self._sink, self._read = None, None, {}
            self.masks.stop()

    def _start_call(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Take the mask of a call, where `forward` makes several of a batch, as for questions and their passages."""
        if self._rows is not None or self._sink is None:
            return
        # The mask of the whole batch, which `watch` took, goes before the mask of a call.
        has_own_mask = isinstance(self._batch, Mapping) and "attention_mask" in self._batch
        if not has_own_mask and isinstance(kwargs.get("attention_mask"), Tensor):
            self.masks.start(kwargs)

    def _end_pass(self, module: nn.Module, args: Any) -> None:
        if self._sink is not None:  # else somebody else's forward pass, which wants its logits
            raise _EndOfPass

    def _hook(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._sink is None:  # somebody else's forward pass
            return None
        if not goes_backward():  # or one that is run again
            self._hand_on(name, args, kwargs, self._sink)
        # bitsandbytes' layers of eight bits set outliers in what they read to zero for a while, so they read a copy:
        # those that read the same tensor afterwards are told by its version.
        if args and class_name(module) == "Linear8bitLt":
            return (args[0].clone(), *args[1:]), kwargs
        return None

    def _output_hook(self, name: str, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if self._sink is None or goes_backward() or not isinstance(output, Tensor) or output.is_nested:
            return
        with torch.no_grad(), Precision().off():
            y, tokens = output.detach(), None
            patches = self._patches[name]
            if patches is None:
                tokens = self.masks.tokens(name, input_of(name, args, kwargs))
            else:
                # Channels to the end, as of a linear layer: batch x d_out x places -> batch x places x d_out.
                y = y.movedim(-1 - len(patches.kernel), -1)
            bias = getattr(module, "bias", None)
            if bias is not None:  # an adapter adds to W x, so it is held against the size of W x
                y = y - bias
            self._sink.output(name, y, tokens)

    def _hand_on(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], sink: Sink) -> None:
        with torch.no_grad(), Precision().off():
            if self._rows is not None:
                group = self.group_of.setdefault(name, name)
                sink.rows(group, self._rows(name, args, kwargs))
            elif name in self._experts:
                self._read_experts(self._experts[name], args, kwargs, sink)
            else:
                self._read_input(name, input_of(name, args, kwargs), sink)

    def _read_input(self, name: str, x: Tensor, sink: Sink) -> None:
        version = version_of(x)
        patches = self._patches[name]
        seen, seen_version, groups = self._read.get((id(x), patches), (None, 0, []))
        if seen is None or seen() is not x or seen_version != version or x.is_inference():  # that has no version
            groups = []
            self._read[id(x), patches] = (weakref.ref(x), version, groups)
        # The list itself stands for the tensor: layers that read the same one hold the same list.
        self._inputs.setdefault(name, []).append(groups)
        # A layer stays in the group of its first pass. Of a tensor that no layer has read yet it is the first.
        first_reader = groups[0] if groups else name
        group = self.group_of.setdefault(name, first_reader)
        if group in groups:
            return  # the group has these rows already
        groups.append(group)
        if patches is None:
            sink.rows(group, self.masks.rows(name, x))  # [..., d_in] -> [n, d_in]
        else:
            sink.rows(group, patches.rows(x))

    def _check_groups(self) -> None:
        """Check that the layers of each group read the same in this pass, too, as far as they ran."""
        # By identity, not by content: two tensors may have gone to the same groups.
        read = {name: set(map(id, inputs)) for name, inputs in self._inputs.items()}
        for name, group in self.group_of.items():
            if name in read and group in read and read[name] != read[group]:
                raise LoraInitError(
                    f"layers {group!r} and {name!r} read the same tensor in batches before, and not in this one, so "
                    "their rows would be mixed. Let a batch like this one come first."
                )

    def _read_experts(self, experts: Experts, args: tuple[Any, ...], kwargs: dict[str, Any], sink: Sink) -> None:
        self.group_of.setdefault(experts.name, experts.name)
        hidden, chosen = routed(experts.name, args, kwargs)
        tokens = self.masks.tokens(experts.name, hidden)
        if tokens is not None:
            hidden, chosen = hidden[tokens], chosen[tokens]
        for expert, rows in experts.rows(hidden, chosen):
            if expert is None:  # the rows of all experts
                sink.rows(experts.name, rows)
            else:
                sink.rows(expert_group(experts.name, expert), rows)
                sink.output(experts.name, experts.output(rows, expert, chosen), None)


def input_of(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Find the tensor that a layer reads among its arguments."""
    tensors = (value for value in kwargs.values() if isinstance(value, Tensor))
    x = args[0] if args else next(tensors, None)
    if not isinstance(x, Tensor):
        raise LoraInitError(f"layer {name!r}: input of type {type(x).__name__}, expected a tensor. Exclude this layer.")
    if x.is_nested:  # nn.TransformerEncoder leaves out what is padding: sequences of several lengths -> rows x d_in
        return torch.cat(x.unbind())
    return x
