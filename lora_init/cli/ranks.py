"""The command `lora-init ranks`: from a statistics file to a plan: printed, saved, drawn, or for another tool."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

import typer
from typer import Argument, Option

from lora_init.adapters.init_config import LIST, read_names
from lora_init.cli.console import print_next, print_result, running, say
from lora_init.cli.options import WrittenAs, read_numbers
from lora_init.cli.tables import Cells, facts, rank_table
from lora_init.errors import LoraInitError, did_you_mean, require
from lora_init.files import check_writable
from lora_init.layers.grid import layer_grid
from lora_init.planning.policies import POLICIES, policy_names
from lora_init.planning.snippets import RANKS_ALONE, TOOLS

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

    from lora_init.planning.plan import RankAllocation
    from lora_init.statistics.statistics import Statistics

_output = partial(Option, rich_help_panel="Output")  # shown by --help-all alone: see cli/help.py
Coverage = Literal["every-layer", "total"]
if TYPE_CHECKING:
    Policy: TypeAlias = str
    Tool: TypeAlias = str
else:  # the registries decide what there is
    Policy, Tool = Literal[policy_names()], Literal[tuple(TOOLS)]
_BY_GRADIENT = ", ".join(name for name, policy in POLICIES.items() if policy.needs_gradient)

# A plan has one budget; without any it is the rank that the statistics were collected for.
_BUDGETS = ("rank", "total_rank", "parameters", "fraction", "megabytes", "variance")
# What a variant of --compare may change. Others, such as --tie, have commas of their own, which separate changes here.
_VARIED = (*_BUDGETS, "dtype", "coverage", "policy", "rho", "min_rank", "max_rank", "multiple_of", "allowed_ranks")


def read_overrides(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Read limits for some layers from texts such as `"*.down_proj:max_rank=8,multiple_of=4"`, not checking values.

    Example:
        >>> read_overrides(["*.down_proj:max_rank=8", "lm_head:allowed_ranks=8/16"])
        {'*.down_proj': {'max_rank': 8}, 'lm_head': {'allowed_ranks': (8, 16)}}
    """
    overrides: dict[str, dict[str, Any]] = {}
    for text in texts:
        pattern, colon, rest = text.partition(":")
        if not colon or not pattern.strip():
            raise LoraInitError(f"--override {text!r}: write it like '*.down_proj:max_rank=8'.")
        # Given twice, a pattern collects the limits of both; of the same limit the later one counts.
        overrides.setdefault(pattern.strip(), {}).update(_read_pairs(rest, f"--override {text!r}"))
    return overrides


