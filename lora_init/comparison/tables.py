"""The tables of a comparison as text, for terminal, Markdown and HTML alike: differences, rates, regret, metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from lora_init.comparison.findings import (
    Outcome,
    Verdict,
    count,
    final_losses,
    notes,
    number,
    paired_difference,
    rate_text,
    seed_list,
    signed,
    start_names,
    verdicts,
)
from lora_init.comparison.runs import (
    RANDOM,
    Group,
    Record,
    Variant,
    best_of_all,
    final_loss,
    group_runs,
    mean_at,
    parameters,
    random_group,
    table_seeds,
)
from lora_init.errors import LoraInitError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

METRICS = {"accuracy": "accuracy", "macro_f1": "macro F1", "mcc": "MCC"}


@dataclass(frozen=True)
class RunTable:
    """A table as text.

    Attributes:
        name: Short, for code that picks one.
        title: What it shows.
        caption: How to read it.
        head: Names of the columns.
        rows: Cells; the first of a row names it.
    """

    name: str
    title: str
    caption: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def metric_values(group: Group | None, metric: str) -> dict[int, float]:
    """Give a metric at the end of a variant's runs at its best rate, by seed; seeds without it are left out."""
    runs = group.best_runs if group else {}
    return {seed: float(v) for seed, run in runs.items() if (v := (run.get("metrics") or {}).get(metric)) is not None}


def all_rates(groups: Iterable[Group]) -> list[float]:
    """List every learning rate that was tried, rising."""
    return sorted({rate for group in groups for rate in group.cells})


def random_target(groups: Sequence[Group]) -> float | None:
    """Give the lowest final validation loss of any finished run of random at a rate that counts; None without one."""
    random = random_group(groups)
    cells = random.cells.values() if random else ()
    return min((final_loss(run) for cell in cells if cell.counts for run in cell.finished.values()), default=None)


def steps_until(run: Record, target: float) -> int | None:
    """Find the first evaluation point at which a run's validation loss is no higher than the target; None if never."""
    points = zip(run["evaluation_points"], run["validation_loss"], strict=False)
    return next((int(step) for step, loss in points if loss is not None and loss <= target), None)


def average(values: Iterable[float | None]) -> float | None:
    """Average what is known; None if nothing is."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def retained(run: Record) -> tuple[float, float] | None:
    """Give the loss on retained text before and after a run; None if it was not measured."""
    losses = run.get("retain_loss") or [None]
    return None if None in losses else (float(losses[0]), float(losses[1]))


def scale_table(groups: Sequence[Group]) -> RunTable:
    """Set each start beside itself with matched scale and with equal parameters; no rows if it was not run so."""
    by_variant = {group.variant: group for group in groups}
    random = random_group(groups)
    rows = []
    more = any(variant.matched_scale or variant.equal_parameters for variant in by_variant)
    for start in dict.fromkeys(variant.start for variant in by_variant):
        for equal in (False, True):
            for matched in (False, True):
                variant = Variant(start, matched, equal)
                if variant in by_variant:
                    rows.append(_scale_row(by_variant[variant], random))
    return RunTable(
        "scale",
        "Scale and size of the adapters",
        "Each start as it is, with the rows of A scaled to the random start's norm, and with as many parameters. If a "
        "difference goes away with the scale, the scale was what made it.",
        ("start", "scale of A", "parameters", "final loss", "difference to random"),
        rows if more else [],
    )


def _scale_row(group: Group, random: Group | None) -> tuple[str, ...]:
    pairs = paired_difference(final_losses(group), final_losses(random))
    return (
        group.label,
        number(average(run.get("a_scale") for run in group.best_runs.values())),
        _whole(parameters(group)),
        number(average(final_losses(group).values())),
        "–" if group.variant == RANDOM else signed(pairs.mean),
    )


def _whole(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def cost_table(groups: Sequence[Group]) -> RunTable:
    """Say what each start costs: parameters, time, memory."""

    def mean(group: Group, key: str, write: Callable[[float | None], str]) -> str:
        return write(average(run.get(key) for run in group.best_runs.values()))

    def tenth(value: float | None) -> str:
        return "–" if value is None else f"{value:,.1f}"

    def megabytes(value: float | None) -> str:
        return "–" if value is None else f"{value / 1e6:,.0f}"

    rows = [
        (
            group.label,
            _whole(parameters(group)),
            mean(group, "a_scale", number),
            mean(group, "gradient_norm", number),
            mean(group, "initialisation_seconds", tenth),
            mean(group, "initialisation_passes", _whole),
            mean(group, "training_seconds", tenth),
            mean(group, "peak_memory_bytes", megabytes),
        )
        for group in groups
        if group.best is not None
    ]
    return RunTable(
        "cost",
        "Cost",
        "Means of the runs at each start's best rate. Scale of A: root mean square of the norms of its rows. First "
        "gradient: its norm in the first step. Passes: forward passes over batches of data before training.",
        ("start", "parameters", "scale of A", "first gradient", "start, s", "passes", "training, s", "peak, MB"),
        rows,
    )


def forgetting_table(groups: Sequence[Group]) -> RunTable:
    """Say what each start did to the loss on other text, and to the weights' singular vectors."""
    rows = []
    for group in groups:
        runs = group.best_runs.values()
        kept = [losses for run in runs if (losses := retained(run))]
        intruders = [run["intruders"] for run in runs if run.get("intruders")]
        if kept or intruders:
            number_of = average(i["count"] for i in intruders)
            rows.append(
                (
                    group.label,
                    number(average(before for before, _ in kept)),
                    number(average(after for _, after in kept)),
                    signed(average(after - before for before, after in kept)),
                    "–" if number_of is None else f"{number_of:,.1f} of {intruders[0]['of']:,}",
                    "–" if number_of is None else f"{average(i['energy_share'] for i in intruders):.1%}",
                )
            )
    return RunTable(
        "forgetting",
        "Forgetting, and intruder dimensions",
        "Means of the runs at each start's best rate. Retained: loss on text of another kind. Intruders: of the first "
        "ten left singular vectors of each trained weight, those with no cosine of 0.5 to one of the untrained.",
        ("start", "retained before", "retained after", "change", "intruders", "share of energy"),
        rows,
    )


