"""From a start to a model that carries that adapter, everything else equal."""

from __future__ import annotations

import hashlib
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, singledispatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import torch
from torch import Tensor, nn

from lora_init.adapters.directory import CONFIG_FILE, WEIGHTS_FILE, AdapterDirectory
from lora_init.adapters.init_config import InitConfig, PassOptions, Shape
from lora_init.adapters.peft_model import (
    adapter_layers,
    check_fits,
    freeze_a,
    load_adapter,
    match_modes,
    remember,
)
from lora_init.building.build import build_adapter, rank_with_frozen_a
from lora_init.building.pipeline import build
from lora_init.building.quantized import QuantizationErrors
from lora_init.collection.losses import batch_loss, mean_loss
from lora_init.comparison.variants import Variant
from lora_init.errors import LoraInitError, check_number, did_you_mean, first_line, is_out_of_memory
from lora_init.layers.running import evaluating
from lora_init.layers.targets import find_targets
from lora_init.planning.allocate import RankAllocation, allocate_ranks
from lora_init.planning.lora_config import exact_pattern
from lora_init.starts.starts import (
    CORRECTION,
    FULL,
    RANDOM,
    BankWay,
    FullTraining,
    PeftStart,
    Recipe,
    Start,
    compared_names,
)
from lora_init.statistics.spectrum import Spectrum
from lora_init.statistics.statistics import Provenance, Statistics

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

    from lora_init.adapters.adapter_init import AdapterInit
    from lora_init.bank.store import Bank

# Tells a pass and `mean_loss` that the loss is the very one that training minimizes.
AS_TRAINED: dict[str, Any] = {"forward": batch_loss, "loss": lambda loss, batch: loss}
OwnStart: TypeAlias = "tuple[str, str | Path | Callable[[nn.Module, int], PeftModel]]"


@dataclass(frozen=True)
class AdapterShape:
    """What all starts have in common."""

    rank: int  # average rank of a layer
    lora_alpha: float  # the adapter is scaled by lora_alpha / rank
    target_modules: str | list[str] = "all-linear"  # see `collect`
    task_type: str | None = None  # PEFT's task type

    def __post_init__(self) -> None:
        check_number("rank", self.rank, 1, whole=True)
        check_number("lora_alpha", self.lora_alpha, above=True)


def _no_data(*_: object) -> NoReturn:
    raise LoraInitError("this start learns from data, and there is none.")


@dataclass(frozen=True, eq=False)
class PreparedModel:
    """A model with an adapter that is ready to train, as `prepare` returns it."""

    # The model with the adapter; for `full` the model itself, in float32. The plain model inside it is the one
    # that was given
    peft_model: Any
    seconds: float  # the time that building it took, without the time for statistics
    gamma: float | None  # the number that B A was divided by, where B is not zero and the start is ours
    # Puts the plain model back, bit for bit; `peft_model` is of no use afterwards
    release: Callable[[], None] = field(repr=False)
    changes_base: bool  # whether the trained adapter is none for the plain model, whose weights were changed

    @property
    def trainable_parameters(self) -> int:
        """All that training changes: adapters, and heads that PEFT trains whole."""
        return sum(parameter.numel() for parameter in self.peft_model.parameters() if parameter.requires_grad)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of each layer that has an adapter."""
        if not self._has_adapter:
            return {}
        return {name: int(next(iter(layer.r.values()))) for name, layer in adapter_layers(self.peft_model).items()}

    @property
    def a_scale(self) -> float:
        """Root mean square of the norms of all rows of A; 0 without an adapter."""
        if not self._has_adapter:
            return 0.0
        weights = a_weights(self.peft_model).values()  # rank x inputs each
        energy = sum(float(weight.detach().double().square().sum()) for weight in weights)
        return math.sqrt(energy / max(1, sum(map(len, weights))))

    @property
    def _has_adapter(self) -> bool:
        return hasattr(self.peft_model, "peft_config")  # `full` has none


def read_start(start: str | OwnStart) -> Variant:
    """Read the name of a start, or a pair of a new name and where the user's own start comes from."""
    if isinstance(start, tuple):
        variant = _read_own(start)
    else:
        variant = Variant.parse(start)
        if variant.start is None:
            raise LoraInitError(f"start {start!r} is unknown. {did_you_mean(start, compared_names())}")
    if variant.equal_parameters and not (variant.recipe and (variant.recipe.reads_data or variant.recipe.freeze_a)):
        raise LoraInitError(
            f"start {variant.base!r} takes no ranks from data, so it cannot be run with equal parameters."
        )
    if variant.base == FULL and not variant.is_plain:
        raise LoraInitError(f"start {FULL!r} has no adapter that could be scaled or resized.")
    return variant


