"""What `lora-init inspect --intruders` says: the intruder dimensions of an adapter as plain values and as tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_init.cli.console import make_console, quiet_transformers
from lora_init.cli.init import finite
from lora_init.cli.tables import facts, rank_table
from lora_init.errors import LoraInitError

if TYPE_CHECKING:
    from rich.console import Console

_WORST = 5


def describe_intruders(
    path: Path, about: Mapping[str, Any], model: str | None, trust_remote_code: bool
) -> dict[str, Any]:
    """Load the base model of an adapter directory and count the adapter's intruder dimensions.

    Args:
        path: The directory.
        about: What `inspection.describe` said of it.
        model: Base model; None for the one that the adapter names.
        trust_remote_code: Allow code that comes with the model to run.

    Returns:
        Plain values that `json.dumps` takes, layers in model order.

    Raises:
        LoraInitError: Not an adapter, no base model, or one that it does not fit.
    """
    if about["what"] != "adapter":
        raise LoraInitError(
            f"{path} is a statistics file, and --intruders is about a trained adapter. Name its directory."
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
