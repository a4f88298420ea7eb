"""`verify` on adapters of fused experts, against a server that does to them what engines are known to do."""

import json
from functools import cache, partial

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lora_init import export_adapter, verify
from lora_init.cli.verify import _texts
from lora_init.serving.verify import Local
from tests.commands import run
from tests.layers.made import BOTH, MODELS
from tests.serving.engine import Engine, changed, word_tokenizer
from tests.versions import needs_experts_by_peft

pytestmark = [
    needs_experts_by_peft,
    pytest.mark.filterwarnings("ignore"),
]
RANK, EXPERTS = 4, 4
NUMBER = torch.arange(EXPERTS)
KINDS = ("mixtral", "qwen3_moe", "gpt_oss")


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    """Make of each kind a base whose experts matter, with prompts; each is made once."""

    @cache
    def home(kind):
        home = tmp_path_factory.mktemp(kind)
        torch.manual_seed(0)
        model = MODELS[kind]()
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(std=0.6 if "experts" in name else 0.2)
        model.save_pretrained(home / "base")
        word_tokenizer().save_pretrained(home / "base")
        rows = [{"text": " ".join(f"w{(7 * i + j * j) % 58}" for j in range(4 + i % 9))} for i in range(40)]
        (home / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        adapted(home, "trained")
        return home

    return home


def adapted(home, name, seed=0, **changes):
    """Save an adapter of a base, with random numbers."""
    torch.manual_seed(seed)
    settings = dict(r=RANK, lora_alpha=8, target_modules=["q_proj", "v_proj"], target_parameters=BOTH)
    base = AutoModelForCausalLM.from_pretrained(home / "base")
    adapter = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings | changes))
    for key, parameter in adapter.named_parameters():
        if "lora_" in key:
            parameter.data.normal_(std=0.12 if "experts" in key else 0.2)
    adapter.save_pretrained(home / name)


def ask(home, served, name="trained", dtype=torch.float32):
    """Serve an adapter of the base, or a model without one, and verify that it is the adapter called `name`."""
    engine = Engine(word_tokenizer())
    engine.add("the-base", home / "base", dtype=dtype)
    whole = not (served / "adapter_config.json").exists()
    engine.add("served", served if whole else home / "base", None if whole else served, dtype, parent="the-base")
    for model in engine.models.values():  # the default takes no bfloat16 of widths as small as these
        (model.get_base_model() if hasattr(model, "get_base_model") else model).set_experts_implementation("eager")
    with engine.running() as url:
        return run("verify", home / name, "--url", url, "--data", home / "rows.jsonl", "--n", 8, "--model", "served")


@pytest.fixture(scope="module")
def verified(homes):
    """Verify the adapter against one with other tensors, in this process: loading is half of what the command takes.

    Each base is loaded once, and the adapter that is served gets all of its tensors for each call. What PEFT computes
    under each fault that may be tried is the same in all calls for a kind, and is computed in the first that tries it.
    """

    @cache
    def loaded(kind):
        home = homes(kind)
        local, base, own = (AutoModelForCausalLM.from_pretrained(home / "base") for _ in range(3))
        engine = Engine(word_tokenizer())
        engine.models = {"the-base": base, "served": PeftModel.from_pretrained(own, home / "trained").eval()}
        for model in (base, own):  # other kernels than the local ones, as an engine has
            model.set_experts_implementation("eager")
        prompts = [*dict.fromkeys(_texts(str(home / "rows.jsonl"), engine.tokenizer, samples=16))]

        def answer(model, prompt):
            _, content = engine.answer("completions", {"model": model, "prompt": prompt, "logprobs": 20})
            (values,) = content["choices"][0]["logprobs"]["top_logprobs"]
            return {int(name.removeprefix("token_id:")): value for name, value in values.items()}

        asks = partial(answer, "served"), cache(partial(answer, "the-base"))
        tensors = load_file(home / "trained/adapter_model.safetensors")
        return local, engine, prompts, tensors, asks, remembered(Local.run)

    def found(kind, plant):
        local, engine, prompts, tensors, asks, run = loaded(kind)
        there = set_peft_model_state_dict(engine.models["served"], plant(tensors))
        assert not there.unexpected_keys
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Local, "run", run)
            return verify(homes(kind) / "trained", local, engine.tokenizer, prompts, *asks, n=8)

    return found


def remembered(run):
    """Compute once what an adapter does under each fault: most cases try them all, and what is served is another."""
    known = {}

    def remember(self, prompts, *faults):
        said = [{**vars(fault), "experts": fault.experts and fault.experts[0]} for fault in faults]
        key = repr((prompts, said))
        if key not in known:
            known[key] = run(self, prompts, *faults)
        self.size = known[key].shape[1]
        return known[key].clone()

    return remember


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


