"""Rows of a tokenized `datasets.Dataset` -> padded batches in random order."""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lora_init.errors import LoraInitError
from lora_init.layers.masks import IGNORED

_BATCH_SIZE = 4  # as load_batches
_BUFFER = 1000  # rows of a stream that are shuffled at a time


def as_batches(batches: Any, model: nn.Module, seed: int) -> Any:
    """Make batches of a tokenized `datasets.Dataset` or `IterableDataset`; return anything else as it is.

    Args:
        batches: What `collect` was given.
        model: Whose `forward` says which columns count, and whose configuration says what to pad with.
        seed: Seed of the order.

    Raises:
        LoraInitError: The data set has no column that the model takes, so it is not tokenized.
    """
    is_data_set = type(batches).__module__.startswith("datasets.") and hasattr(batches, "select_columns")
    return _TokenizedRows(batches, model, seed) if is_data_set else batches


class _TokenizedRows:
    """Batches of a data set, new at each iteration.

    Attributes:
        settings: As for `Batches` of `load_batches`: `collect` keeps it.
    """

    def __init__(self, rows: Any, model: nn.Module, seed: int) -> None:
        rows = rows.with_format(None)
        names = rows.column_names or list(next(iter(rows), {}))  # a stream may not know them
        taken = inspect.signature(type(model).forward).parameters
        columns = [name for name in names if name in taken or name in ("label", "labels")]
        if not set(columns) - {"label", "labels"}:
            raise LoraInitError(
                f"the data set has the columns {', '.join(names)}, and {type(model).__name__} takes none of them. Give "
                "collect a tokenized one, with input_ids; load_batches(data, tokenizer) makes batches of texts."
            )
        self._rows, self._seed = rows.select_columns(columns), seed
        self._pad = {"labels": IGNORED, "input_ids": getattr(getattr(model, "config", None), "pad_token_id", None) or 0}
        self.settings = {"batch_size": _BATCH_SIZE, "seed of the sample": seed}

    def __len__(self) -> int:
        return math.ceil(len(self._rows) / _BATCH_SIZE)  # TypeError for a stream, as for a DataLoader over one

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for columns in self._drawn():
            yield self._padded({"labels" if name == "label" else name: values for name, values in columns.items()})

    def _drawn(self) -> Iterable[Mapping[str, Sequence[Any]]]:
        if hasattr(self._rows, "__len__"):
            order = random.Random(self._seed).sample(range(len(self._rows)), len(self._rows))
            return (self._rows[order[i : i + _BATCH_SIZE]] for i in range(0, len(order), _BATCH_SIZE))
        stream: Iterable[Any] = self._rows.shuffle(seed=self._seed, buffer_size=_BUFFER).iter(_BATCH_SIZE)
        return stream

    def _padded(self, columns: Mapping[str, Sequence[Any]]) -> dict[str, Tensor]:
        batch = {}
        for name, values in columns.items():
            tensors = [torch.as_tensor(value) for value in values]
            of_tokens = tensors[0].dim() == 1 and not tensors[0].is_floating_point()
            pad = self._pad.get(name, 0)
            batch[name] = pad_sequence(tensors, True, pad) if of_tokens else torch.stack(tensors)
        if "input_ids" in batch and "attention_mask" not in batch:
            lengths = torch.tensor([len(ids) for ids in columns["input_ids"]])
            batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
        return batch