def _read_own(pair: tuple[Any, ...]) -> Variant:
    name, source = "", None
    if len(pair) == 2 and isinstance(pair[0], str):
        name, source = pair
    variant = Variant.parse(name)
    if not variant.base or variant.start is not None:  # a name of ours would have two meanings
        raise LoraInitError(f"start {pair!r}: a pair is needed, of a new name and a directory or a function.")
    if not callable(source) and not (Path(str(source)).expanduser() / WEIGHTS_FILE).is_file():
        raise LoraInitError(f"start {name!r}: {source} is no adapter directory, nor a function of model and seed.")
    return variant


def check_quantized(starts: Iterable[Variant], is_quantized: bool, has_float: bool) -> None:
    """Check that each start can be made on this base, which is quantized or not."""
    for variant in starts:
        start = variant.start
        if start is None:  # the user's own: its function decides
            continue
        # Full training has the float model in place of the quantized one.
        full = variant.base == FULL
        corrects = start.corrects(is_quantized)
        if corrects and not is_quantized:
            raise LoraInitError(
                f"start '{variant}' corrects a quantized base. Load it so: {{quantize}}.", quantize="nf4"
            )
        if (corrects or (is_quantized and full)) and not has_float:
            raise LoraInitError(
                f"start '{variant}' needs the model before it was quantized. Name its directory by {{weights}}.",
                weights=...,
            )
        if is_quantized and start.changes_base and not corrects and not full:
            raise LoraInitError(f"start '{variant}' changes base weights, and these are quantized. Leave it out.")


def hash_own(source: str | Path | Callable[..., Any]) -> str:
    """Hash the files of an adapter, to notice another one under the same name; of a function, return its name."""
    if callable(source):
        function = getattr(source, "func", source)  # of a partial
        return str(getattr(function, "__qualname__", type(function).__name__))
    content = b""
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        content += (Path(source) / name).read_bytes()
    return hashlib.sha256(content).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class StartInputs:
    """What a start is made from: the model that the adapter is put on, its shape, a seed, and data."""

    model: Any  # the plain model
    shape: AdapterShape  # layers, rank and scaling
    seed: int  # the same seed gives the same adapter
    # Called by starts from data with whether the statistics are centered and whether they have gradients; for
    # the rank with the default rho of `collect`
    statistics: Callable[[bool, bool], Statistics] = _no_data
    # Tokens with their mask for PEFT's starts that read data by themselves, and labels for starts from a bank,
    # which tell prompts by them
    batches: Iterable[Mapping[str, Tensor]] = ()
    # Returns batches that the statistics are not from. Starts that step take the size of their step by the loss on them
    held_out: Callable[[], Sequence[Any]] = _no_data
    bank: Bank | None = None  # for starts from a bank; its prompts are embedded by the base model
    errors: QuantizationErrors | None = None  # what quantization took from the weights, if the model is quantized
    # Where a start of one's own comes from: an adapter directory, the same for every seed, or a function of the
    # plain model and the seed that returns the PeftModel around that model. It may change the weights
    own: Any = None


