"""axolotl's plugin: `plugins: [lora_init.axolotl]` and, to say how, a block `lora_init:` in its YAML file."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lora_init.errors import LoraInitError, in_one_line
from lora_init.training.callback import StartCallback

if TYPE_CHECKING or find_spec("axolotl") is None:  # without axolotl nobody makes one
    BasePlugin = object
    BaseModel = object
else:
    from importlib.metadata import version

    try:
        from axolotl.integrations.base import BasePlugin
        from pydantic import BaseModel
    except ImportError as error:
        raise LoraInitError(
            f"lora_init.axolotl was tried with axolotl 0.19.0, and {version('axolotl')} is here: {in_one_line(error)}"
        ) from error

# On by default, and then no layer is called.
_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")


class AxolotlArgs(BaseModel):
    """What the plugin adds to axolotl's schema: arguments of `StartCallback`."""

    lora_init: dict[str, Any] | None = None


class axolotl(BasePlugin):
    """Start axolotl's LoRA adapter from its first batches: `plugins: [lora_init.axolotl]`."""

    def get_input_args(self) -> str:
        """Name the schema of `lora_init:`."""
        # By name: axolotl imports it, and adds its fields to the schema of the YAML file.
        return f"{__name__}.AxolotlArgs"

    def pre_model_load(self, cfg: Any) -> None:
        """Create the callback; refuse options that create the adapter, and fused kernels, which bypass the layers."""
        # Here and not when the trainer is made: what is refused is refused before the weights are read.
        if cfg.lora_model_dir:
            raise LoraInitError(
                f"lora_model_dir: {cfg.lora_model_dir} makes the adapter, too. Leave it or lora_init out."
            )
        kernels = ", ".join(f"{name}: false" for name in _KERNELS if cfg.get(name))
        if kernels:
            raise LoraInitError(
                f"axolotl's fused kernels bypass the layers, so their inputs cannot be read. Set {kernels}."
            )
        self.callback = StartCallback(**cfg.lora_init or {})

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[StartCallback]:
        """Return the callback."""
        return [self.callback]
