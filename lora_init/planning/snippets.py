"""The plan in other tools' words: PEFT's LoraConfig, axolotl's and LLaMA-Factory's YAML, JSON and CSV."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from textwrap import indent
from typing import Any

from lora_init.errors import LoraInitError, did_you_mean
from lora_init.layers.targets import matches
from lora_init.planning.plan import RankAllocation, alpha_for, plan_text, plan_to_dict, scaling_of, source_text


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
        LoraInitError: Unknown tool; an alpha that is not positive; a plan without ranks; or for JSON and CSV, a plan
            made by hand, without widths.
    """
    if tool not in FORMATS:
        raise LoraInitError(f"format={tool!r} is unknown. {did_you_mean(str(tool), FORMATS)}")
    if not 0.0 < lora_alpha < math.inf:
        raise LoraInitError(f"lora_alpha={lora_alpha!r} must be a positive number; 16 is the default.")
    if not plan.total_rank:
        raise LoraInitError("the plan gives no layer any rank, so there is nothing to configure.")
    return FORMATS[tool](_Request(plan, lora_alpha, use_rslora, plan_path))


@dataclass(frozen=True)
class _Request:
    """The arguments of `snippet`, and what several tools need of them."""

    plan: RankAllocation
    lora_alpha: float
    use_rslora: bool
    plan_path: str

    @property
    def scaling(self) -> float:
        """What every layer is scaled by."""
        return scaling_of(self.lora_alpha, self.plan.rank, self.use_rslora)

    def base_rank(self) -> int:
        """Choose the rank of layers without a pattern: the only rank there is, else the plan's.

        Layers that PEFT starts have no pattern, and are to have the plan's.
        """
        used = {rank for rank in self.plan.values() if rank}
        return used.pop() if len(used) == 1 and not self.plan.unsupported else self.plan.rank

    def whole_alphas(self) -> dict[int, int] | None:
        """Give the alpha of each rank, without rsLoRA, for tools that take whole numbers; None if one is not whole."""
        ranks = {self.base_rank(), *self.plan.values()} - {0}
        alphas = {rank: alpha_for(self.scaling, rank) for rank in ranks}
        whole = {rank: alpha for rank, alpha in alphas.items() if isinstance(alpha, int) and alpha >= 1}
        return whole if len(whole) == len(alphas) else None

    def make_adapter(self, why: str) -> list[str]:
        """Say what the adapter of this plan is needed for, and give the command that makes it."""
        options = f"--lora-alpha {self.lora_alpha:g}{' --use-rslora' if self.use_rslora else ''}"
        return [why, f"lora-init init MODEL DATA --ranks {self.plan_path} {options} --output adapter"]

    def about(self) -> list[str]:
        """Describe the plan in two lines."""
        return [f"Planned by lora_init: {plan_text(self.plan)}.", f"{self.plan!r}, from {source_text(self.plan)}."]


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
    if any(matches(kept, name, "target_modules") for name in dropped):
        return f"^(?:{'|'.join(re.escape(name) for name in kept)})$"
    return kept


def rank_pattern(plan: RankAllocation, base: int) -> dict[str, int]:
    """Map to its rank each layer whose rank is not the base: anchored keys, each of which matches one layer."""
    return {f"^{re.escape(name)}": rank for name, rank in plan.items() if rank not in (0, base)}


def _comments(lines: Sequence[str]) -> str:
    return "".join(f"# {' '.join(line.split())}\n" for line in lines)


def _peft(request: _Request) -> str:
    plan, ranks = request.plan, rank_pattern(request.plan, request.plan.rank)
    task = plan.provenance.task_type if plan.provenance else None
    parameters = target_parameters(plan)
    arguments = {
        "r": plan.rank,
        "lora_alpha": alpha_for(request.scaling, plan.rank, request.use_rslora),
        **({"use_rslora": True} if request.use_rslora else {}),
        **({"task_type": task} if task else {}),
        "target_modules": target_modules(plan),
        **({"target_parameters": parameters} if parameters else {}),
        "rank_pattern": ranks,
        "alpha_pattern": {key: alpha_for(request.scaling, rank, request.use_rslora) for key, rank in ranks.items()},
    }
    # A list or mapping of names and numbers is the same in JSON and in Python.
    lines = [
        f"{name}={json.dumps(value, indent=4) if isinstance(value, (list, dict)) else repr(value)},\n"
        for name, value in arguments.items()
    ]
    start = "This starts at random. lora_init.build_adapter(statistics, plan).apply(model) starts from the data."
    body = indent("".join(lines), "    ")
    return f"{_comments([*request.about(), start])}from peft import LoraConfig\n\nconfig = LoraConfig(\n{body})\n"


_AT_RANDOM = "This starts at random. To start from the data, make the adapter and add `{}: adapter`:"


def _axolotl(request: _Request) -> str:
    plan, base, alphas = request.plan, request.base_rank(), request.whole_alphas()
    ranks, parameters = rank_pattern(plan, base), target_parameters(plan)
    config: dict[str, Any] = {"adapter": "lora", "lora_r": base, "lora_target_modules": target_modules(plan)}
    if parameters:
        config["lora_target_parameters"] = parameters
    if alphas is None:
        lines = request.make_adapter("axolotl takes whole alphas, and this plan needs others. Make the adapter first:")
        config |= {"lora_alpha": max(1, round(request.scaling * base)), "lora_model_dir": "adapter"}
    else:
        lines = request.make_adapter(_AT_RANDOM.format("lora_model_dir"))
        config["lora_alpha"] = alphas[base]
    if ranks and alphas is not None:
        lines.insert(0, "lora_rank_pattern and lora_alpha_pattern: axolotl 0.18 or newer.")
        config["lora_rank_pattern"] = ranks
        config["lora_alpha_pattern"] = {key: alphas[rank] for key, rank in ranks.items()}
    return _comments([*request.about(), *lines]) + _yaml(config)


def _llama_factory(request: _Request) -> str:
    plan, base, alphas = request.plan, request.base_rank(), request.whole_alphas()
    modules = target_modules(plan)
    config: dict[str, Any] = {"finetuning_type": "lora"}
    if alphas is None or isinstance(modules, str) or target_parameters(plan) or rank_pattern(plan, base):
        lines = request.make_adapter("LLaMA-Factory has one rank and a whole alpha for all. Make the adapter first:")
        config |= {"adapter_name_or_path": "adapter", "create_new_adapter": False}
    else:
        lines = request.make_adapter(_AT_RANDOM.format("adapter_name_or_path"))
        config |= {"lora_rank": base, "lora_alpha": alphas[base], "lora_target": ",".join(modules)}
    return _comments([*request.about(), *lines]) + _yaml(config)


def _yaml(config: dict[str, Any]) -> str:
    import yaml  # type: ignore[import-untyped]

    return str(yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=10**6))


def _json(request: _Request) -> str:
    return json.dumps(plan_to_dict(request.plan), indent=1, ensure_ascii=False) + "\n"


def _csv(request: _Request) -> str:
    return str(request.plan.to_pandas().to_csv(float_format="%.6f", lineterminator="\n"))


FORMATS: dict[str, Callable[[_Request], str]] = {
    "peft": _peft,
    "axolotl": _axolotl,
    "llama-factory": _llama_factory,
    "json": _json,
    "csv": _csv,
}