def prepare(variant: Variant, inputs: StartInputs) -> PreparedModel:
    """Put the adapter of a start on a model: the same layers and the same scaling lora_alpha / rank for every start.

    `docs/comparing-starts.md` says what each start is; `full` has no adapter and trains all weights. B = 0 and the
    model's output is as before, but for these:

    - `lora-ga`, `lora-one` and `natural-gradient-step` start with B other than 0; the first changes base weights to
      make up for it, the model's output with the others is another one.
    - `bank-nearest`, `bank-mixture`, `bank-generated` and `bank-mean` start where adapters of other tasks ended, on
      their layers, and step towards them as far as lowers the loss most.
    - PEFT's `pissa` (arXiv 2404.02948), `olora` (arXiv 2406.01775) and `corda` (arXiv 2406.05223,
      instruction-previewed mode) take a part of each weight into A and B and leave the rest in the base, so the output
      changes by rounding only. `loftq` (arXiv 2310.08659) rounds the base to 4 bits and lets A and B make up for part
      of the error: its output is near the plain model's, not equal.

    `NAME+32-alpha` has that lora_alpha.
    `NAME+equal-parameters` gives a start from data as many trainable parameters as `random` has, as nearly as whole
    ranks of at most 2 x `rank` allow, and never more; with a frozen A the ranks are then equal. Several may follow.

    If a start does not apply, the model is unchanged.
    """
    if variant.alpha:  # `NAME+32-alpha`
        inputs = replace(inputs, shape=replace(inputs.shape, lora_alpha=variant.alpha))
    restore = remember(inputs.model, weights=_may_change_weights(variant, inputs))
    changes_base, parameters = variant.changes_base, list(inputs.model.parameters())
    try:
        stats = _statistics_for(variant, inputs)
        began = time.perf_counter()  # statistics have seconds of their own
        # Whatever a start draws, training begins with the same random state.
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(inputs.seed)
            if variant.start is None:
                before = _sums(parameters)
                peft_model, gamma = _put_own(variant, inputs)
                changes_base = _sums(parameters) != before
            else:
                peft_model, gamma = _put(variant.start, variant, inputs, stats)
    except BaseException:  # Ctrl-C, too: the next run needs the plain model
        restore()
        raise
    return PreparedModel(peft_model, time.perf_counter() - began, gamma, restore, changes_base)


def _sums(parameters: Iterable[Tensor]) -> list[float]:
    return [float(parameter.detach().sum(dtype=torch.float64)) for parameter in parameters]


def _may_change_weights(variant: Variant, inputs: StartInputs) -> bool:
    """Return whether the weights of the model have to be kept, to put them back."""
    if variant.start is None:  # the user's function may do anything
        return True
    return variant.changes_base and not variant.start.corrects(inputs.errors is not None)


def _statistics_for(variant: Variant, inputs: StartInputs) -> Statistics:
    """Collect the statistics that a start needs; those of one that reads no data hold the layers alone."""
    recipe = variant.recipe
    if recipe is None or not recipe.reads_data:
        return _blank(inputs)
    return inputs.statistics(recipe.center, recipe.needs_gradient)


def a_weights(peft_model: PeftModel) -> dict[str, Tensor]:
    """Find A of each layer that has one, [r, d_in]; embeddings keep theirs elsewhere, convolutions as [r, c, k, k]."""
    weights = {}
    for name, layer in adapter_layers(peft_model).items():
        if not len(layer.lora_A):  # an embedding's
            continue
        weight = next(iter(layer.lora_A.values())).weight
        if weight.dim() == 2:
            weights[name] = weight
    return weights


def adapter_files(peft_model: PeftModel) -> dict[str, bytes]:
    """Return the files that PEFT saves of an adapter: name to content."""
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the base model's configuration, which need not be at hand
        peft_model.save_pretrained(folder)
        return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def _blank(inputs: StartInputs) -> Statistics:
    """Make statistics that know nothing but the layers' widths, for starts that need no data; all directions alike.

    With a variance of one in each, A x has the size that it has with `random`.
    """
    model, shape = inputs.model, inputs.shape
    modules = shape.target_modules if isinstance(shape.target_modules, str) else sorted(shape.target_modules)
    targets = find_targets(model, modules, task_type=shape.task_type)
    made_for = Provenance("", type(model).__name__, "", modules, task_type=shape.task_type, rank=shape.rank)
    groups = {}
    for name, target in targets.layers.items():
        # No direction is known, 0 x inputs, of no row: all variance is in the rest, alike in all directions.
        width, no_values = target.in_features, torch.empty(0, dtype=torch.float64)
        groups[name] = Spectrum(torch.empty(0, width), no_values, float(width), torch.zeros(width), 0)
    return Statistics(
        groups=groups,
        group_of={name: name for name in targets.layers},  # each layer alone: none was seen to read another's input
        targets=targets.layers,
        unsupported=targets.unsupported,
        provenance=made_for,
    )


