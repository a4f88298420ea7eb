"""What does not fit of experts gets one clear line, in Python and on the command line, before a model is loaded."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from lora_init import LoraInitError, collect, export_adapter, find_targets, initialize
from tests.commands import assert_one_line_error, run
from tests.layers.made import BOTH, MODELS
from tests.serving.engine import Engine, word_tokenizer
from tests.versions import needs_experts_by_peft

pytestmark = [
    needs_experts_by_peft,
    pytest.mark.filterwarnings("ignore"),
]
PATTERNS = dict(rank_pattern={"gate_up_proj": 3, "down_proj": 6})  # so that rows of rank alone do not tell


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("experts")
    rows = [{"text": " ".join(f"w{(7 * i + j * j) % 58}" for j in range(9))} for i in range(40)]
    (home / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made = {"four": ("mixtral", {}), "six": ("mixtral", dict(num_local_experts=6)), "gpt_oss": ("gpt_oss", {})}
    for name, (kind, changes) in made.items():
        for adapter, more in ((name, {}), (f"{name} by patterns", PATTERNS)):
            torch.manual_seed(0)
            model = MODELS[kind](**changes)
            model.save_pretrained(home / name)
            word_tokenizer().save_pretrained(home / name)
            config = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=BOTH, task_type="CAUSAL_LM", **more)
            adapted = get_peft_model(model, config)
            adapted.peft_config["default"].base_model_name_or_path = str(home / name)
            for key, parameter in adapted.named_parameters():
                if "lora_" in key:
                    parameter.data.normal_(std=0.2)
            adapted.save_pretrained(home / f"{adapter} adapted")
    for name in ("four", "six"):
        export_adapter(home / f"{name} adapted", home / f"{name} one by one adapted", "vllm")
    shutil.copytree(home / "gpt_oss adapted", home / "transposed adapted")
    file = home / "transposed adapted/adapter_model.safetensors"
    tensors, other = load_file(file), {"lora_A": "lora_B", "lora_B": "lora_A"}
    of_experts = [key for key in tensors if "experts" in key]
    changed = {key: tensors[key.replace(part := key.split(".")[-2], other[part])].T.contiguous() for key in of_experts}
    save_file(tensors | changed, file, {"format": "pt"})
    return home


MISFITS = {
    "fewer experts": ("four", "six", "is of 4 experts, and MixtralForCausalLM has 6."),
    "more experts": ("six", "four", "is of 6 experts, and MixtralForCausalLM has 4."),
    "fewer experts, ranks by patterns": ("four by patterns", "six", "is of 4 experts, and MixtralForCausalLM has 6."),
    "an expert out of range": ("six one by one", "four", "the base has its experts fused: 4, and the adapter has 6."),
    "an expert that is missing": ("four one by one", "six", "has its experts fused: 6, and the adapter has 4."),
    "transposed": ("transposed", "gpt_oss", "A and B have each other's widths, as PEFT before 0.19.1 made them for"),
}


@pytest.mark.parametrize("case", MISFITS)
@pytest.mark.slow
def test_an_adapter_of_other_experts_than_its_base_has_is_refused(case, home, tmp_path, monkeypatch):
    name, base, message = MISFITS[case]
    adapter, base = home / f"{name} adapted", home / base
    engine = Engine(word_tokenizer())
    engine.add("the-base", base)
    engine.add(adapter.name, base, parent="the-base")
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    for where in (dict(base=str(base)), dict(engine="vllm", base=str(base)), dict(merge_into=str(base))):
        with pytest.raises(LoraInitError) as error:
            export_adapter(adapter, tmp_path / "out", **where)
        assert message in str(error.value) and "\n" not in str(error.value)
    data = home / "rows.jsonl"
    assert_one_line_error(run("export", adapter, "-o", tmp_path / "out", "--base", base), message)
    assert_one_line_error(run("export", adapter, "-o", tmp_path / "out", "--merge-into", base), message)
    assert_one_line_error(run("dial", adapter, data, "-o", tmp_path / "out", "--base", base), message)
    with engine.running() as url:
        found = run("verify", adapter, "--url", url, "--base", base, "--data", data)
    assert found.exit_code == 2 and message in found.stderr and found.stderr.count("\n") == 1, found.output
    found = run("inspect", adapter, "--base", base)
    assert found.exit_code == 1 and message in " ".join(found.stdout.split())
    assert not (tmp_path / "out").exists()


def test_right_ones_fit(home):
    for name in ("four", "six", "gpt_oss", "four by patterns", "gpt_oss by patterns", "six one by one"):
        found = run("inspect", home / f"{name} adapted", "--base", home / name.split(" ")[0])
        said = " ".join(found.stdout.split())
        assert found.exit_code == 0 and "tensors are applied" in said, found.output
        assert ("load and save it by PEFT" in said) == ("one by one" in name)


def test_adapters_of_single_experts_are_for_engines_that_take_experts(home):
    said = " ".join(run("inspect", home / "six one by one adapted").stdout.split())
    assert (
        "PEFT, vLLM (--max-lora-rank 8) and SGLang take this adapter as it is. llama.cpp, Ollama and MLX need "
        "`lora-init export`. TGI and LoRAX take no adapter of experts: `lora-init export --merge-into MODEL`." in said
    )


def test_what_all_linear_leaves_out_is_said_once(home, tmp_path):
    made = ("init", home / "four", home / "rows.jsonl", "--rank", 2, "--statistics", tmp_path / "stats.safetensors")
    done = run(*made, "-o", tmp_path / "out")
    assert done.exit_code == 0 and (done.stdout + done.stderr).count("fused experts hold") == 1, done.output
    assert "warning: fused experts hold" in done.stderr
    again = run("init", home / "four", *made[3:], "-o", tmp_path / "again")  # from the file, without a pass
    assert again.exit_code == 0 and again.stdout.count("note: fused experts hold") == 1, again.output
    assert "fused experts" not in again.stderr


def never():
    raise AssertionError("a batch was read")
    yield


WHOLE = "down_proj (of 4 experts), gate_up_proj (of 4 experts), which are adapted whole."
FUSED = "matches no layer of MixtralForCausalLM. Its experts are fused, which {parameters} names."
# What is asked for in Python and on the command line, and what is said, with the options in the words of each.
ASKED = {
    "one of fused experts": (dict(target_parameters=["experts.9.down_proj"]), WHOLE),
    "an index after the name": (dict(target_parameters=["experts.down_proj.9"]), WHOLE),
    "a module of fused experts": (dict(target_modules=["experts.9.w1"]), FUSED),
    "modules of fused experts": (dict(target_modules=["experts.0.w1", "experts.3.w1"]), FUSED),
    "a rank above an expert's width": (
        dict(rank=30, target_parameters=BOTH),
        "layer 'model.layers.0.mlp.experts.down_proj': {rank} is larger than its input width 24 (2 such layers).",
    ),
    "DoRA": (dict(use_dora=True, target_parameters=BOTH), "PEFT does not adapt parameters with {use_dora}. Leave out"),
    "a start from gradients": (
        dict(method="lora-ga", target_parameters=BOTH), "is a MixtralExperts: gradient statistics are for linear layers"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ASKED)
def test_experts_that_cannot_be_adapted_are_refused_before_the_pass(case, home, tmp_path, monkeypatch):
    asked, message = ASKED[case]
    words = dict(rank="rank=30", use_dora="use_dora=True", parameters=f"target_parameters={sorted(BOTH)}")
    with pytest.raises(LoraInitError) as error:
        initialize(MODELS["mixtral"](), never(), progress=False, **{"rank": 2} | asked)
    assert message.format(**words) in str(error.value) and "\n" not in str(error.value)
    if "method" not in asked:
        monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    options = {f"--{key.replace('_', '-')}": value for key, value in asked.items()}
    given = [word for key, value in options.items() for word in ([key] if value is True else [key, value])]
    given = [",".join(one) if isinstance(one, list) else one for one in given]
    done = run("init", home / "four", home / "rows.jsonl", "-o", tmp_path / "out", *given)
    words = dict(rank="--rank 30", use_dora="--use-dora", parameters=f"--target-parameters {','.join(sorted(BOTH))}")
    assert_one_line_error(done, message.format(**words))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_quantized_experts_are_refused_by_name(dtype):
    model = MODELS["mixtral"]()
    module = model.model.layers[0].mlp.experts
    packed = torch.zeros(module.down_proj.shape if dtype.is_floating_point else (512, 1), dtype=dtype)
    module.down_proj = torch.nn.Parameter(packed, requires_grad=False)
    message = rf"'model.layers.0.mlp.experts.down_proj', which is quantized \({dtype}\), and PEFT adds to weights in"
    with pytest.raises(LoraInitError, match=message):
        initialize(model, never(), rank=2, target_parameters=BOTH, progress=False)


def test_a_merge_into_quantized_experts_is_refused_by_name(home, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(home / "gpt_oss", base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    done = run("export", home / "gpt_oss adapted", "-o", tmp_path / "out", "--merge-into", base)
    said = f"error: '{base}' is quantized: its files hold no float weights. Name the model it was made of."
    assert done.exit_code == 1 and done.stderr.splitlines()[-1] == said, done.stderr  # after what could not be compared


def test_an_expert_out_of_range_among_modules_is_refused_with_the_range():
    experts = torch.nn.ModuleList(torch.nn.ModuleDict({"w1": torch.nn.Linear(4, 4)}) for _ in range(4))
    model = torch.nn.ModuleDict({"experts": experts})
    with pytest.raises(
        LoraInitError, match=r"\['experts.4.w1'\] matches no layer of ModuleDict. It has the experts 0 to 3"
    ):
        find_targets(model, ["experts.3.w1", "experts.4.w1"])


def test_a_shared_expert_is_adapted_beside_routed_ones(tmp_path):
    batches = [{"input_ids": torch.randint(3, 64, (8, 12))} for _ in range(4)]
    model = MODELS["qwen2_moe"]()
    shared = {f"model.layers.{i}.mlp.shared_expert.{end}_proj" for i in range(2) for end in ("gate", "up", "down")}
    stats = collect(model, batches, rank=2, target_parameters=BOTH)
    assert shared < {*stats} and not any("fused" in note for note in stats.provenance.notes)
    for layer in shared:  # which reads every token, and no expert a part of them
        assert stats[layer].n_samples == 4 * 8 * 12 and not stats.targets[layer].experts
    with pytest.warns(UserWarning, match="fused experts hold 49% of the weights"):
        alone = collect(model, batches, rank=2)
    assert shared < {*alone}
