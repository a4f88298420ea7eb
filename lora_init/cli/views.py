"""What `describe` returned, printed: statistics, a plan, an adapter or a comparison; and the command to run next."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from contextlib import suppress
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from lora_init.cli.console import print_next
from lora_init.cli.tables import Cells, correction_facts, facts, quantization_name, rank_table, rows_read
from lora_init.layers.grid import layer_grid, one_line_each

if TYPE_CHECKING:
    from rich.console import Console

_RUNS_CODE = "--trust-remote-code"  # which nobody but the user asks for


def show(console: Console, about: Mapping[str, Any]) -> None:
    """Print what `describe` returned."""
    views = {"statistics": _statistics_view, "plan": _plan_view, "adapter": _adapter_view, "comparison": _runs_view}
    head, *body = views[about["what"]](about, console.width)
    console.print(facts(head))
    for renderable in body:
        console.print(renderable, markup=False)
    print_next(console, _next(about))


def _next(about: Mapping[str, Any]) -> str:
    """Write the command that one runs next."""
    path = shlex.quote(about["path"])
    if about["what"] in ("statistics", "plan"):
        option = "--ranks" if about["what"] == "plan" else "--statistics"
        return f"lora-init init MODEL {option} {path} -o adapter"
    if about["what"] == "comparison":
        asked = about["command"] or about["settings"].get("command")
        return _anew(asked) or f"lora-init compare MODEL DATA -o {path}"
    return _next_of_adapter(about)


def _next_of_adapter(about: Mapping[str, Any]) -> str:
    """Write what one does about an adapter: find its base, train it, export it or serve it."""
    path, served = shlex.quote(about["path"]), shlex.quote(f"{about['path']}-served")
    fit = about.get("fit") or {"fits": True, "engine": None, "misfits": ()}
    kinds = {one["kind"] for one in fit["misfits"]}
    if kinds - {"engine"} and not fit["renames"]:
        return _after_misfit(about, kinds)
    if fit["fits"] and about["exported"]:
        return "\nthen: ".join(filter(None, about["exported"].values()))
    if fit["fits"] and about["untrained"]:
        return _next_of_untrained(about, fit, path)
    if about["export"] is None:
        return "load it with PEFT, which alone takes it"
    return _export_command(about, fit, path, served, start="DIRECTORY")


def _next_of_untrained(about: Mapping[str, Any], fit: Mapping[str, Any], path: str) -> str:
    """Write what one does about an adapter that is to be trained: find its rate, or train and export it."""
    if not about["ranks"]:
        return "train it; rates were measured for linear layers, and it has none"
    if not about["train"]:
        return f"lora-init rate {path} DATA --steps 300"
    if about["export"] is None:
        return "load it with PEFT, which alone takes it"
    if not about["export"]:
        return "train it as said above"
    return f"train it as said above; then {_export_command(about, fit, 'TRAINED', 'served', start=path)}"


def _export_command(about: Mapping[str, Any], fit: Mapping[str, Any], trained: str, output: str, start: str) -> str:
    """Write the command that exports an adapter, for the engine that was asked about or for one that takes it."""
    options = ["--rename"] * bool(fit.get("renames")) + [f"--start {start}"] * bool(about["base_change"])
    options.append(f"--engine {fit['engine']}" if fit["engine"] else about["export"])
    return " ".join(["lora-init export", trained, *filter(None, options), "-o", output])


def _after_misfit(about: Mapping[str, Any], kinds: Collection[str]) -> str:
    """Write what one does about an adapter that does not fit, and that no other names make fit."""
    path, fit, named = shlex.quote(about["path"]), about["fit"], about["base_model"]
    if kinds == {"export"}:
        more = f"--merge-into {shlex.quote(fit['base'])}" if "--merge-into" in "".join(fit["lines"]) else ""
        more = f"--start DIRECTORY --engine {fit['engine']}" if about["base_change"] else more
        served = shlex.quote(f"{about['path']}-served")
        return f"lora-init export {path} {more} -o {served}" if more else "do as the misfit says, or serve it with PEFT"
    if "0.19.1" in "".join(fit["lines"]):  # before which PEFT exchanges A and B of experts
        return "pip install 'peft>=0.19.1', and train it again"
    if named and named != fit["base"]:
        return f"lora-init inspect {path} --base {shlex.quote(named)}"
    return "name the base that it was trained on by --base, or save it again from the model that it was trained on"


def _anew(command: Any) -> str:
    """Write a command of a comparison's settings anew, as words alone; empty where it is none of ours, or runs code."""
    with suppress(ValueError):
        words = shlex.split(str(command))
        if words[:1] == ["lora-init"] and words[1:2] in (["init"], ["compare"]) and _RUNS_CODE not in words:
            return shlex.join(words)
    return ""


