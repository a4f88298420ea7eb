"""The command `lora-init inspect`: what a statistics file, a plan, an adapter or a comparison holds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_init.cli.console import (
    AsJson,
    TrustRemoteCode,
    make_console,
    one_line_errors,
    print_json,
    quiet_transformers,
)
from lora_init.cli.tables import facts, finite, group_by_kind, rank_table
from lora_init.errors import LoraInitError, first_line
from lora_init.layers.grid import layer_grid

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_WORST = 5


def inspect(
    path: Annotated[
        Path,
        typer.Argument(help="Statistics, plan, or directory of an adapter or a comparison.", show_default=False),
    ],
    intruders: Annotated[
        bool,
        typer.Option("--intruders", help="Count directions of the trained weights that the base model did not have."),
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="With --intruders: base model. Default: the one that the adapter names.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Say what statistics, a plan, an adapter or a comparison are: of which model and data, and what is in them."""
    with one_line_errors():
        with _damage_of(path):
            description = describe(path)
        if intruders:
            description["intruders"] = describe_intruders(path, description, model, trust_remote_code)
        elif model is not None:
            raise LoraInitError("--model is for --intruders; without it no model is loaded.")
        if as_json:
            print_json(description)
            return
        with _damage_of(path):
            show(make_console(), description)
        if intruders:
            show_intruders(make_console(), description["intruders"])


@contextmanager
def _damage_of(path: Path) -> Iterator[None]:
    """Say that a file is damaged where what it says has another form than anything lora_init or PEFT writes."""
    try:
        yield
    except LoraInitError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise LoraInitError(f"{path} is damaged: {type(error).__name__} {first_line(error)} Make it again.") from error


def describe_intruders(
    path: Path, about: Mapping[str, Any], model: str | None, trust_remote_code: bool
) -> dict[str, Any]:
    """Load the base model of an adapter directory and count the adapter's intruder dimensions.

    Args:
        path: The directory.
        about: What `describe` said of it.
        model: Base model; None for the one that the adapter names.
        trust_remote_code: Allow code that comes with the model to run.

    Returns:
        Plain values that `json.dumps` takes, layers in model order.

    Raises:
        LoraInitError: Not an adapter, no base model, or one that it does not fit.
    """
    if about["what"] != "adapter":
        raise LoraInitError(
            f"{path} is no adapter ({about['what']}), and --intruders is about a trained one. Name its directory."
        )
    source = model or about["base_model"]
    if not source:
        raise LoraInitError(f"{path} does not name its base model. Name it with --model.")
    with make_console(stderr=True).status("importing torch and transformers"):
        from lora_init.adapters.intruders import THRESHOLD, K, intruder_dimensions
        from lora_init.loading.models import TASK_TYPES, load_model

        quiet_transformers()
    task_type = about["task_type"] if about["task_type"] in TASK_TYPES else None
    with make_console(stderr=True).status(f"loading {source}"):
        loaded = load_model(source, task_type=task_type, device="cpu", trust_remote_code=trust_remote_code)
    with make_console(stderr=True).status("decomposing the weights"):
        found = intruder_dimensions(loaded.model, path)
    return {
        "model": source,
        "k": K,
        "threshold": THRESHOLD,
        "count": found.count,
        "of": found.of,
        "energy_share": finite(found.energy_share),
        "skipped": dict(found.skipped),
        "layers": {
            name: {
                "count": layer.count,
                "of": layer.of,
                "energy_share": finite(layer.energy_share),
                "least_similarity": finite(min(layer.similarities)),
            }
            for name, layer in found.layers.items()
        },
    }


def show_intruders(console: Console, about: Mapping[str, Any]) -> None:
    """Print what `describe_intruders` returned: totals, the layers with most of them, and all layers by block."""
    layers = about["layers"]
    worst = sorted(layers, key=lambda name: (-layers[name]["count"], -layers[name]["energy_share"]))[:_WORST]
    head = {
        "intruders": f"{about['count']:,} of {about['of']:,}, the first {about['k']} directions of each weight",
        "criterion": f"|cosine| below {about['threshold']} with every direction of the same weight of {about['model']}",
        "energy": f"{about['energy_share']:.1%} of that of these directions",
    }
    lines = [
        f"{layers[name]['count']} of {layers[name]['of']}, {layers[name]['energy_share']:.1%} of the energy: {name}"
        for name in worst
        if layers[name]["count"]
    ]
    head |= {"worst layers" if i == 0 else " " * i: line for i, line in enumerate(lines)}
    console.print("")
    console.print(facts(head))
    for name, kind in about["skipped"].items():
        console.print(f"{name} ({kind}) has no singular vectors to compare.")
    if about["count"]:
        console.print("")
        console.print(rank_table({name: layer["count"] for name, layer in layers.items()}))


