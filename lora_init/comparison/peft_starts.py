"""The starts that PEFT computes: PiSSA, OLoRA, CorDA and LoftQ. They change the weights of the base model too."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_init.adapters.adapter_init import AdapterInit
from lora_init.adapters.peft_model import check_model, exact_pattern, match_modes
from lora_init.errors import LoraInitError, first_line

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

PEFT_STARTS = ("pissa", "olora", "corda", "loftq")
# Batches that CorDA sees: as many as `collect` does at most.
_MAX_BATCHES = 64


def apply_peft_start(start: str, model: nn.Module, shape: AdapterInit, batches: Iterable[Any]) -> tuple[PeftModel, int]:
    """Let PEFT start the adapter. Changes the model's weights; `attach.remember` with weights=True puts them back.

    `pissa` (arXiv 2404.02948), `olora` (arXiv 2406.01775) and `corda` (arXiv 2406.05223, instruction-previewed mode)
    take a part of each weight into A and B and leave the rest in the base, so the output changes by rounding only.
    `loftq` (arXiv 2310.08659) rounds the base to 4 bits and lets A and B make up for part of the error: its output is
    near that of the plain model, not equal.

    Args:
        start: One of `PEFT_STARTS`.
        model: The plain model.
        shape: Layers, rank, scaling. Its weights are not used.
        batches: For `corda`: mappings of tensors; 64 at most are read.

    Returns:
        The model with the adapter, and the number of batches that were run through it.

    Raises:
        LoraInitError: The start does not apply: a quantised base, layers of another kind, a layer narrower than the
            rank, a package or a device that is missing, or what PEFT says.
    """
    from peft import get_peft_model

    check_model(model, shape.targets, shape.unsupported, shape.provenance.model_class, "default")
    _check_applies(start, model, shape)
    config = shape.to_peft_config()
    config.base_model_name_or_path = None
    config.target_modules = exact_pattern(shape.targets)
    config.init_lora_weights = start  # type: ignore[assignment]
    passes = 0
    try:
        with warnings.catch_warnings():
            # Advice on saving such an adapter, and on a flag that PEFT then sets correctly itself.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            if start == "corda":
                passes = _preprocess_corda(model, config, shape, batches)
            if start == "loftq":
                config.loftq_config = {"loftq_bits": 4, "loftq_iter": 1}
            peft_model = get_peft_model(model, config)
    except (ValueError, TypeError, ImportError) as error:
        if isinstance(error, LoraInitError):
            raise
        raise LoraInitError(f"start {start!r} does not apply here, PEFT says: {first_line(error)}") from error
    match_modes(peft_model)
    return peft_model, passes


def _check_applies(start: str, model: nn.Module, shape: AdapterInit) -> None:
    if shape.unsupported:
        name, kind = next(iter(shape.unsupported.items()))
        raise LoraInitError(
            f"start {start!r} is for linear layers, and {name!r} is a {kind}. Leave it out of the targets."
        )
    for name, target in shape.targets.items():
        weight: Any = model.get_submodule(name).weight
        if type(weight) is not nn.Parameter or not weight.is_floating_point():
            raise LoraInitError(
                f"start {start!r} takes the plain weights apart, and {name!r} is quantised. Load the model in float."
            )
        if target.kind == "Conv1D" and start in ("olora", "loftq"):
            raise LoraInitError(f"start {start!r}: PEFT computes it for nn.Linear only, and {name!r} is a Conv1D.")
        narrow = min(target.in_features, target.out_features)
        if shape.rank > narrow:
            raise LoraInitError(
                f"start {start!r}: layer {name!r} has {narrow} singular vectors, and rank {shape.rank} asks for more."
            )
    if start == "loftq":
        if importlib.util.find_spec("bitsandbytes") is None:
            raise LoraInitError("start 'loftq' needs the package bitsandbytes, which is not installed.")
        if not (torch.cuda.is_available() or torch.xpu.is_available()):
            raise LoraInitError(
                "start 'loftq' needs a GPU: PEFT rounds the weights to 4 bits there, and there is none."
            )


def _preprocess_corda(model: nn.Module, config: LoraConfig, shape: AdapterInit, batches: Iterable[Any]) -> int:
    if importlib.util.find_spec("attr") is None:
        raise LoraInitError("start 'corda' needs the package attrs, which is not installed.")  # PEFT's code imports it

    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    config.corda_config = CordaConfig(corda_method="ipm")
    passes = 0

    def run_model() -> None:
        nonlocal passes
        device = next(model.parameters()).device
        for batch in islice(batches, _MAX_BATCHES):
            for example in _examples(batch):
                model(**{key: value.to(device) for key, value in example.items()})
            passes += 1
        if not passes:
            raise LoraInitError("start 'corda' reads data, and there is no batch.")

    modes = [(module, module.training) for module in model.modules()]
    with _with_a_token_axis([model.get_submodule(name) for name in shape.targets]):
        preprocess_corda(model, config, run_model)
    for module, training in modes:
        module.training = training
    return passes


def _examples(batch: Any) -> Iterator[dict[str, Tensor]]:
    """Cut a batch into its examples without padding: PEFT's CorDA takes one sequence at a time and knows no mask."""
    if not isinstance(batch, Mapping):
        raise LoraInitError(
            f"start 'corda' needs batches that are mappings of tensors, and this is a {type(batch).__name__}."
        )
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
    mask = tensors.get("attention_mask")
    for row in range(max(map(len, tensors.values()), default=0)):
        example = {key: value[row : row + 1] for key, value in tensors.items()}
        if mask is not None:
            kept = mask[row].bool()
            example = {key: v[:, kept] if tensors[key].shape == mask.shape else v for key, v in example.items()}
        yield example


@contextmanager
def _with_a_token_axis(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Show a layer that reads one row [1, d] per sequence, as BERT's pooler does, to CorDA's hook as [1, 1, d].

    The hook drops the first axis, and would take a row for a single number otherwise.
    """
    narrow: set[nn.Module] = set()

    def before(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or args[0].dim() != 2:
            return None
        narrow.add(layer)
        return (args[0][None], *args[1:])

    def after(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if layer not in narrow:
            return None
        narrow.discard(layer)
        return output[0]

    handles = []
    for layer in layers:
        handles += [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