def _plan_view(about: Mapping[str, Any], width: int) -> list[Any]:
    totals, made = about["totals"], about["provenance"] or {}
    head = {
        "file": f"{about['path']}: plan for {totals['layers']} of {len(about['layers'])} layers",
        "policy": f"{about['policy']}, asked for {about['asked']}" if about["budget"] else "by hand",
        "rank": f"{totals['total_rank'] / max(totals['layers'], 1):.3g} on average, {totals['total_rank']:,} in all",
        "parameters": f"{totals['parameters']:,}",
        "explained": f"{totals['explained_variance']:.1%} of a layer's variance on average",
        "model": f"{made.get('model_class', 'any')} {made.get('model_id', '')}".strip(),
        "data": made.get("data") or "not described",
    }
    return [head, "", rank_table(about["ranks"], width), *about["notes"]]


def _statistics_view(about: Mapping[str, Any], width: int) -> list[Any]:
    excluded = f" without {about['exclude_modules']}" if about["exclude_modules"] else ""
    head = {
        "file": f"{about['path']}: statistics of {len(about['layers'])} layers",
        "model": f"{about['model_class']} {about['model_id']}".strip(),
        "fingerprint": about["fingerprint"],
        "targets": f"{about['target_modules']}{excluded}",
        "data": about["data"] or "not described",
        "tokens": "those with a label" if about["token_mask"] == "labels" else "all but padding",
        "rows": rows_read(about),
        "decomposition": "centered (PCA)" if about["center"] else "not centered (second moment)",
        "made for": f"rank {about['rank']} with seed {about['seed']}",
        "made with": ", ".join(f"{name} {version}" for name, version in about["versions"].items()),
    }
    without = one_line_each({name: f"no spectrum, {kind}." for name, kind in about["unsupported"].items()})
    return [head, "", _spectrum_table(about["layers"]), *about["notes"], *without]


def _spectrum_table(layers: Mapping[str, Mapping[str, Any]]) -> Cells:
    """Show the share of variance that the first components capture, median over the layers of a kind."""
    collected = max((len(layer["explained_variance_ratio"]) for layer in layers.values()), default=0)
    counts = [count for count in (1, 4, 16, 64, 256) if count < collected] + [collected]
    rows = []
    for kind, names in layer_grid(layers).by_kind.items():
        group = [layers[name] for name in names.values()]
        shares = [[sum(layer["explained_variance_ratio"][:count]) for layer in group] for count in counts]
        held_out = [layer["held_out"] for layer in group if layer["held_out"] is not None]
        widths = dict.fromkeys(str(layer["in_features"]) for layer in group)
        rows.append(
            {"layers": kind, "count": str(len(group)), "d_in": "/".join(widths)}
            | {f"top {count}": f"{median(share):.1%}" for count, share in zip(counts, shares, strict=True)}
            | {"held out": f"{median(held_out):.1%}" if held_out else "-"}
        )
    return Cells(rows)


# What a comparison says beside its verdicts.
_SAID = ("as_recommended", "equal_time", "forgetting", "data_needed")


def _runs_view(about: Mapping[str, Any], width: int) -> list[Any]:
    head = {
        "directory": f"{about['path']}: comparison of starts",
        "from": about["facts"],
        "found": about["headline"],
        "answer": about["answer"],
    }
    sentences = [verdict["sentence"] for verdict in about["verdicts"]]
    more = [sentence for name in _SAID for sentence in about[name]]
    caveats = [f"note: {text}" for text in (*about["caveats"], *about["notes"])]
    return [head, *caveats, "", about["headroom"], *sentences, *more]


