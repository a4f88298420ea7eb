"""Which tokens of a batch the drop-ins for PEFT's EVA count by default, in the two steps that PEFT's interface has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# (inputs of a layer, what prepare_model_inputs_fn returned, name of the layer) -> rows [n, d_in]
LayerInputs = Callable[[Any, Any, str], Tensor]


def forward_fn_dict(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Call the model with the items of a batch as keyword arguments."""
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Mapping[str, Any], peft_config: Any) -> Tensor:
    """Find the tokens that count: not padding and, with `use_label_mask`, with a label.

    Args:
        model_input: A batch with `input_ids`, perhaps `attention_mask` and `labels`; a dict or any other mapping.
        peft_config: PEFT's LoraConfig, whose `eva_config` says whether and which labels mask.

    Returns:
        Batch and token index of each, int64 [n, 2].
    """
    if not isinstance(model_input, Mapping):
        raise TypeError(
            f"prepare_model_inputs_fn_language_modeling takes a mapping, not a {type(model_input).__name__}; "
            "pass a prepare_model_inputs_fn of your own, or None"
        )
    mask = model_input.get("attention_mask")
    mask = (torch.ones_like(model_input["input_ids"]) if mask is None else mask).bool()
    labels = model_input.get("labels")
    if labels is not None and peft_config.eva_config.use_label_mask:
        mask = mask & (labels != peft_config.eva_config.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Tensor, layer_name: str) -> Tensor:
    """Pick the rows of the tokens that count from a layer's input.

    Args:
        layer_input: Tensor [batch, tokens, d_in], or a tuple that starts with it. An input without a token dimension (a
            pooler's, an expert's) counts whole.
        model_input: What `prepare_model_inputs_fn_language_modeling` returned.
        layer_name: For the error message.

    Returns:
        Rows [n, d_in].
    """
    x = first_tensor(layer_input, layer_name)
    return x[model_input[:, 0], model_input[:, 1]] if x.dim() == 3 else x.reshape(-1, x.shape[-1])


def first_tensor(layer_input: Any, layer_name: str) -> Tensor:
    """Return the tensor, or the first element of a tuple or list of inputs.

    Raises:
        TypeError: It is neither.
    """
    x = layer_input[0] if isinstance(layer_input, (tuple, list)) and layer_input else layer_input
    if not isinstance(x, Tensor):
        raise TypeError(
            f"unsupported input type {type(layer_input)} for prepare_layer_inputs_fn in layer {layer_name}, "
            "please provide a custom prepare_layer_inputs_fn"
        )
    return x