def _ranks_of(variant: Variant, recipe: Recipe, inputs: StartInputs, stats: Statistics) -> RankAllocation:
    """Allocate the ranks of a recipe: as many ranks, or as many parameters, as `random` has."""
    rank, equal = inputs.shape.rank, variant.equal_parameters
    targets = [stats.targets[name] for name in stats]
    of_policy: dict[str, Any] = dict(rho=recipe.rho, policy=recipe.policy)
    if equal and recipe.freeze_a:  # all layers get one rank, and the statistics are for at most twice that of `random`
        alike = min(2 * rank, rank_with_frozen_a(targets, rank))
        ranks = RankAllocation(dict.fromkeys(stats, alike), rank)
    elif equal:
        ranks = allocate_ranks(stats, parameters=sum(target.parameters(rank) for target in targets), **of_policy)
    elif recipe.reads_data and not recipe.start.needs_error:  # errors have as many directions as the layer
        ranks = allocate_ranks(stats, rank=rank, **of_policy)
    else:
        ranks = RankAllocation(dict.fromkeys(stats, rank), rank)
    return replace(ranks, rank=rank)  # the scaling is lora_alpha / rank in any case


@singledispatch
def _put(start: Start, variant: Variant, inputs: StartInputs, stats: Statistics) -> tuple[PeftModel, float | None]:
    """Put a start on the model. Ours is built from statistics, and steps as far as lowers the loss most."""
    assert variant.recipe is not None  # made by us
    config = InitConfig(
        start=variant.recipe.start,
        shape=Shape(lora_alpha=inputs.shape.lora_alpha, freeze_a=variant.recipe.freeze_a),
        run=PassOptions(seed=inputs.seed, **AS_TRAINED),
    )
    ranks = _ranks_of(variant, variant.recipe, inputs, stats)
    held_out = inputs.held_out() if config.start.takes_step else ()
    init = build(inputs.model, stats, ranks, config, held_out, inputs.errors)
    return init.apply(inputs.model), init.gamma


@_put.register(BankWay)
def _(start: BankWay, variant: Variant, inputs: StartInputs, stats: Statistics) -> tuple[PeftModel, float | None]:
    from lora_init.bank.embeddings import embed
    from lora_init.bank.start import start_from_bank

    if inputs.bank is None or inputs.bank.encoder:
        raise LoraInitError(
            "a start from a bank needs {bank}, whose prompts are embedded by the base model itself.", bank=...
        )
    shape, loss_of = inputs.shape, partial(mean_loss, batches=inputs.held_out(), **AS_TRAINED)
    init = start_from_bank(
        inputs.bank, inputs.model, embed(inputs.model, inputs.batches), loss_of, start.way,
        rank=shape.rank, shape=Shape(lora_alpha=shape.lora_alpha),
    ).init  # fmt: skip
    return init.apply(inputs.model), init.gamma


@_put.register(FullTraining)
def _(start: FullTraining, variant: Variant, inputs: StartInputs, stats: Statistics) -> tuple[Any, None]:
    """Train the model itself, in float32: steps would be lost in the rounding of bfloat16."""
    return inputs.model.float().requires_grad_(True), None


def _put_own(variant: Variant, inputs: StartInputs) -> tuple[PeftModel, None]:
    """Put the user's adapter on the model: from a directory, or by a function that may raise what it likes."""
    from peft import PeftModel

    name, model, source = variant.base, inputs.model, inputs.own
    try:
        if not callable(source):
            directory = AdapterDirectory(source)
            directory.check_fits_plain_base()
            adapted = load_adapter(model, directory, trainable=True)
            if directory.origin.get("freeze_a"):
                freeze_a(adapted, "default")
            return adapted, None
        peft_model = source(model, inputs.seed)
    except LoraInitError as error:
        raise error.within(f"start {name!r}") from error
    except Exception as error:
        raised = f"{type(error).__name__}: {first_line(error)}"
        raise LoraInitError(f"start {name!r}: its function raised {raised}") from error
    if not isinstance(peft_model, PeftModel) or peft_model.get_base_model() is not model:
        raise LoraInitError(
            f"start {name!r}: its function returned {type(peft_model).__name__}, expected a PeftModel around the model "
            "that it was given."
        )
    match_modes(peft_model)
    return peft_model, None