def describe(path: str | Path) -> dict[str, Any]:
    """Read what statistics, a plan, an adapter or a comparison are, from which model and data, and what is in them.

    Any LoRA directory of PEFT will do; where it comes from is known only if lora_init made it, before or after
    training. Weights and components are not read, only their shapes.

    Returns:
        Plain values that `json.dumps` takes.

    Raises:
        LoraInitError: There is nothing at the path, or it is none of these, or damaged.
    """
    path = Path(path).expanduser()
    if path.is_dir() and (path / "settings.json").is_file() and not (path / "adapter_config.json").is_file():
        from lora_init.comparison.report import describe_directory

        return describe_directory(path)
    if path.is_dir():
        with _damage_of(path):
            return _describe_adapter(path)
    if not path.exists():
        raise LoraInitError(
            f"{path}: no such file or directory. Expected statistics, a plan, an adapter directory or a comparison."
        )
    with path.open("rb") as file:
        is_json = file.read(1) == b"{"
    return _describe_plan(path) if is_json else _describe_statistics(path)


def _describe_plan(path: Path) -> dict[str, Any]:
    from lora_init.planning.plan import load_plan, plan_to_dict

    plan = load_plan(path)
    return {"what": "plan", "path": str(path), **plan_to_dict(plan), "ranks": dict(plan), "asked": str(plan.budget)}


def _describe_statistics(path: Path) -> dict[str, Any]:
    from dataclasses import asdict

    from lora_init.statistics.statistics import Statistics

    stats = Statistics.load(path)
    layers = {
        name: {
            "kind": target.kind,
            "in_features": target.in_features,
            "out_features": target.out_features,
            "input_shared_with": stats.group_of[name],
            "total_variance": stats.total_variance(name),
            "explained_variance_ratio": [round(share, 6) for share in stats.explained_variance_ratio(name).tolist()],
            "held_out": finite(stats.held_out.get(stats.group_of[name])),
        }
        for name, target in stats.targets.items()
        if name in stats
    }
    return {
        "what": "statistics",
        "path": str(path),
        **asdict(stats.provenance),
        "unsupported": stats.unsupported,
        "layers": layers,
    }


def _describe_adapter(path: Path) -> dict[str, Any]:
    from lora_init.adapters.peft_model import (
        LORA_A,
        LORA_B,
        adapted_layers,
        origin_of,
        read_config,
        read_shapes,
    )
    from lora_init.layers.targets import PREFIX

    config = read_config(path)
    shapes = read_shapes(path)
    origin = origin_of(path)
    ranks = {name: shapes[f"{PREFIX}{name}{LORA_A}"][0] for name in adapted_layers(shapes)}
    for name, one in origin.get("experts", {}).items():
        ranks[name] = ranks.pop(one["tensors"]) // one["experts"]
    # The file's keys are sorted as text, block 10 before block 2; lora_init.json knows the model's order.
    known = [name for name in origin.get("explained", {}) if name in ranks]
    return {
        "what": "adapter",
        "path": str(path),
        "base_model": config.get("base_model_name_or_path"),
        "task_type": config.get("task_type"),
        "rank": config.get("r"),
        "lora_alpha": config.get("lora_alpha"),
        "use_rslora": bool(config.get("use_rslora")),
        "use_dora": bool(config.get("use_dora")),
        "parameters": sum(math.prod(shape) for key, shape in shapes.items() if key.endswith((LORA_A, LORA_B))),
        "ranks": {name: ranks[name] for name in [*known, *(name for name in ranks if name not in known)]},
        "origin": origin or None,
    }


def show(console: Console, description: Mapping[str, Any]) -> None:
    """Print what `describe` returned."""
    views = {"statistics": _statistics_view, "plan": _plan_view, "adapter": _adapter_view, "comparison": _runs_view}
    for renderable in views[description["what"]](description):
        console.print(renderable)


def _plan_view(about: Mapping[str, Any]) -> list[RenderableType]:
    totals, made = about["totals"], about["provenance"] or {}
    head = {
        "file": f"{about['path']}: plan for {totals['layers']} of {len(about['layers'])} layers",
        "policy": f"{about['policy']}, asked for {about['asked']}" if about["budget"] else "by hand",
        "rank": f"{about['rank']} on average, {totals['total_rank']:,} in all",
        "parameters": f"{totals['parameters']:,}",
        "explained": f"{totals['explained_variance']:.1%} of a layer's variance on average",
        "model": f"{made.get('model_class', 'any')} {made.get('model_id', '')}".strip(),
        "data": made.get("data") or "not described",
    }
    return [facts(head), "", rank_table(about["ranks"]), *about["notes"]]


