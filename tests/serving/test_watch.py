"""An engine beside a training loop: it serves the step that is trained, or what it serves otherwise is named."""

import copy
import threading
import warnings
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

import lora_init
from lora_init import LoraInitError, ServingCallback, ServingWatch
from lora_init.adapters.peft_model import adapter_layers
from lora_init.serving.server import Server
from lora_init.serving.verify import Verification
from lora_init.serving.watch import _stale
from tests.conftest import refused, tiny_llama
from tests.serving.engine import Engine, word_tokenizer

PROMPTS = [" ".join(f"w{(5 * i + j * j) % 58}" for j in range(3 + i)) for i in range(8)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def policy():
    torch.manual_seed(0)
    base = tiny_llama(initializer_range=0.2, num_hidden_layers=4)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj"], lora_dropout=0.1)
    return get_peft_model(base, config).train()


class InProcess:
    """An engine that holds a copy of the policy, and what goes wrong with it."""

    def __init__(self, model, dtype):
        self.copy, self.cache = copy.deepcopy(model).to(dtype).eval(), {}
        self.tokenizer = word_tokenizer()

    def synchronize(self, model):
        self.copy.load_state_dict(model.state_dict())

    @torch.no_grad()
    def ask(self, prompt):
        if prompt in self.cache:
            return self.cache[prompt]
        ids = torch.tensor([self.tokenizer(prompt)["input_ids"]])
        top = self.copy(ids).logits[0, -1].float().log_softmax(-1).topk(20)
        return dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))

    def base(self, prompt):
        with self.copy.disable_adapter():
            kept, self.cache = self.cache, {}
            found, self.cache = self.ask(prompt), kept
            return found

    def remember(self, prompts):
        self.cache = {prompt: self.ask(prompt) for prompt in prompts}

    def scale(self, factor, blocks=range(4)):
        for name, layer in self.copy.named_modules():
            if hasattr(layer, "lora_A") and any(f"layers.{block}." in name for block in blocks):
                layer.scaling["default"] *= factor


