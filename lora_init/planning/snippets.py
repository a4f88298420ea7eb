"""The plan in other tools' words: PEFT's LoraConfig, a script for TRL, YAML of axolotl and others, JSON and CSV.

To add a tool, write its function and add it to `TOOLS`. Importing this file imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from textwrap import indent
from typing import TYPE_CHECKING, Any

from lora_init.errors import LoraInitError, check_number, did_you_mean

if TYPE_CHECKING:
    from lora_init.planning.plan import RankAllocation


@dataclass(frozen=True)
class Snippet:
    """What a tool's function writes down."""

    plan: RankAllocation  # where the ranks come from
    scaling: float  # of every layer
    use_rslora: bool  # whether the tool may write that scaling as rsLoRA
    about: tuple[str, ...]  # what the plan is, as comments
    command: str  # what makes an adapter of the plan, for tools that need it made first
    recommended: Mapping[str, Any]  # learning_rate, warmup and schedule for that adapter; empty if none were measured
    advice: str  # the same in a line, or what to do where none were


def snippet(
    plan: RankAllocation,
    tool: str,
    lora_alpha: float = 16,
    use_rslora: bool = False,
    plan_path: str = "plan.json",
    recommended: Mapping[str, Any] | None = None,
    advice: str = "",
) -> str:
    """Write a plan as what a tool of `TOOLS` reads; all layers are scaled by lora_alpha over the average rank.

    `recommended` and `advice` are as in `Snippet`; the plan is or will be saved at `plan_path`.
    """
    from lora_init.planning.lora_config import scaling_of
    from lora_init.planning.plan import plan_text, source_text

    if tool not in TOOLS:
        raise LoraInitError(f"{{format}} is unknown. {did_you_mean(str(tool), TOOLS)}", format=tool)
    check_number("lora_alpha", lora_alpha, above=True)
    if not plan.total_rank:
        raise LoraInitError("the plan gives no layer any rank, so there is nothing to configure.")
    # The command is to make the adapter that the snippet describes, with the same scaling.
    rslora = " --use-rslora" if use_rslora else ""
    request = Snippet(
        plan,
        scaling_of(lora_alpha, plan.rank, use_rslora),
        use_rslora,
        (f"Planned by lora_init: {plan_text(plan)}.", f"{plan!r}, from {source_text(plan)}."),
        f"lora-init init MODEL DATA --ranks {plan_path} --lora-alpha {lora_alpha:g}{rslora} --output adapter",
        recommended or {},
        advice,
    )
    return TOOLS[tool](request)


def _comments(*lines: str) -> str:
    # Descriptions of data may have line breaks, and would leave the comment.
    return "".join(f"# {' '.join(line.split())}\n" for line in lines)


# What a LoraConfig is given here; the rest is as PEFT has it.
_ARGUMENTS = (
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "task_type", "target_modules",
    "target_parameters",
)  # fmt: skip


def _peft(request: Snippet) -> str:
    from lora_init.planning.plan import plan_config

    config = plan_config(request.plan, request.scaling, request.use_rslora)
    arguments = _given(config, *_ARGUMENTS)
    lines = []
    for name, value in arguments.items():
        # A list or mapping of names and numbers is the same in JSON and in Python.
        text = json.dumps(value, indent=4) if isinstance(value, (list, dict)) else repr(value)
        lines.append(f"{name}={text},\n")
    start = "This starts at random. lora_init.build_adapter(statistics, plan).apply(model) starts from the data."
    call = f"from peft import LoraConfig\n\nconfig = LoraConfig(\n{indent(''.join(lines), '    ')})\n"
    return _comments(*request.about, start) + call


