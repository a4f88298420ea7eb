"""The command `lora-init init`: from a model and data to an adapter directory."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lora_init.cli.console import (
    AsJson,
    TrustRemoteCode,
    make_console,
    one_line_errors,
    print_json,
    process_group,
    quiet_transformers,
    read_modules,
    read_names,
    say,
    unescape,
)
from lora_init.cli.tables import facts, finite, rank_table
from lora_init.errors import LoraInitError

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from lora_init.adapters.adapter_init import AdapterInit
    from lora_init.loading.batches import Batches
    from lora_init.loading.models import LoadedModel, ModelSource
    from lora_init.planning.plan import RankAllocation
    from lora_init.statistics.statistics import Statistics

RANK, RHO = 16, 2.0

# Printed by a real run on 2 cores. The backspace keeps the lines as they are.
EXAMPLE = """\b
Example:
$ lora-init init sentence-transformers/all-MiniLM-L6-v2 data/boolq.jsonl --template '{passage}' -o adapter
                           0  1  2  3  4  5
query                     14 19 17 16 15 14
key                       14 19 17 16 15 14
value                     14 19 17 16 15 14
attention.output.dense    24 17 17 17 16 21
intermediate.dense        18 18 16 14 11  8
output.dense              18 14 14 13 10 12
pooler.dense           29

\b
layers      37 with rank 8 to 29, 0 without an adapter
parameters  645,888, -4.4% against rank 16 everywhere
data        data/boolq.jsonl: 256 of 15942 examples, seed 0, at most 512 tokens, template
            '{passage}'
pass        31,932 rows in 64 batches, stopped: max_batches
held out    32 components capture 49.0% of the variance of unseen rows (median), 29.1% at
            least (pooler.dense)
