"""A data set on disk or on the hub -> batches of tokens with labels or classes, and a description of them in words."""

from __future__ import annotations

import inspect
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from lora_init.errors import LoraInitError, check_number, check_switches, first_line, warn
from lora_init.loading.examples import BATCH_SIZE, MAX_LENGTH, SAMPLES, Wanted
from lora_init.loading.reader import IGNORED, Encoded, Reader, classes_in_words, open_reader
from lora_init.loading.sources import MOST_STREAMED, Rows, read_rows

if TYPE_CHECKING:
    from torch import Tensor

# Batches are cut from pools of this many: long pools save padding, short ones keep every stretch of a pass mixed.
_POOL = 8
# Share of rows left out, and of answers cut off, above which a warning says so.
_MOST_LEFT_OUT = 0.1
_SHORT = 8  # tokens, to which no text is cut on purpose
_T = TypeVar("_T")


class Batches(list["dict[str, Tensor]"]):
    """Batches of `input_ids`, `attention_mask` and `labels`, int64 [batch, length]; `labels` of classes are [batch]."""

    description: str = ""  # which examples of which data these are, in words: `data=` of `collect`
    classes: tuple[str, ...] = ()  # those that `labels` count from 0, if the data were read with a `label`

    @property
    def n(self) -> int:
        """Number of examples."""
        return count_examples(self)

    def __init__(self, batches: Iterable[dict[str, Tensor]] = (), settings: Mapping[str, Any] | None = None) -> None:
        super().__init__(batches)
        self.settings = dict(settings or {})


