"""From a model and a batch to the rows that each layer receives. Hooks carry rows; they do no maths."""

from __future__ import annotations

import copy
import inspect
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from lora_init.errors import LoraInitError
from lora_init.layers.convolutions import Patches, patches_of
from lora_init.layers.experts import Experts, experts_of, routed
from lora_init.layers.masks import TokenMasks, Tokens, encoder_of
from lora_init.layers.wrappers import Precision, is_offloaded, is_sharded, run_eagerly

# (layer name, positional and keyword arguments of the layer) -> rows [n, d_in]
RowsFunction = Callable[[str, tuple[Any, ...], dict[str, Any]], Tensor]
Sink = Callable[[str, Tensor], None]
Forward = Callable[[nn.Module, Any], Any]


class _EndOfPass(BaseException):
    """Ends a forward pass in which nothing more is needed. Not an Exception, so that no model catches it."""


class ActivationTap:
    """Hand the input rows of chosen layers to a function, one forward pass at a time.

    A context manager: inside it the model is in evaluation mode and has hooks; after it hooks and the mode of every
    submodule are as before, also after an exception. Layers that read the same tensor object form a group, named after
    the first of them to run; a group takes each tensor once. Of a convolution the rows are patches, see `Patches`; a
    fused parameter of experts, see `Experts`, has a group for each expert and one for all together. A pass ends at the
    last layer that is still wanted and never reaches the output embedding (`lm_head`) or the loss, unless that layer is
    itself tapped.

    Args:
        model: Any torch model.
        modules: Layers to tap, by name; for a fused parameter of experts, its name and its module.
        token_mask: `"attention"` leaves out padding; `"labels"` also leaves out tokens whose label is -100.
        forward: Runs the model on a batch; by default a mapping goes in as keywords, a sequence as positions.
        rows: Takes the place of the masking: gives the rows of one layer from its arguments. Layers are then not
            grouped, since it may treat each its own way.

    Attributes:
        sharded: Whether a forward pass is one that all processes make together. It then runs to its end, also after an
            error in a layer's rows, and so it does where weights are taken away after use.
        n_passes: Passes that ran to where they were to end.
        group_of: Name of the group of every layer that ran so far.
        n_calls: Largest number of times that a layer ran in one pass.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        token_mask: str = "attention",
        forward: Forward | None = None,
        rows: RowsFunction | None = None,
    ) -> None:
        self.model = model
        self.modules = modules
        self.group_of: dict[str, str] = {}
        self.n_calls: Counter[str] = Counter()
        self.sharded = is_sharded(model)
        self.n_passes = 0
        self._to_the_end = self.sharded or is_offloaded(model)
        self._error: LoraInitError | None = None
        self._forward = forward or call_model
        self._own_rows = rows
        self._masks = TokenMasks(model, token_mask)
        self._experts = {name: found for name in modules if (found := experts_of(name, modules[name]))}
        self._patches = {name: patches_of(name, module) for name, module in modules.items()}
        # Names in the order of their calls, once a pass has called all: only then is it known where the last one is.
        self._order: list[str] = []
        self._handles: list[Any] = []
        self._modes: list[tuple[nn.Module, bool]] = []
        self._sink: Sink | None = None
        self._whole = self._as_it_is = self._unfinished = False
        self._called: list[str] = []

    def __enter__(self) -> ActivationTap:
        self._modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        for name, module in self.modules.items():
            self._handles.append(module.register_forward_pre_hook(self._hook(name), with_kwargs=True))
        head = _output_embedding(self.model)
        if head is not None and not self.has_output_embedding:
            self._handles.append(head.register_forward_pre_hook(self._end_pass, prepend=True))
        self._handles += self._masks.hooks()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        for module, mode in self._modes:
            module.training = mode
        self._handles, self._modes = [], []

    def resume(self, group_of: Mapping[str, str], n_calls: Mapping[str, int]) -> None:
        """Go on with the grouping that an earlier pass, or another process, has found."""
        self.group_of.update(group_of)
        self.n_calls |= Counter(n_calls)  # the larger of each

    def _begin(self, sink: Sink, wanted: Callable[[str], bool]) -> None:
        self._sink, self._wanted = sink, wanted
        self._calls: Counter[str] = Counter()
        self._called = []
        # Tensors taken in this pass: id and way of reading -> (weak reference, version, groups). Weak: no activation is
        # kept, and an id that Python gave to a second tensor is told from the first.
        self._taken: dict[tuple[int, Patches | None], tuple[weakref.ref[Tensor], int, list[str]]] = {}
        self._last: tuple[str, int] | None = None
        self._error = None
        for position, name in enumerate(self._order):
            experts = self._experts.get(name)
            if any(map(wanted, experts.groups() if experts else [self.group_of[name]])):
                self._last = (name, self._order[: position + 1].count(name))

    @torch.no_grad()
    def run(self, batch: Any, sink: Sink, wanted: Callable[[str], bool] = lambda group: True) -> None:
        """Run one forward pass and call `sink(group, rows)` for every group that gets rows [n, d_in].

        Args:
            batch: Mapping, tensor, sequence, or whatever `forward` takes. Not changed.
            sink: Called inside the pass, without autocast. The rows are not kept after it returns.
            wanted: Tells whether a group still needs rows.

        Raises:
            LoraInitError: The mask keeps no token, labels are missing, or the model does not take the batch.
        """
        with self.listening(batch, sink, wanted) as moved, run_eagerly():
            self._forward(self.model, moved)

    @contextmanager
    def listening(self, batch: Any, sink: Sink, wanted: Callable[[str], bool], whole: bool = False) -> Iterator[Any]:
        """Hand out the rows of a forward pass that somebody else runs inside the block.

        Args:
            batch: See `run`, as for `sink` and `wanted`.
            whole: Let the pass go on to its end, for the loss, and hand out inputs as they are, with all rows.

        Yields:
            The batch on the model's device.
        """

        def at_full_precision(group: str, rows: Tensor) -> None:
            with Precision().off():
                sink(group, rows)

        self._begin(at_full_precision, wanted)
        self._unfinished = True
        self._whole, self._as_it_is = whole or self._to_the_end, whole
        batch = to_device(batch, _input_device(self.model))
        self._masks.start(batch)
        complete = True
        try:
            yield batch
        except _EndOfPass:
            complete = self._last is None  # ended by the output embedding: nothing more could have come
        finally:
            self._end()
        self.n_passes += 1
        self._unfinished = False
        if self._error is not None:
            raise self._error
        if complete and not self._order and len(set(self._called)) == len(self.modules):
            self._order = self._called

    def _end(self) -> None:
        for name, count in self._calls.items():
            self.n_calls[name] = max(self.n_calls[name], count)
        self._sink, self._last, self._taken = None, None, {}
        self._masks.stop()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def carry(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # Somebody else's forward pass; or checkpointing runs a layer again in the backward pass of a `forward`.
            if self._sink is None or torch._C._current_graph_task_id() != -1:
                return
            self._calls[name] += 1
            self._called.append(name)
            try:
                if self._error is None:
                    with torch.no_grad():  # in a pass that will go backward, too
                        self._carry(name, args, kwargs, self._sink)
            except LoraInitError as error:
                if not self.sharded:
                    raise
                self._error = error
            if self._last == (name, self._calls[name]) and not self._whole:
                raise _EndOfPass

        return carry

    @property
    def broken(self) -> bool:
        """Whether the last pass has begun and broken off, so that other processes may still be in theirs."""
        return self._unfinished and bool(self._called)

    @property
    def has_output_embedding(self) -> bool:
        """Whether the output embedding is itself tapped."""
        head = _output_embedding(self.model)
        return head is not None and any(head is module for module in self.modules.values())

    def tokens(self, name: str, x: Tensor) -> Tokens | None:
        """Say which rows of a layer's input [..., d] count in the present pass; None if all do."""
        return self._masks.tokens(name, x[None] if x.dim() == 1 else x)

    def _end_pass(self, module: nn.Module, args: Any) -> None:
        if self._sink is not None and not self._whole:
            raise _EndOfPass

    def _carry(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], sink: Sink) -> None:
        if self._own_rows is not None:
            group = self.group_of.setdefault(name, name)
            if self._wanted(group):
                sink(group, self._own_rows(name, args, kwargs))
            return
        if name in self._experts:
            self._carry_experts(self._experts[name], args, kwargs, sink)
            return
        x = input_of(name, args, kwargs)
        version = 0 if x.is_inference() else x._version
        patches = self._patches[name]
        seen, seen_version, groups = self._taken.get((id(x), patches), (None, 0, []))
        if seen is None or seen() is not x or seen_version != version:
            groups = []
            self._taken[id(x), patches] = (weakref.ref(x), version, groups)
        group = self.group_of.setdefault(name, groups[0] if groups else name)
        if group not in groups:
            groups.append(group)
            if self._wanted(group):
                read = x if self._as_it_is else self._masks.rows(name, x) if patches is None else patches.rows(x)
                sink(group, read)

    def _carry_experts(self, experts: Experts, args: tuple[Any, ...], kwargs: dict[str, Any], sink: Sink) -> None:
        self.group_of.setdefault(experts.name, experts.name)
        hidden, chosen = routed(experts.name, args, kwargs)
        tokens = self._masks.tokens(experts.name, hidden)
        if tokens is not None:
            hidden, chosen = hidden[tokens.counting], chosen[tokens.counting]
        for group, rows in experts.rows(hidden, chosen, self._wanted):
            sink(group, rows)


