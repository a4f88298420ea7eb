"""An adapter directory as PEFT reads it: A, B and a scaling for each layer, whatever its patterns say."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_init.adapters.directory import (
    CONFIG_FILE,
    ORIGIN,
    WEIGHTS_FILE,
    AdapterDirectory,
    carried,
    is_zero_update,
    start_digest,
)
from lora_init.errors import LoraInitError, first_line
from lora_init.files import is_as_written, read_json
from lora_init.layers.grid import place_of
from lora_init.layers.targets import PREFIX, Target, file_prefixes
from lora_init.loading.models import QUANTIZATIONS
from lora_init.planning.lora_config import from_patterns, lora_config, scaling_of
from lora_init.starts.weights import LoraWeights

DIAL_FILE = "dial.json"  # what the dial says of the strengths that it wrote an adapter at
_PART = re.compile(rf"{re.escape(PREFIX)}(?P<name>.+?)\.(?P<part>lora_.+)")
# Ends of the names of A and B in the file.
LINEAR, EMBEDDING = ("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")
MAGNITUDE = "lora_magnitude_vector"
# Variants of LoRA whose update is not scaling * B A.
OTHER_UPDATES = ("arrow_config", "kasa_config", "layer_replication", "monteclora_config", "use_bdlora", "use_qalora")
# What a config says about more than rank, scaling and layers, and an engine or PEFT needs to know.
_KEPT_KEYS = (
    "alora_invocation_tokens", "auto_mapping", "bias", "ensure_weight_tying", "fan_in_fan_out", "lora_bias",
    "lora_dropout", "modules_to_save", "revision", "task_type", "trainable_token_indices", "use_dora",
)  # fmt: skip
_TYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16}  # what A and B may have
# What numbers and patterns of a damaged config end in.
_DAMAGE = (TypeError, AttributeError, ValueError, OverflowError, re.error)


@dataclass(frozen=True, eq=False)
class Layer:
    """The adapter of one linear layer, embedding, or parameter, such as fused experts."""

    a: Tensor  # what reads the input, [r, d_in]; of a parameter one for each expert, [experts, r, d_in]
    b: Tensor  # what writes the output, [d_out, r] or [experts, d_out, r]
    scaling: float  # what B A is multiplied by
    ends: tuple[str, str] = LINEAR  # ends of the names of A and B in the file
    magnitude: Tensor | None = None  # DoRA's length of each output's weights, [d_out]

    @property
    def weights(self) -> LoraWeights:
        """A and B."""
        return LoraWeights(self.a, self.b)

    @property
    def rank(self) -> int:
        """Number of rows of A, of each expert."""
        return int(self.a.shape[-2])

    @property
    def experts(self) -> int:
        """Number of experts of a parameter, at least 1; 0 for a layer."""
        return len(self.a) if self.a.dim() == 3 else 0

    @property
    def widths(self) -> tuple[int, int]:
        """Widths d_in and d_out."""
        return int(self.a.shape[-1]), int(self.b.shape[-2])

    def padded(self, rank: int) -> Layer:
        """Append zero rows to A and zero columns to B, which changes nothing."""
        more = rank - self.rank
        # `pad` counts from the last axis, two numbers each: A [r, d_in] grows in its first, B [d_out, r] in its last.
        return replace(self, a=F.pad(self.a, (0, 0, 0, more)), b=F.pad(self.b, (0, more)))

    def rescaled(self, scaling: float) -> Layer:
        """Multiply B so that the layer does the same under another scaling; it is float32 until it is written."""
        if scaling == self.scaling:  # B stays in its type, bit for bit
            return self
        return replace(self, b=self.b.float() * (self.scaling / scaling), scaling=scaling)


@dataclass(frozen=True, eq=False)
class Trained:
    """What an adapter directory holds."""

    config: Mapping[str, Any]  # adapter_config.json
    layers: Mapping[str, Layer]  # the adapter of each layer, by the name of the layer or parameter in the plain model
    # further tensors by their full names: of modules that were trained whole, and the like
    others: Mapping[str, Tensor]
    # weights of the base that PEFT stores with adapters of an embedding or head, by their full names
    copies: Mapping[str, Tensor] = field(default_factory=dict)
    # with `target_parameters`, the tensors of all adapters by the names in the file, and no `layers`: which
    # parameters they are for, only the model tells. `with_parameters` takes them from here
    unnamed: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    @property
    def base(self) -> str:
        """Directory or hub id of the base model, as the adapter names it; may be empty."""
        return str(self.config.get("base_model_name_or_path") or "")

    @property
    def quantized(self) -> str:
        """How the base was quantized as it was loaded for lora_init, such as "nf4"; empty if it was not."""
        provenance = carried(self.config).get("provenance")
        if not isinstance(provenance, dict):  # as of an adapter that lora_init did not make, or of an edited file
            return ""
        settings = provenance.get("quantisation")
        if not isinstance(settings, dict):
            return ""
        for name, how in QUANTIZATIONS.items():
            if how.items() <= settings.items():
                return name
        return ""

    @property
    def adds_nothing(self) -> bool:
        """Whether B A is zero in every layer, as before training."""
        return all(not layer.scaling or is_zero_update(layer.a, layer.b) for layer in self.layers.values())

    @property
    def scaling(self) -> float:
        """The scaling of the first layer, which all have after `with_one_scaling`."""
        return next(iter(self.layers.values())).scaling

    @property
    def rank(self) -> int:
        """The largest rank of a layer."""
        return max(layer.rank for layer in self.layers.values())

    @property
    def update_size(self) -> float:
        """Frobenius norm of scaling * B A, of all layers at once."""
        # |B A|^2 is the trace of (B^T B)(A A^T): two r x r matrices, and never one of d_out x d_in. Experts add up.
        squares = 0.0
        for layer in self.layers.values():
            a, b = layer.a.double(), layer.b.double()
            squares += layer.scaling**2 * float(((b.mT @ b) * (a @ a.mT)).sum())
        return math.sqrt(max(squares, 0.0))  # rounding may leave a sum of zeros just below zero

    @property
    def n_parameters(self) -> int:
        """Numbers in all A and B."""
        return sum(layer.a.numel() + layer.b.numel() for layer in self.layers.values())

    @property
    def other_shapes(self) -> dict[str, Sequence[int]]:
        """Shapes of the further tensors, by their full names."""
        return {key: tensor.shape for key, tensor in self.others.items()}

    def layers_beside(self, other: Trained) -> list[str]:
        """Name the layers that have an adapter here and none in another."""
        return [name for name in self.layers if name not in other.layers]

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by their full names."""
        tensors = dict(self.others)
        targets = [Target(name, "", *layer.widths, experts=layer.experts) for name, layer in self.layers.items()]
        for name, prefix in file_prefixes(targets).items():
            layer = self.layers[name]
            weights = LoraWeights(layer.a, layer.b.to(layer.a.dtype))  # B may be float32, see `Layer.rescaled`
            if layer.experts:
                weights = weights.fused()
            for end, tensor in zip((*layer.ends, MAGNITUDE), (*weights, layer.magnitude), strict=True):
                if tensor is None:
                    continue
                if not bool(tensor.isfinite().all()):  # B was rescaled beyond the largest number of its type
                    raise LoraInitError(
                        f"layer {name!r}: {tensor.dtype} cannot hold it under one scaling for all layers."
                    )
                tensors[f"{prefix}.{end}"] = tensor.contiguous()
        return tensors

    @property
    def dora(self) -> bool:
        """Whether a layer has a magnitude."""
        return any(layer.magnitude is not None for layer in self.layers.values())

    def with_one_scaling(self) -> Trained:
        """Bring every layer to the scaling that most have; what differs is multiplied into B.

        Engines read one scaling for all layers, whatever patterns say.
        """
        scaling = Counter(layer.scaling for layer in self.layers.values()).most_common(1)[0][0]
        return replace(self, layers={name: layer.rescaled(scaling) for name, layer in self.layers.items()})


