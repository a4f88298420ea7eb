"""Read options from PEFT's `LoraConfig`, or from an untrained adapter on a model.

Two things are read differently. Numbers and switches are fields of the config. Which layers it selects is decided by
PEFT, with rules that depend on the model and on the release; so PEFT itself selects them, on the model or by names.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from torch import nn

from lora_init.adapters.init_config import InitConfig, Shape
from lora_init.adapters.peft_model import adapter_layers, as_it_was, check_fresh, name_of_adapter
from lora_init.errors import LoraInitError, in_one_line
from lora_init.layers.targets import HEADS, matches, warn_of_exclusions
from lora_init.planning.lora_config import exact_pattern
from lora_init.statistics.statistics import Statistics

if TYPE_CHECKING:
    from peft import LoraConfig

# The fields of LoraConfig; any other one is refused by its name if it is set. Those `of_peft` go on to the adapter.
# These select layers, and which they selected is read off the model:
_SELECTION = (
    "r", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters", "task_type",
)  # fmt: skip
# These may be dropped:
_DROPPED = (
    "peft_type",  # always LORA
    "peft_version", "base_model_name_or_path", "auto_mapping",  # written anew with each adapter
    "fan_in_fan_out",  # PEFT sets it by the layers that it finds
    "inference_mode",  # true in every config that was saved, and an adapter before training is trained
    "megatron_core",  # says nothing without a megatron_config, which is refused
    "runtime_config",  # of the process; PEFT does not save it
)  # fmt: skip


def check_agreement(given: Mapping[str, Any], configured: Mapping[str, Any], whose: str) -> None:
    """Refuse arguments that contradict a configuration."""
    for name, value in given.items():
        if _comparable(value) != _comparable(configured[name]):
            raise LoraInitError(
                f"{name}={value!r}: {whose} decides that and says {configured[name]!r}. Leave it out here."
            )


def _comparable(value: Any) -> Any:
    """Return what a setting is compared by: lists of names as sets, None as an empty one."""
    if isinstance(value, (str, int, float)):
        return value
    return frozenset(value or ())


def read_config(model: nn.Module, config: LoraConfig, init_config: InitConfig) -> InitConfig:
    """Add the settings of a LoraConfig to the options; PEFT itself selects the layers, on a model that is restored."""
    from peft import get_peft_model

    _check_plain_config(config)
    _shape_of(config, "config")  # before PEFT imports what a setting needs that is refused anyway
    with as_it_was(model):
        try:  # on the meta device: only names are read
            peft_model = get_peft_model(model, copy.deepcopy(config), low_cpu_mem_usage=True)
        except (ValueError, TypeError, AttributeError, re.error) as error:
            raise LoraInitError(f"config does not fit {type(model).__name__}: {in_one_line(error)}") from error
        read = read_adapter(peft_model, init_config, "config", config)
    warn_of_exclusions(model, config.exclude_modules or (), (), ())  # PEFT is silent of blocks
    if config.task_type:
        return read
    return read.with_options(task_type=init_config.layers.task_type)  # of the arguments, which the config leaves open


def read_config_for(
    stats: Statistics, config: LoraConfig, given: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Read from a LoraConfig arguments of `build_adapter`, and which layers of the statistics it selects by name."""
    from peft.tuners.tuners_utils import check_target_module_exists

    _check_plain_config(config)
    shape = _shape_of(config, "config", "build_adapter()")
    check_agreement(given, shape, "config")
    if config.task_type not in (None, stats.provenance.task_type):
        raise LoraInitError(
            f"config says task_type={str(config.task_type)!r}, and the statistics were collected for "
            f"{stats.provenance.task_type!r}. Collect with that task_type, or leave it out."
        )
    names, fused = [*stats, *stats.unsupported], _fused_parameters(stats)
    selects_all = not (config.target_modules or config.target_parameters)
    config = copy.deepcopy(config)
    if selects_all or config.target_modules == "all-linear":
        # PEFT expands "all-linear" with a model, which is not at hand here: it stands for all that was collected.
        config.target_modules = sorted({name.rpartition(".")[2] for name in names if name not in fused})
    _check_collected(config, names)
    parameters: Collection[str] = config.target_parameters or ()
    if selects_all:
        parameters = fused
    selected = []
    for name in names:
        if name in fused:  # PEFT's function knows modules only
            if matches(parameters, name, ""):
                selected.append(name)
        elif check_target_module_exists(config, name):
            selected.append(name)
    if not selected:
        raise LoraInitError(f"config selects none of the {len(names)} layers that the statistics have.")
    return shape, selected


