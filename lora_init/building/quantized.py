"""What quantization took from the weights of a model: W - Q, layer by layer, never the float model as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_init.adapters.adapter_init import AdapterInit
from lora_init.adapters.peft_model import as_it_was
from lora_init.collection.losses import Loss, mean_loss, own_loss
from lora_init.errors import LoraInitError, first_line
from lora_init.layers.running import Forward, call_model, evaluating, on_device_of, restoring
from lora_init.layers.targets import Target, is_conv1d
from lora_init.layers.wrappers import is_sharded, is_tensor_parallel, model_id, plain_names, unwrapped
from lora_init.loading.checkpoint import Stored, find_parameter, find_tensors, read_parameter

# Unit vectors in one forward pass of a layer.
_ROWS = 1024
# |W - Q| / |W| that a quantizer can make, by the bits of a weight. NF4 makes 0.09 of normal numbers, round to nearest
# in groups of 64 makes 0.12 of 4 bits, 0.25 of 3 and 0.6 of 2; a weight of another layer or model makes 1.4.
_LARGEST_ERROR = {8: 0.1, 4: 0.3}
_LARGEST_OF_ALL = 0.9
# What rounding to bfloat16 makes: a weight no farther from W was only cast.
_CAST = 2.0**-8
# What a layer computes may differ from its weight times the input by this: activations in 8 bits, other kernels.
_KERNEL = 0.05


class QuantizationErrors(Mapping[str, Tensor]):
    """W - Q of each layer of a quantized model, float32 [d_out, d_in], computed on each access.

    Q is the matrix that the layer multiplies by, whatever library made it: its outputs for the unit vectors, less its
    bias. A library's own function may return another matrix: after its first forward pass on a processor, bitsandbytes
    packs 4-bit weights in another order, which `dequantize_4bit` does not know. W is read by name from the safetensors
    files of the float model. One layer is in memory at a time.

    Args:
        model: The quantized model, plain.
        targets: Its layers, such as `stats.targets` or `find_targets(model).layers`.
        weights: Directory or hub id of the float model. Default: what the model was loaded from.

    Raises:
        LoraInitError: There is no float checkpoint, or it lacks a layer or has it in other widths; a layer is of a kind
            that is not read here, or has no weights. On access to a layer: it was not quantized, does not compute a
            product, or is farther from the checkpoint than its bits explain.
    """

    def __init__(self, model: nn.Module, targets: Mapping[str, Target], weights: str | Path | None = None) -> None:
        model = unwrapped(model)
        self.source = str(weights or model_id(model))
        if not self.source:
            raise LoraInitError(
                "the model does not say what it was loaded from. Name the float model by {weights}.", weights=...
            )
        if is_sharded(model) or is_tensor_parallel(model):
            raise LoraInitError("processes hold a part of each weight, and errors are read from whole ones. Use one.")
        self._targets, self._modules = targets, plain_names(model)
        self._flipped: dict[str, bool] = {}  # of square weights, whether the checkpoint has them transposed
        # What it runs in: a layer of bitsandbytes takes the first type that it reads for good.
        self._dtype = getattr(model, "dtype", torch.float32)
        try:
            tensors = find_tensors(self.source)
        except (OSError, ValueError) as error:
            raise LoraInitError(
                f"the float weights of {self.source!r} cannot be read: {first_line(error)}. Name a directory or hub id "
                "that has them by {weights}.",
                weights=...,
            ) from error
        # Where each W is. All are looked up now, so that a missing one is refused before the pass over the data.
        self._stored = {name: self._find(model, target, tensors) for name, target in targets.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._targets)

    def __len__(self) -> int:
        return len(self._targets)

    def __getitem__(self, name: str) -> Tensor:
        target, module = self._targets[name], self._modules[name]
        where = f"layer {name!r}, a {target.kind}"
        quantized = read_product(module, target, self._dtype, where)
        weight = self.weight(name).to(quantized.device)
        error = weight - quantized
        size = float(error.norm() / weight.norm().clamp_min(1e-30))  # a weight of zeros has an error of zero
        own_weight = getattr(module, "weight", None)
        # By its exact type: the quantized weights of bitsandbytes are subclasses of Parameter.
        is_float = type(own_weight) is nn.Parameter and own_weight.is_floating_point()
        if is_float and size < _CAST:
            raise LoraInitError(
                f"{where}: it was not quantized, so there is nothing to correct. Leave it out of the targets, or load "
                "the model quantized (--quantize nf4)."
            )
        largest = _LARGEST_OF_ALL  # a float weight may have been rounded to any number of bits
        if not is_float:
            largest = _LARGEST_ERROR.get(_bits(module, target), _LARGEST_OF_ALL)
        if not size <= largest:  # so that NaN is refused, too
            raise LoraInitError(
                f"{where}: |W - Q| is {size:.2f} |W| with the W of {self.source!r}, and quantization makes {largest:g} "
                "at most. Name the float model that the quantized one was made of by {weights}.",
                weights=...,
            )
        return error

    def weight(self, name: str) -> Tensor:
        """Read W of a layer, float32 [d_out, d_in], on the CPU."""
        target = self._targets[name]
        shape = target.out_features, target.in_features
        weight = read_parameter(self._stored[name], shape)
        if shape[0] != shape[1]:
            is_flipped = weight.shape != shape
        else:  # of a square one Q shows whether the checkpoint has it as [d_in, d_out]
            if name not in self._flipped:
                quantized = read_product(self._modules[name], target, self._dtype, f"layer {name!r}").cpu()
                self._flipped[name] = bool((weight.T - quantized).norm() < (weight - quantized).norm())
            is_flipped = self._flipped[name]
        if is_flipped:
            return weight.T
        return weight

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Let the layers compute with W while the block runs; each forward pass reads it anew: there is one model."""
        with restoring("forward", [self._modules[name] for name in self._targets]):
            for name in self._targets:
                self.weight(name)  # which may run the layer once
                module = self._modules[name]
                module.forward = partial(self._exact, name, module)  # a hook would run after the layer's own product
            yield

    def _exact(self, name: str, module: Any, rows: Tensor) -> Tensor:
        """Compute what a layer would without quantization: the `forward` of the layer while the block runs."""
        bias: Tensor | None = getattr(module, "bias", None)
        exact: Tensor = nn.functional.linear(rows, self.weight(name).to(rows.device, rows.dtype))
        if bias is None:
            return exact
        return (exact + bias).to(rows.dtype)  # a bias may be in another type

    def _find(self, model: Any, target: Target, tensors: Mapping[str, Stored]) -> Mapping[Stored, Tensor | None]:
        """Find where the checkpoint has W of a layer; refuse a layer that cannot be corrected."""
        where, module = f"layer {target.name!r}, a {target.kind}", self._modules[target.module]
        if target.experts or target.kernel:
            raise LoraInitError(f"{where}: only linear layers can be corrected. Leave it out of the targets.")
        parts = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if any(part.device.type == "meta" for part in parts):
            raise LoraInitError(f"{where}: its weights are not in memory (meta, or offloaded). Load the whole model.")
        shape = (target.out_features, target.in_features)
        weight = find_parameter(tensors, model, f"{target.name}.weight", shape)
        if not weight:
            got = "is not in"
            for key, stored in tensors.items():
                if f".{key}".endswith(f".{target.name}.weight"):  # of this name, in another shape
                    got = f"is {list(stored.shape)} in"
                    break
            raise LoraInitError(
                f"{where}: its weight {list(shape)} {got} {self.source!r}. Name the float model that the quantized one "
                "was made of by {weights}.",
                weights=...,
            )
        return weight


