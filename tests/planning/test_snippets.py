"""What a plan is in other tools' words, read back as these tools read it."""

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import yaml
from peft import LoraConfig, get_peft_model

from lora_init.layers.targets import Target
from lora_init.planning.allocate import RankAllocation, allocate_ranks
from lora_init.planning.plan import plan_to_dict
from lora_init.planning.snippets import TOOLS, snippet
from tests.conftest import refused, tiny_llama
from tests.planning.made import model_and_statistics

MEASURED = {"learning_rate": 2e-4, "warmup": 0.1, "schedule": "cosine", "optimizer": "AdamW"}
EXAMPLES = Path(__file__).parents[2] / "examples"


def ranks_and_scalings(config):
    adapted = get_peft_model(tiny_llama(), config)
    layers = {name: module for name, module in adapted.named_modules() if hasattr(module, "lora_A")}
    names = [name.removeprefix("base_model.model.") for name in layers]
    ranks = [module.lora_A["default"].weight.shape[0] for module in layers.values()]
    return dict(zip(names, ranks, strict=True)), {module.scaling["default"] for module in layers.values()}


def allocated(stats):
    plan = allocate_ranks(stats, rank=4, rho=2, overrides={"layers.0.self_attn.k_proj": {"rank": 0}})
    assert 0 in plan.values() and len(set(plan.values())) > 3
    return plan, {name: rank for name, rank in plan.items() if rank}


@pytest.mark.parametrize(("use_rslora", "scaling"), [(False, 24 / 4), (True, 24 / math.sqrt(4))])
def test_peft_reads_its_snippet_as_exactly_the_plan(use_rslora, scaling):
    plan, expected = allocated(model_and_statistics("CAUSAL_LM")[1])
    names = {}
    exec(snippet(plan, "peft", lora_alpha=24, use_rslora=use_rslora), names)
    ranks, scalings = ranks_and_scalings(names["config"])
    assert ranks == expected
    assert list(scalings) == pytest.approx([scaling] * len(scalings))
    assert names["config"].task_type == "CAUSAL_LM"
    assert "lora_alpha=24,\n" in snippet(plan, "peft", lora_alpha=24.0)


def as_axolotl(config):
    """As axolotl 0.19 does in loaders/adapter.py."""
    return LoraConfig(
        r=config["lora_r"],
        lora_alpha=config["lora_alpha"],
        target_modules=config["lora_target_modules"],
        rank_pattern=config.get("lora_rank_pattern") or {},
        alpha_pattern=config.get("lora_alpha_pattern") or {},
    )


# rsLoRA with alpha 8 and rank 4 scales by 4, which is 4 x rank / rank: whole numbers without rsLoRA.
@pytest.mark.parametrize(("lora_alpha", "use_rslora", "scaling"), [(8, False, 2.0), (8, True, 4.0), (24.0, False, 6.0)])
def test_axolotl_gets_what_it_forwards_to_peft(lora_alpha, use_rslora, scaling):
    plan, expected = allocated(model_and_statistics()[1])
    text = snippet(plan, "axolotl", lora_alpha, use_rslora)
    config = yaml.safe_load(text)
    assert config["adapter"] == "lora" and "axolotl 0.18 or newer" in text and config["lora_model_dir"] == "adapter"
    rslora = " --use-rslora" if use_rslora else ""
    assert f"lora-init init MODEL DATA --ranks plan.json --lora-alpha {lora_alpha:g}{rslora} --output adapter" in text
    ranks, scalings = ranks_and_scalings(as_axolotl(config))
    assert ranks == expected and scalings == {scaling}
    # PositiveInt in its schema
    assert all(type(alpha) is int for alpha in (config["lora_alpha"], *config["lora_alpha_pattern"].values()))


def test_llama_factory_gets_a_finished_adapter():
    plan, _ = allocated(model_and_statistics()[1])
    text = snippet(plan, "llama-factory", lora_alpha=6.5, plan_path="p.json")
    assert "LLaMA-Factory has one rank for all layers. Make the adapter first:" in text
    assert "lora-init init MODEL DATA --ranks p.json --lora-alpha 6.5 --output adapter" in text
    adapter = {"finetuning_type": "lora", "adapter_name_or_path": "adapter", "create_new_adapter": False}
    assert yaml.safe_load(text) == adapter


