"""From a model and batches to `Statistics`."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Collection, Iterable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora_init
from lora_init.collection.activations import ActivationTap, Forward, call_model
from lora_init.collection.backward import GradientTap, Loss
from lora_init.collection.loop import collect_groups
from lora_init.collection.processes import Checkpoint, Team, check_alike
from lora_init.collection.state import Collected
from lora_init.errors import LoraInitError
from lora_init.layers.targets import ALL_LINEAR, Targets, find_targets
from lora_init.layers.wrappers import (
    Precision,
    class_name,
    gathered,
    is_tensor_parallel,
    plain_names,
    unwrapped,
    weights,
)
from lora_init.statistics.gradient_spectrum import GradientSpectrum, freeze_gradient, is_weighted, weighted_group
from lora_init.statistics.statistics import Provenance, Statistics, notes_on_experts


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during `collect`, with what was collected so far.

    Attributes:
        statistics: Statistics of the batches that were complete, or None if there was none.
    """

    def __init__(self, statistics: Statistics | None) -> None:
        super().__init__("interrupted")
        self.statistics = statistics


def collect(
    model: nn.Module,
    batches: Iterable[Any],
    target_modules: str | Collection[str] = ALL_LINEAR,
    *,
    exclude_modules: str | Collection[str] | None = None,
    task_type: str | None = None,
    target_parameters: Collection[str] | None = None,
    rank: int = 16,
    rho: float = 2.0,
    center: bool = True,
    token_mask: str = "attention",
    max_batches: int = 64,
    tolerance: float = 0.02,
    seed: int = 0,
    forward: Forward | None = None,
    data: str = "",
    progress: bool | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: float = 60.0,
    resume: bool = False,
    gradients: bool = False,
    loss: Loss | None = None,
) -> Statistics:
    """Learn the principal directions of what each targeted layer receives, from one pass over sample data.

    Every batch first measures, on rows not used yet, how much of their variance the components found so far capture.
    What any directions can capture lies between that held-out share and the share on the rows seen; a layer is done
    when the first, less its standard error, is within `tolerance` of the second, and then costs nothing further. The
    pass stops when all are done (`"converged"`), after `max_batches`, or when the data ends (`"exhausted"`).

    In a process group of `torch.distributed` all processes call it, each with batches of its own or all with the same,
    of which each then takes its part. They meet now and then to merge what they have found and to decide which layers
    are done, and all return the same statistics, bit for bit.

    Cost: a forward pass of the model's body for each batch, and about a tenth of it on top. Memory: 1.5 * rank * rho
    float32 rows of width d_in for each distinct input, and as much again within a batch.

    Args:
        model: Any torch model, compiled or not. Untouched: weights, hooks, training flags are as before afterwards.
        batches: Mappings (as from a tokenizer or a DataLoader), tensors or sequences. Read once. In several processes
            a loader for one of them, or one that gives all the same.
        target_modules: As in PEFT: `"all-linear"`, a regular expression, or names or endings.
        exclude_modules: As in PEFT: a regular expression, or names or endings.
        target_parameters: As in PEFT: names or endings of fused parameters of experts. Each expert has a decomposition
            of the rows that the router sends to it, and there is one of all together, which the ranks go by.
        task_type: As in PEFT; goes into the adapter's configuration.
        rank: Average rank per layer that the statistics must serve.
        rho: Largest rank of a single layer, over `rank`: `round(rho * rank)` components are kept.
        center: Subtract the mean (PCA, as in PEFT and the EVA authors' code). False gives the uncentred second moment
            of the paper's theorem.
        token_mask: `"attention"` counts all tokens but padding; `"labels"` only those with a label.
        max_batches: Bound on the number of batches, of all processes together.
        tolerance: Relative gap between seen and held-out captured variance at which a layer is done.
        seed: Seed of the decomposition.
        forward: Function of model and batch, for models that are not called with the batch as it is.
        data: Description of the data in words, kept with the result.
        progress: Show a progress bar on stderr; by default only on a terminal.
        checkpoint: File to write the state of the pass to. It stays after the pass, for you to delete.
        checkpoint_every: Seconds between two writings of it.
        resume: Go on from `checkpoint` if it is there: read past the batches that were used and end with the result
            of an uninterrupted pass, bit for bit on the same machine. `max_batches` may have changed, nothing else.
        gradients: Run each batch backward, too, and learn what the loss depends on, see `Statistics.gradient`. Batches
            need labels. No weight's gradient is computed, so the memory is that of the activations and of
            1.5 * rank * rho rows of width 2 d_in + d_out for each layer. What layers read in a batch of more than 128
            tokens is rounded to bfloat16.
        loss: With gradients: function of what the model (or `forward`) returns and the batch, to the loss, a mean over
            the batch's labels. Default: the `loss` that a model of transformers returns for a batch with `labels`.

    Raises:
        LoraInitError: Targets match nothing; no batch, or none with tokens that count; labels missing; NaN or inf in a
            layer's input; rows of varying width; out of memory; arguments out of range; a checkpoint that cannot be
            written, or belongs to another model, other data or other arguments. In several processes, on all of them:
            one has another model or other arguments, raised, died, or did not answer for `LORA_INIT_TIMEOUT` seconds.
            With gradients: no labels and no `loss`, a loss that is not finite, layers that are not linear, a base that
            gives no gradients.
        Interrupted: Ctrl-C; carries the statistics of the batches that were complete.

    Example:
        >>> import torch
        >>> from torch import Tensor, nn
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> stats = collect(model, [torch.randn(32, 8) for _ in range(4)], rank=2)
        >>> stats["0"].components.shape, stats.provenance.stop_reason
        (torch.Size([4, 8]), 'exhausted')
    """
    with Team() as team:
        if rank < 1 or rho < 1.0 or tolerance < 0.0:
            raise LoraInitError(f"rank={rank}, rho={rho}, tolerance={tolerance}; expected at least 1, 1.0 and 0.0.")
        if resume and checkpoint is None:
            raise LoraInitError("resume=True needs checkpoint=, the file to go on from.")
        model, precision = unwrapped(model), Precision()
        targets = find_targets(model, target_modules, exclude_modules, task_type, target_parameters)
        narrow = [target for target in targets.layers.values() if target.in_features < rank]
        if narrow:
            raise LoraInitError(
                f"layer {narrow[0].name!r}: rank={rank} is larger than its input width {narrow[0].in_features} "
                f"({len(narrow)} such layers). Use a smaller rank, or exclude them."
            )
        if is_tensor_parallel(model):
            raise LoraInitError(
                f"{class_name(model)} is split by tensor parallelism: in each process a layer reads only a part of its "
                "input. Load it with device_map=, or shard it with fully_shard."
            )
        print_of_model = fingerprint(model)  # before the pass: bitsandbytes repacks weights when they are first used
        asked = {
            "model": f"{class_name(model)} {print_of_model}",
            "data": data,
            "layers": f"{len(targets.layers)} ({_hash_of(targets)})",
            "rank": rank,
            "rho": rho,
            "center": center,
            "token_mask": token_mask,
            "tolerance": tolerance,
            "seed": seed,
            "gradients": gradients,
        }
        check_alike(team, {**asked, "max_batches": max_batches, "checkpoint": checkpoint is not None, "resume": resume})
        kept = Checkpoint(checkpoint, checkpoint_every, resume, asked) if checkpoint is not None else None
        modules = plain_names(model)

        def forward_as_called(model: nn.Module, batch: Any) -> Any:
            with precision.on():
                return (forward or partial(call_model, with_labels=gradients))(model, batch)

        n_triplets = max(round(rho * rank), 2 * rank)  # lora-ga needs two a rank
        with precision.off():
            found = collect_groups(
                model,
                {name: modules[target.module] for name, target in targets.layers.items()},
                batches,
                n_components=round(rho * rank),
                center=center,
                token_mask=token_mask,
                max_batches=max_batches,
                tolerance=tolerance,
                seed=seed,
                forward=forward_as_called,
                progress=progress,
                checkpoint=kept,
                gradients=_backward(gradients, targets, forward_as_called, loss, n_triplets, forward is not None),
                team=team,
            )
        team.finish()
    if found.n_batches == 0:
        if found.stop_reason == "interrupted":
            raise Interrupted(None)
        raise LoraInitError("there is no batch to learn from: the data is empty. Pass at least one batch.")
    provenance = Provenance(
        model_id=str(getattr(getattr(model, "config", None), "name_or_path", "") or ""),
        model_class=class_name(model),
        fingerprint=print_of_model,
        n_parameters=count_parameters(model),
        target_modules=_listed(target_modules),
        exclude_modules=None if exclude_modules is None else _listed(exclude_modules),
        task_type=task_type,
        target_parameters=None if target_parameters is None else sorted(target_parameters),
        data=data,
        center=center,
        token_mask=token_mask,
        seed=seed,
        rank=rank,
        n_batches=found.n_batches,
        n_samples=max(record.svd.n_samples for record in found.groups.values()),
        stop_reason=found.stop_reason,
        seconds={part: round(value, 3) for part, value in found.seconds.items()},
        versions={
            "lora_init": lora_init.__version__,
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "python": platform.python_version(),
        },
        notes=_notes(found, targets, round(rho * rank)),
        gradients=gradients,
        n_labels=found.n_labels,
    )
    groups = {name: record.svd.spectrum() for name, record in found.groups.items() if not is_weighted(name)}
    statistics = Statistics(
        groups=groups,
        group_of=found.group_of,
        targets={name: targets.layers[name] for name in found.group_of},
        provenance=provenance,
        held_out={name: found.groups[name].held_out() for name in groups},
        batch_ratios={
            name: torch.stack(list(found.groups[name].ratios))[:, : groups[name].n_components]
            for name in groups
            if found.groups[name].ratios
        },
        unsupported={**targets.unsupported, **{name: targets.layers[name].kind for name in found.never_ran}},
        gradients=_gradients(found, targets, modules),
    )
    provenance.notes.extend(notes_on_experts(statistics))
    if found.stop_reason == "interrupted":
        raise Interrupted(statistics)
    return statistics