def read_trained(
    directory: str | Path, start: str | Path | None = None, renames: Mapping[str, str] = MappingProxyType({})
) -> Trained:
    """Read an adapter directory; `start` is the same adapter before training, which `subtract` takes off.

    `renames` has other names for tensors of the file. Ranks and alphas are those that patterns give to the names there.
    """
    adapter = AdapterDirectory(directory)
    config, directory = adapter.config, adapter.path
    if renames:
        config = _with_renamed_patterns(config, adapter.shapes, renames)
    _check_config(config, directory)
    parts: dict[str, dict[str, Tensor]] = {}  # by layer, and by the end of the name in the file
    others = {}
    for key, tensor in adapter.tensors().items():
        new = renames.get(key, key)
        match = _PART.fullmatch(new)
        if match is None:
            others[new] = tensor
        else:
            parts.setdefault(match["name"], {})[match["part"]] = tensor
    path = directory / WEIGHTS_FILE
    if not parts:
        hint = "`lora-init inspect ADAPTER --base MODEL` looks for the names that fit."
        raise LoraInitError(f"{path} holds no lora_A, so there is no adapter to export. {hint}")
    # With the adapter of an embedding PEFT stores the base's own weight, which training has not changed.
    copies = {}
    for name in parts:
        key = f"{PREFIX}{name}.base_layer.weight"
        if key in others:
            copies[key] = others.pop(key)
    trained = Trained(config, {}, others, copies, parts)
    for name, tensors in parts.items():
        _check_pair(name, tensors, path)
    if not config.get("target_parameters"):  # else only the model tells which parameters the tensors are for
        trained = with_parameters(trained, {})
    _check_conversion(trained, adapter.origin, directory)
    if start is None:
        adapter.check_fits_plain_base()
    return trained


