"""Adapters of fused experts (PEFT's `target_parameters`) are exported, also for engines, compressed and merged."""

import copy
import hashlib
import math
import re
import shutil
from functools import cache

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_init import allocate_ranks, build_adapter, collect, dial, export_adapter
from lora_init.serving import base as base_room
from lora_init.serving.engines import ENGINES
from lora_init.serving.experts import by_projection
from lora_init.serving.support import on_base
from lora_init.serving.trained import read_trained
from lora_init.serving.verify import Local
from lora_init.starts.weights import LoraWeights
from tests.commands import assert_one_line_error, run
from tests.layers.made import BOTH, COMMON, MODELS
from tests.serving.made import IDS, config_of, refused
from tests.versions import needs_experts_by_peft

pytestmark = needs_experts_by_peft


def llama4():
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    settings = dict(head_dim=8, intermediate_size_mlp=20, num_local_experts=4, interleave_moe_layer_step=1)
    return Llama4ForCausalLM(Llama4TextConfig(**COMMON, **settings)).eval()


# Mixtral and Qwen are saved as single experts. GPT-OSS is saved as [experts, in, out], and PEFT knows that; Llama 4 is
# too, and PEFT takes in for out.
MODELS = MODELS | {"llama4": llama4}
ADAPTERS = {
    "experts alone": dict(target_modules=[], lora_alpha=5),
    "ranks and alphas": dict(
        target_modules=["q_proj"], rank_pattern={"down_proj": 2, "q_proj": 9},
        alpha_pattern={r"layers\.0\.[\w.]*gate_up_proj": 3},
    ),
    "rsLoRA": dict(target_modules=["v_proj"], use_rslora=True, rank_pattern={r"1\..*gate_up_proj": 1}),
    "one parameter": dict(target_modules=["o_proj"], target_parameters=["layers.1.mlp.experts.down_proj",
                          "layers.1.feed_forward.experts.down_proj"]),
    "the router": dict(target_modules=[], target_parameters=[*BOTH, "gate.weight", "router.weight"]),
    "biases of all experts": dict(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj_bias", *BOTH]),
    "the weight of a layer": dict(target_modules=["k_proj"], target_parameters=["q_proj.weight", *BOTH]),
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def base(request, tmp_path_factory):
    torch.manual_seed(2)
    directory = tmp_path_factory.mktemp(request.param) / "base"
    model = MODELS[request.param]()
    for parameter in model.parameters():
        parameter.data.mul_(3)  # so that experts matter
    model.save_pretrained(directory)
    return directory


def only(*names):
    return pytest.mark.parametrize("base", names, indirect=True)


def load(base):
    return copy.deepcopy(_loaded(base))


@cache
def _loaded(base):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base).eval()


def made(base, **settings):
    """Return an adapter as PEFT saves it, with random numbers in place of training; each is made once."""
    directory = base.with_name(hashlib.sha256(repr(settings).encode()).hexdigest())
    if not directory.exists():
        adapted(load(base), **settings).save_pretrained(directory)
    return directory


def train(base, directory, **settings):
    return shutil.copytree(made(base, **settings), directory)


def adapted(model, **settings):
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "target_parameters": BOTH} | settings
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.2)
    return model


@torch.no_grad()
def logits(base, adapter=None):
    model = load(base).double()
    model.set_experts_implementation("eager")  # the other one knows no float64
    return (model if adapter is None else PeftModel.from_pretrained(model, adapter).eval())(IDS).logits


@cache
def answers(base, name=None):
    """The logits of a base, or of it with one of `ADAPTERS`."""
    return logits(base, None if name is None else made(base, **ADAPTERS[name]))


@cache
def truth_of(base, name):
    return expected_projections(base, made(base, **ADAPTERS[name]))


def deltas(base, adapter):
    """What PEFT adds to each parameter, of two parameters of one module too."""
    found = {}
    for name, module in PeftModel.from_pretrained(load(base), adapter).get_base_model().named_modules():
        if hasattr(module, "get_delta_weight"):
            ending = getattr(module, "parameter_name", "weight")
            found[f"{name.replace('.base_layer', '')}.{ending}"] = module.get_delta_weight("default").detach().double()
    return found


