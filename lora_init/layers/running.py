"""How a model is run on a batch: in evaluation mode, on the device of its weights, called with what it takes."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_init.errors import LoraInitError
from lora_init.layers.masks import encoder_of, shifts_labels
from lora_init.layers.wrappers import unwrapped

Forward = Callable[[nn.Module, Any], Any]
# On some processors a 4-bit layer of bitsandbytes packs its weight for inference in the first pass in evaluation mode,
# for good (seen with 0.50). No gradient flows through it any more, so what is trained afterwards is trained wrongly.
_PACKS = "support_avx512bf16_for_cpu"


@contextmanager
def restoring(attribute: str, holders: Iterable[Any]) -> Iterator[None]:
    """Restore an attribute of several objects after the block, whatever raises; a hidden method is uncovered."""
    with ExitStack() as stack:
        for holder in holders:
            # A method stands in the class, not in the object: what hides it there is removed.
            if attribute in vars(holder) or not callable(getattr(type(holder), attribute, None)):
                stack.callback(setattr, holder, attribute, getattr(holder, attribute))
            else:
                stack.callback(vars(holder).pop, attribute, None)
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and each of its modules into its own mode afterwards."""
    packing = [module for module in model.modules() if hasattr(module, _PACKS)]
    # Each module has a mode of its own: in a model that trains, a frozen batch norm may be in evaluation mode.
    with restoring("training", model.modules()), restoring(_PACKS, packing):
        model.eval()
        for module in packing:
            setattr(module, _PACKS, False)
        yield


@contextmanager
def disabled(peft_model: Any) -> Iterator[None]:
    """Switch the adapter of a PeftModel off while the block runs; PEFT then lets all of it train, also a frozen A."""
    # PEFT would take a merged adapter out of the weights, with the scaling of that moment, and not put it back.
    if any(getattr(module, "merged", False) is True for module in peft_model.modules()):
        raise LoraInitError("the adapter is merged into the base and cannot be left out. Call unmerge_adapter() first.")
    with restoring("requires_grad", peft_model.parameters()), peft_model.disable_adapter():
        yield


def on_device_of(model: nn.Module, batch: Any) -> Any:
    """Move the tensors of a batch to where a model has its weights; the caller's containers stay as they are."""
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), None)
    if device is None:  # all weights are offloaded, and accelerate's hooks move the inputs
        return batch
    if isinstance(batch, Mapping):
        batch = copy.copy(batch)  # a BatchEncoding is moved in place
    return send_to_device(batch, device)


def check_batches(batches: Any, taker: str) -> None:
    """Refuse texts, a single batch and what is no iterable, as an argument of the function `taker`."""
    first = None
    if isinstance(batches, (list, tuple)) and batches:
        first = batches[0]
    if isinstance(first, str):
        got = "texts"
    elif (
        isinstance(first, (int, float))  # the values of one batch
        or isinstance(batches, (str, Path, Mapping, Tensor, nn.Module))
        or hasattr(batches, "columns")  # a table of pandas
        or not isinstance(batches, Iterable)
    ):
        got = f"a {type(batches).__name__}"
    else:
        got = ""
    if got:
        raise LoraInitError(
            f"{taker} got {got} for the batches, expected an iterable of batches. Make them of texts and files with "
            "load_batches, or give initialize() a tokenizer, too; put one batch into a list."
        )


@contextmanager
def naming_strange_tokens(where: str = "") -> Iterator[None]:
    """Say what torch's error about an index means of a batch, called `where` unless the caller names it."""
    try:
        yield
    except IndexError as error:
        named = LoraInitError(
            f"{str(error).rstrip('.')}. Has it a token or a label that is not in the model's vocabulary?"
        )
        raise named.within(where) from error


