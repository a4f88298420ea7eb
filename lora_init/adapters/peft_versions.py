"""Where releases of PEFT differ: the one place that knows. The oldest is in pyproject.toml."""

from __future__ import annotations

from inspect import signature
from typing import Any


def update_layer(layer: Any, adapter_name: str, rank: int, alpha: float, config: Any) -> None:
    """Give a layer of PEFT its rank and alpha. PEFT before 0.19 takes no config, but settings one by one."""
    settings = {"config": config}
    if "config" not in signature(layer.update_layer).parameters:
        names = ("lora_dropout", "init_lora_weights", "use_rslora", "use_dora", "lora_bias")
        settings = {name: getattr(config, name) for name in names}
    layer.update_layer(adapter_name=adapter_name, r=rank, lora_alpha=alpha, **settings)


class Batch(dict[str, Any]):
    """A batch as PEFT's EVA takes it. PEFT before 0.20 looks for the labels among its attributes."""

    def __getattr__(self, name: str) -> Any:
        """Give an entry as an attribute."""
        if name in self:
            return self[name]
        raise AttributeError(name)
