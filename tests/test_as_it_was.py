"""A model that is changed for a moment is as it was, whatever raises: each call that is made meanwhile raises once."""

import copy
import logging
import os
import random
import signal
import sys
import tempfile
import warnings
from contextlib import suppress
from functools import cache, partial, wraps
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from peft import EvaConfig, LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, Trainer, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

import lora_init
from lora_init import LoraInitError
from lora_init.adapters.directory import AdapterDirectory
from lora_init.adapters.peft_model import with_adapter
from lora_init.bank.embeddings import embed
from lora_init.building import quantized
from lora_init.collection.losses import sequence_losses, text_loss
from lora_init.comparison.starts import AdapterShape, StartInputs, adapter_files, prepare, preprocess_corda
from lora_init.comparison.variants import Variant
from lora_init.keep.dial import choose_dial, fit_strengths, strengths
from lora_init.layers.targets import find_targets, new_heads
from lora_init.loading.models import open_model
from lora_init.plots.pictures import budget_curves
from lora_init.serving.fit import check_fit
from tests.bank.made import batches as prompts_of_task
from tests.collection.made import labelled
from tests.commands import run
from tests.conftest import batches_for, tiny_llama
from tests.planning.made import llama_like
from tests.serving.engine import word_tokenizer
from tests.trainers.made import add_adapter

PROMPTS = [" ".join(f"w{(5 * i + j * j) % 58}" for j in range(3 + i)) for i in range(4)]
ADAPTER = dict(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], lora_dropout=0.1)


class Stopped(BaseException):
    """What no `except Exception` catches, as Ctrl-C is."""


def copied(make):
    """Make what is asked for once, and give a copy to each caller: it takes a fifth of the time."""
    made = cache(make)

    @wraps(make)
    def give(**settings):
        model = copy.deepcopy(made(**settings))
        torch.manual_seed(0)
        return model

    return give


@copied
def plain():
    torch.manual_seed(0)
    model = tiny_llama(initializer_range=0.2, attention_bias=True).train()
    model.model.layers[0].eval()  # somebody's own choice
    model.model.embed_tokens.weight.requires_grad_(False)
    return model


