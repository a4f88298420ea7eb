"""The loop under the drop-ins for PEFT's EVA: rows by PEFT's functions, an end by its `tau`, ranks by its `rho`."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lora_init.adapters.eva_inputs import LayerInputs, first_tensor
from lora_init.adapters.eva_weights import pattern_value
from lora_init.adapters.initializers import eva, layer_generator
from lora_init.collection.activations import ActivationTap
from lora_init.collection.mail import Message
from lora_init.collection.team import Team
from lora_init.errors import LoraInitError
from lora_init.statistics.incremental_svd import IncrementalSVD, apply_updates
from lora_init.statistics.tensorfile import flatten, nest

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
