"""Intruder dimensions: leading directions of trained weights that the plain weights did not have."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_init.adapters.directory import AdapterDirectory
from lora_init.adapters.peft_model import adapter_layers, as_it_was, check_plain, with_adapter
from lora_init.errors import LoraInitError, require_version
from lora_init.layers.targets import PREFIX, is_conv1d, is_linear
from lora_init.serving.base import is_transposed
from lora_init.serving.trained import Trained

# From here on the first k singular vectors come from Lanczos steps, which take an eighth of the time of all of them.
_SMALL = 128
K, THRESHOLD = 10, 0.5  # as PEFT has them


@dataclass(frozen=True)
class LayerIntruders:
    """The first singular vectors of one trained weight, next to the singular vectors of the plain weight."""

    similarities: tuple[float, ...]  # of each of the first k left vectors, the largest |cosine| with any plain one
    energies: tuple[float, ...]  # their singular values squared
    threshold: float  # those less similar than this are intruders

    @property
    def of(self) -> int:
        """Number k of vectors looked at."""
        return len(self.similarities)

    @property
    def count(self) -> int:
        """Number of intruders among them."""
        return sum(similarity < self.threshold for similarity in self.similarities)

    @property
    def energy_share(self) -> float:
        """Energy of the intruders over the energy of all vectors looked at, in [0, 1]."""
        pairs = zip(self.similarities, self.energies, strict=True)
        of_intruders = [energy for similarity, energy in pairs if similarity < self.threshold]
        return sum(of_intruders) / (sum(self.energies) or 1.0)  # weights of zeros have no energy, and no intruders


@dataclass(frozen=True, eq=False)
class Intruders:
    """The intruder dimensions of an adapter.

    Attributes:
        layers: Every linear layer that has an adapter, by its name in the plain model.
        skipped: Layers with an adapter that are no linear layers, name to kind.
    """

    layers: Mapping[str, LayerIntruders]
    skipped: Mapping[str, str]

    @property
    def count(self) -> int:
        """Number of intruders in all layers."""
        return sum(layer.count for layer in self.layers.values())

    @property
    def of(self) -> int:
        """Number of vectors examined in all layers."""
        return sum(layer.of for layer in self.layers.values())

    @property
    def energy_share(self) -> float:
        """Energy of the intruders of all layers over the energy of all vectors, in [0, 1]."""
        totals, of_intruders = [], []
        for layer in self.layers.values():
            totals.append(sum(layer.energies))
            of_intruders.append(layer.energy_share * sum(layer.energies))
        return sum(of_intruders) / (sum(totals) or 1.0)


def intruder_dimensions(
    model: nn.Module,
    adapter: str | Path | None = None,
    *,
    base: Mapping[str, Tensor] | None = None,
    k: int = K,
    threshold: float = THRESHOLD,
) -> Intruders:
    """Count the intruder dimensions of trained weights ("An Illusion of Equivalence", arXiv 2410.21228).

    Among the first k left singular vectors of W = W0 + scaling * B A, those whose largest |cosine| with any left
    singular vector of W0 is below the threshold: the criterion of PEFT's `reduce_intruder_dimension`. Full fine-tuning
    makes few intruders, LoRA makes many, and more at higher learning rates; models that have many also forget more.

    Cost: all singular vectors of each W0 once, 16 s on one core for the 210 layers of a 135M model, unless `base` has
    them; then Lanczos steps for k vectors and one thin product a layer, 3 s for the same model. Memory: with `base` a
    float32 [d_out, min(d_out, d_in)] for each layer, 340 MB for that model; without, one layer at a time.

    Args:
        model: A PeftModel; or, with `adapter`, the plain model, which is restored afterwards.
        adapter: An adapter directory.
        base: What `left_singular_vectors` returned for the plain model. Needed for a PeftModel whose start changed the
            plain weights (PiSSA, OLoRA, CorDA): W0 is otherwise taken to be what is left of them.
        k: Number of vectors to examine in each layer.
        threshold: A direction is an intruder if its largest |cosine| is below this.

    Raises:
        LoraInitError: No LoRA adapter or a merged one, weights that are quantized or have NaN or inf, a layer that
            `base` lacks, or as `load_adapter`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from peft import LoraConfig, get_peft_model
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> peft_model = get_peft_model(model, LoraConfig(r=1, target_modules=["0"]))
        >>> found = intruder_dimensions(peft_model, k=4)
        >>> found.count, found.of
        (0, 4)
    """
    if k < 1 or not 0.0 < threshold <= 1.0:
        raise LoraInitError(f"k={k}, threshold={threshold}; expected at least 1, and a cosine above 0.")
    if adapter is None:
        return _examine(model, base, k, threshold)
    check_plain(model, "intruder_dimensions()")
    directory = AdapterDirectory(adapter)
    # Loading an adapter that began as PiSSA or the like takes the plain weights apart again: PEFT repeats the start
    # that the configuration names.
    own_weights = isinstance(directory.config.get("init_lora_weights"), str)
    if not own_weights:
        directory.check_fits_plain_base()
    if own_weights and base is None:
        # Before the adapter is loaded, while the weights are still the plain ones.
        modules = dict(model.named_modules())
        linear = [name for name in directory.layers if name in modules and is_linear(modules[name])]
        base = left_singular_vectors(model, linear)
    with with_adapter(model, directory) as peft_model:
        return _examine(peft_model, base, k, threshold)


def left_singular_vectors(model: nn.Module, layers: Iterable[str]) -> dict[str, Tensor]:
    """Compute left singular vectors of plain weights, columns, float32 [d_out, min(d_out, d_in)], on the CPU."""
    vectors = {}
    for name in layers:
        vectors[name] = torch.linalg.svd(_weight(model.get_submodule(name), name), full_matrices=False).U
    return vectors


def _examine(model: nn.Module, base: Mapping[str, Tensor] | None, k: int, threshold: float) -> Intruders:
    from peft import PeftModel

    if not isinstance(model, PeftModel) or not adapter_layers(model):
        raise LoraInitError(
            f"{type(model).__name__} has no LoRA adapter. Give a PeftModel, or the model and an adapter directory."
        )
    layers, skipped = {}, {}
    for name, layer in adapter_layers(model).items():
        plain = layer.get_base_layer()
        if not is_linear(plain):
            skipped[name] = type(plain).__name__
            continue
        if base is not None and name not in base:
            raise LoraInitError(
                f"layer {name!r} has an adapter, and {{base}} has no singular vectors for it.", base=...
            )
        before = torch.linalg.svd(_weight(plain, name), full_matrices=False).U if base is None else base[name]
        vectors, values = _leading(_trained_weight(layer, name), k)
        # Absolute, since a singular vector has no sign. [d_out, k] and [d_out, min(d_out, d_in)] -> [k]
        cosines = (vectors.T @ before).abs().amax(dim=1)
        layers[name] = LayerIntruders(tuple(cosines.tolist()), tuple(values.double().square().tolist()), threshold)
    return Intruders(layers, skipped)


def _weight(layer: nn.Module, name: str) -> Tensor:
    """Read a linear layer's weight as float32 [d_out, d_in] on the CPU."""
    weight: Any = layer.weight
    if not isinstance(weight, Tensor) or type(weight) is not nn.Parameter or not weight.is_floating_point():
        raise LoraInitError(
            f"layer {name!r} is quantized, and singular vectors need its plain weights. Load it in float."
        )
    matrix: Tensor = weight.detach().float().cpu()
    if not bool(matrix.isfinite().all()):
        raise LoraInitError(
            f"layer {name!r}: its weights have NaN or inf, so they have no singular vectors. If the training diverged, "
            "take an earlier checkpoint."
        )
    return matrix.T if is_conv1d(layer) else matrix


