"""From a model and batches to `Statistics`: the entrance to a pass, and the file that it keeps."""

from __future__ import annotations

import hashlib
import math
import platform
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lora_init
from lora_init.collection.activations import ActivationHooks
from lora_init.collection.backward import BackwardHooks
from lora_init.collection.loop import TOLERANCE, Collected, Pass, progress_bar, run_pass
from lora_init.collection.losses import Loss
from lora_init.collection.processes import Processes, digest_of, own_batches
from lora_init.collection.settings import Position, read_settings
from lora_init.errors import LoraInitError, check_number, check_switches, explain, warn
from lora_init.files import as_path, check_writable, locked
from lora_init.layers.grid import one_line_each, some, span
from lora_init.layers.identity import count_parameters, dtype_of, fingerprint, model_config
from lora_init.layers.masks import TokenMasks
from lora_init.layers.rows import warn_of_experts_left_out
from lora_init.layers.running import Forward, call_model, check_batches
from lora_init.layers.targets import ALL_LINEAR, HEADS, Targets, count_linear, find_targets, linear_layers, new_heads
from lora_init.layers.wrappers import (
    Precision,
    class_name,
    is_sharded,
    is_tensor_parallel,
    model_id,
    plain_names,
    quantization_of,
    read_weight,
    unwrapped,
)
from lora_init.loading.batches import as_batches
from lora_init.loading.models import check_task_type, task_of
from lora_init.packages import check_takes
from lora_init.statistics.gradient_spectrum import GradientSpectrum, freeze_gradient
from lora_init.statistics.spectrum import Sizes, Spectrum
from lora_init.statistics.statistics import SPARE, Provenance, Statistics, notes_on_experts


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during `collect`, with what was collected so far.

    Attributes:
        statistics: Statistics of the batches that were complete, or None if there was none.
    """

    def __init__(self, statistics: Statistics | None) -> None:
        super().__init__("interrupted")
        self.statistics = statistics


class OtherSettingsError(LoraInitError):
    """A statistics file was made from other data or with other settings; `difference` is a sentence about it."""

    def __init__(self, difference: str) -> None:
        remedy = "Pass overwrite=True to begin again, or use the file as it is: Statistics.load."
        super().__init__(f"{difference} {remedy}")
        self.difference = difference


@dataclass(frozen=True)
class _Job:
    """The layers that a pass reads, how it runs the model, and where its result goes."""

    model: nn.Module
    targets: Targets
    modules: Mapping[str, nn.Module]  # all of the model
    provenance: Provenance  # as it is before the pass
    forward: Forward
    loss: Loss | None
    file: Path | None
    overwrite: bool
    progress: bool | None
    skip_bad_batches: int
    left_out: str  # a warning of experts that a selection of all linear layers has not; empty for none

    @property
    def n_components(self) -> int:
        """Components of each layer; no input has more of them than the widest one has columns."""
        widest = max(target.in_features for target in self.targets.layers.values())
        return min(round(float(self.provenance.settings["rho"]) * self.provenance.rank), widest)


def collect(
    model: nn.Module,
    batches: Iterable[Any],
    target_modules: str | Collection[str] = ALL_LINEAR,
    *,
    exclude_modules: str | Collection[str] | None = None,
    task_type: str | None = None,
    target_parameters: Collection[str] | None = None,
    rank: int = 16,
    rho: float = SPARE,
    center: bool = True,
    token_mask: str = "attention",
    max_batches: int = 64,
    tolerance: float = TOLERANCE,
    seed: int = 0,
    forward: Forward | None = None,
    data: str = "",
    progress: bool | None = None,
    statistics: str | Path | None = None,
    overwrite: bool = False,
    gradients: bool = False,
    loss: Loss | None = None,
    skip_bad_batches: int = 0,
) -> Statistics:
    """Learn the principal directions of what each targeted layer receives, from one pass over sample data.

    Even batches go to one half, odd ones to the other. If both halves give the same start, other data would give it,
    too. The share of it that a start would keep on other data (`provenance.keeps`) is estimated by the variance of one
    half that the first `rank` directions of the other capture, over the variance that its own directions capture; for
    gradients it is the cosine of the two means. The pass stops when that share is at least 1 - `tolerance` in the mean
    over layers, and new batches are captured as well as those before (`"converged"`), after `max_batches`, or when the
    data ends (`"exhausted"`). The result merges both halves.

    The order of the batches must be random: in sorted data (all of one kind, then all of another) the first kind alone
    would seem to be enough. `load_batches` shuffles. A sharp fall of the held-out share causes a warning.

    In a process group of `torch.distributed` all processes call this function, each with batches of its own, or all
    with the same batches, of which each takes its part. Each process decides when its own batches are enough. At the
    end the findings are merged, and all processes return the same statistics.

    Cost: a forward pass of the model's body for each batch, and 0.28 of it on top (processor time of one thread, 16
    batches). Memory: 8 * rank * rho float32 rows of width d_in for each distinct input, up to 15 * rank * rho in long
    passes.

    Args:
        model: Any torch model, compiled or not. Its weights, hooks and training flags are unchanged afterwards.
        batches: Mappings (as from a tokenizer or a DataLoader), tensors or sequences, in random order. Read once. In
            several processes a loader for one of them, or one that gives all the same. A tokenized `datasets.Dataset`
            (with `input_ids`) is shuffled and padded in batches of eight.
        target_modules: As in PEFT: `"all-linear"`, a regular expression, or names or endings. Also `"attention"`,
            `"mlp"` or `"cross-attention"`, see `find_targets`.
        exclude_modules: As in PEFT: a regular expression, or names or endings.
        target_parameters: As in PEFT: names or endings of fused parameters of experts. Each expert has a decomposition
            of the rows that the router sends to it, and there is one of all experts, which the ranks go by.
        task_type: As in PEFT; goes into the adapter's configuration. Default: the type of a classifier whose head PEFT
            knows, since its head is then trained whole and saved. Heads of other models are for `modules_to_save`.
        rank: Average rank per layer that the statistics must serve.
        rho: Largest rank of a single layer, over `rank`, that can be planned later: `round(rho * rank)` components are
            kept.
        center: Subtract the mean (PCA, as in PEFT and the EVA authors' code). False gives the uncentered second moment
            of the paper's theorem.
        token_mask: `"attention"` counts all tokens but padding; `"labels"` only those with a label. Without gradients
            these are the tokens that a label stands at, as in EVA: what the model reads there. With gradients of a
            causal language model they are those that predict a labelled one, the tokens before: the loss depends on
            what is computed there. The mean gradient is then of a weight that is used at these tokens alone: rows that
            predict no label, such as a prompt's, reach the loss through attention and are left out.
        max_batches: Bound on the number of batches, of all processes.
        tolerance: Share of what the start captures that it may lose on other data.
        seed: Seed of the decomposition.
        forward: Function of model and batch, for models that are not called with the batch as it is.
        data: Description of the data in words, kept with the result. Batches from `load_batches` also bring along the
            settings that they were made with.
        progress: Show a progress bar on stderr; by default only on a terminal.
        statistics: File for the result. It is written every minute, after Ctrl-C, after an error and at the end, in one
            piece, and says whether the pass was complete. A complete file is returned; an incomplete one is resumed,
            provided the batches are the same. Lists are compared in full, loaders by their first batch, functions by
            name. No other pass can use the file meanwhile.
        overwrite: Collect again, and replace that file.
        gradients: Run each batch backward, too, and learn what the loss depends on, see `Statistics.gradient`. Batches
            need labels. No weight's gradient is computed, so the memory holds the activations and
            3 * rank * rho rows of width 2 d_in + d_out for each layer.
        loss: With gradients: function of what the model (or `forward`) returns and the batch, to the loss, a mean over
            the batch's labels. Default: the `loss` that a model of transformers returns for a batch with `labels`.
        skip_bad_batches: How many batches, of all processes, may fail (as by NaN, a loss that is not finite, or a file
            that cannot be read): they are left out, counted in `provenance.settings["bad_batches"]`, and named in its
            notes. The first batch has to be readable.

    Raises:
        LoraInitError: Targets match nothing; no batch, or none with tokens that count; labels missing; NaN or inf in a
            layer's input; rows of varying width; out of memory; arguments out of range; a statistics file that cannot
            be written, is in use by another pass, or belongs to another model, other data or other settings. In several
            processes, on all of them, if one has another model or other arguments, or a batch of one failed; if one has
            ended, or has not answered within the timeout of the process group, on those that wait for it.
            With gradients: no labels and no `loss`, a loss that is not finite, layers that are not linear, a base that
            gives no gradients.
        Interrupted: Ctrl-C; carries the statistics of the batches that were complete.
        Exception: What a batch, the model or `forward` raises. This and a LoraInitError of a batch carry the statistics
            of the batches before as an attribute `statistics`, too; the file has them, and a pass goes on after them.

    Example:
        >>> import torch
        >>> from torch import Tensor, nn
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> stats = collect(model, [torch.randn(32, 8) for _ in range(4)], rank=2)
        >>> stats["0"].components.shape, stats.provenance.stop_reason
        (torch.Size([4, 8]), 'exhausted')
    """
    _check_types(model, batches)
    _check_numbers(
        rank=rank, max_batches=max_batches, rho=rho, tolerance=tolerance, seed=seed, skip_bad_batches=skip_bad_batches
    )
    _check_options(center, gradients, overwrite, forward, loss)
    check_task_type(task_type)
    # Autocast as the caller has it now: from here on it is on for the model alone.
    model, precision = unwrapped(model), Precision()
    if task_type is None and task_of(model) in HEADS:
        task_type = task_of(model)  # PEFT then trains the head whole and saves it
    batches = as_batches(batches, model, int(seed))
    targets = find_targets(model, target_modules, exclude_modules, task_type, target_parameters)
    targets.check_layers()
    check_targets(model, targets, rank)
    modules = plain_names(model)
    left_out = ""
    # A list that names every linear layer means the same as "all-linear", and leaves out the same experts.
    if target_modules == ALL_LINEAR or {*linear_layers(model, modules)} <= {*targets.layers}:
        left_out = warn_of_experts_left_out(modules, targets.layers)
    # Two passes are one if these are the same. So an option is among them at its default, too: what a file does not say
    # counts as the same. The file knows no scalars of numpy.
    settings = {
        **getattr(batches, "settings", {}),  # how `load_batches` made them
        "dtype": dtype_of(model),
        "heads": new_heads(model),
        "layers": f"{len(targets.layers)} ({_hash_of(targets)})",
        "rho": float(rho),
        "max_batches": int(max_batches),
        "tolerance": float(tolerance),
        "forward": _name_of(forward),
        **model_config(model),
    }
    if gradients:
        settings["loss"] = _name_of(loss)
    provenance = Provenance(
        model_id=model_id(model),
        model_class=class_name(model),
        # Before the pass: bitsandbytes repacks weights when they are first used.
        fingerprint=fingerprint(model),
        n_parameters=count_parameters(model),
        n_linear=count_linear(model, targets.layers, task_type),
        quantisation=quantization_of(model),
        target_modules=_sorted_patterns(target_modules),
        exclude_modules=None if exclude_modules is None else _sorted_patterns(exclude_modules),
        target_parameters=None if target_parameters is None else sorted(target_parameters),
        task_type=task_type,
        data=str(data or ""),
        center=bool(center),
        token_mask=token_mask,
        seed=int(seed),
        rank=int(rank),
        gradients=bool(gradients),
        settings=settings,
        versions={
            "lora_init": lora_init.__version__,
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "python": platform.python_version(),
        },
    )

    # The model runs in the precision that the caller has set, autocast for example; the sums do not.
    def forward_as_called(model: nn.Module, batch: Any) -> Any:
        with precision.on():
            if forward is not None:
                return forward(model, batch)
            return call_model(model, batch, with_labels=gradients)

    file = None if statistics is None else as_path(statistics, "statistics: a file")
    job = _Job(
        model, targets, modules, provenance, forward_as_called, loss, file, overwrite, progress,
        int(skip_bad_batches), left_out,
    )  # fmt: skip
    try:
        with Processes() as processes, precision.off():
            return _run(job, batches, processes)
    except KeyboardInterrupt as stop:
        raise Interrupted(getattr(stop, "statistics", None)) from None


def _check_options(center: bool, gradients: bool, overwrite: bool, forward: Forward | None, loss: Loss | None) -> None:
    """Refuse flags that are none, functions that cannot be called as a pass does, and a loss that nothing reads."""
    check_switches(center=center, gradients=gradients, overwrite=overwrite)
    if loss is not None and not gradients:
        raise LoraInitError("loss= is for {gradients}; without gradients no loss is computed.", gradients=True)
    if forward is not None:
        check_takes(forward, "forward=", "model", "batch")
    if loss is not None:
        check_takes(loss, "loss=", "output", "batch")


def _run(job: _Job, batches: Iterable[Any], processes: Processes) -> Statistics:
    """Make the pass, or what is left of it; write the file."""
    file, run, max_batches = job.file, _set_up(job), job.provenance.settings["max_batches"]
    processes.check_alike(read_settings(job.provenance))
    # Not before all are here: one that begins again may be ahead of the one that writes.
    processes.check_alike({"statistics file": _file_in_words(file)})
    with _reserved(file, processes):
        earlier = _earlier(job)
        done = Position()
        if earlier is not None:
            done = Position.of(earlier.provenance)
        shard = own_batches(processes, batches, done.used, in_step=is_sharded(job.model))
        # A list can be compared in full, a loader by its first batch only: to read more of it would use it up.
        digest = digest_of(batches[:max_batches]) if isinstance(batches, list) else None
        of_list = processes.share(digest)
        start = Position(shard.first, of_list, shard.common)
        _check_same_data(earlier, start, file)
        if earlier is not None and earlier.provenance.complete:
            return earlier

        frozen = partial(_with_earlier, job, start, earlier)
        save = None if file is None else partial(_save_so_far, file, run, processes, frozen)
        left, may_fail = max_batches - sum(done.used), max(job.skip_bad_batches - done.bad_batches, 0)
        progress = job.progress if processes.rank == 0 else False
        with progress_bar(batches, left, progress) as bar, run.hooks, run.backward or nullcontext():
            collected = run_pass(run, shard, left, processes, bar, save, may_fail)
        # A pass that failed raises its own error below, after what was complete is in the file.
        if run.failure is None:
            _check_any_batch(collected, earlier)
        result = frozen(collected)
        if run.failure is None:
            _check_rows(result, collected)
        # All processes come here, also where the pass failed: they may have to gather weights together.
        result = replace(result, gradients=_with_importance(job, result))
        if file is not None and processes.rank == 0 and result.provenance.n_batches:
            _write(file, result)
        if run.failure is not None:
            raise _with_statistics(run.failure, run.failed, result)
        if file is not None:
            processes.share(None)  # so that the file is there for all of them from here on
        return result


def _file_in_words(file: Path | None) -> list[Any]:
    """Return the name of a file and whether it exists, which must be the same in all processes."""
    if file is None:
        return [None, False]
    return [str(file), file.exists()]


def _check_same_data(earlier: Statistics | None, start: Position, file: Path | None) -> None:
    """Refuse to resume a pass from a file that other data made."""
    made = None if earlier is None else Position.of(earlier.provenance)
    if made is not None and made.first_batch is None:
        raise OtherSettingsError(f"{file} does not say which batches it was made from, as one that was merged.")
    if made is not None and start.is_in_other_data(made):
        raise OtherSettingsError(f"{file} was made from other data: the batches are other ones.")


def _with_earlier(job: _Job, start: Position, earlier: Statistics | None, collected: Collected) -> Statistics:
    """Freeze what this pass has collected, after what an earlier one left in the file."""
    later = _frozen(job, collected, start)
    if earlier is None:
        return later
    return _continued(earlier, later)


def _save_so_far(file: Path, run: Pass, processes: Processes, frozen: Callable[[Collected], Statistics]) -> None:
    """Merge what all processes have collected so far, and let the first one write it."""
    so_far = processes.merge(run.found)
    if processes.rank == 0 and any(so_far.n_batches):
        _write(file, frozen(so_far))


def _check_any_batch(collected: Collected, earlier: Statistics | None) -> None:
    if not sum(collected.n_batches) and earlier is None:
        raise LoraInitError("there is no batch to learn from: the data is empty. Pass at least one batch.")


def _check_rows(result: Statistics, collected: Collected) -> None:
    """Refuse statistics of no layer, with the first reason that a batch gave."""
    if not result:
        reasons = collected.empty + collected.bad
        if reasons:
            raise LoraInitError(reasons[0])
        raise LoraInitError(
            f"no targeted layer received rows in {result.provenance.n_batches} batches: none ran, or the batches "
            "are empty. Check target_modules and the batches."
        )


def _set_up(job: _Job) -> Pass:
    made, layers = job.provenance, job.targets.layers
    masks = TokenMasks(job.model, made.token_mask, made.gradients)
    modules = {name: job.modules[target.module] for name, target in layers.items()}
    # A function of the caller's may run the model twice, and a loss needs what comes after the output embedding.
    to_the_end = made.gradients or made.settings["forward"] is not None
    hooks = ActivationHooks(job.model, modules, masks, to_the_end=to_the_end)
    backward = None
    if made.gradients:
        backward = BackwardHooks(hooks, layers, job.forward, job.loss)
    return Pass(
        hooks,
        job.forward,
        job.n_components,
        made.rank,
        backward,
        made.center,
        made.settings["tolerance"],
        made.seed,
        n_triplets=max(job.n_components, 2 * made.rank),  # lora-ga needs two a rank
    )


def _with_statistics(error: BaseException, name: str, result: Statistics) -> BaseException:
    """Let what ended a pass carry what was complete, and say how to go on if that was a single batch."""
    complete = result if result.provenance.n_batches else None
    if complete is not None and name:
        # Those that were left out in earlier parts of the pass count, too.
        remedy, n_bad = "{skip_bad_batches} goes on without it.", Position.of(complete.provenance).bad_batches + 1
        if isinstance(error, LoraInitError):
            error = error.within(remedy=remedy, skip_bad_batches=n_bad).with_traceback(error.__traceback__)
        else:
            # Somebody else's error keeps its class, so that the caller can catch it; the hint is a warning.
            warn(f"{name} failed: {type(error).__name__}. {remedy}", skip_bad_batches=n_bad)
    with suppress(AttributeError):  # of a class with slots
        error.statistics = complete  # type: ignore[attr-defined]
    return error


@contextmanager
def _reserved(file: Path | None, processes: Processes) -> Iterator[None]:
    """Find out before the work that a file has a place, and keep it to this pass."""
    with ExitStack() as stack:
        refusal = ""
        if file is not None and processes.rank == 0:
            try:
                check_writable(file, overwrite=True, kind="statistics file")  # a file of another kind is not replaced
                stack.enter_context(locked(file, "Wait until that has ended, or name another file."))
            except (LoraInitError, OSError) as error:
                refusal = explain(error)
        # Raised in all processes, or the others would wait for one that has ended.
        refusal = processes.share(refusal)
        if refusal:
            raise LoraInitError(refusal)
        yield


def _check_types(model: Any, batches: Any) -> None:
    """Refuse what is plainly something else, such as swapped arguments, before any work."""
    if not isinstance(model, nn.Module):
        raise LoraInitError(
            f"collect got a {type(model).__name__} for the model, expected a torch.nn.Module. "
            "Load it first, with AutoModelForCausalLM.from_pretrained or the like."
        )
    # By name: peft need not be imported.
    if any(kind.__name__ == "BaseTunerLayer" for module in model.modules() for kind in type(module).__mro__):
        raise LoraInitError(
            f"collect got a {type(model).__name__} with an adapter, and would take its parts for layers. Give it the "
            "plain model: take the adapter off (PEFT: unload(), diffusers: delete_adapters())."
        )
    check_batches(batches, "collect")


def _check_numbers(**numbers: Any) -> None:
    for name, number in numbers.items():
        # torch's own bound of a seed; most other numbers are counts.
        least = {"tolerance": 0, "skip_bad_batches": 0, "seed": -(2**63)}.get(name, 1)
        check_number(name, number, least, whole=name not in ("rho", "tolerance"))


def check_targets(model: nn.Module, targets: Targets, rank: int) -> None:
    """Refuse a rank beyond a layer's width, and a model of which a process has a part of each layer."""
    narrow = [target for target in targets.layers.values() if target.in_features < rank]
    if narrow:
        raise LoraInitError(
            f"layer {narrow[0].name!r}: {{rank}} is larger than its input width {narrow[0].in_features} "
            f"({len(narrow)} such layers). Use a smaller rank, or exclude them.",
            rank=rank,
        )
    if is_tensor_parallel(model):
        raise LoraInitError(
            f"{class_name(model)} is split by tensor parallelism: in each process a layer reads only a part of its "
            "input. Load it with device_map=, or shard it with fully_shard."
        )


def _earlier(job: _Job) -> Statistics | None:
    """Read the statistics of an earlier pass; None if there is no such file, or it is to be overwritten."""
    file, ours = job.file, job.provenance
    if file is None or job.overwrite or not file.exists():
        return None
    earlier = Statistics.load(file)
    # Not an OtherSettingsError, whose remedy is `overwrite`: that would throw away what another model's pass collected.
    if earlier.provenance.fingerprint != ours.fingerprint:
        raise LoraInitError(
            f"{file} was made from another model ({earlier.provenance.model}), not from this one "
            f"({ours.model}). Name another file."
        )
    theirs = read_settings(earlier.provenance)
    # A file with gradients also serves a pass without them. Not where labels are the mask: with gradients they count at
    # other rows. And not where the pass is to go on: without gradients it would drop those that there are.
    gradients_may_stay = earlier.provenance.complete and ours.token_mask != "labels"
    for setting, wanted in read_settings(ours).items():
        made = theirs.get(setting, wanted)  # a file of an earlier version does not say
        if made == wanted or (setting == "gradients" and made and gradients_may_stay):
            continue
        raise OtherSettingsError(f"{file} was made with {setting} {made!r}, and {wanted!r} is asked for.")
    return earlier


def _write(file: Path, statistics: Statistics) -> None:
    """Write the file. A failure is a warning: the pass itself has lost nothing."""
    try:
        statistics.save(file)
    except LoraInitError as error:
        warn(f"{error} The statistics are not kept in that file.")


def _frozen(job: _Job, collected: Collected, start: Position) -> Statistics:
    """Make statistics of what was collected so far; the pass may go on afterwards."""
    # What was merged from several processes, or is of few batches, was not compared yet.
    for kind in collected.kinds:
        for halves in kind.values():
            halves.compare(job.provenance.rank)
    layers, groups, gradients = job.targets.layers, _spectra(collected), _gradients(collected, job.targets.layers)
    # With gradients a layer counts only if it has both.
    candidates = gradients if job.provenance.gradients else layers
    ran = [name for name in candidates if collected.group_of.get(name) in groups]
    never_ran = [name for name in layers if name not in ran]
    provenance = _completed(job.provenance, collected, start, groups)
    result = Statistics(
        groups=groups,
        group_of={name: collected.group_of[name] for name in ran},
        targets={name: layers[name] for name in ran},
        provenance=provenance,
        held_out={name: collected.groups[name].held_out() for name in groups},
        unsupported={**job.targets.unsupported, **{name: layers[name].kind for name in never_ran}},
        gradients=gradients,
        sizes=dict(_sizes(collected, ran, groups)),
    )
    notes = [*_notes(job, collected, groups, never_ran), *notes_on_experts(result)]
    return replace(result, provenance=replace(provenance, notes=notes))


def _completed(made: Provenance, collected: Collected, start: Position, groups: Mapping[str, Spectrum]) -> Provenance:
    """Complete the record of a pass by what it has read and how it ended."""
    used = collected.n_batches
    if start.common_loader:
        used = [sum(used)]
    position = replace(start, used=used, bad_batches=len(collected.bad))
    # A batch that failed is used up, but nothing was learned from it.
    n_batches = sum(collected.n_batches) - len(collected.bad)
    return replace(
        made,
        n_batches=n_batches,
        n_samples=max((spectrum.n_samples for spectrum in groups.values()), default=0),
        stop_reason=collected.stop_reason,
        seconds={part: round(value, 3) for part, value in collected.seconds.items()},
        n_labels=collected.n_labels,
        keeps=collected.keeps if n_batches > 1 else None,  # of one batch no half is known
        complete=collected.stop_reason not in ("interrupted", "failed"),
        settings={**made.settings, **asdict(position)},
    )


def _spectra(collected: Collected) -> dict[str, Spectrum]:
    """Freeze the spectra of inputs that had rows, by the name of their group."""
    spectra = {}
    for name, record in collected.groups.items():
        # A process whose first batch did not reach all layers took its input for one of its own.
        leads_a_group = collected.group_of.get(name, name) == name
        if record.n_samples and leads_a_group:
            spectra[name] = record.whole().spectrum()
    return spectra


def _gradients(collected: Collected, layers: Iterable[str]) -> dict[str, GradientSpectrum]:
    """Freeze the gradients of layers that had any, in model order."""
    spectra = {}
    for name in layers:
        mean = collected.gradients.get(name)
        if mean is not None and mean.n_samples:
            weighted = collected.weighted[name].whole().spectrum()
            spectra[name] = freeze_gradient(mean.whole(), weighted, collected.n_labels)
    return spectra


def _sizes(collected: Collected, ran: list[str], groups: Mapping[str, Spectrum]) -> Iterator[tuple[str, Sizes]]:
    """Compute the sizes of inputs and outputs, of the layers where both are known and finite."""
    for name in ran:
        group, tokens = collected.group_of[name], collected.sums["tokens", name]
        output = math.nan
        if tokens:
            output = math.sqrt(collected.sums["outputs", name] / tokens)
        sizes = Sizes(collected.sums["inputs", group] / groups[group].n_samples, output)
        if all(map(math.isfinite, sizes)):
            yield name, sizes


def _with_importance(job: _Job, result: Statistics) -> dict[str, GradientSpectrum]:
    """Complete the gradients by what needs the weights; all processes do it together, for they may hold parts of them.

    A weight that cannot be read as a matrix of floats leaves the importance unknown.
    """
    complete = dict(result.gradients)
    for name, gradient in complete.items():
        weight = getattr(job.modules[name], "weight", None)
        if isinstance(weight, nn.Parameter) and weight.is_floating_point():
            matrix = read_weight(job.modules[name], "weight", weight)
            if type(matrix) is not torch.Tensor:  # quantized by torchao, which calls its numbers floats
                continue
            if result.targets[name].kind == "Conv1D":
                matrix = matrix.T  # d_in x d_out -> d_out x d_in
            complete[name] = gradient.with_importance(matrix)
    return complete


def _continued(earlier: Statistics, later: Statistics) -> Statistics:
    """Merge the two parts of a pass that was interrupted."""
    old, new = earlier.provenance, later.provenance
    merged = earlier
    if new.n_batches:
        merged = earlier.continued_by(later)
    # How the pass ended is known from its last part, even where that read nothing.
    settings = {**new.settings, **asdict(Position.of(new).after(Position.of(old)))}
    made = replace(merged.provenance, stop_reason=new.stop_reason, complete=new.complete, settings=settings)
    return replace(merged, provenance=made)


def _sorted_patterns(patterns: str | Collection[str]) -> str | list[str]:
    """Bring names into one order, so that a set compares with a list; one expression stays as it is."""
    if isinstance(patterns, str):
        return patterns
    return sorted(patterns)


def _name_of(function: Any) -> str | None:
    """Return the name by which a file knows a function: its code cannot be compared."""
    if function is None:
        return None
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def _hash_of(targets: Targets) -> str:
    """Hash which layers of which form are read, so that a file can tell other targets."""
    named = repr(sorted(targets.layers.values(), key=lambda target: target.name))
    others = ""
    if targets.unsupported:
        others = repr(sorted(targets.unsupported.items()))
    return hashlib.sha256(f"{named}{others}".encode()).hexdigest()[:8]


def _notes(job: _Job, collected: Collected, groups: Mapping[str, Spectrum], never_ran: list[str]) -> list[str]:
    """Write what a user should know of a pass, a line for each kind of thing and not for each layer."""
    reasons = {**job.targets.reasons, **dict.fromkeys(never_ran, "never ran")}
    notes = one_line_each({name: f"{reason}; PEFT's own initialization." for name, reason in reasons.items()})
    if job.left_out:
        notes.append(job.left_out)
    notes += _notes_on_few_components(job, collected, groups)
    n_batches = sum(collected.n_batches)
    if collected.empty:
        notes.append(f"{len(collected.empty)} of {n_batches} batches were passed over. {collected.empty[0]}")
    if collected.bad:
        notes.append(f"{len(collected.bad)} of {n_batches} batches failed and were left out. {collected.bad[0]}")
    without_effect = []
    for name, mean in collected.gradients.items():
        # A half without rows has no squares yet.
        has_effect = any(half.squares.any() for half in mean.halves if half.n_samples)
        if mean.n_samples and not has_effect:
            without_effect.append(name)
    if without_effect:
        notes.append(
            f"{without_effect[0]}: the loss does not depend on its output ({len(without_effect)} such layers)."
        )
    return notes


def _notes_on_few_components(job: _Job, collected: Collected, groups: Mapping[str, Spectrum]) -> list[str]:
    """Name inputs whose rows span fewer directions than were wanted, a line for each number that was wanted."""
    few: dict[int, dict[str, int]] = {}  # components by layer, by how many there should have been
    for name in dict.fromkeys(collected.group_of.values()):
        if name in groups:
            kept, width = groups[name].components.shape
            expected = min(job.n_components, width)  # a narrow input has no more
            if kept < expected:
                few.setdefault(expected, {})[name] = kept
    notes = []
    for expected, kept_of in few.items():
        n_rows = span([groups[name].n_samples for name in kept_of])
        notes.append(f"{some([*kept_of])}: {n_rows} rows span only {span(kept_of.values())} of {expected} components.")
    return notes
