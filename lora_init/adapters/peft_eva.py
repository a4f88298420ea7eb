"""Drop-ins for `get_eva_state_dict` and `initialize_lora_eva_weights` of PEFT: change the import, keep the call.

EVA (Paischer et al., arXiv 2410.07170) starts A from the principal directions of what a layer reads, and moves ranks to
the layers where directions explain more variance. The arguments, with their three functions of the caller, are PEFT's;
the pass over the data and the decomposition are shared with `collect`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import EvaConfig
from peft.tuners.lora.eva import (
    UNSUPPORTED_LORA_MODULES,
    forward_fn_dict,
    prepare_layer_inputs_fn_language_modeling,
    prepare_model_inputs_fn_language_modeling,
)
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from lora_init.adapters.peft_model import adapter_layers, as_it_was, check_in_memory, match_modes, remember
from lora_init.collection.activations import ActivationHooks, input_of
from lora_init.collection.loop import Pass, progress_bar, run_pass
from lora_init.collection.processes import Processes, own_batches
from lora_init.errors import LoraInitError, warn
from lora_init.layers.masks import TokenMasks
from lora_init.layers.targets import ALL_LINEAR, PREFIX, find_targets, is_linear
from lora_init.layers.wrappers import is_sharded
from lora_init.planning.lora_config import alpha_for, from_patterns, listed_or_pattern, scaling_of, to_patterns
from lora_init.starts.initializers import eva, layer_generator
from lora_init.statistics.spectrum import Spectrum

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

# (inputs of a layer, what prepare_model_inputs_fn returned, name of the layer) -> rows [n, d_in]
LayerInputs = Callable[[Any, Any, str], Tensor]
# PEFT's loop has no bound: it goes through the data again and again until tau is reached.
MAX_BATCHES = 512


def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: LoraConfig | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, LoraConfig], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: LayerInputs | Mapping[str, LayerInputs] | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """Compute EVA's A for each layer, as `peft.tuners.lora.eva.get_eva_state_dict` does with the same arguments.

    What differs from PEFT: the data is read once, from its start, and no further than 512 batches. The pass ends as in
    `collect`, with a tolerance of 1 - tau^2, after 8 batches at the earliest: when the directions would keep at least
    tau^2 of what they capture on other data, as a direction off by a cosine of tau does. PEFT compares directions one
    by one with the previous batch's, and goes on while two of near-equal variance swap. Both stop later for a larger
    `tau`. A batch may have any number of tokens and be any mapping. Ties in the rank distribution go to the
    earlier layer.

    Modes, hooks and `requires_grad` of the model are put back, `forward_fn` may be cut short after the last layer that
    is still needed, and layers that a mapping of `prepare_layer_inputs_fn` doesn't name count whole.

    Returns:
        For each layer that had rows, by its name in `model`, A float32 [rank, d_in] on the layer's device; [0, d_in]
        for a layer that gets no rank. Empty if all targeted layers are of kinds that read no rows.

    Warns:
        UserWarning: As PEFT in a distributed run; and if the bound on batches ended the pass.

    Raises:
        ValueError: `peft_config` is missing, the dataloader is empty, or `prepare_layer_inputs_fn` names other layers.
        LoraInitError: (a ValueError) No layer is targeted or no layer had rows; another process failed.
    """
    wrapped = hasattr(model, "peft_config")
    config = _with_eva_config(model, peft_config, adapter_name)
    modules = _adapted_layers(model, adapter_name) if wrapped else _target_layers(model, config)
    if not modules:
        return {}
    functions = _Functions(config, forward_fn or forward_fn_dict, prepare_model_inputs_fn, prepare_layer_inputs_fn)
    functions.check_names(modules)
    # By plain names: PEFT's EVA asks with the prefixed name, which no key that starts with ^ can match.
    configured = from_patterns(config.rank_pattern, map(_plain, modules), config.r)
    ranks, most = {}, {}  # of each layer: the rank that it has, and the highest that it may get
    for name in modules:
        ranks[name] = int(configured[_plain(name)])
        most[name] = max(1, round(ranks[name] * config.eva_config.rho))
    with ExitStack() as stack:
        processes = stack.enter_context(Processes(alone=not gather_distributed_inputs))
        if processes.size > 1:
            warn(
                "torch.distributed is initialized and `gather_distributed_inputs` is True, therefore EVA merges what "
                "all ranks have seen. Ensure the model does not receive the same inputs on different ranks."
            )
        if wrapped:
            stack.enter_context(as_it_was(model))  # PEFT's own context does not see to requires_grad
            stack.enter_context(model.disable_adapter())  # type: ignore[operator]
        spectra = _collect(model, modules, dataloader, max(most.values()), functions, processes, show_progress_bar)
    # Only layers that had rows share their ranks out: the others keep the rank that they have.
    budget = sum(ranks[name] for name in spectra)
    state = {}
    for name, rank in _distribute_ranks(spectra, most, budget).items():
        a = eva(spectra[name], rank, layer_generator(0, name), whiten=config.eva_config.whiten)
        state[name] = a.to(_device_of(modules[name], a.device))
    return state


def _device_of(module: nn.Module, otherwise: torch.device) -> torch.device:
    """Return the device of a module's first weight that has numbers."""
    for parameter in module.parameters():
        if not parameter.is_meta:
            return parameter.device
    return otherwise


