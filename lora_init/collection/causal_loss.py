"""The loss of a causal language model at less of the work that its vocabulary makes."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from lora_init.layers.masks import IGNORED

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
