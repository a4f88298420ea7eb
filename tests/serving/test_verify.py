"""`verify` names what a server does with an adapter: twelve planted faults, and none where there is none."""

import json
import math
import re
import shutil
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import processors
from transformers import AutoModelForCausalLM

import lora_init
from lora_init import LoraInitError
from lora_init.adapters.init_config import Reading
from lora_init.cli import verify as verify_command
from lora_init.serving import server
from lora_init.serving import verify as verify_room
from lora_init.serving.engines import VLLM_RANKS
from lora_init.serving.experts import misreadings
from lora_init.serving.verify import Fault, Local, _most_telling, _variance_within_prompts, diagnose
from tests import commands
from tests.commands import run, tokenizer_of
from tests.conftest import refused, tiny_llama
from tests.layers.made import BOTH, mixtral
from tests.serving.engine import FAULTS, Engine, changed, without, word_tokenizer
from tests.versions import needs_experts_by_peft

# What could not be asked is not what differs, which is 1.
assert_one_line_error = partial(commands.assert_one_line_error, code=2)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
KINDS = ["q_proj", "v_proj", "up_proj"]
WORDS = ["user", "assistant", *(f"w{i}" for i in range(58))]
ADAPTERS = {
    "plain": dict(r=8, lora_alpha=16),
    "ranks": dict(r=8, lora_alpha=16, rank_pattern={"v_proj": 2, "layers.0.mlp.up_proj": 3},
                  alpha_pattern={"v_proj": 4, "layers.0.mlp.up_proj": 6}),
    "rslora": dict(r=16, lora_alpha=16, use_rslora=True),
    "dora": dict(r=8, lora_alpha=16, use_dora=True),
}  # fmt: skip


def train(base, directory, seed=1, **settings):
    """Make an adapter as PEFT saves it, with random numbers in place of training."""
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=KINDS, **settings)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.06)
        if "magnitude" in name:
            parameter.data *= 1 + 0.2 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two bases with a tokenizer, adapters of the first, and prompts."""
    home = tmp_path_factory.mktemp("verify")
    for seed, name in enumerate(("base", "other-base")):
        torch.manual_seed(seed)
        tiny_llama(initializer_range=0.2, num_hidden_layers=3).save_pretrained(home / name)
        word_tokenizer().save_pretrained(home / name)
    for name, settings in ADAPTERS.items():
        train(home / "base", home / name, **settings)
    train(home / "base", home / "other-task", seed=2, **ADAPTERS["plain"])
    rows = [{"text": " ".join(f"w{(7 * i + j * j) % 58}" for j in range(4 + i % 9))} for i in range(40)]
    (home / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    chats = [
        {"messages": [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": "w1"}]} for row in rows
    ]
    (home / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    return home


def served(home, adapter, base="base", dtype="float32"):
    engine = Engine(word_tokenizer())
    engine.add("the-base", home / base, dtype=DTYPES[dtype])
    engine.add("served", home / base, adapter, DTYPES[dtype], parent="the-base")
    return engine


def ask(home, name, engine, *options, data="rows.jsonl"):
    with engine.running() as url:
        return run("verify", home / name, "--url", url, "--data", home / data, "--n", 4, *options)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.slow
def test_a_planted_fault_is_named(fault, home, tmp_path):
    name, change, verdict, words = FAULTS[fault]
    done = ask(home, name, served(home, changed(home / name, tmp_path / "served", **change), dtype="bfloat16"))
    assert done.exit_code == 1 and done.stdout.startswith(verdict) and words in done.stdout, done.output


@pytest.mark.parametrize(("name", "dtype"), zip(ADAPTERS, [*DTYPES] * 2, strict=True))
def test_a_right_adapter_is_served_as_trained(name, dtype, home):
    done = ask(home, name, served(home, home / name, dtype=dtype))
    assert done.exit_code == 0 and done.stdout.startswith("served as trained"), done.output


def test_a_text_that_two_tokens_have_is_not_taken_for_one_of_them(home):
    """Engines that tell tokens by their text alone: a space within a token is written in two ways."""
    tokenizer, prompts = tokenizer_of([*WORDS[:-2], " w0", "▁w0"]), ["w1 w2 w3", "w4 w5"]
    numbers = tokenizer.convert_tokens_to_ids([" w0", "▁w0"])
    assert numbers == [62, 63]
    model = AutoModelForCausalLM.from_pretrained(home / "base")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(home / "base"), home / "plain").eval()

    @torch.no_grad()
    def served(prompt):
        values = adapted(torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0, -1].log_softmax(-1).tolist()
        return {" w0" if i in numbers else tokenizer.decode([i]): value for i, value in enumerate(values)}

    found = lora_init.verify(home / "plain", model, tokenizer, prompts, served)
    assert found.verdict == "served as trained" and found.residual < 1e-4 and found.values == 2 * (64 - 2), found


@pytest.mark.parametrize("most", [1, 2])
def test_as_few_values_as_a_server_tells_are_enough(most, home, tmp_path):
    """With one value a prompt nothing varies within prompts, which is no sign of another base."""
    engine = served(home, home / "plain")
    engine.most = most
    done = ask(home, "plain", engine)
    assert done.exit_code == 0 and done.stdout.startswith("served as trained"), done.output
    assert re.search(r"""\nNext: curl http://\S+/completions --json '{"model": "served", """, done.stdout)
    engine = served(home, changed(home / "plain", tmp_path / "doubled", config={"lora_alpha": 32}))
    engine.most = most
    done = ask(home, "plain", engine)
    assert done.exit_code == 1 and done.stdout.startswith("scaled: by 2, alpha doubled"), done.output
    assert f"\nNext: lora-init inspect {home / 'plain'} --base " in done.stdout


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.slow
def test_another_task_another_base_and_a_zero_adapter(dtype, home, tmp_path):
    engine = served(home, home / "other-task", dtype=dtype)
    done = ask(home, "plain", engine)
    assert done.exit_code == 1 and done.stdout.startswith("another adapter: that of another task"), done.output
    # Nearly the base, but not the base. In bfloat16 the noise is 0.016, and with alpha 1 it is 0.037 from the base.
    weak = changed(home / "other-task", tmp_path / "weak", config={"lora_alpha": 1 if dtype == "float32" else 4})
    done = ask(home, "plain", served(home, weak, dtype=dtype))
    assert done.stdout.startswith("another adapter"), done.output
    done = ask(home, "plain", served(home, home / "plain", base="other-base", dtype=dtype))
    assert done.exit_code == 1 and done.stdout.startswith("another base or template: the served base is"), done.output
    zero = changed(home / "plain", tmp_path / "zero", tensors=without("lora"))
    engine = served(home, zero, dtype=dtype)
    done = ask(home, "plain", engine)
    assert done.stdout.startswith("ignored"), done.output
    engine.asked.clear()
    done = ask(home, zero, engine)
    assert done.exit_code == 2 and "changes nothing in PEFT either; is B zero?" in done.stdout, done.output
    assert len(engine.asked) == 1  # which tells the form of its answers