def rows_in_another_order(layout):
    def change(b):
        pairs = b.unflatten(0, (2, -1) if layout == "halves" else (-1, 2))
        return pairs.transpose(0, 1).reshape(b.shape)

    return of_experts(change, end="up")


def of_b(change):
    return lambda layout: of_experts(change)


def of_a(change):
    return lambda layout: of_experts(change, "A")


def without(*experts):
    return of_b(lambda b: b * ~torch.isin(NUMBER, torch.tensor(experts)))


def times(factor, *parts):
    """Multiply B of what has one of some parts in its name."""

    def change(tensors):
        return {
            key: tensor * (factor if "lora_B" in key and any(part in key for part in parts) else 1)
            for key, tensor in tensors.items()
        }

    return lambda layout: change


def by_blocks(b):  # columns of one expert after another
    return b.reshape(len(b), EXPERTS, RANK).transpose(1, 2)


def viewed(b):  # the same, and all rows of one expert before those of the next
    return b.reshape(EXPERTS, len(b), RANK).permute(1, 2, 0)


def by_rank(a):  # A with an expert's row for one rank after another
    return a.reshape(RANK, EXPERTS, -1).transpose(0, 1)


MISSING, OTHER, SCALED = "a part is missing", "another adapter", "scaled"
FIRST, SECOND = ".experts.base_layer.", ".experts.lora_"  # how PEFT calls the two parameters
FAULTS = {
    # dropped
    "all dropped": (times(0, ".experts."), MISSING, ": experts"),
    "gate and up dropped": (times(0, FIRST), MISSING, ": gate_up_proj"),
    "down dropped": (times(0, SECOND), MISSING, ": down_proj"),
    "one block dropped": (times(0, "layers.1.mlp.experts"), MISSING, ": model.layers.1.mlp.experts"),
    "attention dropped": (times(0, "self_attn"), MISSING, ": self_attn"),
    # one expert of many
    "one dropped": (without(2), MISSING, ": expert 2"),
    "the last one dropped": (without(3), MISSING, ": expert 3"),
    "all but the first dropped": (without(1, 2, 3), MISSING, ": all experts but the first one"),
    # halved
    "up without gate": (half(gate), MISSING, ": gate_proj of experts"),
    "gate without up": (half(up), MISSING, ": up_proj of experts"),
    "half of the ranks": (of_b(lambda b: b * (torch.arange(RANK) < 2)[:, None]), MISSING, ": half of the ranks of"),
    "the upper half of the experts": (without(2, 3), MISSING, ": experts 2 to 3"),
    "every second expert": (without(1, 3), MISSING, ": experts of odd number"),
    # permuted
    "the next expert's": (permuted([1, 2, 3, 0]), OTHER, "each expert with what is of the one after it"),
    "of the one two before": (permuted([2, 3, 0, 1]), OTHER, "each expert with what is of the one 2 before it"),
    "B of the next expert": (of_b(lambda b: b[..., [1, 2, 3, 0]]), OTHER, "each expert with B of the one after it"),
    "A of the expert before": (of_a(lambda a: a[[3, 0, 1, 2]]), OTHER, "each expert with A of the one before it"),
    "the first one's for all": (permuted([0, 0, 0, 0]), OTHER, "each expert with what is of the first one"),
    "A of the first one for all": (of_a(lambda a: a[[0, 0, 0, 0]]), OTHER, "each expert with A of the first one"),
    "in reverse order": (permuted([3, 2, 1, 0]), OTHER, "experts in reverse order"),
    "two exchanged": (permuted([2, 1, 0, 3]), OTHER, "experts alone not as trained"),
    # transposed
    "columns of B in blocks": (of_b(by_blocks), OTHER, "experts with other experts' columns of B"),
    "B by experts": (of_b(viewed), OTHER, "experts with other experts' rows and columns of B"),
    "A by ranks": (of_a(by_rank), OTHER, "experts with other experts' rows of A"),
    "gate for up": (exchanged, OTHER, "gate and up projection of experts exchanged"),
    "halves for pairs": (rows_in_another_order, OTHER, "rows of gate and up projection of experts in another order"),
    # scaled
    "scaled by 3": (times(3, ".experts."), SCALED, ": experts by "),
    "over the number of experts": (times(1 / EXPERTS, ".experts."), SCALED, ": experts by 0.2"),
    "down doubled": (times(2, SECOND), SCALED, ": down_proj by 2"),
    "attention halved": (times(0.5, "self_attn"), SCALED, ": self_attn by 0.5"),
    "taken off": (times(-1, ".experts."), SCALED, ": experts by -1"),
}


# Of both layouts of gate and up projection, unless it is scaled: GPT-OSS has pairs of rows, and the others halves.
CASES = [(f, kind) for i, f in enumerate(FAULTS) for kind in (KINDS[i % 2], KINDS[2])[: 1 + (FAULTS[f][1] != SCALED)]]


