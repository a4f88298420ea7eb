"""The files of a LoRA adapter directory: their names, and how to read them without loading weights."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lora_init.errors import LoraInitError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
ORIGIN_FILE = "lora_init.json"
PREFIX, LORA_A, LORA_B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


def read_config(directory: Path) -> dict[str, Any]:
    """Read the configuration of an adapter directory.

    Raises:
        LoraInitError: There is none, it is damaged, or the adapter is not LoRA.
    """
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise LoraInitError(
            f"{directory} has no {CONFIG_FILE}, so it is not an adapter directory. PEFT's save_pretrained() writes one."
        )
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise LoraInitError(f"{directory} holds an adapter of type {config.get('peft_type')}; only LORA is read.")
    return config


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        LoraInitError: The file is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LoraInitError(f"{path} is not JSON: {error}. The file is damaged.") from error
    if not isinstance(content, dict):
        raise LoraInitError(f"{path}: expected a JSON object. The file is damaged.")
    return content


def read_shapes(directory: Path) -> dict[str, list[int]]:
    """Read names and shapes of an adapter's tensors.

    Raises:
        LoraInitError: There is no safetensors file, or it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    path = directory / WEIGHTS_FILE
    if not path.is_file():
        raise LoraInitError(f"{directory} has no {WEIGHTS_FILE}. Only adapters in safetensors files are read.")
    try:
        with safe_open(path, framework="numpy") as file:
            return {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise LoraInitError(f"{path} is damaged: {error}.") from error


def adapted_layers(shapes: Iterable[str]) -> list[str]:
    """List the layers that have an A among these tensors, by their names in the plain model."""
    return [key.removeprefix(PREFIX).removesuffix(LORA_A) for key in shapes if key.endswith(LORA_A)]
