"""The README of an adapter before training, and the record in its directory."""

from __future__ import annotations

import statistics
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

import torch

from lora_init.adapters.directory import card_header, hub_id, start_digest
from lora_init.adapters.init_config import Shape

if TYPE_CHECKING:
    from lora_init.adapters.adapter_init import AdapterInit

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
    frozen = "; A stays as it is in training, see README.md" if init.freeze_a else ""
    if init.corrects_base:
        return (
            "B is not zero: the base weights must give up what the adapter adds, and what was trained is converted "
            f"while it is saved (path_initial_model_for_weight_conversion){frozen}"
        )
    if init.start.needs_error:
        share = init.share_closed
        closed = "" if share is None else f", {share:.0%} of the way to the loss before it was quantized"
        measured = "" if init.losses is None else f" (loss {init.losses[0]:.4g} -> {init.losses[1]:.4g}{closed})"
        return f"B A gives the quantized base back what rounding took from its weights{measured}{frozen}"
    if init.changes_output:
        words = "B is not zero, and the model's output is another one"
        measured = "" if init.losses is None else ", loss {:.4g} -> {:.4g} before any training".format(*init.losses)
        size = "" if init.gamma is None else f" (gamma {init.gamma:g}{measured})"
        return f"{words}{size}{frozen}"
    return f"B is zero, so the adapter changes nothing until it is trained{frozen}"


def correction_of(init: AdapterInit) -> dict[str, Any]:
    """Return plain values about a correction: the losses, the share of the gap that it closes, and the errors."""
    before, after = init.losses or (None, None)
    return {
        "losses": {"float": init.exact_loss, "quantised": before, "corrected": after},
        "share_closed": init.share_closed,
        "errors": {name: list(pair) for name, pair in init.errors.items()},
    }


def origin_of(init: AdapterInit, short: bool = False) -> dict[str, Any]:
    """Lay out as plain values where the adapter comes from; in short without what each layer would add."""
    provenance = asdict(init.provenance)
    # PEFT doubles the rank when it converts a start that changed the base.
    origin = {one.name: getattr(init, one.name) for one in fields(Shape) if one.name not in Shape.of_peft}
    origin |= {"method": init.method, "seed": init.seed, "rank": init.rank}
    origin["recommended"] = init.recommended
    if init.learning_rate is not None:
        origin["learning_rate"] = init.learning_rate
    if init.rate and not short:
        origin["rate"] = init.rate.stored()
    if init.corrects_base or init.start.needs_error:
        kind = getattr(torch, init.dtype)
        origin["start"] = start_digest({name: own.to(kind) for name, own in init.weights.items()})
    if init.errors:
        origin["error_size"] = init.error_size
    if init.start.package:  # which need not be installed where the adapter is trained or exported
        origin |= {"package": init.start.package, "corrects_base": init.corrects_base}
    if short:
        kept = {key: value for key, value in provenance.items() if key not in ("notes", "seconds", "versions")}
        return origin | {"provenance": kept}
    return origin | _layers_of(init) | {"provenance": provenance}


def _layers_of(init: AdapterInit) -> dict[str, Any]:
    """Lay out what the record has for each layer."""
    layers = {
        "left_out": list(init.left_out),
        "unsupported": dict(init.unsupported),
        "explained": {name: round(share, 4) for name, share in init.explained.items()},
    }
    return layers | ({"correction": correction_of(init)} if init.errors else {})


def card_of(init: AdapterInit, directory: str) -> str:
    """Write the README of the directory."""
    origin, ranks = init.provenance, init.ranks.values()
    base_model = origin.model_id or "BASE_MODEL"
    classes = [str(name) for name in origin.settings.get("classes", ())]
    base = hub_id(origin.model_id) or origin.model_class
    corrected = "import lora_init\n\nlora_init.correct_base(base_model, directory)\n" if init.corrects_base else ""
    head = _HEAD.format(base=base_model, labels=dict(enumerate(classes))) if classes else ""
    if origin.quantisation is not None and not head:
        head = _QUANTIZED.format(model_class=origin.model_class, base=base_model, how=origin.quantisation)
    return f"""{card_header(origin.model_id, origin.task_type)}
# A LoRA adapter before training

Made by lora_init for {base}: method `{init.method}`, {len(ranks)} layers, rank {min(ranks)} to \
{max(ranks)} (average {statistics.fmean(ranks):.3g}), {init.n_parameters():,} trainable parameters. \
{start_in_words(init)}:

```python
from peft import PeftModel
{head}
directory = {directory!r}  # where this file is
{corrected}model = PeftModel.from_pretrained(base_model, directory, is_trainable=True)
{_FREEZE if init.freeze_a else ""}```

{init.how_to_train}
"""