def _fused_parameters(stats: Statistics) -> set[str]:
    """Name the parameters of experts among the layers of statistics, those without a spectrum among them."""
    unsupported = {name for name, kind in stats.unsupported.items() if kind == "Parameter"}
    return unsupported | {name for name in stats if stats.targets[name].experts}


def _check_collected(config: LoraConfig, names: list[str]) -> None:
    """Refuse a config that lists a layer or parameter which the statistics do not have and it does not exclude."""
    listed = [*(config.target_parameters or ())]
    if not isinstance(config.target_modules, str):  # a string is a regular expression, which names no layer by itself
        listed += config.target_modules or ()
    excluded = config.exclude_modules or ()
    for ending in sorted(listed):
        is_collected = any(matches([ending], name, "") for name in names)
        if not is_collected and not matches(excluded, ending, "exclude_modules"):
            raise LoraInitError(f"config selects {ending!r}, of which the statistics have no layer. Collect with it.")


def _check_plain_config(config: Any) -> None:
    from peft import LoraConfig

    if not isinstance(config, LoraConfig):
        raise LoraInitError(f"config={type(config).__name__}: a LoraConfig of PEFT is expected.")
    if config.init_lora_weights is not True:
        raise LoraInitError(f"config sets init_lora_weights={config.init_lora_weights!r}: method= decides that.")


def _shape_of(config: LoraConfig, whose: str, taker: str = "initialize()") -> dict[str, Any]:
    """Read rank, scaling and the like, and refuse by its name what `taker` cannot keep."""
    _check_kept(config, whose, taker)
    heads = HEADS.get(config.task_type or "", ())
    shape: dict[str, Any] = {"rank": config.r}
    for name in Shape.of_peft:
        shape[name] = getattr(config, name)
    # PEFT adds the names that heads of this task may have, and will again.
    shape["modules_to_save"] = [name for name in config.modules_to_save or () if name not in heads]
    return shape


def _check_kept(config: LoraConfig, whose: str, taker: str) -> None:
    """Refuse by its name what a config sets and `taker` cannot keep."""
    from peft import LoraConfig

    # A field counts as set if it differs from PEFT's default. So a field of a newer release is refused where it is
    # used, and passes where it is not.
    default = LoraConfig(init_lora_weights=config.init_lora_weights)
    known = {*Shape.of_peft, *_SELECTION, *_DROPPED}
    changed = []
    for field in fields(default):
        if field.name not in known and getattr(config, field.name) != getattr(default, field.name):
            changed.append(field.name)
    # PEFT writes such patterns where it makes fused experts of `target_modules`.
    written_by_peft = {rf".*\.{ending}" for ending in config.target_parameters or ()}
    if changed and written_by_peft.intersection(config.rank_pattern or ()):
        raise LoraInitError(
            f"{whose}: PEFT makes target_modules the fused experts of this model, at twice the rank in a part, which "
            f"{taker} cannot keep. Name other layers in target_modules, and experts in target_parameters: "
            "['experts.gate_up_proj', 'experts.down_proj']."
        )
    if changed:
        raise LoraInitError(
            f"{whose} sets {', '.join(changed)}, which {taker} decides itself or cannot keep. Leave it out."
        )


def read_adapter(model: Any, init_config: InitConfig, whose: str, before: LoraConfig | None = None) -> InitConfig:
    """Add the settings of an untrained adapter on a model; `before` is its config as the user wrote it."""
    from peft import LoraConfig
    from peft.tuners.lora.layer import ParamWrapper

    adapter = name_of_adapter(model)
    config, layers = model.peft_config[adapter], adapter_layers(model)
    if len(model.peft_config) > 1 or not isinstance(config, LoraConfig):
        raise LoraInitError(
            f"the model has the adapters {', '.join(model.peft_config)} ({config.peft_type}), and one LoRA adapter is "
            "expected. Begin with the plain model."
        )
    check_fresh(layers, adapter, "the adapter on the model", "Begin with the plain model and a LoraConfig alone.")
    options = _shape_of(config, whose) | {
        # As the user wrote it: PEFT replaces "all-linear" in the config of the adapter by names.
        "target_modules": (before or config).target_modules,
        "target_parameters": config.target_parameters,
        "task_type": config.task_type,
        "exclude_modules": (before or config).exclude_modules,
    }
    check_agreement({name: value for name, value in init_config.given.items() if name in options}, options, whose)
    # The layers that PEFT did adapt, by their full names, whatever selected them or left others out.
    options["exclude_modules"] = None
    plain = [name for name, layer in layers.items() if not isinstance(layer, ParamWrapper)]
    options["target_modules"] = []
    if plain:
        options["target_modules"] = exact_pattern(plain)  # of no names it would match the empty one, the model itself
    return init_config.with_options(**options)
