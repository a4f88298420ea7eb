"""What `make demo` runs: an adapter for a real model from real data, then trained next to a random one.

    python examples/demo.py

1. Fetches SmolLM2-135M-Instruct and BoolQ (once).
2. Runs `lora-init init` on them: all seven projections of every layer, rank 16, rho 2.
3. Trains that adapter, and one of the same shape with PEFT's random start, in transformers.Trainer.
4. Exports the trained adapter to one rank, as engines want it, loads it with PEFT and compares what the model says.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
import warnings
from pathlib import Path

import demo_assets

TEMPLATE = "{passage}\nQuestion: {question}?\nAnswer:"
COMPLETION = " {label}"
MAX_LENGTH = 256
BATCH_SIZE = 4
LEARNING_RATE = 5e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="build/demo-adapter", help="directory for the adapter")
    parser.add_argument("--samples", type=int, default=256, help="examples that the adapter is computed from")
    parser.add_argument("--steps", type=int, default=12, help="training steps of each adapter")
    parser.add_argument("--held-out", type=int, default=16, help="held-out examples")
    args = parser.parse_args()
    start = time.perf_counter()

    model, data = demo_assets.smollm2(), demo_assets.dataset("BoolQ", "combined.jsonl")
    run_lora_init(model, data, args.output, args.samples)
    curves = {
        name: finetune(model, data, args.output, random, args.samples, args.steps, args.held_out)
        for name, random in (("random", True), ("eva", False))
    }
    show(curves, args.samples)
    print(f"The adapter before training lies in {Path(args.output).resolve()}")
    serve(model, f"{args.output}-trained", f"{args.output}-served")
    print(f"The demo took {time.perf_counter() - start:.0f} s.")


def run_lora_init(model: Path, data: Path, output: str, samples: int) -> None:
    command = ["lora-init", "init", str(model), str(data), "--template", TEMPLATE, "--completion", COMPLETION]
    command += ["--rank", "16", "--rho", "2", "--samples", str(samples), "--max-length", str(MAX_LENGTH)]
    command += ["--output", output, "--overwrite"]
    print(f"$ {shlex.join(command)}\n", flush=True)
    done = subprocess.run([sys.executable, "-m", "lora_init", *command[1:]], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def finetune(
    model: Path, data: Path, adapter: str, random: bool, samples: int, steps: int, n_held_out: int
) -> tuple[dict[int, float], dict[int, float]]:
    """Train one adapter and return its training and held-out losses by step."""
    import torch
    from peft import PeftConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, Trainer, TrainingArguments, set_seed
    from transformers.utils import logging

    import lora_init

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(model)
    settings = dict(template=TEMPLATE, completion=COMPLETION, max_length=MAX_LENGTH, batch_size=BATCH_SIZE)
    train = lora_init.load_batches(data, tokenizer, samples=samples, **settings)
    held_out = lora_init.load_batches(data, tokenizer, samples=n_held_out, offset=samples, **settings)

    set_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if random:
        # The same ranks and scaling in every layer, so the same number of parameters. Only A's values differ.
        config = PeftConfig.from_pretrained(adapter)
        config.inference_mode = False
        peft_model = get_peft_model(base, config)
    else:
        peft_model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    trainable, _ = peft_model.get_nb_trainable_parameters()
    print(
        f"\nTraining {'a random' if random else 'the EVA'} start: {trainable:,} parameters, {steps} steps", flush=True
    )
    arguments = TrainingArguments(
        output_dir="build/demo-trainer",
        max_steps=steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="linear",
        train_sampling_strategy="sequential",  # load_batches has shuffled them: the same order in both trainings
        per_device_train_batch_size=1,  # of these, each is a batch of BATCH_SIZE examples already
        per_device_eval_batch_size=1,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=max(steps // 4, 1),
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
    trainer.train()
    if not random:
        peft_model.save_pretrained(f"{adapter}-trained")
    history = trainer.state.log_history
    losses = {entry["step"]: float(entry["loss"]) for entry in history if "loss" in entry}
    return losses, {entry["step"]: float(entry["eval_loss"]) for entry in history if "eval_loss" in entry}


def show(curves: dict[str, tuple[dict[int, float], dict[int, float]]], samples: int) -> None:
    """Print both loss curves side by side."""
    from rich.console import Console
    from rich.table import Table

    (random, random_held_out), (eva, eva_held_out) = curves["random"], curves["eva"]
    table = Table(title="Loss of the answer", title_justify="left", box=None, padding=(0, 3, 0, 0))
    for name in ("step", "training: random", "EVA", "held out: random", "EVA"):
        table.add_column(name, justify="right")
    for step in sorted({*random, *random_held_out}):
        losses = (random, eva, random_held_out, eva_held_out)
        table.add_row(str(step), *(f"{loss[step]:.3f}" if step in loss else "" for loss in losses))
    console = Console(width=100) if not sys.stdout.isatty() else Console()
    console.print()
    console.print(table)
    print(
        "\nGuessing True or False evenly has a loss of 0.35: half of ln 2, as the end of the answer is a labelled\n"
        "token too. In so few steps both learn to answer True or False, and not yet which.\n"
        f"Both saw the same examples in the same order at learning rate {LEARNING_RATE:g} with the same ranks: only A\n"
        "differs. EVA's A x is larger than the random one's, which alone acts like a higher learning rate: to see\n"
        "what its directions do, compare with the start random-scaled.\n"
        "One learning rate, one seed and a handful of held-out examples prove nothing about which start is better:\n"
        "this shows that the adapter loads and trains. To compare starts, sweep learning rates and seeds.\n"
    )


def serve(model: Path, trained: str, served: str) -> None:
    """Export the trained adapter and compare its log-probabilities, loaded by PEFT, with those before."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    import lora_init

    exported = lora_init.export_adapter(trained, served, engine="vllm", overwrite=True)
    ids = torch.arange(100, 164)[None]
    answers = []
    for directory in (trained, served):
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        with torch.no_grad():
            answers.append(PeftModel.from_pretrained(base, directory).eval()(ids).logits.log_softmax(-1))
    difference = float((answers[0] - answers[1]).abs().max())
    print(
        f"\nThe trained adapter, exported to rank {exported.rank} in every layer ({len(exported.added)} had none), "
        f"gives log-probabilities\nwithin {difference:.0e} of its own. This serves it:\n{exported.command}\n"
    )


if __name__ == "__main__":
    # The demo model and data lie on this machine: nothing in here asks a hub.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)  # peft and transformers about each other
    main()
