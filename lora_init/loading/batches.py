"""A data set on disk or on the hub -> batches of tokens with labels, and a description of them in words."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_init.errors import LoraInitError
from lora_init.loading.examples import (
    IGNORED,
    Encoded,
    Recipe,
    encode,
    group_by_length,
    pad_batch,
    padding_token,
    recipe,
)
from lora_init.loading.sources import read_rows

if TYPE_CHECKING:
    from torch import Tensor


class Batches(list["dict[str, Tensor]"]):
    """Batches of `input_ids`, `attention_mask` and `labels`, each int64 [batch, length].

    Attributes:
        description: Which examples of which data these are, in words, for `collect(..., data=batches.description)`.
        n_examples: Examples in all batches together.
    """

    description: str = ""
    n_examples: int = 0


def load_batches(
    source: str | Path,
    tokenizer: Any,
    *,
    template: str | None = None,
    completion: str | None = None,
    subset: str | None = None,
    split: str = "train",
    samples: int | None = 256,
    offset: int = 0,
    batch_size: int = 4,
    max_length: int = 512,
    seed: int = 0,
    seq2seq: bool = False,
) -> Batches:
    r"""Draw a random sample of a data set and turn it into batches as fine-tuning would see them.

    Columns are taken as `messages` (the tokenizer's chat template; labels on the assistant's turns), else `prompt` and
    `completion` (labels on the completion), else `text` (labels on every token), unless a template names others. Prompt
    and completion are joined as they are, and the tokenizer's end-of-sequence token follows. Padding is on the right
    and, like everything without a label, -100 in `labels`. Examples longer than `max_length` lose their end. Rows with
    an empty field are left out, and so are rows left without any label: training would learn nothing from them either.

    The sample depends on the seed alone: a smaller one is the start of a larger one, whatever the batch size. Batches
    hold examples of similar length; every eight batches in a row are a random draw of the sample, long and short.

    Args:
        source: A JSON, JSONL, CSV, Parquet or text file (one example a line), a folder of such files of one kind, or a
            hub id.
        tokenizer: The model's Hugging Face tokenizer. It may lack a padding token.
        template: Text of an example with columns in braces, `"{passage}\nQuestion: {question}?"`; the prompt, if
            `completion` is given too. `{{` is a brace. A name in braces is looked up, never evaluated.
        completion: Template of what the model should answer.
        subset: Configuration of a hub data set that has several.
        split: Split of a hub data set, or of a folder whose file names have `train`, `dev`, `test` or the like in them.
        samples: Most examples to draw; None for all.
        offset: Usable examples to pass over first, in the seeded order: `offset=256` shares no row with `samples=256`.
        batch_size: Examples a batch.
        max_length: Most tokens an example; the tokenizer's own limit counts too.
        seed: Seed of sample and order.
        seq2seq: For encoder-decoders: prompt in `input_ids`, completion in `labels`, which then have their own length.

    Returns:
        The batches, a list with a `description`.

    Raises:
        LoraInitError: The source is missing, unreadable or empty, a column is missing, no row is usable, or an argument
            is out of range.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("max_length", max_length, 2), ("seed", seed, 0)):
        if value < least:
            raise LoraInitError(f"{name}={value} must be at least {least}.")
    if offset < 0 or (samples is not None and samples < 1):
        raise LoraInitError(f"samples={samples} must be at least 1 or None for all, and offset={offset} at least 0.")
    rows, label = read_rows(source, subset, split)
    reading = recipe(rows.column_names, label, tokenizer, template, completion)
    limit = min(max_length, getattr(tokenizer, "model_max_length", max_length))
    left_out: Counter[str] = Counter()
    usable = _usable(rows.select_columns(reading.columns), label, reading, tokenizer, limit, seed, seq2seq, left_out)
    examples = list(islice(usable, offset, None if samples is None else offset + samples))
    skipped = ", ".join(f"{count} left out {why}" for why, count in left_out.items())
    if not examples:
        raise LoraInitError(
            f"{label}: no usable example among {len(rows)} rows read as {reading.name}"
            + (f" after the first {offset}" if offset else "")
            + (f" ({skipped})" if skipped else "")
            + ". Check the columns and max_length."
        )
    pad = padding_token(tokenizer)
    batches = Batches(pad_batch(g, pad) for g in group_by_length(examples, batch_size, seed, lambda e: len(e[0])))
    batches.n_examples = len(examples)
    parts = [f"{label}: {len(examples)} of {len(rows)} examples", f"after the first {offset}" if offset else ""]
    parts += [f"seed {seed}", f"at most {limit} tokens", reading.name, skipped]
    batches.description = ", ".join(part for part in parts if part)
    return batches


def _usable(
    rows: Any, label: str, reading: Recipe, tokenizer: Any, limit: int, seed: int, seq2seq: bool, left_out: Counter[str]
) -> Iterator[Encoded]:
    """Yield the rows that have tokens and labels in the seeded order, and count the others in `left_out`."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    for index in order:
        try:
            example = reading.to_example(rows[index])
            encoded = encode(example, tokenizer, limit, seq2seq) if example else None
        except LoraInitError as error:
            raise LoraInitError(f"{label}, row {index + 1}: {error}") from error
        if encoded is None:
            left_out["with an empty field"] += 1
        elif all(target == IGNORED for target in encoded[1]):
            left_out[f"without a labelled token among the first {limit}"] += 1
        else:
            yield encoded