def _with_eva_config(model: Any, config: LoraConfig | None, adapter_name: str) -> Any:
    """Return the config given, or else the adapter's, with PEFT's defaults of EVA where it has none."""
    if config is None:
        if not hasattr(model, "peft_config"):
            raise ValueError("peft_config is required if model is not a PeftModel")
        config = cast("LoraConfig", model.peft_config[adapter_name])
    if config.eva_config is None:
        config = copy.copy(config)  # the caller's stays as it is
        config.eva_config = EvaConfig()
    return config


def _adapted_layers(model: nn.Module, adapter_name: str) -> dict[str, nn.Module]:
    """Find the layers of a PeftModel that have this adapter and read rows, by their names in it."""
    adapted = {}
    for name, layer in adapter_layers(model).items():
        # PEFT's EVA leaves these kinds out, too.
        if adapter_name in layer.lora_A and not isinstance(layer, UNSUPPORTED_LORA_MODULES):
            adapted[f"{PREFIX}{name}"] = layer
    return adapted


# All directions of all layers compete for ranks, by the share of its own layer's variance that each explains. The
# shares of a layer fall, so taking the largest of all at once gives each layer its leading directions.
def _distribute_ranks(spectra: Mapping[str, Spectrum], most: Mapping[str, int], total: int) -> dict[str, int]:
    """Distribute ranks as EVA does: one for each of the largest explained-variance ratios, `most` in a layer."""
    ratios = [spectrum.explained_variance_ratio[: most[name]] for name, spectrum in spectra.items()]
    lengths = torch.tensor([len(ratio) for ratio in ratios])
    owner = torch.repeat_interleave(torch.arange(len(ratios)), lengths)  # the layer of each ratio in one long row
    order = torch.cat(ratios).argsort(descending=True, stable=True)[:total]  # stable: ties go to the earlier layer
    counts = torch.bincount(owner[order], minlength=len(ratios))  # also for layers that get no rank
    return dict(zip(spectra, counts.tolist(), strict=True))


