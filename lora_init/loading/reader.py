"""One row -> the tokens of its text with their labels, or with its class."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from lora_init.errors import LoraInitError, warn
from lora_init.loading.examples import Example, ExampleRecipe, Wanted, count_common, is_missing, recipe
from lora_init.loading.sources import Rows, columns_of, read_rows

Encoded = tuple[list[int], list[int]]  # tokens and labels of one example, not padded
IGNORED = -100  # the label of a token that has none, as in layers.masks
_MOST_CLASSES = 100  # a column with more values is hardly one of classes
# Numbers with fractions are classes if they are halves, as of stars, and up to this many; others are measured values.
_MOST_FRACTIONS = 20
_MISSING = ("nan", "none", "null", "n/a", "na", "<na>")  # what was a missing value before it became text
_DATE = re.compile(r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.](\d\d){1,2}\b")


@dataclass(frozen=True)
class Reader:
    """How rows become tokens with labels."""

    recipe: ExampleRecipe  # which columns make the text
    tokenizer: Any
    limit: int  # most tokens of an example
    seq2seq: bool = False  # whether the completion has tokens of its own, for an encoder-decoder
    needs_labels: bool = True  # whether rows without a labelled token are left out
    label: str | None = None  # column of the class, for a classifier
    rows_of: Mapping[str, int] = field(default_factory=dict)  # by class, in the order in which labels count these

    @property
    def columns(self) -> list[str]:
        """Columns that are read."""
        if self.label:
            return [*self.recipe.columns, self.label]
        return list(self.recipe.columns)

    def __call__(self, row: Mapping[str, Any]) -> Encoded | str:
        """Read a row as tokens and their labels, or its class; or say why it is left out."""
        return self.encode(self.recipe.to_example(row), row)

    def encode(self, example: Example | None, row: Mapping[str, Any]) -> Encoded | str:
        """Read a row whose text is known."""
        if example is None:
            return "with an empty field"
        encoded = _encode(example, self.tokenizer, self.limit, self.seq2seq, ends=self.label is None)
        if encoded is None:
            return "of which the tokenizer makes no token"
        ids, labels = encoded
        if self.label is not None:
            name = _class_of(row[self.label])
            if name is None:
                return "without a label"
            return ids, [[*self.rows_of].index(name)]
        if self.needs_labels and all(label == IGNORED for label in labels):
            return f"without a labelled token among the first {self.limit}"
        return encoded


def open_reader(
    rows: Rows, tokenizer: Any, max_length: int, wanted: Wanted, *, seq2seq: bool = False, needs_labels: bool = True,
    known_classes: Sequence[str] = (),
) -> Reader:  # fmt: skip
    """Decide how to read rows; arguments as for `load_batches`."""
    label = wanted.label
    if label is not None and wanted.completion is not None:
        raise LoraInitError("a classification has no completion: the class is what --label names. Leave it out.")
    recipe_of_text = recipe(list(rows.table.column_names), rows.label, tokenizer, wanted, rows.texts(but=label))
    limit = min(max_length, getattr(tokenizer, "model_max_length", max_length))
    rows_of: dict[str, int] = {}
    if label is not None:
        rows_of = count_classes(rows, label, recipe_of_text.columns, known_classes)
    return Reader(recipe_of_text, tokenizer, limit, seq2seq, needs_labels, label, rows_of)


def check_columns(source: str, wanted: Wanted) -> None:
    """Refuse columns that a local file does not have, before torch is imported."""

    def check(names: list[str], place: str, texts: Sequence[str] = ()) -> None:
        # The tokenizer is not read yet; whether it has a chat template is checked with it.
        recipe(names, place, SimpleNamespace(chat_template="any"), wanted, texts)
        _check_label(wanted.label, names, place)

    names = columns_of(source)
    if not names or "input_ids" in names or (wanted.label and wanted.completion):
        return  # only `datasets` can tell; tokens need no recipe; a label with a completion is refused later
    try:
        check(names, source)
    except LoraInitError:
        # Slower, but sure: the first row may lack columns, and the error proposes those that hold text.
        rows = read_rows(source)
        check(rows.table.column_names, rows.label, rows.texts(but=wanted.label))


def _check_label(column: str | None, names: Sequence[str], place: str) -> None:
    if column is not None and column not in names:
        raise LoraInitError(f"{{label}} is not a column. Columns of {place}: {', '.join(names)}.", label=column)


def count_classes(rows: Rows, column: str, used: Collection[str], known: Sequence[str] = ()) -> dict[str, int]:
    """Count the rows of the classes of a column, in the order in which labels count these.

    That is the checkpoint's order if it `known` them all, so that its head keeps its meaning; else that of their
    numbers, if they are numbers, or of their names. `used` are the columns that the text is from.
    """
    _check_label(column, rows.table.column_names, rows.label)
    if any(isinstance(value, (list, dict)) for value in rows.table[column]):
        raise LoraInitError(f"{rows.label}: column {column!r} holds lists, and a row has one class. Name another.")
    counts: Counter[str] = Counter()
    for value in rows.table[column]:
        name = _class_of(value)
        if name is not None:
            counts[name] += 1
    numbers = _numbers(counts)
    _check_classes(counts, numbers.values(), f"{rows.label}: column {column!r}")
    if column in used:
        raise LoraInitError("{label} is a part of the text, which gives the class away. Take it out.", label=column)
    _warn_of_classes(counts, f"{rows.label}, column {column!r}")
    order = sorted(counts)
    if counts.keys() <= {*known}:
        order = list(known)  # also those without a row
    elif numbers:
        order.sort(key=numbers.__getitem__)  # 2 before 10; of 1 and 01, which are equal, the order above stays
    return {name: counts[name] for name in order}


def _numbers(names: Collection[str]) -> dict[str, float]:
    """Read names of classes as numbers; empty unless all of them are numbers."""
    numbers = {}
    for name in names:
        number = _number(name)
        if number is None:
            return {}
        numbers[name] = number
    return numbers


def _check_classes(counts: Counter[str], numbers: Collection[float], place: str) -> None:
    """Refuse a column whose values are something else than classes; `numbers` are the values if all are numbers."""
    fractions = {number % 1 for number in numbers}
    if fractions - {0.0} and (len(counts) > _MOST_FRACTIONS or fractions - {0.0, 0.5}):
        raise LoraInitError(
            f"{place} has {len(counts)} different numbers with fractions, from "
            f"{min(numbers):g} to {max(numbers):g}. They are measured values, not classes. Round "
            "them to a few, or put words such as 'low' and 'high' in their place."
        )
    if counts and all(map(_DATE.match, counts)):
        raise LoraInitError(f"{place} holds dates, such as {min(counts)}. Name the class.")
    if len(counts) == counts.total() > _MOST_FRACTIONS:
        raise LoraInitError(
            f"{place} has another value in each of its {len(counts)} rows, as numbers of rows "
            "have. Name the column of the class."
        )
    if not 2 <= len(counts) <= _MOST_CLASSES:
        raise LoraInitError(
            f"{place} has {len(counts)} different values, and a classification needs 2 to "
            f"{_MOST_CLASSES} classes. Name the column of the class."
        )


def _warn_of_classes(counts: Mapping[str, int], place: str) -> None:
    """Warn of classes that have one row, that are one class in two spellings, or that are missing values in words."""
    with_one_row = [name for name, n in counts.items() if n == 1]
    missing = [name for name in counts if name.strip().casefold() in _MISSING]
    spellings = defaultdict(list)
    for name in counts:
        spellings[" ".join(name.split()).casefold()].append(name)
    spelled_twice = []
    for names in spellings.values():
        if len(names) > 1:
            spelled_twice += names
    for names, what in (
        (with_one_row, "one row: too few to learn from. Leave it out, or join classes"),
        (spelled_twice, "the same but for spaces or case, and counts as another class. Write both alike"),
        (missing, "what a missing value is written as, and counts as a class. Leave such cells empty"),
    ):
        if names:
            warn(f"{place}: {', '.join(map(repr, names))}: {what}.")


def classes_in_words(rows_of: Mapping[str, int]) -> str:
    """Write how many rows each class has."""
    counts = [f"{name} {n}" for name, n in rows_of.items()]
    return f"{len(rows_of)} classes ({', '.join(counts)})"


def _class_of(value: Any) -> str | None:
    """Return the name of the class that a field says; None if it says nothing."""
    if is_missing(value):
        return None
    # pandas reads a column of whole numbers with a gap as 0.0, 1.0.
    return re.sub(r"^(-?\d+)\.0+$", r"\1", str(value))


def _number(name: str) -> float | None:
    """Read a name as a number; None if it is none. Python reads "nan" and "infinity" as numbers, too."""
    try:
        number = float(name)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _encode(example: Example, tokenizer: Any, limit: int, seq2seq: bool, ends: bool) -> Encoded | None:
    """Tokenize prompt and answer as one text, as training does: tokens at the seam differ from the parts' tokens.

    So the labels of a stretch begin where the tokens of the whole differ from the text before the stretch, tokenized
    alone, and end where they differ from the text up to its end. None if there is no token.
    """

    def tokens(text: str, role: str = "text") -> list[int]:
        return list(tokenizer(**{role: text}, add_special_tokens=not example.rendered, verbose=False)["input_ids"])

    if seq2seq:
        before = example.labelled[0][0] if len(example.labelled) == 1 else ""
        if not before.strip() or not example.text.startswith(before):
            raise LoraInitError(
                "an encoder-decoder model needs a prompt and one completion. Use prompt and completion."
            )
        answer = tokens(example.text[len(before) :], "text_target")  # in the target language, if there are two
        return _cut(tokens(before), tokenizer, limit), _cut(answer, tokenizer, limit)
    ids = tokens(example.text)
    if not ids:
        return None
    labels = [IGNORED] * len(ids)
    for before, until in example.labelled:
        start = 0
        if before:
            start = count_common(tokens(before), ids)
        end = len(ids)
        if until != example.text:
            end = count_common(tokens(until), ids)
        labels[start:end] = ids[start:end]
    # Not after a classifier's text: a decoder's head reads the last token, and in training that is one of the text.
    eos = getattr(tokenizer, "eos_token_id", None)
    if ends and eos is not None and ids[-1] != eos and not example.rendered:
        ids.append(eos)
        labels.append(eos)
    cut = _cut(ids, tokenizer, limit)
    if cut != ids[:limit]:  # the separator took the last place, and no label is its
        return cut, [*labels[: limit - 1], IGNORED]
    return cut, labels[:limit]


def _cut(ids: list[int], tokenizer: Any, limit: int) -> list[int]:
    """Truncate at the end, but keep the separator that encoders such as BERT expect there."""
    if len(ids) > limit and ids[-1] == getattr(tokenizer, "sep_token_id", None):
        return [*ids[: limit - 1], ids[-1]]
    return ids[:limit]
