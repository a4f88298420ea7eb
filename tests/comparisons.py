"""A tiny model, tiny data and the arguments of a comparison that takes seconds; and records without any training."""

import json
import random
from itertools import product

import numpy as np
import torch

from lora_init.comparison.runs import Run
from tests.commands import WORDS, save_model
from tests.conftest import tiny_bert, tiny_llama


def make_home(home, n_rows=120, **sizes):
    """Write `llama`, `bert` and `rows.jsonl`: six words, three options of which the first word of the row is right."""
    torch.manual_seed(0)  # the same weights whatever ran before
    save_model(tiny_llama(**sizes), home / "llama")
    save_model(tiny_bert(), home / "bert")
    rng = random.Random(0)
    rows = []
    for _ in range(n_rows):
        words = rng.sample(WORDS, 6)
        options = rng.sample([word for word in WORDS if word not in words], 2) + words[:1]
        rng.shuffle(options)
        right = options.index(words[0])
        rows.append(
            {
                "passage": " ".join(words),
                "options": "\n".join(f"{letter}. {option}" for letter, option in zip("ABC", options, strict=True)),
                "answer": f"{'ABC'[right]}. {words[0]}",
                "listed": options,
                "letter": "ABC"[right],
                "position": right,
                "first": min(words[0], "n")[0],
                "empty": "",
                "text": " ".join(words),
            }
        )
    (home / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return home


SMALL = dict(
    template="{passage}", completion=" {options}", steps=6, batch_size=4, selection_samples=8, report_samples=12,
    rank=2, lora_alpha=16, learning_rates=(1e-3, 1e-2), seeds=2, extend=0, statistics_batches=8, evaluation_points=[3],
)  # fmt: skip

# Records whose losses come from a seeded formula, so that tests can plant what must be found.
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
POINTS = [0, 20, 40, 60]


def record(start="random", rate=1e-3, seed=0, final=0.17, **changes):
    """One finished run that ends at `final`."""
    losses = [2.3, final + 0.02, final + 0.005, final]
    return {
        "start": str(start), "seed": seed, "learning_rate": rate, "status": "finished", "error": None,
        "trainable_parameters": 2_442_240, "ranks": None, "a_scale": 0.577,
        "evaluation_points": POINTS, "report_loss": losses, "selection_loss": final, "training_loss": [2.0, 1.0, final],
        "metrics": {"accuracy": 0.6, "macro_f1": 0.59, "mcc": 0.2}, "data_order": f"order{seed}",
        "plain_loss": 2.3, "metrics_before": {"accuracy": 0.5, "macro_f1": 0.4, "mcc": 0.0},
        "initialisation_seconds": 0.4, "training_seconds": 61.5,
        "peak_memory_bytes": 1_900_000_000, "retain_loss": [3.1, 3.1 + rate * 40],
    } | changes  # fmt: skip


def broken(status, error, **about):
    """A run that came to nothing."""
    nothing, begun = (
        dict.fromkeys(("a_scale", "metrics", "training_seconds", "retain_loss")),
        [0] * (status != "failed"),
    )
    return record(**about) | nothing | {
        "status": status, "error": error, "report_loss": [2.3] * len(begun), "selection_loss": None,
        "evaluation_points": begun, "training_loss": [],
    }  # fmt: skip


def planted(shifts, rates=RATES, seeds=(0, 1, 2), noise=0.002, spread=0.0005):
    """Runs of starts that end `shift` above random; a seed moves all starts by `noise`, each run by `spread` more."""
    rng = np.random.default_rng(7)
    by_seed = {seed: rng.normal(0, noise) for seed in seeds}
    return [
        record(start, rate, seed, 0.17 + 0.03 * abs(np.log10(rate / 1e-3)) + shift + by_seed[seed]
               + rng.normal(0, spread))
        for start, shift in {"random": 0.0, **shifts}.items() for rate in rates for seed in seeds
    ]  # fmt: skip


def exact():
    """Runs with the same differences on each seed, so that each figure of a report is known to its last digit."""
    made = []
    for start, end in {"random": 0.2, "eva": 0.18, "eva+2-batches": 0.19, "pissa": 0.21, "full": 0.16}.items():
        for rate, seed in product((1e-4, 1e-3, 3e-3), range(3)):
            final = end + {1e-4: 0.02, 1e-3: 0.0, 3e-3: 0.01}[rate] + 0.01 * seed
            rise = 100 * rate * {"pissa": 2.0, "eva+2-batches": 1.5}.get(start, 1.0)
            about = dict(
                retain_loss=[3.0, 3.0 + rise], float_loss=2.1,
                metrics={"accuracy": 1 - final, "macro_f1": 0.9 - final, "mcc": 0.5 + 0.1 * (start == "eva")},
                trainable_parameters={"full": 5000, "pissa": 1300}.get(start, 1234),
                a_scale=0.0 if start == "full" else 0.5774, gamma=40.0 + seed if start == "eva" else None,
                initialisation_seconds={"eva": 20.0, "random": 0.0}.get(start, 1.5), training_seconds=60.0,
                peak_memory_bytes=2_500_000_000 + seed * 3_000_000,
            )  # fmt: skip
            made.append(record(start, rate / 10 if start == "full" else rate, seed, final, **about))
    for seed in range(3):  # random with twice the steps ends 0.03 lower
        final = 0.17 + 0.01 * seed
        longer = dict(evaluation_points=[0, 120], report_loss=[2.3, final], data_order=f"longer{seed}")
        made.append(made[3 + seed] | {"start": "random+120-steps", "selection_loss": final} | longer)
    lost = [broken("unstable", error, start="eva", rate=1e-2, seed=seed) for seed, error in ((0, "loss 9."), (2, None))]
    failed = [broken("failed", "no room.", start=start, rate=1e-2) for start in ("olora", "pissa")]
    failed = [run | {"trainable_parameters": None} for run in failed]
    return [*made, *lost, record("eva", 1e-2, 1, 0.01), *failed]


def settings(**changes):
    return {
        "format": 3, "task": "siqa", "model": "tiny/model", "fingerprint": "abc", "rank": 8, "lora_alpha": 16.0,
        "steps": 60, "batch_size": 2, "statistics_batches": 4, "evaluation_points": POINTS,
        "starts": ["random", "eva"], "learning_rates": list(RATES), "seeds": [0, 1, 2],
        "sweep": "full", "extend": 2, "match_scale": False, "threads": 1, "processor": "",
        "data": "siqa.jsonl, 800 rows",
        "versions": {"torch": "2.13.0", "peft": "0.21.2"}, "command": "lora-init compare tiny/model siqa.jsonl",
    } | changes  # fmt: skip


def write(directory, records, **changes):
    (directory / "runs").mkdir(parents=True, exist_ok=True)
    (directory / "settings.json").write_text(json.dumps(settings(**changes)))
    for run in records:
        (directory / "runs" / Run.of(run).file).write_text(json.dumps(run))
    return directory