def _trained_weight(layer: Any, name: str) -> Tensor:
    """Merge the active adapter into a copy of the layer: whatever PEFT does there, DoRA included, is in the result."""
    _weight(layer.get_base_layer(), name)  # refuses a quantized weight, before it is copied
    if layer.merged:
        raise LoraInitError(f"layer {name!r}: the adapter is merged already. Call unmerge_adapter() first.")
    merged = copy.deepcopy(layer).float()  # in bfloat16 a merge would round small changes away
    merged.merge()
    return _weight(merged.get_base_layer(), name)


def _leading(weight: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Compute the first k left singular vectors, columns [d_out, k], and singular values, falling, [k]."""
    if min(weight.shape) < max(_SMALL, 2 * k) or not weight.any():  # zeros have no direction for them to find
        u, s, _ = torch.linalg.svd(weight, full_matrices=False)
        return u[:, :k], s[:k]
    from scipy.sparse.linalg import svds

    # Lanczos begins with a random vector, and with `rng=0` with the same one each time.
    u, s, _ = svds(weight.numpy(), k=k, rng=0, return_singular_vectors="u")  # rising, so both are turned round
    return torch.from_numpy(u[:, ::-1].copy()), torch.from_numpy(s[::-1].copy())


def without_intruders(trained: Trained, directory: Path, model: nn.Module) -> tuple[Trained, tuple[int, int]]:
    """Let PEFT take most of the intruder dimensions out of the adapter, and count them before and after.

    The model is wrapped meanwhile, and restored afterwards.
    """
    if not isinstance(model, nn.Module):
        raise LoraInitError(f"reduce_intruders= takes the base model and got {type(model).__name__}. Load it first.")
    require_version("peft", "0.19", "reduce_intruders")
    from peft import PeftModel, get_peft_model_state_dict
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    if trained.others or trained.dora or any(layer.experts for layer in trained.layers.values()):
        raise LoraInitError("intruders are reduced in plain LoRA only, without DoRA, modules_to_save and experts.")
    modules = dict(model.named_modules())
    for name in trained.layers:
        if name in modules and is_transposed(modules[name]):  # PEFT takes its weight for a linear layer's
            kind = type(modules[name]).__name__
            raise LoraInitError(f"layer {name!r} is a {kind}: PEFT reduces linear layers alone.")

    with as_it_was(model):
        peft_model = PeftModel.from_pretrained(model, str(directory))
        before = intruder_dimensions(peft_model).count
        reduce_intruder_dimension(peft_model, "default", "reduced", logging_sink=None)  # type: ignore[no-untyped-call]
        counts = before, intruder_dimensions(peft_model).count  # of "reduced", which PEFT has made the active one
        state = get_peft_model_state_dict(peft_model, adapter_name="reduced", save_embedding_layers=False)
    layers = {}
    for name, layer in trained.layers.items():
        a, b = (state[f"{PREFIX}{name}.{end}"].cpu().to(layer.a.dtype) for end in layer.ends)  # PEFT loads float32
        layers[name] = replace(layer, a=a, b=b)
    return replace(trained, layers=layers), counts
