"""What `make demo` runs: an adapter for a real model from real data, trained next to a random one, and its story.

    python examples/demo.py

1. Fetches SmolLM2-135M-Instruct and SIQA, short questions about people (once).
2. Runs `lora-init init` on them: all seven projections of every layer, rank 16, rho 2.
3. Trains that adapter, and one of the same shape with PEFT's random start, in transformers.Trainer.
4. Runs `lora-init dial` on the trained adapter: how strongly it should act, so that the model keeps what it knew.
5. Exports that to one rank, as engines want it, loads it with PEFT and compares what the model says.
6. Writes build/demo.html: where the ranks went, how the losses fell, what the model answers before and after.
"""

import argparse
import io
import json
import os
import shlex
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import demo_assets

import lora_init

TEMPLATE = "{passage} {question}\nAnswer:"
COMPLETION = " {answer}"
MAX_LENGTH = 128
BATCH_SIZE = 8
N_ANSWERS = 4
HELD_OUT = "siqa-held-out.jsonl"  # what `dial` chooses and reports by


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="build/demo-adapter", help="directory for the adapter")
    parser.add_argument("--samples", type=int, default=256, help="examples that the adapter is computed from")
    parser.add_argument("--steps", type=int, default=24, help="training steps of each adapter")
    parser.add_argument("--held-out", type=int, default=32, help="held-out examples")
    parser.add_argument("--page", default="build/demo.html", help="the page that tells the story")
    args = parser.parse_args()
    start = time.perf_counter()

    model = demo_assets.smollm2()
    data = answers_as_text(demo_assets.dataset("SIQA", "test.jsonl"), Path(args.output).parent)
    command = run_lora_init(model, data, args.output, args.samples, args.steps)
    trained = {name: finetune(model, data, args, name == "random") for name in ("random", "eva")}
    curves = {name: losses for name, (losses, *_) in trained.items()}
    rates = {name: rate for name, (*_, rate) in trained.items()}
    show(curves, rates)
    print(f"The adapter before training lies in {Path(args.output).resolve()}")
    kept = dial(data.with_name(HELD_OUT), f"{args.output}-trained", f"{args.output}-kept", max(args.samples // 10, 36))
    served = serve(model, f"{args.output}-kept", f"{args.output}-served")
    seconds = time.perf_counter() - start
    facts = dict(command=command, seconds=seconds, samples=args.samples, steps=args.steps, rates=rates)
    write_page(Path(args.page), f"{args.output}.safetensors", curves, trained["eva"][1], facts | kept | served)
    print(f"The demo took {seconds:.0f} s. Its story, with pictures: {Path(args.page).resolve()}")


def answers_as_text(source: Path, folder: Path) -> Path:
    """Write answers as text alone: "find somewhere to go", not "C. Find somewhere to go"; every tenth row apart."""
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
    for row in rows:
        row["answer"] = row["answer"].split(". ", 1)[-1].strip().rstrip(".").lower()
    folder.mkdir(parents=True, exist_ok=True)
    rest = [row for i, row in enumerate(rows) if i % 10]
    for name, part in (("siqa.jsonl", rest), (HELD_OUT, rows[::10])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return folder / "siqa.jsonl"


def run_lora_init(model: Path, data: Path, output: str, samples: int, steps: int) -> str:
    command = ["lora-init", "init", str(model), str(data), "--template", TEMPLATE, "--completion", COMPLETION]
    command += ["--rank", "16", "--rho", "2", "--samples", str(samples), "--max-length", str(MAX_LENGTH)]
    command += ["--steps", str(steps)]
    command += ["--statistics", f"{output}.safetensors", "--output", output, "--overwrite"]
    return run(command).replace(str(model), model.name.partition("-0.")[0])


def run(command: list[str]) -> str:
    """Run a command; return it as one types it."""
    typed = shlex.join(command).replace("\n", r"\n")
    print(f"$ {typed}\n", flush=True)
    done = subprocess.run([sys.executable, "-m", "lora_init", *command[1:]], check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return typed


def dial(data: Path, trained: str, kept: str, samples: int) -> dict[str, Any]:
    """Choose how strongly the adapter acts, by text that the base writes; a few examples, to save time."""
    command = ["lora-init", "dial", trained, str(data), "--template", TEMPLATE, "--completion", COMPLETION]
    command += ["--samples", str(samples), "--max-length", str(MAX_LENGTH), "--output", kept, "--overwrite"]
    command += ["--uniform"]  # a strength for each layer takes minutes
    return {"dialed": run(command), "dial": json.loads((Path(kept) / "dial.json").read_text(encoding="utf-8"))}


def finetune(model: Path, data: Path, args: argparse.Namespace, random: bool) -> tuple[Any, list[dict[str, str]], str]:
    """Train one adapter; return its losses by step, training and held out, what it answers, and its rate."""
    import torch
    from peft import PeftConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, Trainer, TrainingArguments, set_seed
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(model)
    settings = dict(template=TEMPLATE, completion=COMPLETION, max_length=MAX_LENGTH, batch_size=BATCH_SIZE)
    train = lora_init.load_batches(data, tokenizer, samples=args.samples, **settings)
    held_out = lora_init.load_batches(data, tokenizer, samples=args.held_out, offset=args.samples, **settings)

    set_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if random:
        # The same ranks and scaling in every layer, so the same number of parameters. Only A's values differ.
        config = PeftConfig.from_pretrained(args.output)
        config.inference_mode = False
        peft_model = get_peft_model(base, config)
    else:
        peft_model = PeftModel.from_pretrained(base, args.output, is_trainable=True)
    trainable, _ = peft_model.get_nb_trainable_parameters()
    start = "a random" if random else "the EVA"
    found = lora_init.learning_rate(peft_model, train, steps=args.steps)
    print(f"\nTraining {start} start: {trainable:,} parameters. {found}", flush=True)
    arguments = TrainingArguments(
        output_dir="build/demo-trainer",
        max_steps=args.steps,
        learning_rate=found.rate,
        lr_scheduler_type="cosine",
        warmup_steps=args.steps // 10,
        per_device_train_batch_size=1,  # of these, each is a batch of BATCH_SIZE examples already
        per_device_eval_batch_size=1,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=max(args.steps // 3, 1),
        eval_on_start=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model=peft_model,
        args=arguments,
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=lambda items: items[0],
    )
    trainer.remove_callback(PrinterCallback)
    examples = [] if random else asked(held_out, tokenizer)
    before = [answer(peft_model, tokenizer, one["question"]) for one in examples]
    trainer.train()
    for one, first in zip(examples, before, strict=True):
        one |= {"before": first, "after": answer(peft_model, tokenizer, one["question"])}
    if not random:
        peft_model.save_pretrained(f"{args.output}-trained")
    history = trainer.state.log_history
    losses = {entry["step"]: float(entry["loss"]) for entry in history if "loss" in entry}
    held = {entry["step"]: float(entry["eval_loss"]) for entry in history if "eval_loss" in entry}
    return (losses, held), examples, f"{found.rate:g}"


def asked(batches: Any, tokenizer: Any) -> list[dict[str, str]]:
    """Take a held-out question of each batch, with the answer that people gave."""
    found = []
    for batch in batches:
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        wanted, padding = labels != -100, batch["attention_mask"][0] == 0
        texts = [tokenizer.decode(ids[kept], skip_special_tokens=True) for kept in (~wanted & ~padding, wanted)]
        found.append({"question": texts[0], "people": texts[1].strip()})
    return found[:N_ANSWERS]


def answer(model: Any, tokenizer: Any, question: str) -> str:
    """Let the model go on, always with the likeliest token."""
    inputs = tokenizer(question, return_tensors="pt", return_token_type_ids=False)
    model.eval()
    ids = model.generate(**inputs, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return str(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def show(curves: dict[str, tuple[dict[int, float], dict[int, float]]], rates: dict[str, str]) -> None:
    """Print both loss curves side by side."""
    from rich.console import Console
    from rich.table import Table

    (random, random_held_out), (eva, eva_held_out) = curves["random"], curves["eva"]
    table = Table(title="Loss of the answer", title_justify="left", box=None, padding=(0, 3, 0, 0))
    for name in ("step", "training: random", "EVA", "held out: random", "EVA"):
        table.add_column(name, justify="right")
    for step in sorted({1, 2, *(step for step in random if step % 5 == 0), *random_held_out}):
        losses = (random, eva, random_held_out, eva_held_out)
        table.add_row(str(step), *(f"{loss[step]:.3f}" if step in loss else "" for loss in losses))
    console = Console(width=100) if not sys.stdout.isatty() else Console()
    console.print()
    console.print(table)
    print(f"\n{CAVEAT.format(**rates)}\n")


CAVEAT = (
    "Both saw the same examples in the same order with the same ranks, each at the learning rate that a few forward\n"
    "passes tell, {random} and {eva}: only A differs. One seed and a few held-out examples prove nothing about which\n"
    "start is better: this shows that the adapter loads and trains. Next: lora-init compare MODEL DATA trains on your\n"
    "data from several starts, at three rates around that of each."
)


def serve(model: Path, trained: str, served: str) -> dict[str, Any]:
    """Export an adapter and compare its log-probabilities, loaded by PEFT, with those before."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    exported = lora_init.export_adapter(trained, served, engine="vllm", overwrite=True)
    ids = torch.arange(100, 164)[None]
    answers = []
    for directory in (trained, served):
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        with torch.no_grad():
            answers.append(PeftModel.from_pretrained(base, directory).eval()(ids).logits.log_softmax(-1))
    difference = float((answers[0] - answers[1]).abs().max())
    print(
        f"\nThe adapter, exported to rank {exported.rank} in every layer ({len(exported.added)} had none), gives "
        f"log-probabilities\nwithin {difference:.0e} of its own. This serves it:\n{exported.command}\n"
    )
    return dict(rank=exported.rank, difference=difference, serve=exported.command)


def write_page(path: Path, statistics: str, curves: Any, examples: list[dict[str, str]], facts: dict[str, Any]) -> None:
    """Tell the story on one page, which needs no other file."""
    import jinja2

    stats = lora_init.Statistics.load(statistics)
    ranks = lora_init.allocate_ranks(stats, rank=16, rho=2)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True
    )
    page = environment.get_template("demo_page.html").render(
        ranks=ranks, captured=stats.to_pandas()["held_out"].median(), losses=curves, examples=examples,
        caveat=CAVEAT.format(**facts["rates"]),
        map=svg(ranks.plot()), curve=svg(draw(curves)), **facts,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def draw(curves: Any) -> Any:
    """Draw training losses as lines and held-out losses as marks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for (training, held_out), color, name in zip(
        (curves["random"], curves["eva"]), ("#777777", "#0072B2"), ("random", "EVA"), strict=True
    ):
        axes.plot(list(training), list(training.values()), color=color, linewidth=1, alpha=0.5)
        axes.plot(list(held_out), list(held_out.values()), "o-", color=color, label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("loss of the answer")
    axes.set_ylim(bottom=0)
    axes.legend(title="held out (dots), training (thin)", frameon=False)
    axes.grid(alpha=0.25)
    return figure


def svg(figure: Any) -> str:
    """Write a picture as text, to put into a page."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", transparent=True)
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


if __name__ == "__main__":
    # The demo model and data lie on this machine: nothing in here asks a hub.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)  # peft and transformers about each other
    main()