def _given(config: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Return the entries of these names that are not empty: an empty one is the tool's own default."""
    return {name: config[name] for name in names if config.get(name)}


def _axolotl(request: Snippet) -> str:
    from lora_init.planning.plan import plan_config

    config = plan_config(request.plan, request.scaling)
    # Its schema has an integer for lora_alpha, and would refuse the file after this command has written it.
    if not all(isinstance(alpha, int) for alpha in (config["lora_alpha"], *config["alpha_pattern"].values())):
        raise LoraInitError(
            f"axolotl takes whole numbers for lora_alpha, and a scaling of {request.scaling:.4g} gives some ranks "
            f"others. Take a multiple of the average rank, such as {{lora_alpha}} without rsLoRA.",
            lora_alpha=request.plan.rank,
        )
    given = _given(
        config, "r", "lora_alpha", "target_modules", "target_parameters", "rank_pattern", "alpha_pattern"
    )  # fmt: skip
    # All keys are prefixed: lora_r, lora_rank_pattern; lora_alpha has its prefix already.
    written = {f"lora_{name.removeprefix('lora_')}": value for name, value in given.items()}
    start = "axolotl 0.18 or newer. Make the adapter first; without lora_model_dir these ranks start at random:"
    training = _training(request, "warmup_ratio", "lr_scheduler")
    return _made_first(request, start) + _yaml({"adapter": "lora", "lora_model_dir": "adapter", **written, **training})


_OLDER = "Before transformers 5 a share for the warm-up is called warmup_ratio."


def _llama_factory(request: Snippet) -> str:
    start = "LLaMA-Factory has one rank for all layers. Make the adapter first:"
    config = {"finetuning_type": "lora", "adapter_name_or_path": "adapter", "create_new_adapter": False}
    return _made_first(request, start, _OLDER) + _yaml(config | _training(request, "warmup_steps"))


def _ms_swift(request: Snippet) -> str:
    start = "ms-swift has one rank for all layers: swift sft FILE.yaml. Make the adapter first:"
    return _made_first(request, start) + _yaml({"adapters": ["adapter"], **_training(request, "warmup_ratio")})


def _trl(request: Snippet) -> str:
    made = request.plan.provenance
    model_id = (made and made.model_id) or "MODEL"
    settings = "".join(f", {name}={value!r}" for name, value in _training(request, "warmup_steps").items())
    return _made_first(request, "Make the adapter first:", _OLDER) + (
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        "from trl import SFTConfig, SFTTrainer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({model_id!r})\n"
        "trainer = SFTTrainer(\n"
        '    PeftModel.from_pretrained(model, "adapter", is_trainable=True),\n'
        f'    args=SFTConfig("trained"{settings}),\n'
        "    train_dataset=DATASET,\n"
        ")\n"
    )


def _made_first(request: Snippet, start: str, older: str = "") -> str:
    """Write comments: the plan, how the adapter is made, what to train it with."""
    if not request.recommended:  # no warm-up is written
        older = ""
    return _comments(*request.about, start, request.command, *filter(None, (request.advice, older)))


def _training(request: Snippet, warmup: str, schedule: str = "lr_scheduler_type") -> dict[str, Any]:
    """Return what is recommended, under a tool's names; the warm-up is a share of all steps."""
    names = {"learning_rate": "learning_rate", "warmup": warmup, "schedule": schedule}
    return {name: request.recommended[key] for key, name in names.items() if key in request.recommended}


def _json(request: Snippet) -> str:
    from lora_init.planning.plan import plan_to_dict

    return json.dumps(plan_to_dict(request.plan), indent=1, ensure_ascii=False) + "\n"


def _csv(request: Snippet) -> str:
    return str(request.plan.to_pandas().to_csv(float_format="%.6f", lineterminator="\n"))


def _yaml(config: dict[str, Any]) -> str:
    import yaml  # type: ignore[import-untyped]

    # As wide as it gets: a pattern of hundreds of names stays one line.
    return str(yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=10**6))


TOOLS = {
    "peft": _peft,
    "trl": _trl,
    "axolotl": _axolotl,
    "llama-factory": _llama_factory,
    "ms-swift": _ms_swift,
    "json": _json,
    "csv": _csv,
}
RANKS_ALONE = ("json", "csv")  # have no place for a scaling
