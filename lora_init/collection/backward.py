"""From a model and a batch with labels to the gradient at each layer's output, token by token, beside what it read."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_init.collection.activations import ActivationTap, Forward, input_of
from lora_init.errors import LoraInitError
from lora_init.layers.masks import IGNORED, Tokens, encoder_of, never_looks_ahead, without_needless_mask
from lora_init.layers.targets import Target
from lora_init.layers.wrappers import Precision, reshard, run_eagerly

# Logits worked on together: on a CPU a few MB, which stay in its cache; a GPU wants few large calls.
_BLOCK_ON_CPU, _BLOCK = 2**20, 2**25

# What autograd calls linear layers: in `onednn_layers`, in torch on a GPU, and those with a bias.
_PRODUCTS = ("_LinearBackward", "UnsafeViewBackward0", "MmBackward0", "AddmmBackward0")


class CausalLoss:
    """Take the place of transformers' loss of a causal language model; the same number, up to rounding.

    A context manager. Softmax and its gradient are computed together, block by block, and for labelled tokens only.
    From the second batch on, when it is known that the model makes its logits once and computes its loss here, the
    output embedding is run on labelled tokens only: padding, and long questions with short answers, cost nothing there.

    Args:
        model: Any model. Nothing is changed in one that computes its loss in another way.
        whole: Make all logits in all batches.
    """

    def __init__(self, model: nn.Module, whole: bool = False) -> None:
        self._model: Any = model
        losses = sys.modules.get("transformers.loss.loss_utils")
        self._original: Any = getattr(losses, "ForCausalLMLoss", None)
        self._applies = self._original is not None and _loss_function(model) is self._original
        head = getattr(model, "get_output_embeddings", lambda: None)()
        self._head = head if self._applies and isinstance(head, nn.Module) and not whole else None
        self._handle: Any = None
        self._is_known = False
        self._n_heads = self._n_losses = 0  # calls in this batch
        self._labelled: Tensor | None = None  # [batch, length], where the output embedding is to run

    def __enter__(self) -> CausalLoss:
        if self._applies:
            self._model.loss_function = self._loss
        if self._head is not None:
            self._handle = self._head.register_forward_pre_hook(self._narrow)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._applies:
            del self._model._loss_function
        if self._handle is not None:
            self._handle.remove()

    def start(self, batch: Any) -> None:
        """Say which batch comes next."""
        self._is_known = self._is_known or self._n_heads == self._n_losses == 1
        self._n_heads = self._n_losses = 0
        self._labelled = None
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if self._is_known and isinstance(labels, Tensor):
            self._labelled = _shifted(labels) != IGNORED

    def _narrow(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        self._n_heads += 1
        if self._labelled is None or not args or args[0].shape[:-1] != self._labelled.shape:
            return None
        return (args[0][self._labelled.to(args[0].device)][None], *args[1:])

    def _loss(self, logits: Tensor, labels: Tensor, vocab_size: int, *args: Any, **options: Any) -> Tensor:
        targets = _shifted(labels)
        labelled = self._labelled
        if labelled is not None and targets.shape == labelled.shape != logits.shape[:-1]:
            targets = targets[labelled.to(targets.device)][None]
        plain = not args and all(options.get(name) is None for name in ("num_items_in_batch", "shift_labels"))
        if not plain or targets.shape != logits.shape[:-1]:
            other: Tensor = self._original(logits, labels, vocab_size, *args, **options)
            return other
        self._n_losses += 1
        # What a product returns is not kept for its gradient. Autograd would notice if anything else had kept it.
        ours_to_write = logits.grad_fn is not None and logits.grad_fn.name() in _PRODUCTS
        apply: Any = _CrossEntropy.apply
        loss: Tensor = apply(logits.reshape(-1, vocab_size), targets.reshape(-1).to(logits.device), ours_to_write)
        return loss


def may_shift_labels(model: nn.Module) -> bool:
    """Tell whether a model's loss may be that of a causal language model, by what transformers calls it."""
    return getattr(model, "loss_type", None) in (None, "ForCausalLM")