def load_batches(
    source: Any,
    tokenizer: Any,
    *,
    template: str | None = None,
    completion: str | None = None,
    format: str | None = None,  # noqa: A002
    subset: str | None = None,
    split: str = "train",
    samples: int | None = SAMPLES,
    offset: int = 0,
    batch_size: int = BATCH_SIZE,
    max_length: int = MAX_LENGTH,
    seed: int = 0,
    seq2seq: bool = False,
    needs_labels: bool = True,
    label: str | None = None,
    known_classes: Sequence[str] = (),
) -> Batches:
    r"""Draw a random sample of a data set and turn it into batches as fine-tuning would see them.

    Columns are taken as `messages`, or ShareGPT's `conversations` (the tokenizer's chat template, with `tools` if there
    is such a column; labels on the assistant's turns), else `prompt` and `completion` (labels on the completion), else
    Alpaca's `instruction`, `input` and `output` (its prompt; labels on the output), else `text` (labels on every
    token), unless `format` or a template names others. Prompt and completion are joined as they are, and the
    tokenizer's end-of-sequence token follows. Padding is on the right and, like everything without a label, -100 in
    `labels`. Examples longer than `max_length` lose their end. Rows with
    an empty field are left out, and so are rows left without any label, unless `needs_labels` is off: training would
    learn nothing from them either.

    The sample depends on the seed alone: a smaller one is the start of a larger one, whatever the batch size. Batches
    hold examples of similar length; every eight batches in a row are a random draw of the sample, long and short.

    Args:
        source: A JSON, JSONL, CSV, TSV, Parquet or text file (one example a line), also with .gz, several of them, a
            pattern such as `"data/*.jsonl"`, a folder with files of one kind, `"-"` for JSON lines on standard input,
            a hub id; or what is in memory: a `datasets.Dataset`, an `IterableDataset` (its beginning), a list of
            mappings from column to value, a pandas DataFrame. What a CSV file holds is text, an empty cell an empty
            field; in a folder and on the hub it is what `datasets` makes of it.
        tokenizer: The model's Hugging Face tokenizer. It may lack a padding token.
        template: Text of an example with columns in braces, ``"{passage}\nQuestion: {question}?"``; the prompt,
            if `completion` is given too. `{{` is a brace. A name in braces is looked up, never evaluated.
        completion: Template of what the model should answer.
        format: A name of `examples.FORMATS`, such as `"messages"` or `"alpaca"`, if the columns fit several.
        subset: Configuration of a hub data set that has several.
        split: Split of a hub data set, or of a folder whose file names have `train`, `dev`, `test` or the like in them.
        samples: Most examples to draw; None for all.
        offset: Usable examples to pass over first, in the seeded order: `offset=512` shares no row with `samples=512`.
        batch_size: Examples a batch.
        max_length: Most tokens an example; the tokenizer's own limit counts too.
        seed: Seed of sample and order.
        seq2seq: For encoder-decoders: prompt in `input_ids`, completion in `labels`, which then have their own length.
        needs_labels: Leave out rows without a labelled token among the first `max_length`, and warn if that is more
            than a tenth of them. Switch it off where every token counts.
        label: Column of the class, for a classifier: `labels` are classes, int64 [batch], in the order of
            `count_classes`, and rows without one are left out. Tokens are what `tokenizer(text)` returns, with no
            end-of-sequence token added.
        known_classes: With `label`: classes of the checkpoint, in its order.

    Returns:
        The batches, a list with a `description`.

    Raises:
        LoraInitError: The source is missing, unreadable or empty, a column is missing, no row is usable, an argument
            is out of range, or a label goes with a completion or is no class.
    """
    check_number("batch_size", batch_size, 1, whole=True)
    check_number("max_length", max_length, 2, whole=True)
    check_number("seed", seed, whole=True)
    check_number("offset", offset, whole=True)
    check_switches(seq2seq=seq2seq, needs_labels=needs_labels)
    if samples is not None:
        check_number("samples", samples, 1, whole=True, hint=" None is for all.")
    _check_templates(template=template, completion=completion)
    if known_classes and label is None:
        raise LoraInitError("known_classes= says in which order {label} counts. Give both.", label=...)
    # Settings go into files, which know no scalars of numpy.
    batch_size, max_length, seed, offset = int(batch_size), int(max_length), int(seed), int(offset)
    if samples is not None:
        samples = int(samples)
    rows = read_rows(source, subset, split, seed)
    check_tokenizer(tokenizer)
    wanted = Wanted(template, completion, format, label)
    reader = open_reader(
        rows, tokenizer, max_length, wanted, seq2seq=seq2seq, needs_labels=needs_labels, known_classes=known_classes
    )
    drawn = _draw(rows, reader, samples, offset, seed)
    _check_drawn(drawn, reader, rows, max_length)
    _warn_of(drawn, reader, rows.label, max_length)
    n_usable = round(len(rows.table) * (1.0 - drawn.left_out.total() / drawn.n_read))  # that can be trained on
    is_stream = type(source).__name__ == "IterableDataset"
    settings: dict[str, Any] = {
        "template": template, "completion": completion, "max_length": max_length, "samples": samples, "offset": offset,
        "batch_size": batch_size, "seed of the sample": seed,
        "rows": None if is_stream and len(rows.table) == MOST_STREAMED else n_usable,  # it may go on
        "digest of the rows": None if is_stream else rows.digest,  # it comes in another order with each seed
    }  # fmt: skip
    if label:
        settings["classes"] = [*reader.rows_of]
    pad = padding_token(tokenizer)
    groups = group_by_length(drawn.examples, batch_size, seed, lambda example: len(example[0]))
    batches = Batches((pad_batch(group, pad, bool(label)) for group in groups), settings)
    batches.classes = tuple(reader.rows_of)
    batches.description = _describe(drawn, reader, rows, seed)
    return batches


def _check_templates(**templates: Any) -> None:
    for name, text in templates.items():
        if text is not None and not isinstance(text, str):
            raise LoraInitError(f"{{{name}}}: expected a text with columns in braces.", **{name: text})


@dataclass(frozen=True)
class _Drawn:
    """The examples that were drawn from the rows of a data set, and what was counted meanwhile."""

    examples: list[Encoded]
    offset: int  # usable rows that were passed over first
    left_out: Counter[str]  # rows that make no example, by the reason
    limit: int  # most tokens of an example

    @property
    def n_read(self) -> int:
        """Number of rows that were looked at."""
        return self.offset + len(self.examples) + self.left_out.total()

    @property
    def skipped(self) -> str:
        """How many rows were left out for which reason, in words."""
        return ", ".join(f"{count} left out {why}" for why, count in self.left_out.items())

    @cached_property
    def n_full(self) -> int:
        """Number of examples that have as many tokens as an example may have."""
        return sum(len(ids) == self.limit for ids, _ in self.examples)

    @cached_property
    def n_duplicates(self) -> int:
        """Number of examples that repeat another one, tokens and labels."""
        # None, which no token is, keeps tokens and labels apart.
        return len(self.examples) - len({(*ids, None, *labels) for ids, labels in self.examples})

    def count_cut(self, eos: int | None) -> int:
        """Count the answers that are cut off: their last token has a label, and does not end a sequence."""
        n_cut = 0
        for ids, labels in self.examples:
            # An answer follows a prompt without labels; plain text may be cut anywhere.
            is_answer = len(ids) == self.limit and labels[0] == IGNORED
            if is_answer and labels[-1] not in (IGNORED, eos):
                n_cut += 1
        return n_cut