time        forward 9.1 s, decomposition 1.4 s, data 0.0 s
adapter     /home/user/adapter
"""


def init(
    model: Annotated[str, typer.Argument(help="Model directory or hub id.", show_default=False)],
    data: Annotated[
        str | None,
        typer.Argument(
            help="JSON, JSONL, CSV, TSV, Parquet or text file, also with .gz, a pattern in quotes or a folder of them, "
            "a hub id, or - for JSON lines on standard input, with columns text, or prompt and completion, or "
            "messages; for others see --template. Not needed with a --statistics file that exists.",
            show_default=False,
        ),
    ] = None,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Adapter directory to write.", show_default=False)],
    rank: Annotated[int | None, typer.Option(min=1, help="Average rank of a layer.", show_default=str(RANK))] = None,
    rho: Annotated[
        float | None,
        typer.Option(min=1.0, help="At most rho x rank in one layer. 1 is the same everywhere.", show_default=str(RHO)),
    ] = None,
    ranks_from: Annotated[
        Path | None, typer.Option("--ranks", help="Plan from lora-init ranks, in place of --rank and --rho.")
    ] = None,
    target_modules: Annotated[
        str, typer.Option(help='"all-linear", names separated by commas, or a regular expression for full names.')
    ] = "all-linear",
    exclude_modules: Annotated[
        str | None, typer.Option(help="Names separated by commas, or a regular expression, to leave out.")
    ] = None,
    target_parameters: Annotated[
        str | None, typer.Option(help="Names of fused parameters of experts, separated by commas.")
    ] = None,
    statistics: Annotated[
        Path | None,
        typer.Option(
            help="Statistics file. Written every minute and at the end, also after Ctrl-C; the same command again uses "
            "it, or goes on after the batches that it has. Without DATA it is used as it is."
        ),
    ] = None,
    method: Annotated[
        Literal[
            "eva",
            "random",
            "random-scaled",
            "gaussian",
            "orthogonal",
            "eva-grad",
            "grad-a",
            "natural-gradient",
            "natural-gradient-scaled",
            "natural-gradient-step",
            "lora-ga",
            "lora-one",
        ],
        typer.Option(
            help="How A starts; B is zero. From eva-grad on it takes backward passes and labels; the last three start "
            "with B other than zero."
        ),
    ] = "eva",
    gamma: Annotated[
        float | None,
        typer.Option(
            help="With the last three methods: a larger one is a smaller step. Default: lora-ga 16; for the others the "
            "one with the lowest loss on four batches that the statistics do not use."
        ),
    ] = None,
    gradients: Annotated[
        bool,
        typer.Option("--gradients", help="Run backward passes, too, for a later method or policy that needs them."),
    ] = False,
    whiten: Annotated[bool, typer.Option("--whiten", help="With eva: scale each row by its variance.")] = False,
    lora_alpha: Annotated[float, typer.Option(help="The adapter is scaled by lora_alpha / rank.")] = 16,
    use_rslora: Annotated[bool, typer.Option("--use-rslora", help="Scale by lora_alpha / sqrt(rank).")] = False,
    use_dora: Annotated[bool, typer.Option("--use-dora", help="Add DoRA's magnitudes.")] = False,
    freeze_a: Annotated[
        bool, typer.Option("--freeze-a", help="Train B alone. The adapter's README.md says how to tell the trainer.")
    ] = False,
    modules_to_save: Annotated[
        str | None, typer.Option(help="Names of modules to train whole, separated by commas, such as lm_head.")
    ] = None,
    task_type: Annotated[
        str | None, typer.Option(help="PEFT's task type, such as SEQ_CLS. Default: what the checkpoint is for.")
    ] = None,
    template: Annotated[
        str | None, typer.Option(help='Text of an example, as in "{passage}\\nQuestion: {question}?".')
    ] = None,
    completion: Annotated[
        str | None, typer.Option(help="What the model should answer, as a template; --template is then the prompt.")
    ] = None,
    subset: Annotated[str | None, typer.Option(help="Configuration of a hub data set.")] = None,
    split: Annotated[str, typer.Option(help="Split of a hub data set or a folder.")] = "train",
    samples: Annotated[int, typer.Option(min=1, help="Examples to draw at random.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples in a batch.")] = 4,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of an example at most.")] = 512,
    max_batches: Annotated[int, typer.Option(min=1, help="Batches at most; fewer if nothing changes any more.")] = 64,
    token_mask: Annotated[
        Literal["attention", "labels"], typer.Option(help="Count all tokens but padding, or only those with a label.")
    ] = "attention",
    center: Annotated[bool, typer.Option(help="Subtract the mean: PCA. Without: the second moment.")] = True,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sample and of all else that is random.")] = 0,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Type of the weights.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="Where the model runs: auto, cpu, cuda, cuda:1, mps.")] = "auto",
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace the adapter directory, and statistics of other data or settings."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compute an adapter for MODEL from a sample of DATA and write it as a PEFT directory."""
    with one_line_errors(), process_group() as processes:
        budget = _budget(ranks_from, rank, rho)
        with make_console(stderr=True).status("importing torch and transformers"):
            from lora_init.adapters.initializers import GRADIENT_METHODS
            from lora_init.loading.models import find_device, open_model
            from lora_init.planning.allocate import allocate_ranks

            quiet_transformers()
        needs_gradients = gradients or method in GRADIENT_METHODS
        adapter = AdapterOptions(
            method, gamma, whiten, lora_alpha, use_rslora, use_dora, freeze_a, read_names(modules_to_save or ""), seed
        )
        adapter.check(output, overwrite)
        file = StatisticsFile.named(statistics, overwrite)
        examples = DataOptions(
            data, unescape(template), unescape(completion), subset, split, samples, batch_size, max_length, seed,
            needs_labels=needs_gradients or token_mask == "labels",
        )  # fmt: skip
        examples.check(file, adapter)
        find_device(device)
        with make_console(stderr=True).status(f"loading {model}"):
            source = open_model(model, task_type=task_type, trust_remote_code=trust_remote_code)
            batches = examples.read(source) if data is not None else None  # before the weights, which take longer
            aside = examples.read_aside(source, batches) if batches is not None and adapter.takes_step else []
            loaded = source.load(dtype=dtype, device=device, seed=seed)
        selection: dict[str, Any] = {
            "target_modules": read_modules(target_modules),
            "exclude_modules": read_modules(exclude_modules) if exclude_modules else None,
            "target_parameters": read_names(target_parameters) if target_parameters else None,
            "task_type": loaded.task_type,
        }
        _check_model(loaded, selection, adapter, budget, model)
        if batches is None:
            stats = file.as_it_is(loaded.model, selection, needs_gradients)
        else:
            settings = {**selection, "center": center, "token_mask": token_mask, "gradients": needs_gradients}
            settings |= {**file.sizes(budget), "max_batches": max_batches, "seed": seed}
            stats = file.collect(loaded.model, batches, settings)
        if processes.rank:
            return
        ranks = budget.plan or allocate_ranks(stats, rank=budget.rank, rho=budget.rho)
        built = adapter.build(loaded.model, stats, ranks, aside)
        directory = built.save_pretrained(output, overwrite=overwrite, model=loaded.model)
        summary = summarise(stats, ranks, directory, file.path, built)
        if as_json:
            print_json(summary)
        else:
            show_summary(make_console(), summary)


