"""The plan in other tools' words: PEFT's LoraConfig, axolotl's and LLaMA-Factory's YAML, JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Sequence

from lora_init.errors import LoraInitError
from lora_init.planning.plan import RankAllocation, plan_to_dict


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
        LoraInitError: Unknown tool; or a scaling that it cannot express.
    """
    if tool not in FORMATS:
        raise LoraInitError(f"format={tool!r} is unknown. Choose from {', '.join(FORMATS)}.")
    if not plan.total_rank:
        raise LoraInitError("the plan gives no layer any rank, so there is nothing to configure.")
    return FORMATS[tool](plan, lora_alpha, use_rslora, plan_path)


def target_parameters(plan: RankAllocation) -> list[str]:
    """Name the fused parameters of experts of rank above 0."""
    fused = [name for name, rank in plan.items() if rank and plan.targets[name].experts]
    return fused + [name for name, kind in plan.unsupported.items() if kind == "Parameter"]


def target_modules(plan: RankAllocation) -> list[str] | str:
    """Name the layers of rank above 0, fused parameters aside, so that PEFT picks these and no others.

    Full names; but PEFT takes a name in a list for an ending too, so if one is the ending of a layer that gets no
    adapter, a regular expression of the full names.
    """
    fused = set(target_parameters(plan))
    kept = [name for name in (*(name for name, rank in plan.items() if rank), *plan.unsupported) if name not in fused]
    dropped = [name for name, rank in plan.items() if not rank]
    chosen = set(kept)
    if any(".".join(name.split(".")[i:]) in chosen for name in dropped for i in range(1, name.count(".") + 1)):
        return f"^(?:{'|'.join(re.escape(name) for name in kept)})$"
    return kept


def rank_pattern(plan: RankAllocation) -> dict[str, int]:
    """Map to its rank each layer whose rank is not `plan.rank`: anchored keys, each of which matches one layer."""
    return {f"^{re.escape(name)}": rank for name, rank in plan.items() if rank not in (0, plan.rank)}


def alpha_pattern(plan: RankAllocation, lora_alpha: float, use_rslora: bool) -> dict[str, float]:
    """Map each layer of `rank_pattern` to the alpha that gives it the scaling all others have."""

    def alpha(rank: int) -> float:
        share = rank / plan.rank
        value = lora_alpha * (math.sqrt(share) if use_rslora else share)
        return round(value) if math.isclose(value, round(value), rel_tol=1e-12) else value

    return {key: alpha(rank) for key, rank in rank_pattern(plan).items()}


def _about(plan: RankAllocation) -> list[str]:
    used = sum(rank > 0 for rank in plan.values())
    model = plan.provenance.model_id or plan.provenance.model_class if plan.provenance else ""
    data = plan.provenance.data if plan.provenance else ""
    source = f" for {model}" if model else ""
    source += f", from {data}" if data else ""
    return [
        f"Planned by lora_init{source}: policy {plan.policy or 'by hand'}, budget {plan.budget or 'by hand'}.",
        f"{used} of {len(plan)} layers, total rank {plan.total_rank:,}"
        + (f", {plan.parameters:,} parameters." if plan.targets else "."),
    ]


def _comments(lines: Sequence[str]) -> str:
    return "".join(f"# {' '.join(line.split())}\n" for line in lines)


def _peft(plan: RankAllocation, lora_alpha: float, use_rslora: bool, plan_path: str) -> str:
    def block(values: dict[str, float] | dict[str, int] | list[str] | str) -> str:
        if isinstance(values, str):
            return repr(values)
        if isinstance(values, list):
            return "[\n" + "".join(f"        {name!r},\n" for name in values) + "    ]"
        return "{\n" + "".join(f"        {key!r}: {value!r},\n" for key, value in values.items()) + "    }"

    task = plan.provenance.task_type if plan.provenance else None
    arguments = {
        "r": repr(plan.rank),
        "lora_alpha": repr(int(lora_alpha) if lora_alpha == int(lora_alpha) else lora_alpha),
        **({"use_rslora": "True"} if use_rslora else {}),
        **({"task_type": repr(task)} if task else {}),
        "target_modules": block(target_modules(plan)),
        **({"target_parameters": block(target_parameters(plan))} if target_parameters(plan) else {}),
        "rank_pattern": block(rank_pattern(plan)),
        "alpha_pattern": block(alpha_pattern(plan, lora_alpha, use_rslora)),
    }
    body = "".join(f"    {name}={value},\n" for name, value in arguments.items())
    return f"{_comments(_about(plan))}from peft import LoraConfig\n\nconfig = LoraConfig(\n{body})\n"