def _collect(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: Iterable[Any],
    n_components: int,
    functions: _Functions,
    processes: Processes,
    progress: bool,
) -> dict[str, Spectrum]:
    """Decompose what each layer receives; layers that had no rows are left out."""
    tau = functions.config.eva_config.tau  # type: ignore[union-attr]
    hooks = ActivationHooks(model, modules, TokenMasks(model, "attention"), rows=functions.rows)
    # A direction that is off by a cosine of tau keeps tau^2 of the variance that it captures.
    run = Pass(hooks, functions.run, n_components, n_components, tolerance=1.0 - tau**2)
    shard = own_batches(processes, batches, used=[], in_step=is_sharded(model))
    with hooks, progress_bar(batches, MAX_BATCHES, progress and processes.rank == 0) as bar:
        collected = run_pass(run, shard, MAX_BATCHES, processes, bar)
    if run.failure is not None:
        raise run.failure
    if not sum(collected.n_batches):
        raise ValueError("dataloader is empty")
    spectra = {}
    for name, record in collected.groups.items():
        if record.n_samples:
            spectra[name] = record.whole().spectrum()
    if not spectra:
        raise LoraInitError(
            "no layer received rows: the masks keep no token, or no targeted layer ran. Check attention_mask and "
            "labels, or set use_label_mask=False."
        )
    if collected.stop_reason == "max_batches":
        warn(
            f"tau={tau} was not reached in {MAX_BATCHES} batches: of what the directions capture they would keep "
            f"{collected.keeps:.0%} on other data. They are used as they are."
        )
    # In the order of the model: groups come in the order in which layers ran.
    return {name: spectra[name] for name in modules if name in spectra}


