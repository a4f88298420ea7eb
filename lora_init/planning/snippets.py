"""The plan in other tools' words: PEFT's LoraConfig, axolotl's and LLaMA-Factory's YAML, JSON and CSV."""

from __future__ import annotations

import json
import math
from textwrap import indent
from typing import Any

from lora_init.errors import LoraInitError, did_you_mean
from lora_init.layers.targets import matches
from lora_init.planning.plan import (
    RankAllocation,
    exact_pattern,
    plan_text,
    plan_to_dict,
    rank_settings,
    scaling_of,
    source_text,
)

FORMATS = ("peft", "axolotl", "llama-factory", "json", "csv")


def snippet(
    plan: RankAllocation,
    tool: str,
    lora_alpha: float = 16,
    use_rslora: bool = False,
    plan_path: str = "plan.json",
) -> str:
    """Write a plan as what a tool reads.

    Args:
        plan: Where the ranks come from.
        tool: `"peft"`, `"axolotl"`, `"llama-factory"`, `"json"` or `"csv"`.
        lora_alpha: Relative to `plan.rank`; every layer is scaled alike, by lora_alpha / rank.
        use_rslora: Scale by lora_alpha / sqrt(rank) instead.
        plan_path: Where the plan is or will be saved, for tools that need the adapter made first.

    Raises:
        LoraInitError: Unknown tool; an alpha that is not positive, or for axolotl one that is not whole for every rank;
            a plan without ranks; or for JSON and CSV, a plan made by hand, without widths.
    """
    if tool not in FORMATS:
        raise LoraInitError(f"format={tool!r} is unknown. {did_you_mean(str(tool), FORMATS)}")
    if not 0.0 < lora_alpha < math.inf:
        raise LoraInitError(f"lora_alpha={lora_alpha!r} must be a positive number; 16 is the default.")
    if not plan.total_rank:
        raise LoraInitError("the plan gives no layer any rank, so there is nothing to configure.")
    if tool == "json":
        return json.dumps(plan_to_dict(plan), indent=1, ensure_ascii=False) + "\n"
    if tool == "csv":
        return str(plan.to_pandas().to_csv(float_format="%.6f", lineterminator="\n"))
    scaling = scaling_of(lora_alpha, plan.rank, use_rslora)
    comments = [f"Planned by lora_init: {plan_text(plan)}.", f"{plan!r}, from {source_text(plan)}."]
    if tool == "peft":
        start = "This starts at random. lora_init.build_adapter(statistics, plan).apply(model) starts from the data."
        return _comments(*comments, start) + _peft(plan, scaling, use_rslora)
    rslora = " --use-rslora" if use_rslora else ""
    command = f"lora-init init MODEL DATA --ranks {plan_path} --lora-alpha {lora_alpha:g}{rslora} --output adapter"
    if tool == "axolotl":
        start = "This starts at random. To start from the data, make the adapter and add `lora_model_dir: adapter`:"
        return _comments(*comments, "axolotl 0.18 or newer.", start, command) + _yaml(_axolotl(plan, scaling))
    start = "LLaMA-Factory has one rank for all layers. Make the adapter first:"
    config = {"finetuning_type": "lora", "adapter_name_or_path": "adapter", "create_new_adapter": False}
    return _comments(*comments, start, command) + _yaml(config)


def target_parameters(plan: RankAllocation) -> list[str]:
    """Name the fused parameters of experts of rank above 0."""
    fused = [name for name, rank in plan.items() if rank and name in plan.targets and plan.targets[name].experts]
    return fused + [name for name, kind in plan.unsupported.items() if kind == "Parameter"]


def target_modules(plan: RankAllocation) -> list[str] | str:
    """Name the layers of rank above 0, fused parameters aside, so that PEFT picks these and no others.

    Full names; but PEFT takes a name in a list for an ending too, so if one is the ending of a layer that gets no
    adapter, a regular expression of the full names.
    """
    fused = set(target_parameters(plan))
    kept = [name for name in (*(name for name, rank in plan.items() if rank), *plan.unsupported) if name not in fused]
    dropped = [name for name, rank in plan.items() if not rank]
    return exact_pattern(kept) if any(matches(kept, name, "target_modules") for name in dropped) else kept


def _comments(*lines: str) -> str:
    return "".join(f"# {' '.join(line.split())}\n" for line in lines)


def _peft(plan: RankAllocation, scaling: float, use_rslora: bool) -> str:
    task = plan.provenance.task_type if plan.provenance else None
    parameters = target_parameters(plan)
    arguments = {
        **rank_settings(plan, plan.rank, scaling, use_rslora),
        **({"use_rslora": True} if use_rslora else {}),
        **({"task_type": task} if task else {}),
        "target_modules": target_modules(plan),
        **({"target_parameters": parameters} if parameters else {}),
    }
    # A list or mapping of names and numbers is the same in JSON and in Python.
    lines = [
        f"{name}={json.dumps(value, indent=4) if isinstance(value, (list, dict)) else repr(value)},\n"
        for name, value in arguments.items()
    ]
    return f"from peft import LoraConfig\n\nconfig = LoraConfig(\n{indent(''.join(lines), '    ')})\n"


def _axolotl(plan: RankAllocation, scaling: float) -> dict[str, Any]:
    settings = rank_settings(plan, plan.rank, scaling)
    alphas = [settings["lora_alpha"], *settings["alpha_pattern"].values()]
    if not all(isinstance(alpha, int) for alpha in alphas):
        raise LoraInitError(
            f"axolotl takes whole numbers for lora_alpha, and a scaling of {scaling:.4g} gives some ranks others. "
            f"Take a multiple of the average rank, such as lora_alpha={plan.rank} without rsLoRA."
        )
    config = {"adapter": "lora", "lora_r": plan.rank, "lora_alpha": settings["lora_alpha"]}
    config["lora_target_modules"] = target_modules(plan)
    if parameters := target_parameters(plan):
        config["lora_target_parameters"] = parameters
    if settings["rank_pattern"]:
        config["lora_rank_pattern"] = settings["rank_pattern"]
        config["lora_alpha_pattern"] = settings["alpha_pattern"]
    return config


def _yaml(config: dict[str, Any]) -> str:
    import yaml  # type: ignore[import-untyped]

    return str(yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=10**6))