@only("mixtral", "gpt_oss")
@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.slow
def test_one_rank_and_one_scaling_give_the_same_outputs(name, base, tmp_path):
    trained = train(base, tmp_path / "trained", **ADAPTERS[name])
    exported = export_adapter(trained, tmp_path / "served")
    config, tensors = config_of(tmp_path / "served"), load_file(tmp_path / "served/adapter_model.safetensors")
    assert config["r"] == exported.rank in (8, 16) and not config["rank_pattern"] and not config["alpha_pattern"]
    assert config["lora_alpha"] / config["r"] == exported.scaling
    rows = {t.shape[0] for key, t in tensors.items() if "lora_A" in key and "experts" in key}
    assert 4 * exported.rank in rows <= {4 * exported.rank, exported.rank}  # experts, and their biases as one matrix
    assert exported.parameters == sum(t.numel() for t in tensors.values())
    expected = answers(base, name)
    assert (expected - answers(base)).abs().max() > 0.01  # there is something to get wrong
    torch.testing.assert_close(logits(base, tmp_path / "served"), expected, atol=1e-6, rtol=1e-6)
    assert exported.error == 0.0
    served = export_adapter(tmp_path / "served", tmp_path / "again", rank=exported.rank)  # what we write we read
    assert served.parameters == exported.parameters


@only("mixtral", "llama4")
@pytest.mark.parametrize(
    "size", [dict(rank=2), dict(parameters=4000), dict(megabytes=0.016), dict(rank=2, keep_ranks=True)]
)
@pytest.mark.slow
def test_each_expert_becomes_the_closest_of_its_rank(size, base, tmp_path):
    trained = train(base, tmp_path / "trained", r=5, target_modules=["q_proj"])
    exported = export_adapter(trained, tmp_path / "served", **size)
    before, after = deltas(base, trained), deltas(base, tmp_path / "served")
    ranks = {name: layer.rank for name, layer in resolved(tmp_path / "served", base).items()}
    lost = whole = 0.0
    for name, delta in before.items():
        rank = ranks.get(name, ranks.get(name.removesuffix(".weight"), 0))
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        best = (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]
        torch.testing.assert_close(after.get(name, torch.zeros_like(delta)), best, atol=1e-5, rtol=1e-5)
        lost, whole = lost + float((delta - best).square().sum()), whole + float(delta.square().sum())
    assert exported.error == pytest.approx(math.sqrt(lost / whole), abs=1e-5) and 0 < exported.error < 1
    assert exported.parameters <= {"parameters": 4000, "megabytes": 4000}.get(next(iter(size)), 10**6)


def resolved(directory, base):
    from lora_init.serving.base import read_base
    from lora_init.serving.trained import with_parameters

    trained = read_trained(directory)
    return with_parameters(trained, read_base(str(base), trained).parameters).layers


def digests(directory):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


@only("mixtral", "gpt_oss")
@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.slow
def test_a_merged_model_does_what_peft_does(name, base, tmp_path, monkeypatch):
    monkeypatch.setattr(base_room, "SHARD_BYTES", 50_000)
    trained, before = train(base, tmp_path / "trained", **ADAPTERS[name]), digests(base)
    export_adapter(trained, tmp_path / "merged", merge_into=str(base))
    assert digests(base) == before and len(list((tmp_path / "merged").glob("*.safetensors"))) > 1
    assert shapes(tmp_path / "merged") == shapes(base)
    torch.testing.assert_close(logits(tmp_path / "merged"), answers(base, name), atol=1e-5, rtol=1e-5)


