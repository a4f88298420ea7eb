"""Records of a comparison without training: losses from a seeded formula, so tests can plant what must be found."""

import json

import numpy as np

RATES = (1e-4, 3e-4, 1e-3, 3e-3)
POINTS = [0, 20, 40, 60]


def record(start="random", rate=1e-3, seed=0, final=0.17, **changes):
    """One finished run that ends at `final`."""
    losses = [2.3, final + 0.02, final + 0.005, final]
    return {
        "task": "siqa", "start": start, "matched_scale": False, "equal_parameters": False, "seed": seed,
        "learning_rate": rate, "status": "finished", "error": None, "trainable_parameters": 2_442_240, "ranks": None,
        "a_scale": 0.577, "evaluation_points": POINTS, "validation_loss": losses, "training_loss": [2.0, 1.0, final],
        "metrics": {"accuracy": 0.6, "macro_f1": 0.59, "mcc": 0.2},
        "metrics_before": {"accuracy": 0.5, "macro_f1": 0.4, "mcc": 0.0},
        "gradient_norm": 1.25, "initialisation_seconds": 0.4, "initialisation_passes": 0, "training_seconds": 61.5,
        "peak_memory_bytes": 1_900_000_000, "retain_loss": [3.1, 3.1 + rate * 40], "intruders":
        {"count": 12, "of": 2100, "energy_share": 0.01}, "finished_at": "2026-01-01T00:00:00+00:00",
    } | changes  # fmt: skip


def broken(status, error, **about):
    """A run that came to nothing."""
    nothing = dict.fromkeys(("a_scale", "metrics", "gradient_norm", "training_seconds", "retain_loss", "intruders"))
    return record(**about) | nothing | {
        "status": status, "error": error, "validation_loss": [2.3], "evaluation_points": [0], "training_loss": [],
    }  # fmt: skip


def planted(shifts, rates=RATES, seeds=(0, 1, 2), noise=0.002, spread=0.0005):
    """Runs of starts that end `shift` above random; a seed moves all starts by `noise`, each run by `spread` more."""
    random = np.random.default_rng(7)
    by_seed = {seed: random.normal(0, noise) for seed in seeds}
    return [
        record(start, rate, seed, 0.17 + 0.03 * abs(np.log10(rate / 1e-3)) + shift + by_seed[seed]
               + random.normal(0, spread))
        for start, shift in {"random": 0.0, **shifts}.items() for rate in rates for seed in seeds
    ]  # fmt: skip


def settings(**changes):
    return {
        "task": "siqa", "model": "tiny/model", "fingerprint": "abc", "rank": 8, "lora_alpha": 8, "batch_size": 8,
        "steps": 60, "starts": ["random", "eva"], "learning_rates": list(RATES), "seeds": [0, 1, 2], "sweep": "full",
        "data": "siqa.jsonl, 800 rows", "versions": {"torch": "2.13.0", "peft": "0.21.2"},
        "command": "lora-init compare tiny/model siqa.jsonl",
    } | changes  # fmt: skip


def write(directory, records, **changes):
    directory.mkdir(exist_ok=True)
    (directory / "settings.json").write_text(json.dumps(settings(**changes)))
    (directory / "runs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in records))
    return directory
