"""Measure the learning rate of an adapter that is on a model, whoever made it, by a few forward passes.

`rates.learning_rate` states the rule: the rate follows from how far a step moves the output of each layer. It needs
three means over tokens, of sum |x_j|, of sum |(A x)_i| and of the mean square of W x. `collect` measures the first and
the last along with the statistics, and the second follows from the spectrum there. An adapter of another tool has no
statistics, so hooks on its A measure the second one here as well.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_init.adapters.directory import carried
from lora_init.adapters.peft_model import adapter_layers, check_fresh
from lora_init.collection.activations import ActivationHooks, Sink
from lora_init.collection.loop import row_norms
from lora_init.collection.processes import Processes
from lora_init.errors import LoraInitError, first_line, is_out_of_memory
from lora_init.layers.grid import layers_in
from lora_init.layers.masks import NothingCountsError, TokenMasks
from lora_init.layers.rows import check_peft, expert_group, experts_of
from lora_init.layers.running import call_model, check_batches, restoring
from lora_init.layers.targets import count_linear, new_heads, output_embedding, trains_new_head
from lora_init.layers.wrappers import plain_name, plain_names, run_eagerly, unwrapped, without_adapter
from lora_init.loading.batches import as_batches, load_batches
from lora_init.rates.learning_rate import LearningRate, Response, response, share_of
from lora_init.rates.training_length import BATCH_SIZE, TrainingLength
from lora_init.starts.weights import LoraWeights
from lora_init.statistics.spectrum import Sizes

_MAX_BATCHES = 8
# In the keys of sums: a suffix for the A of a layer, a prefix for what a group of layers reads.
_A, _X = " A", "input of "
# Classes of PEFT's variants of LoRA that add B A x, begin so: to a weight of another length, to some tokens, or with
# gradients that take less memory.
_OF_B_A = ("Dora", "ALora", "Velora")


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

    Any LoRA, DoRA or aLoRA of PEFT whose B is zero will do: of `get_peft_model`, `PeftModel.from_pretrained`,
    `add_adapter` or `initialize`. Its gradients are not needed, and the model is as it was afterwards. One rate for all
    layers; the optimizer is AdamW with batches of 4 to 32, see `LearningRate`. The processes of a process group measure
    together, as in `collect`: each calls this function with batches of its own, and all get one rate.

    Args:
        model: A model with the adapter.
        batches: As `collect` takes them; with a tokenizer, as `load_batches` does.
        steps: Of the training. Default: what `epochs` are, where the number of examples is known, else 100.
        epochs: How often the training sees each example. Default: what `steps` are, else once.
        train_batch_size: Examples in a step of the training, of all processes and accumulated batches.
        tokenizer: The model's, where `batches` are texts.
        adapter_name: PEFT's name of the adapter.
        freeze_a: Whether A stays as it is in training, which is also read from the parameters and from the record of an
            adapter of ours. Layers whose A and B you froze do not count, where others train.

    Returns:
        The rate, `str()` of which is a sentence; the range in which the best one is likely to be; the layers by how
        much they move.

    Raises:
        LoraInitError: There is no such adapter, or its B is not zero, or it is another variant of LoRA; no batch has a
            token; NaN or inf in a layer.
    """
    if not isinstance(freeze_a, bool):
        raise LoraInitError(f"freeze_a={freeze_a!r}: true or false is expected.")
    layers = layers_of(model, adapter_name) if isinstance(adapter_name, str) else {}
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
        data = batches
    else:
        data = load_batches(batches, tokenizer, samples=64)  # eight batches of eight, as many as are read
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
    base, layers = without_adapter(model), _trained(layers_of(model, adapter_name), adapter_name)
    _check_update(layers, adapter_name)
    config = _config_of(model, adapter_name)
    if config is not None and not freeze_a:
        freeze_a = bool(carried(config.to_dict()).get("freeze_a"))
    responses, unread_experts = measure_responses(base, layers, batches, adapter_name, freeze_a)
    left_out = [name for name in layers if name not in responses] + unread_experts
    task_type, trained_whole = getattr(config, "task_type", None), getattr(config, "modules_to_save", None) or ()
    # Heads, which often begin at random, are trained whole by PEFT, or by hand; the parameters say so. But an adapter
    # that is loaded to be served trains nothing yet, and a body alone has no head yet: there the config says it.
    heads = new_heads(base)
    if not heads and output_embedding(base) is not None:
        new_head = False
    elif heads and any(_weights_of(layers[name], adapter_name)[1].requires_grad for name in responses):
        new_head = any_trains(base, heads)
    else:
        new_head = trains_new_head(heads, task_type, trained_whole)
    linear = [name for name, layer in layers.items() if adapter_name in layer.lora_A]  # and no embedding
    share = share_of(sum(map(layers_in, linear)), count_linear(base, layers, task_type))
    return LearningRate(responses, length, new_head, left_out, share)


