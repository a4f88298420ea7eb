"""An adapter directory: what it holds, whether it can be read, and how it is written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_init.errors import LoraInitError, is_number
from lora_init.files import as_path, check_free, digests_of, is_as_written, new_directory, read_json, write_json
from lora_init.layers.targets import HEADS, PREFIX, is_in
from lora_init.loading.checkpoint import read_header
from lora_init.planning.lora_config import from_patterns
from lora_init.starts.starts import changes_base
from lora_init.starts.weights import Weights

CONFIG_FILE = "adapter_config.json"  # as PEFT names it
WEIGHTS_FILE = "adapter_model.safetensors"  # likewise
ORIGIN_FILE = "lora_init.json"  # the record: where an adapter before training comes from
CARD_FILE = "README.md"  # which the hub shows
ORIGIN = "lora_init"  # key in a field of the config, see `carrying`
# How the names of tensors end in PEFT's files, for linear layers and for embeddings.
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
_PAIRS = ((LORA_A, LORA_B), (".lora_embedding_A", ".lora_embedding_B"))
# A directory with this marker may be overwritten, if it holds nothing beside these files.
_OURS: dict[str, Any] = {"marker": ORIGIN_FILE, "replaceable": (WEIGHTS_FILE, CONFIG_FILE, ORIGIN_FILE, CARD_FILE)}


def _has_zeros(a: Tensor | None, b: Tensor) -> bool:
    return not b.any() or (a is not None and not a.any())


def is_zero_update(a: Tensor | None, b: Tensor) -> bool:
    """Check whether B A is zero, to its rounding: in PEFT's "orthogonal" neither is. `a` may be unknown.

    Numbers of 16 bits may be saved in 32.
    """
    if _has_zeros(a, b):
        return True
    if a is None or a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        return False
    # |B A|^2 in the Frobenius norm is <A A^T, B^T B>, and |A|^2 |B|^2 the most that it can be. Both follow from
    # matrices of r x r; B A itself would be as large as the weight of the layer.
    gram_a, gram_b = a.double() @ a.double().T, b.double().T @ b.double()
    norm, largest = (gram_a * gram_b).sum(), gram_a.trace() * gram_b.trace()
    tolerance = 1e-6
    # A that loses nothing in 16 bits was made in 16 bits, whatever the type of the file, and rounded more.
    if any(a.equal(a.to(short).to(a.dtype)) for short in (torch.bfloat16, torch.float16)):
        tolerance = 3e-3
    return bool(norm <= largest * tolerance**2)  # `norm` and `largest` are squares


def _check_numbers(config: Mapping[str, Any], file: Path) -> None:
    """Refuse a config with a rank that is none, or with patterns that map to no numbers."""
    rank = config.get("r", 8)
    if not isinstance(rank, int) or rank < 1:
        raise LoraInitError(f"{file} is damaged: r is {rank!r}, and a rank of at least 1 is expected.")
    for name in ("rank_pattern", "alpha_pattern", "auto_mapping"):
        mapping = config.get(name) or {}  # a null in JSON stands for none
        is_valid = isinstance(mapping, dict)
        if is_valid and name != "auto_mapping":
            is_valid = all(map(is_number, mapping.values()))
        if not is_valid:
            raise LoraInitError(f"{file} is damaged: {name} is {mapping!r}, and a mapping is expected, to numbers.")


class AdapterDirectory:
    """An adapter directory that PEFT or lora_init has written: the config is read at once, the rest when asked for."""

    def __init__(self, path: str | Path) -> None:
        self.path = as_path(path, "an adapter directory")
        file = self.path / CONFIG_FILE
        # Of a link whose end is gone exists() says no, too; "no such directory" would send people looking for the link.
        if self.path.is_symlink() and not self.path.exists():
            raise LoraInitError(f"{self.path} is a link to {self.path.readlink()}, which does not exist. Set it anew.")
        if not self.path.is_dir() and not self.path.is_file():
            raise LoraInitError(f"{self.path}: no such adapter directory.")
        if not file.is_file():
            form = _form_of(self.path)
            if form:
                form = f" and {form}"
            raise LoraInitError(
                f"{self.path} has no {CONFIG_FILE}{form}, so it is not an adapter directory. PEFT's save_pretrained() "
                "writes one."
            )
        self.config: Mapping[str, Any] = read_json(file)
        if self.config.get("peft_type") != "LORA":
            raise LoraInitError(
                f"{self.path} holds an adapter of type {self.config.get('peft_type')}; only LORA is read."
            )
        _check_numbers(self.config, file)

    @property
    def base(self) -> str:
        """Directory or hub id of the base model, as the adapter names it; may be empty."""
        return str(self.config.get("base_model_name_or_path") or "")

    @cached_property
    def header(self) -> dict[str, tuple[list[int], str]]:
        """Names of the tensors, with the shape and the type of each, such as `"BF16"`."""
        path = self.path / WEIGHTS_FILE
        if path.is_symlink() and not path.exists():
            raise LoraInitError(f"{path} is a link to {path.readlink()}, which does not exist. Download it again.")
        if not path.is_file():
            raise LoraInitError(f"{self.path} has no {WEIGHTS_FILE}. Only adapters in safetensors files are read.")
        return read_header(path)

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Names and shapes of the tensors."""
        return {key: shape for key, (shape, _) in self.header.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Read all tensors, by their names in the file."""
        from safetensors.torch import load_file

        if not self.shapes:  # which checks the file, so that it is refused in our words
            return {}
        return load_file(self.path / WEIGHTS_FILE)

    @property
    def n_labels(self) -> int | None:
        """Classes of the head that a classifier's adapter holds; None if it holds none."""
        heads = HEADS.get(self.config.get("task_type") or "", ())
        written, read = set(), set()  # widths, by the layers of the head
        for key, shape in self.shapes.items():
            if len(shape) == 2 and ".lora_" not in key and is_in(key.removesuffix(".weight"), heads):
                written.add(shape[0])
                read.add(shape[1])
        # What the last layer writes, a number for each class, no other reads; or all are of one width.
        return min(written - read or written, default=None)

    @property
    def layers(self) -> list[str]:
        """The layers that have an A, by their names in the plain model."""
        layers = []
        for key in self.shapes:
            name = key.removesuffix(LORA_A)
            if key.endswith(LORA_A) and name.startswith(PREFIX):
                layers.append(name.removeprefix(PREFIX))
        return layers

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each layer, without its model: what nests deepest is taken for the first matrix of experts."""
        ranks: dict[str, int] = {}
        for name in self.layers:
            # PEFT wraps the module of fused experts once for each of its parameters: the depth tells which one.
            module, depth = name.replace(".base_layer", ""), name.count(".base_layer")
            parameters = self._parameters_of(module)
            if depth < len(parameters):
                # The A of experts has experts * r rows, and how many experts there are only the model knows.
                ranks |= from_patterns(self.config.get("rank_pattern"), [parameters[depth]], self.config.get("r", 8))
            else:
                ranks[name] = self.shapes[f"{PREFIX}{name}{LORA_A}"][0]
        return ranks

    def _parameters_of(self, module: str) -> list[str]:
        """Return the parameters of a module that `target_parameters` names, the outermost first."""
        keys = self.config.get("target_parameters")
        if not isinstance(keys, list):
            return []
        parameters: dict[str, None] = {}  # a set that keeps its order
        for key in map(str, keys):
            parameter = f"{module}.{key.rpartition('.')[2]}"
            # A key without a dot also ends the names of weights of plain layers.
            may_be_meant = "." in key or module.endswith("experts")
            if may_be_meant and f".{parameter}".endswith(f".{key}"):
                parameters[parameter] = None
        # PEFT wraps in the order of the module, where the second matrix of experts comes last.
        return sorted(parameters, key=lambda parameter: not parameter.endswith("down_proj"))

    @property
    def is_start(self) -> bool:
        """Whether lora_init wrote it and nobody trained it. PEFT drops the record, or leaves it unchanged."""
        return is_as_written(self.path, ORIGIN_FILE)

    @property
    def is_untrained(self) -> bool:
        """Whether it is a start: as lora_init wrote it, or with a B of zeros."""
        return self.is_start or self.adds_nothing

    def check_values(self) -> None:
        """Refuse an adapter without tensors, or with a number that is not finite."""
        if not self.shapes:
            raise LoraInitError(f"{self.path / WEIGHTS_FILE} holds no tensors. Save the adapter again.")
        for name, tensor in self.tensors().items():
            if not bool(tensor.isfinite().all()):
                raise LoraInitError(
                    f"{self.path / WEIGHTS_FILE}: {name} has NaN or infinite numbers, as after a training that went "
                    "wrong. Save an earlier checkpoint."
                )

    # Three questions that look alike. `is_start`: are the weights those that this package wrote? `adds_nothing`: is
    # the product B A zero, whoever wrote them? `has_zeros`: is one of its factors zero?
    @property
    def adds_nothing(self) -> bool:
        """Whether B A is zero in every layer; reads them to the first where it is not."""
        if self.config.get("target_parameters"):  # A and B of experts are laid out otherwise
            return self.has_zeros
        return self._all(is_zero_update)

    @property
    def has_zeros(self) -> bool:
        """Whether B is zero in every layer, or A, as in embeddings."""
        return self._all(_has_zeros)

    def _all(self, holds: Callable[[Tensor | None, Tensor], bool]) -> bool:
        from safetensors import safe_open

        shapes = self.shapes
        a_of_b = {}
        for key in shapes:
            for end_a, end_b in _PAIRS:
                if key.endswith(end_b):
                    a_of_b[key] = key.removesuffix(end_b) + end_a
        # One pair at a time, and none after the first that decides.
        with safe_open(self.path / WEIGHTS_FILE, framework="pt") as file:
            for key_b, key_a in a_of_b.items():
                a = None
                if key_a in shapes:
                    a = file.get_tensor(key_a)
                if not holds(a, file.get_tensor(key_b)):
                    return False
        return bool(a_of_b)

    @cached_property
    def origin(self) -> dict[str, Any]:
        """What lora_init knew when it made the adapter, also after training; empty if it did not make it."""
        # After training the record's file may lie beside other weights, so then the copy in the config counts.
        if self.is_start:
            return read_json(self.path / ORIGIN_FILE)
        return carried(self.config)

    @property
    def _was_converted(self) -> bool:
        """Whether PEFT has converted the adapter since it was made, which changes its rank."""
        return self.origin.get("rank") not in (None, self.config.get("r"))

    @property
    def base_change(self) -> str:
        """The start that changed the plain weights of the base; empty if none did, or the adapter was converted."""
        began = self.config.get("init_lora_weights")
        if isinstance(began, str):  # a start of PEFT's, which converting sets back to True
            return began if changes_base(began) else ""
        if self._was_converted:
            return ""
        method = str(self.origin.get("method"))
        # A start of another package need not be installed here, so the record says whether it corrects the base.
        if method and (self.origin.get("corrects_base") or changes_base(method)):
            return method
        return ""

    def check_fits_plain_base(self) -> None:
        """Refuse an adapter that began by changing the weights of the base."""
        if began := self.base_change:
            raise LoraInitError(
                f"{self.path} began as {began}, which changes the base weights, so it does not fit the plain base. "
                "`lora-init export --start DIRECTORY`, naming the adapter before training, converts it."
            )

    @property
    def error_size(self) -> float:
        """|W - Q| of the quantized base that the adapter began by correcting; 0 if it did not, or was converted."""
        if self._was_converted:
            return 0.0
        return float(self.origin.get("error_size", 0.0))

    @property
    def changes_weights(self) -> bool:
        """Whether loading it changes weights of the plain model: by its start, or by what else it holds."""
        by_start = isinstance(self.config.get("init_lora_weights"), str)
        return by_start or any(".lora_" not in key for key in self.shapes)


def _form_of(path: Path) -> str:
    """Describe what a file or directory holds if it is no adapter of PEFT, by the names of files and tensors."""
    files = [path]
    if not path.is_file():
        files = sorted(path.iterdir())
    if any(file.name.endswith((".incomplete", ".part", ".crdownload")) for file in files):
        return "is half a download"
    if (path / "config.json").is_file() or (path / "pytorch_model.bin").is_file():
        return "is a checkpoint of a whole model"
    for file in files:
        if file.suffix == ".safetensors":
            keys = [*read_header(file)]
            if keys:
                return form_of(keys)
    if path.is_file():
        return "is a file"
    return ""


def form_of(keys: Collection[str]) -> str:
    """Describe whose names of tensors these are, if they are not PEFT's; empty if they are."""
    loras = [key for key in keys if "lora" in key and not key.startswith(PREFIX)]
    if any(".lora_down." in key or key.startswith(("lora_unet_", "lora_te")) for key in loras):
        return "holds an adapter in kohya's form"
    if any(key.startswith(("unet.", "text_encoder")) or "transformer_blocks." in key for key in loras):
        return "holds an adapter in diffusers' form"
    if any("lora_" in key for key in keys):
        return ""
    return "holds no lora_A, but weights of a whole model"


def check_place(path: str | Path, overwrite: bool) -> None:
    """Check that `write_start` may write here, and can, so that nobody finds out after the work."""
    check_free(path, overwrite, **_OURS)


def write_start(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    origin: Mapping[str, Any],
    card: str,
    overwrite: bool,
) -> Path:
    """Write the directory of an adapter before training, complete or not at all; return its absolute path."""
    with new_directory(path, overwrite, **_OURS) as fresh:
        write_files(fresh, tensors, config)
        # The hash tells this record from one that PEFT left beside other weights, see `is_as_written`.
        write_json(fresh / ORIGIN_FILE, {**origin, "sha256": digests_of(fresh, [WEIGHTS_FILE])})
        (fresh / CARD_FILE).write_text(card, encoding="utf-8")
    return Path(path).expanduser().resolve()


def write_files(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write the two files that PEFT reads into a directory."""
    from safetensors.torch import save

    # `save_file` would let only the owner read it.
    (path / WEIGHTS_FILE).write_bytes(save(dict(tensors), metadata={"format": "pt"}))
    write_json(path / CONFIG_FILE, config)


def carrying(origin: dict[str, Any], task_type: str | None) -> dict[str, Any]:
    """Put an origin into a field of LoraConfig that PEFT carries from the config it reads to the one it writes."""
    # PEFT overwrites `auto_mapping` where there is no task type; `megatron_core` stays, but is a string.
    if task_type:
        return {"auto_mapping": {ORIGIN: origin}}
    return {"megatron_core": json.dumps({ORIGIN: origin})}


def carried(config: Mapping[str, Any]) -> dict[str, Any]:
    """Read the origin that `carrying` put into a config; empty if there is none."""
    fields = [config.get("auto_mapping")]
    with suppress(TypeError, ValueError):  # None, or a string that somebody else put there
        fields.append(json.loads(config.get("megatron_core", "")))
    for field in fields:
        if isinstance(field, dict) and ORIGIN in field:
            origin = field[ORIGIN]
            # A config may come from anywhere, and readers take these two for dicts.
            if isinstance(origin, dict) and isinstance(origin.get("provenance", {}), dict):
                return origin
            return {}
    return {}


def start_digest(weights: Weights) -> str:
    """Hash A and B of a start, so that `export` recognizes it. Rounded, since a trainer may keep bfloat16."""
    digest = hashlib.sha256()
    for name, pair in sorted(weights.items()):
        digest.update(name.encode())
        for weight in pair:
            rounded = weight.detach().cpu().bfloat16().contiguous()
            digest.update(rounded.view(torch.int16).numpy().tobytes())  # numpy has no bfloat16
    return digest.hexdigest()


def hub_id(model: str | None) -> str | None:
    """Return the hub id of a model; None for a path, which means nothing elsewhere and is refused by the hub."""
    return model if model and not Path(model).exists() else None


def card_header(model: str | None, task_type: str | None, is_adapter: bool = True) -> str:
    """Write the metadata at the head of the card of an adapter or a whole model, with the keys of PEFT's own card."""
    from huggingface_hub import ModelCardData

    base = hub_id(model)
    tags = ["lora", "lora_init"]
    library = "transformers"
    if is_adapter:
        library = "peft"
        if base:  # as in PEFT's own card
            tags.insert(0, f"base_model:adapter:{base}")
    data = ModelCardData(
        base_model=base,
        library_name=library,
        pipeline_tag="text-generation" if task_type == "CAUSAL_LM" else None,
        tags=tags,
    )
    return f"---\n{data.to_yaml()}\n---\n"
