"""What statistics, plans, adapters and comparisons hold, as plain values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_init.adapters.init_config import Reading
from lora_init.cli.console import busy, importing
from lora_init.cli.options import Length
from lora_init.cli.tables import finite
from lora_init.errors import LoraInitError, first_line, require
from lora_init.files import is_as_written, read_json
from lora_init.layers.grid import layer_grid
from lora_init.rates.learning_rate import LearningRate, training_in_words

_MERGED_SAMPLES = 32  # examples at most, of which the divergence takes 512 tokens


# Files that are inspected may come from anybody, and their fields have any type. One net around the reading is less
# than a check at every field, and `LoraInitError`, which already says what is wrong, passes through.
@contextmanager
def damage_of(*paths: Path) -> Iterator[None]:
    """Raise that a file is damaged, where its content has a form that neither lora_init nor PEFT writes."""
    try:
        yield
    except LoraInitError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        where = ", ".join(map(str, paths))
        # With the name of the type, since a KeyError's text is a key alone.
        raise LoraInitError(f"{where} is damaged: {type(error).__name__} {first_line(error)} Make it again.") from error


def describe_fit(path: Path, base: str | None, engine: str | None, trust_remote_code: bool) -> dict[str, Any]:
    """Check that an adapter fits its base, by the headers of their files."""
    with importing(base):
        from lora_init.serving.fit import check_fit
    with damage_of(path):
        report = check_fit(path, base, engine, trust_remote_code=trust_remote_code)
        return report.to_dict() | {"lines": report.lines, "engine": engine}


def describe_intruders(
    path: Path, description: Mapping[str, Any], model: str | None, trust_remote_code: bool
) -> dict[str, Any]:
    """Load the base model of an adapter directory, and count its intruder dimensions, layers in model order."""
    require("scipy")
    if description["what"] != "adapter":
        raise LoraInitError(
            f"{path} is no adapter ({description['what']}), and --intruders is about a trained one. Name its directory."
        )
    source = model or description["base_model"]
    if not source:
        raise LoraInitError(f"{path} does not name its base model. Name it with --base.")
    with importing(source):
        from lora_init.adapters.directory import AdapterDirectory
        from lora_init.loading.models import TASK_TYPES, load_model
        from lora_init.serving.intruders import THRESHOLD, K, intruder_dimensions
    # PEFT writes task types that no head of ours stands for; the checkpoint's own class decides then.
    task_type = description["task_type"] if description["task_type"] in TASK_TYPES else None
    with busy(f"loading {source}"):
        n_labels = AdapterDirectory(path).n_labels
        loaded = load_model(
            source, task_type=task_type, trust_remote_code=trust_remote_code, device="cpu", n_labels=n_labels
        )
    with busy("decomposing the weights"):
        intruders = intruder_dimensions(loaded.model, path)
    layers = {}
    for name, layer in intruders.layers.items():
        layers[name] = {
            "count": layer.count,
            "of": layer.of,
            "energy_share": finite(layer.energy_share),
            "least_similarity": finite(min(layer.similarities)),
        }
    return {
        "model": source,
        "k": K,
        "threshold": THRESHOLD,
        "count": intruders.count,
        "of": intruders.of,
        "energy_share": finite(intruders.energy_share),
        "skipped": dict(intruders.skipped),
        "layers": layers,
    }


def describe_merge(
    path: Path, dtype: str, base: str | None, statistics: Path | None, data: str | None, reading: Reading,
    trust_remote_code: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Compute how much of an adapter is left after a merge that is rounded to a type, by layer; measure it on data.

    The base's weights are read tensor by tensor, and loaded only where there are data.
    """
    with importing(data=data):
        from lora_init.adapters.directory import AdapterDirectory
        from lora_init.loading.batches import load_batches
        from lora_init.loading.models import load_model
        from lora_init.serving.base import bring_checkpoint, plan_merge, read_base, with_changed_copies
        from lora_init.serving.kept import Kept, divergence, kept_by_merge
        from lora_init.serving.trained import read_trained, with_parameters
        from lora_init.statistics.statistics import Statistics
    trained = read_trained(path)
    plain = read_base(base or trained.base, trained, trust_remote_code=trust_remote_code)
    bring_checkpoint(plain.source, trained)
    trained = with_changed_copies(with_parameters(trained, plain.parameters), plain)
    stats = None if statistics is None else Statistics.load(statistics)
    with busy(f"merging into {plain.source}"):
        layers = kept_by_merge(plain, trained, plan_merge(plain, trained), dtype, stats)
    total = sum(layers.values(), Kept())  # adds the parts of the ratios, so that those are of the whole adapter
    measured, lost = None, None
    if data is not None:
        # In float32, so that only the merge rounds, and not the pass that measures it.
        with busy(f"loading {plain.source}"):
            loaded = load_model(plain.source, dtype="float32", trust_remote_code=trust_remote_code)
        batches = load_batches(data, loaded.tokenizer, **vars(reading), samples=_MERGED_SAMPLES)
        with busy("measuring"):
            diverged = divergence(loaded.model, AdapterDirectory(path), batches, dtype)
        measured, lost = asdict(diverged) | {"computed_in": "float32"}, diverged.lost
    return {
        "base": plain.source, "type": dtype, "statistics": stats is not None, "divergence": measured,
        "arrives": finite(total.arrives), "noise": finite(total.ratio), "advice": total.advice(lost),
        "layers": {
            name: {"arrives": finite(kept.arrives), "noise": finite(kept.ratio)} for name, kept in layers.items()
        },
    }  # fmt: skip


