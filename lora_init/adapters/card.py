"""The README of an adapter before training, and the record in its directory.

The README is for a person who gets the directory and wants to train it: what it is, and the code that loads it. The
record is for this package: what it needs later to recognize the start, to convert it and to say a learning rate.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

import torch

from lora_init.adapters.directory import card_header, hub_id, start_digest
from lora_init.adapters.init_config import Shape
from lora_init.files import as_plain

if TYPE_CHECKING:
    from lora_init.adapters.adapter_init import AdapterInit
    from lora_init.statistics.statistics import Provenance

_FREEZE = """# A is meant to stay as it is. PEFT has no setting for that, so say it before the trainer is made:
for name, parameter in model.named_parameters():
    parameter.requires_grad &= ".lora_A." not in name
"""
_HEAD = """from transformers import AutoModelForSequenceClassification

# The adapter holds the head, whose outputs are these classes. Llama and its like also need a pad_token_id.
labels = {labels}
base_model = AutoModelForSequenceClassification.from_pretrained({base!r}, id2label=labels)
"""
_QUANTIZED = """from transformers import {model_class}

# The adapter was made for the base quantized like this; whatever trains or serves it must quantize it the same way.
quantization = {how}
base_model = {model_class}.from_pretrained({base!r}, quantization_config=quantization)
"""


def start_in_words(init: AdapterInit) -> str:
    """Describe what the untrained adapter does to the model, and which of its parts are trained."""
    frozen = ""
    if init.freeze_a:
        frozen = "; A stays as it is in training, see README.md"
    if init.corrects_base:
        return (
            "B is not zero: the base weights must give up what the adapter adds, and what was trained is converted "
            f"while it is saved (path_initial_model_for_weight_conversion){frozen}"
        )
    if init.start.needs_error:
        return f"B A gives the quantized base back what rounding took from its weights{_gain_of(init)}{frozen}"
    if init.changes_output:
        return f"B is not zero, and the model's output is another one{_size_of(init)}{frozen}"
    return f"B is zero, so the adapter changes nothing until it is trained{frozen}"


def _gain_of(init: AdapterInit) -> str:
    """Describe in parentheses what a correction did to the loss; empty if that was not measured."""
    if init.losses is None:
        return ""
    before, after = init.losses
    closed = ""
    if init.share_closed is not None:
        closed = f", {init.share_closed:.0%} of the way to the loss before it was quantized"
    return f" (loss {before:.4g} -> {after:.4g}{closed})"


def _size_of(init: AdapterInit) -> str:
    """Describe in parentheses the size of a first step and what it did to the loss; empty for a step without gamma."""
    if init.gamma is None:
        return ""
    measured = ""
    if init.losses is not None:
        before, after = init.losses
        measured = f", loss {before:.4g} -> {after:.4g} before any training"
    return f" (gamma {init.gamma:g}{measured})"


def correction_of(init: AdapterInit) -> dict[str, Any]:
    """Return plain values about a correction: the losses, the share of the gap that it closes, and the errors."""
    before, after = init.losses or (None, None)
    return {
        # A key of records and printed results, which therefore keeps its British spelling.
        "losses": {"float": init.exact_loss, "quantised": before, "corrected": after},
        "share_closed": init.share_closed,
        "errors": {name: list(pair) for name, pair in init.errors.items()},
    }


def origin_of(init: AdapterInit, short: bool = False) -> dict[str, Any]:
    """Lay out as plain values where the adapter comes from; in short without what each layer would add.

    The whole record is a file of the directory, which PEFT does not copy. The short one travels in a field of the
    LoraConfig, see `directory.carrying`, and so survives training.
    """
    provenance = asdict(init.provenance)
    origin: dict[str, Any] = {}
    for option in fields(Shape):
        if option.name not in Shape.of_peft:  # the LoraConfig has those
            origin[option.name] = getattr(init, option.name)
    # The rank is in the LoraConfig as well. But PEFT doubles it there when it converts a start that changed the base,
    # and readers of the record see by the difference that this was done.
    origin |= {"method": init.method, "seed": init.seed, "rank": init.rank}
    origin["recommended"] = init.recommended
    if init.learning_rate is not None:
        origin["learning_rate"] = init.learning_rate
    if init.rate and not short:
        origin["rate"] = init.rate.stored()
    if init.corrects_base or init.start.needs_error:  # by the hash `export` recognizes the start that it needs
        dtype = getattr(torch, init.dtype)  # as the file has it
        origin["start"] = start_digest({name: own.to(dtype) for name, own in init.weights.items()})
    if init.errors:
        origin["error_size"] = init.error_size
    if init.start.package:  # which need not be installed where the adapter is trained or exported
        origin |= {"package": init.start.package, "corrects_base": init.corrects_base}
    if short:
        for key in ("notes", "seconds", "versions"):
            provenance.pop(key, None)
    else:
        origin |= _layers_of(init)
    record: dict[str, Any] = as_plain(origin | {"provenance": provenance})
    return record


def _layers_of(init: AdapterInit) -> dict[str, Any]:
    """Lay out what the record has for each layer."""
    layers: dict[str, Any] = {
        "left_out": list(init.left_out),
        "unsupported": dict(init.unsupported),
        "explained": {name: round(share, 4) for name, share in init.explained.items()},
    }
    if init.errors:
        layers["correction"] = correction_of(init)
    return layers


def card_of(init: AdapterInit, directory: str) -> str:
    """Write the README of the directory."""
    origin, ranks = init.provenance, init.ranks.values()
    base_model = origin.model_id or "BASE_MODEL"  # in code; a path of the machine may stand there
    base = hub_id(origin.model_id) or origin.model_class  # in prose
    freeze = corrected = ""
    if init.corrects_base:
        corrected = "import lora_init\n\nlora_init.correct_base(base_model, directory)\n"
    if init.freeze_a:
        freeze = _FREEZE
    return f"""{card_header(origin.model_id, origin.task_type)}
# A LoRA adapter before training

Made by lora_init for {base}: method `{init.method}`, {len(ranks)} layers, rank {min(ranks)} to \
{max(ranks)} (average {statistics.fmean(ranks):.3g}), {init.n_parameters():,} trainable parameters. \
{start_in_words(init)}:

```python
from peft import PeftModel
{_loading_of(origin, base_model)}
directory = {directory!r}  # where this file is
{corrected}model = PeftModel.from_pretrained(base_model, directory, is_trainable=True)
{freeze}```

{init.how_to_train}
"""


def _loading_of(origin: Provenance, base_model: str) -> str:
    """Write the code that loads a base which is more than its weights: one with classes, or one that is quantized."""
    classes = [str(name) for name in origin.settings.get("classes", ())]
    if classes:
        return _HEAD.format(base=base_model, labels=dict(enumerate(classes)))
    if origin.quantisation is not None:
        return _QUANTIZED.format(model_class=origin.model_class, base=base_model, how=origin.quantisation)
    return ""