def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: dict[str, Tensor] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, LoraConfig], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: LayerInputs | Mapping[str, LayerInputs] | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Set the ranks and weights of an EVA adapter, as `peft.initialize_lora_eva_weights` does with the same arguments.

    What differs from PEFT, beside `get_eva_state_dict`: `eva_state_dict` may have the names of the plain model; it
    is not emptied; `rank_pattern` and `alpha_pattern` keys may start with `^`, and those written do; the scaling is
    kept under rsLoRA too; layers whose rank changes stay float32 on a half-precision model.

    Warns:
        UserWarning: Layers that the state dict doesn't name are initialized by PEFT.

    Raises:
        ValueError: No PeftModel, several active adapters, another `init_lora_weights`, or neither data nor state dict.
        LoraInitError: (a ValueError) A tensor doesn't fit its layer. Nothing was changed.
    """
    if not hasattr(model, "peft_config"):
        raise ValueError("model must be a PeftModel")
    if len(model.active_adapters) > 1:  # type: ignore[arg-type]
        raise ValueError("`initialize_lora_eva_weights` currently only works with a single active adapter")
    if model.peft_config[adapter_name].init_lora_weights != "eva":  # type: ignore[index, union-attr]
        raise ValueError("`initialize_lora_eva_weights` can only be used with `init_lora_weights='eva'`")
    check_in_memory(adapter_layers(model, adapter_name), "initialize_lora_eva_weights()")
    if eva_state_dict is None:
        if dataloader is None:
            raise ValueError("dataloader is required if eva_state_dict is not provided")
        functions = forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn
        eva_state_dict = get_eva_state_dict(
            model, dataloader, None, *functions, adapter_name, gather_distributed_inputs, show_progress_bar
        )
    missing = _load(model, eva_state_dict, adapter_name)
    if missing:
        warn(
            "the following layers were initialized with init_lora_weights=True because they were not found in the eva "
            f"state_dict: {missing}\nEmbeddings, convolutions and nn.MultiheadAttention have no rows to learn from, "
            "and neither has a layer that no batch reached"
        )


@torch.no_grad()
def _load(model: nn.Module, eva_state_dict: Mapping[str, Tensor], adapter_name: str) -> list[str]:
    """Set A, rank and scaling of every LoRA layer, write the config to match, and name the layers without a tensor."""
    config: Any = copy.copy(model.peft_config[adapter_name])  # type: ignore[index]
    weights = {_plain(name): weight for name, weight in eva_state_dict.items()}
    modules = dict(model.get_base_model().named_modules())  # type: ignore[operator]
    layers = adapter_layers(model, adapter_name)
    _check_shapes(weights, layers, adapter_name)  # the last step that may refuse: below the model changes
    old_ranks = from_patterns(config.rank_pattern, layers, config.r)
    ranks = {}
    for name, old_rank in old_ranks.items():
        rank = old_rank
        if name in weights:
            rank = len(weights[name])
        if rank:  # a layer of rank 0 loses its adapter
            ranks[name] = rank
    _set_patterns(config, modules, old_ranks, ranks)
    dtype = _dtype_of(layers.values(), adapter_name)  # before the layers are replaced
    peft_model: Any = model
    _replace_adapter(peft_model, adapter_name, config)
    match_modes(peft_model)
    _copy_in(peft_model, weights, adapter_name, dtype)
    return [name for name in ranks if name not in weights]


def _dtype_of(layers: Iterable[Any], adapter_name: str) -> torch.dtype:
    """Return the type of the first A of an adapter."""
    for layer in layers:
        if layer.lora_A:  # embeddings have none
            dtype: torch.dtype = layer.lora_A[adapter_name].weight.dtype
            return dtype
    return torch.float32


def _set_patterns(config: Any, modules: Iterable[str], old_ranks: Mapping[str, int], ranks: Mapping[str, int]) -> None:
    """Write into a config the layers that keep an adapter, their new ranks, and what their scaling needs."""
    config.target_modules = listed_or_pattern(list(ranks), (name for name in modules if name not in ranks))
    if not isinstance(config.target_modules, str):
        config.target_modules = set(ranks)  # as PEFT makes one of every list
    alphas = _alphas(config, old_ranks, ranks)
    config.rank_pattern = to_patterns(ranks, config.r)
    config.alpha_pattern = to_patterns(alphas, config.lora_alpha)


def _copy_in(model: nn.Module, weights: Mapping[str, Tensor], adapter_name: str, dtype: torch.dtype) -> None:
    """Copy each A into its layer, and bring A and B to a type."""
    for name, layer in adapter_layers(model).items():
        if name in weights and adapter_name in layer.r:
            for part in (layer.lora_A[adapter_name], layer.lora_B[adapter_name]):
                part.to(dtype)  # of a half-precision model they are float32; PEFT before 0.19 takes the model's own
            layer.lora_A[adapter_name].weight.copy_(weights[name])


def _alphas(config: Any, old_ranks: Mapping[str, int], ranks: Mapping[str, int]) -> dict[str, float]:
    """Compute each layer's lora_alpha, with `adjust_scaling_factors` so that its scaling stays as its rank changes."""
    alphas = from_patterns(config.alpha_pattern, ranks, config.lora_alpha)
    if config.eva_config is not None and config.eva_config.adjust_scaling_factors:
        for name, rank in ranks.items():
            if 0 < rank != old_ranks[name]:
                # PEFT takes rank / old_rank under rsLoRA too, which changes the scaling.
                scaling = scaling_of(alphas[name], old_ranks[name], config.use_rslora)
                alphas[name] = alpha_for(scaling, rank, config.use_rslora)
    return alphas


def _check_shapes(weights: Mapping[str, Tensor], layers: Mapping[str, Any], adapter_name: str) -> None:
    """Refuse an A for an embedding, and one of another shape than its layer's but for the rank."""
    for name, layer in layers.items():
        weight = weights.get(name)
        if weight is None:
            continue
        if not layer.lora_A:
            raise LoraInitError(f"layer {name!r}: the eva state_dict has a tensor for an embedding. Leave it out.")
        expected = layer.lora_A[adapter_name].weight.shape[1:]
        if not weight.dim() or weight.shape[1:] != expected:
            raise LoraInitError(
                f"layer {name!r}: the eva state_dict has a tensor of shape {tuple(weight.shape)}, expected "
                f"[rank, {', '.join(map(str, expected))}]. Compute it on this model."
            )


