"""`verify` on adapters of fused experts, against a server that does to them what engines are known to do."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.commands import run
from tests.layers.made import BOTH, MODELS
from tests.serving.engine import Engine, changed, word_tokenizer
from tests.versions import needs_experts_by_peft

pytestmark = [
    needs_experts_by_peft,
    pytest.mark.filterwarnings("ignore"),
]
RANK, EXPERTS = 4, 4


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe", "gpt_oss"])
def home(request, tmp_path_factory):
    """A base whose experts matter, an adapter of it with random numbers, and prompts."""
    home = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = MODELS[request.param]()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.6 if "experts" in name else 0.2)
    model.save_pretrained(home / "base")
    word_tokenizer().save_pretrained(home / "base")
    for seed, name in enumerate(("trained", "again")):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(home / "base")
        settings = dict(r=RANK, lora_alpha=8, target_modules=["q_proj", "v_proj"], target_parameters=BOTH)
        adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                parameter.data.normal_(std=0.12 if "experts" in key else 0.2)
        adapted.save_pretrained(home / name)
    rows = [{"text": " ".join(f"w{(7 * i + j * j) % 58}" for j in range(4 + i % 9))} for i in range(40)]
    (home / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    home.joinpath("layout").write_text("pairs" if request.param == "gpt_oss" else "halves")
    return home


def ask(home, adapter, base="base", dtype=torch.float32, name="trained"):
    engine = Engine(word_tokenizer())
    engine.add("the-base", home / base, dtype=dtype)
    engine.add("served", home / base, adapter, dtype, parent="the-base")
    for model in engine.models.values():  # the default takes no bfloat16 of widths as small as these
        (model.get_base_model() if hasattr(model, "get_base_model") else model).set_experts_implementation("eager")
    with engine.running() as url:
        return run("verify", home / name, "--url", url, "--data", home / "rows.jsonl", "--n", 8)


def of_experts(change, part="B", end=""):
    """Change A or B of experts as PEFT writes them: B is [d_out, rank of each expert in turn], A experts in turn."""

    def apply(tensors):
        new = dict(tensors)
        for key, tensor in tensors.items():
            inner = ".experts.base_layer." in key  # the first matrix, which PEFT wraps first
            if ".experts." not in key or f"lora_{part}" not in key or (end == "up" and not inner):
                continue
            if part == "B":
                each = tensor.reshape(len(tensor), RANK, EXPERTS)
                new[key] = change(each).reshape(tensor.shape).contiguous()
            else:
                new[key] = change(tensor.reshape(EXPERTS, RANK, -1)).reshape(tensor.shape).contiguous()
        return new

    return apply


def gate(b, layout):
    return slice(0, len(b) // 2) if layout == "halves" else slice(0, None, 2)


def up(b, layout):
    return slice(len(b) // 2, None) if layout == "halves" else slice(1, None, 2)


def half(which):
    def fault(layout):
        def change(b):
            b = b.clone()
            b[which(b, layout)] = 0
            return b

        return of_experts(change, end="up")

    return fault


def exchanged(layout):
    def change(b):
        new = b.clone()
        new[gate(b, layout)], new[up(b, layout)] = b[up(b, layout)], b[gate(b, layout)]
        return new

    return of_experts(change, end="up")


def permuted(order):
    def fault(layout):
        b, a = of_experts(lambda b: b[:, :, order]), of_experts(lambda a: a[order], "A")
        return lambda tensors: a(b(tensors))

    return fault


def one_less(layout):
    return of_experts(lambda b: b * (torch.arange(EXPERTS) != 2))


def by_blocks(layout):  # columns of one expert after another
    return of_experts(lambda b: b.reshape(len(b), EXPERTS, RANK).transpose(1, 2))


FAULTS = {
    "dropped": (lambda layout: of_experts(lambda b: b * 0), "a part is missing", ": experts"),
    "columns of B in blocks": (by_blocks, "another adapter", "experts with other experts' columns of B"),
    "the next expert's": (permuted([1, 2, 3, 0]), "another adapter", "each expert with what is of the one after it"),
    "B of the next expert": (
        lambda layout: of_experts(lambda b: b[:, :, [1, 2, 3, 0]]), "another adapter", "with B of the one after it",
    ),
    "in reverse order": (permuted([3, 2, 1, 0]), "another adapter", "experts in reverse order"),
    "two exchanged": (permuted([2, 1, 0, 3]), "another adapter", "experts alone not as trained"),
    "up without gate": (half(gate), "a part is missing", ": gate_proj of experts"),
    "gate without up": (half(up), "a part is missing", ": up_proj of experts"),
    "transposed halves": (exchanged, "another adapter", "gate and up projection of experts exchanged"),
    "one of many": (one_less, "a part is missing", ": expert 2"),
    "scaled": (lambda layout: of_experts(lambda b: b * 3), "scaled", "experts by "),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_experts_is_named(fault, home, tmp_path):
    plant, verdict, words = FAULTS[fault]
    served = changed(home / "trained", tmp_path / "served", tensors=plant((home / "layout").read_text()))
    done = ask(home, served)
    assert done.exit_code == 1 and done.stdout.startswith(verdict) and words in done.stdout, done.output


@pytest.mark.parametrize("name", ["trained", "again"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_experts_are_served_as_trained(name, dtype, home):
    if dtype == torch.bfloat16 and home.name.startswith("gpt_oss"):
        pytest.skip("rounding sends too many tokens of a base as small as this to other experts: refused, 0.16 off")
    done = ask(home, home / name, dtype=dtype, name=name)
    assert done.exit_code == 0 and done.stdout.startswith("served as trained"), done.output
