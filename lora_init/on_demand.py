"""Features that few use, each registered here: no package in the middle imports them, and all else works without."""

from __future__ import annotations

from importlib import import_module
from typing import Any

ON_DEMAND = {
    "bank": "lora_init.bank.store:open_bank",  # adapters of other tasks, of `init --bank` and `compare --bank`
    "heat map": "lora_init.plots.heat_map:heat_map_figure",  # what `plot()` of a plan and of an adapter draws
    "without intruders": "lora_init.serving.intruders:without_intruders",  # what `export --reduce-intruders` does
}


def on_demand(name: str) -> Any:
    """Import what is registered under a name."""
    # By text: an import statement, even in a function, would tie the middle to packages that may be taken out.
    module, _, attribute = ON_DEMAND[name].partition(":")
    return getattr(import_module(module), attribute)