def test_the_random_numbers_of_who_asks_go_on(home):
    model = AutoModelForCausalLM.from_pretrained(home / "base")
    before = torch.get_rng_state()
    told = dict.fromkeys(range(64), -4.0)
    lora_init.verify(home / "plain", model, word_tokenizer(), ["w1 w2 w3", "w4 w5"], lambda prompt: told)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("config", [{"lora_alpha": 0}, {"alpha_pattern": {"q_proj": 0}}], ids=str)
def test_an_adapter_whose_scaling_is_zero_is_judged_too(config, home, tmp_path):
    """Somewhere, or everywhere."""
    scaled = changed(home / "plain", tmp_path / "scaled", config=config)
    done = ask(home, scaled, served(home, scaled))
    if "lora_alpha" in config:
        assert done.exit_code == 2 and "changes nothing in PEFT either" in done.stdout, done.output
    else:
        assert done.exit_code == 0 and done.stdout.startswith("served as trained"), done.output


def test_chats_are_asked_as_such(home):
    engine = served(home, home / "plain", dtype="bfloat16")
    assert ask(home, "plain", engine, data="chats.jsonl").exit_code == 0
    assert {path for path, _ in engine.asked} == {"chat/completions"}
    engine.generation_prompt = False
    done = ask(home, "plain", engine, data="chats.jsonl")
    assert done.exit_code == 1 and done.stdout.startswith("another base or template"), done.output
    engine.generation_prompt, engine.paths = True, ["chat/completions"]  # then texts are what a user says
    assert ask(home, "plain", engine).exit_code == 0


def test_a_base_that_cannot_compute_what_a_server_answers_is_named(home, tmp_path):
    for name in ("bare", "classes"):
        shutil.copytree(home / "base", tmp_path / name)
    tokenizer_of(WORDS[2:]).save_pretrained(tmp_path / "bare")
    (tmp_path / "bare/chat_template.jinja").unlink()
    config = json.loads((home / "base/config.json").read_text()) | {"architectures": ["LlamaForSequenceClassification"]}
    (tmp_path / "classes/config.json").write_text(json.dumps(config))
    engine = served(home, home / "plain")
    for name, paths, what in (
        ("classes", ["completions"], "a LlamaForSequenceClassification"),
        ("bare", ["chat/completions"], "without a chat template"),
    ):
        engine.paths = paths
        done = ask(home, "plain", engine, "--base", tmp_path / name)
        refusal = f"{str(tmp_path / name)!r} is {what}, so this server's log-probabilities cannot be computed here."
        assert done.exit_code == 2 and done.stderr.splitlines()[-1] == f"error: {refusal}", done.output