def _check_model(
    loaded: LoadedModel, selection: Mapping[str, Any], adapter: AdapterOptions, budget: Budget, name: str
) -> None:
    """Refuse before the pass what the model cannot take."""
    from lora_init.adapters.peft_model import check_modules_to_save
    from lora_init.collection.collect import fingerprint
    from lora_init.layers.targets import find_targets

    check_modules_to_save(loaded.model, adapter.modules_to_save)
    find_targets(loaded.model, **selection).check_layers()
    if budget.plan is not None:
        budget.plan.check_model(fingerprint(loaded.model), f"{type(loaded.model).__name__} {name}")


@dataclass(frozen=True)
class Budget:
    """What ranks may cost: an average and a bound on one layer, or a plan that was made before."""

    rank: int
    rho: float
    plan: RankAllocation | None


def _budget(ranks_from: Path | None, rank: int | None, rho: float | None) -> Budget:
    if ranks_from is None:
        return Budget(RANK if rank is None else rank, RHO if rho is None else rho, None)
    if rank is not None or rho is not None:
        raise LoraInitError("--ranks names a plan, which has all ranks. Leave --rank and --rho out.")
    from lora_init.planning.plan import load_plan

    plan = load_plan(ranks_from)
    return Budget(plan.rank, max(1.0, max(plan.values()) / plan.rank), plan)


@dataclass(frozen=True)
class DataOptions:
    """Which examples of which data, and how they are read; see `load_batches`."""

    source: str | None
    template: str | None
    completion: str | None
    subset: str | None
    split: str
    samples: int
    batch_size: int
    max_length: int
    seed: int
    needs_labels: bool

    def check(self, file: StatisticsFile, adapter: AdapterOptions) -> None:
        """Refuse to go without data where data is needed."""
        if self.source is not None:
            return
        if file.path is None or not file.path.exists():
            raise LoraInitError("DATA is missing. Name it, or name with --statistics a file that exists.")
        if adapter.takes_step:
            raise LoraInitError(
                f"--method {adapter.method} finds the size of its step by the loss on examples, and DATA is missing."
            )

    def read(self, model: ModelSource, **changes: Any) -> Batches:
        """Read the batches."""
        from lora_init.loading.batches import load_batches

        options = {name: value for name, value in vars(self).items() if name != "source"} | changes
        return load_batches(self.source or "", model.tokenizer, seq2seq=model.seq2seq, **options)

    def read_aside(self, model: ModelSource, batches: Batches) -> list[Any]:
        """Read four batches of the examples that come after the sample; of the sample itself if there are no more."""
        from lora_init.adapters.step_size import N_ASIDE

        try:
            return self.read(model, offset=self.samples, samples=N_ASIDE * self.batch_size)
        except LoraInitError:
            say("warning: the data has no examples beyond the sample, so the size of the step is found on its own.")
            return batches[:N_ASIDE]


