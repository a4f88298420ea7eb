"""What the engines' loaders demand, restated from their sources, holds for what is exported for them."""

import math
import re
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from lora_init import check_fit, export_adapter
from lora_init.serving import experts, writers
from lora_init.serving.base import read_base
from lora_init.serving.engines import ENGINES, PEFT, check_rank, find_engine, vllm_rank
from lora_init.serving.support import _not_taken, export_options, serving_note, try_export, why_not_as_it_is
from lora_init.serving.trained import EMBEDDING, Layer, Trained, read_trained
from lora_init.serving.writers import gguf_names
from tests.conftest import refused as one_line
from tests.conftest import tiny_bert, tiny_llama, tiny_t5
from tests.quick import ROOT
from tests.serving.made import ADAPTERS, config_of, load, refused, train
from tests.versions import older

UNEVEN = dict(
    target_modules=r".*layers\.(0\.self_attn\.[qk]|[02]\.self_attn\.v)_proj|.*layers\.[12]\.mlp\.down_proj",
    rank_pattern={"layers.0.self_attn.q_proj": 9, "down_proj": 1}, use_rslora=True, alpha_pattern={"v_proj": 3},
)  # fmt: skip
BLOCKS = 3


def sglang(directory):
    """SGLang, srt/lora/lora_config.py and mem_pool.py: a list of modules, no patterns, every shape as `r` says."""
    config = config_of(directory)
    assert isinstance(config["target_modules"], list) and not config.get("use_dora")
    assert not config.get("rank_pattern") and not config.get("alpha_pattern")
    scaling = config["lora_alpha"] / config["r"]  # of every module, rsLoRA or not
    pairs = {}
    for key, tensor in load_file(directory / "adapter_model.safetensors").items():
        name, which = re.fullmatch(r"base_model\.model\.(.*)\.lora_([AB])\.weight", key).groups()
        assert tensor.shape[0 if which == "A" else 1] == config["r"]
        pairs.setdefault(name, {})[which] = tensor
    return {name: scaling * pair["B"] @ pair["A"] for name, pair in pairs.items()}


