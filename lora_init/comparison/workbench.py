"""What all runs of a comparison share: model, task, statistics. One run on it is one record."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_init.adapters.intruders import intruder_dimensions, left_singular_vectors
from lora_init.adapters.step_size import N_ASIDE, mean_loss
from lora_init.collection.collect import collect, fingerprint
from lora_init.comparison.runs import Record, Run, Variant
from lora_init.comparison.starts import Prepared, prepare
from lora_init.comparison.tasks import Task
from lora_init.comparison.training import TrainingRun, evaluate, peak_bytes, reset_peak, text_loss, train, training_loss
from lora_init.errors import LoraInitError, explain, is_out_of_memory
from lora_init.layers.targets import HEADS, find_targets
from lora_init.loading.batches import Batches
from lora_init.loading.models import LoadedModel
from lora_init.statistics.statistics import Statistics

# Evaluations and steps that an estimate is made from.
_TRIAL_STEPS, _TRIAL_ITEMS = 3, 16


@dataclass
class Workbench:
    """Everything equal between runs.

    Attributes:
        loaded: The plain model and its tokenizer. Each run leaves it as it was.
        task: What to learn.
        retain: Text of another kind, whose loss before and after tells forgetting.
        name: Name of the task in the records.
        directory: Where statistics are kept, in a folder of their own.
        own: Starts that are not ours: name to an adapter directory, or a function of model and seed.
    """

    loaded: LoadedModel
    task: Task
    retain: Batches | None
    name: str
    directory: Path
    rank: int
    lora_alpha: float
    target_modules: str | list[str]
    steps: int
    batch_size: int
    warmup: float
    evaluation_points: Sequence[int]
    statistics_batches: int
    own: Mapping[str, Any] = field(default_factory=dict)
    _statistics: dict[tuple[int, bool, bool], Statistics] = field(default_factory=dict, repr=False)
    _before: dict[int, tuple[dict[str, float] | None, float | None]] = field(default_factory=dict, repr=False)
    _plain_vectors: dict[str, torch.Tensor] | None = field(default=None, repr=False)

    def carry_out(self, run: Run, on_step: Callable[[TrainingRun], None] = lambda run: None) -> Record:
        """Prepare the start, train, measure, and put the plain model back.

        Running out of memory, or a start that does not apply to this model, makes a record of status `"failed"`.
        """
        if run.learning_rate is None:
            raise LoraInitError(f"{run.title}: its learning rate is not known yet. Do the runs before it first.")
        began = time.perf_counter()
        record = _blank_record(self.name, run)
        try:
            self._fill(record, run, on_step)
        except (LoraInitError, RuntimeError, MemoryError) as error:
            if not isinstance(error, LoraInitError) and not is_out_of_memory(error):
                raise
            record |= {"status": "failed", "error": explain(error)}
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        record["run_seconds"] = round(time.perf_counter() - began, 3)
        record["finished_at"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return record

    def settings(self, model: str) -> dict[str, Any]:
        """Describe in plain values all that shapes a run, for `settings.json`.

        Args:
            model: What to call the model.
        """
        weight = next(self.loaded.model.parameters())
        return {
            "task": self.name,
            "kind": self.task.kind,
            "model": model,
            "model_class": type(self.loaded.model).__name__,
            "fingerprint": fingerprint(self.loaded.model),
            "data": self.task.data,
            "normalize": self.task.normalize,
            "retain_data": None if self.retain is None else self.retain.description,
            "rank": self.rank,
            "lora_alpha": self.lora_alpha,
            "target_modules": self.target_modules,
            "dtype": str(weight.dtype).removeprefix("torch."),
            "device": weight.device.type,
            "batch_size": self.batch_size,
            "steps": self.steps,
            "warmup": self.warmup,
            "schedule": "linear warm-up, cosine to zero",
            "optimizer": "AdamW, no weight decay, gradients clipped to norm 1",
            "evaluation_points": list(self.evaluation_points),
            "statistics_batches": self.statistics_batches,
        }

    def statistics(self, seed: int, center: bool, gradients: bool) -> Statistics:
        """Collect the statistics of a seed's training data, or take them from the directory."""
        key = (seed, center, gradients)
        if key not in self._statistics:
            kind = ("centred" if center else "uncentred") + ("-gradients" if gradients else "")
            file = self.directory / "statistics" / f"seed{seed}-{kind}.safetensors"
            if not file.exists():
                self._collect(seed, center, gradients).save(file)
            self._statistics = {key: Statistics.load(file)}
        return self._statistics[key]

    def seconds_of_a_run(self) -> float:
        """Estimate the time of one run from a few steps of it, as things are now."""
        short = replace(self.task, validation=self.task.validation[:_TRIAL_ITEMS])
        prepared = self._prepare(Run(Variant("random"), 0, 1e-4), partial(self._collect, 0))
        try:
            order = self.task.order(0, _TRIAL_STEPS, self.batch_size)
            trial = train(
                prepared.peft_model, short, order, learning_rate=1e-4, warmup=0.0,
                evaluation_points=(0, _TRIAL_STEPS), seed=0,
            )  # fmt: skip
        finally:
            prepared.release()
        trial.evaluation_seconds *= len(self.task.validation) / len(short.validation)
        return self.expected_seconds(trial)

    def expected_seconds(self, run: TrainingRun) -> float:
        """Estimate the time of a whole run from one that has done some steps."""
        most_choices = max(len(item.choices) for item in self.task.validation)
        evaluations = len(self.evaluation_points) - 1 + max(1, most_choices)
        return self.steps * run.seconds / len(run.training_loss) + evaluations * run.evaluation_seconds

    def _fill(self, record: Record, run: Run, on_step: Callable[[TrainingRun], None]) -> None:
        self._renew_head(run.seed)
        self._decompose_plain_weights()
        metrics_before, retain_before = self._measure_before(run.seed)
        collected: list[Statistics] = []

        def statistics(center: bool, gradients: bool) -> Statistics:
            collected.append(self.statistics(run.seed, center, gradients))
            return collected[-1]

        reset_peak()
        prepared = self._prepare(run, statistics)
        try:
            record |= {
                "trainable_parameters": prepared.trainable_parameters,
                "ranks": prepared.ranks,
                "a_scale": prepared.a_scale,
                "gamma": prepared.gamma,
                "initialisation_seconds": round(
                    prepared.seconds + sum(sum(stats.provenance.seconds.values()) for stats in collected), 3
                ),
                "initialisation_passes": prepared.passes + sum(stats.provenance.n_batches for stats in collected),
            }
            done = train(
                prepared.peft_model,
                self.task,
                self.task.order(run.seed, self.steps, self.batch_size),
                learning_rate=run.learning_rate or 0.0,
                warmup=self.warmup,
                evaluation_points=self.evaluation_points,
                seed=run.seed,
                on_step=on_step,
            )
            finished = done.status == "finished"
            if finished and self.retain is not None and retain_before is not None:
                record["retain_loss"] = [retain_before, text_loss(prepared.peft_model, self.retain)]
            record |= {
                "status": done.status,
                "error": done.reason,
                "evaluation_points": done.evaluation_points,
                "validation_loss": done.validation_loss,
                "training_loss": [round(loss, 6) for loss in done.training_loss],
                "metrics": done.metrics if finished else None,
                "metrics_before": metrics_before,
                "gradient_norm": done.gradient_norm,
                "data_order": done.data_order,
                "training_seconds": round(done.seconds, 3),
                "peak_memory_bytes": peak_bytes(),
            }
            if finished:
                record["intruders"] = self._count_intruders(prepared.peft_model)
        finally:
            prepared.release()

    def _prepare(self, run: Run, statistics: Callable[[bool, bool], Statistics]) -> Prepared:
        variant = run.variant
        start: Any = (variant.start, self.own[variant.start]) if variant.start in self.own else variant.start
        return prepare(
            start,
            self.loaded.model,
            statistics=statistics,
            batches=self._statistics_data(run.seed),
            loss_of=self._loss_aside(run.seed),
            rank=self.rank,
            lora_alpha=self.lora_alpha,
            seed=run.seed,
            target_modules=self.target_modules,
            task_type=self.loaded.task_type,
            matched_scale=variant.matched_scale,
            equal_parameters=variant.equal_parameters,
        )

    def _collect(self, seed: int, center: bool, gradients: bool) -> Statistics:
        learning = {"gradients": True, **self._learning()} if gradients else {}
        return collect(
            self.loaded.model,
            self._statistics_data(seed),
            self.target_modules,
            task_type=self.loaded.task_type,
            rank=self.rank,
            rho=2.0,
            center=center,
            max_batches=self.statistics_batches,
            seed=seed,
            data=f"{self.task.data}; training examples in the order of seed {seed}",
            progress=False,
            **learning,
        )

    def _statistics_data(self, seed: int, skipped: int = 0, count: int | None = None) -> list[dict[str, torch.Tensor]]:
        """Take the first batches of the run's own data, none twice; or `count` of them after some."""
        if count is None:
            count = self._n_batches()
        device = next(self.loaded.model.parameters()).device
        order = self.task.order(seed, skipped + count, self.batch_size)[skipped:]
        batches = (self.task.batch(items) for items in order)
        return [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]

    def _n_batches(self) -> int:
        return min(self.statistics_batches, len(self.task.train) // self.batch_size)

    def _loss_aside(self, seed: int) -> Callable[[nn.Module], float]:
        """Make what measures the loss that training minimises on training batches that the statistics are not from."""

        @functools.cache
        def aside() -> list[dict[str, torch.Tensor]]:
            return self._statistics_data(seed, self._n_batches(), N_ASIDE)

        def measure(model: nn.Module) -> float:
            return mean_loss(model, aside(), **self._learning())

        return measure

    def _learning(self) -> dict[str, Any]:
        """Say to `collect` and `mean_loss` what the very loss is that training minimises."""
        return {
            "forward": lambda model, batch: training_loss(model, self.task, batch),
            "loss": lambda loss, batch: loss,
        }

    def _measure_before(self, seed: int) -> tuple[dict[str, float] | None, float | None]:
        """Measure the plain model, once for each seed, since a new head depends on it."""
        if seed not in self._before:
            model = self.loaded.model
            scored = evaluate(model, self.task, with_metrics=True).metrics
            self._before[seed] = (scored, None if self.retain is None else text_loss(model, self.retain))
        return self._before[seed]

    def _decompose_plain_weights(self) -> None:
        if self._plain_vectors is None:
            targets = find_targets(self.loaded.model, self.target_modules, task_type=self.loaded.task_type)
            try:
                self._plain_vectors = left_singular_vectors(self.loaded.model, targets.layers)
            except LoraInitError:  # quantised weights, which have no intruders to count
                self._plain_vectors = {}

    def _count_intruders(self, peft_model: nn.Module) -> dict[str, float] | None:
        if not self._plain_vectors:
            return None
        found = intruder_dimensions(peft_model, base=self._plain_vectors)
        return {"count": found.count, "of": found.of, "energy_share": found.energy_share}

    @torch.no_grad()
    def _renew_head(self, seed: int) -> None:
        """Draw a head that the checkpoint lacks from the seed, so that it is the same for all starts."""
        model = self.loaded.model
        heads = HEADS.get(self.loaded.task_type or "", ())
        generator = torch.Generator().manual_seed(seed)
        for name, module in model.named_modules():
            in_head = bool(set(heads) & set(name.split(".")))
            if in_head and isinstance(module, nn.Linear) and f"{name}.weight" in self.loaded.drawn:
                drawn = torch.randn(module.weight.shape, generator=generator)
                module.weight.copy_(drawn * getattr(model.config, "initializer_range", 0.02))
                if module.bias is not None:
                    module.bias.zero_()


def _blank_record(task: str, run: Run) -> Record:
    nothing = (
        "error trainable_parameters ranks a_scale gamma evaluation_points validation_loss training_loss metrics "
        "metrics_before gradient_norm data_order initialisation_seconds initialisation_passes training_seconds "
        "peak_memory_bytes retain_loss intruders"
    )
    return {
        "task": task,
        "start": run.variant.start,
        "matched_scale": run.variant.matched_scale,
        "equal_parameters": run.variant.equal_parameters,
        "seed": run.seed,
        "learning_rate": run.learning_rate,
        "status": "finished",
        **dict.fromkeys(nothing.split()),
    }
