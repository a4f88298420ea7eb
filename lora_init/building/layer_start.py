"""The start of one layer: from its statistics to its A and B."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_init.adapters.init_config import Shape
from lora_init.building.quantized import read_product
from lora_init.errors import LoraInitError, first_line, is_out_of_memory
from lora_init.layers.rows import expert_group
from lora_init.layers.targets import Target
from lora_init.layers.wrappers import plain_names, unwrapped
from lora_init.planning.lora_config import scaling_of
from lora_init.starts.initializers import as_large_as_random, layer_generator, scaled_by_gamma
from lora_init.starts.providers import PROVIDERS
from lora_init.starts.starts import Start
from lora_init.starts.weights import LoraWeights
from lora_init.statistics.spectrum import Spectrum
from lora_init.statistics.statistics import Statistics


@dataclass(frozen=True, eq=False)
class BuildContext:
    """The context that a start reads: the statistics, the form of the adapter, and what single starts need."""

    start: Start
    stats: Statistics
    shape: Shape
    seed: int = 0
    errors: Mapping[str, Tensor] | None = None  # W - Q of each layer, for starts that correct quantization
    model: nn.Module | None = None  # for starts that are made from the weights
    rank: int | None = None  # the rank that the scaling is relative to

    @property
    def scaling(self) -> float:
        """The factor of B A, once alpha and rank are known."""
        assert self.shape.lora_alpha is not None and self.rank is not None
        return scaling_of(self.shape.lora_alpha, self.rank, self.shape.use_rslora)

    def error(self, name: str) -> Tensor | None:
        """Return W - Q of a layer, if the start corrects quantization; refuse one of another shape or with NaN."""
        if not self.start.needs_error:
            return None
        if self.errors is None or name not in self.errors:
            raise LoraInitError(
                f"layer {name!r}: {self.start} corrects what quantization took from its weight. Pass errors=, such as "
                "QuantizationErrors(model, stats.targets)."
            )
        error, target = self.errors[name], self.stats.targets[name]  # `QuantizationErrors` computes it on this access
        shape = [target.out_features, target.in_features]
        if list(error.shape) != shape or not bool(error.isfinite().all()):
            raise LoraInitError(f"layer {name!r}: its error is {list(error.shape)}, expected {shape}, all finite.")
        return error.to(torch.promote_types(error.dtype, torch.float32))  # 16 bits are too few for a decomposition


@dataclass(frozen=True, eq=False)
class LayerToStart:
    """What is known of a layer, or of one of its experts, when it is started; `PROVIDERS` reads it."""

    context: BuildContext
    target: Target
    part: str  # the name of the layer or of an expert, by which random numbers are drawn
    spectrum: Spectrum  # of the rows that it, or the expert, reads
    rank: int
    error: Tensor | None  # W - Q, [d_out, d_in]

    @property
    def width(self) -> int:
        """Width d_in of what it reads."""
        return self.spectrum.components.shape[1]

    @property
    def generator(self) -> torch.Generator:
        """Source of random numbers of its own."""
        return layer_generator(self.context.seed, self.part)

    @property
    def weight(self) -> Tensor:
        """The matrix that it multiplies by, float32 [d_out, d_in], on the CPU."""
        if self.context.model is None:
            raise LoraInitError(f"layer {self.target.name!r}: the start is made from its weight. Pass model=.")
        model = unwrapped(self.context.model)
        module, dtype = plain_names(model)[self.target.module], getattr(model, "dtype", torch.float32)
        return read_product(module, self.target, dtype, f"layer {self.target.name!r}").cpu()


# The size of A. With B = 0 and Adam, the first steps move every entry of B by the learning rate, so the output moves by
# the rate times the size of A x. Rows of length one along the data make A x about ten times as large as `random`
# does, and a rate that is right for one start is then wrong for the other. So all starts get the size of `random`,
# and differ in their directions alone.
def layer_start(context: BuildContext, name: str, rank: int, error: Tensor | None) -> LoraWeights:
    """Compute A and B of a layer; with experts A and B of each, side by side.

    Where B is zero A x has the size that it has with `random`, unless the start has one of its own or with `unit_rows`.
    """
    start, target = context.start, context.stats.targets[name]
    starts_a, starts_b = [], []  # of the layer, or of each of its experts
    for part, spectrum in _spectra_of(context.stats, name).items():
        layer = LayerToStart(context, target, part, spectrum, rank, error)
        a, b = _call_function(start, layer)
        starts_a.append(a)
        starts_b.append(b)
        if start.b_is_zero and not (start.matched or context.shape.unit_rows):
            starts_a[-1] = as_large_as_random(spectrum, a)
    shape_a, shape_b = target.shapes(rank)
    if start.b_is_zero:
        return LoraWeights(torch.cat(starts_a).reshape(shape_a), torch.zeros(shape_b))
    # experts x r x d_in, experts x d_out x r -> experts * r x d_in, d_out x r * experts
    a, b = LoraWeights(torch.stack(starts_a), torch.stack(starts_b)).fused()
    weights = LoraWeights(a.reshape(shape_a), b.reshape(shape_b))  # kernels of convolutions have more axes
    if context.shape.gamma is None:
        return weights
    return scaled_by_gamma(weights, context.shape.gamma)


def _spectra_of(stats: Statistics, name: str) -> dict[str, Spectrum]:
    """Return the spectrum of a layer by its name, or the spectra of its experts by their names."""
    spectra = {expert_group(name, i): spectrum for i, spectrum in enumerate(stats.of_experts(name))}
    return spectra or {name: stats[name]}


def _call_function(start: Start, layer: LayerToStart) -> LoraWeights:
    """Call the function of a start; refuse what it raises or returns in a line that names it. B is empty where zero."""
    where = f"layer {layer.target.name!r}: {start}"
    try:
        returned = start.compute(**{name: PROVIDERS[name].read(layer) for name in start.arguments})
    except (LoraInitError, KeyboardInterrupt):
        raise
    except BaseException as error:  # a module that is imported for it may call sys.exit
        if is_out_of_memory(error):
            raise
        raise LoraInitError(f"{where}: its function raised {type(error).__name__}: {first_line(error)}") from error
    expected, what = [[layer.rank, layer.width]], "A"
    if not start.b_is_zero:
        expected.append([layer.target.out_features, layer.rank])
        what = "A and B"
    values = (returned,)
    if isinstance(returned, tuple):
        values = returned
    got: list[Any] = []  # shapes, and the types of what has none: another package may return anything
    for value in values:
        if isinstance(value, Tensor):
            got.append(list(value.shape))
        else:
            got.append(type(value).__name__)
    if got != expected:
        remedy = ""
        if start.b_is_zero and len(got) == 2:
            remedy = " To return A and B, set b_is_zero=False in its Start."
        raise LoraInitError(f"{where}: its function returned {got}, expected {what} of shape {expected}.{remedy}")
    # Finite after the conversion: float64 has numbers that float32 has not.
    a, b = (tensor.detach().float() for tensor in (*values, torch.empty(0))[:2])
    if not bool(a.isfinite().all() and b.isfinite().all()):
        raise LoraInitError(f"{where}: its function returned NaN or inf, or what is too large for float32.")
    return LoraWeights(a, b)
