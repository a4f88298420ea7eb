"""From names of a model and of data to a workbench, and what must be known about both to repeat a comparison."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import lora_init
from lora_init.comparison.tasks import CLASSIFICATION, Task, load_task
from lora_init.comparison.workbench import Workbench
from lora_init.errors import LoraInitError
from lora_init.loading.batches import Batches, load_batches
from lora_init.loading.models import LoadedModel, load_model, load_tokenizer


def set_up(
    model: str,
    data: str | Path,
    directory: Path,
    *,
    name: str | None = None,
    batch_size: int,
    max_length: int = 256,
    retain_data: str | Path | None = None,
    retain_template: str | None = None,
    retain_samples: int = 64,
    dtype: str = "float32",
    device: str = "auto",
    trust_remote_code: bool = False,
    subset: str | None = None,
    split: str = "train",
    template: str | None = None,
    completion: str | None = None,
    label: str | None = None,
    options: str | None = None,
    answer: str | None = None,
    normalize: bool = False,
    train_samples: int = 1024,
    validation_samples: int = 128,
    data_seed: int = 0,
    **shared: Any,
) -> Workbench:
    """Read the data, load the model in the class that the task needs, and put both on a workbench.

    Args:
        model: Directory or hub id.
        data: See `load_task`, as for `subset` to `data_seed` and `max_length`.
        directory: Of the comparison.
        name: Name of the task in the report. Default: that of the data.
        batch_size: Examples in a batch.
        retain_data: Text of another kind: its loss before and after training tells what was forgotten.
        retain_template: How an example of it reads.
        retain_samples: Examples of it.
        dtype: Of the base model's weights; adapters are float32.
        device: Where the model runs.
        trust_remote_code: Allow code that comes with the model.
        **shared: Further fields of `Workbench`.

    Raises:
        LoraInitError: Data or model cannot be read, or do not go together.
    """
    # The tokenizer and the data first: they are quick to fail, and say how many classes the model needs.
    tokenizer = load_tokenizer(model, trust_remote_code)
    task = load_task(
        data, tokenizer, template=template, completion=completion, label=label, options=options, answer=answer,
        normalize=normalize, subset=subset, split=split, train_samples=train_samples,
        validation_samples=validation_samples, max_length=max_length, batch_size=batch_size, data_seed=data_seed,
    )  # fmt: skip
    retain: Batches | None = None
    if retain_data is not None:
        if task.kind == CLASSIFICATION:
            raise LoraInitError("retain_data is for language models: a classifier has no loss on text. Leave it out.")
        retain = load_batches(
            retain_data, tokenizer, template=retain_template, samples=retain_samples, batch_size=batch_size,
            max_length=max_length,
        )  # fmt: skip
    loaded = _load(model, task, dtype, device, trust_remote_code)
    return Workbench(
        loaded=loaded, task=task, retain=retain, name=name or task.label, directory=directory, batch_size=batch_size,
        **shared,
    )  # fmt: skip


def model_name(model: str) -> str:
    """Name a model without the path to it: settings are shared."""
    path = Path(model).expanduser()
    return path.absolute().name if path.is_dir() else model


def circumstances() -> dict[str, Any]:
    """Describe what may differ between runs that are compared: threads, processor, versions."""
    return {
        "threads": torch.get_num_threads(),
        "processor": _processor(),
        "versions": {
            "lora_init": lora_init.__version__,
            **{package: version(package) for package in ("torch", "transformers", "peft")},
            "python": platform.python_version(),
        },
    }


def _load(model: str, task: Task, dtype: str, device: str, trust_remote_code: bool) -> LoadedModel:
    options: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    if task.kind == CLASSIFICATION:
        loaded = load_model(model, task_type="SEQ_CLS", n_labels=len(task.classes), **options)
        loaded.model.config.pad_token_id = task.padding
        if loaded.model.dtype != torch.float32:
            raise LoraInitError(f"dtype={dtype!r}: the head of a classifier is trained whole, and needs float32.")
        return loaded
    loaded = load_model(model, **options)
    if loaded.task_type != "CAUSAL_LM":
        raise LoraInitError(
            f"model {model!r} is a {type(loaded.model).__name__}, and a comparison trains causal language models, or "
            "classifiers with --label COLUMN."
        )
    return loaded


def _processor() -> str:
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())