@copied
def adapted(dora=False, fill=0.1):
    """A model in training: A of one layer is frozen, one module is in evaluation mode."""
    model = get_peft_model(plain(), LoraConfig(**ADAPTER, use_dora=dora, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=fill) if fill else None
        if "lora_A" in name and "q_proj" in name:
            parameter.requires_grad_(False)
    return model


@cache
def files_of(make):
    """Save what is made, once; return its files."""
    with tempfile.TemporaryDirectory() as folder:
        make().save_pretrained(folder)
        return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def written_anew(make, directory):
    directory.mkdir()
    for file, content in files_of(make).items():
        (directory / file).write_bytes(content)
    return directory


def random_adapter():
    return get_peft_model(plain(), LoraConfig(**ADAPTER, task_type="CAUSAL_LM", init_lora_weights=False))


def saved(tmp_path):
    return written_anew(random_adapter, tmp_path / "adapter")


def base(tmp_path):
    return str(written_anew(plain, tmp_path / "base"))


@torch.no_grad()
def answer(model, prompt):
    ids = torch.tensor([word_tokenizer()(prompt)["input_ids"]])
    top = model(ids).logits[0, -1].float().log_softmax(-1).topk(20)
    return dict(zip(top.indices.tolist(), (0.5 * top.values).tolist(), strict=True))


@cache
def served():
    return adapted().eval()


def watching():
    """Ask an engine that serves something else, so that all faults are tried."""
    ask = partial(answer, served())
    return lora_init.ServingWatch(word_tokenizer(), PROMPTS, ask, ask)


def call_back(model):
    callback = lora_init.ServingCallback(watching(), every=1)
    args, state, control = TrainingArguments("unused", report_to=[]), TrainerState(global_step=1), TrainerControl()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        callback.on_step_begin(args, state, control, model=model)
        callback.on_step_end(args, state, control, model=model)


def with_strengths(model):
    with strengths(model, 0.5):
        lora_init.mean_loss(model, labelled("llama")[:1])


def dialed(model):
    choose_dial(model, lora_init.keep.dial.Rule(), labelled("llama")[:9], labelled("llama", seed=1)[:9], None, 0, print)


def trainer_of(model, tmp_path):
    rows = [{"input_ids": row, "labels": row} for batch in batches_for("llama") for row in batch["input_ids"]]
    args = TrainingArguments(tmp_path / "run", max_steps=2, report_to=[], per_device_train_batch_size=4)
    return Trainer(model, args, train_dataset=rows)


def product(model):
    for name, target in find_targets(model, ["q_proj"]).layers.items():
        quantized.read_product(model.get_submodule(name), target, torch.float32, name)


def exact(model, tmp_path):
    model.save_pretrained(tmp_path / "float")
    errors = lora_init.QuantizationErrors(model, find_targets(model, ["q_proj"]).layers, tmp_path / "float")
    with errors.undone():
        lora_init.mean_loss(model, labelled("llama")[:1])


def checkpointed():
    model = plain()
    model.gradient_checkpointing_enable()
    return model


def stepped(model):
    stats = lora_init.collect(model, labelled("llama")[:2], rank=4, gradients=True)
    build = lambda gamma: lora_init.build_adapter(stats, 4, "lora-one", gamma=gamma)  # noqa: E731
    lora_init.find_step_size(model, build, lambda one: lora_init.mean_loss(one, labelled("llama")[:1]))


def eva_of(model):
    config = LoraConfig(**ADAPTER, init_lora_weights="eva", eva_config=EvaConfig())
    lora_init.get_eva_state_dict(model, batches_for("llama"), config)


# What is done to a model, a plain one or one with an adapter, that is no more than looked at.
PLAIN = {
    "verify": lambda model, tmp: lora_init.verify(
        saved(tmp), model, word_tokenizer(), PROMPTS, partial(answer, plain().eval())
    ),
    "collect gradients": lambda model, tmp: lora_init.collect(model, labelled("llama")[:2], rank=4, gradients=True),
    "find_step_size": lambda model, tmp: stepped(model),
    "get_eva_state_dict": lambda model, tmp: eva_of(model),
    "read_product": lambda model, tmp: product(model),
    "undone": exact,
    "replay": lambda model, tmp: lora_init.replay(model, word_tokenizer(), 2, 3),
    "intruders": lambda model, tmp: lora_init.intruder_dimensions(model, saved(tmp)),
    "reduce_intruders": lambda model, tmp: lora_init.export_adapter(
        saved(tmp), tmp / "out", base=base(tmp), reduce_intruders=model
    ),
}  # fmt: skip
ADAPTED = {
    "ServingWatch.note": lambda model, tmp: watching().note(model, 0),
    "ServingWatch.check": lambda model, tmp: watching().check(model, 0),
    "ServingCallback": lambda model, tmp: call_back(model),
    "strengths": lambda model, tmp: with_strengths(model),
    "fit_strengths": lambda model, tmp: fit_strengths(model, *[labelled("llama")[:2]] * 2, 1.0, steps=2),
    "choose_dial": lambda model, tmp: dialed(model),
    "replay of an adapter": lambda model, tmp: lora_init.replay(model, word_tokenizer(), 2, 3),
    "intruders of an adapter": lambda model, tmp: lora_init.intruder_dimensions(model),
    "get_eva_state_dict of an adapter": lambda model, tmp: eva_of(model),
}  # fmt: skip
# What changes a model for good, and leaves it as it was where it fails.
CHANGES = {
    "initialize": lambda model, tmp: lora_init.initialize(model, batches_for("llama"), rank=4),
    "initialize by a step": lambda model, tmp: lora_init.initialize(
        model, labelled("llama"), method="lora-one", rank=4
    ),
    "initialize a trainer": lambda model, tmp: lora_init.initialize(trainer_of(model, tmp), rank=4),
}


def state_of(model):
    """Describe a model: its modules, their attributes and hooks, its weights, what is trained; and what Ctrl-C does."""
    state = {"Ctrl-C": signal.getsignal(signal.SIGINT)}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, dict):
                state[name, key] = {one: plain_or_id(each) for one, each in value.items()}
            else:
                state[name, key] = plain_or_id(value)
    for name, parameter in model.named_parameters():
        values = parameter.detach().clone().view(torch.uint8).sum(dtype=torch.int64).item()
        state[name] = (id(parameter), parameter.requires_grad, parameter.grad is None, values)
    return state


def plain_or_id(value):
    return value if isinstance(value, (bool, int, float, str)) else id(value)


@cache
def may_raise(file):
    return "/lora_init/" in file or file.endswith("modeling_llama.py") or file == __file__


