"""The start of one layer: from what is known of it to its A and B."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_init.adapters.initializers import as_large_as_random, error_seen, layer_generator, scaled_by_gamma
from lora_init.adapters.providers import PROVIDERS
from lora_init.adapters.quantized import read_product
from lora_init.adapters.starts import Start
from lora_init.adapters.weights import LoraWeights
from lora_init.errors import LoraInitError, first_line, is_out_of_memory
from lora_init.layers.rows import expert_group
from lora_init.layers.targets import Target
from lora_init.layers.wrappers import plain_names, unwrapped
from lora_init.statistics.spectrum import Spectrum
from lora_init.statistics.statistics import Statistics


@dataclass(frozen=True, eq=False)
class LayerToStart:
    """What is known of a layer, or of one of its experts, when it is started; `PROVIDERS` reads it."""

    target: Target
    stats: Statistics
    part: str  # the name of the layer or of an expert, by which random numbers are drawn
    spectrum: Spectrum
    rank: int
    scaling: float
    whiten: bool
    seed: int
    error: Tensor | None
    model: nn.Module | None

    @property
    def width(self) -> int:
        """Width d_in of what it reads."""
        return self.spectrum.components.shape[1]

    @property
    def generator(self) -> torch.Generator:
        """Source of random numbers of its own."""
        return layer_generator(self.seed, self.part)

    @property
    def weight(self) -> Tensor:
        """The matrix that it multiplies by, float32 [d_out, d_in], on the CPU."""
        if self.model is None:
            raise LoraInitError(f"layer {self.target.name!r}: the start is made from its weight. Pass model=.")
        model = unwrapped(self.model)
        module, dtype = plain_names(model)[self.target.module], getattr(model, "dtype", torch.float32)
        return read_product(module, self.target, dtype, f"layer {self.target.name!r}").cpu()


def layer_start(
    start: Start, stats: Statistics, name: str, gamma: float | None, unit_rows: bool = False, **known: Any
) -> LoraWeights:
    """Compute A and B of a layer; with experts A and B of each, side by side.

    Where B is zero A x has the size that it has with `random`, unless the start has one of its own or with `unit_rows`.
    """
    experts = {expert_group(name, i): own for i, own in enumerate(stats.of_experts(name))}
    target, parts = stats.targets[name], (experts or {name: stats[name]}).items()
    made = [_called(start, LayerToStart(target, stats, part, spectrum, **known)) for part, spectrum in parts]
    if start.b_is_zero and not (start.matched or unit_rows):
        made = [
            LoraWeights(as_large_as_random(spectrum, own.a), own.b)
            for own, (_, spectrum) in zip(made, parts, strict=True)
        ]
    shape_a, shape_b = target.shapes(known["rank"])
    a = torch.cat([part.a for part in made]).reshape(shape_a)
    if start.b_is_zero:
        return LoraWeights(a, torch.zeros(shape_b))
    weights = LoraWeights(a, torch.cat([part.b for part in made]).reshape(shape_b))
    return weights if gamma is None else scaled_by_gamma(weights, gamma)


def _called(start: Start, layer: LayerToStart) -> LoraWeights:
    """Call the function of a start; refuse what it raises or returns in a line that names it. B is empty where zero."""
    where = f"layer {layer.target.name!r}: {start}"
    try:
        made = start.compute(**{name: PROVIDERS[name].of(layer) for name in start.takes})
    except (LoraInitError, KeyboardInterrupt):
        raise
    except BaseException as error:  # a module that is imported for it may call sys.exit
        if is_out_of_memory(error):
            raise
        raise LoraInitError(f"{where}: its function raised {type(error).__name__}: {first_line(error)}") from error
    wanted = [[layer.rank, layer.width], [layer.target.out_features, layer.rank]][: 1 if start.b_is_zero else 2]
    parts = made if isinstance(made, tuple) else (made,)
    got = [list(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in parts]
    if got != wanted:
        what = "A" if start.b_is_zero else "A and B"
        raise LoraInitError(f"{where}: its function returned {got}, expected {what} of shape {wanted}.")
    a, b = (part.detach().float() for part in (*parts, torch.empty(0))[:2])
    if not bool(a.isfinite().all() and b.isfinite().all()):
        raise LoraInitError(f"{where}: its function returned NaN or inf, or what is too large for float32.")
    return LoraWeights(a, b)


def error_of(target: Target, start: Start, errors: Mapping[str, Tensor] | None) -> Tensor | None:
    """Return what quantization took from a layer's weight, if the start is about that."""
    if not start.by_error:
        return None
    if errors is None or target.name not in errors:
        raise LoraInitError(
            f"layer {target.name!r}: {start} corrects what quantization took from its weight. Pass errors=, such as "
            "QuantizationErrors(model, stats.targets)."
        )
    error, shape = errors[target.name], [target.out_features, target.in_features]
    if list(error.shape) != shape or not bool(error.isfinite().all()):
        raise LoraInitError(f"layer {target.name!r}: its error is {list(error.shape)}, expected {shape}, all finite.")
    return error.to(torch.promote_types(error.dtype, torch.float32))


def error_before_and_after(
    spectrum: Spectrum, error: Tensor, weights: LoraWeights, scaling: float
) -> tuple[float, float]:
    """Compute how far an error moves the output of its layer, without and with the adapter, see `error_seen`."""
    a, b = weights.to(error.device, error.dtype)
    return error_seen(spectrum, error), error_seen(spectrum, torch.addmm(error, b, a, alpha=-scaling))