def _check_config(config: Mapping[str, Any], directory: Path) -> None:
    """Refuse an adapter of another kind than is exported, and names of parameters that are no list."""
    for key in OTHER_UPDATES:
        if config.get(key):
            raise LoraInitError(
                f"{directory} was trained with {key}; only plain LoRA, rsLoRA and DoRA are exported. Call PEFT's "
                "merge_and_unload() and serve the model that it returns."
            )
    parameters = config.get("target_parameters") or []
    if not isinstance(parameters, list) or not all(isinstance(name, str) for name in parameters):
        raise LoraInitError(f"{directory / CONFIG_FILE} is damaged: target_parameters is no list of names.")


def _with_renamed_patterns(
    config: Mapping[str, Any], keys: Iterable[str], renames: Mapping[str, str]
) -> dict[str, Any]:
    """Write patterns for the new names of layers: with the values that old patterns give the old name, else the new.

    A pattern of a renamed layer would match nothing, and one that was written for the new names fits already.
    """
    names: dict[str, str] = {}  # of layers, old to new
    for key in keys:
        old, new = _layer_of(key), _layer_of(renames.get(key, key))
        if old and new:
            names[old] = new
    # Patterns name the parameters of experts. The file names their module, once for each `.base_layer`.
    for parameter in config.get("target_parameters") or ():
        end = str(parameter).rpartition(".")[2]
        for old, new in [*names.items()]:
            names[f"{old.replace('.base_layer', '')}.{end}"] = f"{new.replace('.base_layer', '')}.{end}"
    written: dict[str, dict[str, Any]] = {}
    for pattern, default in (("rank_pattern", config.get("r", 8)), ("alpha_pattern", config.get("lora_alpha", 8))):
        by_old = from_patterns(config.get(pattern), [*names], None)
        by_new = from_patterns(config.get(pattern), [*names.values()], default)
        written[pattern] = {}
        for old, new in names.items():
            value = by_new[new] if by_old[old] is None else by_old[old]
            written[pattern][f"^{re.escape(new)}"] = value
    return {**config, **written}


def _layer_of(key: str) -> str | None:
    """Return the name of the layer that an A is of."""
    for end in (".lora_A", ".lora_embedding_A"):
        if end in key:
            return key.partition(end)[0].removeprefix(PREFIX)
    return None


