"""A start of the user's own: an adapter directory, or a function that puts an adapter on a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import nn

from lora_init.adapters.adapter_loading import load_adapter
from lora_init.adapters.peft_model import match_modes
from lora_init.errors import LoraInitError, first_line

if TYPE_CHECKING:
    from peft import PeftModel

StartFunction: TypeAlias = "Callable[[nn.Module, int], PeftModel]"
OwnStart: TypeAlias = "tuple[str, str | Path | StartFunction]"


def apply_own_start(name: str, source: Any, model: nn.Module, seed: int) -> PeftModel:
    """Put the user's adapter on the model.

    Args:
        name: What he calls it.
        source: An adapter directory, the same for every seed; or a function of the plain model and the seed that
            returns the PeftModel around that model. It may change the weights.
        model: The plain model.
        seed: Passed on to the function.

    Raises:
        LoraInitError: As `load_adapter`; or the function failed or returned something else.
    """
    if isinstance(source, (str, Path)):
        try:
            return load_adapter(model, source, trainable=True)
        except LoraInitError as error:
            raise LoraInitError(f"start {name!r}: {error}") from error
    if not callable(source):
        raise LoraInitError(
            f"start {name!r} is a {type(source).__name__}. Give an adapter directory, or a function of model and seed."
        )
    from peft import PeftModel

    try:
        peft_model = source(model, seed)
    except LoraInitError:
        raise
    except Exception as error:  # whatever a user's code raises
        raise LoraInitError(
            f"start {name!r}: its function raised {type(error).__name__}: {first_line(error)}"
        ) from error
    if not isinstance(peft_model, PeftModel) or peft_model.get_base_model() is not model:
        raise LoraInitError(
            f"start {name!r}: its function returned {type(peft_model).__name__}, expected a PeftModel around the model "
            "that it was given."
        )
    match_modes(peft_model)
    return peft_model