def describe(path: str | Path, length: Length | None = None, base: str | None = None) -> dict[str, Any]:
    """Read what statistics, a plan, an adapter or a comparison hold, as plain values.

    Any LoRA directory of PEFT will do; where it comes from is known only if lora_init made it, before or after
    training. Of statistics only shapes are read.
    """
    path = Path(path).expanduser()
    # A directory with an adapter in it is an adapter, whatever else stands beside it.
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
    # Files are told apart by how they begin, since users name them as they like. A plan is JSON; a safetensors file
    # begins with a length of eight bytes, and then JSON.
    with path.open("rb") as file:
        start = file.read(9)
    if start.startswith(b"{"):
        return _describe_plan(path)
    if start[8:9] != b"{":
        raise LoraInitError(f"{path} is neither statistics nor a plan. Name what lora-init has written.")
    return _describe_statistics(path)


def _describe_plan(path: Path) -> dict[str, Any]:
    from lora_init.planning.plan import load_plan, plan_to_dict

    plan = load_plan(path)
    # `asked` is the budget in words; the plan's own dict has its parts.
    return {"what": "plan", "path": str(path), **plan_to_dict(plan), "ranks": dict(plan), "asked": str(plan.budget)}


def _describe_statistics(path: Path) -> dict[str, Any]:
    from lora_init.statistics.statistics import Statistics

    stats = Statistics.load(path)
    layers = {}
    for name, target in stats.targets.items():
        group = stats.group_of[name]  # the layer whose spectrum this is: q_proj, k_proj and v_proj read one input
        shares = stats.explained_variance_ratio(name).tolist()  # [k], falling
        layers[name] = {
            "kind": target.kind,
            "in_features": target.in_features,
            "out_features": target.out_features,
            "input_shared_with": group,
            "total_variance": stats.total_variance(name),
            "explained_variance_ratio": [round(share, 6) for share in shares],
            "held_out": finite(stats.held_out.get(group)),
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
    rate, own_rate = None, origin.get("learning_rate")  # of the rule, and as `init --learning-rate` had it
    if "rate" in origin:
        rate = LearningRate.read(origin["rate"], **vars(length))
    untrained = directory.is_untrained
    train = None
    # Without a record of ours nothing is known of how to train it.
    if origin and (untrained or rate or own_rate):
        train = training_in_words(rate, own_rate)
    # Layers without an adapter count where engines want one in every layer of a kind.
    everywhere = _with_gaps(ranks) | dict.fromkeys(origin.get("left_out", ()), 0)
    # The file's keys are sorted as text, block 10 before block 2; lora_init.json knows the model's order.
    known = {name: ranks[name] for name in origin.get("explained", {}) if name in ranks}
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
        # Without modules that were trained whole, such as a head.
        "parameters": sum(math.prod(shape) for key, shape in shapes.items() if ".lora_" in key),
        "ranks": known | ranks,
        "origin": origin or None,
        "train": train,
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

    # An adapter that was trained on after the dial has kept its record, which is about other weights.
    if not is_as_written(path, DIAL_FILE):
        return None
    return {**read_json(path / DIAL_FILE), "picture": str(path / PICTURE_FILE)}


def _with_gaps(ranks: Mapping[str, int]) -> dict[str, int]:
    """Add the layers that have no adapter while others of their kind have one: they are not in the directory."""
    grid, whole = layer_grid(ranks), dict(ranks)
    for layers in grid.by_kind.values():
        block, name = next(iter(layers.items()))
        if block < 0:  # outside any block, so no other block lacks it
            continue
        for other in grid.blocks:
            if other >= 0 and other not in layers:
                whole[name.replace(f".{block}.", f".{other}.", 1)] = 0
    return whole