class Raising:
    """Note which functions of the library, of the model, or of an engine a block calls; one of them raises."""

    def __init__(self, at=None):
        self.at, self.calls = at, {}

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.trace)

    def __exit__(self, *error):
        sys.settrace(self.before)

    def trace(self, frame, event, argument):
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        if not may_raise(file):  # most calls, of which there are millions
            return
        ours = "/lora_init/" in file and not function.startswith("<")
        if not (ours or file.endswith("modeling_llama.py") or function == "answer"):
            return
        if function in PUTS_BACK:
            return
        self.calls[file, function, frame.f_code.co_firstlineno] = None
        if self.at in self.calls:
            sys.settrace(None)
            raise Stopped


MOST = 10  # functions that raise in each case: all of them take ten minutes
# Functions that put things back, or are called while that is done.
PUTS_BACK = {"restore", "__exit__", "stop", "forget_loader", "end"}


def fill(model, tmp_path):
    lora_init.initialize(model, batches_for("llama"))


def rated(model, tmp_path):
    lora_init.learning_rate(model, batches_for("llama"))


ALL = {
    **{name: (plain, act, True) for name, act in PLAIN.items()},
    **{name: (adapted, act, True) for name, act in ADAPTED.items()},
    "collect gradients, checkpointed": (checkpointed, PLAIN["collect gradients"], True),
    "ServingWatch.check, DoRA": (partial(adapted, dora=True), ADAPTED["ServingWatch.check"], True),
    "learning_rate": (partial(adapted, fill=0.0), rated, True),
    "learning_rate, DoRA": (partial(adapted, dora=True, fill=0.0), rated, True),
    **{name: (plain, act, False) for name, act in CHANGES.items()},
    "initialize an adapter that is there": (lambda: add_adapter(plain()), fill, False),
    "initialize a trainer's adapter": (partial(adapted, fill=0.0), CHANGES["initialize a trainer"], False),
}


