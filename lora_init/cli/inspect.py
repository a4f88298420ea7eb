"""The commands `lora-init inspect` and `merge`: what files and directories hold, and several statistics as one."""

from __future__ import annotations

import math
import shlex
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, Option

from lora_init.adapters.asked import Reading
from lora_init.cli.console import FAILED, busy, importing, offered, print_next, print_result, refuse_idle
from lora_init.cli.options import Length, TrustRemoteCode, read_numbers
from lora_init.cli.tables import Cells, correction_facts, facts, finite, quantization_name, rank_table, rows_read
from lora_init.errors import LoraInitError, first_line, require
from lora_init.files import check_writable, is_as_written, read_json
from lora_init.layers.grid import layer_grid, one_line_each
from lora_init.rates.learning_rate import LearningRate, training_in_words
from lora_init.serving.engines import ENGINES

if TYPE_CHECKING:
    from rich.console import Console


_RUNS_CODE = "--trust-remote-code"  # which nobody but the user asks for
_MERGED_SAMPLES = 32  # examples at most, of which the divergence takes 512 tokens

EXAMPLE = """\b
Example:
$ lora-init inspect trained --base MODEL --engine vllm
"""


def inspect(
    paths: Annotated[
        list[Path], Argument(help="Statistics, plans, or directories of adapters or comparisons.", show_default=False)
    ],
    intruders: Annotated[
        bool, Option(help="Count directions of the trained weights that the base model did not have.")
    ] = False,
    merge_type: Annotated[
        Literal["bfloat16", "float16", "int8", "nf4"] | None,
        Option("--merge", help="How much of a trained adapter is there after a merge that is rounded to this type."),
    ] = None,
    base: Annotated[
        str | None,
        Option(
            "--base", "--model", help="Check that an adapter fits this base, or the base for --intruders or --merge."
        ),
    ] = None,
    engine: Annotated[
        str | None, Option(help=f"Check that an adapter fits its base in one of {', '.join(ENGINES)}.")
    ] = None,
    statistics: Annotated[
        Path | None, Option(help="With --merge: statistics of the base, to count rounding where the data are.")
    ] = None,
    data: Annotated[str | None, Option(help="With --merge: data to measure the divergence on, as for init.")] = None,
    *,
    length: Length,
    reading: Reading,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Print what statistics, a plan, an adapter or a comparison are: of which model and data, and what is in them.

    With --base or --engine the exit status is 1 if anything of an adapter would not be applied to its base.
    """
    _check_options(merge_type, data, statistics)
    checks = engine is not None or (base is not None and not (intruders or merge_type))
    descriptions = []
    for path in paths:
        fit = {"fit": describe_fit(path, base, engine)} if checks else {}
        with _damage_of(path):
            descriptions.append(describe(path, length, base) | fit)
    if not any(one.get("train") for one in descriptions):
        refuse_idle(offered(Length), "only the rate of an adapter that is not trained yet depends on it")
    for path, about in zip(paths, descriptions, strict=True):
        if intruders:
            about["intruders"] = describe_intruders(path, about, base, trust_remote_code)
        if merge_type:
            about["merge"] = describe_merge(path, merge_type, base, statistics, data, reading)

    with _damage_of(*paths):
        several = descriptions if len(paths) > 1 else descriptions[0]
        print_result(several, lambda console, _: _show_all(console, paths, descriptions))
    if checks and not all(one["fit"]["fits"] for one in descriptions):
        raise SystemExit(FAILED)


def _check_options(merge_type: str | None, data: str | None, statistics: Path | None) -> None:
    if not merge_type and (data or statistics):
        raise LoraInitError("--data and --statistics are for --merge.")
    if data is None:
        refuse_idle(offered(Reading), "that is for --data")


def _show_all(console: Console, paths: list[Path], descriptions: list[dict[str, Any]]) -> None:
    for path, description in zip(paths, descriptions, strict=True):
        with _damage_of(path):
            show(console, description)


MERGE_EXAMPLE = """\b
Example:
$ lora-init merge chat.safetensors code.safetensors --weights 0.7,0.3 \\
    -o mixed.safetensors
"""


def merge(
    files: Annotated[
        list[Path], Argument(help="Statistics files of one model, from lora-init init.", show_default=False)
    ],
    output: Annotated[Path, Option("--output", "-o", help="Statistics file to write.", show_default=False)],
    weights: Annotated[
        str | None, Option(help="Share of each file, as 0.7,0.3. Default: each row counts once.")
    ] = None,
    overwrite: Annotated[bool, Option(help="Replace the file that is there.")] = False,
) -> None:
    """Merge statistics FILES of one model: shards of one data set, data that came later, or a mixture by weights."""
    check_writable(output, overwrite, "statistics file")
    shares = None if weights is None else read_numbers("--weights", weights, float)
    from lora_init.statistics.statistics import Statistics

    parts = [Statistics.load(file) for file in files]
    merged = parts[0].merge(*parts[1:], weights=shares)
    print_result(describe(merged.save(output.expanduser())), show, written=True)


@contextmanager
def _damage_of(*paths: Path) -> Iterator[None]:
    """Raise that a file is damaged where what it says has another form than anything lora_init or PEFT writes."""
    try:
        yield
    except LoraInitError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        where = ", ".join(map(str, paths))
        raise LoraInitError(f"{where} is damaged: {type(error).__name__} {first_line(error)} Make it again.") from error


def describe_fit(path: Path, base: str | None, engine: str | None) -> dict[str, Any]:
    """Check that an adapter fits its base, by the headers of their files."""
    with importing(base):
        from lora_init.serving.fit import check_fit
    with _damage_of(path):
        report = check_fit(path, base, engine)
        return report.to_dict() | {"lines": report.lines, "engine": engine}


def describe_intruders(
    path: Path, about: Mapping[str, Any], model: str | None, trust_remote_code: bool
) -> dict[str, Any]:
    """Load the base model of an adapter directory, and count its intruder dimensions, layers in model order."""
    require("scipy")
    if about["what"] != "adapter":
        raise LoraInitError(
            f"{path} is no adapter ({about['what']}), and --intruders is about a trained one. Name its directory."
        )
    source = model or about["base_model"]
    if not source:
        raise LoraInitError(f"{path} does not name its base model. Name it with --base.")
    with importing(source):
        from lora_init.adapters.intruders import THRESHOLD, K, intruder_dimensions
        from lora_init.loading.models import TASK_TYPES, load_model
    task_type = about["task_type"] if about["task_type"] in TASK_TYPES else None
    with busy(f"loading {source}"):
        loaded = load_model(source, task_type=task_type, device="cpu", trust_remote_code=trust_remote_code)
    with busy("decomposing the weights"):
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


def describe_merge(
    path: Path, dtype: str, base: str | None, statistics: Path | None, data: str | None, reading: Reading
) -> dict[str, Any]:
    """Compute what is there of an adapter after a merge that is rounded to a type, layer by layer; measure it on data.

    The base's weights are read tensor by tensor, and loaded only where there are data.
    """
    with importing(data=data):
        from lora_init.adapters.directory import AdapterDirectory
        from lora_init.loading.batches import load_batches
        from lora_init.loading.models import load_model
        from lora_init.serving.base import plan_merge, read_base
        from lora_init.serving.kept import Kept, divergence, kept_by_merge
        from lora_init.serving.trained import read_trained, with_parameters
        from lora_init.statistics.statistics import Statistics
    trained = read_trained(path)
    plain = read_base(base or trained.base, trained)
    trained = with_parameters(trained, plain.parameters)
    stats = None if statistics is None else Statistics.load(statistics)
    with busy(f"merging into {plain.source}"):
        layers = kept_by_merge(plain, trained, plan_merge(plain, trained), dtype, stats)
    total, measured, lost = sum(layers.values(), Kept()), None, None
    if data is not None:
        with busy(f"loading {plain.source}"):
            loaded = load_model(plain.source, dtype="float32")
        batches = load_batches(data, loaded.tokenizer, **vars(reading), samples=_MERGED_SAMPLES)
        with busy("measuring"):
            found = divergence(loaded.model, AdapterDirectory(path), batches, dtype)
        measured, lost = asdict(found) | {"computed_in": "float32"}, found.lost
    return {
        "base": plain.source, "type": dtype, "statistics": stats is not None, "divergence": measured,
        "arrives": finite(total.arrives), "noise": finite(total.ratio), "advice": total.advice(lost),
        "layers": {n: {"arrives": finite(one.arrives), "noise": finite(one.ratio)} for n, one in layers.items()},
    }  # fmt: skip


def describe(path: str | Path, length: Length | None = None, base: str | None = None) -> dict[str, Any]:
    """Read what statistics, a plan, an adapter or a comparison are and hold, as plain values.

    Any LoRA directory of PEFT will do; where it comes from is known only if lora_init made it, before or after
    training. Of statistics only shapes are read.
    """
    path = Path(path).expanduser()
    if path.is_dir() and (path / "settings.json").is_file() and not (path / "adapter_config.json").is_file():
        require("scipy")  # for the intervals
        from lora_init.comparison.report import describe_directory

        return describe_directory(path)
    if path.is_dir():
        return _describe_adapter(path, length or Length(), base)
    if not path.exists():
        raise LoraInitError(
            f"{path}: no such file or directory. Expected statistics, a plan, an adapter directory or a comparison."
        )
    with path.open("rb") as file:
        start = file.read(9)
    if start.startswith(b"{"):
        return _describe_plan(path)
    if start[8:9] != b"{":  # a safetensors file begins with a length and JSON
        raise LoraInitError(f"{path} is neither statistics nor a plan. Name what lora-init has written.")
    return _describe_statistics(path)


def _describe_plan(path: Path) -> dict[str, Any]:
    from lora_init.planning.plan import load_plan, plan_to_dict

    plan = load_plan(path)
    return {"what": "plan", "path": str(path), **plan_to_dict(plan), "ranks": dict(plan), "asked": str(plan.budget)}


def _describe_statistics(path: Path) -> dict[str, Any]:
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


def _describe_adapter(path: Path, length: Length, base: str | None) -> dict[str, Any]:
    from lora_init.adapters.directory import AdapterDirectory
    from lora_init.serving.export import exported_as
    from lora_init.serving.support import export_options, serving_note

    directory = AdapterDirectory(path)
    directory.check_values()
    config, shapes, origin, ranks = directory.config, directory.shapes, directory.origin, directory.ranks
    rate = LearningRate.read(origin["rate"], **vars(length)) if "rate" in origin else None
    untrained, asked = directory.is_untrained, origin.get("learning_rate")
    everywhere = _with_gaps(ranks) | dict.fromkeys(origin.get("left_out", ()), 0)
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
        "target_parameters": config.get("target_parameters") or [],
        "parameters": sum(math.prod(shape) for key, shape in shapes.items() if ".lora_" in key),
        "ranks": {name: ranks[name] for name in [*known, *(name for name in ranks if name not in known)]},
        "origin": origin or None,
        "train": training_in_words(rate, asked) if origin and (untrained or rate or asked) else None,
        "dial": _describe_dial(path),
        "base_change": directory.base_change,
        "untrained": untrained,
        "exported": exported_as(path, base),
        "serving": serving_note(everywhere, config, shapes, directory.base_change),
        "export": export_options(config, shapes),
    }


def _describe_dial(path: Path) -> dict[str, Any] | None:
    """Read what the dial has measured of an adapter, and where its picture is; None if the dial did not write it."""
    from lora_init.keep.dialed import PICTURE_FILE
    from lora_init.serving.trained import DIAL_FILE

    if not is_as_written(path, DIAL_FILE):
        return None
    return {**read_json(path / DIAL_FILE), "picture": str(path / PICTURE_FILE)}


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
    layers, found = about["layers"], about["divergence"]
    worst = sorted(layers, key=lambda name: -layers[name]["noise"])[:3]
    counted = "where the data are" if about["statistics"] else "over all weights"
    head = {
        "merge": f"into {about['base']}, rounded to {about['type']}",
        "arrives": f"{about['arrives']:.1%} of the change, under {about['noise']:.2g} times as much noise, {counted}",
        "noisiest": ", ".join(f"{name} {layers[name]['noise']:.2g}" for name in worst),
    }
    if found:
        head["measured"] = (
            f"{found['merged']:.2g} nats a token from the adapter on its base, on {found['tokens']} tokens; the base "
            f"without it is {found['base']:.2g} away; computed in {found['computed_in']}, whatever is served"
        )
    return ["", facts(head | {"advice": about["advice"]})]


def _with_gaps(ranks: Mapping[str, int]) -> dict[str, int]:
    """Add the layers that have no adapter while others of their kind have one: they are not in the directory."""
    grid, whole = layer_grid(ranks), dict(ranks)
    for layers in grid.by_kind.values():
        block, name = next(iter(layers.items()))
        gaps = [other for other in grid.blocks if other >= 0 and other not in layers]
        whole |= {name.replace(f".{block}.", f".{other}.", 1): 0 for other in gaps if block >= 0}
    return whole


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
