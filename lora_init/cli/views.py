"""What `describe` returned, printed: statistics, a plan, an adapter or a comparison; and the command to run next."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from contextlib import suppress
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from lora_init.cli.console import print_next
from lora_init.cli.tables import Cells, correction_facts, facts, quantization_name, rank_table, rows_read
from lora_init.files import is_same_place
from lora_init.layers.grid import layer_grid, one_line_each

if TYPE_CHECKING:
    from rich.console import Console

_RUNS_CODE = "--trust-remote-code"  # only the user may ask for that
# Of adapters that no engine loads, whatever `export` does.
_PEFT_ALONE = "load it with PEFT, which alone takes it"


def show(console: Console, description: Mapping[str, Any]) -> None:
    """Print what `describe` returned."""
    views = {"statistics": _statistics_view, "plan": _plan_view, "adapter": _adapter_view, "comparison": _runs_view}
    head, *body = views[description["what"]](description, console.width)
    console.print(facts(head))
    for renderable in body:
        console.print(renderable, markup=False)  # names of layers and paths may have square brackets
    print_next(console, _next(description))


def _next(description: Mapping[str, Any]) -> str:
    """Write the command that one runs next."""
    path = shlex.quote(description["path"])
    if description["what"] == "statistics":
        return f"lora-init init MODEL --statistics {path} -o adapter"
    if description["what"] == "plan":
        return f"lora-init init MODEL --ranks {path} -o adapter"
    if description["what"] == "comparison":
        # The command that its summary ends with, if there is one, else the one that it was made by.
        command = description["command"] or description["settings"].get("command")
        return _safe_command(command) or f"lora-init compare MODEL DATA -o {path}"
    return _next_of_adapter(description)


# Which command helps with an adapter depends on two things: whether it fits its base, which is known if --base or
# --engine asked for it (`fit`), and which part of its life it is in: exported, untrained, or trained. A misfit comes
# first, since every other command would stop at it.
def _next_of_adapter(adapter: Mapping[str, Any]) -> str:
    """Write what one does about an adapter: find its base, train it, export it or serve it."""
    path, served = shlex.quote(adapter["path"]), shlex.quote(f"{adapter['path']}-served")
    fit = adapter.get("fit") or {"fits": True, "engine": None, "misfits": ()}
    kinds = {misfit["kind"] for misfit in fit["misfits"]}
    # `export` itself mends names (--rename), and what only the engine lacks.
    if kinds - {"engine"} and not fit["renames"]:
        return _after_misfit(adapter, kinds)
    if fit["fits"] and adapter["exported"]:
        # What serves it, then what verifies that, if anything does.
        return "\nthen: ".join(filter(None, adapter["exported"].values()))
    if fit["fits"] and adapter["untrained"]:
        return _next_of_untrained(adapter, fit, path)
    if adapter["export"] is None:
        return _PEFT_ALONE
    return _export_command(adapter, fit, path, served, start="DIRECTORY")


def _next_of_untrained(adapter: Mapping[str, Any], fit: Mapping[str, Any], path: str) -> str:
    """Write what one does about an adapter that is to be trained: find its rate, or train and export it."""
    if not adapter["ranks"]:  # PEFT can adapt embeddings alone
        return "train it; rates were measured for linear layers, and it has none"
    if not adapter["train"]:
        return f"lora-init rate {path} DATA --steps 300"
    if adapter["export"] is None:
        return _PEFT_ALONE
    if not adapter["export"]:  # a model that writes no text, which PEFT serves as it is
        return "train it as said above"
    return f"train it as said above; then {_export_command(adapter, fit, 'TRAINED', 'served', start=path)}"


def _export_command(adapter: Mapping[str, Any], fit: Mapping[str, Any], trained: str, output: str, start: str) -> str:
    """Write the command that exports an adapter, for the engine that was asked about or for one that takes it."""
    words = ["lora-init export", trained]
    if fit.get("renames"):
        words.append("--rename")
    if adapter["base_change"]:  # the start is subtracted from what training made of it
        words.append(f"--start {start}")
    if fit["engine"]:
        words.append(f"--engine {fit['engine']}")
    elif adapter["export"]:
        words.append(adapter["export"])
    typed, named = fit.get("base"), adapter["base_model"]
    if typed and not (named and is_same_place(typed, named)):
        words.append(f"--base {shlex.quote(typed)}")
    return " ".join([*words, "-o", output])


def _after_misfit(adapter: Mapping[str, Any], kinds: Collection[str]) -> str:
    """Write what one does about an adapter that does not fit, and that no other names make fit."""
    path, fit, named = shlex.quote(adapter["path"]), adapter["fit"], adapter["base_model"]
    lines = "".join(fit["lines"])
    # It fits the base, and only its form is not the engine's.
    if kinds == {"export"}:
        if adapter["base_change"]:
            options = f"--start DIRECTORY --engine {fit['engine']}"
        elif "--merge-into" in lines:
            options = f"--merge-into {shlex.quote(fit['base'])}"
        else:
            return "do as the misfit says, or serve it with PEFT"
        served = shlex.quote(f"{adapter['path']}-served")
        return f"lora-init export {path} {options} -o {served}"
    if "0.19.1" in lines:  # before which PEFT exchanges A and B of experts
        return "pip install 'peft>=0.19.1', and train it again"
    # The base that was typed is another one than the adapter names.
    if named and named != fit["base"]:
        return f"lora-init inspect {path} --base {shlex.quote(named)}"
    return "name the base that it was trained on by --base, or save it again from the model that it was trained on"


def _safe_command(command: Any) -> str:
    """Return a command from a comparison's settings as quoted words; empty unless it is one of ours and runs no code.

    The directory may be somebody else's, and what is printed here is pasted into a shell.
    """
    with suppress(ValueError):  # a quotation that does not end
        words = shlex.split(str(command))
        if words[:1] == ["lora-init"] and words[1:2] in (["init"], ["compare"]) and _RUNS_CODE not in words:
            return shlex.join(words)  # which quotes `;` and `|`: they are words like others
    return ""


# Each view returns facts, which are laid out in two columns, and then what is printed below them.


def _plan_view(plan: Mapping[str, Any], width: int) -> list[Any]:
    totals, made = plan["totals"], plan["provenance"] or {}
    policy = "by hand"
    if plan["budget"]:
        policy = f"{plan['policy']}, asked for {plan['asked']}"
    mean_rank = totals["total_rank"] / max(totals["layers"], 1)
    head = {
        "file": f"{plan['path']}: plan for {totals['layers']} of {len(plan['layers'])} layers",
        "policy": policy,
        "rank": f"{mean_rank:.3g} on average, {totals['total_rank']:,} in all",
        "parameters": f"{totals['parameters']:,}",
        "explained": f"{totals['explained_variance']:.1%} of a layer's variance on average",
        "model": f"{made.get('model_class', 'any')} {made.get('model_id', '')}".strip(),
        "data": made.get("data") or "not described",
    }
    return [head, "", rank_table(plan["ranks"], width), *plan["notes"]]


def _statistics_view(stats: Mapping[str, Any], width: int) -> list[Any]:
    targets = str(stats["target_modules"])
    if stats["exclude_modules"]:
        targets += f" without {stats['exclude_modules']}"
    tokens = "those with a label" if stats["token_mask"] == "labels" else "all but padding"
    decomposition = "centered (PCA)" if stats["center"] else "not centered (second moment)"
    head = {
        "file": f"{stats['path']}: statistics of {len(stats['layers'])} layers",
        "model": f"{stats['model_class']} {stats['model_id']}".strip(),
        "fingerprint": stats["fingerprint"],
        "targets": targets,
        "data": stats["data"] or "not described",
        "tokens": tokens,
        "rows": rows_read(stats),
        "decomposition": decomposition,
        "made for": f"rank {stats['rank']} with seed {stats['seed']}",
        "made with": ", ".join(f"{name} {version}" for name, version in stats["versions"].items()),
    }
    # Layers that were selected and have no statistics: PEFT gives them an adapter with its own start.
    unsupported = {name: f"no spectrum, {kind}." for name, kind in stats["unsupported"].items()}
    return [head, "", _spectrum_table(stats["layers"]), *stats["notes"], *one_line_each(unsupported)]


def _spectrum_table(layers: Mapping[str, Mapping[str, Any]]) -> Cells:
    """Show the share of variance that the first components capture, median over the layers of a kind."""
    collected = max((len(layer["explained_variance_ratio"]) for layer in layers.values()), default=0)
    # Powers of four, and all that was collected.
    counts = [count for count in (1, 4, 16, 64, 256) if count < collected] + [collected]
    rows = []
    for kind, names in layer_grid(layers).by_kind.items():
        group = [layers[name] for name in names.values()]
        widths = dict.fromkeys(str(layer["in_features"]) for layer in group)  # without repetition, in model order
        row = {"layers": kind, "count": str(len(group)), "d_in": "/".join(widths)}
        for count in counts:
            shares = [sum(layer["explained_variance_ratio"][:count]) for layer in group]
            row[f"top {count}"] = f"{median(shares):.1%}"
        held_out = [layer["held_out"] for layer in group if layer["held_out"] is not None]
        row["held out"] = f"{median(held_out):.1%}" if held_out else "-"
        rows.append(row)
    return Cells(rows)


# Sentences of a comparison beside its verdicts, in the order of its report.
_FURTHER_SENTENCES = ("as_recommended", "equal_time", "forgetting", "data_needed")


def _runs_view(comparison: Mapping[str, Any], width: int) -> list[Any]:
    head = {
        "directory": f"{comparison['path']}: comparison of starts",
        "from": comparison["facts"],
        "found": comparison["headline"],
        "answer": comparison["answer"],
    }
    # Caveats stand before the figures that they are about.
    caveats = [f"note: {text}" for text in (*comparison["caveats"], *comparison["notes"])]
    sentences = [verdict["sentence"] for verdict in comparison["verdicts"]]
    for name in _FURTHER_SENTENCES:
        sentences += comparison[name]
    return [head, *caveats, "", comparison["headroom"], *sentences]


def _adapter_view(adapter: Mapping[str, Any], width: int) -> list[Any]:
    ranks = adapter["ranks"]
    scaling = [str(adapter["lora_alpha"])]
    if adapter["use_rslora"]:
        scaling.append("rsLoRA")
    if adapter["use_dora"]:
        scaling.append("DoRA")
    head = {
        "directory": f"{adapter['path']}: LoRA adapter of {len(ranks)} layers",
        "base model": str(adapter["base_model"] or "not named"),
        "task type": str(adapter["task_type"] or "none"),
        "rank": f"{mean(ranks.values() or [0]):.3g} on average, {min(ranks.values(), default=0)} to "
        f"{max(ranks.values(), default=0)}; r={adapter['rank']}",
        "lora_alpha": " with ".join(scaling),
        "parameters": f"{adapter['parameters']:,}",
        "start": "unknown: lora_init did not make it",
    }
    if adapter["exported"]:
        head["start"] = "not kept by an export: see the adapter as it was trained"
    if adapter["origin"]:
        head |= _origin_facts(adapter["origin"], adapter["train"])
    if adapter["dial"]:
        from lora_init.keep.dialed import summary_of

        head |= summary_of(adapter["dial"]) | {"picture": adapter["dial"]["picture"]}
    view = [head, "", rank_table(ranks, width)]
    if adapter.get("fit", {"fits": True})["fits"]:  # who serves it would contradict a misfit
        view += ["", adapter["serving"]]
    # These are there if options of `inspect` asked for them.
    if "intruders" in adapter:
        view += _intruder_view(adapter["intruders"], width)
    if "fit" in adapter:
        view += _fit_view(adapter["fit"])
    if "merge" in adapter:
        view += _merge_view(adapter["merge"])
    return view


def _origin_facts(origin: Mapping[str, Any], train: str | None) -> dict[str, str]:
    """Lay out where an adapter comes from, and how to train it."""
    source, shares = origin.get("provenance", {}), list(origin.get("explained", {}).values())
    start = str(origin.get("method"))
    if origin.get("package"):  # a start that another package brings
        start += f" ({origin['package']})"
    if origin.get("whiten"):
        start += ", whitened"
    if origin.get("unit_rows"):
        start += ", rows of length one"
    rows = {"start": f"{start}, seed {origin.get('seed')}"}
    if source.get("quantisation"):  # so spelt in the files
        rows["base"] = f"quantized: {quantization_name(source['quantisation'])}"
    if origin.get("correction"):
        rows |= correction_facts(origin["correction"])
    if train:
        rows["train"] = train
    rows["data"] = source.get("data") or "not described"
    rows["rows"] = rows_read(source)
    if shares:
        rows["captured"] = f"median {median(shares):.1%}, least {min(shares):.1%} of a layer's variance"
    return rows


def _fit_view(fit: Mapping[str, Any]) -> list[Any]:
    base = f"{fit['model_class']} {fit['base']}"
    if fit["engine"]:
        base += f" in {fit['engine']}"
    if fit["fits"]:
        verdict = f"all {fit['tensors']} tensors are applied"
    else:
        # A line stands for all tensors that have one fault, so there may be fewer lines than names.
        names = {misfit["where"] for misfit in fit["misfits"]}
        verdict = f"no: {len(names)} {'name' if len(names) == 1 else 'names'} below"
    misfits = [f"misfit: {line}" for line in fit["lines"]]
    return ["", facts({"fits": f"{base}: {verdict}"}), *misfits, *fit["notes"]]


def _merge_view(merge: Mapping[str, Any]) -> list[Any]:
    """Show what `describe_merge` returned: the whole, and the layers that lose most."""
    layers, divergence = merge["layers"], merge["divergence"]
    worst = sorted(layers, key=lambda name: -layers[name]["noise"])[:3]
    counted = "where the data are" if merge["statistics"] else "over all weights"
    head = {
        "merge": f"into {merge['base']}, rounded to {merge['type']}",
        "arrives": f"{merge['arrives']:.1%} of the change, under {merge['noise']:.2g} times as much noise, {counted}",
        "noisiest": ", ".join(f"{name} {layers[name]['noise']:.2g}" for name in worst),
    }
    if divergence:
        head["measured"] = (
            f"{divergence['merged']:.2g} nats a token from the adapter on its base, on {divergence['tokens']} tokens; "
            f"the base without it is {divergence['base']:.2g} away; computed in {divergence['computed_in']}, whatever "
            "is served"
        )
    return ["", facts(head | {"advice": merge["advice"]})]


def _intruder_view(intruders: Mapping[str, Any], width: int) -> list[Any]:
    """Show what `describe_intruders` returned: totals, and all layers by block."""
    layers = intruders["layers"]
    head = {
        "intruders": f"{intruders['count']:,} of {intruders['of']:,}, "
        f"the first {intruders['k']} directions of each weight",
        "criterion": f"|cosine| below {intruders['threshold']} "
        f"with every direction of the same weight of {intruders['model']}",
        "energy": f"{intruders['energy_share']:.1%} of the energy of these directions",
    }
    # Layers that are no linear ones, with the kind that they are instead.
    skipped = [f"{name} ({kind}) has no singular vectors to compare." for name, kind in intruders["skipped"].items()]
    counts = {name: layer["count"] for name, layer in layers.items()}
    return ["", facts(head), *skipped, "", rank_table(counts, width)]  # counts instead of ranks in the same heat map