# Libraries keep quantized weights in layouts of their own, packed and permuted, and some change the layout at the first
# forward pass. What a layer computes is the same in all of them: for the unit vector e_j it returns the column j of Q.
# That costs d_in / 1024 forward passes of one layer. A layer that is not linear is found by a probe: eight rows must
# give the same by the layer and by the matrix.
@torch.no_grad()
def read_product(module: Any, target: Target, dtype: torch.dtype, where: str) -> Tensor:
    """Read the matrix that a layer multiplies by, float32 [d_out, d_in], from what it returns for the unit vectors.

    `dtype` is the type of what it reads.
    """
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    device, shape = next(iter(tensors), torch.empty(0)).device, (target.out_features, target.in_features)
    # Signs times powers of two are exact in every type, and where activations are rounded to 8 bits row by row.
    probe = torch.randn(8, shape[1], generator=torch.Generator().manual_seed(0)).sign().to(device)
    probe[4:] *= 2.0
    bias = getattr(module, "bias", None)
    try:
        with restoring("bias", [] if bias is None else [module]), evaluating(module):
            if bias is not None:  # beside a bias that is much larger a weight would lose its digits
                # transformers' Conv1D adds a bias in any case.
                module.bias = nn.Parameter(torch.zeros_like(bias), False) if is_conv1d(module) else None
            product = module(probe.to(dtype)).float()
            matrix = _outputs_for_units(module, shape[1], dtype, device)
    except (RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
        raise LoraInitError(f"{where}: what it multiplies by cannot be read: {first_line(error)}") from error
    is_product = matrix.shape == shape and bool(torch.dist(product, probe @ matrix.T) <= _KERNEL * product.norm())
    if not is_product:  # also where a number is NaN
        raise LoraInitError(
            f"{where}: it does not compute the product of its input with a matrix, so that no error of a weight can be "
            "read. Leave it out of the targets."
        )
    if device.type == "mps":  # which has no float64
        return matrix.cpu()
    return matrix


def _outputs_for_units(module: Any, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return what a layer makes of the unit vectors, as columns, float32 [d_out, d_in]."""
    columns = []
    for first in range(0, width, _ROWS):
        units = torch.zeros(min(_ROWS, width - first), width, dtype=dtype, device=device)
        units[torch.arange(len(units)), first + torch.arange(len(units))] = 1.0
        columns.append(module(units).float())
    return torch.cat(columns).T.contiguous()  # d_in x d_out -> d_out x d_in


def _bits(module: nn.Module, target: Target) -> int:
    """Count the bits that a weight takes in memory, scales included, down to 8, 4 or 0: not known."""
    n_bytes = 0
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        if not tensor.is_floating_point():  # packed weights, and scales that were quantized themselves
            n_bytes += tensor.nbytes
    size = 8 * n_bytes / (target.in_features * target.out_features)
    if 8 <= size < 9.5:
        return 8
    if 4 <= size < 5.5:
        return 4
    return 0


def with_losses(
    model: nn.Module,
    init: AdapterInit,
    errors: QuantizationErrors,
    loss_of: Callable[[nn.Module], float],
    unchecked: bool = False,
) -> AdapterInit:
    """Measure what quantization costs and what an adapter gives back; refuse one without gain unless `unchecked`."""
    with as_it_was(model):
        before = loss_of(model)
        with errors.undone():
            exact = loss_of(model)
        after = loss_of(init.apply(model))  # last: the block ends with the plain model again
    if not (after < before or unchecked):
        raise LoraInitError(
            f"method {init.method!r}: on the examples set aside the loss is {before:.5g} in the quantized model and "
            f"{after:.5g} with the correction, so there is nothing to gain; with the weights as they were it is "
            f"{exact:.5g}. Give more data of the kind that the model is for, or pass {{unchecked}}.",
            unchecked=True,
        )
    return replace(init, losses=(before, after), exact_loss=exact)


@torch.no_grad()
def loss_or_distance(
    model: nn.Module,
    errors: QuantizationErrors,
    batches: Iterable[Any],
    forward: Forward | None = None,
    loss: Loss | None = None,
) -> Callable[[nn.Module], float]:
    """Return what measures a quantized model on some batches: its mean loss, where it computes one.

    Of an encoder without a head it is 1 - cosine, token by token, to the outputs of the model before it was quantized.
    """
    batches = list(batches)
    if not batches:
        raise LoraInitError("no batch is left to measure the loss on. Give more examples.")
    run = forward or partial(call_model, with_labels=True)
    with evaluating(model):
        first = run(model, on_device_of(model, batches[0]))
    if loss is not None or isinstance(own_loss(first), Tensor):
        return partial(mean_loss, batches=batches, forward=forward, loss=loss)
    with errors.undone():
        exact = [_outputs(model, batch, run) for batch in batches]

    def distance(changed: nn.Module) -> float:
        cosines = []
        for batch, wanted in zip(batches, exact, strict=True):
            cosines.append(nn.functional.cosine_similarity(_outputs(changed, batch, run), wanted, dim=-1))
        # By rounding the mean cosine of equal outputs may be above 1.
        return max(0.0, float(1.0 - torch.cat(cosines).double().mean()))

    return distance


@torch.no_grad()
def _outputs(model: nn.Module, batch: Any, run: Forward) -> Tensor:
    """Return what a model returns first, [rows, d], without padding, on the CPU."""
    moved = on_device_of(model, batch)
    with evaluating(model):
        output = run(model, moved)
    first: Tensor = output if isinstance(output, Tensor) else output[0]  # a ModelOutput or a tuple
    mask = None
    if isinstance(moved, Mapping):
        mask = moved.get("attention_mask")
    if mask is not None and mask.shape == first.shape[:2]:
        return first[mask.bool()].float().cpu()  # batch x tokens x d -> tokens that are no padding x d
    return first.flatten(0, -2).float().cpu()
