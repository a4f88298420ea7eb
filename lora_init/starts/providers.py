"""What the function of a start may ask for, by the names of its parameters. Importing this file imports no torch.

From these names follows what must be at hand before: a pass over data, gradients, or the weights of the base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Provider:
    """Where an argument comes from."""

    read: Callable[[Any], Any]  # finds it for a layer, see `layer_start.LayerToStart`
    needs: str = "nothing"  # what must be at hand


PROVIDERS: Mapping[str, Provider] = {
    "spectrum": Provider(lambda layer: layer.spectrum, "inputs"),  # a `Spectrum` of what the layer reads
    # A `GradientSpectrum`.
    "gradient": Provider(lambda layer: layer.context.stats.gradient(layer.target.name), "gradients"),
    "error": Provider(lambda layer: layer.error, "errors"),  # W - Q of a quantized layer, [d_out, d_in]
    "weight": Provider(lambda layer: layer.weight, "weights"),  # what the layer multiplies by, float32 [d_out, d_in]
    "width": Provider(lambda layer: layer.width),  # d_in
    "rank": Provider(lambda layer: layer.rank),
    "scaling": Provider(lambda layer: layer.context.scaling),  # what B A is multiplied by
    "whiten": Provider(lambda layer: layer.context.shape.whiten),
    "generator": Provider(lambda layer: layer.generator),  # a `torch.Generator` of this layer
}
