"""What all runs of a comparison share: model, task, statistics. One run on it is one record."""

from __future__ import annotations

import gc
import platform
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from torch import nn

import lora_init
from lora_init.adapters.measured_rate import measure_rate
from lora_init.building.pipeline import split
from lora_init.building.quantized import QuantizationErrors
from lora_init.building.step_size import n_held_out
from lora_init.collection.collect import collect
from lora_init.collection.losses import text_loss
from lora_init.collection.processes import digest_of
from lora_init.comparison.runs import FORMAT, Record, Run
from lora_init.comparison.starts import (
    AS_TRAINED,
    AdapterShape,
    PreparedModel,
    StartInputs,
    adapter_files,
    hash_own,
    prepare,
)
from lora_init.comparison.tasks import Task
from lora_init.comparison.training import Score, Training, TrainingResult, evaluate, peak_bytes, reset_peak, train
from lora_init.comparison.variants import Variant
from lora_init.errors import LoraInitError, explain, is_out_of_memory
from lora_init.keep.dial import strengths
from lora_init.layers.identity import digest_of_weights, dtype_of, fingerprint, model_config
from lora_init.layers.targets import HEADS, find_targets, is_in
from lora_init.layers.wrappers import quantization_of
from lora_init.loading.batches import Batches
from lora_init.loading.checkpoint import checkpoint_of
from lora_init.loading.models import LoadedModel
from lora_init.rates.learning_rate import LearningRate
from lora_init.rates.training_length import TrainingLength
from lora_init.starts.starts import FULL, RANDOM
from lora_init.statistics.statistics import Statistics

if TYPE_CHECKING:
    from lora_init.bank.store import Bank


