"""From statistics and ranks to an adapter."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_init.adapters.adapter_init import AdapterInit
from lora_init.adapters.config import read_config_for
from lora_init.adapters.directory import check_place
from lora_init.adapters.init_config import SCALING, Shape
from lora_init.building.layer_start import BuildContext, layer_start
from lora_init.errors import LoraInitError, check_number, did_you_mean, warn
from lora_init.layers.targets import Target, is_in
from lora_init.planning.limits import whole_number
from lora_init.planning.lora_config import alpha_for
from lora_init.planning.plan import RankAllocation
from lora_init.rates.learning_rate import Response, response
from lora_init.starts.initializers import check_rank, energies, error_seen
from lora_init.starts.starts import DEFAULT, STARTS, Start, buildable, find_start
from lora_init.starts.weights import Weights
from lora_init.statistics.spectrum import Spectrum
from lora_init.statistics.statistics import Statistics

if TYPE_CHECKING:
    from peft import LoraConfig


def check_adapter_options(
    start: Start, shape: Shape, output: str | Path | None = None, overwrite: bool = False
) -> None:
    """Validate the form of an adapter before any data are read, and the directory `output` if it will be saved."""
    _check_gamma(start, shape.gamma)
    if shape.use_dora and not start.b_is_zero:
        raise LoraInitError(
            "{method} starts with B other than zero, and DoRA's magnitudes are those at B = 0.", method=start.name
        )
    _check_rows(start, shape)
    lora_alpha = shape.lora_alpha
    if lora_alpha is not None:
        check_number("lora_alpha", lora_alpha, above=True, hint=" Leave it out to take what is best.")
    if not 0.0 <= shape.lora_dropout < 1.0:
        raise LoraInitError(f"lora_dropout={shape.lora_dropout!r} must be at least 0 and less than 1.")
    if output is not None:
        check_place(output, overwrite)


def _check_gamma(start: Start, gamma: float | None) -> None:
    """Refuse a size of a step of a start that makes none, and one that is not positive."""
    if gamma is None:
        return
    takes_gamma = start.gamma is not None
    if not takes_gamma or not 0.0 < gamma < math.inf:
        stepping = ", ".join(repr(other.name) for other in STARTS if other.function and other.gamma is not None)
        raise LoraInitError(
            f"{{gamma}} with {{method}}: it is a positive number, for {stepping}.", gamma=gamma, method=start.name
        )


def _check_rows(start: Start, shape: Shape) -> None:
    """Refuse sizes of the rows of A that the start does not have."""
    if shape.whiten and "whiten" not in start.arguments:
        able = " or ".join(other.name for other in STARTS if "whiten" in other.arguments)
        raise LoraInitError(
            f"{{whiten}} is for the start {able}; {{method}} has no variances to divide by.",
            whiten=True,
            method=start.name,
        )
    if shape.unit_rows and (start.matched or not start.b_is_zero):
        raise LoraInitError(
            "{unit_rows} with {method}: its rows have a size of their own. Leave it out.",
            unit_rows=True,
            method=start.name,
        )


def buildable_start(method: str) -> Start:
    """Look up a start that `build_adapter` makes."""
    known = buildable()
    if not isinstance(method, str) or method not in known:
        raise LoraInitError(f"{{method}} is unknown. {did_you_mean(str(method), known)}", method=method)
    return find_start(method)


def build_adapter(
    stats: Statistics,
    ranks: Mapping[str, int] | int | None = None,
    method: str = DEFAULT,
    whiten: bool = False,
    lora_alpha: float | None = None,
    use_rslora: bool | None = None,
    use_dora: bool | None = None,
    lora_dropout: float | None = None,
    modules_to_save: Sequence[str] | None = None,
    seed: int = 0,
    gamma: float | None = None,
    freeze_a: bool = False,
    errors: Mapping[str, Tensor] | None = None,
    config: LoraConfig | None = None,
    model: nn.Module | None = None,
    unit_rows: bool = False,
) -> AdapterInit:
    """Compute the start of every layer's adapter. Our own starts need no model.

    Args:
        stats: What `collect` returned.
        ranks: What `allocate_ranks` returned; or one rank for all layers; or a mapping from layer to rank, where layers
            that it doesn't name get none. Default: the rank that they were made for, in every layer.
            The scaling is relative to the average rank: `ranks.rank`, or the mean of the mapping, rounded.
        method: `"eva"`, `"random"` (PEFT's Kaiming uniform), `"random-scaled"` (with as much energy in A x as `"eva"`),
            `"gaussian"` or `"orthogonal"`. From statistics with gradients also `"eva-grad"`, `"grad-a"`,
            `"natural-gradient"` (B = 0 in these), `"natural-gradient-step"`, `"lora-one"` (the output changes) and
            `"lora-ga"` (the base weights change). For a quantized base, `"qera"` (the output changes, back to that of
            the float model). See `starts.STARTS`. A start of another package has the name of its entry point.
        whiten: With `"eva"`: scale the rows as PEFT's `EvaConfig(whiten=True)` does.
        lora_alpha: Numerator of the scaling, which is lora_alpha / rank in every layer whatever its own rank. Default:
            twice the rank.
        use_rslora: Scale by lora_alpha / sqrt(rank) instead. Default: False.
        use_dora: Let PEFT add DoRA's magnitude vectors. Default: False.
        lora_dropout: Dropout on what A reads, in training. Default: 0.
        modules_to_save: As in PEFT: endings of the names of modules that are trained whole, such as `"lm_head"`. Layers
            in them get no adapter.
        seed: Seed of the random numbers. The numbers of a layer depend on the seed and on its name only.
        gamma: With `"lora-ga"` (default 16), `"lora-one"` and `"natural-gradient-step"` (1024): A and B are divided by
            the square root of gamma, so a larger gamma is a smaller step. `find_step_size` finds the best one for the
            last two.
        errors: With `"qera"`: what quantization took from the weights of each layer, W - Q, [d_out, d_in], such as
            `QuantizationErrors(model, stats.targets)`. Layers are asked for one after the other.
        freeze_a: Train B alone, as LoRA-FA does (arXiv 2308.03303). The backward pass then keeps A x instead of x, and
            the optimizer has no state for A. `rank_with_frozen_a` gives the rank at which B alone has as many
            parameters as A and B.
        config: PEFT's `LoraConfig`, instead of `lora_alpha`, `use_rslora`, `use_dora`, `lora_dropout` and
            `modules_to_save`; its `r` is the average rank. Of the layers of the statistics, those that it selects get
            an adapter. A setting beyond these (`bias`, `rank_pattern` and so on) raises an error that names it, and so
            does an argument that contradicts the config.
        model: The plain model, for a start of another package whose function takes `weight`.
        unit_rows: Leave the rows of A at length one, as EVA's authors and PEFT do. Else A x has the size in each layer
            that it has with `"random"`, so that all starts learn at about one rate, A as well as B. That is for starts
            whose B is zero; `"gaussian"` and `"random-scaled"` have a size of their own.

    Warns:
        UserWarning: The data has fewer directions than ranks in some layers, which then get the ranks that there are.

    Raises:
        LoraInitError: An unknown method or layer, a rank that is negative, larger than d_in or than the statistics can
            serve, no layer left, no gradients in the statistics, no errors for a start that needs them, or an
            impossible lora_alpha, lora_dropout or gamma. A `config` that selects what was not collected, sets what
            cannot be kept, or contradicts an argument.
    """
    if not isinstance(stats, Statistics):
        raise LoraInitError(
            f"build_adapter() takes statistics first and got a {type(stats).__name__}. collect() makes them from a "
            "model and data, Statistics.load() reads a file."
        )
    start, shape = buildable_start(method), Shape(whiten=whiten, unit_rows=unit_rows, gamma=gamma, freeze_a=freeze_a)
    if errors is not None and not start.needs_error:
        raise LoraInitError("errors= with {method}: it corrects no base. Leave errors out.", method=method)
    # The arguments that a config decides, where there is one. None marks those that were not given, since a config is
    # contradicted by any value, also by the default.
    of_peft = (lora_alpha, use_rslora, use_dora, lora_dropout, modules_to_save)
    given: dict[str, Any] = {}
    for name, value in zip(Shape.of_peft, of_peft, strict=True):
        if value is not None:
            given[name] = value
    shape = replace(shape, **given)
    selected: list[str] | None = None
    average: int | None = None
    if config is not None:
        options, selected = read_config_for(stats, config, given)
        average = options.pop("rank")
        shape = replace(shape, **options)
    check_adapter_options(start, shape)
    return build_from(BuildContext(start, stats, shape, seed, errors, model, average), ranks, selected)


def build_from(
    context: BuildContext, ranks: Mapping[str, int] | int | None, selected: Collection[str] | None = None
) -> AdapterInit:
    """Compute the start of the adapter of each layer that is `selected`, from options that were checked already."""
    start, stats, shape = context.start, context.stats, context.shape
    if selected is None:
        selected = [*stats, *stats.unsupported]
    requested, rank = _requested_ranks(stats, ranks, context.rank, selected)
    if not any(requested.values()):
        raise LoraInitError(f"all {len(stats)} layers have rank 0, so there is no adapter to build. Ask for more.")
    # Two reasons for less than what was requested: the layer is trained whole, or its data have fewer directions. The
    # scaling stays relative to the rank that was requested, so that neither changes it.
    plan = _without_whole_modules(requested, shape.modules_to_save)
    plan = _limit_to_directions(stats, plan, start)
    check_experts([stats.targets[name] for name in plan], shape)
    lora_alpha = shape.lora_alpha
    if lora_alpha is None:
        lora_alpha = alpha_for(SCALING, rank, shape.use_rslora)
    shape = replace(shape, lora_alpha=lora_alpha, gamma=shape.gamma or start.gamma)
    context = replace(context, shape=shape, rank=rank)
    weights, errors, squares = _start_layers(context, plan)
    unsupported, explained = {}, {}
    for name, kind in stats.unsupported.items():
        if name in selected and not is_in(name, shape.modules_to_save):
            unsupported[name] = kind
    for name, own_rank in plan.items():
        explained[name] = float(stats.explained_variance_ratio(name)[:own_rank].sum())
    dtype = "float32"
    if isinstance(ranks, RankAllocation) and ranks.budget:  # a budget in megabytes counted numbers of this type
        dtype = ranks.budget.dtype
    return AdapterInit(
        **vars(shape),
        start=start,
        weights=weights,
        targets={name: stats.targets[name] for name in plan},
        unsupported=unsupported,
        rank=rank,
        seed=context.seed,
        left_out=tuple(name for name in stats if name not in plan),
        explained=explained,
        provenance=stats.provenance,
        responses=_responses(context, weights),
        errors=errors,
        error_size=squares**0.5,
        dtype=dtype,
    )


def _without_whole_modules(ranks: Mapping[str, int], modules_to_save: Sequence[str]) -> dict[str, int]:
    """Leave out layers without a rank, and those in modules that are trained whole; refuse to leave out all."""
    plan = {name: rank for name, rank in ranks.items() if rank and not is_in(name, modules_to_save)}
    if not plan:
        whole = list(modules_to_save)
        raise LoraInitError("{modules_to_save} hold every layer: no adapter is left to build.", modules_to_save=whole)
    return plan


def _start_layers(
    context: BuildContext, plan: Mapping[str, int]
) -> tuple[Weights, dict[str, tuple[float, float]], float]:
    """Compute the start of each layer; return beside them what `AdapterInit.errors` has, and |W - Q|^2 of all."""
    weights, moved_by, squares = {}, {}, 0.0
    for name, rank in plan.items():
        error = context.error(name)  # read here and dropped: one layer's W - Q is in memory at a time
        weights[name] = layer_start(context, name, rank, error)
        if error is not None:
            a, b = weights[name].to(error.device, error.dtype)
            left = torch.addmm(error, b, a, alpha=-context.scaling)  # W - Q - s B A, [d_out, d_in]
            spectrum = context.stats[name]
            moved_by[name] = error_seen(spectrum, error), error_seen(spectrum, left)
            squares += float(error.norm()) ** 2
    return weights, moved_by, squares


# The rule of the learning rate needs the mean of sum |(A x)_i| over tokens, see `rates.learning_rate`. A need not be
# run for that: the spectrum knows E (A x)_i^2, and of a Gaussian number the mean size is sqrt(2 / pi) times its root.
# `adapters.measured_rate` measures the same mean for adapters that have no statistics.
def _responses(context: BuildContext, weights: Weights) -> dict[str, Response]:
    """Compute how far each layer moves at a learning rate. A x is taken to be Gaussian."""
    stats, responses = context.stats, {}
    for name, own in weights.items():
        if name not in stats.sizes:
            continue
        # A layer without experts is one part, which reads all rows.
        experts = stats.targets[name].experts
        parts = own.a.flatten(1).chunk(max(experts, 1))  # of each expert, [r, d_in]
        spectra = stats.of_experts(name) or [stats[name]]
        counts = [stats.rows_of_expert(name, i) for i in range(experts)] or [1]
        sums = []  # of |(A x)_i| over all rows
        for a, spectrum, n_rows in zip(parts, spectra, counts, strict=True):
            sums.append(n_rows * float((energies(spectrum, a) * (2.0 / math.pi)).sqrt().sum()))
        ax = sum(sums) / max(sum(counts), 1)  # no expert may have had a row
        moves = response(stats.sizes[name], ax, len(parts[0]), context.scaling, context.shape.freeze_a)
        if moves is not None:
            responses[name] = moves
    return responses


def rank_with_frozen_a(targets: Iterable[Target], rank: int) -> int:
    """Compute the rank at which B alone has as many parameters as A and B have at `rank`, rounded down.

    Example:
        >>> rank_with_frozen_a([Target("up", "Linear", 64, 256), Target("down", "Linear", 256, 64)], rank=8)
        16
    """
    both = b_alone = 0
    for target in targets:
        both += target.parameters(rank)
        b_alone += target.parameters(rank, freeze_a=True)
    return rank * both // b_alone


def check_experts(targets: Collection[Target], shape: Shape) -> None:
    """Refuse what PEFT does not do with fused experts."""
    experts = next((target.name for target in targets if target.experts), None)
    if not experts:
        return
    for what, is_there in (
        ("{use_dora}", shape.use_dora),
        ("{lora_dropout}", shape.lora_dropout > 0.0),
        # For these PEFT sets `fan_in_fan_out`, which its wrapper of parameters refuses.
        ("transformers' Conv1D layers in the same adapter", any(target.kind == "Conv1D" for target in targets)),
    ):
        if is_there:
            raise LoraInitError(
                f"{experts!r}: PEFT does not adapt parameters with {what}. Leave out one of the two.",
                use_dora=shape.use_dora,
                lora_dropout=shape.lora_dropout,
            )


def _requested_ranks(
    stats: Statistics,
    ranks: Mapping[str, int] | int | None,
    average: int | None,
    selected: Collection[str],
) -> tuple[dict[str, int], int]:
    """Return the rank of each layer that was named, in model order, and the rank that the scaling is relative to."""
    if ranks is None:
        ranks = _ranks_by_default(stats, average or stats.provenance.rank, selected)
    if isinstance(ranks, RankAllocation):
        ranks.check(stats)
    if not isinstance(ranks, Mapping):
        ranks = dict.fromkeys((name for name in stats if name in selected), whole_number(ranks, "ranks", 0))
    _check_layers_known(ranks, stats)
    # In the order of the model, whatever the order of the mapping is.
    requested = {name: whole_number(ranks[name], f"layer {name!r}: rank", 0) for name in stats if name in ranks}
    for name, rank in requested.items():
        _check_rank_of_layer(stats.targets[name], rank)
        if rank and name not in selected:
            raise LoraInitError(f"layer {name!r}: ranks give it {rank}, and config does not select it. Change one.")
    reference = 0
    if isinstance(ranks, RankAllocation):
        reference = ranks.rank
    if not reference:
        reference = max(1, round(sum(requested.values()) / max(len(requested), 1)))
    if average not in (None, reference):
        raise LoraInitError(f"ranks are {reference} on average, and config says r={average}. Change one.")
    return requested, reference


def _ranks_by_default(stats: Statistics, rank: int, selected: Collection[str]) -> RankAllocation:
    """Allocate the same rank to each of the selected layers."""
    from lora_init.planning.allocate import allocate_ranks

    return allocate_ranks(stats, rank=rank, exclude=[name for name in stats if name not in selected])


def _check_layers_known(names: Iterable[str], stats: Statistics) -> None:
    for name in names:
        if name not in stats:
            close = difflib.get_close_matches(name, list(stats), n=1, cutoff=0.0)
            raise LoraInitError(f"ranks name {name!r}, which the statistics don't have. Closest: {close}.")


def _check_rank_of_layer(target: Target, rank: int) -> None:
    """Refuse a rank that a layer cannot have."""
    if rank > target.in_features:
        raise LoraInitError(f"layer {target.name!r}: rank {rank} is larger than its input width {target.in_features}.")
    if rank % target.groups:  # PEFT's B of a grouped convolution reads the ranks in as many groups
        raise LoraInitError(
            f"layer {target.name!r}: rank {rank} is no multiple of its {target.groups} groups, which PEFT needs. "
            f"Give it {rank - rank % target.groups or target.groups}, or exclude it."
        )


def _limit_to_directions(stats: Statistics, plan: Mapping[str, int], start: Start) -> dict[str, int]:
    """Limit each layer's rank to the directions that its data have, and warn where that is fewer."""
    limited = {}
    for name, rank in plan.items():
        groups = stats.targets[name].groups
        limited[name] = min(rank, _directions_for(stats, name, rank, start)) // groups * groups
    if not any(limited.values()):
        raise LoraInitError("the data has no direction in any layer: its rows are all alike. Collect from more data.")
    short = [name for name, rank in plan.items() if limited[name] < rank]
    if short:
        warn(
            f"{len(short)} of {len(plan)} layers get fewer ranks than asked for, since the data has no more directions "
            f"there (first: {short[0]!r}, {limited[short[0]]} of {plan[short[0]]}). More data would give more."
        )
    return {name: rank for name, rank in limited.items() if rank}


def _directions_for(stats: Statistics, name: str, rank: int, start: Start) -> int:
    """Count the directions that a start can take from a layer's data; refuse statistics that were cut off too early."""
    if start.directions is None:  # it takes nothing from the data, so any rank can be had
        return rank
    gradient = None
    if start.needs_gradient:
        gradient = stats.gradient(name)
    source = start.directions(stats[name], gradient)
    if not isinstance(source, Spectrum):
        return int(source)
    # Fewer directions than ranks are fine where the data have no more, and an error where only the pass kept no more.
    check_rank(source, rank, f"layer {name!r}: ")
    return source.n_components