@pytest.mark.parametrize("case", ALL)
@pytest.mark.filterwarnings("ignore")
def test_a_model_is_as_it_was_whatever_raises(tmp_path, case):
    make, act, looks = ALL[case]
    saved(tmp_path), base(tmp_path), served()  # made once, and before calls are noted
    model, noting = make(), Raising()
    before = state_of(model)
    (tmp_path / "noted").mkdir()
    with noting:
        act(model, tmp_path / "noted")
    if looks:
        assert difference(state_of(model), before) == {}
    calls = [*noting.calls]
    assert len(calls) > 2
    for i, at in enumerate(calls[:: -(-len(calls) // MOST)]):
        model = make()
        before = state_of(model)
        (tmp_path / str(i)).mkdir()
        with suppress(Stopped, LoraInitError), Raising(at):
            act(model, tmp_path / str(i))
            continue  # what is remembered is not called again
        assert difference(state_of(model), before) == {}, at


def corda(model):
    preprocess_corda(model, LoraConfig(**ADAPTER, init_lora_weights="corda"), ["lm_head"], batches_for("llama")[:1])


def one_strength(model):
    lora_init.dial(model, labelled("llama"), labelled("llama", seed=1), strength=0.5)


def distance(model, tmp_path):
    model.save_pretrained(tmp_path / "float")
    errors = lora_init.QuantizationErrors(model, find_targets(model, ["q_proj"]).layers, tmp_path / "float")
    batches = [{key: value for key, value in batches_for("llama")[0].items() if key != "labels"}]
    quantized.loss_or_distance(model, errors, batches)(model)


# What runs a model to look at it, and what asks for gradients of what it computes.
LEARNS = ("collect gradients", "collect gradients, checkpointed", "fit_strengths", "initialize by a step")
RUNS = {
    **{name: case[:2] for name, case in ALL.items() if name not in ("read_product", "choose_dial", "find_step_size")},
    "dial": (adapted, lambda model, tmp: one_strength(model)),
    "distance": (plain, distance),
    "embed": (plain, lambda model, tmp: embed(model, prompts_of_task(0, n=2))),
    "text_loss": (plain, lambda model, tmp: text_loss(model, labelled("llama")[:1])),
    "sequence_losses": (plain, lambda model, tmp: sequence_losses(model, [([3, 4, 5], [3, 4, 5])], 0)),
    "corda": (plain, lambda model, tmp: corda(model)),
}  # fmt: skip


@pytest.mark.parametrize("case", [name for name in RUNS if "intruders" not in name])  # which reads weights alone
@pytest.mark.filterwarnings("ignore")
def test_a_model_is_run_in_evaluation_mode_and_for_gradients_only_where_they_are_asked_for(tmp_path, case):
    """Whatever mode its caller has it in: by dropout numbers would be others, and a graph takes memory."""
    make, act = RUNS[case]
    model, seen = make(), set()
    for module in model.modules():
        if not [*module.children()]:
            module.register_forward_pre_hook(lambda own, _: seen.add((own.training, torch.is_grad_enabled())))
    act(model, tmp_path)
    assert seen and {trains for trains, _ in seen} == {False}
    assert case in LEARNS or {graph for _, graph in seen} == {False}


def written(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    return tmp_path / name


def read(tmp_path, name, text):
    lora_init.load_batches(written(tmp_path, name, text), word_tokenizer())


def subclass():
    """A model of somebody's own, which derives from one of transformers."""
    return type("Mine", (LlamaForCausalLM,), {"__module__": "mine"})(plain().config)


def on(model, path):
    with with_adapter(model, AdapterDirectory(path)):
        pass


def prepared(model, start):
    adapted = prepare(Variant(start), StartInputs(model, AdapterShape(rank=2, lora_alpha=4), 0))
    adapter_files(adapted.peft_model)
    adapted.release()


def made_up(tmp_path):
    stats = llama_like(1)
    return lora_init.allocate_ranks(stats, rank=2), stats


# What is made of a temporary folder, and what is called with it. Whoever calls it may draw numbers, warn and compute in
# modes of their own.
CALLS = {
    "read": (str, lambda tmp, _: read(tmp, "rows.csv", "text,more\nthe cat,1\n")),
    "read what is damaged": (str, lambda tmp, _: read(tmp, "rows.jsonl", '{"text": "a"}\n{broken\n')),
    "read too many fields": (str, lambda tmp, _: read(tmp, "rows.csv", "text\nthe cat,1,2\n")),
    "budgets": (made_up, lambda tmp, made: budget_curves(*made)),
    "load": (lambda tmp: (plain(), saved(tmp)), lambda tmp, made: on(*made)),
    "verify": (lambda tmp: (plain(), saved(tmp), plain().eval()), lambda tmp, made: lora_init.verify(
        made[1], made[0], word_tokenizer(), PROMPTS, partial(answer, made[2])
    )),
    "check": (lambda tmp: (saved(tmp), base(tmp)), lambda tmp, made: check_fit(*made)),
    "start of PEFT": (lambda tmp: plain(), lambda tmp, model: prepared(model, "pissa")),
    "start": (lambda tmp: plain(), lambda tmp, model: prepared(model, "random")),
    "targets": (lambda tmp: subclass(), lambda tmp, model: new_heads(model)),
    "no weights": (base, lambda tmp, path: open_model(path).empty()),
    "evaluate": (lambda tmp: plain(), lambda tmp, model: text_loss(model, labelled("llama")[:1])),
    "a command": (base, lambda tmp, path: run("inspect", path)),
    "a command that fails": (str, lambda tmp, _: run("inspect", tmp / "none")),
}  # fmt: skip
# Here PEFT draws, as it does without us.
DRAW = ("load",)


def state_of_process():
    """Describe what all code of a process shares, and a caller may have set."""
    log = logging.getLogger("datasets")
    return {
        "warnings": ([*warnings.filters], warnings.showwarning),
        "random": (torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "tensors": (torch.get_default_dtype(), torch.get_default_device()),
        "datasets": (log.level, datasets.are_progress_bars_disabled()),
        "process": (dict(os.environ), Path.cwd(), signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)),
    }  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_a_process_is_as_it_was_after_a_call_and_after_one_that_failed(tmp_path, case):
    make, act = CALLS[case]
    for name in ("first", "second"):  # the first one imports what is its own
        (tmp_path / name).mkdir()
        made = make(tmp_path / name)
        with warnings.catch_warnings():
            before = state_of_process()
            with suppress(LoraInitError):
                act(tmp_path / name, made)
            after = state_of_process()
    assert {key for key in before if after[key] != before[key]} <= ({"random"} if case in DRAW else set())


def difference(after, before):
    return {key: (before.get(key), after.get(key)) for key in {*before, *after} if before.get(key) != after.get(key)}