def _put_correction(inputs: StartInputs) -> tuple[PeftModel, None]:
    """Correct a quantized base as PEFT's start would: PEFT's function needs a GPU, and leaves the scaling out.

    Where inputs are alike in all directions, the best correction comes from the leading singular triplets of W - Q,
    which are what PEFT takes.
    """
    even, shape = _blank(inputs), inputs.shape
    init = build_adapter(even, shape.rank, CORRECTION, lora_alpha=shape.lora_alpha, errors=inputs.errors)
    return init.apply(inputs.model), None


def _check_peft_applies(start: PeftStart, model: nn.Module, init: AdapterInit) -> None:
    """Check that PEFT can make its start on every layer that gets an adapter."""
    check_fits(model, init, "default")
    for name, kind in init.unsupported.items():
        raise LoraInitError(f"{start} is for linear layers, {name!r} is a {kind}. Leave it out of the targets.")
    for name, target in init.targets.items():
        weight: Any = model.get_submodule(name).weight
        # Quantized weights are subclasses of `nn.Parameter`, or hold integers.
        if type(weight) is not nn.Parameter or not weight.is_floating_point():
            raise LoraInitError(f"{start} takes weights apart, {name!r} is quantized. Load the model in float.")
        if target.kind == "Conv1D" and start.linear_only:
            raise LoraInitError(f"{start}: PEFT computes it for nn.Linear only, and {name!r} is a Conv1D.")
        narrow = min(target.in_features, target.out_features)
        if init.rank > narrow:
            raise LoraInitError(
                f"{start}: layer {name!r} has {narrow} singular vectors, and rank {init.rank} asks for more."
            )


@_put.register(PeftStart)
def _(start: PeftStart, variant: Variant, inputs: StartInputs, stats: Statistics) -> tuple[PeftModel, None]:
    """Start the adapter by PEFT, which changes the model's weights, but for those of a quantized base."""
    from peft import get_peft_model

    if start.corrects(inputs.errors is not None):
        return _put_correction(inputs)
    model = inputs.model
    # Ours at random gives PEFT's configuration, with the same layers and scaling as every other start.
    ours = build_adapter(stats, inputs.shape.rank, RANDOM, lora_alpha=inputs.shape.lora_alpha)
    _check_peft_applies(start, model, ours)
    config = ours.to_peft_config()
    config.base_model_name_or_path = None
    config.target_modules = exact_pattern(ours.targets)
    config.init_lora_weights = start.name  # type: ignore[assignment]
    for name, value in start.settings.items():
        setattr(config, name, dict(value))
    try:
        with warnings.catch_warnings():
            # Advice on saving such an adapter, and on a flag that PEFT then sets correctly itself.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            if "inputs" in start.needed:
                preprocess_corda(model, config, list(ours.targets), inputs.batches)
            peft_model = get_peft_model(model, config)
    except Exception as error:
        if isinstance(error, LoraInitError) or is_out_of_memory(error):  # `Workbench.carry_out` knows what to do
            raise
        raise LoraInitError(f"{start} does not apply here, PEFT says: {first_line(error)}") from error
    match_modes(peft_model)
    return peft_model, None


def preprocess_corda(
    model: nn.Module, config: LoraConfig, layers: Sequence[str], batches: Iterable[Mapping[str, Tensor]]
) -> None:
    """Run PEFT's CorDA over batches. It takes one sequence at a time and knows no mask."""
    from peft.tuners.lora import corda
    from peft.tuners.lora.config import CordaConfig

    config.corda_config = CordaConfig(corda_method="ipm")
    batches = list(batches)
    if not batches:
        raise LoraInitError(f"start {config.init_lora_weights!r} reads data, and there is no batch.")

    def run_model() -> None:
        for batch in batches:
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                kept = ids[mask.bool()][None]  # tokens -> 1 x tokens without padding
                model(input_ids=kept, attention_mask=torch.ones_like(kept))

    # CorDA's hook drops the first axis. A layer that reads one row [1, d] per sequence, as BERT's pooler does, would
    # seem to read a single number: it is shown [1, 1, d]. What follows such a layer works on the last axis alone.
    def add_axis(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if args[0].dim() == 2:
            return (args[0][None], *args[1:])
        return None  # the layer reads what it was given

    handles = [model.get_submodule(name).register_forward_pre_hook(add_axis) for name in layers]
    try:
        with evaluating(model):
            corda.preprocess_corda(model, config, run_model)
    finally:
        for handle in handles:
            handle.remove()