# Of the tools' own documentation: what each calls rate, warm-up and schedule, and where it takes an adapter.
TRAINING = {
    "axolotl": ("learning_rate", "warmup_ratio", "lr_scheduler", ("lora_model_dir", "adapter")),
    "llama-factory": ("learning_rate", "warmup_steps", "lr_scheduler_type", ("adapter_name_or_path", "adapter")),
    "ms-swift": ("learning_rate", "warmup_ratio", "lr_scheduler_type", ("adapters", ["adapter"])),
}


@pytest.mark.parametrize("tool", TRAINING)
def test_trainers_get_the_adapter_and_what_was_measured_with_it(tool):
    plan, _ = allocated(model_and_statistics("CAUSAL_LM")[1])
    text = snippet(plan, tool, 16, recommended=MEASURED, advice="Train so.")
    *names, (place, adapter) = TRAINING[tool]
    config = yaml.safe_load(text)
    assert [config[name] for name in names] == [2e-4, 0.1, "cosine"] and config[place] == adapter
    assert "# lora-init init MODEL DATA --ranks plan.json" in text and "# Train so." in text
    nothing = snippet(plan, tool, 16, advice="Tune it.")
    assert not set(names) & set(yaml.safe_load(nothing)) and "# Tune it." in nothing


def test_trl_trains_the_adapter_as_was_measured(tmp_path, monkeypatch):
    trl = pytest.importorskip("trl")
    plan, expected = allocated(model_and_statistics("CAUSAL_LM")[1])
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained("MODEL")
    seen = {}
    exec(snippet(plan, "peft", 16), seen)
    get_peft_model(tiny_llama(), seen["config"]).save_pretrained("adapter")
    monkeypatch.setattr(trl, "SFTTrainer", lambda model, **given: seen.update(given, model=model))
    monkeypatch.setattr(trl, "SFTConfig", lambda *_, **settings: settings)
    plan = replace(plan, provenance=replace(plan.provenance, model_id=None))
    exec(snippet(plan, "trl", 16, recommended=MEASURED), {"DATASET": [1]})
    assert seen["args"] == {"learning_rate": 2e-4, "warmup_steps": 0.1, "lr_scheduler_type": "cosine"}
    layers = {name: module for name, module in seen["model"].named_modules() if hasattr(module, "lora_A")}
    ranks = {name: module.lora_A["default"].out_features for name, module in layers.items()}
    assert {name.removeprefix("base_model.model."): rank for name, rank in ranks.items()} == expected
    assert all(p.requires_grad for name, p in seen["model"].named_parameters() if "lora_" in name)


