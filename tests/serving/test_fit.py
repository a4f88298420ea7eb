"""Whether an adapter fits its base, by headers alone: 20 right pairs, 40 planted misfits, bad input, `--rename`."""

import copy
import hashlib
import json
import re
import shutil
import warnings
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import AutoPeftModel, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import lora_init
from lora_init import LoraInitError, check_fit, export_adapter
from lora_init.adapters import directory as directory_room
from lora_init.loading import checkpoint, models
from lora_init.serving import server
from lora_init.serving.fit import (
    FitReport,
    Misfit,
    _converted_by_peft,
    _core,
    _expert_in,
    _Fit,
    _misread_by_peft,
    _part_of,
    compare,
)
from lora_init.serving.trained import read_trained
from tests.commands import assert_one_line_error, run
from tests.conftest import batches_for, refused, tiny_bert, tiny_gpt2, tiny_llama
from tests.layers.made import mixtral, qwen3_moe
from tests.serving.made import config_of, load, logits, randomise
from tests.versions import OLD_TRANSFORMERS

pytestmark = pytest.mark.skipif(OLD_TRANSFORMERS, reason="transformers fuses experts since 5.0")

EXPERTS = dict(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
PREFIX = "base_model.model."


def llava():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = dict(num_hidden_layers=1, num_attention_heads=4, intermediate_size=24, hidden_size=32)
    vision = CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=32)
    text = LlamaConfig(**sizes | {"num_hidden_layers": 2}, vocab_size=64, num_key_value_heads=2)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text)).eval()


