"""The plan in other tools' words: PEFT's LoraConfig, axolotl's and LLaMA-Factory's YAML, JSON and CSV.

To add a tool, write its function and add it to `TOOLS`. Importing this file imports no torch.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from textwrap import indent
from typing import TYPE_CHECKING, Any

from lora_init.errors import LoraInitError, did_you_mean

if TYPE_CHECKING:
    from lora_init.planning.plan import RankAllocation


@dataclass(frozen=True)
class Snippet:
    """What a tool's function writes down.

    Attributes:
        plan: Where the ranks come from.
        scaling: Of every layer.
        use_rslora: Whether the tool may write that scaling as rsLoRA.
        modules: `target_modules` for PEFT.
        parameters: `target_parameters` for PEFT.
        about: What the plan is, as comments.
        command: What makes an adapter of the plan, for tools that need it made first.
    """

    plan: RankAllocation
    scaling: float
    use_rslora: bool
    modules: list[str] | str
    parameters: list[str]
    about: tuple[str, ...]
    command: str


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
        tool: A name of `TOOLS`, such as `"peft"`, `"axolotl"` or `"csv"`.
        lora_alpha: Relative to `plan.rank`; every layer is scaled alike, by lora_alpha / rank.
        use_rslora: Scale by lora_alpha / sqrt(rank) instead.
        plan_path: Where the plan is or will be saved, for tools that need the adapter made first.

    Raises:
        LoraInitError: Unknown tool; an alpha that is not positive, or for axolotl one that is not whole for every rank;
            a plan without ranks; or for JSON and CSV, a plan made by hand, without widths.
    """
    from lora_init.planning.plan import plan_text, scaling_of, source_text, target_modules, target_parameters

    if tool not in TOOLS:
        raise LoraInitError(f"format={tool!r} is unknown. {did_you_mean(str(tool), TOOLS)}")
    if not 0.0 < lora_alpha < math.inf:
        raise LoraInitError(f"lora_alpha={lora_alpha!r} must be a positive number; 16 is the default.")
    if not plan.total_rank:
        raise LoraInitError("the plan gives no layer any rank, so there is nothing to configure.")
    rslora = " --use-rslora" if use_rslora else ""
    asked = Snippet(
        plan,
        scaling_of(lora_alpha, plan.rank, use_rslora),
        use_rslora,
        target_modules(plan),
        target_parameters(plan),
        (f"Planned by lora_init: {plan_text(plan)}.", f"{plan!r}, from {source_text(plan)}."),
        f"lora-init init MODEL DATA --ranks {plan_path} --lora-alpha {lora_alpha:g}{rslora} --output adapter",
    )
    return TOOLS[tool](asked)


def _comments(*lines: str) -> str:
    return "".join(f"# {' '.join(line.split())}\n" for line in lines)


def _peft(asked: Snippet) -> str:
    from lora_init.planning.plan import rank_settings

    plan = asked.plan
    task = plan.provenance.task_type if plan.provenance else None
    arguments = {
        **rank_settings(plan, plan.rank, asked.scaling, asked.use_rslora),
        **({"use_rslora": True} if asked.use_rslora else {}),
        **({"task_type": task} if task else {}),
        "target_modules": asked.modules,
        **({"target_parameters": asked.parameters} if asked.parameters else {}),
    }
    # A list or mapping of names and numbers is the same in JSON and in Python.
    lines = [
        f"{name}={json.dumps(value, indent=4) if isinstance(value, (list, dict)) else repr(value)},\n"
        for name, value in arguments.items()
    ]
    start = "This starts at random. lora_init.build_adapter(statistics, plan).apply(model) starts from the data."
    config = f"from peft import LoraConfig\n\nconfig = LoraConfig(\n{indent(''.join(lines), '    ')})\n"
    return _comments(*asked.about, start) + config


def _axolotl(asked: Snippet) -> str:
    from lora_init.planning.plan import rank_settings

    plan = asked.plan
    settings = rank_settings(plan, plan.rank, asked.scaling)
    alphas = [settings["lora_alpha"], *settings["alpha_pattern"].values()]
    if not all(isinstance(alpha, int) for alpha in alphas):
        raise LoraInitError(
            f"axolotl takes whole numbers for lora_alpha, and a scaling of {asked.scaling:.4g} gives some ranks "
            f"others. Take a multiple of the average rank, such as lora_alpha={plan.rank} without rsLoRA."
        )
    config = {"adapter": "lora", "lora_r": plan.rank, "lora_alpha": settings["lora_alpha"]}
    config["lora_target_modules"] = asked.modules
    if asked.parameters:
        config["lora_target_parameters"] = asked.parameters
    if settings["rank_pattern"]:
        config["lora_rank_pattern"] = settings["rank_pattern"]
        config["lora_alpha_pattern"] = settings["alpha_pattern"]
    start = "This starts at random. To start from the data, make the adapter and add `lora_model_dir: adapter`:"
    return _comments(*asked.about, "axolotl 0.18 or newer.", start, asked.command) + _yaml(config)


def _llama_factory(asked: Snippet) -> str:
    start = "LLaMA-Factory has one rank for all layers. Make the adapter first:"
    config = {"finetuning_type": "lora", "adapter_name_or_path": "adapter", "create_new_adapter": False}
    return _comments(*asked.about, start, asked.command) + _yaml(config)


def _json(asked: Snippet) -> str:
    from lora_init.planning.plan import plan_to_dict

    return json.dumps(plan_to_dict(asked.plan), indent=1, ensure_ascii=False) + "\n"


def _csv(asked: Snippet) -> str:
    return str(asked.plan.to_pandas().to_csv(float_format="%.6f", lineterminator="\n"))


def _yaml(config: dict[str, Any]) -> str:
    import yaml  # type: ignore[import-untyped]

    return str(yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=10**6))


TOOLS = {"peft": _peft, "axolotl": _axolotl, "llama-factory": _llama_factory, "json": _json, "csv": _csv}