def _adapter_view(about: Mapping[str, Any], width: int) -> list[Any]:
    ranks = about["ranks"]
    extras = [text for flag, text in (("use_rslora", "rsLoRA"), ("use_dora", "DoRA")) if about[flag]]
    head = {
        "directory": f"{about['path']}: LoRA adapter of {len(ranks)} layers",
        "base model": str(about["base_model"] or "not named"),
        "task type": str(about["task_type"] or "none"),
        "rank": f"{mean(ranks.values() or [0]):.3g} on average, {min(ranks.values(), default=0)} to "
        f"{max(ranks.values(), default=0)}; r={about['rank']}",
        "lora_alpha": " with ".join([str(about["lora_alpha"]), *extras]),
        "parameters": f"{about['parameters']:,}",
        "start": "unknown: lora_init did not make it",
    }
    if about["exported"]:
        head["start"] = "not kept by an export: see the adapter as it was trained"
    if about["origin"]:
        head |= _origin_facts(about["origin"], about["train"])
    if about["dial"]:
        from lora_init.keep.dialed import summary_of

        head |= summary_of(about["dial"]) | {"picture": about["dial"]["picture"]}
    views = [head, "", rank_table(ranks, width), "", about["serving"]]
    views += _intruder_view(about["intruders"], width) if "intruders" in about else []
    views += _fit_view(about["fit"]) if "fit" in about else []
    return [*views, *_merge_view(about["merge"])] if "merge" in about else views


def _origin_facts(origin: Mapping[str, Any], train: str | None) -> dict[str, str]:
    """Lay out where an adapter comes from, and how to train it."""
    source, shares = origin.get("provenance", {}), list(origin.get("explained", {}).values())
    whitened = ", whitened" * bool(origin.get("whiten")) + ", rows of length one" * bool(origin.get("unit_rows"))
    package = f" ({origin['package']})" if origin.get("package") else ""
    rows = {"start": f"{origin.get('method')}{package}{whitened}, seed {origin.get('seed')}"}
    if source.get("quantisation"):
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


def _fit_view(about: Mapping[str, Any]) -> list[Any]:
    of = f"{about['model_class']} {about['base']}" + (f" in {about['engine']}" if about["engine"] else "")
    names = {one["where"] for one in about["misfits"]}
    said = f"all {about['tensors']} tensors are applied" if about["fits"] else f"no: {len(names)} names below"
    return ["", facts({"fits": f"{of}: {said}"}), *(f"misfit: {line}" for line in about["lines"]), *about["notes"]]


def _merge_view(about: Mapping[str, Any]) -> list[Any]:
    """Show what `describe_merge` returned: the whole, and the layers that lose most."""
    layers, divergence = about["layers"], about["divergence"]
    worst = sorted(layers, key=lambda name: -layers[name]["noise"])[:3]
    counted = "where the data are" if about["statistics"] else "over all weights"
    head = {
        "merge": f"into {about['base']}, rounded to {about['type']}",
        "arrives": f"{about['arrives']:.1%} of the change, under {about['noise']:.2g} times as much noise, {counted}",
        "noisiest": ", ".join(f"{name} {layers[name]['noise']:.2g}" for name in worst),
    }
    if divergence:
        head["measured"] = (
            f"{divergence['merged']:.2g} nats a token from the adapter on its base, on {divergence['tokens']} tokens; "
            f"the base without it is {divergence['base']:.2g} away; computed in {divergence['computed_in']}, whatever "
            "is served"
        )
    return ["", facts(head | {"advice": about["advice"]})]


def _intruder_view(about: Mapping[str, Any], width: int) -> list[Any]:
    """Show what `describe_intruders` returned: totals, and all layers by block."""
    layers = about["layers"]
    head = {
        "intruders": f"{about['count']:,} of {about['of']:,}, the first {about['k']} directions of each weight",
        "criterion": f"|cosine| below {about['threshold']} with every direction of the same weight of {about['model']}",
        "energy": f"{about['energy_share']:.1%} of the energy of these directions",
    }
    skipped = [f"{name} ({kind}) has no singular vectors to compare." for name, kind in about["skipped"].items()]
    counts = {name: layer["count"] for name, layer in layers.items()}
    return ["", facts(head), *skipped, "", rank_table(counts, width)]