WORDS = {"h.0.up": 3, "h.0.down": 1, "h.1.up": 2, "h.1.down": 0}
ABOUT = """\
# Planned by lora_init: policy by hand, budget by hand.
# RankAllocation(3 of 4 layers with rank 1 to 3, total rank 6), from a plan made by hand.
"""
COMMAND = "# lora-init init MODEL DATA --ranks p.json --lora-alpha 4 --output adapter\n"
TRAINED = {"learning_rate": 2e-4, "warmup": 0.1, "schedule": "cosine"}
OLDER = "# Before transformers 5 a share for the warm-up is called warmup_ratio.\n"
WHOLE = {
    "peft": ABOUT
    + """\
# This starts at random. lora_init.build_adapter(statistics, plan).apply(model) starts from the data.
from peft import LoraConfig

config = LoraConfig(
    r=2,
    lora_alpha=4,
    rank_pattern={
        "^(?:h\\\\.0\\\\.up)$": 3,
        "^(?:h\\\\.0\\\\.down)$": 1
    },
    alpha_pattern={
        "^(?:h\\\\.0\\\\.up)$": 6,
        "^(?:h\\\\.0\\\\.down)$": 2
    },
    target_modules=[
        "h.0.up",
        "h.0.down",
        "h.1.up"
    ],
)
""",
    "axolotl": ABOUT
    + "# axolotl 0.18 or newer. Make the adapter first; without lora_model_dir these ranks start at random:\n"
    + COMMAND
    + """\
# Train it so.
adapter: lora
lora_model_dir: adapter
lora_r: 2
lora_alpha: 4
lora_target_modules:
- h.0.up
- h.0.down
- h.1.up
lora_rank_pattern:
  ^(?:h\\.0\\.up)$: 3
  ^(?:h\\.0\\.down)$: 1
lora_alpha_pattern:
  ^(?:h\\.0\\.up)$: 6
  ^(?:h\\.0\\.down)$: 2
learning_rate: 0.0002
warmup_ratio: 0.1
lr_scheduler: cosine
""",
    "llama-factory": f"""\
{ABOUT}# LLaMA-Factory has one rank for all layers. Make the adapter first:
{COMMAND}# Train it so.
{OLDER}finetuning_type: lora
adapter_name_or_path: adapter
create_new_adapter: false
learning_rate: 0.0002
warmup_steps: 0.1
lr_scheduler_type: cosine
""",
    "ms-swift": f"""\
{ABOUT}# ms-swift has one rank for all layers: swift sft FILE.yaml. Make the adapter first:
{COMMAND}# Train it so.
adapters:
- adapter
learning_rate: 0.0002
warmup_ratio: 0.1
lr_scheduler_type: cosine
""",
    "trl": f"""\
{ABOUT}# Make the adapter first:
{COMMAND}# Train it so.
{OLDER}from peft import PeftModel
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

model = AutoModelForCausalLM.from_pretrained('MODEL')
trainer = SFTTrainer(
    PeftModel.from_pretrained(model, "adapter", is_trainable=True),
    args=SFTConfig("trained", learning_rate=0.0002, warmup_steps=0.1, lr_scheduler_type='cosine'),
    train_dataset=DATASET,
)
""",
}


@pytest.mark.parametrize("tool", WHOLE)
def test_a_plan_by_hand_as_the_whole_text_of_a_tool(tool):
    plan = RankAllocation(WORDS, 2)
    assert snippet(plan, tool, 4, plan_path="p.json", recommended=TRAINED, advice="Train  it\nso.") == WHOLE[tool]
    unknown = snippet(plan, tool, 4, plan_path="p.json")  # nothing was measured
    dropped = ("learning_rate", "warmup_", "lr_scheduler", "# Train it so.", OLDER.strip())
    left = [line for line in WHOLE[tool].splitlines() if not line.startswith(dropped)]
    assert unknown.replace('SFTConfig("trained")', "") == "\n".join(left).replace(
        'SFTConfig("trained", learning_rate=0.0002, warmup_steps=0.1, lr_scheduler_type=\'cosine\')', ""
    ) + "\n"  # fmt: skip


def test_fused_experts_are_named_as_the_parameters_that_they_are():
    targets = {"up": Target("up", "Linear", 8, 8), "experts.größe": Target("experts.größe", "E", 8, 8, experts=2)}
    plan = RankAllocation({"up": 2, "experts.größe": 2}, 2, targets)
    names = {}
    exec(snippet(plan, "peft", 4), names)
    assert names["config"].target_modules == {"up"} and names["config"].target_parameters == ["experts.größe"]
    text = snippet(plan, "axolotl", 4)
    assert yaml.safe_load(text)["lora_target_parameters"] == ["experts.größe"] and "größe" in text


def test_the_model_of_a_plan_is_the_one_that_trl_loads():
    plan, _ = allocated(model_and_statistics("CAUSAL_LM")[1])
    assert "AutoModelForCausalLM.from_pretrained('some/model')" in snippet(plan, "trl")


def test_what_was_not_measured_is_not_written():
    assert 'SFTConfig("trained", learning_rate=0.001)' in snippet(
        RankAllocation(WORDS, 2), "trl", 4, recommended={"learning_rate": 1e-3}
    )