def any_trains(base: nn.Module, heads: Iterable[str]) -> bool:
    """Check whether a matrix of one of these modules has a gradient, as after `requires_grad_()` on a head."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = plain_names(base)
    adapted = [name for name, module in modules.items() if isinstance(module, BaseTunerLayer)]
    for head in heads:
        # A and B of a layer in a user's own model; the layer itself, inside PEFT's, is a head like any other.
        if any(head.startswith(f"{layer}.lora_") for layer in adapted):
            continue
        parameters = modules[head].parameters(recurse=False)
        if any(parameter.requires_grad and parameter.dim() > 1 for parameter in parameters):
            return True
    return False


def _config_of(model: nn.Module, adapter_name: str) -> Any:
    """Find the config of an adapter; None if no module has one."""
    for module in model.modules():  # a PeftModel may be held by another module
        configs = getattr(module, "peft_config", {})
        if adapter_name in configs:
            return configs[adapter_name]
    return None


def layers_of(model: Any, adapter_name: str) -> dict[str, Any]:
    """Find the layers that have this adapter, embeddings among them; none in what is no model."""
    if not isinstance(model, nn.Module):
        return {}
    layers = adapter_layers(unwrapped(model), adapter_name)
    # By plain names, since a part of the model may be compiled: layers are counted, and tokens masked, by these.
    return {plain_name(name): layer for name, layer in layers.items()}


def _check_update(layers: Mapping[str, Any], adapter_name: str) -> None:
    """Refuse variants of LoRA in which a layer gets something else than B A x of its input, which the rule is for."""
    for name, layer in layers.items():
        variant = type(getattr(layer, "lora_variant", {}).get(adapter_name)).__name__
        if variant != "NoneType" and not variant.lstrip("_").startswith(_OF_B_A):
            kind = variant.partition("Linear")[0].removesuffix("Embedding")
            raise LoraInitError(
                f"the adapter {adapter_name!r} adds {kind} to {name!r}, and the rule for a rate is for LoRA, DoRA and "
                "aLoRA. Compare a few rates, such as 1e-4, 3e-4 and 1e-3, in short trainings."
            )


def _trained(layers: Mapping[str, Any], adapter_name: str) -> Mapping[str, Any]:
    """Leave out layers whose A and B are frozen, which never move; of an adapter loaded to be served all are."""
    linear = [name for name, layer in layers.items() if adapter_name in layer.lora_A]  # and no embedding
    frozen = {name for name in linear if not any(one.requires_grad for one in _weights_of(layers[name], adapter_name))}
    if len(frozen) == len(linear):
        return layers
    return {name: layer for name, layer in layers.items() if name not in frozen}


# How a response is measured. A first step of Adam moves every entry of B by about the rate eta, whatever the gradient
# is, and the output by eta s sum |(A x)_i|; the move of A adds a term in sum |x_j|. So forward passes over a few
# batches are enough: hooks on each base layer see x and W x, hooks on each A see A x. The A of fused experts is no
# module that a hook could watch, so A x is computed there from the rows that the router sends to each expert.
def measure_responses(
    base: nn.Module, layers: Mapping[str, Any], batches: Iterable[Any], adapter_name: str = "default",
    freeze_a: bool = False, token_mask: str = "attention",
) -> tuple[dict[str, Response], list[str]]:  # fmt: skip
    """Run a model with an adapter in its layers on at most eight batches, and compute how far each layer moves.

    Of fused experts each reads the tokens that the router sends to it, and a token counts once for each of its experts.

    Returns:
        The response of each layer that moves; and the experts that got no token, in layers that do.
    """
    readable = _readable_layers(layers, adapter_name)
    if not readable:
        raise LoraInitError("the adapter is of embeddings or parameters whose A no hook sees: no rate is measured.")
    a_of_expert = _a_of_experts(readable, adapter_name)
    sums, masks = _Sums(a_of_expert), TokenMasks(base, token_mask)
    hooked = _hooked_modules(readable, adapter_name)
    with (
        restoring("lora_variant", readable.values()),
        # To the end, since an adapter may be on the output embedding.
        ActivationHooks(base, hooked, masks, to_the_end=True) as hooks,
        torch.no_grad(),
    ):
        for layer in readable.values():
            layer.lora_variant = {}  # DoRA also multiplies A by a unit matrix, which is no input
        _run_batches(base, hooks, batches, sums)
    with Processes() as processes:
        everywhere = processes.gather((sums.sums, sums.read, hooks.group_of))
    sums.add_all(part[:2] for part in everywhere)
    groups = ChainMap(*(found for *_, found in everywhere))  # a process without a token has found none
    if not sums.sums:
        raise LoraInitError("no batch has a token that counts, so no rate can be told. Check attention_mask.")
    responses: dict[str, Response] = {}
    for name, layer in readable.items():
        group = groups.get(name, name)  # layers that read the same tensor have one sum of inputs
        size = Sizes(sums.mean(_X + group), sums.mean(name) ** 0.5)
        moves = _response_of(layer, adapter_name, size, sums.mean(name + _A), freeze_a)
        if moves is not None:
            responses[name] = moves
    unread_experts = []
    for expert, (name, _) in a_of_expert.items():
        if name in responses and expert not in sums.read:
            unread_experts.append(expert)
    return responses, unread_experts


def _is_of_parameter(layer: Any) -> bool:
    """Return whether a layer adapts a parameter of a module, as PEFT's `target_parameters` makes it."""
    return hasattr(layer, "parameter_name")


