"""Rows of a tokenized `datasets.Dataset` -> padded batches in random order."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from lora_init.errors import LoraInitError
from lora_init.layers.masks import IGNORED

_BATCH_SIZE = 4  # as load_batches


def as_batches(batches: Any, model: nn.Module, seed: int) -> Any:
    """Make batches of a tokenized `datasets.Dataset` or `IterableDataset`; return anything else as it is.

    The model's `forward` says which columns count, and its configuration what to pad with.

    Raises:
        LoraInitError: The data set has no column that the model takes, so it is not tokenized.
    """
    if not (type(batches).__module__.startswith("datasets.") and hasattr(batches, "select_columns")):
        return batches
    rows = batches.with_format(None)
    names = rows.column_names or list(next(iter(rows), {}))  # a stream may not know them
    taken = inspect.signature(type(model).forward).parameters
    columns = [name for name in names if name in taken or name in ("label", "labels")]
    if not set(columns) - {"label", "labels"}:
        raise LoraInitError(
            f"the data set has the columns {', '.join(names)}, and {type(model).__name__} takes none of them. Give "
            "collect a tokenized one, with input_ids; load_batches(data, tokenizer) makes batches of texts."
        )
    pad = {"labels": IGNORED, "input_ids": getattr(getattr(model, "config", None), "pad_token_id", None) or 0}
    rows, generator = rows.select_columns(columns), torch.Generator().manual_seed(seed)
    shuffled = hasattr(rows, "__len__")
    rows = rows if shuffled else rows.shuffle(seed)  # a stream: within a buffer of 1000 rows
    loader: Any = DataLoader(rows, _BATCH_SIZE, shuffled, collate_fn=partial(_collated, pad), generator=generator)
    loader.settings = {"batch_size": _BATCH_SIZE, "seed of the sample": seed}  # which collect keeps, as of load_batches
    return loader


def _collated(pad: Mapping[str, int], rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    batch = {}
    for column in rows[0]:
        tensors = [torch.as_tensor(row[column]) for row in rows]
        of_tokens = tensors[0].dim() == 1 and not tensors[0].is_floating_point()
        name = "labels" if column == "label" else column
        batch[name] = pad_sequence(tensors, True, pad.get(name, 0)) if of_tokens else torch.stack(tensors)
    if "input_ids" in batch and "attention_mask" not in batch:
        batch["attention_mask"] = pad_sequence([torch.ones(len(row["input_ids"])).long() for row in rows], True)
    return batch