def test_a_chat_is_asked_up_to_its_first_answer_and_not_at_all_without_one(tmp_path):
    turns = {"s": ("system", "w1"), "u": ("user", "w2"), "a": ("assistant", "w3")}
    rows = [
        {"messages": [dict(zip(("role", "content"), turns[letter], strict=True)) for letter in chat]}
        for chat in ("ua", "u", "au", "suaua", "su", "uau")
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    chats = verify_command._chats(str(tmp_path / "chats.jsonl"), Reading(), 5)
    assert ["".join(message["role"][0] for message in chat) for chat in chats] == ["u", "su"]
    assert verify_command._chats(str(tmp_path / "chats.jsonl"), Reading(template="{messages}"), 5) == []


def test_chats_that_a_server_cannot_be_asked_are_named(home, monkeypatch):
    engine = served(home, home / "plain")
    engine.paths = ["completions"]
    monkeypatch.setattr(verify_command, "_texts", lambda *arguments, **settings: iter(()))  # no text with these tokens
    done = ask(home, "plain", engine, data="chats.jsonl")
    assert_one_line_error(done, "has no /chat/completions, and no text of", "chats.jsonl has the same tokens")


@pytest.mark.slow
def test_several_adapters_are_asked_about_with_one_base(home, tmp_path):
    engine = served(home, home / "plain")
    for name in ("plain", "dora", "damaged"):
        engine.add(name, home / "base", home / "other-task" if name == "dora" else home / "plain", parent="the-base")
    damaged = changed(home / "plain", tmp_path / "damaged", config={})
    (damaged / "adapter_model.safetensors").write_bytes(b"nothing")
    with engine.running() as url:
        asked = home / "plain", damaged, home / "ranks", home / "dora", tmp_path / "nowhere"
        options = "--url", url, "--data", home / "rows.jsonl", "--n", 4
        done = run("verify", *asked, *options)
        rows = re.split(r"\n(?=\S)", done.stdout)
        assert done.exit_code == 1 and re.match("plain +served as trained", rows[0]), done.output
        found = dict(row.split(maxsplit=1) for row in rows)
        assert "is damaged" in found["damaged"] and "has no model 'ranks'" in found["ranks"]
        assert found["dora"].startswith("another adapter") and "no model 'nowhere'" in found["nowhere"]
        found = json.loads(run("verify", *asked, *options, "--json").stdout)
        assert [one.get("verdict") for one in found] == ["served as trained", None, None, "another adapter", None]
        assert run("verify", home / "plain", damaged, *options).exit_code == 2
        assert_one_line_error(run("verify", home / "plain", home / "ranks", "--url", url, "--model", "x"), "names one")
        assert_one_line_error(run("verify", home / "none", "--url", "http://127.0.0.1:1/v1"), "none is no adapter dir")
        assert_one_line_error(run("verify", home / "ranks", home / "rslora", "--url", url), "has no model 'ranks'")


@pytest.mark.slow
def test_an_export_that_lost_something_is_served_as_exported(home, tmp_path):
    lossy, exact = tmp_path / "lossy", tmp_path / "exact"
    exported = lora_init.export_adapter(home / "plain", lossy, "vllm", 4)
    lora_init.export_adapter(home / "plain", exact, "vllm", 16)
    done = ask(home, lossy, served(home, lossy))
    lost = f"{exported.error:.2%}"
    assert done.exit_code == 0 and done.stdout.startswith(f"served as exported, which lost {lost} of the update: ")
    assert ask(home, exact, served(home, exact)).stdout.startswith("served as trained")
    assert ask(home, "plain", served(home, lossy)).stdout.startswith("another adapter: this one compressed")
    assert ask(home, lossy, served(home, home / "plain")).exit_code == 1


def test_an_effect_below_the_engines_noise_is_said_with_what_it_would_have_to_be(home, tmp_path):
    weak = changed(home / "plain", tmp_path / "weak", config={"lora_alpha": 1})
    engine = served(home, weak)
    answer = engine.answer

    def noisy(path, body):
        status, content = answer(path, body)
        for one in content["choices"][0]["logprobs"]["top_logprobs"]:
            for i, token in enumerate(one):
                one[token] += 0.05 * (-1) ** i
        return status, content

    engine.answer = noisy
    done = ask(home, weak, engine, "--model", "served")
    assert done.exit_code == 2 and "cannot tell: the effect would have to be 0.1 at least" in done.stdout, done.output


@pytest.mark.parametrize(("factor", "alpha"), [(0.3, 16), (0.7, 48), (1.3, 16), (3, 48)])  # alpha: an effect of 1 and 3
@pytest.mark.slow
def test_any_other_factor_is_found_to_a_per_cent(factor, alpha, home, tmp_path):
    trained = changed(home / "plain", tmp_path / "trained", config={"lora_alpha": alpha})
    with served(home, changed(trained, tmp_path / "served", config={"lora_alpha": alpha * factor})).running() as url:
        done = run("verify", trained, "--url", url, "--data", home / "rows.jsonl", "--n", 8)
    found = re.match(r"scaled: by ([\d.]+)", done.stdout)
    assert found and float(found[1]) == pytest.approx(factor, rel=0.01), done.output


def test_without_a_base_on_the_server_it_says_so_and_notices_less(home, tmp_path):
    engine = served(home, home / "plain")
    del engine.models["the-base"], engine.parents["the-base"]
    engine.parents["served"] = None
    done = ask(home, "plain", engine)
    assert done.exit_code == 0 and "the base was not asked" in done.stdout
    engine.add("served", home / "base", changed(home / "plain", tmp_path / "half", config={"lora_alpha": 10}))
    done = ask(home, "plain", engine)
    assert done.exit_code == 1 and done.stdout.startswith("scaled: by 0.6"), done.output


def test_a_function_is_asked_in_place_of_a_server(home):
    model = AutoModelForCausalLM.from_pretrained(home / "base")
    engine = served(home, home / "ranks")
    before, state = dict(model.named_modules()), {key: t.clone() for key, t in model.state_dict().items()}

    def told(name):
        def ask(prompt):
            logits = engine.models[name](torch.tensor([engine.tokenizer(prompt)["input_ids"]])).logits
            return dict(enumerate(logits[0, -1].log_softmax(-1).tolist()))

        return ask

    prompts = [f"w{i} w{i + 3}" for i in range(9)]
    found = lora_init.verify(home / "ranks", model, engine.tokenizer, prompts, told("served"), told("the-base"), n=4)
    assert found.verdict == "served as trained" and found.residual < 1e-5 and (found.prompts, found.values) == (4, 256)
    assert dict(model.named_modules()) == before and not hasattr(model, "peft_config")
    assert all(torch.equal(state[key], t) for key, t in model.state_dict().items())
    for asked, n, said in (
        ([], 32, "^verify needs a prompt, and got none"), (prompts, 0, "^n=0, expected a whole number of at least 1"),
        (prompts, 2.5, "^n=2.5, expected a whole"), (prompts, None, "^n=None, expected a whole"),
    ):  # fmt: skip
        refused(said, lora_init.verify, home / "ranks", model, engine.tokenizer, asked, told("served"), n=n)
    for wrong, said in (
        ("http://x", "served= is 'http://x', expected a function"),
        (lambda *, given: {}, r"served= takes \(\*, given\), and is called with \(prompt\)"),
        (lambda prompt: [1.0], "return list, expected token: log-probability"),
    ):
        refused(said, lora_init.verify, home / "ranks", model, engine.tokenizer, prompts, wrong)
    said = r"base= takes \(\*, given\), and is called with \(prompt\)"
    given = home / "ranks", model, engine.tokenizer, prompts, told("served")
    refused(said, lora_init.verify, *given, lambda *, given: {})
    with pytest.raises(LoraInitError, match=r"verify\(\) takes a model in this place"):
        lora_init.verify(home / "ranks", "base", engine.tokenizer, prompts, told("served"))


def test_what_is_wrong_with_the_server_is_one_line(home):
    def error(*options):
        done = run("verify", home / "plain", *options)
        assert_one_line_error(done)
        return done.stderr

    assert "127.0.0.1:9/v1 does not answer" in error("--url", "http://127.0.0.1:9/v1")
    assert "is no address of a server" in error("--url", "127.0.0.1")
    engine = served(home, home / "plain")
    with engine.running() as url:
        assert "has no model 'mine'. Name one by --model: the-base, served." in error("--url", url, "--model", "mine")
        engine.paths = ["completions"]
        engine.answer = lambda *_: (200, {"choices": [{"text": "w1", "logprobs": None}]})
        assert "gives no log-probabilities" in error("--url", url)
        engine.answer = lambda *_: (500, {"error": {"message": "it broke"}})
        assert "answers 500: it broke." in error("--url", url)
        engine.answer = lambda *_: (200, [])
        assert "another form than the OpenAI API's" in error("--url", url)
        engine.raw = b"<html>"
        assert "answers with no JSON" in error("--url", url)
        engine.status, engine.raw = 404, b"Not Found"
        missing = "v1/models is not there. Name the adapter by --model. An OpenAI-compatible API often ends in /v1."
        assert missing in error("--url", url)
        engine.status, engine.headers = 307, {"Location": "http://127.0.0.1:9/other/v1"}
        assert "answers 307: it is at http://127.0.0.1:9/other/v1. Give that by --url." in error("--url", url)
        engine.status, engine.raw, engine.headers = 200, b" " * (2**24 + 1), {}
        assert "answers with more than 16 MB" in error("--url", url)


def test_a_busy_server_is_asked_again_as_often_and_as_late_as_it_says(home, monkeypatch):
    engine, waits = served(home, home / "plain"), []
    monkeypatch.setattr(server.time, "sleep", waits.append)
    engine.busy, engine.headers = 2, {"Retry-After": "7"}
    assert ask(home, "plain", engine).exit_code == 0 and waits == [7, 7]
    engine.busy, engine.headers = 3, {"Retry-After": "86400"}
    assert ask(home, "plain", engine).exit_code == 0 and waits == [7, 7, 30, 30, 30]
    engine.status, engine.raw, engine.headers = 503, b"<html>Service Unavailable</html>", {}
    waits.clear()
    assert_one_line_error(ask(home, "plain", engine), "answers 503: <html>Service Unavailable</html>")
    assert waits == [1, 3, 10, 30]


def test_the_key_is_sent_and_never_shown(home, monkeypatch):
    engine = served(home, home / "plain")
    engine.key = "secret-key"
    assert ask(home, "plain", engine, "--api-key", "secret-key").exit_code == 0
    monkeypatch.setenv("LORA_INIT_API_KEY", "wrong-key")
    done = ask(home, "plain", engine)
    assert_one_line_error(done, "refuses the key (401). Give another one by --api-key.")
    assert "wrong-key" not in done.output
    engine.key, engine.answer = None, lambda *_: (500, {"error": "wrong-key is what you sent"})
    done = ask(home, "plain", engine)
    assert_one_line_error(done, "answers 500", "... is what you sent")
    help_text = run("verify", "--help").output
    assert "LORA_INIT_API_KEY" in help_text and "wrong-key" not in help_text


NAMES = [f"layers.{block}.{kind}" for block in range(2) for kind in ("self_attn.q_proj", "mlp.up_proj")]
EXPERTS = NAMES[1::2]  # by the name that a fault has


class Sum:
    """A model whose answers are a sum of what each layer adds, and what is asked of it."""

    def __init__(self, effect=0.3):
        generator = torch.Generator().manual_seed(0)
        self.plain, parts = (torch.randn(*shape, 8, 30, generator=generator).double() for shape in ((), (4,)))
        self.plain *= 3
        self.parts = dict(zip(NAMES, parts * effect / rms(parts.sum(0)), strict=True))
        self.sign, self.effect, self.asked = torch.randn(8, 30, generator=generator).double().sign(), effect, []
        self.faults = [
            Fault("ignored", "what answers is the base", dict.fromkeys(NAMES, 0.0)),
            Fault("scaled", "by 2, alpha doubled", dict.fromkeys(NAMES, 2.0)),
            Fault("a part is missing", "experts", dict.fromkeys(NAMES, 1.0) | dict.fromkeys(EXPERTS, 0.0)),
        ]

    def by(self, **factors):
        """What is served with a factor on what the layers of a module add."""
        return self.plain + sum(factors.get(name.split(".")[2], 1.0) * part for name, part in self.parts.items())

    def run(self, fault):
        self.asked.append(fault.reason)
        return self.plain + sum(fault.factors.get(name, 1.0) * part for name, part in self.parts.items())

    def judge(self, observed, noise=0.01, routed=False):
        """Return the verdict, without the numbers behind it; of the base an engine tells some tokens alone."""
        at_base = (self.plain + (noise or 0) * self.sign).where(torch.arange(30) < 20 * (noise is not None), torch.nan)
        args = self.plain, self.by(), self.effect, self.faults, self.run, routed
        found = diagnose(observed, at_base, *args)
        text, _, numbers = found.text.rpartition(" (")
        n, known = (
            observed.isfinite(),
            "noise not known: the base was not asked" if noise is None else f"noise {noise:.2g}",
        )
        assert numbers == (
            f"{int(n.any(1).sum())} prompts, {int(n.sum())} values; effect of the adapter {self.effect:.2g}, {known})"
        )
        assert text.startswith(f"{found.verdict}: ") and (found.prompts, found.values) == (n.any(1).sum(), n.sum())
        assert found.noise == (noise and pytest.approx(noise)) and found.effect == self.effect
        assert found.residual == (pytest.approx(rms((observed - self.by())[n])) if n.any() else None)
        return text


def rms(values):
    return float(values.square().mean().sqrt())


COMPRESSED = "another adapter: this one compressed, or with layers changed or in other places"


@pytest.mark.parametrize(("off", "noise", "text", "asks"), [
    (0.0, 0.0, "served as trained: {} off", False),
    (0.0151, 0.01, "served as trained: {} off", False),  # half of what is allowed: 3 noises, and 0.001 of the effect
    (0.0152, 0.01, "served as trained: {} off", True),
    (0.0302, 0.01, "served as trained: {} off", True),
    (0.0304, 0.01, f"{COMPRESSED}; 99% fits, {{}} off", True),
    (0.0599, None, "served as trained: {} off", False),  # a fifth of the effect
    (0.0601, None, f"{COMPRESSED}, or another base or template; 96% fits, {{}} off", True),
])  # fmt: skip
def test_what_is_allowed_goes_by_the_noise_and_the_effect(off, noise, text, asks):
    model = Sum()
    assert model.judge(model.by() + off * model.sign, noise) == text.format(f"{off:.2g}")
    assert bool(model.asked) == asks


@pytest.mark.parametrize("times", [2.05, 2.5, 3.5])
@pytest.mark.parametrize("size", [0.75, 1.0])
def test_near_the_noise_another_adapter_is_neither_this_one_nor_none(times, size):
    model = Sum(effect=times * 0.01)
    other = (model.by() - model.plain).roll(1, -1)  # of the same layers, and of no token the same
    found = model.judge(model.plain + size * other + 0.01 * model.sign)
    assert found.startswith("another adapter: that of another task, say; 0% fits")
    assert model.judge(model.plain + 0.012 * model.sign).startswith("ignored: what answers is the base")
    assert model.judge(model.by() + 0.012 * model.sign).startswith("served as trained: 0.012 off")


def test_a_part_that_adds_nothing_is_as_trained():
    model = Sum()
    for name in EXPERTS:
        model.parts[name] = torch.zeros_like(model.parts[name])
    model.effect = rms(model.by() - model.plain)
    other = (model.by() - model.plain).roll(1, -1)
    assert " alone" not in model.judge(model.by() + 0.2 * other)
    assert "; self_attn alone not as trained;" in model.judge(model.by(self_attn=1.13) + 0.15 * other)


def test_a_factor_on_the_whole_is_not_taken_for_one_part():
    model = Sum()
    mlp = model.by(self_attn=0.0) - model.plain
    # With the attention on, a quarter of what the MLPs add is lost: parts alone do not add up to the whole.
    model.by = lambda **by: Sum.by(model, **by) - 0.25 * by.get("self_attn", 1.0) * by.get("mlp", 1.0) * mlp
    for weight in (0.9, 1.1):
        assert " alone" not in model.judge(model.by(self_attn=weight, mlp=weight))


@pytest.mark.parametrize(("factors", "noise", "text"), [
    (dict(self_attn=0.0, mlp=0.0), 0.01, "ignored: what answers is the base"),
    (dict(self_attn=2.0, mlp=2.0), 0.01, "scaled: by 2, alpha doubled"),
    (dict(self_attn=2.0, mlp=2.0), None, "scaled: by 2, alpha doubled"),
    (dict(mlp=0.0), 0.01, "a part is missing: experts"),
    (dict(mlp=-1.0), 0.01, ""),
    (dict(self_attn=1.6), 0.01, "self_attn"),
])  # fmt: skip
def test_the_closest_fault_is_named_with_its_distance(factors, noise, text):
    model = Sum()
    served = model.by(**factors)
    observed = served + 0.01 * model.sign
    found, off = model.judge(observed, noise), rms(observed - model.by())
    if ": " in text:
        near = "0" if text.startswith("ignored") else "0.01"  # the base as the engine computes it
        assert found == f"{text}; {near} off from it, {off:.2g} off from the adapter as trained"
    else:
        fits = max(0.0, 1 - (off / rms(observed - model.plain)) ** 2)
        part = f"; {text} alone not as trained" if text else ""
        what = COMPRESSED if fits > 0.5 else "another adapter: that of another task, say"
        assert found == f"{what}{part}; {fits:.0%} fits, {off:.2g} off"


@pytest.mark.parametrize(("factor", "what"), [(0.3, ""), (1.5, ""), (7.0, ""), (3.0, "experts "), (0.4, "experts ")])
def test_a_factor_that_no_fault_has_is_searched(factor, what):
    model = Sum()
    parts = {name: part for name, part in model.parts.items() if not what or name in EXPERTS}
    observed = model.by(**{module: factor for module in ("self_attn", "mlp") if not what or module == "mlp"})
    observed = observed + 0.01 * model.sign
    rest, found = observed - model.by() + sum(parts.values()), model.judge(observed)
    best = float((rest * sum(parts.values())).sum() / sum(parts.values()).square().sum())  # by least squares
    said = re.fullmatch(rf"scaled: {what}by ([\d.]+); (\S+) off from it, (\S+) off from the adapter as trained", found)
    assert float(said[1]) == pytest.approx(best, rel=0.005)
    assert float(said[2]) == pytest.approx(
        rms(rest - best * sum(parts.values())), abs=0.003
    )  # 2 ** power is not quite it
    assert said[3] == f"{rms(observed - model.by()):.2g}"


def test_without_the_noise_a_tenth_of_what_is_served_may_be_left_by_a_fault():
    model = Sum()
    for off, said in ((0.059, "scaled: by 2, alpha doubled; 0.059 off"), (0.061, "another adapter: ")):
        assert model.judge(model.by(self_attn=2.0, mlp=2.0) + off * model.sign, None).startswith(said)


def test_as_much_as_tells_nothing_is_not_judged():
    model, other = Sum(), Sum(effect=0.0)
    assert other.judge(other.by()) == "cannot tell: the adapter changes nothing in PEFT either; is B zero?"
    observed = model.by().where(torch.arange(8)[:, None] < 1, torch.nan)
    assert model.judge(observed) == "cannot tell: hardly an answer has tokens that are the tokenizer's"
    observed = model.by().where(torch.arange(8)[:, None] < 2, torch.nan)  # a fourth of the prompts
    assert model.judge(observed) == "served as trained: 0 off"
    assert model.judge(observed * torch.nan) == "cannot tell: hardly an answer has tokens that are the tokenizer's"
    assert model.judge(model.by(), 0.16) == "cannot tell: the effect would have to be 0.32 at least"
    assert model.judge(model.by(), 0.149) == "served as trained: 0 off"
    large = Sum(effect=5.0)
    most = (0.03 * float(large.plain[:, :20].var(1, correction=0).mean())) ** 0.5
    assert large.judge(large.by(), 1.01 * most) == f"another base or template: the served base is {1.01 * most:.2g} off"
    assert large.judge(large.by(), 0.99 * most) == "served as trained: 0 off"


@pytest.mark.parametrize(("n", "noise", "routed", "fits"), [
    (1, 0.01, True, True), (2, 0.01, True, False), (1, 0.01, False, False), (1, None, True, False),
])  # fmt: skip
def test_of_a_router_a_few_prompts_may_be_off(n, noise, routed, fits):
    model = Sum()
    observed = model.by() + 0.02 * model.sign
    observed[:n] += 0.5 * model.sign[:n]
    observed[7] = torch.nan
    said = f"served as trained: 0.02 off, but for {n} of 7 prompts, whose tokens a router may have sent elsewhere"
    assert (model.judge(observed, noise, routed) == said) == fits


def test_prompts_are_asked_by_the_effect_of_the_adapter_and_last_where_a_text_ends():
    effects, special = torch.tensor([0.1, 0.5, 0.3, 0.0, 0.3, 9.0]), torch.tensor([0, 2])
    plain, trained = torch.zeros(6, 4), torch.zeros(6, 4)
    plain[:, 1] = trained[:, 3] = 1.0
    plain[1, 2] = trained[5, 0] = 2.0  # the end is the likeliest of one of the two
    assert _most_telling(effects, plain, trained, special).tolist() == [2, 4, 0, 3, 5, 1]


def test_values_vary_around_the_mean_of_their_prompt():
    values = torch.tensor([[1.0, 3.0, 9.0], [10.0, 14.0, 0.0], [5.0, 0.0, 0.0]])
    returned = torch.tensor([[True, True, False], [True, True, False], [True, False, False]])
    assert _variance_within_prompts(values, returned) == 2.5  # of 1, 1, 4 and 4; with one value nothing varies
    assert math.isnan(_variance_within_prompts(values, returned & returned[2]))


def test_a_token_is_told_by_its_number_or_its_text():
    local = object.__new__(Local)
    local.size, local.tokenizer = 8, tokenizer_of(["a", "b"])
    told = {"a": -1.0, 5: -2.0, "c": -3.0, 7: -7.0, 8: -4.0, -1: -5.0, "</s>": -6.0, 0: -8.0}
    rows = local.observe({"x": told, "y": {}}.get, ["y", "x"])
    nan = torch.nan
    expected = torch.tensor([[nan] * 8, [-8.0, nan, -6.0, nan, -1.0, -2.0, nan, -7.0]])
    torch.testing.assert_close(rows, expected, equal_nan=True)
    assert local.observe(None, ["x"]).isnan().all()


def listed(faults):
    """The factors of each fault by its verdict and reason, in the order of the layers."""
    found = {(fault.verdict, fault.reason): (*fault.factors.values(),) for fault in faults}
    assert len(found) == len(faults)
    return found


def padded_to(room, *factors):
    return ("scaled", f"ranks padded to {room} without their scaling"), tuple(round(one / room, 4) for one in factors)


def test_faults_are_listed_for_each_way_to_read_scalings_and_for_each_part():
    settings = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 4})
    faults = Local(get_peft_model(tiny_llama(num_hidden_layers=1), settings), None).faults()
    layers = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"]
    assert faults[0].verdict == "ignored" and all([*fault.factors] == layers for fault in faults)
    assert all(fault.magnitudes and fault.experts is None for fault in faults)
    patterns = "lora_alpha / r everywhere, patterns not read or ranks padded to 8 without their scaling"
    assert listed(faults) == {
        ("ignored", "what answers is the base"): (0, 0), ("scaled", "by 2, alpha doubled"): (2, 2),
        ("scaled", patterns): (1, 0.5), **dict(padded_to(room, 8, 4) for room in VLLM_RANKS[1:]),
        **{("a part is missing", part): (0, 1) for part in ("q_proj", "self_attn")},
        **{("a part is missing", part): (1, 0) for part in ("up_proj", "mlp")},
    }  # fmt: skip


