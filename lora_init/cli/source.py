"""What `lora-init init` runs on: a model and data by their names, a file of statistics, a plan of ranks, a bank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from lora_init.adapters.adapter_init import AdapterInit
from lora_init.adapters.asked import Asked, PassOptions, Reading, Sample
from lora_init.adapters.peft_model import check_modules_to_save
from lora_init.bank.embeddings import embed
from lora_init.bank.similarity import neighbours
from lora_init.bank.start import BankStart, start_from_bank
from lora_init.bank.store import open_bank
from lora_init.building.pipeline import Examples, Source, check, fit_to, read, split
from lora_init.cli.bank import read_encoder
from lora_init.cli.commands import offered
from lora_init.cli.console import busy, given, refuse_idle, running, say
from lora_init.cli.options import Length, LoadingQuantized
from lora_init.collection.collect import OtherSettingsError, check_targets
from lora_init.collection.losses import mean_loss
from lora_init.errors import LoraInitError
from lora_init.files import check_writable
from lora_init.layers.identity import differing_config, dtype_of, fingerprint, model_config
from lora_init.layers.targets import HEADS, find_targets
from lora_init.loading.models import LoadedModel, ModelSource, find_device, open_model
from lora_init.planning.allocate import allocate_ranks
from lora_init.planning.plan import RankAllocation, load_plan
from lora_init.rates.training_length import TrainingLength
from lora_init.starts.starts import BankWay
from lora_init.statistics.statistics import SPARE, Statistics


@dataclass(frozen=True)
class Names:
    """What the command names: where things are, and where they go."""

    model: str
    data: str | None
    output: Path
    overwrite: bool
    file: Path | None  # of statistics
    ranks_from: Path | None  # a plan


class Named(Source):
    """A model and data by their names; statistics may be in a file already, ranks in a plan."""

    opened: ModelSource
    loaded: LoadedModel
    length: TrainingLength

    def __init__(self, names: Names, loading: LoadingQuantized, there: Statistics | None, length: Length) -> None:
        self.names, self.loading, self.there, self.said = names, loading, there, length
        self.plan: RankAllocation | None = None

    @property
    def of_classes(self) -> bool:
        """Whether there are statistics of classes, and no data."""
        made = self.there.provenance if self.there else None
        return self.names.data is None and made is not None and made.gradients and "classes" in made.settings

    def check(self, asked: Asked) -> Asked:
        """Refuse what can be refused before anything is read; find ranks and what the pass keeps for them."""
        start, names = asked.start, self.names
        if names.data is None and start.takes_step:
            raise LoraInitError(
                f"--method {start.name} finds the size of its step by the loss on examples, and DATA is missing."
            )
        check(asked, output=names.output, overwrite=names.overwrite)
        find_device(self.loading.device)
        ranks, of_file = asked.ranks, (self.there.provenance.rho if self.there else None) or SPARE
        self.rho = max(ranks.rho, of_file)
        if names.ranks_from is None:
            if self.there is not None and names.data is None:
                allocate_ranks(self.there, ranks.rank, ranks.rho)  # refuses more than was collected
            return asked
        if given(("rank", "rho")):
            raise LoraInitError("--ranks names a plan, which has all ranks. Leave --rank and --rho out.")
        plan = self.plan = load_plan(names.ranks_from)
        if self.there is not None:
            self.rho = of_file
            return asked.but(rank=self.there.provenance.rank)
        self.rho = max(1.0, max(plan.values()) / plan.rank)
        return asked.but(rank=plan.rank)

    def read(self, asked: Asked) -> tuple[Examples, Asked]:
        """Read what the model is, and the data, before the weights, which take longer."""
        with busy(f"reading {self.names.model} and the data"):
            opened = self.opened = self._open(asked)
            asked = asked.but(task_type=opened.task_type)
            if (empty := opened.empty()) is not None:
                check_targets(empty, find_targets(empty, **vars(asked.layers)), asked.ranks.rank)
                check_modules_to_save(empty, asked.shape.modules_to_save)
            if self.names.data is None:
                self.length = self.said.plan(self.there.provenance.settings.get("rows") if self.there else None)
                return Examples(None), asked
            found = read(self.names.data, opened.tokenizer, asked, seq2seq=opened.seq2seq, known=opened.classes)
            self.length = self.said.plan(found[0].settings.get("rows"))
            examples = split(*found, asked.measures)
            say(f"data: {examples.data}")
            return examples, asked

    def _open(self, asked: Asked) -> ModelSource:
        """Read what a model is, for classes if the data have them; refuse one that the start cannot be made for."""
        label, task_type = asked.sample.label, asked.layers.task_type
        if label is not None and task_type not in (None, "SEQ_CLS"):
            raise LoraInitError(f"--label makes this a classification, and --task-type {task_type} does not. Give one.")
        task_type = task_type if label is None else "SEQ_CLS"
        opened = open_model(self.names.model, task_type=task_type, trust_remote_code=self.loading.trust_remote_code)
        opened.check_quantized(self.loading.quantize, needed=asked.start.by_error)
        if asked.by_gradient and self.names.data is not None and opened.task_type in HEADS and label is None:
            head = opened.task_type
            other = "Name their column: --label COLUMN." if head == "SEQ_CLS" else "Use initialize() in Python."
            raise LoraInitError(f"gradients for the task type {head} need classes, not texts alone. {other}")
        return opened

    def load(self, examples: Examples, asked: Asked) -> tuple[nn.Module, Asked]:
        """Read the weights, and fit what was asked for to them."""
        classes, seed = examples.classes, asked.run.seed  # of a new head
        if self.names.data is None and self.there is not None:
            classes, seed = self.there.provenance.settings.get("classes", ()), self.there.provenance.seed
        self.loaded = self.loading.load(self.opened, seed=seed, n_labels=len(classes) or None)
        model: nn.Module = self.loaded.model
        if self.plan is not None:
            self.plan.check_model(fingerprint(model), f"{type(model).__name__} {self.names.model}")
        return model, fit_to(model, asked, examples.classes, self.loaded.drawn)

    def collect(self, model: nn.Module, examples: Examples, asked: Asked) -> tuple[Statistics, Asked]:
        """Use the statistics file, or go on with it, or make it."""
        file = self.names.file
        if self.there is not None and self.names.data is None:
            _check_made_for(self.there, model, asked)
            _say_used(self.there)
            return self.there, asked
        before = _written(file)
        asked = asked.but(statistics=file, progress=False if running.quiet else None)
        with _saying_what_is_kept(file):
            try:
                stats, asked = super().collect(model, examples, asked)
            except OtherSettingsError as error:
                if not self.names.overwrite:
                    raise LoraInitError(
                        f"{error.difference} Pass --overwrite to collect again, or leave DATA out to use the file as "
                        "it is."
                    ) from None
                stats, asked = super().collect(model, examples, asked.but(overwrite=True))
        if before is not None and before == _written(file):
            _say_used(stats)
        return stats, asked

    def allocate(self, stats: Statistics, asked: Asked) -> RankAllocation:
        """Take the plan, or share the ranks out."""
        self.stats, self.ranks = stats, self.plan or super().allocate(stats, asked)
        return self.ranks

    def build(
        self, model: nn.Module, stats: Statistics, ranks: RankAllocation, examples: Examples, asked: Asked
    ) -> AdapterInit:
        """Build the adapter."""
        with busy(f"computing the start {asked.start.name}"):
            return super().build(model, stats, ranks, examples, asked)


class OfBank(Named):
    """A model and data by their names; the adapter is made of those in a bank."""

    found: BankStart

    def __init__(
        self, names: Names, loading: LoadingQuantized, there: Statistics | None, length: Length, bank: Path,
        similarity: str,
    ) -> None:  # fmt: skip
        super().__init__(names, loading, there, length)
        self.bank, self.similarity = open_bank(bank), similarity

    def collect(self, model: nn.Module, examples: Examples, asked: Asked) -> tuple[Any, Asked]:
        """Collect nothing: statistics of the data are compared with those in the bank if there are some."""
        return self.there, asked

    def allocate(self, stats: Any, asked: Asked) -> Any:
        """Leave all layers the rank that was asked for."""

    def build(self, model: nn.Module, stats: Any, ranks: Any, examples: Examples, asked: Asked) -> AdapterInit:
        """Make the adapter of the nearest ones, by the loss if there are labels."""
        assert isinstance(asked.start, BankWay)
        with busy(f"starting from {self.bank.path}"):
            encoder = read_encoder(self.bank.encoder)
            embeddings = embed(model, examples.batches, self.loaded.tokenizer, encoder)
            order = neighbours(self.bank, embeddings, stats, self.similarity)
            labelled = any("labels" in batch for batch in examples.aside)
            loss_of = partial(mean_loss, batches=[*examples.aside]) if labelled else None
            self.found = start_from_bank(
                self.bank, model, embeddings, loss_of, asked.start.way, rank=asked.ranks.rank, shape=asked.shape,
                order=order,
            )  # fmt: skip
        return self.found.init


def find_statistics(names: Names, asked: Asked) -> Statistics | None:
    """Read the statistics file if it is there; refuse to go without data where it does not replace them."""
    if asked.sample.label is not None and asked.run.token_mask == "labels":
        raise LoraInitError(f"--label {asked.sample.label}: a class is no --token-mask labels. Leave it out.")
    file = names.file
    if names.data is not None:
        if file is not None:
            check_writable(file, overwrite=True, kind="statistics file")
    elif file is None:
        raise LoraInitError("DATA is missing. Name it, or name with --statistics a file that exists.")
    elif not file.exists():
        raise LoraInitError(f"--statistics {file}: no such file. Name one that exists, or DATA to make it from.")
    else:
        refuse_idle([*offered(Reading, Sample), *_OF_PASS], f"without DATA nothing is read; {file} is used as it is")
    return Statistics.load(file) if file is not None and file.exists() else None


_OF_PASS = [name for name in offered(PassOptions) if name != "seed"]


def _check_made_for(stats: Statistics, model: nn.Module, asked: Asked) -> None:
    made = stats.provenance
    if made.fingerprint != fingerprint(model):
        origin = f"{made.model_class} {made.model_id}".strip()
        raise LoraInitError(f"{stats.path} was made from another model ({origin}). Name the file of this one.")
    if odd := differing_config(made.settings, model_config(model)):
        raise LoraInitError(f"{stats.path} was made from this model with {odd}. Make it anew: name DATA.")
    if given(("dtype",)) and made.settings.get("dtype", dtype_of(model)) != dtype_of(model):
        raise LoraInitError(f"{stats.path} was made in {made.settings['dtype']}. Leave --dtype out, or name DATA.")
    found = find_targets(model, **vars(asked.layers))
    wanted, there = {*found.layers, *found.unsupported}, {*stats, *stats.unsupported}
    if wanted != there:
        raise LoraInitError(
            f"{stats.path} is not about the layers that --target-modules and --target-parameters select: "
            f"{len(wanted - there)} are missing, {len(there - wanted)} too many. Select those that it is about."
        )


def _written(file: Path | None) -> int | None:
    return file.stat().st_mtime_ns if file is not None and file.exists() else None


@contextmanager
def _saying_what_is_kept(file: Path | None) -> Iterator[None]:
    """Print what is kept of a pass that did not come to its end."""
    try:
        yield
    except (KeyboardInterrupt, Exception) as stop:
        found: Statistics | None = getattr(stop, "statistics", None)
        if file is not None and found is not None:
            n_batches = found.provenance.n_batches
            say(f"{file}: kept the statistics of {n_batches} batches. The same command goes on after them.")
        elif found is not None or isinstance(stop, KeyboardInterrupt):
            say("nothing was kept. --statistics FILE keeps what a pass has found, and goes on from there.")
        raise


def _say_used(stats: Statistics) -> None:
    made = stats.provenance
    until = "" if made.complete else ", of a pass that was interrupted"
    say(f"{stats.path}: used as it is ({made.data or 'data not described'}; {made.n_batches} batches{until})")