def to_device(batch: Any, device: torch.device | None) -> Any:
    """Move the tensors of a batch; containers are made anew, the caller's stay as they are."""
    if isinstance(batch, Tensor):
        return batch.to(device) if device is not None else batch
    if isinstance(batch, Mapping):
        moved = {key: to_device(value, device) for key, value in batch.items()}
        if type(batch) is dict or not isinstance(batch, MutableMapping):
            return moved
        batch = copy.copy(batch)  # a BatchEncoding stays one, for a forward= that uses its attributes
        batch.update(moved)
        return batch
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def input_of(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Find the tensor that a layer reads among its arguments.

    Raises:
        LoraInitError: There is none.
    """
    x = args[0] if args else next((v for v in kwargs.values() if isinstance(v, Tensor)), None)
    if not isinstance(x, Tensor):
        raise LoraInitError(f"layer {name!r}: input of type {type(x).__name__}, expected a tensor. Pass rows=.")
    return x


def call_model(model: nn.Module, batch: Any, with_labels: bool = False) -> Any:
    """Run a model on a batch: a mapping goes in as keywords, a sequence as positions.

    Args:
        model: The model.
        batch: The batch.
        with_labels: Keep `labels`, from which a model of transformers computes its loss.

    Raises:
        LoraInitError: The model does not take what is in the batch.
    """
    if isinstance(batch, Mapping):
        inputs = dict(batch)
        parameters = inspect.signature(model.forward).parameters
        if not (with_labels or _makes_decoder_inputs_from_labels(model, inputs)):
            inputs.pop("labels", None)  # no loss
        if "use_cache" in parameters:
            inputs.setdefault("use_cache", False)
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        unknown = [] if open_ended else [key for key in inputs if key not in parameters]
        if unknown:
            raise LoraInitError(
                f"the batch has {', '.join(map(repr, unknown))}, which {type(model).__name__}.forward does not take. "
                "Leave them out, or pass forward=."
            )
        return model(**inputs)
    return model(*batch) if isinstance(batch, Sequence) and not isinstance(batch, str) else model(batch)


def _makes_decoder_inputs_from_labels(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    given = any(key in inputs for key in ("decoder_input_ids", "decoder_inputs_embeds"))
    return encoder_of(model) is not None and not given


def _output_embedding(model: nn.Module) -> nn.Module | None:
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    return head if isinstance(head, nn.Module) else None


def _input_device(model: nn.Module) -> torch.device | None:
    return next((p.device for p in model.parameters() if p.device.type != "meta"), None)