def stacked(directory):
    """TGI and LoRAX, adapters/lora.py: A and B of a kind are stacked over all blocks, and one alpha / r scales them.

    A rank is padded to 8 or a multiple of 16, and the padded one is the `r` of all kinds that follow.
    """
    config = config_of(directory)
    tensors = load_file(directory / "adapter_model.safetensors")
    rank, updates = config["r"], {}
    for kind in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"):
        names = [f"model.layers.{block}.{kind}" for block in range(BLOCKS)]
        if any(f"base_model.model.{name}.lora_A.weight" not in tensors for name in names):
            continue  # the whole kind is dropped, without a word
        scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
        a = torch.stack([tensors[f"base_model.model.{name}.lora_A.weight"].T for name in names])
        b = torch.stack([tensors[f"base_model.model.{name}.lora_B.weight"].T * scale for name in names])
        updates |= {name: (a[i] @ b[i]).T for i, name in enumerate(names)}
        rank = 8 if a.shape[2] <= 8 else -(-a.shape[2] // 16) * 16
    return updates


def deltas(base, adapter):
    from peft import PeftModel

    modules = PeftModel.from_pretrained(load(base), adapter).get_base_model().named_modules()
    return {name: m.get_delta_weight("default").detach() for name, m in modules if hasattr(m, "get_delta_weight")}


@pytest.mark.parametrize("engine, rule", [("sglang", sglang), ("tgi", stacked), ("lorax", stacked)])
def test_what_the_loader_reads_is_the_trained_update(engine, rule, base, tmp_path):
    trained = train(base, tmp_path / "trained", **UNEVEN)
    expected = deltas(base, trained)
    with pytest.raises((AssertionError, RuntimeError)):  # as it is, the loader fails, or drops a kind
        assert rule(trained).keys() >= expected.keys()
    export_adapter(trained, tmp_path / "served", engine)
    read = rule(tmp_path / "served")
    assert read.keys() >= expected.keys()
    for name, update in read.items():
        torch.testing.assert_close(update, expected.get(name, torch.zeros_like(update)), atol=1e-5, rtol=1e-5)


def llama_cpp(file):
    """llama.cpp, llama-adapter.h get_scale: alpha over the rank of the pair itself. Ollama runs the same."""
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(file)
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    told = {key: reader.fields[key].contents() for key in ("general.type", "general.architecture", "adapter.type")}
    assert told == {"general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora"}
    assert {tensor.tensor_type for tensor in reader.tensors} == {gguf.GGMLQuantizationType.F32}
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    names = [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]
    return {n: alpha / len(tensors[f"{n}.lora_a"]) * tensors[f"{n}.lora_b"] @ tensors[f"{n}.lora_a"] for n in names}


@pytest.mark.parametrize("keep_ranks", [False, True])
@pytest.mark.parametrize("engine", ["llama.cpp", "ollama"])
def test_gguf_scales_each_pair_rightly_and_sorts_the_rows_of_q_and_k(engine, keep_ranks, base, tmp_path):
    trained = train(base, tmp_path / "trained", **UNEVEN)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", ResourceWarning)
        exported = export_adapter(trained, tmp_path / "served.gguf", engine, keep_ranks=keep_ranks)
    assert not [one for one in said if "unclosed file" in str(one.message)]
    file = exported.path if engine == "llama.cpp" else exported.path / "adapter.gguf"
    read = llama_cpp(file)
    short = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    short["mlp.down_proj"] = "ffn_down"
    for name, update in deltas(base, trained).items():
        block, kind = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name).groups()
        heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(kind)
        if heads:  # row 2 i + half of a head is row i of that half
            size = len(update) // heads
            rows = [h * size + half * size // 2 + i for h in range(heads) for i in range(size // 2) for half in (0, 1)]
        got = torch.from_numpy(read.pop(f"blk.{block}.{short[kind]}.weight"))
        torch.testing.assert_close(got, update[rows] if heads else update, atol=1e-5, rtol=1e-5)
    assert not any(update.any() for update in read.values()) and bool(read) != keep_ranks
    if engine == "ollama":
        assert (exported.path / "Modelfile").read_text() == f"FROM {base}\nADAPTER ./adapter.gguf\n"


@pytest.mark.parametrize("settings", [UNEVEN, dict(target_modules=["q_proj", "down_proj"], use_dora=True)])
def test_mlx_gets_one_rank_and_scale_and_transposed_factors(settings, base, tmp_path):
    trained = train(base, tmp_path / "trained", **settings)
    export_adapter(trained, tmp_path / "served", "mlx")
    config, tensors = config_of(tmp_path / "served"), load_file(tmp_path / "served/adapters.safetensors")
    parameters = config["lora_parameters"]
    assert config == {
        "model": str(base), "fine_tune_type": "dora" if "use_dora" in settings else "lora", "num_layers": -1,
        "lora_parameters": {key: parameters[key] for key in ("rank", "scale", "keys")} | {"dropout": 0.0},
    }  # fmt: skip
    for name in parameters["keys"]:
        a, b = tensors.pop(f"{name}.lora_a"), tensors.pop(f"{name}.lora_b")
        assert a.shape[1] == b.shape[0] == parameters["rank"] and tensors.pop(f"{name}.m", None) is not settings
        if name in (expected := deltas(base, trained)):
            torch.testing.assert_close(parameters["scale"] * (a @ b).T, expected[name], atol=1e-5, rtol=1e-5)
    assert not tensors
    tensors = load_file(trained / "adapter_model.safetensors")
    save_file({key: tensor.bfloat16() for key, tensor in tensors.items()}, trained / "adapter_model.safetensors")
    export_adapter(trained, tmp_path / "narrow", "mlx")  # also where B is multiplied by what scalings differ in
    assert {one.dtype for one in load_file(tmp_path / "narrow/adapters.safetensors").values()} == {torch.bfloat16}


REFUSED = {
    "DoRA": "DoRA",
    "whole head": r"a tensor that is no adapter \('lm_head.weight', of modules_to_save",
    "embedding": "an adapter of the embedding 'model.embed_tokens'",
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("engine", ENGINES)
def test_what_an_engine_does_not_take_is_said_before_anything_is_written(engine, name, base, tmp_path):
    trained = train(base, tmp_path / "trained", **ADAPTERS[name])
    if (engine, name) == ("mlx", "DoRA"):
        return
    refused(f"{re.escape(engine)} does not take {REFUSED[name]}.*merge_into=", trained, tmp_path / "served", engine)


@pytest.mark.parametrize("engine", ["vllm", "sglang", "tgi", "lorax"])
@pytest.mark.parametrize("task_type", ["SEQ_2_SEQ_LM", None])
def test_no_engine_takes_an_adapter_of_an_encoder_decoder(task_type, engine, tmp_path):
    """The note of `inspect` says so by the task; the base tells it without one."""
    tiny_t5().save_pretrained(tmp_path / "base")
    model = type(tiny_t5()).from_pretrained(tmp_path / "base")
    get_peft_model(model, LoraConfig(r=2, target_modules=["q"], task_type=task_type)).save_pretrained(tmp_path / "a")
    where = tmp_path / "a", tmp_path / "served", engine
    one_line(f"^{engine} does not take adapters of an encoder-decoder model. .*merge_into=", export_adapter, *where)
    said = [misfit.problem for misfit in check_fit(tmp_path / "a", engine=engine).misfits]
    assert len(said) == 1 and "does not take adapters of an encoder-decoder model" in said[0]


def test_an_adapter_of_a_model_that_writes_no_text_is_exported_with_a_word(tmp_path):
    for make, told in ((tiny_bert, 1), (tiny_llama, 0)):
        model = make().base_model if told else make()
        model.save_pretrained(tmp_path / str(told))
        model = type(model).from_pretrained(tmp_path / str(told))
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["query", "q_proj"]))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_()
        model.save_pretrained(tmp_path / f"adapter{told}")
        notes = export_adapter(tmp_path / f"adapter{told}", tmp_path / f"served{told}", "vllm").notes
        assert [note for note in notes if "writes no text: whether vllm serves" in note] == [*notes][:told]
        said = check_fit(tmp_path / f"adapter{told}", engine="vllm").notes[-1]
        assert ("as they are. But its base writes no text: whether vllm serves" in said) == bool(told)


