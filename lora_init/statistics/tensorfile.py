"""A safetensors file with a checked JSON header: written in one piece, read tensor by tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lora_init.errors import LoraInitError, first_line
from lora_init.files import as_path, as_plain, check_place, parse_json, write_whole


def write_tensors(
    path: str | Path, kind: str, version: int, header: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Path:
    """Write tensors and a header under a temporary name, then rename: a crash leaves the old file or the new one."""
    path = Path(path).expanduser()
    digests: dict[str, str] = {}
    contiguous: dict[str, Tensor] = {}  # as safetensors wants them
    for name, tensor in tensors.items():
        digests[name] = _digest(tensor)
        contiguous[name] = tensor.contiguous()
    text = json.dumps(as_plain({**header, "digests": digests}))
    # The header has the digests of the tensors, and its own digest stands beside it: together they cover the file.
    metadata = {"format": kind, "version": str(version), "header": text, "sha256": _sha256(text.encode())}
    check_place(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, save(contiguous, metadata))
    return path


class TensorFile:
    """A file from `write_tensors`, opened; its header is checked now, each tensor when it is read.

    The file stays mapped: another file renamed over it does not reach this object.
    """

    def __init__(self, path: str | Path, kind: str, version: int) -> None:
        self.path = as_path(path, f"a {kind} file")
        if not self.path.is_file():
            raise LoraInitError(f"{self.path} is not a file. Give the path of a {kind} file.")
        try:
            opened: Any = safe_open(self.path, framework="pt")  # reads the header alone, and maps the tensors
            self._file = opened
            metadata = self._file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise LoraInitError(f"{self.path} is not a whole safetensors file ({error}). Make it again.") from error
        form, its = metadata.get("format"), metadata.get("version")
        if form != kind:
            raise LoraInitError(f"{self.path} is of format {form!r}, expected {kind!r}. Give another file.")
        if its != str(version):
            raise LoraInitError(
                f"{self.path} has version {its!r} of its format, this lora_init reads {version}. Update lora_init, or "
                "make the file again."
            )
        text = metadata.get("header", "")
        with self.checking("its header"):
            # The digest first: what is parsed is what was written.
            if _sha256(text.encode()) != metadata.get("sha256"):
                raise self.changed("its header")
            self.header: dict[str, Any] = parse_json(text)
            self._digests = dict(self.header["digests"])

    def tensor(self, name: str) -> Tensor:
        """Read one tensor."""
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except SafetensorError as error:
            raise self.changed(f"tensor {name!r}") from error
        if _digest(tensor) != self._digests.get(name):
            raise self.changed(f"tensor {name!r}")
        return tensor

    @contextmanager
    def checking(self, what: str) -> Iterator[None]:
        """Turn errors of reading a file in another form into one line."""
        try:
            yield
        except LoraInitError:  # a ValueError, too, and in one line already
            raise
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
            raise self.changed(f"{what} ({first_line(error)})") from error

    def changed(self, what: str) -> LoraInitError:
        """Make the error for a file that isn't what was written."""
        return LoraInitError(f"{self.path}: {what} is not what was written. The file was changed; make it again.")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _digest(tensor: Tensor) -> str:
    # Type and shape, too: the same bytes may stand for other numbers. As bytes, since numpy has no bfloat16.
    described = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    return _sha256(described + tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