def _listed(patterns: str | Collection[str]) -> str | list[str]:
    return patterns if isinstance(patterns, str) else sorted(patterns)


def _hash_of(targets: Targets) -> str:
    return hashlib.sha256(repr(sorted(targets.layers.values(), key=lambda t: t.name)).encode()).hexdigest()[:8]


def _backward(
    gradients: bool, targets: Targets, forward: Forward, loss: Loss | None, n_triplets: int, own_forward: bool
) -> Callable[[ActivationTap], GradientTap] | None:
    if loss is not None and not gradients:
        raise LoraInitError("loss= is for gradients=True; without gradients no loss is computed.")
    if not gradients:
        return None
    return partial(
        GradientTap, targets=targets.layers, forward=forward, loss=loss, n_triplets=n_triplets, own_forward=own_forward
    )


def _gradients(found: Collected, targets: Targets, modules: dict[str, nn.Module]) -> dict[str, GradientSpectrum]:
    frozen = {}
    for name in found.group_of:
        if name in found.gradients:
            weight = getattr(modules[name], "weight", None)
            plain = None
            if isinstance(weight, nn.Parameter) and weight.is_floating_point():
                plain = gathered(weight.detach())
            if plain is not None and targets.layers[name].kind == "Conv1D":
                plain = plain.T
            weighted = found.groups[weighted_group(name)].svd.spectrum()
            frozen[name] = freeze_gradient(found.gradients[name], weighted, found.n_labels, plain)
    return frozen