def _axolotl(plan: RankAllocation, lora_alpha: float, use_rslora: bool, plan_path: str) -> str:
    alphas = alpha_pattern(plan, lora_alpha, use_rslora)
    broken = next((value for value in (lora_alpha, *alphas.values()) if value != int(value) or value < 1), None)
    if broken is not None:
        remedy = "Turn use_rslora off" if use_rslora else f"Give a lora_alpha that is a multiple of {plan.rank}"
        raise LoraInitError(
            f"axolotl takes whole numbers for alpha, and one layer needs {broken:.6g}. {remedy}, or make the adapter "
            "with `lora-init init --ranks` and name it as lora_model_dir."
        )
    modules = target_modules(plan)
    parameters = target_parameters(plan)
    text = _comments([*_about(plan), "lora_rank_pattern and lora_alpha_pattern: axolotl 0.18 or newer."])
    text += f"adapter: lora\nlora_r: {plan.rank}\nlora_alpha: {int(lora_alpha)}\n"
    text += "peft_use_rslora: true\n" if use_rslora else ""
    text += f"lora_target_modules:{_yaml_list(modules) if isinstance(modules, list) else f' {json.dumps(modules)}'}"
    text += f"\nlora_target_parameters:{_yaml_list(parameters)}" if parameters else ""
    for key, pattern in (("lora_rank_pattern", rank_pattern(plan)), ("lora_alpha_pattern", alphas)):
        if pattern:
            text += f"\n{key}:" + "".join(f"\n  {json.dumps(name)}: {int(value)}" for name, value in pattern.items())
    return text + "\n"


def _yaml_list(values: Sequence[str]) -> str:
    # JSON strings are YAML strings, whatever is in the name.
    return "".join(f"\n  - {json.dumps(value)}" for value in values)


def _llama_factory(plan: RankAllocation, lora_alpha: float, use_rslora: bool, plan_path: str) -> str:
    modules = target_modules(plan)
    if not rank_pattern(plan) and isinstance(modules, list) and not target_parameters(plan):
        text = f"lora_rank: {plan.rank}\nlora_alpha: {lora_alpha:g}\n"
        text += "use_rslora: true\n" if use_rslora else ""
        return f"{_comments(_about(plan))}finetuning_type: lora\n{text}lora_target: {json.dumps(','.join(modules))}\n"
    options = f" --lora-alpha {lora_alpha:g}{' --use-rslora' if use_rslora else ''}"
    lines = [
        *_about(plan),
        "LLaMA-Factory has no rank_pattern: one lora_rank holds for all layers. So make the adapter first, and let it",
        f"go on from there:  lora-init init MODEL DATA --ranks {plan_path}{options} --output adapter",
        "With an adapter given and create_new_adapter off, lora_rank, lora_alpha and lora_target have no effect.",
    ]
    return f"{_comments(lines)}finetuning_type: lora\nadapter_name_or_path: adapter\ncreate_new_adapter: false\n"


def _json(plan: RankAllocation, lora_alpha: float, use_rslora: bool, plan_path: str) -> str:
    return json.dumps(plan_to_dict(plan), indent=1, ensure_ascii=False) + "\n"


def _csv(plan: RankAllocation, lora_alpha: float, use_rslora: bool, plan_path: str) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["layer", "rank", "in_features", "out_features", "parameters", "explained_variance", "low", "high"])
    for name, rank in plan.items():
        target = plan.targets[name]
        low, high = plan.unsettled.get(name, (rank, rank))
        share = f"{plan.explained[name]:.6f}" if name in plan.explained else ""
        writer.writerow(
            [name, rank, target.in_features, target.out_features, target.parameters(rank), share, low, high]
        )
    return text.getvalue()


FORMATS: dict[str, Callable[[RankAllocation, float, bool, str], str]] = {
    "peft": _peft,
    "axolotl": _axolotl,
    "llama-factory": _llama_factory,
    "json": _json,
    "csv": _csv,
}