def test_faults_of_rslora_and_of_dora_are_listed_too():
    settings = LoraConfig(r=16, lora_alpha=8, target_modules=["q_proj"], use_rslora=True, use_dora=True)
    faults = Local(get_peft_model(tiny_llama(num_hidden_layers=1), settings), None).faults()
    unread = "rsLoRA not read or lora_alpha over each layer's own rank or lora_alpha / r everywhere, patterns not read"
    assert listed(faults) == {
        ("ignored", "what answers is the base"): (0,), ("scaled", "by 2, alpha doubled"): (2,),
        ("scaled", f"by 0.25, {unread} or ranks padded to 64 without their scaling"): (0.25,),
        **{
            ("scaled", f"by {16 / room:.3g}, ranks padded to {room} without their scaling"): (round(16 / room, 4),)
            for room in VLLM_RANKS if room > 16 and room != 64
        },
        ("a part is missing", "the magnitudes of DoRA"): (1,),
    }  # fmt: skip
    assert [fault.reason for fault in faults if not fault.magnitudes] == ["the magnitudes of DoRA"]


@needs_experts_by_peft
def test_faults_of_experts_are_put_on_them_alone_and_taken_back():
    settings = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"], target_parameters=BOTH)
    model = get_peft_model(mixtral(), settings)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    local = Local(model, None)
    blocks = [f"model.layers.{i}.mlp.experts" for i in range(2)]
    parts, found = ["q_proj", "self_attn", "experts", "gate_up_proj", "down_proj", *blocks], local.faults()
    assert {*listed(found)} >= {("a part is missing", part) for part in parts} | {
        ("scaled", f"{part} by {factor}") for part in parts for factor in (2, 0.5)
    }
    assert sum(fault.experts is not None for fault in found) == len(misreadings(4, True)) > 20 and local.routed
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scalings = [layer.scaling["default"] for layer in local.layers.values()]
    for fault in found:
        with local._under(fault):
            changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
            factors = [
                layer.scaling["default"] / one for layer, one in zip(local.layers.values(), scalings, strict=True)
            ]
        assert factors == [fault.factors.get(name, 1.0) for name in local.layers]
        assert bool(changed) == (fault.experts is not None) and all(".experts." in name for name in changed)
        if changed and fault.experts[0]:
            assert all(".base_layer.lora_B" in name for name in changed) and len(changed) == 2  # of gate and up alone
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert [layer.scaling["default"] for layer in local.layers.values()] == scalings


