"""Commands of the program: their help, on one screen or with --help-all in groups, and how their words are read."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from lora_init.adapters.init_config import DATA, LIST

# Headings of --help-all in this order. Options without a `rich_help_panel` come before them, and are in --help.
_PANELS = (
    "Data", "Layers and ranks", "Limits", "The adapter", "The training to come", "The pass over the data", "Runs",
    "Model", "Starts from a bank", "Output",
)  # fmt: skip
_WHOLE = "lora_init.whole_help"
# What is given once, and how it holds several.
_ONCE = {LIST: "with commas between its items", DATA: "as a folder or a pattern of several files"}
_UNBROKEN = "\u2011"  # a hyphen at which no line ends, in place of those within names, such as lora-ga
_WIDEST, _NARROW = 70, 40  # columns of an option and what it takes, in --help-all and in --help
# How click writes a number, a range or a default, and what is shown instead.
_CLUTTER = [(r" range>", ">"), (r"; (x|\d+)[<>]=?.*?(?=\])", ""), (r"\s*\[(x|\d+)[<>]=?[^\]]*\]", ""),
            (r"\[default: \((.*?)\)\]", r"[default: \1]"), (r"<list\[Path\]>", "<path>"),
            (r"<list\[(\w+)\]>", r"<\1>")]  # fmt: skip


# click breaks lines at hyphens, and would print lora- on one line and ga on the next. So the hyphens are replaced by
# ones at which no line ends while it writes, and put back afterwards.
class _Unbroken:
    """Writes the help with names in one piece."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help, and put ordinary hyphens back."""
        super().format_help(ctx, formatter)  # type: ignore[misc]
        formatter.buffer = [piece.replace(_UNBROKEN, "-") for piece in formatter.buffer]


class ListedCommands(_Unbroken, TyperGroup):
    """Lists commands with their whole first sentence; click cuts it at the end of the line."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write names and first sentences into the help."""
        rows = []
        for name, command in self.commands.items():
            text = " ".join((command.help or "").split())
            sentence = text.partition(". ")[0].rstrip(".")
            rows.append((name, f"{sentence}."))
        with formatter.section("Commands"):
            formatter.write_dl(rows)


class GroupedCommand(_Unbroken, TyperCommand):
    """Writes the options that everybody needs, and with --help-all every option under a heading for each group."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the words, in which a list or data are given once: of two, click would take the last alone."""
        given: Any = self.make_parser(ctx).parse_args(args=[*args])[-1]  # the parameter of each word, in order
        for parameter, n in Counter(given).items():
            if n > 1 and parameter.metavar in _ONCE and not ctx.resilient_parsing:
                ctx.fail(f"{parameter.opts[0]} is given {n} times. Give it once, {_ONCE[parameter.metavar]}.")
        return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Name arguments in capitals, as sentences and examples do."""
        return [re.sub("[{}]", "", piece).upper() for piece in super().collect_usage_pieces(ctx)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options into the help."""
        whole = ctx.meta.get(_WHOLE, False)
        for title, rows in grouped_options(self, ctx, whole).items():
            with formatter.section(title):
                # Only in the texts: options stand in a column of their own, which is not wrapped.
                unbroken = [(words, re.sub(r"(?<=\w)-(?=\w)", _UNBROKEN, text)) for words, text in rows]
                formatter.write_dl(unbroken, col_max=26)


def print_whole(context: typer.Context, value: bool) -> None:
    """Print the help with every option, and exit, where --help-all is given, whose callback this is."""
    if value and not context.resilient_parsing:  # which is on while a shell completes words
        context.meta[_WHOLE] = True
        typer.echo(context.get_help())
        raise typer.Exit


def is_further(parameter: Any) -> bool:
    """Return whether an option is in --help-all alone."""
    return bool(getattr(parameter, "rich_help_panel", None))  # click's own, such as --help, have no such field


def grouped_options(command: Any, ctx: Any, whole: bool = True) -> dict[str, list[tuple[str, str]]]:
    """Return the arguments and options of a command by heading: how each is written, and its help.

    Of a command that is not shown as a `whole`: options without a heading, and of each what `_short` leaves.
    """
    groups: dict[str, list[tuple[str, str]]] = {title: [] for title in ("Arguments", "Options", *_PANELS)}
    for parameter in command.get_params(ctx):
        title = getattr(parameter, "rich_help_panel", None) or "Options"
        if parameter.param_type_name == "argument":
            title = "Arguments"
        elif not whole and is_further(parameter):
            continue
        record = parameter.get_help_record(ctx)
        if not record:  # hidden ones have none
            continue
        words, text = _plain(record[0]), _plain(record[1])
        if title == "Arguments":
            name, *kind = words.split(" ")
            words = " ".join([name.upper(), *kind])
        choices = re.search(r" <(.*\|.*)>$", words)
        widest = _WIDEST if whole else _NARROW
        if choices and len(words) > widest:  # too many to stand beside the option
            words = words[: choices.start()] + " WORD"
            text = f"{text}  Words: {choices[1].replace('|', ', ')}."
        if not whole:
            text = _short(text)
        groups[title].append((words, text))
    return {title: rows for title, rows in groups.items() if rows}


def _short(text: str) -> str:
    """Leave the first sentence, and what is taken by default."""
    first, *others = re.split(r"(?<=[.;])\s+(?=[A-Z\[])", text)
    defaults = [sentence for sentence in others if sentence.startswith(("Default", "[", "Words"))]
    return " ".join([first.rstrip(";"), *defaults])


def _plain(text: str) -> str:
    for pattern, replacement in _CLUTTER:
        text = re.sub(pattern, replacement, text)
    return text