@pytest.mark.parametrize(
    ("name", "writes"),
    {
        "LlamaForCausalLM": True, "GPT2LMHeadModel": True, "Qwen2VLForConditionalGeneration": True,
        "UNet2DConditionModel": True,  # not transformers' own, so nothing is known
        "Gemma4AssistantForCausalLM": True,  # has no configuration without arguments
        "T5ForConditionalGeneration": False, "WhisperForConditionalGeneration": False, "BertModel": False,
        "LlamaModel": False, "BertForMaskedLM": False, "ViTForImageClassification": False,
    }.items(),
)  # fmt: skip
def test_without_a_task_the_class_of_its_base_says_whether_an_adapter_writes_text(name, writes):
    """PEFT notes the class where no task is given; with one, the task counts."""
    config = {"r": 8, "lora_alpha": 8, "task_type": None, "auto_mapping": {"base_model_class": name}}
    note, alone = (
        serving_note(ALIKE, config),
        f"PEFT takes this adapter as it is. No engine is known to serve adapters of {name}.",
    )
    assert note == (EVERY if writes else alone)
    assert export_options(config, []) == ("--engine vllm" if writes else "")
    assert serving_note(ALIKE, config | {"task_type": "CAUSAL_LM"}) == EVERY


TWO = [f"model.layers.{i}.{kind}" for i in range(2) for kind in ("q_proj", "v_proj")]
ALL = "PEFT, vLLM (--max-lora-rank {}), SGLang, llama.cpp, Ollama, TGI and LoRAX take this adapter as it is. MLX needs"
SOME = "PEFT and vLLM (--max-lora-rank {}) take this adapter as it is. SGLang, llama.cpp, Ollama, TGI, LoRAX and MLX "