def call_model(model: nn.Module, batch: Any, with_labels: bool = False) -> Any:
    """Run a model on a batch: a mapping goes in as keywords, a sequence as positions.

    `labels`, from which a model of transformers computes its loss, are left out unless `with_labels`.
    """
    if isinstance(batch, Mapping):
        parameters = inspect.signature(model.forward).parameters
        inputs = _keywords(model, batch, parameters, with_labels)
        _check_keywords(model, inputs, parameters)
        plain, ids, labels = unwrapped(model), inputs.get("input_ids"), inputs.get("labels")
        # A class of one's own may take other labels, so these are looked at only where it raises.
        is_known = type(plain).__module__.startswith("transformers.") and "logits_to_keep" not in inputs
        if is_known and shifts_labels(plain):
            check_labels(ids, labels)
        try:
            return model(**inputs)
        except (RuntimeError, ValueError):
            if shifts_labels(plain):
                check_labels(ids, labels)
            raise
    if batch is None or isinstance(batch, (str, int, float)):
        raise _no_input(model)
    if isinstance(batch, Sequence):
        first = batch[0] if batch and isinstance(model, PreTrainedModel) else None
        if isinstance(first, Mapping):
            raise LoraInitError("a batch is a list of batches. Pass all of them in one list.")
        if isinstance(first, (list, tuple)):
            raise LoraInitError("a batch has lists, expected tensors: return_tensors='pt'.")
        return model(*batch)
    return model(batch)


def _no_input(model: nn.Module) -> LoraInitError:
    return LoraInitError(f"the batch holds no input of {type(model).__name__}. Check its columns, or the collator.")


def _keywords(
    model: nn.Module, batch: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter], with_labels: bool
) -> dict[str, Any]:
    """Return what a model takes of a batch: no labels where they would only add the cost of a loss, and no cache."""
    inputs = dict(batch)
    # Without inputs of its own, the decoder of an encoder-decoder reads the labels, shifted by one.
    has_decoder_inputs = "decoder_input_ids" in inputs or "decoder_inputs_embeds" in inputs
    decoder_reads_labels = encoder_of(model) is not None and not has_decoder_inputs
    # Only a model that is not of transformers knows what its labels are for.
    own_labels = "labels" in parameters and not isinstance(model, PreTrainedModel)
    if not (with_labels or decoder_reads_labels or own_labels):
        inputs.pop("labels", None)
    if not inputs:
        raise _no_input(model)
    if "use_cache" in parameters:
        inputs.setdefault("use_cache", False)  # a batch that asks for one gets it
    return inputs


def _check_keywords(model: nn.Module, inputs: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter]) -> None:
    """Refuse what a model's forward does not take, and tokens that are no tensor of whole numbers."""
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    unknown = [repr(key) for key in inputs if key not in parameters]
    if unknown and not takes_any:
        raise LoraInitError(
            f"the batch has {', '.join(unknown)}, which {type(model).__name__}.forward does not take. Leave them "
            "out, or pass forward=."
        )
    for key in ("input_ids", "attention_mask", "labels"):
        if isinstance(inputs.get(key), list):
            raise LoraInitError(f"the batch has a list of {key!r}, expected a tensor: return_tensors='pt'.")
    ids = inputs.get("input_ids")
    is_index = isinstance(ids, Tensor) and ids.dtype in (torch.int64, torch.int32)
    if ids is not None and not (is_index and ids.dim() > 1 and ids.numel()):
        got = type(ids).__name__
        if isinstance(ids, Tensor):
            got = f"{ids.dtype} {list(ids.shape)}"
        raise LoraInitError(f"input_ids of the batch are {got}, expected whole numbers [batch, length] in int64.")


def check_labels(ids: Any, labels: Any) -> None:
    """Refuse labels of a causal language model that its loss does not take, or that are not one for each token."""
    if not (isinstance(ids, Tensor) and isinstance(labels, Tensor)):
        return
    if labels.shape != ids.shape or labels.dtype != torch.int64:
        got = f"{labels.dtype} {list(labels.shape)}"
        raise LoraInitError(f"labels of the batch are {got}, expected {list(ids.shape)} as input_ids, in int64.")
