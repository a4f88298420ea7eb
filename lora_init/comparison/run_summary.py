"""A comparison in sentences and tables, as data and on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from lora_init.comparison.findings import notes, start_names
from lora_init.comparison.paired import Outcome
from lora_init.comparison.run_log import Record
from lora_init.comparison.run_measures import RunTable
from lora_init.comparison.runs import Group, group_runs
from lora_init.comparison.tables import run_tables
from lora_init.comparison.verdicts import Verdict, verdicts
from lora_init.comparison.wording import count
from lora_init.errors import LoraInitError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@dataclass(frozen=True)
class Summary:
    """What a comparison found so far.

    Attributes:
        title: Task and model.
        headline: The verdicts in one sentence, and how many runs ended how.
        verdicts: One for each start other than random, in order.
        notes: What a reader must know beside them.
        tables: The numbers, as text.
        groups: The runs themselves, by start, rate and seed.
    """

    title: str
    headline: str
    verdicts: list[Verdict]
    notes: list[str]
    tables: list[RunTable]
    groups: list[Group]


def summarise(records: Iterable[Record], settings: Mapping[str, Any]) -> Summary:
    """Say what the runs show, whether they are all there or only some.

    Args:
        records: Lines of `runs.jsonl`. Of two for the same run the later counts.
        settings: Content of `settings.json`.

    Raises:
        LoraInitError: The records are of more than one task.
    """
    records = list(records)
    tasks = list(dict.fromkeys(str(record["task"]) for record in records))
    if len(tasks) > 1:
        raise LoraInitError(
            f"the runs are of {len(tasks)} tasks ({', '.join(tasks)}), and losses of different tasks can't be "
            "compared. Keep each task's runs in a directory of its own."
        )
    groups = group_runs(records, start_names(settings))
    task = tasks[0] if tasks else str(settings.get("task", ""))
    model = settings.get("model") or ""
    title = " · ".join(filter(None, ["Starts compared", task, str(model)]))
    judged = verdicts(groups)
    return Summary(title, _headline(judged, groups), judged, notes(groups, settings), run_tables(groups), groups)


def _headline(judged: Sequence[Verdict], groups: Sequence[Group]) -> str:
    outcomes = [verdict.outcome for verdict in judged]
    words = {
        "better": "better",
        "worse": "worse",
        "no difference shown": "with no difference shown",
        "no statement": "without a statement",
    }
    parts = [f"{outcomes.count(o)} {words[o]}" for o in get_args(Outcome) if o in outcomes]
    ended = [cell.status(seed) for group in groups for cell in group.cells.values() for seed in cell.runs]
    how = [f"{ended.count(status)} {status}" for status in ("finished", "unstable", "failed") if status in ended]
    runs = f"{count(len(ended), 'run')}{': ' if how else ''}{', '.join(how)}."
    return f"{len(judged)} compared with random: {', '.join(parts)}. {runs}" if judged else runs


def show_comparison(console: Console, summary: Summary) -> None:
    """Print verdicts, notes and tables."""
    console.print(summary.headline, style="bold", markup=False)
    console.print()
    for verdict in summary.verdicts:
        console.print(verdict.sentence, markup=False)
    console.print()
    for note in summary.notes:
        console.print(f"note: {note}", markup=False)
    for table in summary.tables:
        if table.name != "runs":
            console.print()
            console.print(table.title, style="bold", markup=False)
            console.print(_rich(table))


def _rich(table: RunTable) -> Table:
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, padding=(0, 1), pad_edge=False)
    made.add_column(Text(table.head[0]), overflow="fold")
    for name in table.head[1:]:
        made.add_column(Text(name), justify="right", overflow="fold")
    for row in table.rows:
        made.add_row(*map(Text, row))
    return made