def _notes(found: Collected, targets: Targets, n_components: int) -> list[str]:
    notes = [f"{name}: {reason}; PEFT's own initialisation." for name, reason in targets.reasons.items()]
    notes += [f"{name}: never ran; PEFT's own initialisation." for name in found.never_ran]
    notes += [
        f"{name}: runs up to {calls} times in a forward pass; all its inputs count."
        for name, calls in found.n_calls.items()
        if calls > 1
    ]
    for group in dict.fromkeys(found.group_of.values()):
        record = found.groups[group]
        spectrum = record.svd.spectrum()
        expected = min(n_components, spectrum.components.shape[1])
        if spectrum.n_components < expected:
            notes.append(
                f"{group}: {spectrum.n_samples} rows span only {spectrum.n_components} of {expected} components."
            )
    silent = [name for name, mean in found.gradients.items() if not mean.squares.any()]
    if silent:
        notes.append(f"{silent[0]}: the loss does not depend on its output ({len(silent)} such layers).")
    return notes


def count_parameters(model: nn.Module) -> int:
    """Count a model's parameters, each shared one once, 4-bit weights by their unpacked size."""
    states = ((p, getattr(p, "quant_state", None)) for p in model.parameters())
    return sum(p.numel() if state is None else state.shape.numel() for p, state in states)


def _flat(weight: Tensor) -> Tensor:
    try:
        return weight.reshape(-1)
    except NotImplementedError:  # a quantised weight in a tensor class of its own, such as torchao's
        return weight.dequantize().reshape(-1)


def fingerprint(model: nn.Module) -> str:
    """Tell models apart: a hash of the names and shapes of the weights and of 16 values of each.

    Values are rounded to bfloat16, so that one checkpoint gives one fingerprint in float32 and in bfloat16.

    Returns:
        32 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, weight in weights(unwrapped(model)):
        digest.update(f"{name}:{tuple(weight.shape)};".encode())
        if weight.device.type != "meta" and weight.numel():
            flat = _flat(weight)
            places = torch.linspace(0, flat.numel() - 1, 16, dtype=torch.float64).long()
            values = flat[places.to(flat.device)].to(torch.bfloat16).cpu()
            digest.update(values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:32]