def test_a_plan_as_data_for_other_programs():
    plan, _ = allocated(model_and_statistics("CAUSAL_LM")[1])
    text = snippet(replace(plan, notes=("ä",)), "json")
    assert json.loads(text) == json.loads(json.dumps(plan_to_dict(replace(plan, notes=("ä",)))))
    assert "ä" in text and text.startswith('{\n "format"') and text.endswith("}\n")


def test_unknown_formats_and_empty_plans():
    plan, _ = allocated(model_and_statistics()[1])
    refused(r"format='toml' is unknown. Choose from peft, trl, axolotl", snippet, plan, "toml")
    for alpha in (0, math.nan, -1):
        refused("^lora_alpha=.*, expected a number above 0", snippet, plan, "peft", alpha)
    nothing = replace(plan, ranks=dict.fromkeys(plan, 0))
    for tool in TOOLS:
        refused("no layer any rank", snippet, nothing, tool)


@pytest.mark.parametrize(("lora_alpha", "use_rslora", "scaling"), [(7, False, "1.75"), (8.5, True, "4.25")])
def test_axolotl_takes_whole_numbers_alone(lora_alpha, use_rslora, scaling):
    """Of 4 ranks on average a scaling of 1.75 gives rank 3 an alpha of 5.25; where all have 4, alpha is as given."""
    plan, _ = allocated(model_and_statistics()[1])
    words = rf"^axolotl takes whole numbers for lora_alpha, and a scaling of {scaling} gives .*, such as lora_alpha=4 "
    refused(words, snippet, plan, "axolotl", lora_alpha, use_rslora)
    level = allocate_ranks(model_and_statistics()[1], rank=4)
    assert yaml.safe_load(snippet(level, "axolotl", 7))["lora_alpha"] == 7
    refused("^axolotl takes whole numbers", snippet, level, "axolotl", 7.5)


def test_the_table_of_a_plan_is_read_back_as_the_plan():
    plan, _ = allocated(model_and_statistics()[1])
    text = snippet(plan, "csv")
    back, table = pd.read_csv(io.StringIO(text), index_col="layer"), plan.to_pandas()
    pd.testing.assert_frame_equal(back, table, atol=5e-7, rtol=0)  # six digits after the point
    assert "\r" not in text and text.splitlines()[1].rpartition(",")[2] == f"{table['explained_variance'].iloc[0]:.6f}"


def axolotl_reads(config):
    schema = pytest.importorskip("axolotl.utils.schemas.config", reason="axolotl is not installed")
    whole = yaml.safe_load((EXAMPLES / "axolotl.yaml").read_text())
    read = schema.AxolotlInputConfig(**whole | config)
    assert {name: getattr(read, name) for name in config} == config
    return read


def llama_factory_reads(config, monkeypatch):
    monkeypatch.setenv("DISABLE_VERSION_CHECK", "1")
    parser = pytest.importorskip("llamafactory.hparams", reason="LLaMA-Factory is not installed")
    whole = yaml.safe_load((EXAMPLES / "llama_factory.yaml").read_text())
    model, _, _, tuning, _ = parser.get_train_args(whole | config)
    return model, tuning


def test_the_examples_and_snippets_pass_the_schema_of_axolotl():
    read = axolotl_reads({})
    assert read.lora_model_dir == "adapter" and read.datasets[0].path == "chat.jsonl"
    plan, _ = allocated(model_and_statistics("CAUSAL_LM")[1])
    axolotl_reads(yaml.safe_load(snippet(plan, "axolotl", 8, recommended=MEASURED)))


def test_the_examples_and_snippets_pass_the_parser_of_llama_factory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    model, tuning = llama_factory_reads({}, monkeypatch)
    assert model.adapter_name_or_path == ["adapter"] and not tuning.create_new_adapter
    plan, _ = allocated(model_and_statistics("CAUSAL_LM")[1])
    unequal = yaml.safe_load(snippet(plan, "llama-factory", 24, recommended=MEASURED))
    assert llama_factory_reads(unequal, monkeypatch)[0].adapter_name_or_path == ["adapter"]