def _draw(rows: Rows, reader: Reader, samples: int | None, offset: int, seed: int) -> _Drawn:
    """Read the examples of a sample, in the order that the seed decides."""
    left_out: Counter[str] = Counter()  # filled by `usable` while it is read
    usable = rows.usable(reader.columns, reader, seed, left_out)
    last = None if samples is None else offset + samples
    # Rows after the sample are not read, so that a small sample of a large data set costs little.
    examples = list(islice(usable, offset, last))
    return _Drawn(examples, offset, left_out, reader.limit)


def _check_drawn(drawn: _Drawn, reader: Reader, rows: Rows, max_length: int) -> None:
    """Refuse a sample without an example, and chats of which no token has a label."""
    if not drawn.examples:
        text = f"{rows.label}: no usable example among {len(rows.table)} rows read as {reader.recipe.name}"
        if drawn.offset:
            text += f" after the first {drawn.offset}"
        if drawn.skipped:
            text += f" ({drawn.skipped})"
        raise LoraInitError(text + ". Check the columns and {max_length}.", max_length=...)
    of_chats = reader.label is None and reader.recipe.name in ("messages", "sharegpt")
    if of_chats and all(label == IGNORED for _, labels in drawn.examples for label in labels):
        raise LoraInitError(
            f"{rows.label}: no token of its {len(drawn.examples)} examples has a label, so there is nothing to learn. "
            "A chat needs a turn of the assistant's that begins before {max_length}.",
            max_length=max_length,
        )


def _warn_of(drawn: _Drawn, reader: Reader, place: str, max_length: int) -> None:
    """Warn of what makes a sample worse than its size says: rows left out, answers cut off, duplicates."""
    n = len(drawn.examples)
    if drawn.left_out.total() > _MOST_LEFT_OUT * drawn.n_read:
        warn(f"{place}: of the first {drawn.n_read} rows {drawn.skipped}; read as {reader.recipe.name}.")
    n_cut = drawn.count_cut(getattr(reader.tokenizer, "eos_token_id", None))
    if reader.needs_labels and n_cut > _MOST_LEFT_OUT * n:
        warn(f"{place}: {n_cut} of {n} answers are cut off at {reader.limit} tokens. Raise max_length.")
    if drawn.n_full > n // 2 and reader.limit < _SHORT:
        warn(f"{place}: {drawn.n_full} of {n} examples end at {{max_length}} tokens. Raise it.", max_length=max_length)
    if drawn.n_duplicates > n // 2:
        warn(f"{place}: {drawn.n_duplicates} duplicates among {n} examples.")


def _describe(drawn: _Drawn, reader: Reader, rows: Rows, seed: int) -> str:
    """Write which examples of which data these are, and how they were read."""
    parts = [f"{rows.label}: {len(drawn.examples)} of {len(rows.table)} examples"]
    if drawn.offset:
        parts.append(f"after the first {drawn.offset}")
    parts += [f"seed {seed}", f"at most {reader.limit} tokens"]
    if drawn.n_full:
        parts.append(f"which {drawn.n_full} reach")
    parts.append(reader.recipe.name)
    if reader.label:
        parts.append(f"label {reader.label}, {classes_in_words(reader.rows_of)}")
    if drawn.skipped:
        parts.append(drawn.skipped)
    if drawn.n_duplicates:
        parts.append(f"{drawn.n_duplicates} duplicate{'s' * (drawn.n_duplicates > 1)}")
    return ", ".join(parts)