def _readable_layers(layers: Mapping[str, Any], adapter_name: str) -> dict[str, Any]:
    """Return the layers whose A x can be read; refuse experts whose widths PEFT exchanges."""
    readable = {}
    for name, layer in layers.items():
        if adapter_name not in layer.lora_A:  # an embedding, whose A is read by no module of its own
            continue
        if _is_of_parameter(layer):
            module = layer.get_base_layer()
            if not experts_of(name, module):  # what other parameters read is not known
                continue
            check_peft(name, module)
        readable[name] = layer
    return readable


def _hooked_modules(layers: Mapping[str, Any], adapter_name: str) -> dict[str, nn.Module]:
    """Return what hooks watch: all base layers, then the A of each layer but fused experts."""
    modules = {name: layer.get_base_layer() for name, layer in layers.items()}
    for name, layer in layers.items():
        if not _is_of_parameter(layer):
            modules[name + _A] = layer.lora_A[adapter_name]
    return modules


def _a_of_experts(layers: Mapping[str, Any], adapter_name: str) -> dict[str, tuple[str, Tensor]]:
    """Return the layer and the A [r, d_in] of each expert, by the name of the group of rows that it reads."""
    a_of_expert = {}
    for name, layer in layers.items():
        if not _is_of_parameter(layer):
            continue
        a, b = _weights_of(layer, adapter_name)
        # experts * r x d_in -> experts x r x d_in
        for number, a_of_one in enumerate(LoraWeights(a, b).of_experts(layer.num_experts).a):
            a_of_expert[expert_group(name, number)] = name, a_of_one
    return a_of_expert


