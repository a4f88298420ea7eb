"""From an adapter directory to a model that carries that adapter."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from lora_init.adapters.adapter_files import read_config, read_shapes
from lora_init.adapters.peft_model import match_modes
from lora_init.errors import LoraInitError, first_line

if TYPE_CHECKING:
    from peft import PeftModel


def load_adapter(model: nn.Module, directory: str | Path, trainable: bool) -> PeftModel:
    """Put an adapter directory on a model, and make sure that all of it found its place.

    PEFT itself only warns of weights that are not in the file, and says nothing of weights that are there for nothing.
    If this fails, the model may be half wrapped: `attach.remember` puts it back.

    Args:
        model: The plain model. Wrapped in place.
        directory: What PEFT's or our `save_pretrained` wrote.
        trainable: Load it to be trained.

    Raises:
        LoraInitError: No such directory, no LoRA adapter in it, damaged, or for another model.
    """
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict

    path = Path(directory).expanduser()
    if not path.is_dir():
        raise LoraInitError(f"{path}: no such adapter directory.")
    read_config(path)
    in_file = {key for key in read_shapes(path) if ".lora_A" in key or ".lora_B" in key}
    try:
        with warnings.catch_warnings():
            # What matters of it is checked below; the rest is about magnitudes and heads that PEFT fills in.
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            peft_model = PeftModel.from_pretrained(model, str(path), is_trainable=trainable)
    except (ValueError, TypeError, RuntimeError, KeyError, OSError) as error:
        raise LoraInitError(
            f"{path} cannot be put on {type(model).__name__}: {first_line(error)} Name the model it was made for."
        ) from error
    state = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    on_model = {key for key in state if ".lora_A" in key or ".lora_B" in key}
    if in_file != on_model:
        differing = sorted(in_file ^ on_model)
        raise LoraInitError(
            f"{path} does not fit {type(model).__name__}: {len(differing)} tensors are only "
            f"{'in the file' if differing[0] in in_file else 'on the model'}, the first is {differing[0]!r}. "
            "Name the model it was made for."
        )
    match_modes(peft_model)
    return peft_model
