"""The commands `lora-init bank add`, `list` and `train`, and what `init --method from-bank` does."""

from __future__ import annotations

import re
import shlex
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from lora_init.adapters.init_config import DATA, Reading
from lora_init.cli.commands import command
from lora_init.cli.console import busy, importing, print_next, print_result, say
from lora_init.cli.help import GroupedCommand, ListedCommands
from lora_init.cli.options import BaseModel, MaxLength, TrainedAdapter, TrustRemoteCode
from lora_init.cli.tables import Cells, facts, finite
from lora_init.errors import LoraInitError
from lora_init.files import check_output
from lora_init.loading.examples import MAX_LENGTH
from lora_init.starts.starts import FROM_BANK, BankWay

if TYPE_CHECKING:
    from rich.console import Console

    from lora_init.adapters.init_config import InitConfig
    from lora_init.bank.start import BankStart
    from lora_init.bank.store import Bank
    from lora_init.building.pipeline import Examples
    from lora_init.loading.batches import Batches
    from lora_init.loading.models import LoadedModel
    from lora_init.statistics.statistics import Statistics

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    cls=ListedCommands,
    help="Keep trained adapters as starts for new tasks.",
    epilog="Options of a command: lora-init bank COMMAND --help.",
)

BankPath = Annotated[Path, Argument(help="Directory of the bank.", show_default=False)]


