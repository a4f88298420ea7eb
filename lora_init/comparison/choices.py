"""Multiple choice: the options of a row, which of them is right, and the row as it reads with each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_init.errors import LoraInitError


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
