"""Models, batches and helpers that several tests of comparison need."""

from unittest.mock import patch

import torch

import lora_init
from lora_init.comparison.set_up import Sources, set_up
from lora_init.comparison.starts import AdapterShape, StartInputs, prepare
from lora_init.comparison.tasks import LoadingOptions
from lora_init.comparison.training import Training
from lora_init.comparison.variants import Variant
from tests.comparisons import SMALL


def snapshot(model):
    """All that `release` has to put back."""
    modules = {
        name: (id(module), module.training, len(module._forward_hooks), sorted(vars(module)))
        for name, module in model.named_modules()
    }
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return modules, {n: (id(t), t.data_ptr(), t.requires_grad, t.detach().clone(), t.grad) for n, t in tensors}


def assert_same(before, after):
    assert before[0] == after[0]
    assert before[1].keys() == after[1].keys()
    for name, (*facts, value, grad) in before[1].items():
        *facts_after, value_after, grad_after = after[1][name]
        assert facts == facts_after, name
        assert torch.equal(value, value_after), name
        assert grad is grad_after, name


# What differs between two identical comparisons.
CLOCK = ("peak_memory_bytes",)


def compare(home, output, model="llama", drawn=False, data="rows.jsonl", **changes):
    """Compare on small models; pictures, which take most of the time, are drawn if asked for, and never rendered."""
    settings = SMALL | dict(starts=("random", "eva")) | changes
    if settings.get("label") or settings.get("options"):
        settings["completion"] = None
    left_out = ("plots._saved", b"") if drawn else ("report.pictures", {})
    with patch(f"lora_init.comparison.{left_out[0]}", return_value=left_out[1]):
        return lora_init.compare(str(home / model), home / data, output, **settings)


def without_clock(records):
    return [{key: record[key] for key in record if key not in CLOCK and "seconds" not in key} for record in records]


def set_up_bench(
    home, directory, model="llama", data="rows.jsonl", steps=6, rank=2, target_modules="all-linear", batch_size=4,
    statistics_batches=8, **options,
):  # fmt: skip
    training = Training(steps, batch_size, 0.1, [0, 3, steps])
    asked = LoadingOptions(
        **dict(template="{passage}", completion=" {options}", selection_samples=8, report_samples=12) | options
    )
    shape = AdapterShape(rank, 4, target_modules)
    return set_up(str(home / model), home / data, directory, asked, shape, training, Sources(statistics_batches))


def again(model, seed):
    """The random start under another name."""
    return prepare(Variant("random"), StartInputs(model, AdapterShape(rank=2, lora_alpha=16), seed)).peft_model