def every_run(groups: Sequence[Group]) -> RunTable:
    """List every run with its numbers."""
    rows = []
    for group in groups:
        for rate, cell in group.cells.items():
            rows += [_run_row(group, rate, seed, run, cell.status(seed)) for seed, run in cell.runs.items()]
    return RunTable(
        "runs",
        "Every run",
        "Validation loss at each evaluation point, the first before training.",
        ("start", "rate", "seed", "status", "final loss", "validation loss", "metrics", "retained", "training, s"),
        rows,
    )


def _run_row(group: Group, rate: float, seed: int, run: Record, status: str) -> tuple[str, ...]:
    losses = run.get("validation_loss") or []
    metrics: Mapping[str, Any] = run.get("metrics") or {}
    return (
        group.label,
        rate_text(rate),
        str(seed),
        status,
        number(final_loss(run)) if status == "finished" else "–",
        " ".join(number(loss) for loss in losses) or "–",
        ", ".join(f"{METRICS.get(k, k)} {number(v)}" for k, v in metrics.items()) or "–",
        " to ".join(number(loss) for loss in run.get("retain_loss") or []) or "–",
        "–" if run.get("training_seconds") is None else f"{run['training_seconds']:.1f}",
    )


# A smaller relative change of the loss is rounding: of base weights in bfloat16 that gave up what B A adds, say.
_CHANGED = 0.005


def run_tables(groups: Sequence[Group]) -> list[RunTable]:
    """Make all tables that there is something to put in."""
    tables = [
        _differences(groups),
        _rates(groups),
        _regret(groups),
        _best(groups),
        _before_training(groups),
        _metrics(groups),
        scale_table(groups),
        cost_table(groups),
        forgetting_table(groups),
        every_run(groups),
    ]
    return [table for table in tables if table.rows]


def _differences(groups: Sequence[Group]) -> RunTable:
    rows = [
        (v.label, signed(v.pairs.mean), _interval(v.pairs.low, v.pairs.high), str(v.pairs.n), v.outcome)
        for v in verdicts(groups)
    ]
    return RunTable(
        "differences",
        "Difference to random",
        "Final validation loss, start minus random, paired by seed, each at its own best rate. The interval is that "
        "of the paired t-test; below zero is better.",
        ("start", "mean difference", "95 % interval", "pairs", "verdict"),
        rows,
    )


def _interval(low: float | None, high: float | None) -> str:
    return "–" if low is None else f"{signed(low)} to {signed(high)}"


def _metrics(groups: Sequence[Group]) -> RunTable:
    random = random_group(groups)
    known = [metric for metric in METRICS if any(metric_values(group, metric) for group in groups)]
    rows = []
    for group in groups if known else ():
        cells = []
        for metric in known:
            values = metric_values(group, metric)
            pairs = paired_difference(values, metric_values(random, metric))
            mean = average(values.values())
            interval = "–"
            if group.variant != RANDOM and pairs.low is not None:
                interval = f"{pairs.low:+.3f} to {pairs.high:+.3f}".replace("-", "−")
            cells += ["–" if mean is None else f"{mean:.3f}", interval]
        rows.append((group.label, *cells))
    return RunTable(
        "metrics",
        "Metrics",
        "At the end of the runs at each start's best rate: the mean, and the 95 % interval of the difference to "
        "random, paired by seed; above zero is better. The verdicts rest on the loss alone.",
        ("start", *(head for metric in known for head in (METRICS[metric], "start − random"))),
        rows,
    )


