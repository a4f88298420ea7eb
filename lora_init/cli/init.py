"""The command `lora-init init`: from a model and data to an adapter directory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, TypeAlias

from typer import Argument, Option

from lora_init.adapters.init_config import Correction, InitConfig, Layers, PassOptions, Ranks, Reading, Sample, Shape
from lora_init.cli.bank import start_from
from lora_init.cli.commands import offered
from lora_init.cli.console import busy, importing, print_result, process_group, process_rank, refuse_idle
from lora_init.cli.options import Length, LoadingQuantized, ModelName, of_adapter
from lora_init.cli.summary import show_bank_summary, show_summary, summary_of, summary_of_bank
from lora_init.errors import LoraInitError, require
from lora_init.loading.sources import FILE_TYPES
from lora_init.on_demand import on_demand
from lora_init.starts.starts import BANK_WAY, BANK_WAYS, DEFAULT, DEFAULT_FOR_CLASSES, FROM_BANK, STARTS, buildable

if TYPE_CHECKING:
    Method: TypeAlias = str
    BankWay: TypeAlias = str
else:  # the registry decides what there is, starts of other packages among them
    Method, BankWay = Literal[(*buildable(), FROM_BANK)], Literal[tuple(BANK_WAYS)]


def _named(**facts: bool) -> str:
    """Return the names of the starts of this package that `init` makes and of which all these facts are true."""
    names = []
    for start in STARTS:
        # Starts without a function are PEFT's, a bank's and full training, which `init` does not make by name.
        if start.function and all(getattr(start, fact) == value for fact, value in facts.items()):
            names.append(start.name)
    return ", ".join(names)


@dataclass(frozen=True, kw_only=True)
class FromBank:
    """With from-bank: where the bank is, and how its adapters are used."""

    # All three are refused or idle without --method from-bank, see `_check_words`.
    title: ClassVar = "Starts from a bank"
    bank: Annotated[Path | None, dict(help="With from-bank: directory of lora-init bank.")] = None
    by: Annotated[BankWay, dict(help="With from-bank: how its adapters are used.")] = BANK_WAY
    similarity: Annotated[
        Literal["embeddings", "subspaces", "both"],
        dict(help="With from-bank: what is compared; subspaces takes the --statistics file of this data."),
    ] = "embeddings"


EXAMPLE = """\b
Examples:
$ lora-init init MODEL sums.jsonl --rank 16 -o adapter
$ lora-init init MODEL quiz.csv --template '{question}' \\
    --completion ' {answer}' -o adapter
$ lora-init init MODEL reviews.csv --template '{text}' \\
    --label stars -o adapter
