"""Drop-ins for `get_eva_state_dict` and `initialize_lora_eva_weights` of PEFT: change the import, keep the call."""

from __future__ import annotations

import copy
import re
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lora_init.adapters.initializers import eva, layer_generator
from lora_init.adapters.peft_model import exact_pattern, selects
from lora_init.collection.activations import ActivationTap
from lora_init.collection.processes import Message, Team, length
from lora_init.errors import LoraInitError
from lora_init.layers.targets import ALL_LINEAR, find_targets
from lora_init.statistics.incremental_svd import IncrementalSVD, apply_updates
from lora_init.statistics.tensorfile import flatten, nest

if TYPE_CHECKING:
    from peft import LoraConfig

# (inputs of a layer, what prepare_model_inputs_fn returned, name of the layer) -> rows [n, d_in]
LayerInputs = Callable[[Any, Any, str], Tensor]


def forward_fn_dict(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Call the model with the items of a batch as keyword arguments."""
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Mapping[str, Any], peft_config: Any) -> Tensor:
    """Find the tokens that count: not padding and, with `use_label_mask`, with a label.

    Args:
        model_input: A batch with `input_ids`, perhaps `attention_mask` and `labels`; a dict or any other mapping.
        peft_config: PEFT's LoraConfig, whose `eva_config` says whether and which labels mask.

    Returns:
        Batch and token index of each, int64 [n, 2].
    """
    if not isinstance(model_input, Mapping):
        raise TypeError(
            f"prepare_model_inputs_fn_language_modeling takes a mapping, not a {type(model_input).__name__}; "
            "pass a prepare_model_inputs_fn of your own, or None"
        )
    mask = model_input.get("attention_mask")
    mask = (torch.ones_like(model_input["input_ids"]) if mask is None else mask).bool()
    labels = model_input.get("labels")
    if labels is not None and peft_config.eva_config.use_label_mask:
        mask = mask & (labels != peft_config.eva_config.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Tensor, layer_name: str) -> Tensor:
    """Pick the rows of the tokens that count from a layer's input.

    Args:
        layer_input: Tensor [batch, tokens, d_in], or a tuple that starts with it. An input without a token dimension (a
            pooler's, an expert's) counts whole.
        model_input: What `prepare_model_inputs_fn_language_modeling` returned.
        layer_name: For the error message.

    Returns:
        Rows [n, d_in].
    """
    x = first_tensor(layer_input, layer_name)
    return x[model_input[:, 0], model_input[:, 1]] if x.dim() == 3 else x.reshape(-1, x.shape[-1])


def first_tensor(layer_input: Any, layer_name: str) -> Tensor:
    """Return the tensor, or the first element of a tuple or list of inputs.

    Raises:
        TypeError: It is neither.
    """
    x = layer_input[0] if isinstance(layer_input, (tuple, list)) and layer_input else layer_input
    if not isinstance(x, Tensor):
        raise TypeError(
            f"unsupported input type {type(layer_input)} for prepare_layer_inputs_fn in layer {layer_name}, "
            "please provide a custom prepare_layer_inputs_fn"
        )
    return x


# PeftModel puts this in front of the names of the model it wraps.
_PREFIX = "base_model.model."


def plain_name(name: str) -> str:
    """Name a layer as the unwrapped model does."""
    return name.removeprefix(_PREFIX)


def pattern_value(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """Look a layer up in `rank_pattern` or `alpha_pattern`: the first key that its plain name ends in."""
    from peft.utils.other import get_pattern_key

    # PEFT's EVA asks with the prefixed name, which no key that starts with ^ can match.
    return (pattern or {}).get(get_pattern_key(list(pattern or {}), plain_name(name)), default)


@dataclass
class _Change:
    """What one adapter layer shall become. `weight` is None where the state dict has nothing for it."""

    name: str
    layer: Any
    weight: Tensor | None
    rank: int
    alpha: float
    old_rank: int


def load_eva_state_dict(model: nn.Module, eva_state_dict: Mapping[str, Tensor], adapter_name: str) -> None:
    """Set A, rank and scaling of every LoRA layer from an EVA state dict, and write the config to match.

    Layers of rank 0 lose their adapter. Layers that the state dict doesn't name are initialised by PEFT.

    Args:
        model: A PeftModel with the adapter.
        eva_state_dict: Layer name, as in the PeftModel or as in the plain model, to A [rank, d_in]. Not changed.
        adapter_name: Which adapter.

    Warns:
        UserWarning: Some layers are not in the state dict.

    Raises:
        LoraInitError: A tensor has another width than its layer. Nothing was changed.
    """
    config = cast("LoraConfig", model.peft_config[adapter_name])  # type: ignore[index]
    changes, other_names = _plan(model, config, eva_state_dict, adapter_name)
    how = copy.copy(config)
    with torch.no_grad():
        for change in changes:
            _carry_out(model, change, how, adapter_name)
    kept = [change for change in changes if change.rank > 0]
    names = [plain_name(change.name) for change in kept]
    exact = not any(selects(names, name) for name in other_names)
    # A set, as PEFT itself turns every list into one.
    config.target_modules = set(names) if exact else exact_pattern(names)  # type: ignore[assignment]
    config.rank_pattern = {_key(c.name): c.rank for c in kept if c.rank != config.r}
    config.alpha_pattern = {_key(c.name): c.alpha for c in kept if c.alpha != config.lora_alpha}
    missing = [plain_name(change.name) for change in changes if change.weight is None]
    if missing:
        warnings.warn(
            "the following layers were initialized with init_lora_weights=True because they were not found in the eva "
            f"state_dict: {missing}\nEmbeddings, convolutions and nn.MultiheadAttention have no rows to learn from, "
            "and neither has a layer that no batch reached",
            stacklevel=3,
        )


def _plan(
    model: nn.Module, config: LoraConfig, eva_state_dict: Mapping[str, Tensor], adapter_name: str
) -> tuple[list[_Change], list[str]]:
    from peft.tuners.lora import LoraLayer

    weights = {plain_name(name): weight for name, weight in eva_state_dict.items()}
    changes, other_names = [], []
    for name, module in model.named_modules():
        plain = plain_name(name)
        ours = isinstance(module, LoraLayer) and adapter_name in module.r and ".base_layer." not in name
        if not ours:
            other_names.append(plain)
            continue
        weight = weights.get(plain)
        old_rank = int(pattern_value(config.rank_pattern, name, config.r))
        alpha = pattern_value(config.alpha_pattern, name, config.lora_alpha)
        if weight is None:
            changes.append(_Change(name, module, None, old_rank, alpha, old_rank))
            continue
        if weight.dim() != 2 or weight.shape[1] != module.in_features:
            raise LoraInitError(
                f"layer {plain!r}: the eva state_dict has a tensor of shape {tuple(weight.shape)}, expected "
                f"[rank, {module.in_features}]. Compute it on this model."
            )
        rank = weight.shape[0]
        if rank != old_rank and config.eva_config is not None and config.eva_config.adjust_scaling_factors:
            # Keeps the layer's scaling. PEFT takes rank / old_rank under rsLoRA too, which changes it.
            ratio = rank / old_rank
            alpha = alpha * (ratio**0.5 if config.use_rslora else ratio)
        changes.append(_Change(name, module, weight, rank, alpha, old_rank))
    return changes, other_names


def _carry_out(model: nn.Module, change: _Change, config: LoraConfig, adapter_name: str) -> None:
    layer = change.layer
    if change.rank == 0:
        parent, _, child = change.name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
        return
    if change.weight is None:
        config.init_lora_weights = True
        layer.update_layer(adapter_name=adapter_name, r=change.rank, lora_alpha=change.alpha, config=config)
        return
    a = layer.lora_A[adapter_name].weight
    if change.rank != change.old_rank or a.is_meta:
        config.init_lora_weights = "eva"  # B = 0, and A is about to be filled
        layer.update_layer(adapter_name=adapter_name, r=change.rank, lora_alpha=change.alpha, config=config)
        # update_layer falls back to the base layer's type; adapters of half-precision models are float32.
        layer.lora_A[adapter_name].to(a.dtype)
        layer.lora_B[adapter_name].to(a.dtype)
    layer.lora_A[adapter_name].weight.copy_(change.weight)


def _key(name: str) -> str:
    return f"^{re.escape(plain_name(name))}"


# PEFT's loop has no bound: it goes through the data again and again until tau is reached.
MAX_BATCHES = 512
# Batches after which layers that have had no rows yet (an expert that no token chose) are no longer waited for.
_PATIENCE = 64


class EvaLoop:
    """Decompose what each layer receives until the directions that get ranks stand still.

    Args:
        model: The model to run.
        modules: Layers to watch, by name, in model order.
        config: PEFT's LoraConfig: ranks (`r`, `rank_pattern`) and `eva_config`.
        forward: Runs the model on a batch.
        model_inputs: Turns batch and config into what `layer_inputs` get; None passes the batch on.
        layer_inputs: For each layer, what turns its inputs into rows; None takes all.
        alike: Those of `layer_inputs` that treat all layers alike: layers of one input are then decomposed once.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        config: Any,
        forward: Callable[[nn.Module, Any], Any],
        model_inputs: Callable[[Any, Any], Any] | None,
        layer_inputs: Mapping[str, LayerInputs | None],
        alike: tuple[LayerInputs | None, ...],
    ) -> None:
        self.model, self.modules, self.config = model, modules, config
        self.settings = config.eva_config
        self._forward, self._model_inputs = forward, model_inputs
        self._layer_inputs, self._alike = layer_inputs, alike
        self._rank = {name: int(pattern_value(config.rank_pattern, name, config.r)) for name in modules}
        self._leader: dict[str, str] = {}  # the layer whose decomposition a layer shares
        self._svds: dict[str, IncrementalSVD] = {}  # by leader
        self._last: dict[str, tuple[int, Tensor]] = {}  # rows and components after the last batch with rows
        self._cosines: dict[str, Tensor] = {}
        self._ratios: dict[str, Tensor] = {}
        self._wanted = set(modules)
        self._taken: dict[tuple[int, LayerInputs | None], tuple[weakref.ref[Tensor], int, str]] = {}
        self._for_layers: Any = None

    def run(self, batches: Iterable[Any], progress: bool) -> None:
        """Read batches until every layer is done, the data ends, or `MAX_BATCHES`.

        Raises:
            ValueError: There is no batch.
            LoraInitError: Rows are not as they must be.
        """
        n_batches = 0
        tap = ActivationTap(self.model, self.modules, forward=self._run_model, rows=self._rows)
        with tap, tqdm(total=len(self.modules), position=0, leave=False, disable=not progress) as bar:
            for batch in islice(batches, MAX_BATCHES):
                self._taken = {}
                try:
                    # In a tuple, so that the tap looks for no masks in it: which rows count is for others to say.
                    tap.run((batch,), self._sink, self._wanted.__contains__)
                    apply_updates(self._svds.values())
                except LoraInitError as error:
                    raise LoraInitError(f"batch {n_batches}: {error}") from None
                n_batches += 1
                self._judge()
                bar.n = len(self.modules) - len(self._wanted)
                bar.set_description(f"{bar.n}/{bar.total} layers have converged")
                waited_for = [n for n in self._wanted if n in self._leader or n_batches < _PATIENCE]
                if not waited_for:
                    break
            else:
                if n_batches == MAX_BATCHES:
                    warnings.warn(
                        f"{len(self._wanted)} of {len(self.modules)} layers have not reached tau={self.settings.tau} "
                        f"in {MAX_BATCHES} batches; their directions so far are used.",
                        stacklevel=3,
                    )
        if n_batches == 0:
            raise ValueError("dataloader is empty")

    def merge_processes(self, team: Team) -> None:
        """Take in what all processes of a distributed run have seen, in the same order in each.

        Raises:
            RankFailedError: A process failed or died.
        """
        found = [*self._leader.items()]
        self._leader = {name: leader for their in reversed(team.meet(found)) for name, leader in their}
        own: dict[str, IncrementalSVD] = {}
        for name, svd in self._svds.items():
            own.setdefault(self._leader[name], IncrementalSVD(svd.n_components)).merge(svd)
        self._svds = _unpacked(team.combine(lambda: _packed(own), _merged))
        self._ratios = {name: svd.spectrum().explained_variance_ratio for name, svd in self._svds.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Return A [rank, d_in] of each layer that had rows, in model order.

        Raises:
            LoraInitError: No layer had rows.
        """
        if not self._svds:
            raise LoraInitError(
                "no layer received rows: the masks keep no token, or no targeted layer ran. Check attention_mask and "
                "labels, or set use_label_mask=False."
            )
        result = {}
        for name, rank in self._ranks().items():
            spectrum = self._svds[self._leader[name]].spectrum()
            rows = eva(spectrum, rank, layer_generator(0, name), whiten=self.settings.whiten)
            device = next((p.device for p in self.modules[name].parameters() if not p.is_meta), rows.device)
            result[name] = rows.to(device)
        return result

    def _run_model(self, model: nn.Module, packed: tuple[Any]) -> None:
        (batch,) = packed
        if self._model_inputs is None:
            self._for_layers = copy.copy(batch)
        else:
            # PEFT's own function takes nothing but a dict, so give it one: a BatchEncoding is none.
            from_peft = getattr(self._model_inputs, "__module__", "").startswith("peft.") and isinstance(batch, Mapping)
            self._for_layers = self._model_inputs(dict(batch) if from_peft else batch, self.config)
        self._forward(model, batch)

    def _rows(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        given = args or tuple(kwargs.values())
        function = self._layer_inputs.get(name)
        x = next((value for value in given if isinstance(value, Tensor)), None)
        if x is not None and function in self._alike:
            version = 0 if x.is_inference() else x._version
            seen, seen_version, leader = self._taken.get((id(x), function), (None, 0, ""))
            same = seen is not None and seen() is x and seen_version == version
            if same and self._leader.setdefault(name, leader) == leader:
                return x.new_empty(0, x.shape[-1])
            self._taken[id(x), function] = (weakref.ref(x), version, self._leader.get(name, name))
        self._leader.setdefault(name, name)
        if function is not None:
            return function(given, self._for_layers, name)
        x = first_tensor(given, name)
        return x.reshape(-1, x.shape[-1])

    def _sink(self, name: str, rows: Tensor) -> None:
        if rows.shape[0] == 0:
            return
        leader = self._leader[name]
        if leader not in self._svds:
            # One number for all: it isn't known yet which layers will share this decomposition.
            most = max(self._cap(other) for other in self.modules)
            self._svds[leader] = IncrementalSVD(min(most, rows.shape[-1]))
        try:
            self._svds[leader].project(rows)
        except LoraInitError as error:
            raise LoraInitError(f"layer {name!r}: {error}") from None

    def _cap(self, name: str) -> int:
        cap: int = round(self._rank[name] * self.settings.rho)
        return max(1, cap)

    def _judge(self) -> None:
        """Find out which layers are done after a batch."""
        for leader, svd in self._svds.items():
            n_before, before = self._last.get(leader, (0, None))
            if svd.n_samples == n_before:
                continue  # no rows in this batch: nothing stood still, nothing was looked at
            spectrum = svd.spectrum()
            # How much of each direction lies in the span of those before.
            self._cosines[leader] = (
                torch.full((spectrum.n_components,), -1.0)
                if before is None
                else (spectrum.components @ before.T).norm(dim=1)
            )
            self._last[leader] = (svd.n_samples, spectrum.components)
            self._ratios[leader] = spectrum.explained_variance_ratio
        needed = dict.fromkeys(self._svds, 0)
        for name, rank in self._ranks().items():
            needed[self._leader[name]] = max(needed[self._leader[name]], rank)
        done = {name for name, rank in needed.items() if bool((self._cosines[name][:rank] >= self.settings.tau).all())}
        self._wanted = {name for name in self.modules if self._leader.get(name) not in done}

    def _ranks(self) -> dict[str, int]:
        """Distribute the ranks of the layers that had rows: the largest explained-variance ratios get one each."""
        names = [name for name in self.modules if self._leader.get(name) in self._ratios]
        caps: dict[str, int] = {}
        for name in names:
            caps[self._leader[name]] = max(caps.get(self._leader[name], 0), self._cap(name))
        ratios = [self._ratios[self._leader[name]][: caps[self._leader[name]]] for name in names]
        if not names:
            return {}
        owner = torch.repeat_interleave(torch.arange(len(names)), torch.tensor([len(r) for r in ratios]))
        order = torch.cat(ratios).argsort(descending=True, stable=True)  # stable: ties go to the earlier layer
        chosen = owner[order[: sum(self._rank[name] for name in names)]]
        return dict(zip(names, torch.bincount(chosen, minlength=len(names)).tolist(), strict=True))


def _merged(one: Message, other: Message) -> Message:
    svds = _unpacked(one)
    for name, svd in _unpacked(other).items():
        svds.setdefault(name, IncrementalSVD(svd.n_components)).merge(svd)
    return _packed(svds)


def _packed(svds: Mapping[str, IncrementalSVD]) -> Message:
    header = {"n_components": {name: svd.n_components for name, svd in svds.items()}}
    return Message(header, flatten({name: svd.state_dict() for name, svd in svds.items()}))


def _unpacked(message: Message) -> dict[str, IncrementalSVD]:
    sizes = message.header["n_components"]
    states = nest(message.tensors, sizes)
    return {name: IncrementalSVD(sizes[name]).load_state_dict(state) for name, state in states.items()}


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

    What differs from PEFT: the data is read once, from its start, and no further than 512 batches; a layer is done when
    the directions it gets ranks for lie in the span of those before the last batch with a cosine of at least `tau`,
    where PEFT compares vector by vector and goes on while two of near-equal variance swap; a batch may have any number
    of tokens; ties in the rank distribution go to the earlier layer.

    Args:
        model: A PeftModel, or a plain model with `peft_config`. Modes, hooks and `requires_grad` are put back.
        dataloader: Batches.
        peft_config: Needed for a plain model. `r`, `rank_pattern`, `target_modules` and `eva_config` are used.
        forward_fn: Runs the model on a batch. It may be cut short after the last layer that is still needed.
        prepare_model_inputs_fn: Turns batch and config into what `prepare_layer_inputs_fn` gets; None passes the batch.
        prepare_layer_inputs_fn: Turns a layer's inputs into rows; a function, or a mapping from layer to function,
            where layers that it doesn't name count whole; None likewise. Not changed.
        adapter_name: Adapter of a PeftModel.
        gather_distributed_inputs: In a distributed run, merge the decompositions of all processes.
        show_progress_bar: Show a progress bar.

    Returns:
        For each layer that had rows, by its name in `model`, A float32 [rank, d_in] on the layer's device; [0, d_in]
        for a layer that gets no rank.

    Warns:
        UserWarning: As PEFT in a distributed run; and if the bound on batches ended the loop.

    Raises:
        ValueError: `peft_config` is missing, the dataloader is empty, or `prepare_layer_inputs_fn` names other layers.
        LoraInitError: (a ValueError) No layer is targeted or no layer had rows; another process failed.
    """
    wrapped = hasattr(model, "peft_config")
    if peft_config is None:
        if not wrapped:
            raise ValueError("peft_config is required if model is not a PeftModel")
        peft_config = cast("LoraConfig", model.peft_config[adapter_name])  # type: ignore[index]
    if peft_config.eva_config is None:
        from peft import EvaConfig

        peft_config = copy.copy(peft_config)
        peft_config.eva_config = EvaConfig()
    if length(dataloader) == 0:
        raise ValueError("dataloader is empty")
    gather = gather_distributed_inputs and torch.distributed.is_available() and torch.distributed.is_initialized()
    if gather:
        warnings.warn(
            "torch.distributed is initialized and `gather_distributed_inputs` is True, therefore EVA merges what all "
            "ranks have seen. Ensure the model does not receive the same inputs on different ranks.",
            stacklevel=2,
        )
    modules = _adapter_layers(model, adapter_name) if wrapped else _target_layers(model, peft_config)
    if not modules:
        raise LoraInitError(f"no layer of {type(model).__name__} is targeted by the config, or has rows to learn from.")
    loop = EvaLoop(
        model,
        modules,
        peft_config,
        forward_fn or forward_fn_dict,
        prepare_model_inputs_fn,
        _layer_functions(modules, prepare_layer_inputs_fn),
        alike=(None, prepare_layer_inputs_fn_language_modeling),
    )
    with Team(alone=not gather) as team:
        with _adapter_switched_off(model, wrapped):
            loop.run(dataloader, show_progress_bar and team.rank == 0)
        if team.size > 1:
            loop.merge_processes(team)
    return loop.state_dict()


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
    """Give an EVA adapter its ranks and weights, as `peft.initialize_lora_eva_weights` does with the same arguments.

    What differs from PEFT, beside `get_eva_state_dict`: names in `eva_state_dict` may be those of the plain model; it
    is not emptied; `rank_pattern` and `alpha_pattern` keys may start with `^`, and those written do; the scaling is
    kept under rsLoRA too; layers whose rank changes stay float32 on a half-precision model.

    Args:
        model: A PeftModel whose adapter has `init_lora_weights="eva"`. Changed in place.
        dataloader: Batches; not needed with `eva_state_dict`.
        eva_state_dict: What `get_eva_state_dict` returned.
        forward_fn: See `get_eva_state_dict`, as for the arguments that follow.
        prepare_model_inputs_fn: See there.
        prepare_layer_inputs_fn: See there.
        adapter_name: Which adapter.
        gather_distributed_inputs: See there.
        show_progress_bar: See there.

    Warns:
        UserWarning: Layers that the state dict doesn't name are initialised by PEFT.

    Raises:
        ValueError: No PeftModel, several active adapters, another `init_lora_weights`, or neither data nor state dict.
        LoraInitError: (a ValueError) A tensor doesn't fit its layer.
    """
    if not hasattr(model, "peft_config"):
        raise ValueError("model must be a PeftModel")
    if len(model.active_adapters) > 1:  # type: ignore[arg-type]
        raise ValueError("`initialize_lora_eva_weights` currently only works with a single active adapter")
    if model.peft_config[adapter_name].init_lora_weights != "eva":  # type: ignore[index, union-attr]
        raise ValueError("`initialize_lora_eva_weights` can only be used with `init_lora_weights='eva'`")
    if eva_state_dict is None:
        if dataloader is None:
            raise ValueError("dataloader is required if eva_state_dict is not provided")
        eva_state_dict = get_eva_state_dict(
            model=model,
            dataloader=dataloader,
            forward_fn=forward_fn,
            prepare_model_inputs_fn=prepare_model_inputs_fn,
            prepare_layer_inputs_fn=prepare_layer_inputs_fn,
            adapter_name=adapter_name,
            gather_distributed_inputs=gather_distributed_inputs,
            show_progress_bar=show_progress_bar,
        )
    load_eva_state_dict(model, eva_state_dict, adapter_name)


def _adapter_layers(model: nn.Module, adapter_name: str) -> dict[str, nn.Module]:
    """Find the layers of a PeftModel that have this adapter and that read rows."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.eva import UNSUPPORTED_LORA_MODULES

    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
        and not isinstance(module, UNSUPPORTED_LORA_MODULES)
        and adapter_name in module.lora_A
        and isinstance(module, nn.Module)
    }


def _target_layers(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """Find the layers of a plain model that the config targets; without `target_modules` all linear ones."""
    from peft.tuners.tuners_utils import check_target_module_exists
    from transformers.pytorch_utils import Conv1D

    if isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR:
        # PEFT's EVA takes this for a regular expression, which matches nothing.
        targets = find_targets(model, ALL_LINEAR, config.exclude_modules, config.task_type)
        return {name: model.get_submodule(name) for name in targets.layers}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and (config.target_modules is None or check_target_module_exists(config, name))
    }


def _layer_functions(
    modules: Mapping[str, nn.Module], given: LayerInputs | Mapping[str, LayerInputs] | None
) -> dict[str, LayerInputs | None]:
    if not isinstance(given, Mapping):
        return dict.fromkeys(modules, given)
    known = {plain_name(name) for name in modules}
    unknown = [name for name in given if plain_name(name) not in known]
    if unknown:
        raise ValueError(
            "prepare_layer_inputs_fn is a mapping but the following module names were not found in the model: "
            f"{unknown}"
        )
    functions = {plain_name(name): function for name, function in given.items()}
    return {name: functions.get(plain_name(name)) for name in modules}


@contextmanager
def _adapter_switched_off(model: Any, wrapped: bool) -> Iterator[None]:
    """Run the base model alone; afterwards `requires_grad` is as before, which PEFT's own context doesn't see to."""
    if not wrapped:
        yield
        return
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