def read_variants(texts: Sequence[str], base: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Read what to compare with: changes of `base`, such as `"uniform"` or `"parameters=1M,policy=cost-aware"`.

    A word alone is a policy. A budget takes the place of the one in `base`.

    Example:
        >>> read_variants(["uniform", "parameters=1M"], {"rank": 8, "policy": "eva"})
        {'uniform': {'rank': 8, 'policy': 'uniform'}, 'parameters=1M': {'policy': 'eva', 'parameters': '1M'}}
    """
    variants = {}
    for text in texts:
        is_policy = "=" not in text
        change = _read_pairs(f"policy={text}" if is_policy else text, f"--compare {text!r}")
        if is_policy and text not in policy_names():
            choose = did_you_mean(text, policy_names())
            raise LoraInitError(f"--compare {text!r}: expected a policy, or a change such as 'rank=8'. {choose}")
        for key in change:
            if key not in _VARIED:
                raise LoraInitError(f"--compare {text!r}: {key!r} is unknown. {did_you_mean(key, _VARIED)}")
        variant = dict(base)
        if not change.keys().isdisjoint(_BUDGETS):
            for budget in _BUDGETS:  # two budgets in one plan are refused by `allocate_ranks`
                variant.pop(budget, None)
        variants[text] = variant | change
    return variants


def _read_pairs(text: str, where: str) -> dict[str, Any]:
    """Read `key=value` pairs that commas separate, with the keys as arguments of `allocate_ranks`."""
    pairs: dict[str, Any] = {}
    for part in text.split(","):
        left, equals, right = part.partition("=")
        key, value = left.strip().replace("-", "_"), right.strip()
        if not equals or not value:
            raise LoraInitError(f"{where}: {part.strip()!r} is not of the form key=value.")
        if key == "allowed_ranks":  # the comma is taken, so its numbers have slashes between them
            pairs[key] = tuple(_number(number) for number in value.split("/"))
        else:
            pairs[key] = _number(value)
    return pairs


def _number(text: str) -> int | float | str:
    """Read a number. Anything else stays text, such as 2.5M, which `allocate_ranks` reads or refuses."""
    try:
        if text.isdecimal():
            return int(text)
        return float(text)
    except ValueError:  # Python reads no number of more than 4,300 digits either
        return text


def kind_totals(plan: RankAllocation) -> pd.DataFrame:
    """Sum a plan up by kind of layer, in model order: layers, least, most, total_rank, parameters, explained."""
    table, kinds = plan.to_pandas(), layer_grid(plan).by_kind
    kind_of: dict[str, str] = {}
    for kind, layers in kinds.items():
        kind_of |= dict.fromkeys(layers.values(), kind)
    # layers -> kinds
    totals = table.groupby([kind_of[name] for name in table.index]).agg(
        layers=("rank", "size"),
        least=("rank", "min"),
        most=("rank", "max"),
        total_rank=("rank", "sum"),
        parameters=("parameters", "sum"),
        explained=("explained_variance", "mean"),
    )
    return totals.loc[list(kinds)]  # groupby has sorted them by name


def totals_against_uniform(plan: RankAllocation, stats: Statistics) -> list[tuple[str, ...]]:
    """Set what a plan costs and explains beside uniform ranks of the same sum: rows of name, plan, uniform ranks."""
    from lora_init.planning.allocate import allocate_ranks

    # With the same sum of ranks the two plans differ only in which layers have them.
    with warnings.catch_warnings():  # where the data has too few directions was said when the plan was made
        warnings.simplefilter("ignore")
        uniform = allocate_ranks(stats, total_rank=plan.total_rank, policy="uniform", exclude=plan.excluded)
    of_plan, of_uniform = _totals(plan), _totals(uniform)
    return [(name, text, of_uniform[name]) for name, text in of_plan.items()]


def _totals(plan: RankAllocation) -> dict[str, str]:
    """Return what a whole plan costs and explains, as the table shows it."""
    used = [rank for rank in plan.values() if rank]
    return {
        "layers with an adapter": f"{len(used)} of {len(plan)}",
        "rank": f"{min(used)} to {max(used)}",
        "total rank": f"{plan.total_rank:,}",
        "parameters": f"{plan.parameters:,}",
        "MB in float32": f"{plan.megabytes():.2f}",
        "MB in bfloat16": f"{plan.megabytes('bfloat16'):.2f}",
        "variance explained, mean": f"{plan.explained_variance:.1%}",
    }


def show_plan(console: Console, plan: RankAllocation, stats: Statistics) -> None:
    """Print a plan, what it costs and explains against uniform ranks of the same sum, and which engines serve it."""
    from lora_init.planning.plan import plan_config, plan_text, source_text
    from lora_init.serving.support import serving_note

    heads = ("", "this plan", "uniform ranks, same sum")
    totals = Cells([dict(zip(heads, row, strict=True)) for row in totals_against_uniform(plan, stats)])
    rows = {"plan": plan_text(plan), "spent": _spent(plan), "from": source_text(plan)}
    for part in (rank_table(plan, console.width), "", _kinds_table(plan), "", totals, "", facts(rows)):
        console.print(part)
    for note in plan.notes:
        console.print(f"note: {note}", markup=False)
    # A plan has no scaling yet. Every layer gets the same, whichever it is.
    console.print(serving_note(plan, plan_config(plan, scaling=1.0)), markup=False)


def _kinds_table(plan: RankAllocation) -> Cells:
    """Show where the ranks of a plan go: a row for each kind of layer."""
    rows = []
    for kind in kind_totals(plan).itertuples():
        rows.append(
            {
                "layers": kind.Index,
                "count": str(kind.layers),
                "rank": _range([kind.least, kind.most]),
                "total rank": f"{kind.total_rank:,}",
                "parameters": f"{kind.parameters:,}",
                "share": f"{kind.parameters / plan.parameters:.1%}",
                "explained": f"{kind.explained:.1%}",
            }
        )
    return Cells(rows)


def _range(ranks: Sequence[int]) -> str:
    least, most = min(ranks), max(ranks)
    return str(least) if least == most else f"{least}-{most}"


def _spent(plan: RankAllocation) -> str:
    """Write how much of its budget a plan spends: steps are whole, so some of it may be left."""
    budget = plan.budget
    if budget is None:
        return "by hand"
    # This budget is a goal and not a limit: the least cost that reaches it, so the plan explains at least that much.
    if budget.unit == "variance":
        where = "of the variance"
        if budget.coverage == "every-layer":
            where += " of the layer with least"
        return f"{plan.total_rank:,} ranks for {plan.spent:.2%} {where}; {budget.limit:.2%} asked for"
    return f"{plan.spent:,.0f} of {budget.limit:,.0f} {budget.unit} ({plan.spent / budget.limit:.2%})"


def comparison_table(plans: Mapping[str, RankAllocation]) -> Cells:
    """Set plans side by side. MB is the file's in float32; least is what is explained in the layer with least."""
    first, *_ = plans.values()  # the plan that the options ask for; the others are variants of it
    rows = []
    for label, plan in plans.items():
        used = [rank for rank in plan.values() if rank]
        # An excluded layer takes no part, and would always be the one that is explained least, by nothing.
        explained = [plan.explained[name] for name in plan if name not in plan.excluded]
        rows.append(
            {
                "plan": label,
                "rank": _range(used),
                "layers": str(len(used)),
                "total": f"{plan.total_rank:,}",
                "params": f"{plan.parameters:,}",
                "to first": f"{plan.parameters / first.parameters - 1:+.1%}",
                "MB": f"{plan.megabytes():.2f}",
                "explained": f"{plan.explained_variance:.2%}",
                "least": f"{min(explained, default=0.0):.1%}",
            }
        )
    return Cells(rows)


# What `allocate_ranks` takes where --dtype or --coverage are not given. The options themselves are None then, so that
# `_check_budgets` can tell whether they were.
_DTYPE: WrittenAs = "float32"
_COVERAGE: Coverage = "every-layer"


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What a plan is made by: the arguments of `allocate_ranks`, as the command line writes them."""

    title: ClassVar = "Limits"
    # At most one of six. As text where a unit may follow the number, as in 2.5M.
    rank: Annotated[
        int | None, dict(help="Budget: average rank. Default: what the statistics are for.", first=True)
    ] = None
    total_rank: Annotated[str | None, dict(help="Budget: sum of all ranks.")] = None
    parameters: Annotated[str | None, dict(help="Budget: trainable parameters, such as 2.5M.", first=True)] = None
    fraction: Annotated[float | None, dict(help="Budget: share of the model's parameters, such as 0.01.")] = None
    megabytes: Annotated[float | None, dict(help="Budget: 10^6 bytes of parameters in --dtype.", first=True)] = None
    variance: Annotated[float | None, dict(help="Budget: fewest ranks that explain this share.", first=True)] = None
    dtype: Annotated[
        WrittenAs | None, dict(help=f"For --megabytes: type that the adapter is written in. Default: {_DTYPE}.")
    ] = None
    coverage: Annotated[Coverage | None, dict(help=f"For --variance: in which layers. Default: {_COVERAGE}.")] = None
    # How much one more rank in a layer is worth.
    policy: Annotated[Policy, dict(help=f"What ranks compete by. With gradients: {_BY_GRADIENT}.", first=True)] = "eva"
    # None, since the default depends on the policy: with the same rank everywhere another policy would decide nothing.
    rho: Annotated[
        float | None, dict(help="At most rho x average rank in a layer. Default: 1; 2 with a policy.", first=True)
    ] = None
    # Limits hold whatever the budget and the policy are.
    min_rank: Annotated[int, dict(help="Smallest rank; 0 lets a layer go without.")] = 0
    max_rank: Annotated[int | None, dict(help="Largest rank.")] = None
    multiple_of: Annotated[int, dict(help="Ranks are multiples of this.")] = 1
    allowed_ranks: Annotated[str | None, dict(metavar=LIST, help="The only ranks there are, such as 8,16,32,64.")] = (
        None
    )
    tie: Annotated[list[str] | None, dict(help="Layers of one rank in each block, as q_proj,k_proj. Repeatable.")] = (
        None
    )
    uniform_per_kind: Annotated[bool, dict(help="One rank for each kind of layer.")] = False
    # Later ones win where several patterns match a layer.
    override: Annotated[list[str] | None, dict(help="Limits, as '*.down_proj:max_rank=8'. Repeatable.")] = None
    exclude: Annotated[list[str] | None, dict(help="Layers that get no rank: name, ending or wildcard.")] = None

    def arguments(self) -> dict[str, Any]:
        """Read them as arguments of `allocate_ranks`."""
        arguments = dict(vars(self))
        del arguments["override"]  # named for one limit, as it is typed; the argument is for all
        if self.allowed_ranks is not None:
            arguments["allowed_ranks"] = read_numbers("--allowed-ranks", self.allowed_ranks, int)
        return arguments | {
            "dtype": self.dtype or _DTYPE,
            "coverage": self.coverage or _COVERAGE,
            "exclude": self.exclude or [],
            "tie": [read_names(names) for names in self.tie or []],
            "overrides": read_overrides(self.override or []),
        }


EXAMPLE = """\b
Example:
$ lora-init ranks stats.safetensors --parameters 1M \\
    --compare uniform --compare cost-aware
"""


def ranks(
    statistics: Annotated[Path, Argument(help="Statistics file, from lora-init init.", show_default=False)],
    options: PlanOptions,
    compare: Annotated[list[str] | None, Option(help="Also plan: uniform, or parameters=1M,rho=1. Repeatable.")] = None,
    output: Annotated[Path | None, Option("--output", "-o", help="Plan to write, for init --ranks.")] = None,
    tool: Annotated[Tool | None, Option("--format", help="Print what this tool reads instead of tables.")] = None,
    lora_alpha: Annotated[
        float | None, _output(help="For --format: scaled by lora_alpha / rank. Default: twice the rank.")
    ] = None,
    use_rslora: Annotated[bool, _output(help="For --format: by lora_alpha / sqrt(rank).")] = False,
    plot: Annotated[Path | None, Option(help="Picture to write: .png or .svg.")] = None,
    overwrite: Annotated[bool, _output(help="Replace an older plan or picture.")] = False,
) -> None:
    """Plan ranks from the file STATISTICS under a budget. It takes no model, no data, and no time."""
    arguments = options.arguments()
    variants = read_variants(compare or [], arguments)
    _refuse(
        tool and (compare or running.as_json), "--format prints one plan for one tool. Leave --compare and --json out."
    )
    # All that is wrong with the words comes before torch is imported and the file is read.
    _check_unread(options, [arguments, *variants.values()])
    has_scaling = tool is not None and tool not in RANKS_ALONE
    _refuse(
        not has_scaling and (lora_alpha is not None or use_rslora),
        f"--lora-alpha and --use-rslora are for --format, but {' and '.join(RANKS_ALONE)} hold no scaling.",
    )
    _check_outputs(output, plot, overwrite)
    from lora_init.planning.allocate import allocate_ranks
    from lora_init.planning.plan import plan_to_dict, save_plan
    from lora_init.statistics.statistics import Statistics

    stats = Statistics.load(statistics)
    # The plan itself first: what is wrong with it is said before what is wrong with a variant.
    plan = allocate_ranks(stats, **_read_by(arguments))
    plans = {_label(arguments, plan.rank): plan}
    plans |= {name: allocate_ranks(stats, **_read_by(changed)) for name, changed in variants.items()}
    # Files first: they are complete even where whoever reads the tables leaves early, as `head` does.
    if output is not None:
        say(f"{save_plan(plan, output)}: written")
    if plot is not None:
        from lora_init.plots.pictures import save_picture

        say(f"{save_picture(plan, stats, plot)}: written")
    if tool is not None:
        _print_for_tool(tool, stats, plan, output, lora_alpha, use_rslora)
        return
    several = [{"plan": label, **plan_to_dict(each)} for label, each in plans.items()]
    next_command = _init_command(stats.provenance.model_id, statistics, output)

    def show(console: Console, _: Any) -> None:
        if variants:
            console.print(comparison_table(plans))
        else:
            show_plan(console, plan, stats)
        print_next(console, next_command)

    print_result(several if variants else plan_to_dict(plan), show, written=output or plot)


def _init_command(model: str, statistics: Path, plan: Path | None) -> str:
    """Write the command that makes an adapter with these ranks, by the plan if it was written to a file."""
    words = ["lora-init init", shlex.quote(model or "MODEL"), "--statistics", shlex.quote(str(statistics))]
    if plan is not None:
        words += ["--ranks", shlex.quote(str(plan))]
    return " ".join([*words, "-o adapter"])


def _print_for_tool(
    tool: str, stats: Statistics, plan: RankAllocation, output: Path | None, lora_alpha: float | None, use_rslora: bool
) -> None:
    """Print what a tool reads to train with the ranks of a plan."""
    from lora_init.building.build import build_adapter
    from lora_init.planning.snippets import snippet

    # An adapter is built for its scaling and its learning rate, which the tool's settings name.
    built = build_adapter(stats, plan, lora_alpha=lora_alpha, use_rslora=use_rslora)
    path = str(output or "plan.json")  # for those tools that read the plan itself
    typer.echo(snippet(plan, tool, built.lora_alpha, use_rslora, path, built.recommended, built.how_to_train), nl=False)


def _read_by(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what the budget of a plan does not read: another plan of the same command may read it."""
    readers = {"dtype": "megabytes", "coverage": "variance"}
    return {name: value for name, value in plan.items() if name not in readers or plan.get(readers[name]) is not None}


def _check_unread(options: PlanOptions, plans: Sequence[Mapping[str, Any]]) -> None:
    """Refuse what only some budgets and policies read, where no plan has one of them."""
    _refuse(options.dtype and not any(plan.get("megabytes") for plan in plans), "--dtype is for --megabytes.")
    _refuse(options.coverage and not any(plan.get("variance") for plan in plans), "--coverage is for --variance.")
    reads_rho = any(not plan.get("variance") and plan["policy"] != "uniform" for plan in plans)
    _refuse(options.rho is not None and not reads_rho, "--rho does nothing with --variance or --policy uniform.")
    in_every_layer = all(plan.get("variance") and plan["coverage"] == _COVERAGE for plan in plans)
    _refuse(
        options.policy != "eva" and in_every_layer,
        f"--policy does nothing with --variance in {_COVERAGE.replace('-', ' ')}. Leave it out, or give a --coverage.",
    )


def _refuse(condition: object, message: str) -> None:
    if condition:
        raise LoraInitError(message)


def _check_outputs(output: Path | None, plot: Path | None, overwrite: bool) -> None:
    if output is not None:
        check_writable(output, overwrite, "plan")
    # Nothing is written before both can be: a plan without its picture would be in the way of the same command again.
    if plot is not None:
        from lora_init.plots.pictures import picture_kind

        require("matplotlib")
        _refuse(plot == output, f"--output and --plot both name {plot}. Choose another name for one of the two.")
        check_writable(plot, overwrite, picture_kind(plot))


def _label(arguments: dict[str, Any], default_rank: int) -> str:
    """Name the plan of the options as a variant is named: by its budget, and by its policy if that is not EVA's."""
    label = f"rank={default_rank}"
    for budget in _BUDGETS:
        if arguments[budget] is not None:
            label = f"{budget}={arguments[budget]}"
            break  # `allocate_ranks` has refused a second one
    if arguments["policy"] != "eva":
        label += f",policy={arguments['policy']}"
    return label