def _loss_function(model: nn.Module) -> Any:
    known = may_shift_labels(model) and "_loss_function" not in vars(model)
    return getattr(model, "loss_function", None) if known else None


def _shifted(labels: Tensor) -> Tensor:
    """Put the label of each token to the one before it, which predicts it."""
    return nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORED)


class _CrossEntropy(torch.autograd.Function):
    """Mean over the labelled rows of logits [n, V]; their gradient takes their place if nobody needs them."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ours_to_write: bool) -> Tensor:
        gradient = logits.detach() if ours_to_write else torch.empty_like(logits)
        in_place = ours_to_write and logits.dtype == torch.float32
        total = logits.new_zeros((), dtype=torch.float64)
        size = max(1, (_BLOCK_ON_CPU if logits.device.type == "cpu" else _BLOCK) // logits.shape[1])
        for start in range(0, len(logits), size):
            rows = slice(start, start + size)
            target = targets[rows, None]
            labelled = target != IGNORED
            target = target.clamp_min(0)
            block = gradient[rows] if in_place else logits[rows].to(torch.float32, copy=True)
            block -= block.amax(1, keepdim=True)
            picked = block.gather(1, target)
            scale = block.exp_().sum(1, keepdim=True)
            total += (labelled * (scale.log() - picked)).sum()
            block *= labelled / scale
            block.scatter_add_(1, target, -labelled.float())
            if not in_place:
                gradient[rows] = block
        ctx.save_for_backward(gradient)
        ctx.n = int((targets != IGNORED).sum())
        mean: Tensor = (total / ctx.n).float()
        return mean

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        scale = float(gradients[0]) / ctx.n  # 1 for the sum over all labels: nothing to multiply
        return gradient if scale == 1.0 else gradient * scale, None, None


class _Linear(torch.autograd.Function):
    """x W^T + b, with gradients for what wants one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        # The rows are kept for the weight's gradient only: under a frozen layer they are free to go.
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weight)
        product = rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)
        # No view to autograd, which would not let others write to it: nobody else has the tensor below.
        shaped: Tensor = torch.ops.aten._unsafe_view(product, [*x.shape[:-1], len(weight)])
        return shaped

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        gradient = gradients[0].reshape(-1, gradients[0].shape[-1])
        x = (gradient @ weight).view(*gradients[0].shape[:-1], weight.shape[1]) if of_x else None
        return x, gradient.T @ rows if of_weight else None, gradient.sum(0) if of_bias else None


