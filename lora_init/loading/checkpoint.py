"""The tensors of a safetensors checkpoint: where each is, and one read at a time under the name that a model has it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_init.errors import LoraInitError
from lora_init.files import read_json

INDEX_FILE = "model.safetensors.index.json"  # in which file each tensor is, if there are several files


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint: its file, its name there, its shape."""

    file: Path
    name: str
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        """Read it."""
        with safe_open(self.file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(self.name)
        return tensor


def find_tensors(source: str) -> dict[str, Stored]:
    """Find all tensors of a checkpoint of float weights, file by file; none is read."""
    directory = Path(source).expanduser()
    if not directory.is_dir():
        from huggingface_hub import snapshot_download

        directory = Path(snapshot_download(source, ignore_patterns=["*.bin", "*.pth", "*.gguf", "*.h5", "*/*"]))
    if "quantization_config" in read_json(directory / "config.json"):
        raise LoraInitError(f"{source!r} is quantized: its files hold no float weights. Name the model it was made of.")
    tensors: dict[str, Stored] = {}
    for file in _files_of(directory):
        path = directory / file
        if not path.is_file():
            raise LoraInitError(f"{source!r} has no {file}. Only whole safetensors checkpoints are read.")
        for name, (shape, _) in read_header(path).items():
            tensors[name] = Stored(path, name, tuple(shape))
    return tensors


def checkpoint_of(source: str, revision: Any = None) -> tuple[Path | None, dict[str, Stored]]:
    """Find the directory of a base, also in the hub's cache, and its tensors; none if quantized or not safetensors."""
    folder = _directory_of(source, revision)
    if folder is None:
        return None, {}
    weights = folder / INDEX_FILE, folder / "model.safetensors"
    # A link that leads nowhere counts as a file here, so that reading it says what is wrong.
    if not any(path.is_file() or path.is_symlink() for path in weights):
        return folder, {}
    if '"quantization_config"' in (folder / "config.json").read_text(encoding="utf-8"):
        return folder, {}
    return folder, find_tensors(str(folder))


def _directory_of(source: str, revision: Any) -> Path | None:
    """Find the directory of a base, also in the hub's cache; nothing is downloaded."""
    from huggingface_hub import try_to_load_from_cache

    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    cached: Any = None
    with suppress(ValueError):  # no name that the hub could have
        cached = try_to_load_from_cache(source, "config.json", revision=str(revision) if revision else None)
    if not isinstance(cached, str):  # not cached, or known not to exist, for which the hub has an object
        return None
    return Path(cached).parent


def _files_of(directory: Path) -> list[str]:
    """Name the files of a checkpoint: what its index names, or the one file without an index."""
    index = directory / INDEX_FILE
    if not index.is_file():
        return ["model.safetensors"]
    names = read_json(index).get("weight_map")
    files = sorted(set(map(str, names.values()))) if isinstance(names, dict) else []
    # An index is somebody else's file: a name such as ../x must not lead out of the directory.
    if not files or any(Path(file).name != file for file in files):
        raise LoraInitError(f"{index} names no files of this directory. The file is damaged.")
    return files


def read_header(path: Path) -> dict[str, tuple[list[int], str]]:
    """Read the names of the tensors in a safetensors file, with the shape and the type of each, such as `"BF16"`."""
    try:
        header = {}
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - no mapping
                tensor = file.get_slice(key)  # it knows the header, and reads no weights
                header[key] = list(tensor.get_shape()), tensor.get_dtype()
        return header
    except SafetensorError as error:
        with path.open("rb") as opened:
            is_pointer = opened.read(12) == b"version http"
        reason = f"damaged: {error}"
        if is_pointer:
            reason = "a pointer of Git LFS and not the file: run git lfs pull"
        raise LoraInitError(f"{path} is {reason}.") from error


def find_parameter(
    tensors: Mapping[str, Stored], model: Any, name: str, shape: tuple[int, ...]
) -> dict[Stored, Tensor | None]:
    """Find what of a checkpoint a parameter of a model is read from; empty if it has none of it.

    That is a tensor of the same shape or transposed; or several that hold the parameter, each with the places of its
    entries in the flat parameter.
    """
    # As the model, with or without its prefix, or as what it is tied to.
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    tied = getattr(model, "all_tied_weights_keys", {})
    names = (name, prefix + name, name.removeprefix(prefix), tied.get(name, name))
    stored = next((tensors[key] for key in names if key in tensors), None)
    if stored is not None and stored.shape in (shape, shape[::-1]):
        return {stored: None}
    # The numbers of the entries go through the conversion in place of the weights: split, permuted, under other names.
    # Where each number ends is where the weight there comes from, whatever the conversion does.
    try:
        pieces = as_saved(model, name, torch.arange(shape[0] * shape[1]).reshape(shape))
    except (AttributeError, KeyError, ValueError, RuntimeError, NotImplementedError):
        return {}
    parts: dict[Stored, Tensor | None] = {}
    for piece, places in pieces.items():
        # A checkpoint that was saved in another way has another layout, which would be read wrongly.
        if piece not in tensors or tensors[piece].shape != tuple(places.shape):
            return {}
        parts[tensors[piece]] = places
    return parts


def read_parameter(stored: Mapping[Stored, Tensor | None], shape: tuple[int, ...]) -> Tensor:
    """Read what `find_parameter` returned, float32: of this shape, or as it is stored if that is one tensor."""
    first, places = next(iter(stored.items()))
    if places is None:
        return first.read().float()
    weight = torch.empty(shape)
    for tensor, at in stored.items():
        assert at is not None  # several tensors all have places
        weight.view(-1)[at.reshape(-1)] = tensor.read().float().reshape(-1)
    return weight


def as_saved(model: Any, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Bring a tensor of a parameter's form, or a sum of such, into the form of checkpoints: one tensor or several."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4 saves parameters as they are
        return {name: tensor}
    pieces: dict[str, Tensor] = revert_weight_conversion(model, {name: tensor})
    return pieces