def test_answers_are_those_of_each_prompt_alone_whatever_the_batches(monkeypatch):
    tokenizer = word_tokenizer()
    settings = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(tiny_llama(initializer_range=0.2), settings).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            parameter.data.normal_()
    chat = [{"role": "user", "content": "w5 w6"}]
    prompts, texts = ["w1 w2 w3", "w4", chat, "w7 w8"], ["w1 w2 w3", "w4", "user w5 w6 assistant ", "w7 w8"]
    calls = []
    with torch.no_grad():
        expected = [model(torch.tensor([tokenizer(one)["input_ids"]])).logits[0, -1].log_softmax(-1) for one in texts]
        with model.disable_adapter():
            plain = model(torch.tensor([tokenizer(texts[0])["input_ids"]])).logits[0, -1].log_softmax(-1)
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    local = Local(model, tokenizer)
    for most, n in ((1, 4), (11, 2), (12, 2), (1024, 1)):  # the longest has four tokens
        calls.clear()
        monkeypatch.setattr(verify_room, "_TOKENS", most)
        torch.testing.assert_close(local.run(prompts), torch.stack(expected), atol=1e-5, rtol=1e-5)
        assert (len(calls), local.size) == (n, 64)
    torch.testing.assert_close(local.run(prompts[:1], local.faults()[0])[0], plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(local.run(prompts)[0], expected[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("prompts", "said"), [
    ("w1", "^prompts='w1': expected a list of texts or chats.$"),
    ({"w1"}, "^prompts={'w1'}: expected a list of texts or chats.$"),
    (["w1", 3], "^prompts has 3: expected texts, or chats as lists of messages.$"),
])  # fmt: skip
def test_what_is_no_list_of_prompts_is_refused(prompts, said, home):
    refused(said, verify_room.check_prompts, prompts)
    refused(said, lora_init.verify, home / "plain", None, None, prompts, None)  # before anything is looked at
    verify_room.check_prompts(["w1", [{"role": "user", "content": "w1"}]])


@pytest.mark.parametrize(("lost", "served", "said"), [
    (0.25, 1.0, "served as exported, which lost 25.00% of the update: 0 off "),
    (0.25, 0.0, "ignored: what answers is the base; 0 off "),
    *((lost, 1.0, "served as trained: 0 off ") for lost in (0.0, 1, "much", None)),  # a record may be anybody's
])  # fmt: skip
def test_what_an_export_lost_is_said_of_one_that_is_served_as_it_is(lost, served, said, home, monkeypatch):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(home / "base"), word_tokenizer()
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(home / "base"), home / "plain").eval()

    @torch.no_grad()
    def ask(prompt):
        with adapted.disable_adapter() if not served else nullcontext():
            logits = adapted(torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0, -1]
        return dict(enumerate(logits.double().log_softmax(-1).float().mul(1e4).round().div(1e4).tolist()))

    monkeypatch.setattr(verify_room, "note_of", lambda path: (f"a note on {path.name}", "another"))
    monkeypatch.setattr(
        verify_room, "is_as_written", lambda path, name: (path, name) == (home / "plain", "export.json")
    )
    monkeypatch.setattr(verify_room, "read_json", lambda path: {"error": lost})
    found = lora_init.verify(home / "plain", model, tokenizer, ["w1 w2 w3", "w4 w5"], ask, n=1)
    assert re.sub(r": \S+ off|; \S+ off", lambda match: match[0][:2] + "0 off", found.text).startswith(said), found.text
    assert (
        found.text.endswith("; a note on plain; another") and found.verdict == said.partition(":")[0].partition(",")[0]
    )
    assert found.prompts == 1


@pytest.mark.parametrize(("served", "found"), [(1.1, None), (1 / 1.1, None), (1.2, 1.2), (0.5, 0.5), (16.0, 16.0)])
def test_a_factor_of_about_one_is_none(served, found):
    effect = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    fault, distance = verify_room._factor_that_fits(
        effect * served, "", ["q_proj"], lambda fault: effect * fault.factors["q_proj"]
    )
    if found is None:
        assert fault is None
    else:
        assert fault.factors == {"q_proj": pytest.approx(found, rel=0.02)} and distance < 0.03 * found


def test_a_chat_has_the_special_tokens_of_its_template_and_a_text_those_of_the_tokenizer():
    tokenizer = tokenizer_of(["a", "b"], bos_token="<s>")
    begin = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.backend_tokenizer.post_processor = begin
    tokenizer.chat_template = "{{ bos_token }}{% for one in messages %}{{ one['content'] }}{% endfor %}"
    reader = SimpleNamespace(_read={}, tokenizer=tokenizer)
    for prompt in ("a b", [{"role": "user", "content": "a b"}]):
        assert tokenizer.convert_ids_to_tokens(Local._tokens(reader, prompt).tolist()) == ["<s>", "a", "b"]