def _replace_adapter(model: PeftModel, adapter_name: str, config: LoraConfig) -> None:
    """Replace an adapter by one of another shape; restore the model if that fails."""
    active, restore = model.active_adapters, remember(model)
    modules, layers = dict(model.get_base_model().named_modules()), adapter_layers(model)
    try:
        model.delete_adapter(adapter_name)
        # PEFT leaves its layers in place without an adapter. The plain ones go back, so that a layer which gets no
        # rank is plain afterwards.
        plain = {name: layer.get_base_layer() for name, layer in layers.items() if not layer.r}
        for name, module in modules.items():  # PEFT refuses one that was trained whole and is left without an adapter
            if isinstance(module, ModulesToSaveWrapper) and not module.modules_to_save:
                plain[name] = module.original_module
        for name, module in plain.items():
            parent, _, child = name.rpartition(".")
            setattr(modules[parent], child, module)
        model.add_adapter(adapter_name, config)
        model.set_adapter(active[0])
    except BaseException:
        restore()
        raise


class _Batch(dict[str, Any]):
    """A batch as PEFT's EVA takes it. PEFT before 0.20 looks for the labels among its attributes."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(name)


@dataclass
class _Functions:
    """PEFT's three functions, as the loop over batches calls them."""

    config: LoraConfig
    forward: Callable[[nn.Module, Any], Any]  # runs the model on a batch
    model_inputs: Callable[[Any, LoraConfig], Any] | None  # makes of a batch what `layer_inputs` gets, a mask say
    layer_inputs: LayerInputs | Mapping[str, LayerInputs] | None  # picks rows of what a layer reads
    for_layers: Any = None  # what `model_inputs` made of the batch that is running

    def check_names(self, names: Iterable[str]) -> None:
        if isinstance(self.layer_inputs, Mapping):
            self.layer_inputs = {_plain(name): function for name, function in self.layer_inputs.items()}
            unknown = set(self.layer_inputs).difference(map(_plain, names))
            if unknown:
                raise ValueError(
                    "prepare_layer_inputs_fn is a mapping but the following module names were not found in the model: "
                    f"{sorted(unknown)}"
                )

    def run(self, model: nn.Module, batch: Any) -> Any:
        """Run the model on a batch; before, make of the batch what the layers' functions get."""
        self.for_layers = batch
        if self.model_inputs is not None:
            argument = batch
            # PEFT's own function takes nothing but a dict, and a BatchEncoding is none.
            if self.model_inputs is prepare_model_inputs_fn_language_modeling and isinstance(batch, Mapping):
                argument = _Batch(batch)
            self.for_layers = self.model_inputs(argument, self.config)
        return self.forward(model, batch)

    def rows(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Make rows [n, d_in] of what a layer reads."""
        inputs = args or tuple(kwargs.values())
        function = self.layer_inputs
        if isinstance(function, Mapping):
            function = function.get(_plain(name))
        # PEFT's own function picks tokens; an input without a token dimension (a pooler's) counts whole.
        has_tokens = bool(inputs) and isinstance(inputs[0], Tensor) and inputs[0].dim() == 3
        if function is not None and (has_tokens or function is not prepare_layer_inputs_fn_language_modeling):
            return function(inputs, self.for_layers, name)
        return input_of(name, inputs, {}).flatten(0, -2)  # batch x tokens x d_in -> rows x d_in


def _plain(name: str) -> str:
    return name.removeprefix(PREFIX)


def _target_layers(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """Find the linear layers of a plain model that the config targets; without `target_modules` all of them."""
    if isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR:
        # PEFT's EVA takes this for a regular expression, which matches nothing.
        config = copy.copy(config)
        config.target_modules = list(find_targets(model, ALL_LINEAR).layers)
    targeted = {}
    for name, module in model.named_modules():
        if config.target_modules is None or check_target_module_exists(config, name):
            targeted[name] = module
    if not targeted:
        raise LoraInitError(f"no layer of {type(model).__name__} is targeted by {config.target_modules!r}.")
    return {name: module for name, module in targeted.items() if is_linear(module)}