def circumstances() -> dict[str, Any]:
    """Describe what may differ between runs that are compared: processor, threads, versions."""
    versions = {package: version(package) for package in ("torch", "transformers", "peft")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    return {
        "threads": torch.get_num_threads(),
        "processor": device,
        "versions": {"lora_init": lora_init.__version__, **versions, "python": platform.python_version()},
    }


def processor() -> str:
    """Find the name of the processor: on another one, sums are rounded otherwise."""
    with suppress(OSError):  # there is no such file but on Linux
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@dataclass(kw_only=True)
class RunRecord:
    """What is kept of a run, apart from the `TrainingResult` of its training."""

    start: str  # name of the start, with how it was run
    seed: int  # decides the order of the data and all that is random in the start
    learning_rate: float  # of the run
    trainable_parameters: int | None = None  # all that training changes
    # Rank of each layer that has an adapter; None if all layers have the rank asked for, or for `full`
    ranks: dict[str, int] | None = None
    a_scale: float | None = None  # root mean square of the norms of all rows of A
    gamma: float | None = None  # what B A was divided by, where B is not zero and the start is ours
    plain_loss: float | None = None  # loss to report of the plain model
    # Of the model before it was quantized; None if it is not quantized, or that one is not known
    float_loss: float | None = None
    metrics_before: dict[str, float] | None = None  # metrics of the plain model
    retain_loss: list[float] | None = None  # loss on text of another kind, before and after
    dial: list[list[float]] | None = None  # strength of the adapter, loss to report, and loss on other text, for each
    # Time that the start takes with its statistics, whenever they were collected
    initialisation_seconds: float | None = None
    peak_memory_bytes: int | None = None  # from the start to the end of the training
    run_seconds: float | None = None  # wall time of it all
    # What may differ between runs of a comparison, see `circumstances`
    circumstances: dict[str, Any] = field(default_factory=circumstances)
    node: str | None = None  # name of the machine, if it is another than the comparison's

    def joined(self, result: TrainingResult) -> Record:
        """Return this record and the result of the training as one mapping of plain values, as it is written."""
        return asdict(self) | asdict(result)


def failed(run: Run, why: str) -> Record:
    """Return the record of a run that came to nothing."""
    # In a record the rate is a number, also where it was not known yet.
    record = RunRecord(start=str(run.start), seed=run.seed, learning_rate=run.learning_rate or 0.0)
    return record.joined(TrainingResult(status="failed", error=why))


@dataclass
class Workbench:
    """Everything equal between runs."""

    loaded: LoadedModel  # the plain model and its tokenizer; each run restores the model
    task: Task  # what to learn
    retain: Batches | None  # text of another kind, whose loss before and after tells forgetting
    directory: Path  # where statistics are kept, in a folder of their own
    shape: AdapterShape  # layers, rank and scaling of the adapters
    training: Training  # how every run trains
    statistics_batches: int  # batches of the run's own training data that statistics are made from
    # Starts that are not ours: name to an adapter directory, or a function of model and seed
    own: Mapping[str, Any] = field(default_factory=dict)
    bank: Bank | None = None  # adapters of other tasks, for starts from a bank
    # Loads the model before it was quantized; None if it is not quantized, or that one is not known
    float_model: Callable[[], LoadedModel] | None = None
    float_weights: str | Path | None = None  # the directory or hub id of that model, if it is not the model itself
    strengths: Sequence[float] = ()  # what a trained adapter is evaluated at
    replay: Batches | None = None  # text that all starts are trained on beside the examples
    # By seed what `_measure_before` returned, which is the same for all starts
    _before: dict[int, tuple[Score, float | None, float | None]] = field(default_factory=dict, repr=False)

    def carry_out(self, run: Run, on_step: Callable[[], None] = lambda: None, keep: bool = False) -> Record:
        """Prepare the start, train, measure, and put the plain model back.

        Running out of memory, or a start that does not apply to this model, makes a record of status `"failed"`.
        """
        if run.learning_rate is None:
            raise LoraInitError(f"{run.title}: its learning rate is not known yet. Do the runs before it first.")
        began = time.perf_counter()
        record = RunRecord(start=str(run.start), seed=run.seed, learning_rate=run.learning_rate)
        files: dict[str, bytes] | None = {} if keep else None
        try:
            result = self._fill(record, run, on_step, files)
        except (LoraInitError, RuntimeError, MemoryError) as error:  # any other is a fault of the program
            if not isinstance(error, LoraInitError) and not is_out_of_memory(error):
                raise
            # What was measured before it failed stays in the record.
            result = TrainingResult(status="failed", error=explain(error))
        gc.collect()  # the next run should find the memory of this one
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        record.run_seconds = time.perf_counter() - began
        joined = record.joined(result)
        if files is not None:
            joined["adapter"] = files
        return joined

    def settings(self, model: str) -> dict[str, Any]:
        """Describe in plain values all that shapes a run, for `settings.json`."""
        weight = next(self.loaded.model.parameters())
        settings = {
            "format": FORMAT,
            "task": self.task.label,
            "kind": self.task.kind,
            "model": model,
            "model_class": type(self.loaded.model).__name__,
            "fingerprint": fingerprint(self.loaded.model),
            "config": model_config(self.loaded.model),
            "data": self.task.data,
            "folds": self.folds,
            "normalize": self.task.normalize,
            "retain_data": None if self.retain is None else self.retain.description,
        }
        # A key that came later is there only where it says something, so that older directories stay comparable.
        if self.strengths:
            settings["strengths"] = list(self.strengths)
        if self.replay:
            settings["replay"] = self.replay.description
        settings |= {
            "examples": self._hashes(),
            **asdict(self.shape),
            "dtype": str(weight.dtype).removeprefix("torch."),
            "device": weight.device.type,
        }
        if quantized := quantization_of(self.loaded.model):
            settings["quantisation"] = quantized
        settings |= {
            **asdict(self.training),
            "schedule": "linear warm-up, cosine to zero",
            "optimizer": "AdamW, no weight decay, gradients clipped to norm 1",
            "statistics_batches": self.n_batches(),
        }
        if self.bank:
            settings["bank"] = self.bank.in_words()
        if self.own:
            settings["own"] = {name: hash_own(source) for name, source in self.own.items()}
        return settings

    @property
    def folds(self) -> dict[str, int]:
        """Count the examples of each fold."""
        return {fold: len(getattr(self.task, fold)) for fold in ("train", "selection", "report")}

    def _hashes(self) -> dict[str, str]:
        """Hash the examples, and the text beside them."""
        task, hashes = self.task, {}
        for name, items in (("examples to report", task.report), ("examples to select by", task.selection)):
            hashes[name] = digest_of([vars(item) for item in items])
        hashes["examples to train on"] = digest_of(list(map(repr, task.train)))  # as text: these may be many
        if self.float_weights is not None:
            stored = checkpoint_of(str(self.float_weights))[1]
            hashes["float weights"] = digest_of_weights((name, one.read()) for name, one in sorted(stored.items()))
        for name, text in (("text to retain", self.retain), ("text to replay", self.replay)):
            if text:
                hashes[name] = digest_of(text)
        return hashes

    def statistics(self, seed: int, center: bool, gradients: bool, n_batches: int | None = None) -> Statistics:
        """Collect the statistics of a seed's training data, or take them from the directory."""
        model, shape = self.loaded.model, self.shape
        batches = list(self._batches(seed, 0, self.n_batches(n_batches)))
        # Its name says what it is made of, so that a file of another model, other data or layers is never taken.
        made_of = [fingerprint(model), model_config(model), dtype_of(model), shape.target_modules, shape.rank, batches]
        name = f"seed{seed}-{_kind(center, gradients, n_batches)}-{digest_of(made_of)[:12]}.safetensors"
        file = self.directory / "statistics" / name
        if not file.exists():  # workers that come here together write the same
            collect(
                model,
                batches,
                shape.target_modules,
                task_type=self.loaded.task_type,
                rank=shape.rank,
                center=center,
                max_batches=n_batches or self.statistics_batches,
                seed=seed,
                data=f"{self.task.data}; training examples in the order of seed {seed}",
                progress=False,
                gradients=gradients,
                **_loss_of_pass(gradients),
            ).save(file)
        return Statistics.load(file)

    def check(self, starts: Iterable[Variant]) -> None:
        """Build each start on one layer from a few batches: what cannot be built is known before any run.

        The user's own starts are built as they are, on all their layers.
        """
        model, n = self.loaded.model, min(4, self.n_batches())
        layers = [*find_targets(model, self.shape.target_modules, task_type=self.shape.task_type).layers][:1]
        batches, shape = list(self._batches(0, 0, n)), replace(self.shape, target_modules=layers)

        @cache  # starts of one kind read the same
        def statistics(center: bool, gradients: bool) -> Statistics:
            return collect(
                model, batches, layers, task_type=shape.task_type, rank=shape.rank, center=center, progress=False,
                gradients=gradients, **_loss_of_pass(gradients),
            )  # fmt: skip

        inputs = StartInputs(model, shape, 0, statistics, batches, lambda: batches[:1], errors=self._errors(layers))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of so few data
            for start in starts:
                if own := self.own.get(start.base):
                    prepare(start, replace(inputs, own=own, shape=self.shape)).release()
                elif start.start and start.base != FULL and "bank" not in start.start.needed:
                    prepare(start, inputs).release()

    def n_batches(self, wanted: int | None = None) -> int:
        """Count the batches for statistics: fewer than wanted if an example would be read twice.

        The batches that the size of a step is measured on are others, unless there are hardly any.
        """
        left = len(self.task.train) // self.training.batch_size - self._n_held_out()
        return min(wanted or self.statistics_batches, max(1, left))

    def _n_held_out(self) -> int:
        """Count the batches that the size of a step is measured on."""
        size = self.training.batch_size
        return max(1, n_held_out(len(self.task.train), size) // size)

    def _fill(
        self, record: RunRecord, run: Run, on_step: Callable[[], None], files: dict[str, bytes] | None
    ) -> TrainingResult:
        """Do a run, and write into `record`, and into `files` if they are asked for, what becomes known on the way.

        They are filled and not returned, so that of a run that fails all that was measured before is kept.
        """
        self._renew_head(self.loaded, run.seed)
        if run.seed not in self._before:  # a new head depends on the seed
            self._before[run.seed] = self._measure_before()
        plain, retained, record.float_loss = self._before[run.seed]
        record.plain_loss, record.metrics_before = plain.loss, plain.metrics
        training, steps = self.training, run.start.steps
        if steps:  # a longer run, of which the final loss alone is read
            training = replace(training, steps=steps, evaluation_points=[0, steps])
        targets = find_targets(self.loaded.model, self.shape.target_modules, task_type=self.shape.task_type)
        everywhere = dict.fromkeys(targets.layers, self.shape.rank)
        reset_peak()  # not before: what was measured of the plain model is no part of the run
        prepared = self._prepare(run.start, run.seed)
        try:
            record.trainable_parameters, record.a_scale = prepared.trainable_parameters, prepared.a_scale
            record.gamma, record.initialisation_seconds = prepared.gamma, prepared.seconds
            ranks = prepared.ranks
            if ranks not in ({}, everywhere):
                record.ranks = ranks
            result = train(
                prepared.peft_model, self.task, training, learning_rate=record.learning_rate,
                seed=run.seed, plain_loss=plain.loss, replay=self.replay or (), on_step=on_step,
            )  # fmt: skip
            record.peak_memory_bytes = peak_bytes()
            if result.status == "finished" and self.retain is not None and retained is not None:
                record.retain_loss = [retained, text_loss(prepared.peft_model, self.retain)]
                # The strength of an adapter is dialed down to the plain model, which is no more there if the start
                # changed its weights.
                if self.strengths and run.start.base != FULL and not prepared.changes_base:
                    record.dial = self._dial(
                        prepared.peft_model, self.retain, result.report_loss[-1], record.retain_loss[1]
                    )
            # Of the registry's starts that change the base some correct a quantized one, and their adapters are for it.
            if files is not None and (run.start.start is not None or not prepared.changes_base):
                files.update(adapter_files(prepared.peft_model))
            return result
        finally:
            prepared.release()

    def _dial(self, peft_model: Any, retain: Batches, loss: float, retained: float) -> list[list[float]]:
        """Measure the loss on the task and on other text at each strength of an adapter.

        `loss` and `retained` are those at strength 1, which are known already.
        """
        evaluated = {1.0: (loss, retained)}
        for strength in self.strengths:
            if strength not in evaluated:
                with strengths(peft_model, strength):
                    task = evaluate(peft_model, self.task, self.task.report).loss
                    evaluated[strength] = task, text_loss(peft_model, retain)
        return [[strength, *evaluated[strength]] for strength in self.strengths]

    def _prepare(self, variant: Variant, seed: int) -> PreparedModel:
        """Put a start on the model that it trains. The seconds of its statistics are added to its own."""
        collected: list[Statistics] = []
        n = self.n_batches(variant.batches)

        # Functions, as most starts need only one of the two, or none.
        def statistics(center: bool, gradients: bool) -> Statistics:
            collected.append(self.statistics(seed, center, gradients, variant.batches))
            return collected[-1]

        def held_out_batches() -> Sequence[Any]:
            return split(self._batches(seed, 0, n), self._batches(seed, n, self._n_held_out())).held_out

        loaded = self.loaded
        if variant.base == FULL and self.float_model is not None:
            loaded = self.float_model()  # beside the quantized one, whose weights cannot be trained
            self._renew_head(loaded, seed)
        inputs = StartInputs(
            loaded.model, self.shape, seed, statistics, self._batches(seed, 0, n), held_out_batches, self.bank,
            self._errors(self.shape.target_modules), self.own.get(variant.base),
        )  # fmt: skip
        prepared = prepare(variant, inputs)
        # From their provenance, as the file may have been there: each start is charged in full for its statistics.
        collecting = sum(sum(stats.provenance.seconds.values()) for stats in collected)
        return replace(prepared, seconds=prepared.seconds + collecting)

    def measured_rates(self, starts: Sequence[Variant], blank: bool = False) -> dict[str, LearningRate]:
        """Measure the learning rate of each start on some of the data; a start that does not apply has none.

        With `blank` no statistics are collected: a start that reads data, or is the user's own, gets the rate of
        `random`, whose size it has.
        """
        rates: dict[str, LearningRate] = {}
        length = TrainingLength(self.training.steps, self.training.batch_size, len(self.task.train))
        self._renew_head(self.loaded, 0)  # as for the runs of that seed
        for start in starts:
            # A frozen A leaves out a term of the rule, so such a start has no rate in common with random.
            frozen = start.recipe is not None and start.recipe.freeze_a
            measured = start
            if blank and (start.recipe is None or start.recipe.reads_data):
                equal = frozen and start.equal_parameters  # at another rank
                measured = Variant(f"{RANDOM}-frozen-a" if frozen else RANDOM, start.alpha, equal_parameters=equal)
            known = rates.get(str(measured))
            if known is not None:
                rates[str(start)] = known
            elif start.base != FULL:  # whose rate is a tenth of random's, see `RunPlan`
                with suppress(LoraInitError):  # its runs say why
                    prepared = self._prepare(measured, 0)
                    try:
                        batches = self._batches(0, 0, 4)
                        rates[str(start)] = measure_rate(prepared.peft_model, batches, length, freeze_a=frozen)
                    finally:
                        prepared.release()
        return rates

    def _measure_before(self) -> tuple[Score, float | None, float | None]:
        """Score the plain model; return also its loss on other text, and that of its weights before quantization."""
        retained = float_loss = None
        if self.retain is not None:
            retained = text_loss(self.loaded.model, self.retain)
        plain = evaluate(self.loaded.model, self.task, self.task.report, with_metrics=True)
        errors = self._errors("all-linear")  # of every layer, whichever are adapted
        if errors is not None:
            with errors.undone():
                float_loss = evaluate(self.loaded.model, self.task, self.task.report).loss
        return plain, retained, float_loss

    def _errors(self, modules: str | list[str]) -> QuantizationErrors | None:
        """Find what quantization took from the weights of layers; None if there is no float model to compare with."""
        if self.float_model is None:
            return None
        targets = find_targets(self.loaded.model, modules, task_type=self.shape.task_type)
        return QuantizationErrors(self.loaded.model, targets.layers, self.float_weights)

    def _batches(self, seed: int, skipped: int, count: int) -> Iterator[dict[str, torch.Tensor]]:
        """Make batches of the run's own data in its order, as they are asked for, after some that are skipped."""
        device = next(self.loaded.model.parameters()).device
        # The very order that `train` draws: statistics are of the first examples that the run trains on.
        order = self.task.order(seed, skipped + count, self.training.batch_size)[skipped:]
        return (send_to_device(self.task.batch(items), device) for items in order)

    @torch.no_grad()
    def _renew_head(self, loaded: LoadedModel, seed: int) -> None:
        """Draw a head that the checkpoint lacks from the seed, so that it is the same for all starts."""
        model = loaded.model
        heads = HEADS.get(loaded.task_type or "", ())
        generator = torch.Generator().manual_seed(seed)  # on the CPU, so that a GPU has the same head
        for name, module in model.named_modules():
            if is_in(name, heads) and isinstance(module, nn.Linear) and f"{name}.weight" in loaded.drawn:
                drawn = torch.randn(module.weight.shape, generator=generator)
                module.weight.copy_(drawn * getattr(model.config, "initializer_range", 0.02))
                if module.bias is not None:
                    module.bias.zero_()


def _kind(center: bool, gradients: bool, n_batches: int | None) -> str:
    """Name the kind of statistics, as a part of the name of their file."""
    words = ["centred" if center else "uncentred"]
    if gradients:
        words.append("gradients")
    if n_batches:
        words.append(str(n_batches))
    return "-".join(words)


def _loss_of_pass(gradients: bool) -> dict[str, Any]:
    """Return the arguments that tell `collect` which loss its gradients are of."""
    return AS_TRAINED if gradients else {}  # it refuses a loss that nothing is done with