@only("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "llama4")
@pytest.mark.parametrize("name", ["experts alone", "ranks and alphas", "rsLoRA", "one parameter"])
@pytest.mark.slow
def test_each_expert_of_the_merged_checkpoint_is_what_it_was_and_b_a(name, base, tmp_path, request):
    trained = train(base, tmp_path / "trained", **ADAPTERS[name])
    export_adapter(trained, tmp_path / "merged", merge_into=str(base))
    before, after = (
        {key: tensor.double() for file in sorted(one.glob("*.safetensors")) for key, tensor in load_file(file).items()}
        for one in (base, tmp_path / "merged")
    )
    kind = request.node.callspec.params["base"]
    if kind in ("gpt_oss", "llama4"):  # which are saved as the model has them
        changed = {key: delta for key, delta in deltas(base, trained).items() if ".experts." in key}
    else:
        owner, *names = CHECKPOINT.get(kind, ("mlp", "gate_proj", "up_proj", "down_proj"))
        ends = dict(zip(("gate_proj", "up_proj", "down_proj"), names, strict=True))
        changed = {
            f"model.layers.{block}.{owner}.experts.{expert}.{ends[projection]}.weight": delta
            for (block, projection), deltas_of_all in truth_of(base, name).items()
            for expert, delta in enumerate(deltas_of_all)
        }
    assert changed and before.keys() == after.keys()
    for key, tensor in after.items():
        if key in changed:
            exact = before[key] + changed[key]
            assert (tensor - exact).abs().max() <= 2.0**-21 * exact.abs().max(), key  # float32, and B A's rounding
            assert (tensor - before[key]).abs().max() > 1e-3, key
        elif ".self_attn." not in key:
            assert torch.equal(tensor, before[key]), key


@only("mixtral", "qwen3_moe", "gpt_oss")
@pytest.mark.parametrize("prefix", ["base_model.model.model.language_model.", "base_model.model."])
def test_names_of_experts_with_another_prefix_are_written_anew(prefix, base, tmp_path):
    trained = train(base, tmp_path / "trained", **ADAPTERS["ranks and alphas"])
    shutil.copytree(trained, tmp_path / "renamed")
    rewrite(
        tmp_path / "renamed", lambda found: {n.replace("base_model.model.model.", prefix): t for n, t in found.items()}
    )
    refused("--rename", tmp_path / "renamed", tmp_path / "served")
    export_adapter(tmp_path / "renamed", tmp_path / "served", rename=True)
    expected = answers(base, "ranks and alphas")
    torch.testing.assert_close(logits(base, tmp_path / "served"), expected, atol=1e-6, rtol=1e-6)


@only("mixtral", "gpt_oss", "llama4")
def test_a_dialed_adapter_adds_of_each_expert_a_share(base, tmp_path):
    trained = train(base, tmp_path / "trained", **ADAPTERS["ranks and alphas"])
    adapted = PeftModel.from_pretrained(load(base), trained).eval()
    found = dial(adapted, strength=0.5)
    adapted.save_pretrained(tmp_path / "dialed")
    assert sum("experts" in one for one in found.strengths) == 4
    before, after = deltas(base, trained), deltas(base, tmp_path / "dialed")
    for name, delta in before.items():
        torch.testing.assert_close(after[name], delta / 2, atol=0.0, rtol=1e-6)


@only("mixtral", "gpt_oss")
@pytest.mark.parametrize("budget", [dict(rank=4, rho=2), dict(parameters=9000), dict(megabytes=0.03)])
@pytest.mark.slow
def test_a_plan_of_ranks_counts_every_expert(budget, base, tmp_path):
    torch.manual_seed(0)
    batches = [{"input_ids": torch.randint(3, 64, (8, 12))} for _ in range(6)]
    stats = collect(load(base), batches, "attention", rank=4, rho=2, target_parameters=BOTH)
    plan = allocate_ranks(stats, **budget)
    adapted = build_adapter(stats, plan).apply(load(base))
    there = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert there == plan.parameters == sum(stats.targets[name].parameters(rank) for name, rank in plan.items())
    assert there <= budget.get("parameters", math.inf) and plan.megabytes() <= budget.get("megabytes", math.inf)
    assert {rank for name, rank in plan.items() if "experts" in name} and sum("experts" in n for n in plan) == 4


@only("mixtral", "gpt_oss")
def test_experts_that_were_trained_whole_are_merged(base, tmp_path):
    settings = dict(target_modules=["q_proj"], target_parameters=None, modules_to_save=["experts"])
    trained = train(base, tmp_path / "trained", **settings)
    rewrite(trained, lambda found: {n: t * 1.5 if "experts" in n else t for n, t in found.items()})
    export_adapter(trained, tmp_path / "merged", merge_into=str(base))
    assert (logits(base, trained) - logits(base)).abs().max() > 0.01
    torch.testing.assert_close(logits(tmp_path / "merged"), logits(base, trained), atol=1e-5, rtol=1e-5)


@only("qwen2_moe", "qwen3_moe", "llama4")
def test_other_architectures_are_exported_and_merged(base, tmp_path):
    trained = train(base, tmp_path / "trained", **ADAPTERS["ranks and alphas"])
    export_adapter(trained, tmp_path / "served")
    export_adapter(trained, tmp_path / "merged", merge_into=str(base))
    expected = answers(base, "ranks and alphas")
    assert (expected - answers(base)).abs().max() > 0.01
    torch.testing.assert_close(logits(base, tmp_path / "served"), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(logits(tmp_path / "merged"), expected, atol=1e-5, rtol=1e-5)


def rewrite(directory, change):
    """Change the tensors of a directory's only safetensors file."""
    path = next(directory.glob("*.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}, path, {"format": "pt"})


@only("mixtral", "gpt_oss")
def test_a_start_that_changed_the_base_is_taken_off_each_expert(base, tmp_path):
    start = train(base, tmp_path / "start", r=2, rank_pattern={"down_proj": 3}, target_modules=["q_proj"])
    (start / "lora_init.json").write_text('{"method": "lora-ga"}')
    shutil.copytree(start, tmp_path / "trained")
    rewrite(tmp_path / "trained", lambda found: {n: t + 0.1 * torch.randn_like(t) for n, t in found.items()})
    refused("began as lora-ga.*--start", tmp_path / "trained", tmp_path / "served")
    exported = export_adapter(tmp_path / "trained", tmp_path / "served", start=start)
    assert exported.rank == 8  # twice 3, rounded up
    served, after, before = (deltas(base, d) for d in (tmp_path / "served", tmp_path / "trained", start))
    for name, delta in served.items():
        torch.testing.assert_close(delta, after[name] - before[name], atol=1e-5, rtol=1e-5)


def shapes(directory):
    found = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {key: (file.get_slice(key).get_shape(), file.get_slice(key).get_dtype()) for key in file.keys()}  # noqa: SIM118
    return found


def expected_projections(base, trained):
    """What PEFT adds to each projection of each expert, float64 [experts, d_out, d_in], by block and name."""
    model, found = load(base), {}
    for name, stored in deltas(base, trained).items():
        owner, _, end = name.rpartition(".")
        block, module = int(re.search(r"layers\.(\d+)\.", name)[1]), model.get_submodule(owner)
        if not hasattr(module, "is_transposed"):
            continue
        delta = stored.mT if module.is_transposed else stored
        if end == "down_proj":
            found[block, end] = delta
        elif module.is_concatenated:
            found[block, "gate_proj"], found[block, "up_proj"] = delta.chunk(2, 1)
        else:
            found[block, "gate_proj"], found[block, "up_proj"] = delta[:, ::2], delta[:, 1::2]
    return found


CHECKPOINT = {"mixtral": ("block_sparse_moe", "w1", "w3", "w2")}


@only("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss")
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("name", ["experts alone", "ranks and alphas", "rsLoRA", "one parameter"])
@pytest.mark.slow
def test_engines_get_of_each_expert_what_peft_adds_to_it(name, engine, base, tmp_path, request):
    trained = train(base, tmp_path / "trained", **ADAPTERS[name])
    exported = export_adapter(trained, tmp_path / "served", engine)
    config, tensors = config_of(tmp_path / "served"), load_file(tmp_path / "served/adapter_model.safetensors")
    assert not config["rank_pattern"] and config["r"] == exported.rank
    kind = request.node.callspec.params["base"]
    truth, n_seen = truth_of(base, name), 0
    assert truth
    if kind == "gpt_oss" and engine == "vllm":  # as PEFT has it, both parameters always
        assert all(
            "experts.base_layer.lora_A" in n or "experts.lora_A" in n for n in tensors if "experts" in n and "_A" in n
        )
        served = expected_projections(base, tmp_path / "served")
        for key, delta in served.items():
            torch.testing.assert_close(delta, truth.get(key, torch.zeros_like(delta)), atol=1e-6, rtol=1e-5)
        assert len(served) == 3 * len({block for block, _ in truth})
        return
    owner, *names = CHECKPOINT.get(kind, ("mlp", "gate_proj", "up_proj", "down_proj"))
    for block in {block for block, _ in truth}:
        for projection, end in zip(("gate_proj", "up_proj", "down_proj"), names, strict=True):
            for expert in range(4):
                key = f"base_model.model.model.layers.{block}.{owner}.experts.{expert}.{end}"
                a, b = (tensors[f"{key}.lora_{part}.weight"].double() for part in "AB")
                assert len(a) == exported.rank
                served, n_seen = config["lora_alpha"] / config["r"] * b @ a, n_seen + 2
                wanted = truth.get((block, projection), torch.zeros(4, *served.shape).double())[expert]
                torch.testing.assert_close(served, wanted, atol=1e-6, rtol=1e-5)
    assert n_seen == sum(".experts." in key for key in tensors)
    assert exported.verify.startswith(f"lora-init verify {trained} ")  # which PEFT reads of all families
    endings = {key.split(".")[-3] for key in tensors}
    assert {*config["target_modules"]} == endings and not config.get("target_parameters")


@only("mixtral", "gpt_oss")
def test_gate_and_up_projection_are_told_apart_where_a_release_does_not_say_how_they_lie(base, tmp_path):
    """Releases of transformers before `is_concatenated` have GPT-OSS alone with pairs of rows, and it transposed."""
    trained, found, read = train(base, tmp_path / "trained", target_modules=["q_proj"]), [], []
    served, of_one = (
        PeftModel.from_pretrained(load(base), trained),
        LoraWeights(torch.randn(4, 2, 32), torch.randn(4, 48, 2)),
    )
    for says in (True, False):
        for module in served.modules():
            if not says and "is_concatenated" in vars(module):
                del module.is_concatenated
        changes = [fault.experts for fault in Local(served, None).faults() if fault.experts]
        read.append([change(of_one) for part, change in changes if part == "gate_up_proj"])
        adapter, made = on_base("sglang", read_trained(trained), str(base))
        for module in made.model.modules():
            if not says and hasattr(module, "is_concatenated"):
                del module.is_concatenated
        found.append(by_projection(adapter, made).layers)
    assert found[0].keys() == found[1].keys() and sum("gate_proj" in name for name in found[0]) == 2
    for name, layer in found[0].items():
        assert torch.equal(layer.a, found[1][name].a) and torch.equal(layer.b, found[1][name].b)
    assert len(read[0]) == len(read[1]) > 1  # what `verify` takes a wrong engine to have read
    for first, second in zip(*read, strict=True):
        assert torch.equal(first.a, second.a) and torch.equal(first.b, second.b)


@only("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss")
@pytest.mark.parametrize("keep_ranks", [False, True])
def test_a_gguf_file_multiplies_each_expert_by_what_peft_adds_to_it(keep_ranks, base, tmp_path):
    gguf = pytest.importorskip("gguf")
    trained = train(base, tmp_path / "trained", **ADAPTERS["ranks and alphas"])
    exported = export_adapter(trained, tmp_path / "served.gguf", "llama.cpp", keep_ranks=keep_ranks)
    file = gguf.GGUFReader(exported.path)
    alpha = float(file.fields["adapter.lora.alpha"].parts[-1][0])
    tensors = {tensor.name: torch.tensor(tensor.data).double() for tensor in file.tensors}
    truth = truth_of(base, "ranks and alphas")
    for (block, projection), delta in truth.items():
        key = f"blk.{block}.ffn_{projection.removesuffix('_proj')}_exps.weight"
        a, b = tensors[f"{key}.lora_a"], tensors[f"{key}.lora_b"]
        assert a.shape[1] == (exported.rank if not keep_ranks else 2 if projection == "down_proj" else 4)
        torch.testing.assert_close(alpha / a.shape[1] * b @ a, delta, atol=1e-6, rtol=1e-5)
    assert 2 * len(truth) == sum("_exps" in name for name in tensors)


@pytest.mark.parametrize("family", ["Gemma4", "Qwen3Next"])
def test_a_gguf_file_has_gate_and_up_projection_in_as_many_tensors_as_the_base(family, tmp_path):
    """llama.cpp's converter keeps them in one tensor of Gemma 4, and cuts them of Qwen3-Next; b11549 served both."""
    from benchmarks.experts import build

    gguf = pytest.importorskip("gguf")
    if not any(hasattr(transformers, family + end) for end in ("TextConfig", "Config")):
        pytest.skip(f"no {family} in this release")
    base = tmp_path / "base"
    build(family).save_pretrained(base)
    trained = train(base, tmp_path / "trained", **ADAPTERS["ranks and alphas"])
    file = gguf.GGUFReader(export_adapter(trained, tmp_path / "served.gguf", "llama.cpp").path)
    alpha = float(file.fields["adapter.lora.alpha"].parts[-1][0])
    tensors = {tensor.name: torch.tensor(tensor.data).double() for tensor in file.tensors}
    truth = {f"blk.{i}.ffn_{end[:-5]}_exps": delta for (i, end), delta in expected_projections(base, trained).items()}
    if family == "Gemma4":
        for i in range(2):
            halves = truth.pop(f"blk.{i}.ffn_gate_exps"), truth.pop(f"blk.{i}.ffn_up_exps")
            truth[f"blk.{i}.ffn_gate_up_exps"] = torch.cat(halves, 1)
    for key, delta in truth.items():
        a, b = (tensors[f"{key}.weight.lora_{part}"] for part in "ab")
        torch.testing.assert_close(alpha / a.shape[1] * b @ a, delta, atol=1e-6, rtol=1e-5)
    assert len(truth) == 4 + 2 * (family != "Gemma4") and 2 * len(truth) == sum("_exps" in name for name in tensors)
    refused(f"is a {family}ForCausalLM, whose names in GGUF and MLX are not known", trained, tmp_path / "mlx", "mlx")
    if family == "Qwen3Next":
        trained = train(base, tmp_path / "linear", target_modules=["in_proj_qkvz"])
        message = "'model.layers.0.linear_attn.in_proj_qkvz' of Qwen3NextForCausalLM: llama.cpp applies no adapter"
        refused(message, trained, tmp_path / "no.gguf", "llama.cpp")


@only("mixtral")
def test_mlx_gets_one_module_for_each_projection_of_all_experts(base, tmp_path):
    trained = train(base, tmp_path / "trained", **ADAPTERS["ranks and alphas"])
    export_adapter(trained, tmp_path / "served", "mlx")
    tensors, config = load_file(tmp_path / "served/adapters.safetensors"), config_of(tmp_path / "served")
    for (block, projection), delta in truth_of(base, "ranks and alphas").items():
        key = f"model.layers.{block}.block_sparse_moe.switch_mlp.{projection}"
        assert key in config["lora_parameters"]["keys"]
        a, b = (tensors[f"{key}.lora_{part}"].double() for part in "ab")
        torch.testing.assert_close(config["lora_parameters"]["scale"] * b @ a, delta, atol=1e-6, rtol=1e-5)


@only("mixtral", "llama4")
@pytest.mark.parametrize("engine", ENGINES)
def test_engines_are_refused_with_the_way_out(engine, base, tmp_path, request):
    trained = train(base, tmp_path / "trained")
    refused("without DoRA, modules_to_save and experts", trained, tmp_path / "served", reduce_intruders=load(base))
    if engine in ("tgi", "lorax"):
        message = rf"{re.escape(engine)} does not take .*experts.gate_up_proj' of 4 experts.*merge_into="
    elif request.node.callspec.params["base"] == "mixtral":
        return
    else:
        message = r"Llama4ForCausalLM: engines have no form for .*experts.gate_up_proj'.*merge_into="
    refused(message, trained, tmp_path / "served", engine)
    trained = train(base, tmp_path / "router", target_parameters=["gate.weight", "router.weight"], target_modules=[])
    refused(r"does not take an adapter of the parameter .*merge_into=", trained, tmp_path / "served", engine)


def test_a_loss_of_experts_in_another_form_is_refused_before_the_base_is_loaded(tmp_path, monkeypatch):
    settings = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    get_peft_model(MODELS["mixtral"](), settings).save_pretrained(tmp_path / "adapter")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n' * 8)
    monkeypatch.setattr("lora_init.cli.export._load", lambda *_: pytest.fail("the base was loaded"))
    done = run("export", tmp_path / "adapter", "-o", tmp_path / "out", "--engine", "vllm", "--data",
               tmp_path / "rows.jsonl")  # fmt: skip
    assert_one_line_error(done, "--data: PEFT measures the loss, and vllm gets experts in another form.")


@pytest.mark.parametrize("queries", [None, 12])
@pytest.mark.slow
def test_what_llama_cpp_applies_no_adapter_to_is_refused_for_it(queries, tmp_path):
    """b11549 served an adapter of these as the base, and one of experts and `o_proj` as it was trained."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    pytest.importorskip("gguf")
    latent = dict(q_lora_rank=queries, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
    latent |= dict(moe_intermediate_size=20, n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=1)
    settings = COMMON | latent | dict(num_key_value_heads=4, topk_method="greedy")
    base = tmp_path / "base"
    DeepseekV2ForCausalLM(DeepseekV2Config(**settings)).save_pretrained(base)
    for kind in ("kv_a_proj_with_mqa", "kv_b_proj", *(("q_proj",) if queries is None else ("q_a_proj", "q_b_proj"))):
        trained = train(base, tmp_path / kind, target_modules=[kind, "o_proj"])
        for engine in ("llama.cpp", "ollama"):
            message = rf"layer 'model.layers.0.self_attn.{kind}' of DeepseekV2ForCausalLM: llama.cpp applies no adapter"
            refused(message, trained, tmp_path / "served", engine)
        export_adapter(trained, tmp_path / f"{kind}-vllm", "vllm")
    export_adapter(train(base, tmp_path / "o", target_modules=["o_proj"]), tmp_path / "served.gguf", "llama.cpp")