@dataclass(frozen=True)
class AdapterOptions:
    """What `build_adapter` takes beside statistics and ranks."""

    method: str
    gamma: float | None
    whiten: bool
    lora_alpha: float
    use_rslora: bool
    use_dora: bool
    freeze_a: bool
    modules_to_save: list[str]
    seed: int

    @property
    def takes_step(self) -> bool:
        """Whether the method changes what the model returns, by a step whose size is found on batches set aside."""
        from lora_init.adapters.initializers import changes_output

        return changes_output(self.method)

    def check(self, output: Path, overwrite: bool) -> None:
        """Refuse what is impossible before anything is read."""
        from lora_init.adapters.build import check_adapter_options

        if output.expanduser().is_file():
            raise LoraInitError(f"--output {output} is a file. Name a directory.")
        free = ("use_rslora", "freeze_a", "seed")
        options = {name: value for name, value in vars(self).items() if name not in free}
        check_adapter_options(**options, output=output, overwrite=overwrite)

    def build(self, model: nn.Module, stats: Statistics, ranks: RankAllocation, aside: list[Any]) -> AdapterInit:
        """Build the adapter; where the method takes a step, of the size with the least loss on batches set aside."""
        from lora_init.adapters.build import build_adapter
        from lora_init.adapters.step_size import find_step_size, mean_loss

        if not self.takes_step:
            return build_adapter(stats, ranks, **vars(self))
        return find_step_size(
            model,
            lambda gamma: build_adapter(stats, ranks, **vars(self) | {"gamma": gamma}),
            lambda changed: mean_loss(changed, aside),
            self.gamma,
        )


@dataclass(frozen=True)
class StatisticsFile:
    """Where the statistics are kept between commands; nowhere if there is no path."""

    path: Path | None
    overwrite: bool

    @classmethod
    def named(cls, path: Path | None, overwrite: bool) -> StatisticsFile:
        """Check that the file has a place, before anything is read."""
        if path is None:
            return cls(None, overwrite)
        path = path.expanduser()
        if not path.parent.is_dir():
            raise LoraInitError(f"--statistics {path}: the directory {path.parent} doesn't exist. Create it first.")
        return cls(path, overwrite)

    def as_it_is(self, model: nn.Module, selection: Mapping[str, Any], needs_gradients: bool) -> Statistics:
        """Load the file; refuse it if it is of another model or other layers."""
        from lora_init.collection.collect import fingerprint
        from lora_init.layers.targets import find_targets
        from lora_init.statistics.statistics import Statistics

        assert self.path is not None  # checked with the data
        stats = Statistics.load(self.path)
        made = stats.provenance
        if made.fingerprint != fingerprint(model):
            raise LoraInitError(f"{self.path} was made from another model ({made.model}). Name the file of this one.")
        found = find_targets(model, **selection)
        wanted, there = {*found.layers, *found.unsupported}, {*stats, *stats.unsupported}
        if wanted != there:
            raise LoraInitError(
                f"{self.path} is not about the layers that --target-modules and --target-parameters select: "
                f"{len(wanted - there)} are missing, {len(there - wanted)} too many. Select those that it is about."
            )
        if needs_gradients and not made.gradients:
            raise LoraInitError(
                f"{self.path} was made without --gradients, which this needs. Name DATA and --overwrite."
            )
        self._say_used(stats)
        return stats

    def sizes(self, budget: Budget) -> dict[str, Any]:
        """Give rank and rho of the pass: with a plan those of the file that the plan was made from."""
        from lora_init.statistics.statistics import Statistics

        if budget.plan is None or self.path is None or not self.path.exists():
            return {"rank": budget.rank, "rho": budget.rho}
        made = Statistics.load(self.path).provenance
        return {"rank": made.rank, "rho": made.settings.get("rho", budget.rho)}

    def collect(self, model: nn.Module, batches: Batches, settings: Mapping[str, Any]) -> Statistics:
        """Make the pass, or what is left of it, or nothing of it if the file has all."""
        from lora_init.collection.collect import Interrupted, OtherSettingsError, collect

        there = self.path is not None and self.path.exists()
        run = functools.partial(collect, model, batches, data=batches.description, statistics=self.path, **settings)
        started = time.time()
        try:
            stats = run()
        except OtherSettingsError as error:
            if not self.overwrite:
                raise LoraInitError(
                    f"{error.difference} Pass --overwrite to collect again, or leave DATA out to use the file as it is."
                ) from None
            stats = run(overwrite=True)
        except Interrupted as stop:
            if self.path is not None and stop.statistics is not None:
                say(
                    f"{self.path}: kept the statistics of {stop.statistics.provenance.n_batches} batches. "
                    "The same command goes on after them."
                )
            raise
        if there and self.path is not None and self.path.exists() and self.path.stat().st_mtime < started:
            self._say_used(stats)
        return stats

    def _say_used(self, stats: Statistics) -> None:
        made = stats.provenance
        until = "" if made.complete else ", of a pass that was interrupted"
        say(f"{self.path}: used as it is ({made.data or 'data not described'}; {made.n_batches} batches{until})")


