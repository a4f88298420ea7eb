"""Tables of the pages that the code decides: `python docs/tables.py` writes them, and a test checks them.

A page has a table between `<!-- table: NAME -->` and `<!-- end of table -->`.
"""

import re
from collections.abc import Callable, Iterator
from inspect import getdoc
from pathlib import Path
from typing import Any

import typer

import lora_init
from lora_init.cli.app import app as cli
from lora_init.cli.help import is_further
from lora_init.starts.starts import STARTS, Start

DOCS = Path(__file__).parent
PLACE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
_NEEDS = {
    "bank": "a bank",
    "errors": "data and the float weights",
    "gradients": "labelled data",
    "inputs": "data",
    "weights": "the weights",
}
_COMMON = ("--quiet", "--verbose", "--json", "--help-all")  # of all commands
# Public names by topic, in the order in which they are used; what is in none of them comes last.
TOPICS = {
    "from data to an adapter": (
        "load_batches", "collect", "allocate_ranks", "build_adapter", "initialize", "StartCallback", "axolotl",
        "learning_rate", "find_step_size", "mean_loss", "correct_base",
    ),
    "results": (
        "Statistics", "Provenance", "Spectrum", "GradientSpectrum", "RankAllocation", "AdapterInit", "LearningRate",
        "QuantizationErrors",
    ),
    "keeping what the model knew": ("dial", "Dial", "replay"),
    "serving": (
        "export_adapter", "Exported", "check_fit", "FitReport", "verify", "Verification", "ServingWatch",
        "ServingCallback",
    ),
    "comparing": ("compare", "Comparison"),
    "starts of your own": ("Start", "Policy"),
    "PEFT's EVA": ("get_eva_state_dict", "initialize_lora_eva_weights"),
    "layers, decompositions, subspaces": (
        "find_targets", "Target", "IncrementalSVD", "ExactPCA", "principal_angles", "intruder_dimensions", "Intruders",
    ),
    "errors": ("LoraInitError", "Interrupted"),
}  # fmt: skip


def starts() -> Iterator[str]:
    """Write a row for each start of the registry that `init` can make."""
    yield from ("| start | what it is | needs | before training |", "|---|---|---|---|")
    yield from map(_start, (one for one in STARTS if one.function))


def _start(start: Start) -> str:
    before = "base changed" if start.changes_base else "output changed" if start.changes_output else "unchanged"
    needs = next((words for need, words in _NEEDS.items() if need in start.needed), "–")
    return f"| `{start.name}` | {start.summary} | {needs} | {before} |"


def commands() -> Iterator[str]:
    """Write a row for each command, with the first sentence of its help."""
    yield from ("| command | what it does |", "|---|---|")
    for name, command in _commands():
        yield f"| `lora-init {name}` | {_first_sentence(command.help)} |"


def options() -> Iterator[str]:
    """Write a row for each command, with the names of its options: those of --help, and those of --help-all."""
    yield from ("| command | in `--help` | in `--help-all`, too |", "|---|---|---|")
    for name, command in _commands():
        shown: dict[bool, list[str]] = {True: [], False: []}
        for one in command.params:
            if one.param_type_name == "option" and one.opts[0] not in _COMMON:
                shown[is_further(one)].append(f"`{next(name for name in one.opts if name.startswith('--'))}`")
        yield f"| `{name}` | {' '.join(shown[False])} | {' '.join(shown[True])} |"


def _commands() -> Iterator[tuple[str, Any]]:
    for name, command in typer.main.get_command(cli).commands.items():  # type: ignore[attr-defined]
        parts = getattr(command, "commands", None)
        yield from {f"{name} {own}": part for own, part in parts.items()}.items() if parts else [(name, command)]


def names() -> Iterator[str]:
    """Write a row for each public name, with the first sentence of its docstring."""
    yield from ("| name | what it is or does |", "|---|---|")
    for topic, members in TOPICS.items():
        yield f"| **{topic}** | |"
        yield from (f"| `{name}` | {_first_sentence(getdoc(getattr(lora_init, name)) or '')} |" for name in members)


def _first_sentence(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split()).partition(". ")[0].rstrip(".").replace("|", "\\|") + "."


TABLES: dict[str, Callable[[], Iterator[str]]] = {one.__name__: one for one in (starts, commands, options, names)}


def fresh(text: str) -> str:
    """Write the tables of a page as the code has them."""
    return PLACE.sub(lambda place: place[1] + "\n".join(TABLES[place[2]]()) + "\n" + place[3], text)


if __name__ == "__main__":
    for file in DOCS.glob("*.md"):
        before = file.read_text(encoding="utf-8")
        if (after := fresh(before)) != before:
            file.write_text(after, encoding="utf-8")