def train(model, steps, each=lambda step: None):
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-3)
    for step in range(steps):
        each(step)
        ids = torch.randint(6, 64, (4, 12), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


LAST = 30


@pytest.fixture(scope="module")
def states():
    """What a policy was before each step of a training, and after the last; no engine has a part in it."""
    model, found = policy(), []
    train(model, LAST + 1, lambda step: found.append(copy.deepcopy(model.state_dict())))
    return [*found, model.state_dict()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.slow
def test_twenty_synchronizations_raise_no_alarm(dtype, states):
    model = policy()
    engine, said = InProcess(model, DTYPES[dtype]), []
    watch = ServingWatch(word_tokenizer(), PROMPTS, engine.ask, engine.base)
    for step in range(21):
        model.load_state_dict(states[step])
        engine.synchronize(model)
        said.append(watch.check(model, step))
    assert said[0].verdict == "cannot tell" and "changes nothing" in said[0].text  # B is zero
    wrong = [one.text for one in said if one.verdict not in ("served as trained", "cannot tell")]
    assert not wrong and sum(one.verdict == "served as trained" for one in said) >= 17
    assert model.training and all(layer.training for layer in model.modules())


FAULTS = {
    "base": (lambda engine: engine.scale(0.0), "ignored"),
    "stale by 1": (1, "stale"),
    "stale by 10": (10, "stale"),
    "alpha doubled": (lambda engine: engine.scale(2.0), "scaled: by "),
    "half of the layers": (lambda engine: engine.scale(0.0, blocks=(2, 3)), "another adapter"),
    "a cache of the policy before": ("all", "stale: it is answered as by step 20"),
    "a cache of some prompts": ("some", "stale: 3 of 8 prompts are answered as by step 20"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.slow
def test_a_fault_is_named(fault, states):
    model, (plant, verdict) = policy(), FAULTS[fault]
    engine, last = InProcess(model, torch.bfloat16), LAST
    watch = ServingWatch(word_tokenizer(), PROMPTS, engine.ask, engine.base)
    for step in range(last - 12, last + 1):
        model.load_state_dict(states[step])
        watch.note(model, step)
        if not (isinstance(plant, int) and step > last - plant):
            engine.synchronize(model)
        if step == last - 10 and isinstance(plant, str):
            engine.remember(PROMPTS[3:6] if plant == "some" else PROMPTS)
    model.load_state_dict(states[last + 1])
    # Asked about is the step whose weights were sent last; the model is one step ahead of it, as when a step ends.
    if callable(plant):
        plant(engine)
    found = watch.check(model, last)
    assert found.text.startswith(verdict), found.text
    if isinstance(plant, int):
        assert f"it is answered as by step {last - plant}, and step {last} was expected" in found.text


@pytest.mark.slow
def test_without_the_engines_noise_missing_layers_are_not_called_stale():
    torch.manual_seed(0)
    model = policy()
    engine = InProcess(model, torch.float32)
    watch = ServingWatch(word_tokenizer(), PROMPTS, engine.ask)

    def each(step):
        if step >= 18:
            watch.note(model, step)
        if step == 20:
            engine.synchronize(model)

    train(model, 31, each)
    assert watch.check(model, 30).text.startswith("stale: it is answered as by step 20")
    engine.synchronize(model)
    watch.note(model, 31)
    engine.scale(0.0, blocks=(1, 3))
    found = watch.check(model, 31)
    assert found.verdict not in ("stale", "served as trained"), found.text
    assert "fits as well, and base= would tell them apart" in found.text


def trainer_of(model, folder, callback, kind=Trainer, **changes):
    rows = [{"input_ids": torch.arange(6, 18) + i, "labels": torch.arange(6, 18) + i} for i in range(40)]
    arguments = TrainingArguments(
        folder, max_steps=12, learning_rate=1e-2, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        disable_tqdm=True, **changes,
    )  # fmt: skip
    return kind(model, arguments, train_dataset=rows, callbacks=[callback])


def test_a_trainer_asks_every_few_steps_warns_and_stops(tmp_path):
    model, engine = policy(), InProcess(policy(), torch.float32)
    callback = ServingCallback(ServingWatch(word_tokenizer(), PROMPTS, engine.ask, engine.base), every=2, stop=True)

    class Synchronizing(Trainer):
        def training_step(self, model, *args, **kwargs):
            if self.state.global_step < 5:  # then it forgets to
                engine.synchronize(model)
            return super().training_step(model, *args, **kwargs)

    trainer = trainer_of(model, tmp_path, callback, Synchronizing)
    with pytest.warns(UserWarning, match="step 5: the engine does not serve what is trained: stale: it is .* step 4"):
        trainer.train()
    assert trainer.state.global_step == 6
    assert {step: one.verdict for step, one in callback.found.items()} == {
        1: "served as trained", 3: "served as trained", 5: "stale",
    }  # fmt: skip


def raising(error):
    def ask(prompt):
        raise error

    return ask


DOWN = {  # how an engine fails, and what is warned of
    "500": "answers 500: it broke",
    "refused": "does not answer: .* Is the server running",
    "hangs": "gives no answer in time",
    "a function": "unexpected RuntimeError: the engine is dead",
}


@pytest.mark.parametrize(("fault", "stop"), zip(DOWN, (False, True, True, False), strict=True))
def test_an_engine_that_is_down_is_warned_of_once_and_no_training_is_lost(fault, stop, tmp_path):
    engine, ended = Engine(word_tokenizer()), threading.Event()
    engine.answer = lambda *_: (500, {"error": "it broke"})
    if fault == "hangs":
        engine.answer = lambda *_: (200, {} if ended.wait() else None)
    with ExitStack() as stack:
        url = stack.enter_context(engine.running())
        stack.callback(ended.set)
        if fault == "refused":
            stack.pop_all().close()
        ask = raising(RuntimeError("the engine is dead"))
        if fault != "a function":
            ask = partial(Server(url, timeout=0.2).ask, "policy")
        callback = ServingCallback(ServingWatch(word_tokenizer(), PROMPTS, ask), every=2, stop=stop)
        trainer = trainer_of(policy(), tmp_path, callback, save_strategy="steps", save_steps=1000)
        with pytest.warns(UserWarning, match=f"step 1: .* could not be checked: .*{DOWN[fault]}") as said:
            trainer.train()
    assert len([one for one in said if "could not be checked" in str(one.message)]) == 1
    assert trainer.state.global_step == (2 if stop else 12) and not callback.found
    assert (tmp_path / f"checkpoint-{trainer.state.global_step}" / "adapter_model.safetensors").is_file()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_grpo_is_warned_when_its_engine_was_not_synchronized(tmp_path):
    trl = pytest.importorskip("trl")
    model, tokenizer = policy(), word_tokenizer()
    engine = InProcess(model, torch.float32)
    callback = ServingCallback(ServingWatch(tokenizer, PROMPTS, engine.ask, engine.base), every=1)

    def reward(completions, **rest):  # after the answers of a step, before its update
        if trainer.state.global_step < 3:
            engine.synchronize(model)
        return [float(len(set(text.split()))) for text in completions]

    arguments = trl.GRPOConfig(
        str(tmp_path), max_steps=4, learning_rate=1e-2, per_device_train_batch_size=4, num_generations=2,
        max_completion_length=5, report_to="none", save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True,
    )  # fmt: skip
    rows = Dataset.from_dict({"prompt": PROMPTS})
    trainer = trl.GRPOTrainer(model, reward, arguments, rows, processing_class=tokenizer, callbacks=[callback])
    with pytest.warns(UserWarning, match="step 3: the engine does not serve what is trained: stale: .* step 2, and"):
        trainer.train()
    verdicts = [one.verdict for one in callback.found.values()]
    assert verdicts == ["cannot tell", "served as trained", "served as trained", "stale"]


def test_a_server_is_asked_by_its_url(tmp_path):
    model, engine = policy(), Engine(word_tokenizer())
    train(model, 3)
    model.save_pretrained(tmp_path / "now")
    base = copy.deepcopy(model).unload()
    base.save_pretrained(tmp_path / "base")
    engine.add("the-base", tmp_path / "base")
    engine.add("policy", tmp_path / "base", tmp_path / "now", parent="the-base")
    with engine.running() as url:
        watch = ServingWatch(word_tokenizer(), PROMPTS, url, name="policy")
        assert watch.check(model, 3).verdict == "served as trained"
        watch = ServingWatch(word_tokenizer(), PROMPTS, url, keep=1)  # the one with a base beside it
        train(model, 1)
        watch.note(model, 4)
        assert watch.check(model, 4).verdict != "served as trained"


def test_wrong_use_is_one_line():
    refused("and got none", ServingWatch, word_tokenizer(), [], lambda prompt: {})
    refused("every=0", ServingCallback, ServingWatch(word_tokenizer(), PROMPTS, lambda prompt: {}), every=0)
    with warnings.catch_warnings(), pytest.raises(LoraInitError, match="this LlamaForCausalLM has none"):
        ServingWatch(word_tokenizer(), PROMPTS, lambda prompt: {}).note(tiny_llama(), 0)


@pytest.mark.parametrize(("way", "line"), [
    ("merged", "the adapter is merged into the base and cannot be left out. Call unmerge_adapter"),
    ("off", "the adapter is switched off here, so there is nothing to compare"),
])  # fmt: skip
def test_an_adapter_that_is_merged_or_switched_off_is_refused_and_stays_as_it_is(way, line):
    model = policy().eval()
    for layer in adapter_layers(model).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    ids = torch.arange(6, 18)[None]
    with torch.no_grad():
        before = model(ids).logits
        with model.disable_adapter():
            base = model(ids).logits
        watch = ServingWatch(word_tokenizer(), PROMPTS, InProcess(model, torch.float32).ask)
        if way == "merged":
            model.merge_adapter()
        else:
            model.base_model.disable_adapter_layers()
        refused(line, watch.check, model, 0)
        if way == "merged":
            refused(line, lora_init.replay, model, word_tokenizer(), 2, 3)
            assert torch.allclose(model(ids).logits, before, atol=1e-5)
            model.unmerge_adapter()
        else:
            assert torch.equal(model(ids).logits, base)
            model.base_model.enable_adapter_layers()
        assert torch.allclose(model(ids).logits, before, atol=1e-5)


def test_of_several_adapters_the_active_one_is_watched_on_the_layers_that_it_has():
    model = policy()
    for layer in adapter_layers(model).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    model.add_adapter("two", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.set_adapter("two")
    engine = InProcess(model, torch.float32)
    found = ServingWatch(word_tokenizer(), PROMPTS, engine.ask, engine.base).check(model, 0)
    assert found.verdict == "served as trained", found.text


def test_each_kind_of_error_is_warned_of_once(tmp_path):
    errors = [ValueError("one: 1"), ValueError("one: 2"), OSError("two: 1"), ValueError("one: 3"), OSError("two: 2")]
    callback = ServingCallback(ServingWatch(word_tokenizer(), PROMPTS, lambda prompt: {}), every=1)
    callback.watch.check = lambda model, step: raising(errors[step])(None)
    with pytest.warns(UserWarning) as said:
        for step in range(len(errors)):
            state = TrainerState(global_step=step + 1, is_world_process_zero=True)
            callback.on_step_end(None, state, TrainerControl())
    warned = [str(one.message).partition(": ")[0] for one in said]
    assert warned == ["step 0", "step 2"]


ASIDE = torch.tensor([[1.0, -1.0] * 3] * 2)  # of 12 values; off any way whose values come in pairs
WAY = torch.tensor([[1.0, 1.0, 2.0, 2.0, 0.0, 0.0], [2.0, 2.0, 0.0, 0.0, 1.0, 1.0]])  # 20 is its squared length
AT_NOW = torch.ones(2, 6)


def stale(off, ways, noise=0.001):
    return _stale(AT_NOW + off, AT_NOW, {step: AT_NOW + way for step, way in ways.items()}, noise)


@pytest.mark.parametrize(("along", "aside", "noise", "found"), [
    (1.0, 0.0, 0.001, True),
    (0.76, 0.0, 0.001, True),
    (0.74, 0.0, 0.001, None),  # three quarters of the way
    (1.29, 0.0, 0.001, True),
    (1.31, 0.0, 0.001, None),  # three tenths beyond
    (1.0, 1.79, 0.001, True),  # what is left over, squared, is less than 9 hundredths of the way: 1.8
    (1.0, 1.81, 0.001, None),
    (1.0, 1.81, 0.1, True),  # and four times what is of noise: 4 x 12 x 0.01
    (1.0, 2.27, 0.1, True),
    (1.0, 2.29, 0.1, None),
    (1.0, 0.0, 0.446, True),  # noise, squared, is less than a hundredth: 0.2
    (1.0, 0.0, 0.448, None),
    (1.0, 1.79, None, True),
    (1.0, 1.81, None, False),  # without the noise something else may fit as well
    (1.0, 2.39, None, False),
    (1.0, 2.41, None, None),
    (0.0, 0.0, 0.001, None),
])  # fmt: skip
def test_an_answer_near_that_of_an_earlier_step_is_stale(along, aside, noise, found):
    off = along * WAY + ASIDE * (aside / 12) ** 0.5
    assert stale(off, {7: WAY}, noise) == (None if found is None else (7, 2, found))


def test_the_step_that_explains_most_is_named_whatever_the_order():
    ways = {1: 0.9 * WAY, 2: WAY, 3: 1.1 * WAY, 4: ASIDE}
    for order in ([1, 2, 3, 4], [4, 3, 2, 1]):
        assert stale(WAY, {step: ways[step] for step in order}) == (2, 2, True)
        assert stale(1.2 * WAY, {step: ways[step] for step in order}) == (3, 2, True)
    assert stale(WAY, {}) is None


def test_some_prompts_alone_may_be_answered_as_by_an_earlier_step():
    first = torch.tensor([[1.0], [0.0]])
    assert stale(first * WAY, {5: WAY}) == (5, 1, True)
    assert stale((1 - first) * WAY, {5: WAY, 6: ASIDE}) == (5, 1, True)
    assert stale(-WAY, {5: WAY}) is None
    off = WAY.where(torch.arange(6) < 4, torch.nan)  # values that were not returned count for nothing
    assert stale(off, {5: WAY.where(torch.arange(6) < 4, 50.0)}) == (5, 2, True)


def watching(monkeypatch, keep=2):
    monkeypatch.setattr(ServingWatch, "_local", lambda self, model: model)
    return ServingWatch(word_tokenizer(), PROMPTS, lambda prompt: {}, keep=keep)


def test_the_steps_that_were_noted_last_are_kept(monkeypatch):
    watch, model = watching(monkeypatch), torch.nn.Identity()
    model.run = len
    for step in (1, 2, 1, 3):
        watch.note(model, step)
    assert watch._kept == {1: 8, 3: 8}
    given = [*PROMPTS]
    own = ServingWatch(word_tokenizer(), given, lambda prompt: {})
    given.append("w1")  # answers of two steps are compared, which have to be those to the same prompts
    own.note(model, 4)
    assert own._kept == {4: 8}


@pytest.mark.parametrize(("wrong", "said"), [
    (dict(prompts=[]), "^a watch needs a prompt, and got none"), (dict(keep=0), "^keep=0, expected a whole number"),
    (dict(keep="x"), "^keep='x', expected a whole number"), (dict(served=None), "^served= is None, expected a func"),
    (dict(served={}), "^served= is {}, expected a function"), (dict(base=0), "^base= is 0, expected a function"),
    (dict(served=threading.active_count), r"^served= takes \(\), and is called with \(prompt\)"),
])  # fmt: skip
def test_a_watch_that_could_not_ask_is_refused(wrong, said):
    refused(said, ServingWatch, **dict(tokenizer=word_tokenizer(), prompts=PROMPTS, served=lambda prompt: {}) | wrong)


def test_an_engine_may_number_tokens_as_numpy_does():
    model = policy()
    for layer in adapter_layers(model).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    engine = InProcess(model, torch.float32)

    def ask(prompt):
        return {np.int64(token): value for token, value in engine.ask(prompt).items()}

    assert ServingWatch(word_tokenizer(), PROMPTS, ask, engine.base).check(model, 0).verdict == "served as trained"


@pytest.mark.parametrize(("verdict", "step", "zero", "saving", "said"), [
    ("stale", 4, True, "steps", True), ("stale", 4, True, "no", True), ("stale", 4, False, "steps", False),
    ("stale", 5, True, "steps", False), ("served as trained", 4, True, "steps", False),
    ("cannot tell", 4, True, "steps", True), ("nothing yet", 4, True, "steps", False),
    ("ignored", 6, True, "epoch", True),
])  # fmt: skip
@pytest.mark.parametrize("stop", [False, True])
def test_a_run_is_stopped_with_a_checkpoint_where_one_is_wanted(verdict, step, zero, saving, said, stop, monkeypatch):
    watch, control, noted = watching(monkeypatch), TrainerControl(), []
    effect = float(verdict != "nothing yet")  # without one there is nothing to be served

    def check(model, step):
        return Verification(
            verdict if effect else "cannot tell", f"{verdict} at {model} {step}", effect, 1.0, 1.0, 1, 1
        )

    watch.check = check
    watch.note = lambda *arguments: noted.append(arguments)
    callback = ServingCallback(watch, every=2, stop=stop)
    args, state = SimpleNamespace(save_strategy=saving), TrainerState(global_step=step, is_world_process_zero=zero)
    callback.on_step_begin(args, state, control, "model")
    assert noted == [("model", step)] * zero
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(2):
            callback.on_step_end(args, state, control, "model")
    fault = "the engine does not serve what is trained"
    if verdict == "cannot tell":  # which is no fault of the engine
        fault, stop = "what the engine serves is not known", False
    text = f"step {step - 1}: {fault}: {verdict} at model {step - 1}"
    assert [str(one.message) for one in warned] == [text] * said
    assert [*callback.found] == [step - 1] * (zero and step % 2 == 0)
    assert control.should_training_stop == (said and stop)
    assert control.should_save == (said and stop and saving != "no")


def test_ten_steps_are_between_two_checks_unless_it_is_said(monkeypatch):
    callback = ServingCallback(watching(monkeypatch))
    assert (callback.every, callback.stop, ServingWatch(word_tokenizer(), PROMPTS, {}.get)._keep) == (10, False, 16)
    refused("^watch='x': a ServingWatch is needed", ServingCallback, "x")
    refused("stop='no', expected True or False", ServingCallback, callback.watch, stop="no")


class Policy(torch.nn.Module):
    """What a watch takes of the model in PEFT: it answers with its weights, and without its adapter with none."""

    routed = "routed"

    def __init__(self):
        super().__init__()
        self.now, self.plain, self.asked = torch.arange(16.0).reshape(2, 8), torch.ones(2, 8), []

    def faults(self):
        return ["ignored", "another"]

    def run(self, prompts, fault=None):
        assert not self.training
        self.asked.append(fault)
        return self.now if fault is None else self.plain

    def observe(self, ask, prompts):
        assert self.size == 8 if self.asked[-1:] == [None] else True
        return ask


@pytest.mark.parametrize(("verdict", "stale", "text"), [
    ("ignored", (3, 2, True), "said"),  # an earlier step at which B was zero would fit as well
    ("another adapter", None, "said"),
    ("served as trained", (3, 2, False), "said"),
    ("another adapter", (3, 2, False), "said; step 3 fits as well, and base= would tell them apart"),
    ("another adapter", (3, 2, True), "stale: it is{} (said)"),
    ("served as trained", (3, 1, True), "stale: 1 of 2 prompts are{} (said)"),
])  # fmt: skip
def test_a_step_is_judged_by_the_answers_that_were_noted(verdict, stale, text, monkeypatch):
    text = text.format(" answered as by step 3, and step 5 was expected")
    watch, model, asked = watching(monkeypatch, keep=3), Policy().train(), []
    watch._ask, watch._base = "asked", "asked of the base"
    found = Verification(verdict, "said", 1.0, 0.25, 1.0, 2, 16)
    monkeypatch.setattr("lora_init.serving.watch.diagnose", lambda *arguments: asked.append(arguments) or found)
    monkeypatch.setattr("lora_init.serving.watch._stale", lambda *arguments: asked.append(arguments) or stale)
    for step in (3, 4):
        watch.note(model, step)
        model.now = model.now + 1
    for _ in range(2):
        asked.clear()
        done = watch.check(model, 5)
        assert (done.verdict, done.text) == (text.partition(":")[0] if text.startswith("stale") else verdict, text)
    assert model.training and model.asked == [None, None, None, "ignored"]  # the base is asked once
    observed, at_base, plain, now, effect, faults, _, routed = asked[0]
    assert (observed, at_base, faults, routed) == ("asked", "asked of the base", model.faults(), "routed")
    assert now is watch._kept[5] and plain is model.plain
    assert effect == pytest.approx(float((now - 1).square().mean().sqrt()))
    if verdict != "ignored":
        assert asked[1] == ("asked", now, {3: watch._kept[3], 4: watch._kept[4]}, 0.25)