_SHOWN_NOTES = 5


def summarise(
    stats: Statistics, ranks: RankAllocation, directory: Path, file: Path | None, built: AdapterInit
) -> dict[str, Any]:
    """Put what `lora-init init` did into plain values."""
    made = stats.provenance
    held_out = {leader: share for leader, share in stats.held_out.items() if finite(share) is not None}
    worst = min(held_out, key=held_out.__getitem__, default=None)
    return {
        "adapter": str(directory),
        "statistics": str(file) if file else None,
        "model": made.model_id,
        "model_class": made.model_class,
        "data": made.data,
        "rank": ranks.rank,
        "ranks": dict(ranks),
        "parameters": built.n_parameters(),
        "uniform_parameters": sum(t.parameters(ranks.rank, built.freeze_a) for t in stats.targets.values()),
        "n_samples": made.n_samples,
        "n_batches": made.n_batches,
        "stop_reason": made.stop_reason,
        "n_components": max(len(stats.explained_variance(name)) for name in stats),
        "held_out": None
        if worst is None
        else {
            "median": finite(median(held_out.values())),
            "min": finite(held_out[worst]),
            "min_layer": worst,
        },
        "gamma": built.gamma,
        "loss_before": None if built.losses is None else finite(built.losses[0]),
        "loss_at_start": None if built.losses is None else finite(built.losses[1]),
        "seconds": made.seconds,
        "notes": [
            *([f"{built.start_in_words()}."] if built.corrects_base or built.changes_output or built.freeze_a else []),
            *made.notes,
            *ranks.notes,
        ],
    }


def show_summary(console: Console, summary: Mapping[str, Any]) -> None:
    """Print what `summarise` returned."""
    from lora_init.planning.plan import serving_note

    ranks = summary["ranks"]
    given = [rank for rank in ranks.values() if rank]
    change = summary["parameters"] / summary["uniform_parameters"] - 1
    held_out = summary["held_out"]
    rows = {
        "layers": f"{len(given)} with rank {min(given)} to {max(given)}, {len(ranks) - len(given)} without an adapter",
        "parameters": f"{summary['parameters']:,}, {change:+.1%} against rank {summary['rank']} everywhere",
        "data": summary["data"] or "not described",
        "pass": f"{summary['n_samples']:,} rows in {summary['n_batches']} batches, stopped: {summary['stop_reason']}",
        "held out": "not measured: fewer than two batches, or statistics that were merged"
        if held_out is None
        else f"{summary['n_components']} components capture {held_out['median']:.1%} of the variance of unseen rows "
        f"(median), {held_out['min']:.1%} at least ({held_out['min_layer']})",
        "time": ", ".join(f"{part} {seconds:.1f} s" for part, seconds in summary["seconds"].items()),
    }
    rows |= {"statistics": summary["statistics"]} if summary["statistics"] else {}
    rows["adapter"] = summary["adapter"]
    console.print(rank_table(ranks))
    console.print()
    console.print(facts(rows))
    console.print(serving_note(ranks), markup=False)
    for note in summary["notes"][:_SHOWN_NOTES]:
        console.print(f"note: {note}")
    if len(summary["notes"]) > _SHOWN_NOTES:
        console.print(f"and {len(summary['notes']) - _SHOWN_NOTES} more notes, all with --json")