def _rates(groups: Sequence[Group]) -> RunTable:
    seeds, rates = table_seeds(groups), all_rates(groups)
    rows = [(group.label, *(_rate_cell(group, rate, seeds) for rate in rates)) for group in groups]
    return RunTable(
        "learning_rates",
        "Final validation loss by learning rate",
        f"{_over(groups)} A star marks the rate at which a start is compared.",
        ("start", *map(rate_text, rates)),
        rows,
    )


def _over(groups: Sequence[Group]) -> str:
    if all(group.best is None for group in groups):
        return "No rate has a finished run and no unstable one."
    if seeds := table_seeds(groups):
        return f"Mean over {seed_list(seeds)}, which every start and rate has."
    return "No seed was run with every start and rate, so each cell averages the seeds it has."


def _rate_cell(group: Group, rate: float, seeds: set[int]) -> str:
    if rate not in group.cells:
        return "–"
    cell = group.cells[rate]
    if cell.unstable:
        ran = len(cell.unstable) + len(cell.finished)
        return f"unstable, {len(cell.unstable)} of {ran}"
    if not cell.finished:
        return "failed"
    return number(cell.mean(seeds or None)) + "*" * (rate == group.best)


def _regret(groups: Sequence[Group]) -> RunTable:
    seeds, rates = table_seeds(groups), all_rates(groups)
    best = best_of_all(groups, seeds)
    rows = [(group.label, *(_regret_cell(group, rate, seeds, best) for rate in rates)) for group in groups]
    return RunTable(
        "regret",
        "Regret by learning rate",
        f"Final validation loss above the best of all starts and rates, {number(best)}: what is lost by staying at a "
        f"rate untuned. {_over(groups)}",
        ("start", *map(rate_text, rates)),
        rows if not math.isnan(best) else [],
    )


def _regret_cell(group: Group, rate: float, seeds: set[int], best: float) -> str:
    loss = mean_at(group, rate, seeds)
    if loss is not None:
        return number(loss - best)
    return "unstable" if rate in group.cells and group.cells[rate].unstable else "–"


def _best(groups: Sequence[Group]) -> RunTable:
    target = random_target(groups)
    rows = []
    for group in groups:
        losses = list(final_losses(group).values())
        if group.best is not None:
            ends = f"{number(min(losses))} to {number(max(losses))}"
            mean = number(average(losses))
            rows.append((group.label, rate_text(group.best), str(len(losses)), mean, ends, _steps_cell(group, target)))
    known = "" if target is None else f", {number(target)}"
    return RunTable(
        "best",
        "Each start at its best rate",
        "Final validation loss over the seeds that finished. Steps: seed by seed, the first evaluation at which the "
        f"final loss of the best random run{known}, is reached.",
        ("start", "rate", "runs", "mean loss", "lowest to highest", "steps to random's best"),
        rows,
    )


def _before_training(groups: Sequence[Group]) -> RunTable:
    rows = []
    plain = _first_losses(random_group(groups))
    for group in groups:
        own = _first_losses(group)
        seeds = own.keys() & plain.keys()
        if any(abs(own[seed] - plain[seed]) > _CHANGED * plain[seed] for seed in seeds):
            gammas = sorted({run["gamma"] for run in group.best_runs.values() if run.get("gamma")})
            means = [number(average(losses[seed] for seed in seeds)) for losses in (plain, own)]
            rows.append((group.label, *means, ", ".join(f"{gamma:g}" for gamma in gammas) or "–"))
    return RunTable(
        "before",
        "Before training",
        "Starts that change the model's output: validation loss of the plain model and at step 0, and the gamma that "
        "was found on training batches set aside.",
        ("start", "plain model", "step 0", "gamma"),
        rows,
    )


def _first_losses(group: Group | None) -> dict[int, float]:
    runs = {} if group is None else group.best_runs
    return {seed: run["validation_loss"][0] for seed, run in runs.items() if run["validation_loss"]}


def _steps_cell(group: Group, target: float | None) -> str:
    if target is None:
        return "–"
    steps = [steps_until(run, target) for run in group.best_runs.values()]
    if not any(step is not None for step in steps):
        return "not reached"
    return ", ".join("never" if step is None else str(step) for step in steps)


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