"""


@process_group()
def init(
    model: ModelName,
    data: Annotated[
        str | None,
        Argument(
            help="File, pattern or folder of files, hub id, or - for JSON lines on standard input. Files are "
            f"{', '.join(FILE_TYPES)}, also with .gz; see --format. Not needed if the --statistics file exists.",
            show_default=False,
        ),
    ] = None,
    *,
    output: Annotated[Path, Option("--output", "-o", help="Adapter directory to write.", show_default=False)],
    ranks: Ranks,
    method: Annotated[
        Method | None,
        Option(
            metavar="START",
            help=f"How the adapter starts. Default: {DEFAULT}, with --label {DEFAULT_FOR_CLASSES}. There are "
            f"{', '.join(buildable())} and {FROM_BANK}. With backward passes: {_named(needs_gradient=True)}. "
            f"B is not zero with {_named(b_is_zero=False)} and {FROM_BANK}.",
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        of_adapter(help="What it says to train with, as lora-init compare found it. Default: the rate of the rule."),
    ] = None,
    length: Length,
    reading: Reading,
    sample: Sample,
    statistics: Annotated[
        Path | None, Option(help="File for the statistics; the same command continues it, later ones need no DATA.")
    ] = None,
    dry_run: Annotated[bool, Option(help="Say what it would do and cost; no weights are read.")] = False,
    overwrite: Annotated[
        bool, Option(rich_help_panel="Output", help="Replace the adapter, and statistics of other data or settings.")
    ] = False,
    layers: Layers,
    ranks_from: Annotated[
        Path | None,
        Option("--ranks", help="Plan of lora-init ranks, for --rank and --rho.", rich_help_panel="Layers and ranks"),
    ] = None,
    shape: Shape,
    correction: Correction,
    run: PassOptions,
    loading: LoadingQuantized,
    from_bank: FromBank,
) -> None:
    """Compute an adapter for MODEL from a sample of DATA and write it as a PEFT directory."""
    with importing(model, data):
        from lora_init.building import pipeline
        from lora_init.cli import source
        from lora_init.planning.allocate import allocate_ranks
    _check_words(method, data, from_bank, learning_rate, statistics)
    # Each step takes what it needs and returns what it made, with the options as far as they are known by then. What is
    # cheap comes first: words, then files, then the data, then the weights, then the pass.
    names = source.Names(model, data, output, overwrite, statistics.expanduser() if statistics else None, ranks_from)
    config = InitConfig(
        method, reading=reading, sample=sample, ranks=ranks, layers=layers, shape=shape, correction=correction, run=run
    )
    # Statistics that are there decide what is read at all: without DATA they are all that is known of it.
    stored = source.find_statistics(names, config)
    bank = None if from_bank.bank is None else on_demand("bank")(from_bank.bank)
    if bank is None:
        config = pipeline.choose(config, sample.label is not None or source.are_of_classes(names, stored))
    else:
        config = replace(config, start=BANK_WAYS[from_bank.by])
    config, plan, rho = source.check_named(names, config, stored, loading.device)  # rho x rank directions are kept
    opened, config = source.read_named(names, config, loading, stored, length)
    # What a dry run knows is all from before the weights.
    if dry_run:
        from lora_init.cli.dry_run import estimate, show_estimate

        print_result(estimate(opened, loading, config, rho), show_estimate)
        return
    loaded, config = source.load_named(names, opened, config, loading, stored, plan)
    directory = output.expanduser()  # as it was typed, for the next command
    if bank is not None:
        # The weights come from the bank's adapters, so there is no pass over the data and no plan.
        bank_start = start_from(bank, from_bank.similarity, loaded, opened.examples, config, stored)
        if not process_rank():  # the first process writes for all
            built = replace(bank_start.init, length=opened.length)
            built.save_pretrained(output, overwrite=overwrite, model=loaded.model)
            print_result(summary_of_bank(bank_start, directory), show_bank_summary, written=True)
        return
    stats, config = source.collect_named(names, loaded.model, opened.examples, config, stored, rho)
    # With DATA the ranks are known only now: they are made from what the pass has measured.
    planned = plan or allocate_ranks(stats, config.ranks.rank, config.ranks.rho)
    with busy(f"computing the start {config.start.name}"):
        built = pipeline.build(loaded.model, stats, planned, config, opened.examples.held_out)
    built = replace(built, learning_rate=learning_rate, length=opened.length)
    if not process_rank():
        built.save_pretrained(output, overwrite=overwrite, model=loaded.model)
        print_result(summary_of(names, stats, planned, directory, built), show_summary, written=True)


# What a start from a bank takes of the options about layers, adapter and pass.
_WITH_BANK = ("task_type", "lora_alpha", "gamma", "weights", "unchecked", "seed")


def _check_words(
    method: str | None, data: str | None, from_bank: FromBank, learning_rate: float | None,
    statistics: Path | None = None,
) -> None:  # fmt: skip
    """Refuse options that do not go together, or would have no effect."""
    # One without the other would be a start from nowhere, or a bank that nobody reads.
    if (method == FROM_BANK) != (from_bank.bank is not None) or (method == FROM_BANK and data is None):
        raise LoraInitError("--method from-bank and --bank go together, and need DATA: examples of the new task.")
    if from_bank.bank is None:
        refuse_idle(("by", "similarity"), "that is for --method from-bank")
    else:
        # A bank's start has its layers and ranks from the adapters that it is made of, and needs no pass.
        idle = ["rho", "ranks_from", "dry_run", "label", "learning_rate", *offered(Length)]
        idle += [name for name in offered(Layers, Shape, Correction, PassOptions) if name not in _WITH_BANK]
        refuse_idle(idle, "a bank's adapters decide that")
        if from_bank.similarity == "embeddings":
            refuse_idle(["statistics"], "--similarity embeddings compares prompts alone")
        elif statistics is None or not statistics.expanduser().is_file():
            raise LoraInitError(
                f"--similarity {from_bank.similarity} compares statistics. Name with --statistics a file that init "
                "made of this data."
            )
        if from_bank.by == "mixture":
            require("scipy")
    if learning_rate is not None:
        refuse_idle(offered(Length), "only the rule's rate depends on it, and --learning-rate names another")
    # NaN, which typer reads as a float, is refused by the comparison, too.
    if learning_rate is not None and not 0.0 < learning_rate < 1.0:
        raise LoraInitError(f"--learning-rate {learning_rate:g}: expected a number between 0 and 1, such as 2e-4.")
