"""What all runs of a comparison share: model, task, statistics. One run on it is one record."""

from __future__ import annotations

import gc
import platform
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
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
from lora_init.building.step_size import n_aside
from lora_init.collection.collect import collect
from lora_init.collection.losses import text_loss
from lora_init.collection.processes import digest_of
from lora_init.comparison.runs import FORMAT, Record, Run
from lora_init.comparison.starts import AS_TRAINED, AdapterShape, Basis, Prepared, adapter_files, hash_own, prepare
from lora_init.comparison.tasks import Task
from lora_init.comparison.training import Score, Training, TrainingResult, evaluate, peak_bytes, reset_peak, train
from lora_init.comparison.variants import REFERENCE, Variant
from lora_init.errors import LoraInitError, explain, is_out_of_memory
from lora_init.keep.dial import strengths
from lora_init.layers.identity import dtype_of, fingerprint, model_config
from lora_init.layers.targets import HEADS, find_targets, is_in
from lora_init.layers.wrappers import quantization_of
from lora_init.loading.batches import Batches
from lora_init.loading.models import LoadedModel
from lora_init.rates.learning_rate import LearningRate
from lora_init.rates.training_length import TrainingLength
from lora_init.starts.starts import FULL
from lora_init.statistics.statistics import Statistics

if TYPE_CHECKING:
    from lora_init.bank.store import Bank


def circumstances() -> dict[str, Any]:
    """Describe what may differ between runs that are compared: processor, threads, versions."""
    versions = {package: version(package) for package in ("torch", "transformers", "peft")}
    return {
        "threads": torch.get_num_threads(),
        "processor": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "versions": {"lora_init": lora_init.__version__, **versions, "python": platform.python_version()},
    }