def qwen3(**changes):
    """A base of another architecture, in which the tensors of a Llama's adapter have the same names and shapes."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    settings = tiny_llama().config.to_dict() | {"head_dim": 8, "architectures": None, "model_type": "qwen3"} | changes
    return Qwen3ForCausalLM(Qwen3Config(**settings)).eval()


BASES = {
    "llama": tiny_llama, "gpt2": tiny_gpt2, "mixtral": mixtral, "qwen3_moe": qwen3_moe, "llava": llava,
    "tied": lambda: tiny_llama(tie_word_embeddings=True), "bert": lambda: tiny_bert(None), "classifier": tiny_bert,
    "wide": lambda: tiny_llama(hidden_size=48), "deep": lambda: tiny_llama(num_hidden_layers=1),
    "more tokens": lambda: tiny_llama(vocab_size=70), "qwen3": qwen3,
    "other weights": lambda: (torch.manual_seed(5), tiny_llama())[1], "body": lambda: tiny_llama().model,
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    for name, make in BASES.items():
        torch.manual_seed(2)
        make().save_pretrained(folder / name)
    load(folder / "llama").save_pretrained(folder / "shards", max_shard_size="20KB")
    return folder


def adapter(bases, name, directory, task_type="CAUSAL_LM", **settings):
    """Copy an adapter as PEFT saves it, of any class; each is made once."""
    settings = dict(r=4, lora_alpha=8, task_type=task_type) | settings
    made = bases / "adapters" / hashlib.sha256(repr((name, settings)).encode()).hexdigest()
    if not made.exists():
        model = BASES[name]()
        model.name_or_path = str(bases / name)
        model = get_peft_model(model, LoraConfig(**settings))
        randomise(model)
        model.save_pretrained(made)
    return shutil.copytree(made, directory)


def change(directory, tensors=None, **config):
    """Edit the tensors and the configuration of an adapter directory."""
    file = directory / "adapter_model.safetensors"
    if tensors is not None:
        save_file({key: value.contiguous().clone() for key, value in tensors(load_file(file)).items()}, file)
    (directory / "adapter_config.json").write_text(json.dumps(config_of(directory) | config))


def named(pattern, new):
    return lambda tensors: {re.sub(pattern, new, key): value for key, value in tensors.items()}


def one(change, end="layers.0.self_attn.q_proj.lora_A.weight"):
    """Change one tensor; None takes it out."""

    def edit(tensors):
        key = next(key for key in tensors if key.endswith(end))
        new = change(tensors.pop(key))
        return tensors | ({} if new is None else {key: new})

    return edit


QV = dict(target_modules=["q_proj", "v_proj"])
RIGHT = {
    "plain": ("llama", QV),
    "every layer": ("llama", dict(target_modules="all-linear")),
    "shards": ("llama", QV),
    "a pattern": ("llama", dict(target_modules=r".*layers\.1\.mlp\.(up|down)_proj")),
    "some layers": ("llama", QV | dict(layers_to_transform=[1])),
    "left out": ("llama", QV | dict(exclude_modules=["layers.0.self_attn.q_proj"])),
    "ranks": ("llama", QV | dict(rank_pattern={"q_proj": 2, r"1\.self_attn\.v_proj": 9}, alpha_pattern={"v_proj": 3})),
    "rsLoRA": ("llama", QV | dict(use_rslora=True)),
    "DoRA": ("llama", QV | dict(use_dora=True)),
    "embedding": ("llama", dict(target_modules=["embed_tokens", "q_proj"])),
    "new tokens": ("llama", QV | dict(trainable_token_indices=[3, 5])),
    "whole head": ("llama", QV | dict(modules_to_save=["lm_head"])),
    "biases": ("gpt2", dict(target_modules=["c_attn"], bias="lora_only")),
    "transposed": ("gpt2", dict(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)),
    "experts": ("mixtral", EXPERTS),
    "one kind of experts": ("qwen3_moe", dict(target_modules=["q_proj"], target_parameters=["experts.down_proj"])),
    "vision": ("llava", QV),
    "vision with its tower alone": ("llava", dict(target_modules=r".*vision_tower.*q_proj")),
    "encoder": ("bert", dict(target_modules=["query"], task_type="FEATURE_EXTRACTION")),
    "classifier": ("classifier", dict(target_modules=["query"], task_type="SEQ_CLS")),
}


@pytest.mark.parametrize("case", RIGHT)
def test_a_right_pair_fits(bases, tmp_path, case):
    name, settings = RIGHT[case]
    adapter(bases, name, tmp_path / "a", **settings)
    found = check_fit(tmp_path / "a", str(bases / "shards") if case == "shards" else None)
    assert found.misfits == () and found.lines == [] and found.tensors == len(load_file(
        tmp_path / "a" / "adapter_model.safetensors"))  # fmt: skip


def test_a_start_that_this_peft_knows_fits_whatever_it_needed(bases, tmp_path):
    adapter(bases, "llama", tmp_path / "a", **QV)
    for name in ("gaussian", "eva", "olora", "pissa", "pissa_niter_4", "corda", "loftq", "orthogonal", False):
        change(tmp_path / "a", init_lora_weights=name, loftq_config={"loftq_bits": 4})
        state = torch.random.get_rng_state()
        assert check_fit(tmp_path / "a").misfits == (), name
        assert torch.equal(torch.random.get_rng_state(), state), name


@pytest.mark.parametrize(("config", "said"), [
    ({"alpha_pattern": {"(": 4}}, "is no regular expression"), ({"alpha_pattern": {"*q_proj": 4}}, "nothing to repeat"),
    ({"rank_pattern": {"[q": 4}}, "is no regular expression"),
    ({"init_lora_weights": "of_tomorrow"}, "Unknown initialization init_lora_weights='of_tomorrow'"),
])  # fmt: skip
def test_a_configuration_that_peft_cannot_load_does_not_fit(config, said, bases, tmp_path):
    adapter(bases, "llama", tmp_path / "a", **QV)
    change(tmp_path / "a", **config)
    with pytest.raises((ValueError, re.error)):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases / "llama"), tmp_path / "a")
    assert re.search(said, check_fit(tmp_path / "a").lines[0])


def test_of_a_base_without_layers_none_is_nearest():
    layers = SimpleNamespace(_by_core={"q_proj": ["layers.0.q_proj", "layers.1.q_proj"], "up": ["layers.0.up"]})
    assert _Fit._nearest_layer(layers, "layers.1.q_prj") == "layers.1.q_proj"
    assert _Fit._nearest_layer(SimpleNamespace(_by_core={}), "layers.1.q_proj") == "-"


def test_a_task_that_adds_generate_alone_fits_a_base_without_it(bases, tmp_path):
    adapter(bases, "body", tmp_path / "a", task_type=None, target_modules=["q_proj"])
    change(tmp_path / "a", task_type="CAUSAL_LM")
    found = compare(tmp_path / "a", None, "vllm")  # an engine has the class of the checkpoint
    assert (found.model_class, found.misfits) == ("LlamaModel", ())


# What is changed, the base, the engine, and what is said: first the base it is made on, with its settings.
HEAD = dict(target_modules=["query"], task_type="SEQ_CLS")
LLAMA, GPT2, MOE, VISION = ("llama", QV), ("gpt2", dict(target_modules=["c_attn"])), ("mixtral", EXPERTS), ("llava", QV)
HALF = lambda value: value[..., : value.shape[-1] // 2]  # noqa: E731
NEAR = "Nearest: base_model.model.model.layers.0"
NAMES = {
    "no prefix of PEFT": (LLAMA, named(rf"^{PREFIX}", ""), NEAR),
    "the prefix twice": (LLAMA, named("^", PREFIX), NEAR),
    "no model.": (LLAMA, named(r"model\.model\.model\.", "model.model."), NEAR),
    "model. twice": (LLAMA, named("model.layers", "model.model.layers"), NEAR),
    "language_model.": (LLAMA, named("model.layers", "model.language_model.layers"), "Nearest: base_model.model.mod"),
    "module.": (LLAMA, named(rf"^{PREFIX}", rf"{PREFIX}module."), NEAR),
    "compiled": (LLAMA, named(rf"^{PREFIX}", rf"{PREFIX}_orig_mod."), NEAR),
    "the adapter's name": (LLAMA, named(r"(lora_[AB])\.", r"\1.default."), NEAR),
    "DoRA without model.": (
        ("llama", QV | dict(use_dora=True)),
        named(r"model\.model\.model\.", "model.model."),
        NEAR,
    ),
    "no .weight": (LLAMA, named(r"\.weight$", ""), NEAR),
    "GPT-2 without the prefix of PEFT": (GPT2, named(rf"^{PREFIX}", ""), "Nearest: base_model.model.transformer.h.0"),
    "GPT-2 without transformer.": (GPT2, named("transformer.", ""), "Nearest: base_model.model.transformer.h.0"),
    "experts without model.": (
        MOE,
        named(r"model\.model\.model\.", "model.model."),
        "Nearest: base_model.model.model.",
    ),
    "vision of text alone": (VISION, named("model.language_model.", "model."), "Nearest: base_model.model.model.lan"),
}
MISSPELT = {
    "a typo": (LLAMA, named("q_proj", "q_prj"), "has no layer of this name. Nearest: model.layers.0.self_attn.q_pro"),
    "one layer": (LLAMA, named(r"layers\.1", "layers.7"), "no layer of this name. Nearest: model.layers.1.self_attn"),
    "fused attention": (LLAMA, named("q_proj", "qkv_proj"), "no layer of this name. Nearest: model.layers.0.self_at"),
    "of BERT": (
        LLAMA,
        named(r"model.layers.(\d).self_attn.q_proj", r"encoder.layer.\1.attention.self.query"),
        "no layer",
    ),
    "the MLP, of which another layer has the nearer name": (
        LLAMA,
        named("self_attn.q_proj", "mlp.q_proj"),
        "Nearest: model.layers.0.self_attn.q_proj",
    ),
    "GPT-2's MLP": (GPT2, named("attn.c_attn", "mlp.c_attn"), "Nearest: transformer.h.0.attn.c_attn"),
    "one expert's": (
        MOE,
        named("experts.lora", "experts.0.up.lora"),
        "of one expert, and the base has its experts fused",
    ),
    "one expert's of a base without experts": (
        LLAMA,
        named(r"mlp\.up_proj|self_attn\.q_proj", "mlp.experts.3.up_proj"),
        "LlamaForCausalLM has no layer of this name. Nearest: model.layers.0.mlp.up_proj.",
    ),
    "experts of another block": (MOE, named("mlp.experts", "ffn.experts"), "has no layer of this name"),
    "vision tower of another": (VISION, named("vision_tower", "visual.blocks"), "has no layer of this name"),
}
OTHERS = {
    "half of A": (LLAMA, one(HALF), {}, "q_proj.lora_A.weight: is [4, 16], and [4, 32] fits"),
    "half of B": (LLAMA, one(lambda b: b[:8], "q_proj.lora_B.weight"), {}, "lora_B.weight: is [8, 4], and [32, 4] f"),
    "B transposed": (LLAMA, one(lambda b: b.T, "v_proj.lora_B.weight"), {}, "is [4, 16], and [16, 4] fits"),
    "of a wider base": (LLAMA, None, dict(base="wide"), "fits LlamaForCausalLM: a base of another size. 7 more are"),
    "of a deeper base": (LLAMA, None, dict(base="deep"), "no layer of this name. Nearest: model.layers.0.self_attn"),
    "of GPT-2": (GPT2, None, dict(base="llama"), "LlamaForCausalLM has no layer of this name"),
    "GPT-2's A transposed": (GPT2, one(lambda a: a.T, "h.0.attn.c_attn.lora_A.weight"), {}, "is [32, 4], and [4, 32"),
    "an expert less": (MOE, one(lambda a: a[:12], "0.mlp.experts.lora_A.weight"), {}, "is of 3 experts, and Mixtral"),
    "vision's A": (VISION, one(HALF), {}, "is [4, 16], and [4, 32] fits LlavaForConditionalGeneration"),
    "rank of the config": (LLAMA, None, dict(r=8), "has 4 rows of rank, and adapter_config.json says 8. 7 more are"),
    "rank of the config, misnamed": (LLAMA, named(r"model\.model", "model"), dict(r=8), "has 4 rows of rank, and"),
    "rank by pattern": (LLAMA, None, dict(rank_pattern={"q_proj": 2}), "has 4 rows of rank, and adapter_config.json"),
    "config selects less": (LLAMA, None, dict(target_modules=["v_proj"]), "adapter_config.json does not select it"),
    "config selects more": (LLAMA, None, dict(target_modules=["q_proj", "v_proj", "k_proj"]), "k_proj.lora_A.weight"),
    "config selects nothing": (LLAMA, None, dict(target_modules=["wqkv"]), "adapter_config.json: does not go with L"),
    "a tensor less": (LLAMA, one(lambda a: None), {}, "layers.0.self_attn.q_proj.lora_A.weight: is not in adapter_m"),
    "experts not in the config": (MOE, None, dict(target_parameters=None), "does not select it"),
    "integers": (LLAMA, one(lambda a: a.to(torch.int8)), {}, "is I8, and A and B are float32, float16 or bfloat16"),
    "integers of DoRA": (("llama", QV | dict(use_dora=True)), one(lambda m: m.to(torch.int8), "lora_magnitude_vector"),
                         {}, "is I8, and A and B are float32, float16 or bfloat16"),
    "eight bits": (VISION, one(lambda a: a.to(torch.float8_e4m3fn)), {}, "is F8_E4M3, and A and B are"),
    "rank beyond vLLM": (("llama", QV | dict(r=600)), None, dict(engine="vllm"), "vllm takes at most rank 512, and"),
    "rank beyond TGI": (("llama", QV | dict(r=12)), None, dict(engine="tgi"), "TGI takes rank 8 or a multiple of 16"),
    "ranks for SGLang": (("llama", QV | dict(rank_pattern={"q_proj": 2})), None, dict(engine="sglang"), "SGLang rea"),
    "rsLoRA for SGLang": (("llama", QV | dict(use_rslora=True)), None, dict(engine="sglang"), "does not read use_rs"),
    "DoRA for vLLM": (("llama", QV | dict(use_dora=True)), None, dict(engine="vllm"), "vllm does not take DoRA."),
    "experts for TGI": (MOE, None, dict(engine="tgi"), "tgi does not take an adapter of the parameter"),
    "experts for vLLM": (MOE, None, dict(engine="vllm"), "vLLM has a form of its own for experts, and drops or refu"),
    "embedding for vLLM": (("llama", dict(target_modules=["embed_tokens"])), None, dict(engine="vllm"), "not take an"),
    "a tied head for vLLM": (("tied", dict(target_modules=["lm_head", "q_proj"])), None, dict(engine="vllm"), "tied"),
    "MLX": (LLAMA, None, dict(engine="mlx"), "MLX reads no directory of PEFT. `lora-init export --engine mlx`"),
    "a bias of three labels": (("classifier", HEAD), one(lambda b: b.new_ones(3), "classifier.bias"), {},
                               "classifier.weight: is [2, 32], and [3, 32] fits BertForSequenceClassification"),
    "half a module of a classifier": (
        ("classifier", HEAD | dict(modules_to_save=["pooler.dense"])), one(lambda w: w[:16], "pooler.dense.weight"), {},
        "pooler.dense.weight: is [16, 32], and [32, 32] fits BertForSequenceClassification",
    ),
    "vocabulary": (("more tokens", dict(target_modules=["embed_tokens"])), None, dict(base="llama"), "is for 70 tok"),
    "a head of more tokens": (("more tokens", QV | dict(modules_to_save=["lm_head"])), None, dict(base="llama"),
                              "is for 70 tokens, and the vocabulary of the base has 64"),
}  # fmt: skip


# What is said of each kind.
WORDS = {
    "name": "has no layer of this name. Nearest: |is of one expert, and the base has", "missing": "^is not in adapter_",
    "config": "^its layer is there, and adapter_config.json does not select it|^does not go with",
    "shape": r"^is \[.* fits .*: a base of another size", "rank": "^has .* rows of rank|^is of . experts, and",
    "type": "^is .*, and A and B are", "vocabulary": "^is for .* tokens, and the vocabulary of the base has",
    "engine": "`lora-init export --engine .*` writes what it takes", "export": "does not take|takes at most",
}  # fmt: skip


@pytest.mark.parametrize("case", [*NAMES, *MISSPELT, *OTHERS])
def test_a_misfit_is_found(bases, tmp_path, case):
    row = (NAMES | MISSPELT).get(case)
    (name, settings), tensors, more, expected = OTHERS[case] if row is None else (row[0], row[1], {}, row[2])
    adapter(bases, name, tmp_path / "a", **settings)
    # PEFT loads names that have the adapter's own, and engines do not.
    base, engine = more.get("base"), "vllm" if case == "the adapter's name" else more.get("engine")
    change(tmp_path / "a", tensors, **{key: value for key, value in more.items() if key not in ("base", "engine")})
    found = check_fit(tmp_path / "a", None if base is None else str(bases / base), engine)
    assert any(expected in line for line in found.lines), found.lines
    assert all(re.search(WORDS[one.kind], one.problem) for one in found.misfits), found.misfits
    assert all("\n" not in line for line in found.lines)
    assert bool(found.renames) == (case in NAMES)
    with pytest.raises(LoraInitError):
        found.check()


@pytest.fixture(scope="module")
def ours(bases, tmp_path_factory):
    """An adapter that lora_init has started: it knows of which weights."""
    directory = tmp_path_factory.mktemp("ours") / "adapter"
    lora_init.initialize(load(bases / "llama"), batches_for("llama"), rank=4).save_pretrained(directory)
    return directory


@pytest.mark.parametrize(("base", "expected"), [
    ("llama", None),
    ("shards", None),
    ("other weights", "for a base of the same form with other weights"),
    ("more tokens", "parameters, and this one has"),
])  # fmt: skip
def test_the_base_that_an_adapter_was_made_for_is_told_from_others(bases, ours, base, expected):
    found = check_fit(ours, str(bases / base))
    lines = found.lines
    found.check()  # it is applied all the same
    assert lines == [] if expected is None else len(lines) == 1 and expected in lines[0]


@pytest.mark.parametrize("name", ["llama", "mixtral"])  # the file of the second has each expert apart
def test_a_base_of_another_configuration_is_told_of(bases, tmp_path, name):
    targets = {"target_parameters": EXPERTS["target_parameters"]} if name == "mixtral" else {}
    made = lora_init.initialize(load(bases / name), batches_for("llama"), rank=4, method="random", **targets)
    made.save_pretrained(tmp_path / "a")
    shutil.copytree(bases / name, tmp_path / "base")
    notes = [check_fit(tmp_path / "a", str(tmp_path / "base")).notes]
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.25}))
    notes.append(check_fit(tmp_path / "a", str(tmp_path / "base")).notes)
    told = f"rms_norm_eps {config['rms_norm_eps']} instead of 0.25:"
    assert [told in " ".join(said) for said in notes] == [False, True]


def test_the_configuration_of_the_base_that_an_adapter_names_is_compared(bases, tmp_path):
    """PEFT keeps no record: the base that it names is there, and this one has the same weights."""
    directory = adapter(bases, "llama", tmp_path / "a", **QV)
    config = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": str(bases / "llama")})
    )
    shutil.copytree(bases / "llama", tmp_path / "base")
    notes = [check_fit(directory, str(tmp_path / "base")).notes]
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.25}))
    notes.append(check_fit(directory, str(tmp_path / "base")).notes)
    told = f"rms_norm_eps {config['rms_norm_eps']} instead of 0.25:"
    assert [told in " ".join(said) for said in notes] == [False, True]


def test_weights_that_cannot_be_compared_are_said(bases, tmp_path):
    """A checkpoint has each expert apart, and transformers' model has them fused: no fingerprint is made."""
    directory = adapter(bases, "mixtral", tmp_path / "a", **EXPERTS)
    config = json.loads((directory / "adapter_config.json").read_text())
    named = config | {"base_model_name_or_path": str(bases / "mixtral")}
    (directory / "adapter_config.json").write_text(json.dumps(named))
    torch.manual_seed(7)
    mixtral().save_pretrained(tmp_path / "other")
    assert "were not compared" in " ".join(check_fit(directory, str(tmp_path / "other")).notes)