@pytest.mark.parametrize(("fault", "kind"), CASES)
@pytest.mark.slow
def test_a_fault_in_experts_is_named(fault, kind, verified):
    plant, verdict, words = FAULTS[fault]
    found = verified(kind, plant("pairs" if kind == "gpt_oss" else "halves"))
    assert found.verdict == verdict and found.text.startswith(verdict) and words in found.text, found.text


def test_the_command_names_a_fault_in_experts(homes, tmp_path):
    plant, verdict, words = FAULTS["one dropped"]
    home = homes("mixtral")
    done = ask(home, changed(home / "trained", tmp_path / "served", tensors=plant("halves")))
    assert done.exit_code == 1 and done.stdout.startswith(verdict) and words in done.stdout, done.output


def an_expert_without_tokens(tensors):
    return of_experts(lambda b: b * (NUMBER != 1))(tensors)


SHARED = ["q_proj", "shared_expert.gate_proj", "shared_expert.down_proj"]
# Of each the kind, the settings, and what is done before it is served.
RIGHT = {
    "Mixtral": ("mixtral", {}, ""),
    "Qwen3-MoE": ("qwen3_moe", dict(seed=1), ""),
    "GPT-OSS": ("gpt_oss", dict(seed=1), ""),
    "ranks by pattern": ("gpt_oss", dict(rank_pattern={"experts.down_proj": 2, "q_proj": 8}), ""),
    "alphas by pattern": ("mixtral", dict(alpha_pattern={"experts.gate_up_proj": 3, "v_proj": 16}), ""),
    "rsLoRA": ("qwen3_moe", dict(use_rslora=True), ""),
    "experts alone": ("qwen3_moe", dict(target_modules=[]), ""),
    "one parameter": ("gpt_oss", dict(target_parameters=BOTH[1:]), ""),
    "an expert without tokens": ("mixtral", {}, "an expert without tokens"),
    "a shared expert beside routed ones": ("qwen2_moe", dict(target_modules=SHARED), ""),
    "Mixtral in bfloat16": ("mixtral", {}, "bfloat16"),
    "Qwen3-MoE in bfloat16": ("qwen3_moe", {}, "bfloat16"),
    "merged": ("gpt_oss", {}, "merged"),
    "exported with one rank": ("mixtral", dict(rank_pattern={"experts.down_proj": 2}), "exported"),
}


@pytest.mark.parametrize("right", RIGHT)
@pytest.mark.slow
def test_right_experts_are_served_as_trained(right, homes, tmp_path):
    kind, settings, how = RIGHT[right]
    home, served = homes(kind), tmp_path / "served"
    adapted(home, right, **settings)
    if how == "an expert without tokens":  # B of which is as it started
        changed(home / right, home / f"{right}, B zero", tensors=an_expert_without_tokens)
        right = f"{right}, B zero"
    if how == "merged":
        export_adapter(home / right, served, merge_into=str(home / "base"))
        word_tokenizer().save_pretrained(served)
    elif how == "exported":
        export_adapter(home / right, served)
    else:
        served = home / right
    done = ask(home, served, right, torch.bfloat16 if how == "bfloat16" else torch.float32)
    assert done.exit_code == 0 and done.stdout.startswith("served as trained"), done.output


@pytest.mark.parametrize(("elsewhere", "verdict"), [(1, "served as trained"), (4, "another adapter")])
@pytest.mark.slow
def test_a_few_prompts_may_be_sent_to_other_experts(elsewhere, verdict, homes):
    """An engine in another precision, whose router sends the last tokens of some prompts elsewhere."""
    home, tokenizer = homes("mixtral"), word_tokenizer()
    local, base, own = (AutoModelForCausalLM.from_pretrained(home / "base") for _ in range(3))
    served = PeftModel.from_pretrained(own, home / "trained").eval()
    generator, asked = torch.Generator().manual_seed(0), []

    @torch.no_grad()
    def answer(prompt, model, off=0.0):
        values = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1].log_softmax(-1)
        return dict(enumerate((values + (0.01 + off) * torch.randn(len(values), generator=generator)).tolist()))

    def ask_adapter(prompt):
        asked.append(prompt)
        return answer(prompt, served, 0.3 * (len(asked) <= elsewhere))

    prompts = [json.loads(row)["text"] for row in (home / "rows.jsonl").read_text().splitlines()]
    found = verify(home / "trained", local, tokenizer, prompts, ask_adapter, lambda prompt: answer(prompt, base), n=8)
    assert found.verdict == verdict
    sent = f"but for {elsewhere} of 8 prompts, whose tokens a router may have sent elsewhere"
    assert (sent in found.text) == (elsewhere == 1)
