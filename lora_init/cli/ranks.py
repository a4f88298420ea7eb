"""The command `lora-init ranks`: from a statistics file to a plan, printed, saved, drawn, or told to another tool."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lora_init.cli.console import make_console, one_line_errors, say
from lora_init.cli.plan_arguments import BUDGETS, read_overrides, read_variants
from lora_init.errors import LoraInitError

# Printed by a real run. The backspace keeps the lines as they are.
EXAMPLE = """\b
Example:
$ lora-init ranks stats.safetensors --parameters 1M --compare uniform --compare cost-aware
plan           rank  layers  total   params    MB  explained  least
parameters=1M   1-7     202    774  999,936  4.05     22.74%   0.0%
uniform         3-4     210    689  999,936  4.05     20.68%   3.9%
cost-aware      1-7     186    909  999,744  4.05     23.63%   0.0%
"""


def ranks(
    statistics: Annotated[Path, typer.Argument(help="Statistics file, from lora-init init.", show_default=False)],
    rank: Annotated[
        int | None, typer.Option(help="Budget: average rank. The default is what the statistics are for.")
    ] = None,
    total_rank: Annotated[str | None, typer.Option(help="Budget: sum of all ranks.")] = None,
    parameters: Annotated[str | None, typer.Option(help="Budget: trainable parameters, such as 2.5M.")] = None,
    fraction: Annotated[
        float | None, typer.Option(help="Budget: share of the model's parameters, such as 0.01.")
    ] = None,
    megabytes: Annotated[float | None, typer.Option(help="Budget: size of the saved adapter, 10^6 bytes.")] = None,
    variance: Annotated[float | None, typer.Option(help="Budget: fewest ranks that explain this share.")] = None,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"], typer.Option(help="Of the saved adapter, for --megabytes.")
    ] = "float32",
    coverage: Annotated[
        Literal["every-layer", "total"], typer.Option(help="For --variance: in every layer, or in the mean of all.")
    ] = "every-layer",
    policy: Annotated[
        Literal["uniform", "eva", "cost-aware", "proportional", "gradient", "gradient-per-parameter", "gora"],
        typer.Option(
            help="What ranks compete by: nothing, variance, variance per parameter, or effective rank; with gradients "
            "in FILE: squared gradient, the same per parameter, or |weight x gradient|."
        ),
    ] = "eva",
    rho: Annotated[
        float, typer.Option(help="At most rho x average rank in one layer. 1 is the same everywhere.")
    ] = 2.0,
    min_rank: Annotated[int, typer.Option(help="Smallest rank; 0 lets a layer go without.")] = 0,
    max_rank: Annotated[int | None, typer.Option(help="Largest rank.")] = None,
    multiple_of: Annotated[int, typer.Option(help="Ranks are multiples of this.")] = 1,
    allowed_ranks: Annotated[str | None, typer.Option(help="The only ranks there are, such as 8,16,32,64.")] = None,
    tie: Annotated[
        list[str] | None, typer.Option(help="Layers with one rank in each block, as q_proj,k_proj,v_proj. Repeatable.")
    ] = None,
    override: Annotated[
        list[str] | None, typer.Option(help="Limits for some layers, as '*.down_proj:max_rank=8'. Repeatable.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Layers that get no rank: name, ending or wildcard.")
    ] = None,
    compare: Annotated[
        list[str] | None, typer.Option(help="Show beside it: a policy, or as parameters=1M,policy=uniform. Repeatable.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Plan file to write, for lora-init init --ranks.")
    ] = None,
    tool: Annotated[
        Literal["peft", "axolotl", "llama-factory", "json", "csv"] | None,
        typer.Option("--format", help="Print what this tool reads instead of tables."),
    ] = None,
    lora_alpha: Annotated[float, typer.Option(help="For --format: scaled by lora_alpha / rank.")] = 16,
    use_rslora: Annotated[bool, typer.Option("--use-rslora", help="For --format: by lora_alpha / sqrt(rank).")] = False,
    plot: Annotated[Path | None, typer.Option(help="Picture to write: .png, .svg or .html.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, to stdout.")] = False,
) -> None:
    """Plan ranks from the file STATISTICS under a budget. It takes no model, no data, and no time."""
    with one_line_errors():
        if tool and (compare or as_json):
            raise LoraInitError("--format prints one plan for one tool. Leave --compare and --json out.")
        arguments: dict[str, Any] = {
            "rank": rank, "total_rank": total_rank, "parameters": parameters, "fraction": fraction,
            "megabytes": megabytes, "variance": variance, "dtype": dtype, "coverage": coverage, "policy": policy,
            "rho": rho, "min_rank": min_rank, "max_rank": max_rank, "multiple_of": multiple_of,
            "allowed_ranks": _numbers(allowed_ranks), "tie": [_words(names) for names in tie or []],
            "overrides": read_overrides(override or []), "exclude": exclude or [],
        }  # fmt: skip
        variants = read_variants(compare or [], arguments)
        from lora_init.planning.plan_file import save_plan
        from lora_init.planning.ranks import allocate_ranks
        from lora_init.statistics.statistics import Statistics

        stats = Statistics.load(statistics)
        plan = allocate_ranks(stats, **arguments)
        plans = {
            _label(arguments, plan.rank): plan,
            **{name: allocate_ranks(stats, **changed) for name, changed in variants.items()},
        }
        if output is not None:
            say(f"{save_plan(plan, output)}: written")
        if plot is not None:
            from lora_init.planning.pictures import save_picture

            say(f"{save_picture(plan, stats, plot)}: written")
        if tool is not None:
            from lora_init.planning.snippets import snippet

            typer.echo(snippet(plan, tool, lora_alpha, use_rslora, str(output or "plan.json")), nl=False)
            return
        _show(plans, stats, as_json)


def _show(plans: dict[str, Any], stats: Any, as_json: bool) -> None:
    from lora_init.cli.plan_report import comparison_table, comparison_values, show_plan
    from lora_init.planning.plan_file import plan_to_dict

    if as_json:
        content = comparison_values(plans) if len(plans) > 1 else plan_to_dict(next(iter(plans.values())))
        typer.echo(json.dumps(content, indent=2, allow_nan=False))
    elif len(plans) > 1:
        make_console().print(comparison_table(plans))
    else:
        show_plan(make_console(), next(iter(plans.values())), stats)


def _label(arguments: dict[str, Any], default_rank: int) -> str:
    kind, value = next(((k, arguments[k]) for k in BUDGETS if arguments[k] is not None), ("rank", default_rank))
    return f"{kind}={value}" + (f",policy={arguments['policy']}" if arguments["policy"] != "eva" else "")


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _numbers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(word) for word in _words(text))
    except ValueError:
        raise LoraInitError(f"--allowed-ranks {text!r}: write it like 8,16,32,64.") from None
