"""What is to be learned: examples to train on, others to score by, in an order that the seed alone decides."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_init.errors import LoraInitError
from lora_init.loading.batches import Batches, group_by_length, load_batches, pad_batch, padding_token
from lora_init.loading.examples import IGNORED, Encoded, encode, recipe
from lora_init.loading.sources import Rows, read_rows

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ChoiceRule:
    """Where the options of a row are and where its answer is.

    Attributes:
        answer: Column that says which option is right.
        column: Column with the options; None if all rows have the same.
        options: The options that all rows have.
    """

    answer: str
    column: str | None
    options: tuple[str, ...] = ()

    def read(self, row: Mapping[str, Any]) -> tuple[list[str], int] | None:
        """Return the options of a row and the position of the right one; None if the row does not say."""
        options = list(self.options) if self.column is None else split_options(row[self.column])
        right = find_answer(row[self.answer], options)
        return None if right is None or len(options) < 2 else (options, right)


def choice_rule(names: Sequence[str], label: str, options: str, answer: str) -> ChoiceRule:
    """Read `--options` and `--answer`: a column with options, or the options themselves, separated by commas.

    Raises:
        LoraInitError: A column is missing.
    """
    columns = f"Columns of {label}: {', '.join(names)}."
    if answer not in names:
        raise LoraInitError(f"answer={answer!r} is not a column. {columns}")
    if options in names:
        return ChoiceRule(answer, options)
    listed = tuple(option.strip() for option in options.split(",") if option.strip())
    if len(listed) < 2:
        raise LoraInitError(
            f"options={options!r} is not a column, and not a list of options such as 'yes,no'. {columns}"
        )
    return ChoiceRule(answer, None, listed)


def split_options(value: Any) -> list[str]:
    """Read options: a list, a mapping with a list under `text` (as on the hub), or a text with one option a line."""
    if isinstance(value, Mapping):
        value = value.get("text", [])
    parts = value if isinstance(value, list) else str(value or "").splitlines()
    return [str(part).strip() for part in parts if str(part).strip()]


def find_answer(value: Any, options: Sequence[str]) -> int | None:
    """Find the right option: by its text, else by a letter (A is the first), else by a number (0 is the first).

    Example:
        >>> find_answer("B", ["red", "blue"]), find_answer("red", ["red", "blue"]), find_answer(1, ["red", "blue"])
        (1, 0, 1)
    """
    text = str(value).strip().casefold()
    lowered = [option.casefold() for option in options]
    if text in lowered:
        return lowered.index(text)
    if len(text) == 1 and "a" <= text <= "z":
        position = ord(text) - ord("a")
    else:
        position = int(text) if text.isdecimal() else len(options)
    return position if position < len(options) else None


CAUSAL_LM, CLASSIFICATION, MULTIPLE_CHOICE = "causal-lm", "classification", "multiple-choice"
_MOST_CLASSES = 100


@dataclass(frozen=True)
class Item:
    """One example.

    Attributes:
        tokens: What training sees.
        choices: The example as it reads with each option, for multiple choice.
        answer: Position of the right option, or the class; None for text alone.
    """

    tokens: Encoded
    choices: tuple[Encoded, ...] = ()
    answer: int | None = None


@dataclass(frozen=True)
class Task:
    """Examples to train on and others to score by. No example is in both.

    Attributes:
        kind: `"causal-lm"`, `"classification"` or `"multiple-choice"`.
        train: Examples to train on, and to learn statistics from.
        validation: Examples to score by, never used for anything else.
        classes: Names of the classes, for classification.
        padding: Token to pad with.
        normalize: Whether an option's log-likelihood is divided by its number of tokens.
        data: Which examples of which data these are, in words.
        label: Short name of the data.
    """

    kind: str
    train: Sequence[Item]
    validation: Sequence[Item]
    classes: tuple[str, ...]
    padding: int
    normalize: bool
    data: str
    label: str

    def batch(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """Pad examples to a batch, with the class as label for classification."""
        import torch

        batch = pad_batch([item.tokens for item in items], self.padding)
        if self.kind == CLASSIFICATION:
            batch["labels"] = torch.tensor([item.answer for item in items])  # [batch]
        return batch

    def order(self, seed: int, steps: int, batch_size: int) -> list[list[Item]]:
        """Draw the batches of a run. They depend on the seed alone: every start sees the same, in the same order.

        Every epoch is a new shuffle, without its last, incomplete batch; batches hold examples of similar length.
        """
        rng = random.Random(seed)
        batches: list[list[Item]] = []
        while len(batches) < steps:
            epoch = rng.sample(self.train, len(self.train))
            whole = epoch[: len(epoch) // batch_size * batch_size]
            batches += group_by_length(whole, batch_size, rng.randrange(2**31), item_length)
        return batches[:steps]


def item_length(item: Item) -> int:
    """Count the tokens of an example."""
    return len(item.tokens[0])


@dataclass(frozen=True)
class DataOptions:
    """How examples are read from a data set, and how it is split.

    Attributes:
        template: Text of an example, or the prompt if there is a completion.
        completion: What the model should answer. For multiple choice it names the column `answer`; that is its
            default, after a space.
        label: Column of the class; makes this a classification.
        options: Column with the options (a list, or one a line), or options separated by commas; makes this a multiple
            choice.
        answer: Column that says which option is right: its text, its letter or its position.
        normalize: Divide an option's log-likelihood by its number of tokens before options are compared.
        subset: Configuration of a hub data set.
        split: Split of a hub data set or a folder.
        train_samples: Training examples at most.
        validation_samples: Validation examples.
        max_length: Tokens of an example at most.
        data_seed: Seed of the split.
        name: Name of the task in the report. Default: that of the data.
        retain_data: Text of another kind: its loss before and after training tells what was forgotten.
        retain_template: How an example of it reads.
        retain_samples: Examples of it.
    """

    template: str | None = None
    completion: str | None = None
    label: str | None = None
    options: str | None = None
    answer: str = "answer"
    normalize: bool = False
    subset: str | None = None
    split: str = "train"
    train_samples: int = 1024
    validation_samples: int = 128
    max_length: int = 256
    data_seed: int = 0
    name: str | None = None
    retain_data: str | Path | None = None
    retain_template: str | None = None
    retain_samples: int = 64


def load_task(source: str | Path, tokenizer: Any, asked: DataOptions, batch_size: int) -> Task:
    """Read a data set and split it. Validation rows come first in the seeded order, so more training moves none.

    Rows are read as by `load_batches`. Training rows with the same tokens as a validation row are left out.

    Args:
        source: A file, a folder or a hub id.
        tokenizer: The model's tokenizer.
        asked: What to read, and how.
        batch_size: Examples in a batch; there must be as many to train on.

    Raises:
        LoraInitError: Too few rows, missing columns, labels that are no classes, or what `load_batches` raises.
    """
    if asked.validation_samples < 1:
        raise LoraInitError(
            f"validation_samples={asked.validation_samples}: no validation rows are left, so nothing could be "
            "compared. Use at least 1; 100 or more say something."
        )
    data = read_rows(source, asked.subset, asked.split)
    name = data.label
    reader = _Reader(data, tokenizer, asked)
    usable = reader.items()
    validation = list(islice(usable, asked.validation_samples))
    held_out = {tuple(item.tokens[0]) for item in validation}
    fresh = (item for item in usable if tuple(item.tokens[0]) not in held_out)
    train = list(islice(fresh, max(asked.train_samples, 0)))
    skipped = [f"{count} left out {why}" for why, count in reader.left_out.items()]
    left_out = f" ({', '.join(skipped)})" if skipped else ""
    if len(train) < batch_size or len(validation) < asked.validation_samples:
        raise LoraInitError(
            f"{name}: {len(train)} training and {len(validation)} validation examples; a batch needs {batch_size} "
            f"and validation {asked.validation_samples}{left_out}. "
            "Lower --validation-samples or --batch-size, raise --train-samples, or use more data."
        )
    counted = f"{name}: {len(train)} training and {len(validation)} validation examples of {len(data.table)}"
    described = ", ".join([counted, f"split seed {asked.data_seed}", *reader.words(), *skipped])
    return Task(
        reader.kind, train, validation, reader.classes, padding_token(tokenizer), asked.normalize, described, name
    )


def load_retained(tokenizer: Any, asked: DataOptions, kind: str, batch_size: int) -> Batches | None:
    """Read the text whose loss tells what was forgotten; None if none is asked for.

    Raises:
        LoraInitError: It cannot be read, or the task is a classification.
    """
    if asked.retain_data is None:
        return None
    if kind == CLASSIFICATION:
        raise LoraInitError("retain_data is for language models: a classifier has no loss on text. Leave it out.")
    return load_batches(
        asked.retain_data, tokenizer, template=asked.retain_template, samples=asked.retain_samples,
        batch_size=batch_size, max_length=asked.max_length,
    )  # fmt: skip


class _Reader:
    """Turns rows into items, and counts those that are of no use in `left_out`."""

    def __init__(self, data: Rows, tokenizer: Any, asked: DataOptions) -> None:
        rows, name = data.table, data.label
        names = list(rows.column_names)
        self.kind = _kind(asked, names, name)
        self.rule = choice_rule(names, name, asked.options, asked.answer) if asked.options is not None else None
        self.classes = _classes(rows, name, asked.label) if asked.label is not None else ()
        completion = _completion(asked, self.rule, self.kind)
        self.recipe = recipe(names, name, tokenizer, asked.template, completion)
        extra = [
            column for column in (asked.label, self.rule and self.rule.answer, self.rule and self.rule.column) if column
        ]
        self.data, self.columns = data, [*self.recipe.columns, *extra]
        self.limit = min(asked.max_length, getattr(tokenizer, "model_max_length", asked.max_length))
        self.tokenizer, self.asked = tokenizer, asked
        self.left_out: Counter[str] = Counter()

    def words(self) -> list[str]:
        """Say how rows are read."""
        said = [f"at most {self.limit} tokens", self.recipe.name]
        said += [f"label {self.asked.label}, {len(self.classes)} classes"] if self.classes else []
        return said + ([f"options {self.asked.options}, answer {self.rule.answer}"] if self.rule else [])

    def items(self) -> Iterator[Item]:
        """Yield the rows that are of use in the seeded order."""
        return self.data.usable(self.columns, self._read, self.asked.data_seed, self.left_out)

    def _read(self, row: Mapping[str, Any]) -> Item | str:
        """Read a row as an item, or say why it is left out."""
        encoded = self._encoded(row)
        if encoded is None:
            return "with an empty field"
        if self.asked.label is not None:
            value = row[self.asked.label]
            return "without a label" if value is None else Item((encoded[0], []), (), self.classes.index(str(value)))
        if self.rule is not None:
            return self._with_choices(row, self.rule)
        if all(target == IGNORED for target in encoded[1]):
            return f"without a labelled token among the first {self.limit}"
        return Item(encoded)

    def _encoded(self, row: Mapping[str, Any]) -> Encoded | None:
        example = self.recipe.to_example(row)
        return encode(example, self.tokenizer, self.limit, False) if example else None

    def _with_choices(self, row: Mapping[str, Any], rule: ChoiceRule) -> Item | str:
        """Read a row with all its options; a shortened one would be likelier than it is, so it leaves the row out."""
        found = rule.read(row)
        if found is None:
            return "whose answer is none of the options"
        options, right = found
        choices = [self._encoded({**row, rule.answer: option}) for option in options]
        whole = tuple(choice for choice in choices if choice is not None and len(choice[0]) < self.limit)
        if len(whole) < len(options):
            return f"with {self.limit} or more tokens"
        return Item(whole[right], whole, right)


def _kind(asked: DataOptions, names: list[str], name: str) -> str:
    if asked.label is not None and asked.options is not None:
        raise LoraInitError("label makes this a classification, options a multiple choice. Give one of them.")
    if asked.label is None:
        return CAUSAL_LM if asked.options is None else MULTIPLE_CHOICE
    if asked.label not in names:
        raise LoraInitError(f"label={asked.label!r} is not a column. Columns of {name}: {', '.join(names)}.")
    return CLASSIFICATION


def _completion(asked: DataOptions, rule: ChoiceRule | None, kind: str) -> str | None:
    """Check prompt and completion against what the task needs, and complete what is plain from it."""
    template, completion = asked.template, asked.completion
    if kind == CLASSIFICATION and completion is not None:
        raise LoraInitError("a classification has no completion: the class is what --label names. Leave it out.")
    if rule is None:
        return completion
    if template is None:
        raise LoraInitError("multiple choice needs a template for the prompt, such as '{question}\\nAnswer:'.")
    named = f"{{{rule.answer}}}"
    if named in template:
        raise LoraInitError(f"template={template!r} gives the answer away: it names {named}. Take it out.")
    if completion is not None and named not in completion:
        raise LoraInitError(f"completion={completion!r} must name {named}, where one option after the other is put.")
    return completion or f" {named}"


def _classes(rows: Any, name: str, label: str) -> tuple[str, ...]:
    values = sorted({str(value) for value in rows[label] if value is not None})
    if not 2 <= len(values) <= _MOST_CLASSES:
        raise LoraInitError(
            f"{name}: column {label!r} has {len(values)} different values, and a classification needs 2 to "
            f"{_MOST_CLASSES} classes. Name the column of the class."
        )
    return tuple(values)