@pytest.mark.parametrize(
    ("ranks", "note"),
    [
        ([16, 16, 16, 16], ALL.format(16)),
        ([8, 0, 8, 0], ALL.format(8)),  # no v_proj has one
        ([48, 48, 48, 48], ALL.format(64)),
        ([12, 12, 12, 12], "PEFT, vLLM (--max-lora-rank 16), SGLang, llama.cpp and Ollama take this adapter as it is. "
         "TGI, LoRAX and MLX need `lora-init export`."),
        ([8, 16, 8, 16], SOME.format(16)),
        ([8, 8, 8, 0], SOME.format(8)),
        ([1, 2, 3, 260], SOME.format(320)),
        ([1, 2, 3, 512], SOME.format(512)),
        ([1, 2, 3, 513], "PEFT takes this adapter as it is. vLLM, SGLang, llama.cpp, Ollama, TGI, LoRAX and MLX need"),
        ([0, 0, 0, 0], "nothing to serve"),
    ],
)  # fmt: skip
def test_which_engines_take_the_adapter_as_it_is(ranks, note):
    got = serving_note(dict(zip(TWO, ranks, strict=True)), {})
    assert note in got, f"a new engine stands in ALL, SOME and the notes below them as it is here: {got}"


PATTERNS = dict(target_modules=["q_proj", "v_proj"], r=8, rank_pattern={"v_proj": 2})
NOTES = {
    "rsLoRA": (ADAPTERS["plain"] | dict(use_rslora=True), "PEFT, vLLM (--max-lora-rank 8), TGI and LoRAX take this"),
    "alphas": (ADAPTERS["alphas"], "PEFT takes this adapter as it is. vLLM, SGLang, "),
    "ranks": (PATTERNS, "PEFT takes this adapter as it is. vLLM, SGLang, "),
    "ranks and alphas": (PATTERNS | dict(alpha_pattern={"v_proj": 2}), "PEFT and vLLM (--max-lora-rank 8) take this"),
    "whole head": (ADAPTERS["whole head"], "Others take no tensor 'lm_head.weight': `lora-init export --merge-into"),
    "embedding": (ADAPTERS["embedding"], "Others take no tensor 'model.embed_tokens."),
    "bias": (ADAPTERS["plain"] | dict(bias="all"), "Others take no bias='all': `lora-init export --merge-into"),
    "bias of B": (ADAPTERS["plain"] | dict(lora_bias=True), "trained with lora_bias, which no other does"),
    "aLoRA": (ADAPTERS["plain"] | dict(alora_invocation_tokens=[5]), "trained with alora_invocation_tokens, which no"),
}


@pytest.mark.parametrize("name", NOTES)
def test_engines_take_only_what_they_scale_and_read_as_peft_does(name, base, tmp_path):
    from lora_init.cli.describe import describe

    settings, note = NOTES[name]
    assert note in describe(train(base, tmp_path / "trained", **{"r": 8, "lora_alpha": 8} | settings))["serving"]


def test_the_families_that_the_page_and_the_study_name_are_known_to_gguf_and_mlx():
    gguf = pytest.importorskip("gguf")
    (named,) = re.findall(r"GGUF and MLX know (.*?)\. \[Experts\]", (ROOT / "docs/serving.md").read_text("utf-8"))
    page = {re.sub(r"[ -]|\(text\)", "", name) for name in re.split(", | and ", named)}
    rows = (ROOT / "benchmarks/results/experts/table.md").read_text("utf-8").splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    study = {row[0] for row in cells if {"llama.cpp", "mlx"} & {*row[6].split(", ")}}
    assert len(page) == 9 and len(study) > 12
    assert {f"{family}ForCausalLM" for family in page | study} <= writers._ARCHITECTURES.keys()
    assert {name for name, _ in writers._ARCHITECTURES.values()} <= {*gguf.MODEL_ARCH_NAMES.values()}