def processor() -> str:
    """Find the processor: on another one sums are rounded otherwise."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


@dataclass(kw_only=True)
class RunRecord:
    """What is kept of a run beside the `TrainingResult` of its training."""

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
        """Return both in plain values, as they are written."""
        return asdict(self) | asdict(result)


def failed(run: Run, why: str) -> Record:
    """Return the record of a run that came to nothing."""
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
    _before: dict[int, tuple[Score, float | None, float | None]] = field(default_factory=dict, repr=False)

    def carry_out(self, run: Run, on_step: Callable[[], None] = lambda: None, keep: bool = False) -> Record:
        """Prepare the start, train, measure, and put the plain model back.

        Running out of memory, or a start that does not apply to this model, makes a record of status `"failed"`.
        """
        if run.learning_rate is None:
            raise LoraInitError(f"{run.title}: its learning rate is not known yet. Do the runs before it first.")
        began = time.perf_counter()
        record = RunRecord(start=str(run.start), seed=run.seed, learning_rate=run.learning_rate)
        files: dict[str, bytes] = {}
        try:
            result = self._fill(record, run, on_step, files if keep else None)
        except (LoraInitError, RuntimeError, MemoryError) as error:
            if not isinstance(error, LoraInitError) and not is_out_of_memory(error):
                raise
            result = TrainingResult(status="failed", error=explain(error))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        record.run_seconds = time.perf_counter() - began
        return record.joined(result) | ({"adapter": files} if keep else {})

    def settings(self, model: str) -> dict[str, Any]:
        """Describe in plain values all that shapes a run, for `settings.json`."""
        weight = next(self.loaded.model.parameters())
        return {
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
            **({"strengths": list(self.strengths)} if self.strengths else {}),
            **({"replay": self.replay.description} if self.replay else {}),
            "examples": self._hashes(),
            **asdict(self.shape),
            "dtype": str(weight.dtype).removeprefix("torch."),
            "device": weight.device.type,
            **({"quantisation": quantized} if (quantized := quantization_of(self.loaded.model)) else {}),
            **asdict(self.training),
            "schedule": "linear warm-up, cosine to zero",
            "optimizer": "AdamW, no weight decay, gradients clipped to norm 1",
            "statistics_batches": self.n_batches(),
            **({"bank": self.bank.in_words()} if self.bank else {}),
            **({"own": {name: hash_own(source) for name, source in self.own.items()}} if self.own else {}),
        }

    @property
    def folds(self) -> dict[str, int]:
        """Count the examples of each fold."""
        return {fold: len(getattr(self.task, fold)) for fold in ("train", "selection", "report")}

    def _hashes(self) -> dict[str, str]:
        """Hash the examples that figures are from; those to train on are hashed with each run."""
        named = {"examples to report": self.task.report, "examples to select by": self.task.selection}
        hashes = {name: digest_of([vars(item) for item in items]) for name, items in named.items()}
        texts = {"text to retain": self.retain, "text to replay": self.replay}
        return hashes | {name: digest_of(text) for name, text in texts.items() if text}

    def statistics(self, seed: int, center: bool, gradients: bool, n_batches: int | None = None) -> Statistics:
        """Collect the statistics of a seed's training data, or take them from the directory."""
        kind = ("centred" if center else "uncentred") + ("-gradients" if gradients else "")
        kind += f"-{n_batches}" if n_batches else ""
        model, shape = self.loaded.model, self.shape
        batches = list(self._batches(seed, 0, self.n_batches(n_batches)))
        # Its name says what it is made of, so that a file of another model, other data or layers is never taken.
        made_of = [fingerprint(model), model_config(model), dtype_of(model), shape.target_modules, shape.rank, batches]
        file = self.directory / "statistics" / f"seed{seed}-{kind}-{digest_of(made_of)[:12]}.safetensors"
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
                **(AS_TRAINED if gradients else {}),
            ).save(file)
        return Statistics.load(file)

    def check(self, starts: Iterable[Variant]) -> None:
        """Build each start on one layer from a few batches, one's own on all: what cannot be built is known now."""
        model, n = self.loaded.model, min(4, self.n_batches())
        layers = [*find_targets(model, self.shape.target_modules, task_type=self.shape.task_type).layers][:1]
        batches, one = list(self._batches(0, 0, n)), replace(self.shape, target_modules=layers)

        def statistics(center: bool, gradients: bool) -> Statistics:
            return collect(
                model, batches, layers, task_type=one.task_type, rank=one.rank, center=center, progress=False,
                gradients=gradients, **(AS_TRAINED if gradients else {}),
            )  # fmt: skip

        basis = Basis(model, one, 0, statistics, batches, lambda: batches[:1], errors=self._errors(layers))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of so few data
            for start in starts:
                own = self.own.get(start.base)
                if own or (start.start and start.base != FULL and "bank" not in start.start.needed):
                    prepare(start, replace(basis, own=own, shape=self.shape if own else one)).release()

    def n_batches(self, wanted: int | None = None) -> int:
        """Count the batches for statistics: fewer than wanted if an example would be read twice.

        The batches that the size of a step is measured on are others, unless there are hardly any.
        """
        there = len(self.task.train) // self.training.batch_size - self._n_aside()
        return min(wanted or self.statistics_batches, max(1, there))

    def _n_aside(self) -> int:
        size = self.training.batch_size
        return max(1, n_aside(len(self.task.train), size) // size)

    def _fill(
        self, record: RunRecord, run: Run, on_step: Callable[[], None], files: dict[str, bytes] | None
    ) -> TrainingResult:
        self._renew_head(self.loaded, run.seed)
        if run.seed not in self._before:  # a new head depends on the seed
            self._before[run.seed] = self._measure_before()
        plain, retained, record.float_loss = self._before[run.seed]
        record.plain_loss, record.metrics_before = plain.loss, plain.metrics
        training, steps = self.training, run.start.steps
        if steps:
            training = replace(training, steps=steps, evaluation_points=[0, steps])
        targets = find_targets(self.loaded.model, self.shape.target_modules, task_type=self.shape.task_type)
        everywhere = dict.fromkeys(targets.layers, self.shape.rank)
        reset_peak()
        prepared = self._prepare(run.start, run.seed)
        try:
            record.trainable_parameters, record.a_scale = prepared.trainable_parameters, prepared.a_scale
            record.gamma, record.initialisation_seconds = prepared.gamma, prepared.seconds
            ranks = prepared.ranks
            record.ranks = None if ranks in ({}, everywhere) else ranks
            done = train(
                prepared.peft_model, self.task, training, learning_rate=record.learning_rate,
                seed=run.seed, plain_loss=plain.loss, replay=self.replay or (), on_step=on_step,
            )  # fmt: skip
            record.peak_memory_bytes = peak_bytes()
            if done.status == "finished" and self.retain is not None and retained is not None:
                record.retain_loss = [retained, text_loss(prepared.peft_model, self.retain)]
                if self.strengths and run.start.base != FULL and not run.start.changes_base:
                    record.dial = self._dial(
                        prepared.peft_model, self.retain, done.report_loss[-1], record.retain_loss[1]
                    )
            if files is not None:
                files.update(adapter_files(prepared.peft_model))
            return done
        finally:
            prepared.release()

    def _dial(self, peft_model: Any, retain: Batches, loss: float, retained: float) -> list[list[float]]:
        """Measure the loss on the task and on other text at each strength of an adapter; known are those at 1."""
        evaluated = {1.0: (loss, retained)}
        for strength in self.strengths:
            if strength not in evaluated:
                with strengths(peft_model, strength):
                    task = evaluate(peft_model, self.task, self.task.report).loss
                    evaluated[strength] = task, text_loss(peft_model, retain)
        return [[strength, *evaluated[strength]] for strength in self.strengths]

    def _prepare(self, variant: Variant, seed: int) -> Prepared:
        """Put a start on the model that it trains. Its seconds count with the seconds of its statistics."""
        collected: list[Statistics] = []
        n = self.n_batches(variant.batches)

        def statistics(center: bool, gradients: bool) -> Statistics:
            collected.append(self.statistics(seed, center, gradients, variant.batches))
            return collected[-1]

        def aside() -> Sequence[Any]:
            return split(self._batches(seed, 0, n), self._batches(seed, n, self._n_aside())).aside

        loaded = self.loaded
        if variant.base == FULL and self.float_model is not None:
            loaded = self.float_model()  # beside the quantized one, whose weights cannot be trained
            self._renew_head(loaded, seed)
        basis = Basis(
            loaded.model, self.shape, seed, statistics, self._batches(seed, 0, n), aside, self.bank,
            self._errors(self.shape.target_modules), self.own.get(variant.base),
        )  # fmt: skip
        prepared = prepare(variant, basis)
        collecting = sum(sum(stats.provenance.seconds.values()) for stats in collected)
        return replace(prepared, seconds=prepared.seconds + collecting)

    def measured_rates(self, starts: Sequence[Variant], blank: bool = False) -> dict[str, LearningRate]:
        """Measure the learning rate of each start on some of the data; a start that does not apply has none.

        With `blank`, in which no statistics are collected, those that read data are given the rate of `random`, whose
        size they have.
        """
        rates: dict[str, LearningRate] = {}
        length = TrainingLength(self.training.steps, self.training.batch_size, len(self.task.train))
        self._renew_head(self.loaded, 0)  # as for the runs of that seed
        for start in starts:
            read = REFERENCE if blank and (start.recipe is None or start.recipe.reads_data) else start
            frozen = start.recipe is not None and start.recipe.freeze_a
            if start.base == FULL or (str(read) in rates and not frozen):
                rates |= {str(start): rates[str(read)]} if str(read) in rates else {}
                continue
            with suppress(LoraInitError):  # its runs say why
                prepared = self._prepare(read, 0)
                try:
                    rates[str(start)] = measure_rate(
                        prepared.peft_model, self._batches(0, 0, 4), length, freeze_a=frozen
                    )
                finally:
                    prepared.release()
        return rates

    def _measure_before(self) -> tuple[Score, float | None, float | None]:
        """Score the plain model, on other text too, and its weights from before quantization."""
        retained = None if self.retain is None else text_loss(self.loaded.model, self.retain)
        plain = evaluate(self.loaded.model, self.task, self.task.report, with_metrics=True)
        errors = self._errors("all-linear")
        if errors is None:
            return plain, retained, None
        with errors.undone():
            return plain, retained, evaluate(self.loaded.model, self.task, self.task.report).loss

    def _errors(self, modules: str | list[str]) -> QuantizationErrors | None:
        """Find what quantization took from the weights of layers; None if there is no float model to compare with."""
        if self.float_model is None:
            return None
        targets = find_targets(self.loaded.model, modules, task_type=self.shape.task_type)
        return QuantizationErrors(self.loaded.model, targets.layers, self.float_weights)

    def _batches(self, seed: int, skipped: int, count: int) -> Iterator[dict[str, torch.Tensor]]:
        """Make batches of the run's own data in its order, as they are asked for, after some that are skipped."""
        device = next(self.loaded.model.parameters()).device
        order = self.task.order(seed, skipped + count, self.training.batch_size)[skipped:]
        return (send_to_device(self.task.batch(items), device) for items in order)

    @torch.no_grad()
    def _renew_head(self, loaded: LoadedModel, seed: int) -> None:
        """Draw a head that the checkpoint lacks from the seed, so that it is the same for all starts."""
        model = loaded.model
        heads = HEADS.get(loaded.task_type or "", ())
        generator = torch.Generator().manual_seed(seed)
        for name, module in model.named_modules():
            if is_in(name, heads) and isinstance(module, nn.Linear) and f"{name}.weight" in loaded.drawn:
                drawn = torch.randn(module.weight.shape, generator=generator)
                module.weight.copy_(drawn * getattr(model.config, "initializer_range", 0.02))
                if module.bias is not None:
                    module.bias.zero_()