def add(
    bank: BankPath,
    adapter: TrainedAdapter,
    data: Annotated[str, Option(metavar=DATA, help="What it was trained on, as for init.", show_default=False)],
    statistics: Annotated[Path | None, Option(help="Statistics of this data, from init.")] = None,
    name: Annotated[str | None, Option(help="Name of the entry. Default: the directory's name.")] = None,
    task: Annotated[
        str | None, Option(help="What it was trained for; checkpoints of one training share it. Default: the name.")
    ] = None,
    model: BaseModel = None,
    encoder: Annotated[
        str | None, Option(help="Sentence encoder for prompts. Default: the base model's middle layer.")
    ] = None,
    *,
    reading: Reading,
    # As many as `MOST_PROMPTS`, in a module that imports torch.
    samples: Annotated[int, Option(min=2, help="Prompts to keep embeddings of.")] = 128,
    max_length: MaxLength = MAX_LENGTH,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Add the trained ADAPTER to BANK, with embeddings of the prompts that it was trained on."""
    with importing(model, data):
        from lora_init.bank.embeddings import embed
        from lora_init.bank.store import INDEX, Bank, add_entry, check_name, check_plain_lora, open_bank
        from lora_init.layers.identity import fingerprint
        from lora_init.loading.batches import load_batches
        from lora_init.loading.models import load_model
        from lora_init.serving.base import read_base, with_changed_copies
        from lora_init.serving.trained import read_trained
        from lora_init.statistics.statistics import Statistics
    # An entry is a file of this name, hence the few characters.
    name = name or re.sub(r"[^A-Za-z0-9_-]+", "-", adapter.expanduser().resolve().name).strip("-_")
    check_name(name)
    trained = read_trained(adapter)
    check_plain_lora(trained)
    # All that can be refused is refused before the base is loaded.
    encoder = encoder or ""  # the base model's middle layer
    if (bank.expanduser() / INDEX).is_file():
        existing = open_bank(bank)
        if name in existing.entries:
            raise LoraInitError(f"{bank} has an entry {name!r} already and replaces none. Pass another --name.")
        encoder = encoder or existing.encoder  # embeddings of one bank are compared, so one encoder makes them
    else:
        check_output(bank, "directory")
    source = model or trained.base
    if not source:
        raise LoraInitError(f"{adapter} does not name its base model. Name it with --model.")
    # Refuses another model, by the headers of its files.
    plain = read_base(source, trained, trust_remote_code=trust_remote_code)
    stats = None if statistics is None else Statistics.load(statistics)  # refuses another file
    # Before the base is loaded, so that a misspelt name is refused at once.
    embedder = read_encoder(encoder)
    with busy(f"loading {source}"):
        loaded = load_model(source, trust_remote_code=trust_remote_code)
    check_plain_lora(with_changed_copies(trained, plain))  # which compares with what is here by now
    batches = load_batches(
        data, loaded.tokenizer, **vars(reading), samples=samples, max_length=max_length, seq2seq=loaded.seq2seq
    )
    if stats is not None:
        _check_of_these(stats, batches)
    # Of the prompts alone: a new task may have no answers yet.
    with busy("embedding the prompts"):
        embeddings = embed(loaded.model, batches, loaded.tokenizer, embedder)
    model_name = f"{type(loaded.model).__name__} {Path(source).name}"
    # Without entries: `add_entry` reads those that are there, under a lock, and refuses another model or encoder.
    new = Bank(bank.expanduser(), fingerprint(loaded.model), model_name, encoder)
    read = batches.description
    grown = add_entry(new, name, trained, embeddings, task=task or name, data=read, statistics=statistics)
    entry = grown.entries[name]
    summary = {"bank": str(grown.path), "entry": name, **asdict(entry), "tasks": len(grown.tasks)}
    line = (
        f"{grown.path}: {name}, task {entry.task}, rank {entry.rank}, {entry.n_prompts} prompts. "
        f"In all {len(grown.entries)}, tasks: {len(grown.tasks)}."
    )
    print_result(summary, partial(_show, line, grown), written=True)


def list_(bank: BankPath) -> None:
    """List the adapters in BANK."""
    with importing():
        from lora_init.bank.store import GENERATOR, open_bank
    opened = open_bank(bank)
    entries = {name: asdict(entry) for name, entry in opened.entries.items()}
    generator = f"none: lora-init bank train {opened.path}"
    if (opened.path / GENERATOR).is_file():
        generator = "trained"
    head = {
        "bank": f"{opened.path}: {len(opened.entries)} adapters of {len(opened.tasks)} tasks",
        "base": opened.model,
        "prompts": f"embedded by {opened.encoder or 'the middle layer of the base'}",
        "generator": generator,
    }

    def show(console: Console, _: Any) -> None:
        rows = []
        for name, entry in opened.entries.items():
            rows.append(
                {
                    "entry": name,
                    "task": entry.task,
                    "rank": str(entry.rank),
                    "prompts": str(entry.n_prompts),
                    "statistics": "yes" if entry.statistics_sha256 else "-",
                    "data": entry.data.partition(":")[0],  # the name, before the numbers of its description
                }
            )
        console.print(facts(head), "", Cells(rows), markup=False)
        _show_next(console, opened)

    content = {"bank": str(opened.path), "model": opened.model, "encoder": opened.encoder, "entries": entries}
    print_result(content, show)


def train(
    bank: BankPath,
    # The least is the largest rank that all adapters of the bank have.
    rank: Annotated[int | None, Option(min=1, help="Rank to generate. Default: the least in the bank.")] = None,
    steps: Annotated[int | None, Option(min=1, help="Steps of training. Default: 1600.")] = None,
    seed: Annotated[int, Option(min=0, help="Seed of all that is random.")] = 0,
) -> None:
    """Train the generator of BANK: from prompts to the weights of an adapter."""
    with importing():
        from lora_init.bank.generator import STEPS, train_generator
        from lora_init.bank.store import open_bank
    steps = steps or STEPS
    every = max(1, steps // 8)  # about eight lines in all

    def report(step: int, loss: float) -> None:
        if step % every == 0:
            say(f"step {step} of {steps}: error {loss:.3f} of the variance of the weights")

    opened = open_bank(bank)
    generator = train_generator(opened, rank, steps, seed, report)
    path = generator.save(opened)
    parameters = sum(p.numel() for p in generator.decoder.parameters())
    summary = {"generator": str(path), "parameters": parameters, "explained": finite(generator.explained)}
    line = (
        f"{path}: {parameters:,} parameters. From prompts of its {len(opened.tasks)} tasks that it did not see it "
        # Below zero where the mean of the bank would have been closer; that is nothing, too.
        f"reproduces {max(0.0, generator.explained):.0%} of what distinguishes their adapters."
    )
    print_result(summary, partial(_show, line, opened), written=True)


# `partial` of these is what `print_result` calls; the values that it passes on are already in the line.
def _show(line: str, bank: Bank, console: Console, _: Any) -> None:
    console.print(line, markup=False)
    _show_next(console, bank)


def _show_next(console: Console, bank: Bank) -> None:
    how = f"--method {FROM_BANK} --bank {shlex.quote(str(bank.path))}"
    print_next(console, f"lora-init init MODEL DATA {how} -o started")


for _name, _function in (("add", add), ("list", list_), ("train", train)):
    app.command(_name, cls=GroupedCommand)(command(_function))


def read_encoder(name: str) -> LoadedModel | None:
    """Load the encoder of prompts; None for the base model itself."""
    from lora_init.loading.models import load_model

    if not name:
        return None
    with busy(f"loading {name}"):
        return load_model(name, task_type="FEATURE_EXTRACTION")


def _check_of_these(stats: Statistics, batches: Batches) -> None:
    """Refuse statistics of other rows than these, by what both know of them."""
    rows = "digest of the rows"
    of_file, here = stats.provenance.settings.get(rows), batches.settings.get(rows)
    if of_file and here and of_file != here:
        raise LoraInitError(
            f"{stats.path} is of other data ({stats.provenance.data}). Name what init made of this data."
        )


def start_from(
    bank: Bank, similarity: str, loaded: LoadedModel, examples: Examples, config: InitConfig, stored: Statistics | None
) -> BankStart:
    """Make an adapter of the nearest ones in a bank, by the loss if there are labels.

    Statistics of the data are compared with those in the bank if there are some.
    """
    from lora_init.bank.embeddings import embed
    from lora_init.bank.similarity import neighbours
    from lora_init.bank.start import start_from_bank
    from lora_init.collection.losses import mean_loss

    assert isinstance(config.start, BankWay)  # `init` has chosen it by --by, for mypy
    if stored is not None:
        _check_of_these(stored, examples.batches)
    with busy(f"starting from {bank.path}"):
        embeddings = embed(loaded.model, examples.batches, loaded.tokenizer, read_encoder(bank.encoder))
        order = neighbours(bank, embeddings, stored, similarity)
        # Without labels there is no loss to choose a size by, and the adapters are taken at their full size.
        loss_of = None
        if any("labels" in batch for batch in examples.held_out):
            loss_of = partial(mean_loss, batches=[*examples.held_out])
        return start_from_bank(
            bank, loaded.model, embeddings, loss_of, config.start.way, rank=config.ranks.rank, shape=config.shape,
            order=order,
        )  # fmt: skip
