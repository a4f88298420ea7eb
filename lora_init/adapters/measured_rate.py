"""The learning rate of an adapter that is on a model, ours or not: a few forward passes of its own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_init.adapters.directory import carried
from lora_init.adapters.peft_model import adapter_layers, check_fresh
from lora_init.collection.activations import ActivationHooks, Sink
from lora_init.collection.collect import check_batches
from lora_init.collection.loop import row_norms
from lora_init.errors import LoraInitError, first_line, is_out_of_memory
from lora_init.layers.grid import layers_in
from lora_init.layers.masks import NothingCountsError, TokenMasks
from lora_init.layers.rows import check_peft, expert_group, experts_of
from lora_init.layers.running import call_model, restoring
from lora_init.layers.targets import count_linear, new_heads, trains_new_head
from lora_init.layers.wrappers import unwrapped, without_adapter
from lora_init.loading.batches import as_batches, load_batches
from lora_init.rates.learning_rate import LearningRate, Response, response, share_of
from lora_init.rates.training_length import BATCH_SIZE, TrainingLength
from lora_init.starts.weights import LoraWeights
from lora_init.statistics.spectrum import Sizes

_MAX_BATCHES = 8
_A, _X = " A", "input of "  # in the keys of sums


def learning_rate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    steps: int | None = None,
    epochs: float | None = None,
    train_batch_size: int = BATCH_SIZE,
    tokenizer: Any = None,
    adapter_name: str = "default",
    freeze_a: bool = False,
) -> LearningRate:
    """Compute the learning rate of a LoRA adapter from at most eight forward passes, before it is trained.

    Any adapter of PEFT whose B is zero will do: of `get_peft_model`, `PeftModel.from_pretrained`, `add_adapter` or
    `initialize`. Its gradients are not needed, and the model is as it was afterwards. One rate for all layers; the
    optimizer is AdamW with batches of 4 to 32, see `LearningRate`.

    Args:
        model: A model with the adapter.
        batches: As `collect` takes them; with a tokenizer, as `load_batches` does.
        steps: Of the training. Default: what `epochs` are, where the number of examples is known, else 100.
        epochs: How often the training sees each example. Default: what `steps` are, else once.
        train_batch_size: Examples in a step of the training, of all processes and accumulated batches.
        tokenizer: The model's, where `batches` are texts.
        adapter_name: PEFT's name of the adapter.
        freeze_a: Whether A stays as it is in training, which is also read from the parameters and from the record of an
            adapter of ours.

    Returns:
        The rate, `str()` of which is a sentence; the range in which the best one is likely to be; the layers by how
        much they move.

    Raises:
        LoraInitError: There is no such adapter, or its B is not zero; no batch has a token; NaN or inf in a layer.
    """
    if not isinstance(freeze_a, bool):
        raise LoraInitError(f"freeze_a={freeze_a!r}: true or false is expected.")
    layers = layers_of(model, adapter_name)
    if not layers:
        raise LoraInitError(
            f"learning_rate(): {type(model).__name__} has no LoRA adapter {adapter_name!r}. Put one on: initialize(), "
            "get_peft_model() or PeftModel.from_pretrained()."
        )
    for layer in layers.values():
        if adapter_name not in layer.active_adapters or layer.disable_adapters or layer.merged:
            raise LoraInitError(
                f"the adapter {adapter_name!r} is not active, disabled or merged, so no pass goes through it. Call "
                "set_adapter(), enable_adapter_layers() or unmerge_adapter() first."
            )
    check_fresh(layers, adapter_name, f"the adapter {adapter_name!r}", "The rule is for adapters before training.")
    if tokenizer is None:
        check_batches(batches, "learning_rate()")
    data = batches if tokenizer is None else load_batches(batches, tokenizer, samples=64)
    data = as_batches(data, without_adapter(unwrapped(model)), 0)
    rows = getattr(data, "settings", {}).get("rows")
    length = TrainingLength.plan(rows, steps, epochs, train_batch_size)
    return measure_rate(model, data, length, adapter_name, freeze_a)


def measure_rate(
    model: nn.Module, batches: Iterable[Any], length: TrainingLength, adapter_name: str = "default",
    freeze_a: bool = False,
) -> LearningRate:  # fmt: skip
    """Measure the rate of an adapter, whatever its B is: of starts whose B is not zero the rule holds as well."""
    model = unwrapped(model)
    base, layers = without_adapter(model), layers_of(model, adapter_name)
    configs = (getattr(module, "peft_config", {}) for module in model.modules())  # a PeftModel may be held by another
    config = next((adapters[adapter_name] for adapters in configs if adapter_name in adapters), None)
    freeze_a = freeze_a or bool(config and carried(config.to_dict()).get("freeze_a"))
    responses, unread = measure_responses(base, layers, batches, adapter_name, freeze_a)
    left_out = [name for name in layers if name not in responses] + unread
    # PEFT trains the head of such a task whole, which often begins at random, and what else it is told to.
    task_type, whole = getattr(config, "task_type", None), getattr(config, "modules_to_save", None) or ()
    new_head = trains_new_head(new_heads(base), task_type, whole)
    linear = [name for name, layer in layers.items() if adapter_name in layer.lora_A]  # and no embedding
    share = share_of(sum(map(layers_in, linear)), count_linear(base, layers, task_type))
    return LearningRate(responses, length, new_head, left_out, share)


def layers_of(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    """Find the layers that have this adapter, embeddings among them."""
    layers = adapter_layers(unwrapped(model)) if isinstance(model, nn.Module) else {}
    return {name: layer for name, layer in layers.items() if adapter_name in getattr(layer, "r", {})}


def measure_responses(
    base: nn.Module, layers: Mapping[str, Any], batches: Iterable[Any], adapter_name: str = "default",
    freeze_a: bool = False, token_mask: str = "attention",
) -> tuple[dict[str, Response], list[str]]:  # fmt: skip
    """Run a model with an adapter in its layers on at most eight batches, and compute how far each layer moves.

    Of fused experts each reads the tokens that the router sends to it, and a token counts once for each of its experts.
    The names of experts that got none, of parameters that say how far they move, are returned beside the responses.
    """
    # The A of an embedding is read by no module of its own, and what other parameters read is not known.
    seen = {name: layer for name, layer in layers.items() if adapter_name in layer.lora_A}
    fused = {name: layer for name, layer in seen.items() if hasattr(layer, "parameter_name")}
    known = {name for name, layer in fused.items() if experts_of(name, layer.get_base_layer())}
    for name in (name for name in fused if name in known):
        check_peft(name, fused[name].get_base_layer())
    seen = {name: layer for name, layer in seen.items() if name in known or name not in fused}
    if not seen:
        raise LoraInitError("the adapter is of embeddings or parameters whose A no hook sees: no rate is measured.")
    watched = {name: layer.get_base_layer() for name, layer in seen.items()}
    watched |= {name + _A: layer.lora_A[adapter_name] for name, layer in seen.items() if name not in known}
    pairs = {name: LoraWeights(*(part[adapter_name].weight for part in (layer.lora_A, layer.lora_B)))
             for name, layer in seen.items() if name in known}  # fmt: skip
    each = {name: pair.of_experts(fused[name].num_experts).a for name, pair in pairs.items()}
    of_expert = {expert_group(name, i): (name, own) for name, a in each.items() for i, own in enumerate(a)}
    sums, masks = _Sums(of_expert), TokenMasks(base, token_mask)
    with (
        restoring("lora_variant", seen.values()),
        ActivationHooks(base, watched, masks, to_the_end=True) as hooks,
        torch.no_grad(),
    ):
        for layer in seen.values():
            layer.lora_variant = {}  # DoRA also multiplies A by a unit matrix, which is no input
        for number, batch in enumerate(islice(batches, _MAX_BATCHES)):
            try:
                with hooks.watch(batch, sums) as moved:
                    call_model(base, moved)
            except NothingCountsError:
                continue
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                said = error if isinstance(error, LoraInitError) else f"{type(base).__name__} says: {first_line(error)}"
                raise LoraInitError(f"batch {number}: {said}") from error
    if not sums.sums:
        raise LoraInitError("no batch has a token that counts, so no rate can be told. Check attention_mask.")
    responses: dict[str, Response] = {}
    for name, layer in seen.items():
        size = Sizes(sums.mean(_X + hooks.group_of.get(name, name)), sums.mean(name) ** 0.5)
        a, b = (part[adapter_name].weight for part in (layer.lora_A, layer.lora_B))
        frozen = freeze_a or (b.requires_grad and not a.requires_grad)  # neither does while an adapter is served
        found = response(size, sums.mean(name + _A), layer.r[adapter_name], layer.scaling[adapter_name], frozen)
        responses |= {name: found} if found else {}
    return responses, [one for one, (name, _) in of_expert.items() if name in responses and one not in sums.read]


class _Sums(Sink):
    """Sums over tokens: of |x_j| for each group, of |(A x)_i| for each A, of the mean square for each base layer."""

    def __init__(self, of_expert: Mapping[str, tuple[str, Tensor]]) -> None:
        self.sums: dict[str, tuple[float, int]] = {}
        self.read: set[str] = set()  # experts that got tokens
        self._of_expert = of_expert  # the layer and the A [r, d_in] of each expert

    def rows(self, group: str, rows: Tensor) -> None:
        """Add to the sum of a group."""
        if group not in self._of_expert:
            self._add(_X + group, group, row_norms(rows, None, 1))
        else:
            layer, a = self._of_expert[group]
            self.read.add(group)
            self.output(layer + _A, F.linear(rows, a.to(rows.dtype)), None)

    def output(self, layer: str, y: Tensor, tokens: Tensor | None) -> None:
        of_a = layer.endswith(_A)
        norms = row_norms(y, tokens, 1 if of_a else 2)
        self._add(layer, layer.removesuffix(_A), norms if of_a else norms.square() / y.shape[-1])

    def _add(self, key: str, layer: str, values: Tensor) -> None:
        total, count = self.sums.get(key, (0.0, 0))
        added = float(values.sum())
        if not math.isfinite(added):
            raise LoraInitError(f"layer {layer!r}: what it reads or computes contains NaN or inf. Check the model.")
        self.sums[key] = total + added, count + len(values)

    def mean(self, key: str) -> float:
        """Compute the mean over tokens; 0 where there was none."""
        total, count = self.sums.get(key, (0.0, 0))
        return total / count if count else 0.0
