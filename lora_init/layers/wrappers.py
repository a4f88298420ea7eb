"""How a model is run: the plain model inside a compiled one, where its weights are, the precision it runs in."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lora_init.third_party_internals import WRAPPED, hook_of


def unwrapped(model: nn.Module) -> nn.Module:
    """Take a model out of `torch.compile`, `DistributedDataParallel` and the like."""
    names: tuple[str, ...] = WRAPPED
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        names = (*WRAPPED, "module")  # other classes may have a part of this name
    for name, part in model.named_children():
        if name in names:
            return unwrapped(part)  # wrappers nest
    return model


def is_below(name: str, owner: str) -> bool:
    """Return whether a module is another one or inside it, by their names; all are inside the model, called ""."""
    return not owner or name == owner or name.startswith(f"{owner}.")


def without_adapter(model: nn.Module) -> nn.Module:
    """Return the model inside a PeftModel, with the adapter's layers in place; a plain model as it is."""
    inner: Any = model
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    base: nn.Module = inner
    return base


def plain_names(model: nn.Module) -> dict[str, nn.Module]:
    """Return all modules of a model, unwrapped, under the names that they have where no part is wrapped."""
    modules: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        # A wrapper and what it wraps have one plain name; the wrapper comes first and is unwrapped all the way.
        modules.setdefault(plain_name(name), unwrapped(module))
    return modules


def plain_name(name: str) -> str:
    """Name a module or parameter as it is named where nothing is wrapped."""
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


def class_name(module: nn.Module) -> str:
    """Name a module's class; of a module that `fully_shard` gave a derived class, the original one."""
    return next(kind.__name__ for kind in type(module).__mro__ if not issubclass(kind, _fsdp_module()))


def model_id(model: nn.Module) -> str:
    """Return the directory or hub id that a model of transformers was loaded from; empty for others."""
    return str(getattr(getattr(model, "config", None), "name_or_path", "") or "")


def quantization_of(model: nn.Module) -> dict[str, Any] | None:
    """Return how transformers quantized a model, as `quantization_config` of `from_pretrained`; else None."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is None:
        return None
    if isinstance(config, dict):
        return dict(config)
    method = getattr(config.quant_method, "value", config.quant_method)  # a member of an enum, or a string
    settings = json.loads(config.to_json_string())  # as JSON has them: types of torch as strings
    result = {"quant_method": str(method)}
    for key, value in settings.items():
        if not key.startswith("_"):
            result[key] = value
    return result


def is_sharded(model: nn.Module) -> bool:
    """Check whether a forward pass needs all processes at once (FSDP2)."""
    return any(isinstance(module, _fsdp_module()) for module in model.modules())


def is_tensor_parallel(model: nn.Module) -> bool:
    """Check whether single layers are split over processes, each of which then reads a part of their inputs."""
    # FSDP2 keeps its parameters in the same class (DTensor), but gathers them before a layer is called.
    return not is_sharded(model) and any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def is_offloaded(model: nn.Module) -> bool:
    """Check whether accelerate brings weights to where they are used and takes them away after the forward pass."""
    return any(_offloaded_weights(module) for module in model.modules())


def is_away(module: nn.Module) -> bool:
    """Check whether a layer's own weights are without numbers here, since accelerate keeps them elsewhere."""
    return _offloaded_weights(module) is not None and any(one.is_meta for one in module.parameters(recurse=False))


def _fsdp_module() -> Any:
    # Importing it takes a second, and where it was not imported nothing is sharded: no class.
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())


def _offloaded_weights(module: nn.Module) -> Any:
    hook = hook_of(module)
    for single in getattr(hook, "hooks", [hook]):  # accelerate chains several in one that has a list of them
        weights_map = getattr(single, "weights_map", None)
        if weights_map is not None:
            return weights_map
    return None


def weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield each parameter under its plain name, gathered from all processes or from where it is offloaded to.

    In a sharded model all processes have to do this at once. It gathers one parameter at a time.
    """
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        owner, _, ending = name.rpartition(".")
        yield plain_name(name), read_weight(modules[owner], ending, parameter)


def read_weight(module: nn.Module, name: str, weight: Tensor) -> Tensor:
    """Gather a weight of a module that has this name there, from all processes or from where it is offloaded to."""
    tensor: Any = weight.detach()
    # accelerate leaves a tensor without data in the place of a weight that is on disk or in memory.
    if tensor.is_meta and (offloaded := _offloaded_weights(module)) is not None:
        tensor = offloaded[name]
    return gathered(tensor)


def gathered(tensor: Any) -> Tensor:
    """Return a parameter whole where processes hold a part each; all of them have to do this at once."""
    if hasattr(tensor, "full_tensor"):
        # Of a model whose shards are kept on the CPU, it is the accelerators that can talk to each other.
        tensor = tensor.to(tensor.device_mesh.device_type).full_tensor()
    whole: Tensor = tensor
    return whole


def reshard(model: nn.Module) -> None:
    """Let each process hold its parts alone, also of what FSDP2 keeps whole between a forward and a backward pass."""
    for module in model.modules():
        if isinstance(module, _fsdp_module()):
            module.reshard()


def run_eagerly() -> AbstractContextManager[Any]:
    """Run compiled code uncompiled: a compiled graph does not call hooks that were added after it."""
    # Importing dynamo takes a second, and where it was not imported nothing is compiled.
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    eager: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return eager


class Precision:
    """The autocast settings at the time this is made.

    The model shall run under them, as it does in training, and statistics be computed without: bfloat16 has two digits.
    """

    def __init__(self) -> None:
        devices = ["cpu"]
        # Without an accelerator torch 2.6 raises where later releases give None.
        if torch.accelerator.is_available():
            accelerator = torch.accelerator.current_accelerator()
            if accelerator is not None:
                devices.append(accelerator.type)
        self._dtypes: dict[str, torch.dtype] = {}
        for device in devices:
            if torch.is_autocast_enabled(device):
                self._dtypes[device] = torch.get_autocast_dtype(device)

    def off(self) -> AbstractContextManager[None]:
        """Compute in the precision of the tensors themselves."""
        return self.on(enabled=False)

    @contextmanager
    def on(self, enabled: bool = True) -> Iterator[None]:
        """Switch autocast on with the settings that it had."""
        with ExitStack() as stack:
            # One for each device: autocast of the CPU and of an accelerator are switched apart.
            for device, dtype in self._dtypes.items():
                stack.enter_context(torch.autocast(device, dtype, enabled=enabled))
            yield
