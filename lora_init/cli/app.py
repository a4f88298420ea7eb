"""The command line: `lora-init init` and `lora-init inspect`. Thin: it reads arguments, calls the package, prints."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lora_init.cli.compare import EXAMPLE as COMPARE_EXAMPLE
from lora_init.cli.compare import compare
from lora_init.cli.console import (
    launched_rank,
    launched_team,
    make_console,
    one_line_errors,
    quiet_transformers,
    read_modules,
    read_names,
    silence,
    unescape,
)
from lora_init.cli.merge import EXAMPLE as MERGE_EXAMPLE
from lora_init.cli.merge import merge
from lora_init.cli.ranks import EXAMPLE, ranks
from lora_init.errors import LoraInitError

if TYPE_CHECKING:
    from lora_init.loading.batches import Batches
    from lora_init.planning.plan import RankAllocation
    from lora_init.statistics.statistics import Statistics

app = typer.Typer(
    name="lora-init",
    help="Compute from your data where LoRA adapters should start and how much rank each layer deserves.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Printed by a real run on 2 cores. The backspace keeps the lines as they are.
_EXAMPLE = """\b
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

Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, to stdout.")]


@app.command(epilog=_EXAMPLE)
def init(
    model: Annotated[str, typer.Argument(help="Model directory or hub id.", show_default=False)],
    data: Annotated[
        str,
        typer.Argument(
            help="JSON, JSONL, CSV, Parquet or text file, a folder of them, or a hub id, with columns text, or prompt "
            "and completion, or messages; for others see --template.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Adapter directory to write.", show_default=False)],
    rank: Annotated[int, typer.Option(min=1, help="Average rank of a layer.")] = 16,
    rho: Annotated[
        float, typer.Option(min=1.0, help="At most rho x rank in one layer. 1 is the same everywhere.")
    ] = 2.0,
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
            help="Statistics file: used if it exists, else written. Ctrl-C keeps what there is. A pass that was killed "
            "goes on from FILE.partial."
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
            "one with the lowest loss on the first four batches, which are set aside."
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
    max_batches: Annotated[int, typer.Option(min=1, help="Batches at most; fewer if the statistics settle.")] = 64,
    token_mask: Annotated[
        Literal["attention", "labels"], typer.Option(help="Count all tokens but padding, or only those with a label.")
    ] = "attention",
    center: Annotated[bool, typer.Option(help="Subtract the mean: PCA. Without: the second moment.")] = True,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sample and of all else that is random.")] = 0,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Type of the weights.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="Where the model runs: auto, cpu, cuda, cuda:1, mps.")] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model. Read it first.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the adapter directory.")] = False,
    as_json: Json = False,
) -> None:
    """Compute an adapter for MODEL from a sample of DATA and write it as a PEFT directory."""
    with one_line_errors(), launched_team() as team:
        _check_output(output, overwrite)
        plan = _plan(ranks_from)
        if plan is not None:
            rank, rho = plan.rank, max(1.0, max(plan.values()) / plan.rank)
        with make_console(stderr=True).status("importing torch and transformers"):
            from lora_init.adapters.build import build_adapter
            from lora_init.adapters.initializers import GRADIENT_METHODS, changes_output
            from lora_init.adapters.peft_model import check_modules_to_save
            from lora_init.adapters.step_size import find_step_size, mean_loss, set_aside
            from lora_init.cli.init import obtain, show_summary, summarise
            from lora_init.collection.collect import fingerprint
            from lora_init.loading.batches import load_batches
            from lora_init.loading.models import load_model
            from lora_init.planning.allocate import allocate_ranks

            quiet_transformers()
        with make_console(stderr=True).status(f"loading {model}"):
            loaded = load_model(
                model, task_type=task_type, dtype=dtype, device=device, trust_remote_code=trust_remote_code, seed=seed
            )
        saved = read_names(modules_to_save or "")
        check_modules_to_save(loaded.model, saved)
        if plan is not None:
            plan.check_model(fingerprint(loaded.model), f"{type(loaded.model).__name__} {model}")
        settings: dict[str, Any] = {
            "target_modules": read_modules(target_modules),
            "exclude_modules": read_modules(exclude_modules) if exclude_modules else None,
            "target_parameters": read_names(target_parameters) if target_parameters else None,
            "task_type": loaded.task_type,
            "center": center,
            "token_mask": token_mask,
            "gradients": gradients or method in GRADIENT_METHODS,
        }

        steps = changes_output(method)

        @functools.cache
        def read() -> Batches:
            return load_batches(
                data, loaded.tokenizer, subset=subset, split=split, samples=samples, batch_size=batch_size,
                template=unescape(template), completion=unescape(completion), max_length=max_length, seed=seed,
                seq2seq=loaded.seq2seq,
            )  # fmt: skip

        def collect_now(checkpoint: Path | None) -> Statistics:
            from lora_init.collection.collect import collect

            return collect(
                loaded.model, set_aside(read())[1] if steps else read(), rank=rank, rho=rho, max_batches=max_batches,
                seed=seed, data=read().description, checkpoint=checkpoint, resume=checkpoint is not None, **settings,
            )  # fmt: skip

        stats = obtain(statistics, loaded, settings, collect_now)
        team.finish()
        if team.rank:
            return
        ranks = plan or allocate_ranks(stats, rank=rank, rho=rho)
        build = functools.partial(
            build_adapter, stats, ranks, method=method, whiten=whiten, lora_alpha=lora_alpha, use_rslora=use_rslora,
            use_dora=use_dora, modules_to_save=saved, seed=seed,
        )  # fmt: skip
        if steps:
            aside, _ = set_aside(read())
            built = find_step_size(loaded.model, lambda g: build(gamma=g), lambda m: mean_loss(m, aside), gamma)
        else:
            built = build(gamma=gamma)
        directory = built.save_pretrained(output, overwrite=overwrite, model=loaded.model)
        summary = summarise(stats, ranks, directory, statistics, built)
        if as_json:
            _print_json(summary)
        else:
            show_summary(make_console(), summary)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Statistics file or adapter directory.", show_default=False)],
    intruders: Annotated[
        bool,
        typer.Option("--intruders", help="Count directions of the trained weights that the base model did not have."),
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="With --intruders: base model. Default: the one that the adapter names.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model. Read it first.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say what a statistics file or an adapter directory is: from which model and data, its spectra, its ranks."""
    with one_line_errors():
        from lora_init.cli.inspect import describe, show

        description = describe(path)
        if intruders:
            from lora_init.cli.inspect import describe_intruders, show_intruders

            description["intruders"] = describe_intruders(path, description, model, trust_remote_code)
        elif model is not None:
            raise LoraInitError("--model is for --intruders; without it no model is loaded.")
        if as_json:
            _print_json(description)
            return
        show(make_console(), description)
        if intruders:
            show_intruders(make_console(), description["intruders"])


app.command(epilog=EXAMPLE)(ranks)
app.command(epilog=MERGE_EXAMPLE)(merge)
app.command(epilog=COMPARE_EXAMPLE)(compare)


def main() -> None:
    """Run the command line and exit: 0, 1 after an error that was explained, 2 after wrong usage, 130 after Ctrl-C.

    In several processes started together all do the pass of `init`; everything else is done by the first, which alone
    writes and speaks.
    """
    if launched_rank():
        silence()
        if sys.argv[1:2] != ["init"]:
            return
    app()


def _plan(file: Path | None) -> RankAllocation | None:
    if file is None:
        return None
    from lora_init.planning.plan import load_plan

    return load_plan(file)


def _check_output(output: Path, overwrite: bool) -> None:
    """Find out before the work, not after it, that the result has no place."""
    output = output.expanduser()
    if output.exists() and not output.is_dir():
        raise LoraInitError(f"--output {output} is a file. Name a directory.")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise LoraInitError(f"--output {output} exists and is not empty. Name another directory, or pass --overwrite.")


def _print_json(content: Any) -> None:
    typer.echo(json.dumps(content, indent=2, allow_nan=False))