def test_no_code_that_comes_with_a_base_is_run(bases, tmp_path):
    directory = adapter(bases, "llama", tmp_path / "a", **QV)
    shutil.copytree(bases / "llama", tmp_path / "custom")
    (tmp_path / "custom/new.py").write_text("raise SystemExit('run')")
    config = {"model_type": "new", "auto_map": {"AutoConfig": "new.Config"}}
    (tmp_path / "custom/config.json").write_text(json.dumps(config))
    said = "custom.* needs code that comes with it. Read that code, then pass trust_remote_code=True."
    refused(said, check_fit, directory, str(tmp_path / "custom"))
    for no_base in (0, [], torch.ones(2)):  # which stood for the adapter's own
        refused("^base is needed, as a path, and got ", check_fit, directory, no_base)


@cache
def loaded(bases, name):
    options = dict(experts_implementation="eager") if name == "mixtral" else {}
    return type(BASES[name]()).from_pretrained(bases / name, dtype=torch.float64, **options).eval()


# Patterns are of Llama's layer alone.
RENAMED = [(case, by) for case in NAMES for by in ("the model", "the file")[: 1 + (NAMES[case][0] is LLAMA)]]


@pytest.mark.parametrize(("case", "patterns_by"), RENAMED)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_a_renamed_adapter_does_what_it_did_before(bases, tmp_path, case, patterns_by):
    (name, settings), misname, _ = NAMES[case]
    layer = "model.layers.0.self_attn.q_proj"
    if name == "llama":
        settings = settings | dict(rank_pattern={layer: 2}, alpha_pattern={layer: 4})
    directory = adapter(bases, name, tmp_path / "a", **settings)
    change(directory, lambda tensors: {key: value.double() for key, value in tensors.items()})

    def model():
        return copy.deepcopy(loaded(bases, name))

    expected, plain = logits(model(), directory), logits(model())
    patterns = {}
    if name == "llama" and patterns_by == "the file":
        (key,) = misname({f"{PREFIX}{layer}.lora_A.weight": 0})
        key = key.removeprefix(PREFIX).partition(".lora_A")[0]
        patterns = {"rank_pattern": {key: 2}, "alpha_pattern": {key: 4}}
    change(directory, misname, **patterns)
    export_adapter(directory, tmp_path / "b", keep_ranks=True, rename=True)
    assert (expected - plain).abs().max() > 1e-3
    torch.testing.assert_close(logits(model(), tmp_path / "b"), expected, atol=1e-9, rtol=0)
    assert not check_fit(tmp_path / "b").misfits


