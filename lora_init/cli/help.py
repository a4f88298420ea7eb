"""The help of a command: its options in groups, the ones that everybody needs first."""

from __future__ import annotations

import re
from typing import Any

from typer.core import TyperCommand, TyperGroup

# Headings in this order; options without a `rich_help_panel` come before them, with those that everybody needs.
_PANELS = (
    "Data", "Layers and ranks", "The adapter", "The pass over the data", "Runs", "Model", "Starts from a bank",
    "Output",
)  # fmt: skip
_WIDEST = 70  # columns of an option and what it takes
# What is said of a number or a default in the form of Python or of a range.
_CLUTTER = [(r" range>", ">"), (r"; (x|\d+)[<>]=?.*?(?=\])", ""), (r"\s*\[(x|\d+)[<>]=?[^\]]*\]", ""),
            (r"\[default: \((.*?)\)\]", r"[default: \1]"), (r"<list\[Path\]>", "<path>"),
            (r"<list\[(\w+)\]>", r"<\1>")]  # fmt: skip


class ListedCommands(TyperGroup):
    """Lists commands with their whole first sentence; click cuts it at the end of the line."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write names and first sentences into the help."""
        sentences = {name: " ".join((one.help or "").split()).partition(". ")[0] for name, one in self.commands.items()}
        with formatter.section("Commands"):
            formatter.write_dl([(name, f"{text.rstrip('.')}.") for name, text in sentences.items()])


class GroupedCommand(TyperCommand):
    """Writes options under a heading for each group."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options into the help."""
        for title, rows in grouped_options(self, ctx).items():
            with formatter.section(title):
                formatter.write_dl(rows, col_max=26)


def grouped_options(command: Any, ctx: Any) -> dict[str, list[tuple[str, str]]]:
    """Return the arguments and options of a command by heading: how each is written, and its help."""
    parameters = command.get_params(ctx)
    many = len(parameters) > 20
    groups: dict[str, list[tuple[str, str]]] = {title: [] for title in ("Arguments", "Options", *_PANELS)}
    for parameter in parameters:
        title = (many and getattr(parameter, "rich_help_panel", None)) or "Options"
        if parameter.param_type_name == "argument":
            title = "Arguments"
        if record := parameter.get_help_record(ctx):
            words = _plain(record[0])
            choices = re.search(r" <(.*\|.*)>$", words)
            if choices and len(words) > _WIDEST:  # too many to stand beside the option
                words = words[: choices.start()] + " WORD"
                record = words, f"{record[1]}  Words: {choices[1].replace('|', ', ')}."
            groups[title].append((words, _plain(record[1])))
    return {title: rows for title, rows in groups.items() if rows}


def _plain(text: str) -> str:
    for pattern, replacement in _CLUTTER:
        text = re.sub(pattern, replacement, text)
    return text
