"""What is to be learned: examples to train on, others to score by, in an order that the seed alone decides."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_init.errors import LoraInitError
from lora_init.loading.batches import group_by_length, pad_batch, padding_token
from lora_init.loading.examples import IGNORED, Encoded, encode, recipe
from lora_init.loading.sources import read_rows

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


def choice_rule(names: Sequence[str], label: str, options: str, answer: str | None) -> ChoiceRule:
    """Read `--options` and `--answer`: a column with options, or the options themselves, separated by commas.

    Raises:
        LoraInitError: A column is missing.
    """
    answer = answer or "answer"
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
    folded = [option.casefold() for option in options]
    if text in folded:
        return folded.index(text)
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


def load_task(
    source: str | Path,
    tokenizer: Any,
    *,
    template: str | None = None,
    completion: str | None = None,
    label: str | None = None,
    options: str | None = None,
    answer: str | None = None,
    normalize: bool = False,
    subset: str | None = None,
    split: str = "train",
    train_samples: int = 1024,
    validation_samples: int = 128,
    max_length: int = 256,
    batch_size: int = 8,
    data_seed: int = 0,
) -> Task:
    """Read a data set and split it. Validation rows come first in the seeded order, so more training moves none.

    Rows are read as by `load_batches`. Training rows with the same tokens as a validation row are left out.

    Args:
        source: A file, a folder or a hub id.
        tokenizer: The model's tokenizer.
        template: Text of an example, or the prompt if there is a completion.
        completion: What the model should answer. For multiple choice it names the column `answer`; that is its
            default, after a space.
        label: Column of the class; makes this a classification.
        options: Column with the options (a list, or one a line), or options separated by commas; makes this a multiple
            choice.
        answer: Column that says which option is right: its text, its letter or its position. Default: `answer`.
        normalize: Divide an option's log-likelihood by its number of tokens before options are compared.
        subset: Configuration of a hub data set.
        split: Split of a hub data set or a folder.
        train_samples: Training examples at most.
        validation_samples: Validation examples.
        max_length: Tokens of an example at most.
        batch_size: Examples in a batch; there must be as many to train on.
        data_seed: Seed of the split.

    Raises:
        LoraInitError: Too few rows, missing columns, labels that are no classes, or what `load_batches` raises.
    """
    if validation_samples < 1:
        raise LoraInitError(
            f"validation_samples={validation_samples}: no validation rows are left, so nothing could be compared. "
            "Use at least 1; 100 or more say something."
        )
    data = read_rows(source, subset, split)
    rows, name = data.table, data.label
    names = list(rows.column_names)
    kind = _kind(label, options, names, name)
    rule = choice_rule(names, name, options, answer) if options is not None else None
    completion = _completion(template, completion, rule, kind)
    reading = recipe(names, name, tokenizer, template, completion)
    classes = _classes(rows, name, label) if label is not None else ()
    extra = [column for column in (label, rule and rule.answer, rule and rule.column) if column]
    limit = min(max_length, getattr(tokenizer, "model_max_length", max_length))
    left_out: Counter[str] = Counter()

    def read_row(row: Mapping[str, Any]) -> Item | str:
        """Turn a row into an item, or say why it is left out."""
        encoded = _encoded(row, reading.to_example, tokenizer, limit)
        if encoded is None:
            return "with an empty field"
        if label is not None:
            value = row[label]
            return "without a label" if value is None else Item((encoded[0], []), (), classes.index(str(value)))
        if rule is not None:
            return _with_choices(row, rule, lambda c: _encoded(c, reading.to_example, tokenizer, limit), limit)
        if all(target == IGNORED for target in encoded[1]):
            return f"without a labelled token among the first {limit}"
        return Item(encoded)

    usable = data.usable([*reading.columns, *extra], read_row, data_seed, left_out)
    validation = list(islice(usable, validation_samples))
    held_out = {tuple(item.tokens[0]) for item in validation}
    fresh = (item for item in usable if tuple(item.tokens[0]) not in held_out)
    train = list(islice(fresh, max(train_samples, 0)))
    skipped = [f"{count} left out {why}" for why, count in left_out.items()]
    if len(train) < batch_size or len(validation) < validation_samples:
        raise LoraInitError(
            f"{name}: {len(train)} training and {len(validation)} validation examples; a batch needs {batch_size} "
            f"and validation {validation_samples}"
            + (f" ({', '.join(skipped)})" if skipped else "")
            + ". Lower --validation-samples or --batch-size, raise --train-samples, or use more data."
        )
    parts = [f"{name}: {len(train)} training and {len(validation)} validation examples of {len(rows)}"]
    parts += [f"split seed {data_seed}", f"at most {limit} tokens", reading.name]
    parts += [f"label {label}, {len(classes)} classes"] if label is not None else []
    parts += [f"options {options}, answer {rule.answer}"] if rule is not None else []
    return Task(kind, train, validation, classes, padding_token(tokenizer), normalize, ", ".join(parts + skipped), name)


def _kind(label: str | None, options: str | None, names: list[str], name: str) -> str:
    if label is not None and options is not None:
        raise LoraInitError("label makes this a classification, options a multiple choice. Give one of them.")
    if label is None:
        return CAUSAL_LM if options is None else MULTIPLE_CHOICE
    if label not in names:
        raise LoraInitError(f"label={label!r} is not a column. Columns of {name}: {', '.join(names)}.")
    return CLASSIFICATION


def _completion(template: str | None, completion: str | None, rule: ChoiceRule | None, kind: str) -> str | None:
    """Check prompt and completion against what the task needs, and complete what is plain from it."""
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
        raise LoraInitError(f"completion={completion!r} must name {named}, where each option is put in turn.")
    return completion or f" {named}"


def _classes(rows: Any, name: str, label: str) -> tuple[str, ...]:
    values = sorted({str(value) for value in rows[label] if value is not None})
    if not 2 <= len(values) <= _MOST_CLASSES:
        raise LoraInitError(
            f"{name}: column {label!r} has {len(values)} different values, and a classification needs 2 to "
            f"{_MOST_CLASSES} classes. Name the column of the class."
        )
    return tuple(values)


def _encoded(row: Mapping[str, Any], to_example: Callable[..., Any], tokenizer: Any, limit: int) -> Encoded | None:
    example = to_example(row)
    return encode(example, tokenizer, limit, False) if example else None


def _with_choices(
    row: Mapping[str, Any], rule: ChoiceRule, encoded: Callable[[Mapping[str, Any]], Encoded | None], limit: int
) -> Item | str:
    """Read a row with all its options; a shortened one would be likelier than it is, so it leaves the row out."""
    found = rule.read(row)
    if found is None:
        return "whose answer is none of the options"
    options, right = found
    choices = [encoded({**row, rule.answer: option}) for option in options]
    whole = tuple(choice for choice in choices if choice is not None and len(choice[0]) < limit)
    if len(whole) < len(options):
        return f"with {limit} or more tokens"
    return Item(whole[right], whole, right)