def _check_pair(name: str, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse what is no A and B of a linear layer or embedding, or of parameters."""
    problem = _problem_of(tensors)
    if problem:
        raise LoraInitError(f"{path}: layer {name!r} {problem}")


def _problem_of(tensors: Mapping[str, Tensor]) -> str:
    """Describe why the tensors of a layer are no A and B; empty if they are."""
    ends = ends_of(tensors)
    for end in ends:
        if end not in tensors:
            # PEFT loads names with the adapter's own name in them, as the parameters of a model have it.
            for other in tensors:
                if other.startswith(end.removesuffix("weight")):
                    return f"has {other} for {end}. `lora-init export --rename` writes names that fit."
            return f"has no {end}. The adapter is incomplete; save it again."
    for end in tensors:
        if end not in (*ends, MAGNITUDE):
            return f"has {end}, which no plain LoRA has. Only lora_A and lora_B are read."
    if tensors[ends[0]].dim() > 2:
        return (
            "is a convolution, which the engines read no adapter of. Call PEFT's merge_and_unload() and serve the "
            "model that it returns."
        )
    for tensor in tensors.values():
        if tensor.dtype not in _TYPES:
            return f"is {tensor.dtype}, and A and B are float32, float16 or bfloat16. Save it again in one of these."
    for tensor in tensors.values():
        if not tensor.isfinite().all():
            return "holds NaN or infinite numbers: its training went wrong. Save a checkpoint from before."
    return ""


def ends_of(tensors: Mapping[str, Tensor]) -> tuple[str, str]:
    """Return how the names of A and B end among the tensors of one layer."""
    return LINEAR if tensors.keys().isdisjoint(EMBEDDING) else EMBEDDING


def with_parameters(trained: Trained, parameters: Mapping[str, Target]) -> Trained:
    """Name the layers by what `target_parameters` selects, and shape their tensors to one A and B for each expert."""
    if not trained.unnamed:
        return trained
    for name, target in parameters.items():
        if name not in trained.unnamed:
            raise LoraInitError(
                f"target_parameters selects {target.name!r}, and {WEIGHTS_FILE} holds nothing for it. The adapter is "
                "incomplete; save it again."
            )
    layers = {}
    targets = {name: Target(name, "", 0, 0) for name in trained.unnamed if name not in parameters} | dict(parameters)
    try:
        ranks, alphas = _ranks_and_alphas(trained.config, [target.name for target in targets.values()])
        for name, target in targets.items():
            # The weight of a linear layer, selected as a parameter, is adapted as the layer is.
            layer = _layer(target, trained.unnamed[name], ranks[target.name], alphas[target.name], trained.config)
            layers[target.name if target.experts else name] = layer
    except LoraInitError:
        raise
    except _DAMAGE as error:
        raise LoraInitError(f"{CONFIG_FILE} is damaged: {first_line(error)}") from error
    return replace(trained, layers=layers, unnamed={})


def _ranks_and_alphas(config: Mapping[str, Any], names: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    ranks = from_patterns(config.get("rank_pattern"), names, config.get("r", 8))  # 8 is PEFT's default of both
    alphas = from_patterns(config.get("alpha_pattern"), names, config.get("lora_alpha", 8))
    return ranks, alphas


def _layer(target: Target, tensors: Mapping[str, Tensor], rank: int, alpha: float, config: Mapping[str, Any]) -> Layer:
    ends, experts = ends_of(tensors), target.experts
    a, b = tensors[ends[0]], tensors[ends[1]]
    # PEFT's layout of fused experts is two-dimensional, too: A [experts * r, d_in] and B [d_out, r * experts].
    if not a.dim() == b.dim() == 2 or not a.shape[0] == b.shape[1] == rank * max(experts, 1):
        each = f" for each of {experts} experts" if experts else ""
        raise LoraInitError(
            f"layer {target.name!r}: A is {list(a.shape)} and B {list(b.shape)}, and {CONFIG_FILE} says rank "
            f"{rank}{each}. The two files are not of one adapter."
        )
    if experts:
        a, b = LoraWeights(a, b).of_experts(experts)
    scaling = scaling_of(alpha, rank, bool(config.get("use_rslora")))
    if not 1e-30 < abs(scaling) < 1e30:  # with room in float32 for lora_alpha at any rank
        raise LoraInitError(
            f"layer {target.name!r}: lora_alpha is {alpha}, expected between 1e-30 and 1e30 times rank."
        )
    return Layer(a, b, scaling, ends, tensors.get(MAGNITUDE))


def scalings(config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
    """Compute what PEFT multiplies B A by, for each layer of a rank above 0."""
    try:
        _, alphas = _ranks_and_alphas(config, [name for name, rank in ranks.items() if rank])
        return {name: scaling_of(alpha, ranks[name], bool(config.get("use_rslora"))) for name, alpha in alphas.items()}
    except _DAMAGE as error:
        raise LoraInitError(f"{CONFIG_FILE} is damaged: {first_line(error)}") from error


def _check_conversion(trained: Trained, origin: Mapping[str, Any], directory: Path) -> None:
    """Check that what PEFT converted ends in its own start, and begins with what was trained.

    PEFT loads the start as an adapter named after its directory. If the trained one has that name, the start takes its
    place, and what is saved adds nothing.
    """
    own = origin.get("start")
    # A conversion doubles the rank: an adapter with the rank of its start was not converted.
    if own is None or trained.config.get("r") == origin.get("rank"):
        return
    first, second = {}, {}
    for name, layer in trained.layers.items():
        # A [2r, d_in] is the trained A above the start's, B [d_out, 2r] the trained B beside the start's negative.
        a, b = layer.a.chunk(2), layer.b.chunk(2, dim=1)
        first[name], second[name] = LoraWeights(a[0], b[0]), LoraWeights(a[-1], -b[-1])
    if start_digest(second) != own:
        raise LoraInitError(f"{directory} was converted from another start than its own. Export what was trained anew.")
    if start_digest(first) == own:
        raise LoraInitError(
            f"{directory} adds nothing: it was never trained, or converted from a directory with the adapter's own "
            "name, from which PEFT put the start in its place. Save it without a conversion, and name the start by "
            "{start}.",
            start=...,
        )


def subtract(trained: Trained, start: Trained, origin: Mapping[str, Any], where: str) -> Trained:
    """Append the adapter as it was before training with the opposite sign, which doubles the rank.

    On the plain base, which lacks nothing, only the difference of both is what was learned: s (B A - B0 A0).
    """
    if trained.dora:
        raise LoraInitError("{start}: an adapter with DoRA cannot give up what it began with.", start=where)
    digest = start_digest({name: layer.weights for name, layer in start.layers.items()})
    if origin.get("start", "") not in ("", digest):  # older directories may lack the hash
        raise LoraInitError(
            "{start} holds other numbers than those that this adapter began with. Name what was saved right "
            "before its training.",
            start=where,
        )
    layers = {}
    for name, layer in trained.layers.items():
        before = start.layers.get(name)
        if before is None or (before.widths, before.experts) != (layer.widths, layer.experts):
            raise LoraInitError(f"{{start}} has no layer {name!r} of these widths. It is another's start.", start=where)
        opposite = -before.rescaled(layer.scaling).b
        # A [r, d_in] -> [2r, d_in], B [d_out, r] -> [d_out, 2r], of each expert
        layers[name] = replace(layer, a=torch.cat([layer.a, before.a], -2), b=torch.cat([layer.b, opposite], -1))
    return replace(trained, layers=layers)


def config_of(trained: Trained, target_modules: Collection[str]) -> dict[str, Any]:
    """Describe layers of one scaling for PEFT: by `r` and `lora_alpha`, and by patterns only where ranks differ.

    Parameters of experts get their full names in `target_parameters`, which PEFT has patterns for too.
    """
    config = trained.config
    kept = {key: config[key] for key in _KEPT_KEYS if key in config}
    if ORIGIN in (kept.get("auto_mapping") or {}):  # says how training began, for PEFT nothing
        del kept["auto_mapping"]
    return lora_config(
        {name: layer.rank for name, layer in trained.layers.items()},
        trained.rank,
        trained.scaling,
        target_modules,
        **kept,
        target_parameters=[name for name, layer in trained.layers.items() if layer.experts],
        base_model_name_or_path=trained.base,
        inference_mode=True,
    )


def zero_layers(trained: Trained, widths: Mapping[str, tuple[int, int]]) -> dict[str, Layer]:
    """Make adapters that add nothing for layers without one, of those kinds that have one in another block."""
    # TGI and LoRAX drop a kind of layers everywhere if one of them has no adapter.
    kinds = {place_of(name)[0] for name, layer in trained.layers.items() if layer.ends == LINEAR}
    zeros = next(iter(trained.layers.values())).a.new_zeros
    layers = {}
    for name, (d_in, d_out) in widths.items():
        if place_of(name)[0] not in kinds or name in trained.layers:
            continue
        # A bias that was trained is read under its name only in a layer without an adapter.
        if f"{PREFIX}{name}.bias" not in trained.others:
            layers[name] = Layer(zeros(1, d_in), zeros(d_out, 1), trained.scaling)
    return layers


def strength_of(dial: Mapping[str, Any]) -> str:
    """Put the strengths that a `Dial` chose, as plain values, into words."""
    chosen, by_layer = dial["chosen"], dial["chosen"]["layers"].values()
    if chosen["weight"] is None:
        return f"{chosen['strength']:g} in all layers"
    least, most = min(by_layer), max(by_layer)
    return f"one for each of {len(by_layer)} layers, {least:.2f} to {most:.2f}, mean {chosen['strength']:.2f}"


def note_of(directory: Path) -> tuple[str, ...]:
    """Return a note on the strength that the dial gave an adapter; empty unless the dial wrote it."""
    if not is_as_written(directory, DIAL_FILE):
        return ()
    return (f"its strength is the dial's: {strength_of(read_json(directory / DIAL_FILE))}",)