def test_layers_that_keep_their_names_keep_what_patterns_say(bases, tmp_path):
    patterns = dict(alpha_pattern={"v_proj": 32, "model.layers.0.self_attn.q_proj": 2}, rank_pattern={"v_proj": 2})
    directory = adapter(bases, "llama", tmp_path / "a", **QV | patterns)
    before = {name: layer.scaling for name, layer in read_trained(directory).layers.items()}
    change(directory, named("q_proj", "q_prj"))
    renames = {
        key: key.replace("q_prj", "q_proj")
        for key in directory_room.AdapterDirectory(directory).shapes
        if "q_prj" in key
    }
    assert {name: one.scaling for name, one in read_trained(directory, None, renames).layers.items()} == before
    assert len(set(before.values())) == 3


def whole(directory):
    tiny_llama().save_pretrained(directory)


def form(*names):
    def write(directory):
        directory.mkdir()
        save_file({name: torch.zeros(2, 2) for name in names}, directory / "pytorch_lora_weights.safetensors")

    return write


def dangling(directory):
    directory.symlink_to(directory.with_name("gone"))


def incomplete(directory):
    directory.mkdir()
    (directory / "x.incomplete").write_bytes(b"x")


BAD = {
    "full weights": (whole, "is a checkpoint of a whole model"),
    "kohya": (form("lora_unet_down_0.lora_down.weight"), "holds an adapter in kohya's form"),
    "diffusers": (form("unet.down.0.lora_A.weight"), "holds an adapter in diffusers' form"),
    "weights under another name": (form("model.layers.0.weight"), "holds no lora_A, but weights of a whole model"),
    "half a download": (incomplete, "is half a download"),
    "a link": (dangling, "gone, which does not exist"),
}
DAMAGED = {
    "cut": (lambda file: file.write_bytes(file.read_bytes()[:-100]), "is damaged"),
    "cut in the header": (lambda file: file.write_bytes(file.read_bytes()[:50]), "is damaged"),
    "empty": (lambda file: file.write_bytes(b""), "is damaged"),
    "Git LFS": (lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\n"), "a pointer of Git LFS"),
    "a link": (lambda file: (file.unlink(), file.symlink_to("blob")), "is a link to blob, which does not exist"),
    "none": (lambda file: file.unlink(), "has no adapter_model.safetensors"),
    "full weights": (lambda file: save_file({"lm_head.weight": torch.ones(2)}, file), "but weights of a whole model"),
    "kohya": (lambda file: save_file({"lora_te_0.lora_down.weight": torch.ones(2)}, file), "in kohya's form"),
}  # fmt: skip


def test_a_field_that_this_peft_does_not_have_is_no_misfit(bases, tmp_path):
    directory = adapter(bases, "llama", tmp_path / "a", **QV)
    change(directory, a_field_of_tomorrow=True)
    found = run("inspect", directory, "--base", bases / "llama")
    assert found.exit_code == 0 and "tensors are applied" in found.stdout, found.output


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_adapter_is_named_in_one_line(bases, tmp_path, case):
    write, expected = BAD[case]
    write(tmp_path / "a")
    assert_one_line_error(run("inspect", tmp_path / "a", "--base", bases / "llama"), expected)


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_adapter_is_named_in_one_line(bases, tmp_path, case):
    damage, expected = DAMAGED[case]
    directory = adapter(bases, "llama", tmp_path / "a", **QV)
    damage(directory / "adapter_model.safetensors")
    assert_one_line_error(run("inspect", directory, "--base", bases / "llama"), expected)


def test_inspect_says_what_fits_by_its_exit_status(bases, tmp_path):
    directory = adapter(bases, "llama", tmp_path / "a", **QV)
    result = run("inspect", directory, "--engine", "vllm")
    assert result.exit_code == 0 and "all 8 tensors are applied" in " ".join(result.stdout.split())
    change(directory, named("model.layers", "layers"))
    result = run("inspect", directory, "--base", bases / "llama")
    said = " ".join(result.stdout.split())
    assert result.exit_code == 1 and "no: 8 names below" in said and "--rename" in said
    assert json.loads(run("inspect", directory, "--base", bases / "llama", "--json").stdout)["fit"]["fits"] is False
    assert run("export", directory, "-o", tmp_path / "b", "--rename").exit_code == 0
    assert run("inspect", tmp_path / "b", "--engine", "vllm").exit_code == 0


def test_an_adapter_fits_the_tied_base_that_it_was_made_for(bases, tmp_path):
    lora_init.initialize(load(bases / "tied"), batches_for("llama"), rank=4).save_pretrained(tmp_path / "a")
    found = check_fit(tmp_path / "a", str(bases / "tied"))
    assert not found.misfits and not any("config.json" in note for note in found.notes)
    rotated = load(bases / "tied")
    rotated.config.rope_parameters["rope_theta"] = 5.0
    rotated.save_pretrained(tmp_path / "rotated")
    found = check_fit(tmp_path / "a", str(tmp_path / "rotated"))
    assert any("with rope_parameters.rope_theta 10000.0 instead of 5.0" in note for note in found.notes)
    other = load(bases / "tied")
    other.model.embed_tokens.weight.data.add_(1)
    other.save_pretrained(tmp_path / "other")
    assert "with other weights" in check_fit(tmp_path / "a", str(tmp_path / "other")).lines[0]


def short(tensors):
    """Names as of the class without its head: one `model.` less."""
    return named(r"model\.model\.model\.", "model.model.")(tensors)


# Names that plain PEFT does not apply to what `AutoModelForCausalLM` loads, on a checkpoint of that class.
UNTYPED = QV | dict(task_type=None)
LOST = {
    "no task type": (UNTYPED, short),
    "no task type, no prefix": (UNTYPED, named(rf"^{PREFIX}", "")),
    "no task type, every layer": (dict(target_modules="all-linear", task_type=None), short),
    "an embedding without the prefix": (dict(target_modules=["embed_tokens", "q_proj"]), named(rf"^{PREFIX}", "")),
    "an embedding, short": (dict(target_modules=["embed_tokens", "q_proj"], task_type=None), short),
    "lm_head without the prefix": (dict(target_modules=["lm_head", "q_proj"]), named(rf"^{PREFIX}", "")),
    "a whole lm_head without the prefix": (QV | dict(modules_to_save=["lm_head"]), named(rf"^{PREFIX}", "")),
    "a whole embedding, short": (UNTYPED | dict(modules_to_save=["embed_tokens"]), short),
    "new tokens without the prefix": (QV | dict(trainable_token_indices=[3, 5]), named(rf"^{PREFIX}", "")),
}


@pytest.mark.parametrize("case", LOST)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_names_of_another_class_than_the_checkpoints_are_repaired(bases, tmp_path, case):
    settings, misname = LOST[case]
    directory = adapter(bases, "llama", tmp_path / "a", **settings)
    llama = load(bases / "llama")
    expected = logits(copy.deepcopy(llama), directory)
    change(directory, misname)
    try:
        applied = not torch.equal(logits(copy.deepcopy(llama), directory), logits(llama))
    except KeyError:  # of a module that is trained whole
        applied = False
    assert not applied
    for engine in (None, "vllm"):
        found = check_fit(directory, engine=engine)
        assert found.stops and found.renames and found.model_class == "LlamaForCausalLM"
        with pytest.raises(LoraInitError):
            export_adapter(directory, tmp_path / "b", engine)
    export_adapter(directory, tmp_path / "b", keep_ranks=True, rename=True)
    torch.testing.assert_close(logits(llama, tmp_path / "b"), expected)
    assert not check_fit(tmp_path / "b").misfits


@pytest.mark.filterwarnings("ignore")
def test_the_class_that_an_adapter_names_is_kept(bases, tmp_path):
    model = AutoModel.from_pretrained(bases / "llama")
    get_peft_model(model, LoraConfig(**QV, init_lora_weights=False)).save_pretrained(tmp_path / "a")
    found = check_fit(tmp_path / "a")
    loaded = AutoPeftModel.from_pretrained(tmp_path / "a").base_model.model
    assert not found.misfits and found.model_class == type(loaded).__name__
    (note,) = found.notes
    assert note == "LlamaModel is what the adapter names. A LlamaForCausalLM, as the checkpoint is, loses 8 of it."
    done = export_adapter(tmp_path / "a", tmp_path / "b")
    assert "PeftModel.from_pretrained(AutoModel.from_pretrained(" in done.command
    with pytest.raises(LoraInitError, match="LlamaForCausalLM has no layer of this name"):
        export_adapter(tmp_path / "a", tmp_path / "c", "vllm")
    export_adapter(tmp_path / "a", tmp_path / "c", "vllm", rename=True)
    assert not check_fit(tmp_path / "c").misfits and not check_fit(tmp_path / "c", engine="vllm").misfits


MADE_BY = {
    "ours": lambda bases, to: lora_init.initialize(load(bases / "llama"), batches_for("llama"), rank=4),
    "ours without a head": lambda bases, to: lora_init.initialize(
        AutoModel.from_pretrained(bases / "llama"), batches_for("llama"), rank=4, task_type="FEATURE_EXTRACTION"
    ),
    "PEFT": lambda bases, to: adapter(bases, "llama", to, **QV),
    "PEFT without a task type": lambda bases, to: adapter(bases, "llama", to, **UNTYPED),
}


@pytest.fixture(scope="module")
def made_by(bases, tmp_path_factory):
    """Save an adapter in one of these ways, once."""

    @cache
    def directory(maker):
        to = tmp_path_factory.mktemp("made") / "a"
        made = MADE_BY[maker](bases, to)
        if made != to:
            made.save_pretrained(to)
        return to

    return directory


@pytest.mark.parametrize("maker", MADE_BY)
@pytest.mark.parametrize(("base", "expected"), [
    ("llama", None),
    ("qwen3", "Qwen3ForCausalLM"),
    ("other weights", "a base of the same form with other weights"),
])  # fmt: skip
def test_a_base_of_another_architecture_or_other_weights_is_named(bases, made_by, tmp_path, maker, base, expected):
    adapter = made_by(maker)
    shutil.copytree(bases / base, tmp_path / base)  # under another path than is named
    found = check_fit(adapter, str(tmp_path / base))
    assert [one.kind for one in found.misfits] == ["base"] * (expected is not None)
    assert expected is None or expected in found.lines[0]
    assert not found.stops and found.notes == ()
    with pytest.warns(match="Is it the same base?") if expected else nullcontext():
        export_adapter(adapter, tmp_path / "b", base=str(tmp_path / base))


def test_a_base_that_lacks_weights_by_its_configuration_has_that_for_a_reason(bases, tmp_path):
    directory = adapter(bases, "llama", tmp_path / "a", **QV)
    shutil.copytree(bases / "llama", tmp_path / "biased")
    config = json.loads((tmp_path / "biased/config.json").read_text())
    (tmp_path / "biased/config.json").write_text(json.dumps(config | {"attention_bias": True}))
    (line,) = check_fit(directory, str(tmp_path / "biased")).lines
    assert line.endswith("which is this base with attention_bias False instead of True."), line


def test_the_revision_of_a_base_in_the_hubs_cache_is_compared(bases, tmp_path):
    """The cache names a snapshot by its commit; of a branch, or of a folder of one's own, nothing is known."""
    here, other = "a" * 40, "b" * 40
    shutil.copytree(bases / "llama", tmp_path / here)
    directory = adapter(bases, "llama", tmp_path / "adapter", **QV)
    for revision, base, said in (
        (other, tmp_path / here, [f"adapter_config.json: names revision {other}, and this is {here}."]),
        (here, tmp_path / here, []),
        ("main", tmp_path / here, []),
        (other, bases / "llama", []),
    ):
        change(directory, revision=revision)
        found = check_fit(directory, base)  # a path, as Python has it
        assert [line for line in found.lines if "revision" in line] == said and not found.stops


def test_the_base_that_an_adapter_names_is_sought_at_its_revision(bases, tmp_path, monkeypatch):
    sought, find = [], checkpoint.checkpoint_of
    monkeypatch.setattr("lora_init.serving.fit.checkpoint_of", lambda *words: sought.append(words) or find(*words))
    directory = adapter(bases, "llama", tmp_path / "a", **QV)
    change(directory, revision="v2", base_model_name_or_path="somebody/llama")
    check_fit(directory, str(bases / "llama"))
    assert sought == [(str(bases / "llama"), "v2"), ("somebody/llama", "v2")]


@pytest.mark.parametrize("task", ["Sequence", "Token"])
def test_a_classifier_has_as_many_labels_as_it_was_trained_for(bases, tmp_path, task):
    """The head in the file is the adapter's own; the model that the base makes has two labels."""
    model = getattr(transformers, f"AutoModelFor{task}Classification").from_pretrained(bases / "bert", num_labels=3)
    kind = {"Sequence": "SEQ_CLS", "Token": "TOKEN_CLS"}[task]
    get_peft_model(model, LoraConfig(r=2, target_modules=["query"], task_type=kind)).save_pretrained(tmp_path / "a")
    found = check_fit(tmp_path / "a", str(bases / "bert"))
    assert found.misfits == () and found.model_class == f"BertFor{task}Classification"


def test_what_a_record_says_of_a_base_that_was_quantized_is_not_compared(bases, ours, tmp_path):
    """Its weights were others than those in its files."""
    directory = shutil.copytree(ours, tmp_path / "a")
    origin = directory_room.AdapterDirectory(ours).origin
    for quantized, fits in ((None, False), ({"quant_method": "bitsandbytes"}, True)):
        known = origin["provenance"] | {"fingerprint": "0" * 32, "quantisation": quantized}
        change(directory, **directory_room.carrying(origin | {"provenance": known}, "CAUSAL_LM"))
        assert (check_fit(directory, str(bases / "llama")).misfits == ()) is fits


def test_a_checkpoint_that_was_saved_without_its_head_is_compared_by_its_weights(bases, tmp_path):
    body = AutoModel.from_pretrained(bases / "tied")
    body.save_pretrained(tmp_path / "body")
    made = lora_init.initialize(load(tmp_path / "body"), batches_for("llama"), rank=2, method="random")
    made.save_pretrained(tmp_path / "a")
    change(tmp_path / "a", base_model_name_or_path="gone")
    assert check_fit(tmp_path / "a", str(tmp_path / "body")).misfits == ()
    body.embed_tokens.weight.data.add_(1)
    body.save_pretrained(tmp_path / "other")
    (misfit,) = check_fit(tmp_path / "a", str(tmp_path / "other")).misfits
    assert misfit.problem.startswith("is for a base of the same form with other weights")


@pytest.mark.parametrize("named", ["somebody/llama", "no/name/of the hub", "{tmp}/damaged"])
def test_a_base_that_is_not_here_is_named(bases, tmp_path, named):
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{")
    directory, named = adapter(bases, "llama", tmp_path / "a", **QV), named.replace("{tmp}", str(tmp_path))
    change(directory, base_model_name_or_path=named)
    found = check_fit(directory, str(bases / "llama"))
    assert not found.misfits and f"names {named!r} as its base, with which" in found.notes[0]


TRAINED_WITH = {name: RIGHT[name] for name in (
    "plain", "every layer", "some layers", "ranks", "rsLoRA", "DoRA", "embedding", "new tokens", "whole head", "biases",
    "experts", "encoder", "classifier",
)}  # fmt: skip
TRAINED_WITH |= {
    "a tied head": ("tied", dict(target_modules=["lm_head", "q_proj"])),
    "a tied embedding": ("tied", dict(target_modules=["embed_tokens", "q_proj"])),
    "a bias of LoRA": ("llama", QV | dict(lora_bias=True)),
    "a rank beyond": ("llama", QV | dict(r=600)),
    "DoRA here and there": ("llama", QV | dict(use_dora=True, layers_to_transform=[1])),
}


@pytest.mark.parametrize("case", TRAINED_WITH)
@pytest.mark.parametrize("engine", ["vllm", "tgi", "llama.cpp", "mlx"])
@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_inspect_promises_what_export_writes(bases, tmp_path, case, engine):
    name, settings = TRAINED_WITH[case]
    directory = adapter(bases, name, tmp_path / "a", **settings)
    kinds = {one.kind for one in check_fit(directory, engine=engine).misfits}
    try:
        export_adapter(directory, tmp_path / "b", engine)
    except LoraInitError:
        assert kinds == {"export"}
    else:
        assert kinds <= {"engine"}


@pytest.mark.parametrize(("settings", "lost"), [(QV | dict(use_dora=True), ""), (QV, "q_proj.lora_B")])
def test_no_renaming_is_proposed_where_more_than_names_is_wrong(bases, tmp_path, settings, lost):
    directory = adapter(bases, "llama", tmp_path / "a", **settings)
    change(directory, lambda tensors: {
        key.replace(".model.model.", ".model."): value for key, value in tensors.items() if not lost or lost not in key
    })  # fmt: skip
    found = check_fit(directory, engine="vllm")
    assert found.misfits and not found.can_rename and "rename" not in found.lines[-1]
    refused("", export_adapter, directory, tmp_path / "b", "vllm", rename=True)


@pytest.mark.parametrize("kept", [False, True])
def test_no_two_tensors_are_given_one_name(bases, tmp_path, kept):
    """Each could be renamed alone; together the later one would take the place of the other, without a word."""
    directory = adapter(bases, "llama", tmp_path / "a", **QV)
    short, twice = named(rf"^{PREFIX}", ""), named("^", PREFIX)
    change(directory, lambda tensors: (tensors if kept else twice(tensors)) | short(tensors))
    found = check_fit(directory)
    assert found.misfits and not found.can_rename and not found.renames
    refused("", export_adapter, directory, tmp_path / "b", rename=True)
    assert not (tmp_path / "b").exists()


class Silent:
    """A server that has every adapter, and is not asked."""

    models = ()

    def __init__(self, *arguments):
        pass

    def find(self, name, model, base):
        return name, None


@pytest.mark.parametrize("command", ["dial", "verify", "export"])
def test_commands_refuse_a_misfit_before_a_model_is_loaded(bases, tmp_path, monkeypatch, command):
    directory = adapter(bases, "llama", tmp_path / "a", **QV)
    change(directory, target_modules=["q_proj", "v_proj", "k_proj"])
    (tmp_path / "data.txt").write_text("the cat\n" * 20)
    monkeypatch.setattr(server, "Server", Silent)
    monkeypatch.setattr(models, "load_model", None)
    monkeypatch.setattr(models.ModelSource, "load", None)
    more = {
        "dial": [tmp_path / "data.txt", "-o", tmp_path / "b"],
        "verify": ["--url", "http://127.0.0.1:1"],
        "export": ["-o", tmp_path / "b"],
    }
    result = run(command, directory, *more[command])
    code = 2 if command == "verify" else 1  # which has 1 for another thing that is served
    assert_one_line_error(result, "k_proj.lora_A.weight: is not in adapter_model", code=code)


def test_half_a_base_is_named_in_one_line(bases, tmp_path):
    directory = adapter(bases, "llama", tmp_path / "a", **QV)
    shutil.copytree(bases / "shards", tmp_path / "half")
    first = min((tmp_path / "half").glob("model-*.safetensors"))
    first.write_bytes(first.read_bytes()[:-8])
    assert_one_line_error(run("inspect", directory, "--base", tmp_path / "half"), first.name, "is damaged")
    first.unlink()
    assert_one_line_error(run("inspect", directory, "--base", tmp_path / "half"), f"has no {first.name}")
    assert_one_line_error(run("inspect", directory, "--base", tmp_path / "nowhere"), "no such directory")


def test_no_weight_is_read(bases, tmp_path, monkeypatch):
    """Only headers: neither the adapter's tensors nor those of the base, whose model has none."""
    import safetensors

    directory = adapter(bases, "llama", tmp_path / "a", **QV)
    for holder in (safetensors.torch, directory_room):
        monkeypatch.setattr(holder, "load_file", None, raising=False)
    monkeypatch.setattr(checkpoint.Stored, "read", None)
    assert not check_fit(directory).misfits


def test_nothing_is_renamed_where_names_fit_or_no_name_does(bases, tmp_path):
    directory = adapter(bases, "llama", tmp_path / "a", **QV)
    with pytest.raises(LoraInitError, match=r"has the names of LlamaForCausalLM\. Leave rename out"):
        export_adapter(directory, tmp_path / "b", rename=True)
    change(directory, named("q_proj", "q_prj"))
    with pytest.raises(LoraInitError, match=r"has no layer of this name\. Nearest: model\.layers"):
        export_adapter(directory, tmp_path / "b", rename=True)


@pytest.mark.parametrize(("engine", "said"), [
    ("vllm", "vLLM gets all by export."), ("tgi", "TGI gets none."),
])  # fmt: skip
def test_for_an_engine_the_tensors_are_counted_by_part(bases, tmp_path, engine, said):
    adapter(bases, *MOE[:1], tmp_path / "a", **MOE[1])
    found = check_fit(tmp_path / "a", None, engine)
    n_blocks = sum("q_proj.lora_A" in key for key in load_file(tmp_path / "a/adapter_model.safetensors"))
    assert f"{2 * n_blocks} of attention" in found.notes[-1] and f"{4 * n_blocks} of experts" in found.notes[-1]
    assert found.notes[-1].endswith(said)


@pytest.mark.parametrize(("n", "said"), [(1, ""), (2, " 1 more are alike."), (5, " 4 more are alike.")])
def test_misfits_of_a_kind_are_one_line_with_their_number(n, said):
    alike = tuple(Misfit("name", f"tensor {i}", "is not there.") for i in range(n))
    other = Misfit("rank", "adapter_config.json", "has rank 4.")
    found = FitReport("base", "LlamaForCausalLM", 9, (*alike, other))
    assert found.lines == [f"tensor 0: is not there.{said}", "adapter_config.json: has rank 4."]


REPORT = FitReport("base", "LlamaForCausalLM", 9)


@pytest.mark.parametrize(("kinds", "renames", "stops", "can_rename"), [
    ((), {}, False, False),
    ((), {"a": "b"}, False, True),
    (("base",), {}, False, False),
    (("revision", "base"), {}, False, False),
    (("name",), {"a": "b"}, True, True),
    (("name",), {}, True, False),
    (("name", "config", "engine"), {"a": "b"}, True, True),
    (("name", "export"), {"a": "b"}, True, False),
    (("base", "shape"), {"a": "b"}, True, False),
])  # fmt: skip
def test_what_stops_an_adapter_and_what_a_renaming_mends(kinds, renames, stops, can_rename):
    misfits = tuple(Misfit(kind, f"at {kind}", "is wrong.") for kind in kinds)
    report = replace(REPORT, misfits=misfits, renames=renames)
    assert (report.stops, report.can_rename) == (stops, can_rename)
    remedy = "`lora-init export --rename` writes names that fit."
    lines = [f"at {kind}: is wrong." for kind in kinds]
    assert report.lines == [*lines, *[remedy] * bool(lines and can_rename)]
    assert report.to_dict() == {
        "base": "base", "model_class": "LlamaForCausalLM", "tensors": 9, "renames": renames, "notes": (),
        "fits": not kinds,
        "misfits": tuple({"kind": kind, "where": f"at {kind}", "problem": "is wrong."} for kind in kinds),
    }  # fmt: skip
    if stops:
        assert refused(".", report.check) == lines[0] + f" {remedy}" * can_rename
        return
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        report.check()
    assert [str(one.message) for one in said] == [f"at {kind} is wrong. Is it the same base?" for kind in kinds]


def test_a_renaming_is_given_where_nothing_else_is_wrong():
    name, other = Misfit("name", "a", "is wrong."), Misfit("rank", "b", "has rank 4.")
    misnamed = replace(REPORT, misfits=(name,), renames={"a": "b"})
    assert misnamed.to_rename("here") == {"a": "b"}
    refused("^b: has rank 4.$", replace(misnamed, misfits=(name, other)).to_rename, "here")
    refused("^a: is wrong.$", replace(misnamed, renames={}).to_rename, "here")
    said = "^rename: here has the names of LlamaForCausalLM. Leave rename out.$"
    refused(said, REPORT.to_rename, "here")
    with pytest.warns(match=r"^c of another\. Is it the same base\?$"):
        both = replace(misnamed, misfits=(name, Misfit("base", "c", "of another.")))
        assert both.to_rename("here") == {"a": "b"}


@pytest.mark.parametrize(("key", "part"), [
    ("model.layers.0.mlp.experts.down_proj", "experts"), ("h.0.self_attn.q_proj", "attention"),
    ("encoder.0.Attention.q", "attention"), ("lm_head.lora_A", "head"), ("model.score.weight", "head"),
    ("a.classifier.weight", "head"), ("model.embed_tokens", "embeddings"), ("transformer.wte.weight", "embeddings"),
    ("mlp.gate.weight", "router"), ("mlp.router.weight", "router"), ("mlp.gate_proj.weight", "MLP"),
    ("h.0.mlp.c_fc", "MLP"),
])  # fmt: skip
def test_a_tensor_is_of_the_part_that_its_name_tells(key, part):
    assert _part_of(key) == part


@pytest.mark.parametrize(("layer", "core"), [
    ("base_model.model.model.layers.0.q", "layers.0.q"), ("model.language_model.layers.0.q", "layers.0.q"),
    ("transformer.h.0.q", "h.0.q"), ("module.text_model.h.model.q", "h.model.q"),
    ("_orig_mod.model.lm_head", "lm_head"), ("q", "q"),
])  # fmt: skip
def test_the_core_of_a_name_is_what_no_wrapper_has_put_before_it(layer, core):
    assert _core(layer) == core


@pytest.mark.parametrize(("key", "expert"), [
    ("mlp.experts.12.up", 12), ("experts.0.up", 0), ("mlp.experts.up", -1), ("mlp.myexperts.3.up", -1), ("a.3.up", -1),
])  # fmt: skip
def test_which_expert_a_tensor_is_of_is_in_its_name(key, expert):
    assert _expert_in(key) == expert


def test_what_peft_converts_is_noted_with_how_engines_get_it():
    said = "PEFT brings its names into the model's form; for"
    assert _converted_by_peft({"a": "b"}) == f"{said} engines `lora-init export --rename` does."
    single = {"a": "b", "experts.0.up": None}
    assert _converted_by_peft(single) == f"{said} `lora-init export` load and save it by PEFT."


@pytest.mark.parametrize(("config", "which"), [
    ({}, None), ({"use_rslora": True}, "use_rslora"), ({"alpha_pattern": {"w1": 8}}, "an alpha_pattern of experts"),
    ({"alpha_pattern": {"w2": 8}}, None), ({"alpha_pattern": {"experts.1.w2": 8}}, "an alpha_pattern of experts"),
    ({"alpha_pattern": {"q": 8}}, None),
])  # fmt: skip
def test_a_scaling_of_experts_that_peft_does_not_keep_is_a_misfit(config, which):
    """As PEFT 0.21 does: r and lora_alpha of gate and up projection double, and w2 alone keeps a pattern of its own."""
    layers = ["a.q", *(f"a.experts.{expert}.{kind}" for expert in (0, 1) for kind in ("w1", "w2", "w3"))]
    names = [f"{layer}.lora_A.weight" for layer in layers]
    said = [misfit.problem for misfit in _misread_by_peft(names, config)]
    assert len(said) == (which is not None) and all(one.startswith(f"has {which}, and PEFT brings") for one in said)
    assert not [*_misread_by_peft(names[:1], config)]  # names of other layers, which keep what they have