def load_other(source: Any, tokenizer: Any, template_option: str = "", **how: Any) -> Batches:
    """Read text beside the data, for which only another option may have a template."""
    try:
        return load_batches(source, tokenizer, **how)
    except LoraInitError as error:
        if "template" not in error.options:
            raise
        # What follows are proposals for `template=`, which the caller does not have.
        text, separator, _ = error.text.replace("{template}", f"{{{template_option}}}").partition("; name others")
        if separator and template_option:
            text += f". Name one by {{{template_option}}}."
        elif separator:
            text += ". Rename one of them."
        raise LoraInitError(text, **{template_option: how.get("template") or ...}) from error


def count_examples(batches: Iterable[Mapping[str, Any]]) -> int:
    """Count the examples of batches that have labels."""
    return sum(len(batch["labels"]) for batch in batches)


def group_by_length(items: Sequence[_T], batch_size: int, seed: int, length: Callable[[_T], int]) -> Iterator[list[_T]]:
    """Cut pools of random examples into batches of similar length, in random order within the pool."""
    rng = random.Random(seed)
    size = _POOL * batch_size
    for start in range(0, len(items), size):
        pool = sorted(items[start : start + size], key=length)
        groups = [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
        rng.shuffle(groups)
        yield from groups


def padding_token(tokenizer: Any) -> int:
    """Choose the token to pad with: the tokenizer's, or the one that ends a sequence, or 0."""
    tokens = (tokenizer.pad_token_id, getattr(tokenizer, "eos_token_id", None))
    return next((token for token in tokens if token is not None), 0)  # not `or`: 0 is a token


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse what is no tokenizer, such as its name."""
    if not callable(tokenizer):
        raise LoraInitError(f"tokenizer={tokenizer!r}: expected the model's, from AutoTokenizer.from_pretrained().")


def pad_batch(examples: Sequence[Encoded], pad: int, of_classes: bool = False) -> dict[str, Tensor]:
    """Pad examples on the right to one length: each int64 [batch, length]; `labels` that are classes [batch]."""
    import torch

    rows = []
    for tokens, labels in examples:
        target = labels[0] if of_classes else labels  # a class is a number, [], and is stacked to [batch]
        rows.append(
            {
                "input_ids": torch.tensor(tokens),
                "attention_mask": torch.ones(len(tokens), dtype=torch.long),
                "labels": torch.tensor(target, dtype=torch.long),
            }
        )
    return collate(pad, rows)


def as_batches(batches: Any, model: Any, seed: int) -> Any:
    """Make batches of a tokenized data set, of the columns that the model takes; return anything else as it is."""
    import torch

    # By its module's name, so that `datasets` need not be imported.
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
    pad = getattr(getattr(model, "config", None), "pad_token_id", None) or 0
    rows, generator = rows.select_columns(columns), torch.Generator().manual_seed(seed)
    shuffled = hasattr(rows, "__len__")
    if not shuffled:
        rows = rows.shuffle(seed)  # a stream: within a buffer of 1000 rows
    loader: Any = torch.utils.data.DataLoader(
        rows, BATCH_SIZE, shuffled, collate_fn=partial(collate, pad), generator=generator
    )
    loader.settings = {"batch_size": BATCH_SIZE, "seed of the sample": seed}  # which collect keeps, as of load_batches
    return loader


def collate(pad: int, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Put rows into a batch: what goes with tokens is padded on the right, and all else has one shape."""
    # transformers' collators need a tokenizer with a padding token, and pad on its side.
    import torch
    from torch.nn.utils.rnn import pad_sequence

    batch, padding = {}, {"input_ids": pad, "labels": IGNORED}
    for column in rows[0]:
        name = "labels" if column == "label" else column
        try:
            tensors = [torch.as_tensor(row[column]) for row in rows]
            # Whole numbers in a row go with tokens; anything else, such as a picture, has one shape.
            of_tokens = tensors[0].dim() == 1 and not tensors[0].is_floating_point()
            if of_tokens:
                batch[name] = pad_sequence(tensors, True, padding.get(name, 0))  # rows x [length] -> [rows, length]
            else:
                batch[name] = torch.stack(tensors)
        except (TypeError, ValueError, RuntimeError) as error:
            raise LoraInitError(
                f"column {column!r} of the data set: {first_line(error).rstrip('.')}. Expected numbers in each row, of "
                "one shape unless they are tokens. Leave out the column, or such rows."
            ) from error
    if "input_ids" in batch and "attention_mask" not in batch:
        batch["attention_mask"] = pad_sequence([torch.ones(len(row["input_ids"])).long() for row in rows], True)
    return batch