def _weights_of(layer: Any, adapter_name: str) -> tuple[Tensor, Tensor]:
    return layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight


def _run_batches(base: nn.Module, hooks: ActivationHooks, batches: Iterable[Any], sums: _Sums) -> None:
    """Run the model on the first batches; what it raises names the batch, but for a lack of memory."""
    for number, batch in enumerate(islice(batches, _MAX_BATCHES)):
        try:
            with hooks.watch(batch, sums) as moved, run_eagerly():
                call_model(base, moved)
        except NothingCountsError:  # the next batch may have a token that counts
            continue
        except Exception as error:
            if is_out_of_memory(error):  # the entrances have a line of their own for that
                raise
            if isinstance(error, LoraInitError):
                cause = str(error)
            else:
                cause = f"{type(base).__name__} says: {first_line(error)}"
            raise LoraInitError(f"batch {number}: {cause}") from error


def _response_of(layer: Any, adapter_name: str, size: Sizes, ax: float, freeze_a: bool) -> Response | None:
    """Compute the response of a layer from the mean of sum |(A x)_i|; None if it does not move."""
    a, b = _weights_of(layer, adapter_name)
    # An adapter that is loaded to be served trains neither, so A counts as frozen only beside a B that is trained.
    is_frozen = freeze_a or (b.requires_grad and not a.requires_grad)
    return response(size, ax, layer.r[adapter_name], layer.scaling[adapter_name], is_frozen)


class _Sums(Sink):
    """Sums over tokens: of |x_j| for each group, of |(A x)_i| for each A, of the mean square for each base layer."""

    def __init__(self, a_of_expert: Mapping[str, tuple[str, Tensor]]) -> None:
        self.sums: dict[str, tuple[float, int]] = {}  # by key: the sum, and how many tokens it is over
        self.read: set[str] = set()  # experts that got tokens
        self._a_of_expert = a_of_expert  # the layer and the A [r, d_in] of each expert

    def add_all(self, everywhere: Iterable[tuple[dict[str, tuple[float, int]], set[str]]]) -> None:
        """Take the sums, and the experts that got tokens, of all processes together."""
        self.sums = {}
        for sums, read in everywhere:
            self.read |= read
            for key, (added, n) in sums.items():
                self._put(key, added, n)

    def rows(self, group: str, rows: Tensor) -> None:
        """Add to the sum of a group."""
        if group not in self._a_of_expert:
            self._add(_X + group, group, row_norms(rows, None, 1))
        else:
            layer, a = self._a_of_expert[group]
            self.read.add(group)
            self.output(layer + _A, F.linear(rows, a.to(rows.dtype)), None)  # tokens x d_in -> tokens x r

    def output(self, layer: str, y: Tensor, tokens: Tensor | None) -> None:
        """Add to the sum of an A, whose outputs are added up by size, or of a base layer, by mean square."""
        if layer.endswith(_A):
            self._add(layer, layer.removesuffix(_A), row_norms(y, tokens, 1))
        else:
            self._add(layer, layer, row_norms(y, tokens, 2).square() / y.shape[-1])

    def _add(self, key: str, layer: str, values: Tensor) -> None:
        added = float(values.sum())
        if not math.isfinite(added):
            raise LoraInitError(f"layer {layer!r}: what it reads or computes contains NaN or inf. Check the model.")
        self._put(key, added, len(values))

    def _put(self, key: str, added: float, n: int) -> None:
        total, count = self.sums.get(key, (0.0, 0))
        self.sums[key] = total + added, count + n

    def mean(self, key: str) -> float:
        """Compute the mean over tokens; 0 where there was none."""
        total, count = self.sums.get(key, (0.0, 0))
        return total / count if count else 0.0