@contextmanager
def linear_layers_by_onednn(model: nn.Module) -> Iterator[None]:
    """Run the linear layers of a model on a CPU through oneDNN while the block lasts, those of adapters included.

    Same numbers up to rounding. A training step of a 135M model with an adapter took 0.62 of its time in float32 and
    0.51 with base weights in bfloat16, where torch's own way copies each weight for every sequence of a batch. That was
    on a processor that Intel did not make; see `products`.
    """
    layers = [
        module
        for module in model.modules()
        if type(module) is nn.Linear and "forward" not in vars(module)
        and module.weight.device.type == "cpu" and module.weight.dtype in (torch.float32, torch.bfloat16)
    ]  # fmt: skip
    for layer in layers:
        layer.forward = partial(_forward, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    if x.dtype != layer.weight.dtype or torch.is_autocast_enabled("cpu"):
        return nn.Linear.forward(layer, x)
    apply: Any = _Linear.apply  # typed in some versions of torch only
    output: Tensor = apply(x, layer.weight, layer.bias)
    return output


# (output of the forward pass, batch) -> the loss to differentiate, a mean over the labels of the batch
Loss = Callable[[Any, Any], Tensor]


# The widths of gradients that wait for others of the same input, in widths of that input.
_MOST_WAITING = 8


class Gradient(NamedTuple):
    """The gradient of a batch's summed loss at the output of one layer, for the tokens that count."""

    rows: Tensor  # [n, d_out]
    norms: Tensor  # of the rows, float32 [n]
    squares: Tensor  # sum of their squares, float32 [d_out]


@dataclass(eq=False)
class Read:
    """What layers have read in one tensor, kept until their gradients have come.

    Attributes:
        rows: [n, d_in], those that count, never float64.
        norms: Of the rows, float32 [n].
        source: The tensor.
        tokens: Which of all rows of the tensor they are, None if all.
        inputs: Groups whose rows they are.
        gradients: Of layers that read them, by name.
        n_expected: Gradients that are still to come.
    """

    rows: Tensor
    norms: Tensor
    source: weakref.ref[Tensor]
    tokens: Tokens | None
    inputs: list[str] = field(default_factory=list)
    gradients: dict[str, Gradient] = field(default_factory=dict)
    n_expected: int = 0


# Gets what was read in one tensor and the gradients of layers that read it, in one call or several.
GradientSink = Callable[[Read], None]


class GradientTap:
    """Run a forward and a backward pass and hand out what layers read, beside the gradients at their outputs.

    A context manager inside that of its `ActivationTap`. While it lasts no weight wants a gradient, so the backward
    pass computes none; afterwards that is as before, and no `.grad` was touched. What layers read is kept until the
    gradients of all that read it are there, so that its products can be made together; of more than 128 rows in
    bfloat16, and so are their products on a device that is faster with it.
    Layers under gradient checkpointing are checkpointed here, too. On a CPU linear layers run through oneDNN.

    g_t is the gradient of the *sum* of the losses of a batch's labels: of the batch's loss times their number. So a
    token's g does not depend on the batch that it came in, sums over batches are sums over tokens, and a sum of
    g_t x_t^T over all batches, divided by all labels, is the gradient of the mean loss over all of them.

    Args:
        tap: Hands out what layers read.
        targets: The layers, by name.
        forward: Runs the model on a batch, labels included.
        loss: Computes the loss from what that returns and the batch; by default it is the model's own.
        n_triplets: Singular triplets of the mean gradient to be kept of each layer.
        own_forward: `forward` may need all that is in a batch as it is, and all logits.
    """

    def __init__(
        self,
        tap: ActivationTap,
        targets: Mapping[str, Target],
        forward: Forward,
        loss: Loss | None,
        n_triplets: int,
        own_forward: bool = False,
    ) -> None:
        self.n_triplets = n_triplets
        self._tap = tap
        self._forward = forward
        self._loss = loss
        self._may_drop_mask = not own_forward and never_looks_ahead(tap.model)
        other = next((t for t in targets.values() if t.kernel or t.experts), None)
        if other is not None:
            raise LoraInitError(
                f"layer {other.name!r} is a {other.kind}: gradient statistics are for linear layers. "
                "Leave it out of the targets, or collect without gradients."
            )
        self._sink: GradientSink | None = None
        self._fresh: set[str] = set()  # groups whose first layer is about to run
        self._reads: WeakValueDictionary[tuple[int, int], Read] = WeakValueDictionary()
        self._waiting: dict[Read, None] = {}
        self._ran_now: dict[str, tuple[Read, int]] = {}
        self._arrived = False
        self._causal_loss = CausalLoss(tap.model, whole=loss is not None or own_forward or tap.has_output_embedding)
        self._stack = ExitStack()

    def __enter__(self) -> GradientTap:
        model = self._tap.model
        reshard(model)  # the parameters that want no gradient have to be those that all others are gathered from
        with self._stack as stack:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    stack.callback(parameter.requires_grad_, True)
                    parameter.requires_grad_(False)
            for name, module in self._tap.modules.items():
                stack.callback(module.register_forward_hook(partial(self._ran, name), with_kwargs=True).remove)
            embedding = getattr(model, "get_input_embeddings", lambda: None)()
            if isinstance(embedding, nn.Module):  # what a reentrant checkpoint in a `forward` of the user's needs
                stack.callback(embedding.register_forward_hook(_wanting_gradient).remove)
            stack.enter_context(linear_layers_by_onednn(model))
            stack.enter_context(_checkpointed(model))
            stack.enter_context(self._causal_loss)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def run(self, batch: Any, sink: GradientSink, wanted: Callable[[str], bool]) -> int:
        """Run one batch forward and backward.

        Args:
            batch: Mapping, tensor, sequence, or whatever `forward` takes. Not changed.
            sink: Called in the backward pass, without autocast, for what was read in one tensor when the gradients of
                all layers that read it are there. Of a layer that runs twice, both times; of one that the loss does
                not depend on, with zeros.
            wanted: Tells whether a group of inputs still needs what it reads.

        Returns:
            The number of labels.

        Raises:
            LoraInitError: There is no loss, it is not finite, or the model gives no gradients.
        """
        self._arrived = False
        with (
            self._tap.listening(batch, lambda group, x: self._fresh.add(group), wanted, whole=True) as moved,
            run_eagerly(),
            torch.enable_grad(),
        ):
            self._sink = sink
            try:
                n_labels = count_labels(self._tap.model, moved)
                self._causal_loss.start(moved)
                self._backward(self._loss_of(moved) * n_labels)
                if not self._arrived:
                    raise LoraInitError(f"the loss of {self._name} does not depend on any of the targeted layers.")
                for name, (read, width) in self._ran_now.items():  # their gradient is zero
                    none = read.norms.new_zeros(len(read.rows), width)
                    self._waits(read).gradients[name] = Gradient(none, none.sum(1), none.sum(0))
                for read in list(self._waiting):
                    self._hand_out(read)
            finally:
                self._sink = None
                self._fresh, self._ran_now, self._waiting = set(), {}, {}
        return n_labels

    @property
    def _name(self) -> str:
        return type(self._tap.model).__name__

    def _loss_of(self, batch: Any) -> Tensor:
        output = self._forward(self._tap.model, without_needless_mask(batch) if self._may_drop_mask else batch)
        loss = self._loss(output, batch) if self._loss else own_loss(output)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            if self._loss is None and isinstance(batch, Mapping) and "labels" not in batch:
                raise LoraInitError(
                    f"the batch has {', '.join(map(repr, batch))} and no 'labels', so there is no loss to "
                    "differentiate. load_batches makes labels from columns 'messages', 'prompt' and 'completion', or "
                    "'text', and from completion=. Otherwise pass loss=."
                )
            where = "loss=" if self._loss else f"{self._name}.forward"
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"{type(loss).__name__}"
            raise LoraInitError(
                f"{where} returned {got} for a loss, expected one number. "
                "Pass loss=, a function of what the model returns and the batch."
            )
        if not bool(torch.isfinite(loss.detach())):
            raise LoraInitError(f"the loss is {float(loss):g}. The model produces it; statistics were not updated.")
        if not loss.requires_grad:
            raise LoraInitError(
                f"the loss of {self._name} gives no gradient to any layer: nothing that was computed on the way keeps "
                "one. Leave torch.no_grad() and detach() out of forward= and loss=."
            )
        return loss.reshape(())

    def _backward(self, loss: Tensor) -> None:
        try:
            loss.backward()  # type: ignore[no-untyped-call]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            text = str(error).partition("\n")[0]
            if isinstance(error, LoraInitError) or "memory" in text or "allocate" in text:
                raise
            raise LoraInitError(
                f"the backward pass of {self._name} failed: {text} Some quantised layers give no gradient of their "
                "input: collect from the model in float."
            ) from error

    def _ran(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor | None:
        if self._sink is None:
            return None
        if not isinstance(output, Tensor):
            raise LoraInitError(f"layer {name!r}: output of type {type(output).__name__}, expected a tensor.")
        group = self._tap.group_of[name]
        is_first, backward = group in self._fresh, torch.is_grad_enabled()
        self._fresh.discard(group)
        if not (is_first or backward):
            return None
        read = self._read(name, input_of(name, args, kwargs))
        if is_first:
            self._waits(read).inputs.append(group)
        if not backward:  # a reentrant checkpoint, which runs it again and then wants gradients
            self._hand_out(read)
            return None
        if torch._C._current_graph_task_id() == -1:  # else a checkpoint runs it again
            self._ran_now[name] = (read, output.shape[-1])
        read.n_expected += 1
        wanting: Tensor = _wanting_gradient(module, args, output)
        wanting.register_hook(partial(self._came, name, read))  # type: ignore[no-untyped-call]
        return wanting

    def _read(self, name: str, x: Tensor) -> Read:
        """Give what to keep of a layer's input: the same for layers that read the same."""
        read = self._reads.get((id(x), x._version))
        if read is None or read.source() is not x:
            rows, tokens = x.detach().reshape(-1, x.shape[-1]), self._tap.tokens(name, x)
            rows = rows.float() if rows.dtype == torch.float64 else rows
            norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
            if tokens is not None:
                rows, norms = (part.index_select(0, tokens.counting) for part in (rows, norms))
            read = self._reads[id(x), x._version] = Read(rows, norms, weakref.ref(x), tokens)
        return read

    def _waits(self, read: Read) -> Read:
        self._waiting[read] = None
        return read

    def _came(self, name: str, read: Read, gradient: Tensor) -> None:
        if self._sink is None:
            return
        self._arrived = True
        self._ran_now.pop(name, None)
        if name in read.gradients:  # of a layer that ran twice
            self._hand_out(read)
        self._waits(read).gradients[name] = _taken(gradient.reshape(-1, gradient.shape[-1]), read.tokens)
        read.n_expected -= 1
        width = sum(waiting.rows.shape[1] for waiting in read.gradients.values())
        if read.n_expected <= 0 or width > _MOST_WAITING * read.rows.shape[1]:
            self._hand_out(read)

    def _hand_out(self, read: Read) -> None:
        del self._waiting[read]
        if self._sink is not None:
            with torch.no_grad(), Precision().off():
                self._sink(read)
        read.inputs, read.gradients = [], {}


def _taken(g: Tensor, tokens: Tokens | None) -> Gradient:
    squared = g.float().square()  # before rounding
    if tokens is None:
        return Gradient(g, squared.sum(1).sqrt_(), squared.sum(0))
    norms = squared.sum(1).sqrt_().index_select(0, tokens.counting)
    squares = squared.index_fill_(0, tokens.others, 0.0).sum(0)
    return Gradient(g.index_select(0, tokens.counting), norms, squares)


def count_labels(model: nn.Module, batch: Any) -> int:
    """Count what the loss of a batch is a mean over: its labels, else its examples.

    A causal language model predicts the label of a token from those before it, so the first of each row has no part.
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor):
        values = (
            batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else [batch]
        )
        return next((len(value) for value in values if isinstance(value, Tensor) and value.dim()), 1)
    shifted = labels.dim() == 2 and encoder_of(model) is None and may_shift_labels(model)
    count = int(((labels[:, 1:] if shifted else labels) != IGNORED).sum())
    if count == 0:
        raise LoraInitError("no token of the batch has a label, so there is no loss. Check labels and max_length.")
    return count


def own_loss(output: Any) -> Any:
    """Take the loss that a model of transformers returns; None if there is none."""
    return output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)


def _wanting_gradient(module: nn.Module, args: Any, output: Any) -> Any:
    """Let the backward pass begin here: a copy, since operations in place are forbidden on what it begins at."""
    if not isinstance(output, Tensor) or output.requires_grad or not torch.is_grad_enabled():
        return output
    return output.detach().requires_grad_().clone()


@contextmanager
def _checkpointed(model: nn.Module) -> Iterator[None]:
    """Checkpoint the layers for which transformers would in training; in evaluation mode it does not."""
    classes = sys.modules.get("transformers.modeling_layers")
    layers = [
        module
        for module in model.modules()
        if classes is not None and isinstance(module, classes.GradientCheckpointingLayer)
        and module.gradient_checkpointing and "forward" not in vars(module)
    ]  # fmt: skip
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