@pytest.mark.skipif(older("transformers", "5.24"), reason="some came with it")
def test_every_architecture_that_is_named_is_a_class_of_transformers():
    named = {*writers._ARCHITECTURES, *writers._NOT_IN_MLX, *experts._FUSED_IN_VLLM, *experts._SAME_IN_MLX}
    assert named - {*dir(transformers)} == {"ExaoneMoEForCausalLM"}  # as its older checkpoints have it


def test_a_layer_without_a_name_in_gguf_is_named(base, tmp_path):
    pytest.importorskip("gguf")
    trained = read_trained(train(base, tmp_path / "trained", target_modules=["q_proj"]))
    model = read_base(str(base), trained)
    assert gguf_names(trained, model)["model.layers.1.self_attn.q_proj"] == "blk.1.attn_q.weight"
    (name, layer), *_ = trained.layers.items()
    other = replace(trained, layers={**trained.layers, name.replace("q_proj", "z_proj"): layer})
    said = "layer 'model.layers.0.self_attn.z_proj' of LlamaForCausalLM has no name in GGUF. Use merge_into="
    one_line(said, gguf_names, other, model)


def test_an_engine_gets_room_for_the_rank_of_the_config_where_no_layer_has_it():
    config = {"r": 64, "lora_alpha": 64, "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 8}}
    assert "--max-lora-rank 64" in serving_note({"h.0.q_proj": 8, "h.1.q_proj": 8}, config)


def test_no_engine_is_named_for_an_encoder_decoder_model():
    config = {"task_type": "SEQ_2_SEQ_LM", "lora_alpha": 4}
    assert serving_note({"encoder.q": 2}, config).endswith("serve adapters of an encoder-decoder model.")
    assert export_options(config, []) == ""  # PEFT's own directory


@pytest.mark.parametrize(("rank", "room"), [(1, 8), (8, 8), (9, 16), (257, 320), (512, 512), (513, 513)])
def test_vllm_makes_room_for_a_rank(rank, room):
    assert vllm_rank(rank) == room
    assert ENGINES["vllm"].name_with(rank) == f"vLLM (--max-lora-rank {room})" and PEFT.name_with(rank) == "PEFT"


def test_a_rank_that_an_engine_does_not_take_is_refused_with_those_that_it_takes():
    taken = {name: [rank for rank in range(1, 1000) if engine.allows(rank)] for name, engine in ENGINES.items()}
    padded = [8, *range(16, 1000, 16)]
    every = [*range(1, 1000)]
    assert taken == dict.fromkeys(ENGINES, every) | {"vllm": every[:512], "tgi": padded, "lorax": padded}
    for name, rank in ((None, 999), ("sglang", 999), ("vllm", 512), ("tgi", 8)):
        check_rank(name, rank)
    one_line("^vllm takes at most rank 512, and this is 513. Choose one by rank=", check_rank, "vllm", 513)
    one_line("^tgi takes rank 8 or a multiple of 16, and this is 24. Choose one by rank=", check_rank, "tgi", 24)
    assert find_engine(None) is PEFT and find_engine("mlx").title == "MLX"


SINGLE = {"h.0.experts.1.up": 8, "h.0.experts.2.up": 8}
ALIKE = {"h.0.q": 8, "h.1.q": 8}
OWN, KIND = "reads one scaling, and here layers have their own", "takes one rank for every layer of a kind"


@pytest.mark.parametrize(("engine", "ranks", "config", "why"), [
    ("vllm", ALIKE, {}, ""),
    ("mlx", ALIKE, {}, "reads no directory of PEFT"),
    ("vllm", ALIKE, {"target_parameters": ["up"]}, "has a form of its own for experts, and drops or refuses PEFT's"),
    ("tgi", SINGLE, {}, "takes no adapter of experts"),
    ("llama.cpp", SINGLE, {}, "has a form of its own for experts"),
    ("vllm", SINGLE, {}, ""),
    ("tgi", {"h.0.q": 12}, {}, "takes rank 8 or a multiple of 16, and this is 12"),
    ("sglang", ALIKE, {"use_rslora": True}, "does not read use_rslora"),
    ("tgi", ALIKE, {"use_rslora": True, "r": 8, "lora_alpha": 16}, ""),
    ("vllm", ALIKE, {"r": 8, "lora_alpha": 8, "alpha_pattern": {"h.1.q": 8}}, ""),
    ("vllm", ALIKE, {"r": 8, "lora_alpha": 8, "alpha_pattern": {"h.1.q": 8.001}}, OWN),
    ("vllm", {"h.0.q": 8, "h.1.q": 4}, {"r": 8, "lora_alpha": 8}, OWN),
    ("vllm", {"h.0.q": 8, "h.1.q": 4}, {"r": 8, "lora_alpha": 8, "alpha_pattern": {"h.1.q": 4}}, ""),
    ("sglang", {"h.0.q": 8, "h.1.q": 4}, {"r": 8, "lora_alpha": 8, "alpha_pattern": {"h.1.q": 4}}, KIND),
    ("sglang", {"h.0.q": 8, "h.1.q": 0}, {"r": 8, "lora_alpha": 8}, KIND),
    ("sglang", {"h.0.q": 8, "h.1.q": 8, "h.0.v": 0, "h.1.v": 0}, {"r": 8, "lora_alpha": 8}, ""),
    ("sglang", {"h.0.q": 0}, {"r": 8, "lora_alpha": 8}, KIND),
    ("sglang", ALIKE, {"layers_to_transform": [0, 1]}, KIND),
    ("sglang", ALIKE, {"r": 16, "lora_alpha": 16, "alpha_pattern": {"q": 8}}, KIND),
    ("tgi", ALIKE, {"r": 12}, "takes rank 8 or a multiple of 16, and this is 12"),
])  # fmt: skip
def test_why_an_engine_does_not_take_an_adapter_as_it_is(engine, ranks, config, why):
    assert why_not_as_it_is(ENGINES[engine], ranks, config) == why


AS_IT_IS = "PEFT takes this adapter as it is."
TRAINED_WITH = f"{AS_IT_IS} It was trained with {{}}, which no other does."
MERGE = "`lora-init export --merge-into MODEL`."
EVERY = (
    "PEFT, vLLM (--max-lora-rank 8), SGLang, llama.cpp, Ollama, TGI and LoRAX take this adapter as it is. MLX needs "
    "`lora-init export`."
)


def test_an_adapter_of_a_head_is_taken_where_that_has_a_weight_of_its_own():
    for head in ("lm_head", "embed_out"):
        note = f" But not where {head!r} shares its weight with the input embedding, as `inspect --engine` tells."
        assert serving_note(ALIKE | {head: 8}, {}) == EVERY + note
        assert serving_note(ALIKE | {head: 0}, {}) == EVERY


def test_why_no_export_is_possible_is_told_with_its_options(base, tmp_path):
    for name, settings in (
        ("plain", dict(r=9)),
        ("dora", dict(use_dora=True)),
        ("large", dict(r=513)),
        ("tokens", dict(trainable_token_indices=[3])),
        ("aLoRA", dict(alora_invocation_tokens=[1])),
    ):
        train(base, tmp_path / name, target_modules=["q_proj"], **settings)
    remedy = "Write a whole model instead by `lora-init export --merge-into`, without an engine."
    rows = "'model.embed_tokens.token_adapter.trainable_tokens_delta', of modules_to_save or the like"
    by_peft = "Serve it with PEFT, or save the whole model that its merge_and_unload() returns."
    for engine, name, why in (
        ("tgi", "plain", ""),  # in rank 16
        ("vllm", "dora", f"vllm does not take DoRA. {remedy}"),
        ("vllm", "large", "vllm takes at most rank 512, and this is 513. Choose one by `lora-init export --rank`."),
        ("vllm", "tokens", f"vllm does not take a tensor that is no adapter ({rows}). {by_peft}"),
        ("vllm", "aLoRA", "vllm does not take alora_invocation_tokens. Serve it with PEFT."),
    ):
        assert try_export(engine, tmp_path / name, str(base), {}) == (why, ())


def test_a_modelfile_names_a_directory_by_its_full_path_and_a_model_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(writers, "write_gguf", lambda *arguments: None)
    (tmp_path / "here").mkdir()
    for source, named in (("here", tmp_path.resolve() / "here"), ("me/base", "me/base")):
        writers.write_ollama(tmp_path, None, Named("LlamaForCausalLM", source=source))
        assert (tmp_path / "Modelfile").read_text("utf-8") == f"FROM {named}\nADAPTER ./adapter.gguf\n"


@pytest.mark.parametrize(("config", "tensors", "note", "options"), [
    ({}, ["base_model.model.h.0.q.lora_A.weight", "h.0.q.lora_B.weight", "h.0.q.lora_magnitude_vector"], None,
     "--engine vllm"),
    ({}, ["h.0.q.base_layer.weight"], f"{EVERY} Where the weight of the base in it was changed before training "
     "(--engine compares), PEFT alone does.", "--engine vllm"),
    ({"bias": "none", "use_dora": False}, [], None, "--engine vllm"),
    ({"alora_invocation_tokens": [5]}, [], TRAINED_WITH.format("alora_invocation_tokens"), None),
    ({"use_qalora": True, "use_dora": True}, [], TRAINED_WITH.format("use_qalora"), None),
    ({"task_type": "TOKEN_CLS"}, [], f"{AS_IT_IS} It is of a classifier of tokens, and the engines of `lora-init "
     "export` write text.", ""),
    ({"use_dora": True}, [], f"{AS_IT_IS} MLX needs `lora-init export`. Others take no DoRA: {MERGE}", "--engine mlx"),
    ({"target_parameters": ["up"]}, [], f"{AS_IT_IS} vLLM, SGLang, llama.cpp, Ollama and MLX need `lora-init export`. "
     f"Others take no adapter of experts: {MERGE}", "--engine vllm"),
    ({"target_parameters": ["up"], "use_dora": True}, [], f"{AS_IT_IS} MLX needs `lora-init export`. Others take no "
     f"DoRA: {MERGE}", "--engine mlx"),
    ({"bias": "all", "use_dora": True}, [], f"{AS_IT_IS} Others take no bias='all': {MERGE}", "--merge-into MODEL"),
    ({}, ["base_model.model.lm_head.weight"], f"{AS_IT_IS} Others take no tensor 'lm_head.weight': {MERGE}",
     "--merge-into MODEL"),
])  # fmt: skip
def test_who_takes_what_an_adapter_has_besides_a_and_b(config, tensors, note, options):
    assert serving_note(ALIKE, config, tensors) == (note or EVERY)
    assert export_options(config, tensors) == options
    before = (
        "It began as pissa, which changes the base weights, so no engine takes it as it is. `lora-init export --start "
        "DIRECTORY`, of the adapter before training, converts it."
    )
    assert serving_note(ALIKE, config, tensors, "pissa") == before


def test_adapters_of_single_experts_are_noted_for_the_engines_that_take_none():
    assert serving_note(SINGLE, {}) == (
        "PEFT, vLLM (--max-lora-rank 8) and SGLang take this adapter as it is. llama.cpp, Ollama and MLX need "
        "`lora-init export`. TGI and LoRAX take no adapter of experts: `lora-init export --merge-into MODEL`."
    )


def test_rows_of_each_head_are_sorted_into_pairs():
    rows = torch.arange(12.0)[:, None] + torch.tensor([0.0, 0.5])
    order = [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert torch.equal(writers._in_pairs(rows, 2), rows[order])


def test_rows_are_sorted_for_the_two_kinds_that_llama_cpp_has_other_pairs_of():
    assert {name for name, sorts in writers._ARCHITECTURES.values() if sorts} == {"llama", "granitemoe"}
    assert {name for name, sorts in writers._ARCHITECTURES.values() if not sorts}.isdisjoint({"llama", "granitemoe"})


class Named:
    """A base of this architecture and of these modules."""

    def __init__(self, architecture, *modules, source="base"):
        self.source, self.architecture, self.model = source, architecture, self
        self.modules = modules

    def named_modules(self):
        return [(name, None) for name in self.modules]


@pytest.mark.parametrize(("layers", "found"), [
    (["h.0.q", "h.1.q"], ["q"]),
    (["h.1.up", "h.0.q", "h.1.q"], ["q", "up"]),
    (["h.0.q"], ["h.0.q"]),
    (["h.0.q", "h.1.q", "h.0.experts.1.up"], ["q", "up"]),  # a single expert, which the base has no longer
    (["head"], ["head"]),
])  # fmt: skip
def test_layers_are_named_by_their_ends_where_these_select_no_others(layers, found):
    base = Named("", "", "h.0.q", "h.1.q", "h.1.up", "h", "head")
    assert writers._target_modules(base, layers) == found


def test_architectures_without_names_are_refused_with_those_that_are_known():
    for name, where in (("Qwen3NextForCausalLM", writers.check_mlx), ("GPT2LMHeadModel", writers.gguf_names)):
        if where is writers.gguf_names:
            pytest.importorskip("gguf")
        said = one_line(
            f"^'base' is a {name}, whose names in GGUF and MLX are not known here", where, None, Named(name)
        )
        known = re.search("Known are (.*). For others use merge_into=, and the engine's own converter", said)[1]
        without = {"Gemma4ForCausalLM", "Qwen3NextForCausalLM"} if where is writers.check_mlx else set()
        assert {*known.split(", ")} == {*writers._ARCHITECTURES} - without
    assert writers._names_in_gguf(Named("MistralForCausalLM")) == ("llama", True)


def test_what_an_engine_does_not_take_of_an_adapter_is_listed():
    one = Layer(torch.ones(1, 3), torch.ones(4, 1), 1.0)
    layers = {
        "h.0.up": replace(one, magnitude=torch.ones(4)), "emb": replace(one, ends=EMBEDDING), "head": one,
        "h.experts.12.up": one, "h.experts.up": Layer(torch.ones(3, 1, 3), torch.ones(3, 4, 1), 1.0),
        "router": Layer(torch.ones(1, 1, 3), torch.ones(1, 4, 1), 1.0),
    }  # fmt: skip
    config = {"alora_invocation_tokens": [1], "trainable_token_indices": [2], "bias": "all"}
    trained = Trained(config, layers, {"base_model.model.norm.weight": torch.ones(1)})
    base = SimpleNamespace(embeddings=("emb", "head"), tied=True)
    router = "an adapter of the parameter 'router' of 1 experts"
    others = [
        "a tensor that is no adapter ('norm.weight', of modules_to_save or the like)",
        "alora_invocation_tokens", "trainable_token_indices",
    ]  # fmt: skip
    embeddings = [
        "an adapter of the embedding 'emb'",
        "an adapter of 'head', whose weight is also the input embedding's",
    ]
    experts = ["an adapter of the expert 'h.experts.12.up'", "an adapter of the parameter 'h.experts.up' of 3 experts"]
    assert [*_not_taken(ENGINES["tgi"], trained, base)] == ["DoRA", *embeddings, *experts, router, *others]
    assert [*_not_taken(ENGINES["mlx"], trained, base)] == [*embeddings, router, *others]
    base.tied = False
    assert [*_not_taken(ENGINES["vllm"], trained, base)] == ["DoRA", embeddings[0], router, *others]


def test_engines_have_the_names_that_scripts_know():
    assert [*ENGINES] == ["vllm", "sglang", "llama.cpp", "ollama", "tgi", "lorax", "mlx"]