def _statistics_view(about: Mapping[str, Any]) -> list[RenderableType]:
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    head = {
        "file": f"{about['path']}: statistics of {len(about['layers'])} layers",
        "model": f"{about['model_class']} {about['model_id']}".strip(),
        "fingerprint": about["fingerprint"],
        "targets": str(about["target_modules"])
        + (f" without {about['exclude_modules']}" if about["exclude_modules"] else ""),
        "data": about["data"] or "not described",
        "tokens": "those with a label" if about["token_mask"] == "labels" else "all but padding",
        "rows": f"{about['n_samples']:,} in {about['n_batches']} batches, stopped: {about['stop_reason']}",
        "decomposition": "centred (PCA)" if about["center"] else "not centred (second moment)",
        "made for": f"rank {about['rank']} with seed {about['seed']}",
        "made with": versions,
    }
    notes = [*about["notes"], *(f"{name} ({kind}) has no spectrum." for name, kind in about["unsupported"].items())]
    return [facts(head), "", _spectrum_table(about["layers"]), *notes]


def _runs_view(about: Mapping[str, Any]) -> list[RenderableType]:
    from rich.table import Table

    asked = about["settings"]
    head = {
        "directory": f"{about['path']}: comparison of {len(about['starts'])} starts",
        "model": str(asked.get("model", "not named")),
        "data": str(asked.get("data", "not described")),
        "runs": ", ".join(f"{n} {status}" for status, n in about["runs"].items()) or "none yet",
        "found": about["headline"],
    }
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    for name in ("start", "learning rate", "loss"):
        table.add_column(name, justify="left" if name == "start" else "right")
    for label, start in about["starts"].items():
        rate, loss = start["learning_rate"], start["loss"]
        table.add_row(label, "-" if rate is None else f"{rate:g}", "-" if loss is None else f"{loss:.4f}")
    return [facts(head), "", table, *about["notes"]]


def _spectrum_table(layers: Mapping[str, Mapping[str, Any]]) -> RenderableType:
    """Show the share of variance that the first components capture, median over the layers of a kind."""
    from rich.table import Table

    collected = max((len(layer["explained_variance_ratio"]) for layer in layers.values()), default=0)
    counts = [count for count in (1, 4, 16, 64, 256) if count < collected] + [collected]
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    for name in ("layers", "count", "d_in", *(f"top {count}" for count in counts), "held out"):
        table.add_column(name, justify="left" if name == "layers" else "right")
    for label, names in group_by_kind(layers).items():
        spectra = [layers[name]["explained_variance_ratio"] for name in names]
        held_out = [layers[name]["held_out"] for name in names if layers[name]["held_out"] is not None]
        table.add_row(
            label,
            str(len(names)),
            "/".join(str(width) for width in dict.fromkeys(layers[name]["in_features"] for name in names)),
            *(f"{median(sum(spectrum[:count]) for spectrum in spectra):.1%}" for count in counts),
            f"{median(held_out):.1%}" if held_out else "-",
        )
    return table


def _adapter_view(about: Mapping[str, Any]) -> list[RenderableType]:
    from rich.text import Text

    from lora_init.planning.plan import serving_note

    ranks = about["ranks"]
    extras = [text for flag, text in (("use_rslora", "rsLoRA"), ("use_dora", "DoRA")) if about[flag]]
    head = {
        "directory": f"{about['path']}: LoRA adapter of {len(ranks)} layers",
        "base model": str(about["base_model"] or "not named"),
        "task type": str(about["task_type"] or "none"),
        "rank": f"{about['rank']} on average, {min(ranks.values(), default=0)} to {max(ranks.values(), default=0)}",
        "lora_alpha": f"{about['lora_alpha']}{' with ' + ' and '.join(extras) if extras else ''}",
        "parameters": f"{about['parameters']:,}",
    }
    origin = about["origin"]
    if origin:
        source = origin.get("provenance", {})
        head["start"] = (
            f"{origin.get('method')}{', whitened' if origin.get('whiten') else ''}, seed {origin.get('seed')}"
        )
        head["data"] = source.get("data") or "not described"
        head["rows"] = (
            f"{source.get('n_samples', 0):,} in {source.get('n_batches')} batches, stopped: {source.get('stop_reason')}"
        )
        shares = list(origin.get("explained", {}).values())
        if shares:
            head["captured"] = f"median {median(shares):.1%}, least {min(shares):.1%} of a layer's variance"
    else:
        head["start"] = "unknown: lora_init did not make it"
    return [facts(head), "", rank_table(ranks), "", Text(serving_note(_with_gaps(ranks)))]


def _with_gaps(ranks: Mapping[str, int]) -> dict[str, int]:
    """Add the layers that have no adapter while others of their kind have one: they are not in the directory."""
    grid, whole = layer_grid(ranks), dict(ranks)
    for kind in grid.kinds:
        layers = grid.of_kind(kind)
        block, name = next(iter(layers.items()))
        gaps = [other for other in grid.blocks if other >= 0 and other not in layers]
        whole |= {name.replace(f".{block}.", f".{other}.", 1): 0 for other in gaps if block >= 0}
    return whole
