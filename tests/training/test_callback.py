"""StartCallback: the adapter of a trainer that another tool makes is started, trained beside texts, and dialed."""

import copy
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from peft import LoKrConfig, LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoTokenizer, Trainer, TrainingArguments, get_cosine_with_min_lr_schedule_with_warmup

import lora_init
from lora_init.errors import LoraInitError, LoraInitWarning
from lora_init.keep.replay import replayed
from lora_init.training import callback as callback_module
from tests.commands import save_model
from tests.conftest import refused, tiny_bert, tiny_llama

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(learning_rate|lora_alpha) is ",
    "ignore:.*say little about the data",
    "ignore:.*measured with the schedule",
)


def rows(n=24, length=10):
    tokens = torch.randint(3, 64, (n, length), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in tokens]


def model(**settings):
    torch.manual_seed(1)
    config = dict(r=4, lora_alpha=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM") | settings
    return get_peft_model(tiny_llama(), LoraConfig(**config))


def trainer(
    tmp_path, adapted, *callbacks, data=None, eval_dataset=None, processing_class=None, kind=TrainingArguments, **more
):
    settings = dict(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, report_to="none", save_strategy="no",
        use_cpu=True, disable_tqdm=True, learning_rate=1e-2,
    )  # fmt: skip
    arguments = kind(**settings | more)
    given = dict(eval_dataset=eval_dataset, processing_class=processing_class, callbacks=[*callbacks])
    return Trainer(adapted, arguments, train_dataset=rows() if data is None else data, **given)


class Watch(lora_init.StartCallback):
    """Note the adapter as it is when the first step begins, and whose parameters the optimizer has."""

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **rest):
        super().on_step_begin(args, state, control, model)
        if not hasattr(self, "begun"):
            self.begun = {name: value.clone() for name, value in adapter_of(model).items()}
            held = {id(one) for group in optimizer.param_groups for one in group["params"]}
            self.held = all(id(one) in held for name, one in model.named_parameters() if ".lora_" in name)


def adapter_of(adapted):
    return {name: one.detach() for name, one in adapted.named_parameters() if ".lora_" in name}


@pytest.mark.parametrize("method", [None, "natural-gradient"])
def test_the_adapter_starts_as_initialize_would_have_it(tmp_path, method, capsys):
    expected = trainer(tmp_path, model())
    lora_init.initialize(expected, method=method or "eva", max_batches=2)
    watch, adapted = Watch(method, samples=8), model()
    before = adapter_of(adapted)
    trainer(tmp_path, adapted, watch).train()
    assert watch.held and [*watch.begun] == [*before]
    for name, value in adapter_of(expected.model).items():
        torch.testing.assert_close(watch.begun[name], value, rtol=1e-5, atol=1e-6)
        assert name.endswith("lora_B.default.weight") or not torch.equal(before[name], watch.begun[name])
    said = capsys.readouterr().err
    assert f"lora_init: {method or 'eva'} start of 4 layers" in said and "from 8 examples of the data at most" in said


@pytest.mark.parametrize(("batch", "read_batches"), [(4, 4), (8, 2)])
def test_as_many_examples_as_were_asked_for_are_learned_from(batch, read_batches, tmp_path):
    """Those of all processes are counted in tests/trainers/test_two_processes.py, by a group of them."""

    class Read:  # a list that the collator itself held would be put back
        sizes: ClassVar = []

    adapted = model()
    made = trainer(tmp_path, adapted)
    made.state.max_steps = 3
    loader = DataLoader(rows(), batch, collate_fn=lambda part: Read.sizes.append(len(part)) or made.data_collator(part))
    start = lora_init.StartCallback(samples=16, tolerance=0.0)
    start.on_train_begin(
        made.args, made.state, made.control, model=adapted, train_dataloader=loader, optimizer=made.create_optimizer()
    )
    assert Read.sizes.count(batch) == read_batches + 2  # the first one is read twice, to see whether it comes again


def test_training_is_otherwise_as_it_would_have_been(tmp_path):
    """The same batches in the same order, and the same steps, as from an adapter that began so."""
    watch, adapted = Watch(samples=8), model(lora_dropout=0.3)
    trainer(tmp_path, adapted, watch).train()
    other = model(lora_dropout=0.3)
    for name, value in adapter_of(other).items():
        value.copy_(watch.begun[name])
    trainer(tmp_path, other).train()
    for name, value in adapter_of(other).items():
        assert torch.equal(value, adapter_of(adapted)[name]), name


def test_a_resumed_run_is_left_alone(tmp_path, capsys):
    first = model()
    trainer(tmp_path, first, lora_init.StartCallback(samples=8), save_strategy="steps", save_steps=2).train()
    watch, again = Watch(samples=8), model()
    trainer(tmp_path, again, watch).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "resumed at step 2, and its adapter is left alone" in capsys.readouterr().err
    for name, value in adapter_of(first).items():
        torch.testing.assert_close(adapter_of(again)[name], value)


def test_the_measured_rate_is_that_of_initialize_and_the_schedule_goes_by_it(tmp_path):
    expected = trainer(tmp_path, model())
    lora_init.initialize(expected, max_batches=2, learning_rate="measured")
    made = trainer(tmp_path, model(), lora_init.StartCallback(samples=8, learning_rate="measured"), logging_steps=1,
                   lr_scheduler_type="linear")  # fmt: skip
    made.train()
    rates = [row["learning_rate"] for row in made.state.log_history if "learning_rate" in row]
    assert made.args.learning_rate == expected.args.learning_rate != 1e-2
    assert rates == pytest.approx([made.args.learning_rate * left / 3 for left in (3, 2, 1)])


def test_the_measured_rate_is_of_a_new_head_if_one_trains_whatever_the_task_is_called(tmp_path):
    """A task type that was forgotten leaves the classifier frozen, and a language model has none."""
    rates = {}
    kinds = {"trained": (tiny_bert, "SEQ_CLS"), "frozen": (tiny_bert, None), "none": (tiny_llama, "SEQ_CLS")}
    for name, (make, task) in kinds.items():
        adapted = get_peft_model(make(), LoraConfig(r=4, task_type=task, target_modules=["query", "q_proj"]))
        data = [{"input_ids": row["input_ids"], "labels": row["labels"] if make is tiny_llama else 1} for row in rows()]
        measured = lora_init.StartCallback(samples=8, learning_rate="measured")
        made = trainer(tmp_path, adapted, measured, data=data)
        batch = {"input_ids": torch.stack([row["input_ids"] for row in data[:8]])}
        assert lora_init.learning_rate(adapted, [batch], steps=3).new_head == (name == "trained")
        made.train()
        rates[name] = made.args.learning_rate
    assert rates["trained"] > 5 * rates["frozen"] and rates["trained"] > 5 * rates["none"]


@pytest.mark.parametrize(("schedule", "more"), [
    ("linear", {}), ("cosine", {"warmup_steps": 2}), ("constant", {}), ("constant_with_warmup", {"warmup_steps": 2}),
    ("cosine_with_min_lr", {"lr_scheduler_kwargs": {"min_lr": 2e-4}}),
    ("cosine_with_min_lr", {"lr_scheduler_kwargs": {"min_lr_rate": 0.1}}),
    ("cosine_warmup_with_min_lr", {"lr_scheduler_kwargs": {"min_lr": 2e-4}, "warmup_steps": 1}),
    ("cosine_warmup_with_min_lr", {"lr_scheduler_kwargs": {"min_lr": 2e-4}}),
    ("polynomial", {}), ("inverse_sqrt", {}),
])  # fmt: skip
def test_a_measured_rate_is_logged_and_trained_as_if_it_had_been_set(schedule, more, tmp_path):
    """Step by step, against a trainer whose rate was this one from the start."""
    logged = []
    for callback in (lora_init.StartCallback(samples=8, learning_rate="measured"), None):
        known = {"learning_rate": logged[0][0]} if logged else {}
        made = trainer(tmp_path, model(), *([callback] if callback else []), logging_steps=1, max_steps=5,
                       lr_scheduler_type=schedule, **more | known)  # fmt: skip
        made.train()
        rates = [row["learning_rate"] for row in made.state.log_history if "learning_rate" in row]
        logged.append((made.args.learning_rate, rates, made.optimizer.param_groups[0]["lr"]))
    assert logged[0][1] == pytest.approx(logged[1][1], rel=1e-6) and logged[0][2] == pytest.approx(logged[1][2])


@pytest.mark.parametrize(("schedule", "more"), [
    ("linear", {}), ("cosine_with_min_lr", {"min_lr": 2e-4}), ("polynomial", {"lr_end": 2e-4}),
])  # fmt: skip
def test_a_resumed_run_goes_on_at_the_measured_rate(schedule, more, tmp_path):
    """A checkpoint holds the rate, and not the lowest one of the schedule, which is made anew for another rate."""
    logged = []
    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        callback = lora_init.StartCallback(samples=8, learning_rate="measured")
        made = trainer(tmp_path, model(), callback, logging_steps=1, max_steps=5, save_strategy="steps", save_steps=2,
                       lr_scheduler_type=schedule, lr_scheduler_kwargs=more)  # fmt: skip
        made.train(resume_from_checkpoint=checkpoint)
        rates = [row["learning_rate"] for row in made.state.log_history if "learning_rate" in row]
        logged.append((made.args.learning_rate, rates))
    assert logged[0][0] == pytest.approx(logged[1][0]) and logged[0][1] == pytest.approx(logged[1][1], rel=1e-6)


def with_own_optimizer(tmp_path, schedule=None, **more):
    adapted = model()
    adam = torch.optim.AdamW([one for one in adapted.parameters() if one.requires_grad], lr=3e-4)
    start = lora_init.StartCallback(samples=8, learning_rate="measured")
    made = trainer(tmp_path, adapted, start, logging_steps=1, lr_scheduler_type="linear", **more)
    made.optimizer, made.lr_scheduler = adam, schedule and schedule(adam)
    return made


def test_a_measured_rate_reaches_an_optimizer_whose_rate_is_not_the_trainers(tmp_path):
    made = with_own_optimizer(tmp_path)
    made.train()
    rates = [row["learning_rate"] for row in made.state.log_history if "learning_rate" in row]
    assert made.args.learning_rate != 1e-2
    assert rates == pytest.approx([made.args.learning_rate * left / 3 for left in (3, 2, 1)])


@pytest.mark.parametrize("schedule", [
    lambda adam: torch.optim.lr_scheduler.ChainedScheduler([torch.optim.lr_scheduler.LambdaLR(adam, lambda _: 1.0)]),
    lambda adam: torch.optim.lr_scheduler.OneCycleLR(adam, 1e-3, 3),
    lambda adam: torch.optim.lr_scheduler.CosineAnnealingLR(adam, 3, eta_min=5e-3),
    lambda adam: torch.optim.lr_scheduler.ReduceLROnPlateau(adam, min_lr=5e-3),
    lambda adam: torch.optim.lr_scheduler.CyclicLR(adam, 1e-4, 1e-3, cycle_momentum=False),
    lambda adam: torch.optim.lr_scheduler.SequentialLR(
        adam, [torch.optim.lr_scheduler.ConstantLR(adam), torch.optim.lr_scheduler.ConstantLR(adam)], [1]
    ),
    lambda adam: get_cosine_with_min_lr_schedule_with_warmup(adam, 0, 3, min_lr=1e-4),
])  # fmt: skip
def test_a_schedule_with_rates_of_its_own_is_refused(schedule, tmp_path):
    made = with_own_optimizer(tmp_path, schedule)
    name = type(made.lr_scheduler).__name__
    refused(f"learning_rate='measured': {name} has rates of its own, which would stay", made.train)


def test_a_schedule_whose_factors_are_from_step_to_step_begins_at_the_measured_rate(tmp_path):
    made = with_own_optimizer(tmp_path, lambda adam: torch.optim.lr_scheduler.MultiplicativeLR(adam, lambda step: 0.5))
    made.train()
    rates = [row["learning_rate"] for row in made.state.log_history if "learning_rate" in row]
    assert rates == pytest.approx([made.args.learning_rate * share for share in (1, 0.5, 0.25)])


class Preferences(TrainingArguments):
    beta = 0.1


@pytest.mark.filterwarnings("error::lora_init.errors.LoraInitWarning")  # such as that SGD has another one
def test_the_callback_says_that_no_rate_was_measured_for_another_loss(tmp_path, capsys):
    trainer(tmp_path, model(), lora_init.StartCallback(samples=8), kind=Preferences, optim="sgd").train()
    assert "is 0.01: none was measured for the loss of a trainer with Preferences." in capsys.readouterr().err


class Named(TrainingArguments):
    loss_type = "dft"  # as SFTConfig names a loss of its own


@pytest.mark.parametrize(("what", "said"), [
    ({"optim": "sgd"}, "for the optimizer SGD"), ({"optim": "adafactor"}, "for the optimizer Adafactor"),
    ({"kind": Preferences}, "for the loss of a trainer with Preferences"),
    ({"label_smoothing_factor": 0.1}, "for the loss of a trainer with TrainingArguments"),
    ({"kind": Named}, "for the loss of a trainer with Named"),
    ({"data": [{"input_ids": row["input_ids"]} for row in rows()]}, "for the loss of a trainer with TrainingArguments"),
])  # fmt: skip
def test_the_callback_sets_no_rate_where_none_was_measured(what, said, tmp_path):
    made = trainer(tmp_path, model(), lora_init.StartCallback(samples=8, learning_rate="measured"), **what)
    refused(f"no rate was measured {said}", made.train)
    assert made.args.learning_rate == 1e-2


def test_the_callback_sets_no_rate_for_a_loss_of_ones_own_in_the_model(tmp_path):
    adapted = model()
    adapted.get_base_model().loss_function = lambda logits, labels, **more: logits.square().mean()
    made = trainer(tmp_path, adapted, lora_init.StartCallback(samples=8, learning_rate="measured"))
    refused("no rate was measured for the loss of a trainer with TrainingArguments", made.train)


def test_the_callback_sets_no_rate_where_the_optimizer_has_several(tmp_path):
    adapted = model()
    made = trainer(tmp_path, adapted, lora_init.StartCallback(samples=8, learning_rate="measured"))
    groups = [
        {"params": [value for name, value in adapted.named_parameters() if part in name], "lr": rate}
        for part, rate in ((".lora_A.", 1e-3), (".lora_B.", 1e-2))
    ]
    made.optimizer = torch.optim.AdamW(groups)
    refused("the optimizer has several rates, as LoRA[+] has", made.train)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(rows())


def trained_embedding():
    adapted = model(target_modules=["q_proj", "embed_tokens"])
    for name, value in adapter_of(adapted).items():
        value.add_(".lora_embedding_A." in name)
    return adapted


def trained():
    adapted = model()
    for name, value in adapter_of(adapted).items():
        value.add_(".lora_B." in name)
    return adapted


def started():
    return lora_init.initialize(tiny_llama(), [{"input_ids": rows()[0]["input_ids"][None]}] * 4, rank=4, rho=1)


EVALUATED = dict(eval_strategy="epoch", eval_dataset=rows())
WRONG = {
    "no adapter": (tiny_llama, {}, {}, "needs a PeftModel with LoRA, and the trainer has a LlamaForCausalLM"),
    "another kind": (
        lambda: get_peft_model(tiny_llama(), LoKrConfig(target_modules=["q_proj"])),
        {},
        {},
        "one LoRA adap",
    ),
    "trained": (trained, {}, {}, "is no fresh one: B is not zero"),
    "started by PEFT": (
        lambda: model(init_lora_weights="olora"),
        {},
        {},
        "was started by init_lora_weights='olora' alr",
    ),
    "started by lora_init": (started, {}, {}, "was started by lora_init already"),
    "a patterned one": (lambda: model(rank_pattern={"q_proj": 2}), {}, {}, "sets rank_pattern, which"),
    "ranks that move": (model, dict(rho=2), {}, "rho=2: the adapter on PeftModelForCausalLM keeps the rank"),
    "another rank": (model, dict(rank=8), {}, "rank=8: the adapter on the model decides that and says 4"),
    "a start that changes the base": (model, dict(method="lora-ga"), {}, "saves the adapter without them"),
    "a head that no task type names": (
        lambda: get_peft_model(tiny_bert(), LoraConfig(r=4, target_modules=["query", "classifier"])),
        {},
        dict(data=[{"input_ids": row["input_ids"], "labels": 1} for row in rows()]),
        "the adapter has a LoRA layer on 'classifier', which begins at random and is not saved with it. Set "
        "task_type='SEQ_CLS'",
    ),
    "replay without a tokenizer": (model, dict(replay=0.125), {}, "replay needs a tokenizer"),
    "replay in fp16": (model, dict(replay=0.125), dict(fp16=True), "which fp16, DeepSpeed and FSDP hold in forms of"),
    "a dial without held-out data": (model, dict(dial=True), {}, "dial needs an eval data set, and eval_strategy"),
    "a dial of DoRA": (lambda: model(use_dora=True), dict(dial=True), EVALUATED, "has use_dora, which has no strength"),
    "a dial beside a module that is trained whole": (
        lambda: model(modules_to_save=["lm_head"]),
        dict(dial=True),
        EVALUATED,
        "lm_head",
    ),
    "gradients of another loss": (
        model,
        dict(method="natural-gradient"),
        dict(label_smoothing_factor=0.1),
        "is not what the model computes from",
    ),
    "a trained embedding": (trained_embedding, {}, {}, "is no fresh one"),
    "no batch": (model, {}, dict(data=rows(3), dataloader_drop_last=True), "there is no batch to learn from: the data"),
    "a stream": (model, {}, dict(data=Stream()), "the data are a stream (Stream), of which training would miss"),
}


def test_deepspeed_which_would_undo_a_start_is_refused(tmp_path):
    """It copies the weights before training begins, and writes its copy over them at each step."""
    made, kind = trainer(tmp_path, model()), type("DeepSpeedOptimizerWrapper", (torch.optim.AdamW,), {})
    kind.__module__ = "accelerate.utils.deepspeed"
    before = copy.deepcopy(made.model.state_dict())
    words = refused(
        "", lora_init.StartCallback(samples=8).on_train_begin, made.args, made.state, made.control, model=made.model,
        train_dataloader=made.get_train_dataloader(), optimizer=kind(made.model.parameters()),
    )  # fmt: skip
    assert "DeepSpeed has its own copy of the weights" in words
    assert all(torch.equal(value, before[name]) for name, value in made.model.state_dict().items())


@pytest.mark.parametrize("how", ["fp16", "deepspeed", "fsdp"])
def test_replay_is_refused_before_a_text_is_written_where_gradients_have_a_form_of_their_own(how):
    args = SimpleNamespace(**dict(fp16=False, deepspeed=None, fsdp=[]) | {how: "set"})
    callback = lora_init.StartCallback(samples=8, replay=0.125)
    begin = dict(model=model(), processing_class="a tokenizer")
    words = "^replay adds to the gradients, which fp16, DeepSpeed and FSDP hold in forms of their own"
    refused(words, callback.on_train_begin, args, SimpleNamespace(global_step=0), None, **begin)


def test_a_dial_among_several_processes_is_refused(tmp_path, monkeypatch):
    callback = lora_init.StartCallback(samples=8, dial=True)
    made = trainer(tmp_path, model(), callback, **EVALUATED)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    words = refused(
        "", callback.on_train_begin, made.args, made.state, made.control, model=made.model,
        train_dataloader=DataLoader(rows(), 4), optimizer=torch.optim.AdamW(made.model.parameters()),
    )  # fmt: skip
    assert words.startswith("dial works in one process. Leave it out, and take the command `lora-init dial` afterwards")


def test_a_dial_without_held_out_data_is_refused_where_a_run_is_resumed_too(tmp_path):
    callback, made = lora_init.StartCallback(samples=8, dial=True), trainer(tmp_path, model())
    made.state.global_step, begin = 2, dict(model=made.model, optimizer=made.create_optimizer(), lr_scheduler=None)
    words = "^dial needs an eval data set, and eval_strategy steps or epoch"
    refused(words, callback.on_train_begin, made.args, made.state, made.control, **begin)


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_started_is_one_line_and_stays_as_it_was(tmp_path, case):
    make, options, more, expected = WRONG[case]
    adapted = make()
    before = copy.deepcopy(adapted.state_dict())
    assert expected in refused("", trainer(tmp_path, adapted, lora_init.StartCallback(**options), **more).train)
    assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())


@pytest.mark.parametrize(("options", "expected"), [
    ({"sample": 8}, "has no argument sample=. Did you mean samples?"),
    ({"method": "evva"}, "Did you mean eva?"),
    ({"learning_rate": 1e-3}, "learning_rate=0.001: 'measured' is expected"),
    ({"samples": 0}, "samples=0, expected a whole number of at least 1"),
    ({"max_batches": 1}, "has no argument max_batches=: the trainer decides that, or samples="),
    ({"data": "mine"}, "has no argument data=: the trainer decides"),
    ({"replay": 8}, "replay=8: a share from 0 to 1 is expected"),
    ({"replay": True}, "replay=True: a share from 0 to 1"),
    ({"replay": 1.5}, "replay=1.5: a share from 0 to 1"),
    ({"replay": -0.1}, "replay=-0.1: a share from 0 to 1"),
    ({"samples": 1.5}, "samples=1.5, expected a whole number of at least 1"),
    ({"dial": "yes"}, "dial='yes': true or false"),
])  # fmt: skip
def test_wrong_options_are_refused_when_the_callback_is_made(options, expected):
    assert expected in refused("", lora_init.StartCallback, **options)


def test_the_least_and_the_most_of_an_option_are_taken():
    assert lora_init.StartCallback(samples=1, replay=1).replay == 1 and not lora_init.StartCallback(replay=0).replay


@pytest.mark.parametrize(("steps", "n"), [(3, 3), (5, 4), (900, 512)])
def test_the_base_writes_a_text_for_each_that_is_replayed_and_512_at_most(steps, n, tmp_path, monkeypatch):
    """In a run that is resumed, too, and by the seed of the training."""
    asked, adapted = [], model()
    monkeypatch.setattr(callback_module, "replayed", lambda *given: asked.append(given) or [1, 2])
    made = trainer(tmp_path, adapted, seed=7)
    made.state.max_steps, made.state.global_step = steps, 1
    callback = lora_init.StartCallback(samples=8, replay=0.1875)  # three quarters of a text in a step of four examples
    begin = dict(optimizer=made.create_optimizer(), lr_scheduler=None, processing_class="a tokenizer")
    callback.on_train_begin(made.args, made.state, made.control, model=adapted, **begin)
    ((given_model, tokenizer, count, seed, batch_size, _),) = asked
    assert (given_model, tokenizer, count, seed, batch_size) == (adapted, "a tokenizer", n, 7, 1)


@pytest.mark.parametrize(("measured", "group", "rate"), [
    ("measured", {"initial_lr": 2e-3}, 2e-3),
    ("measured", {}, 1e-2),  # of a checkpoint without a schedule
    (None, {"initial_lr": 2e-3}, 1e-2),
])  # fmt: skip
def test_a_resumed_run_has_the_rate_of_its_checkpoint_where_it_was_measured(measured, group, rate, tmp_path):
    made = trainer(tmp_path, model())
    made.state.global_step, optimizer = 2, made.create_optimizer()
    optimizer.param_groups[0].update(group)
    schedule = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD([torch.ones(1)], lr=1.0), lambda step: 1.0)
    callback = lora_init.StartCallback(samples=8, learning_rate=measured)
    begin = dict(model=made.model, optimizer=optimizer, lr_scheduler=schedule)
    callback.on_train_begin(made.args, made.state, made.control, **begin)
    assert made.args.learning_rate == rate


@pytest.mark.parametrize("make", [
    lambda adam, share: torch.optim.lr_scheduler.LambdaLR(adam, lambda step: share),
    lambda adam, share: torch.optim.lr_scheduler.ConstantLR(adam, share, 9),
])  # fmt: skip
@pytest.mark.parametrize(("kind", "share"), [(float, 0.5), (torch.tensor, 1.0)])
def test_a_rate_is_set_in_all_places_where_optimizer_and_schedule_keep_it(kind, share, make):
    """As if both had been made with it, also where one tensor stands in two of the places."""

    def made(rate):
        adam = torch.optim.AdamW([torch.ones(1)], lr=kind(rate))
        return adam, make(adam, share)

    (adam, schedule), (expected, other) = made(1e-3), made(3e-3)
    group, like = adam.param_groups[0], expected.param_groups[0]
    if share == 1.0:
        group["initial_lr"] = group["lr"]
    callback_module._set_rate(3e-3, adam, schedule, None)
    for ours, theirs in (
        ([group["lr"], group["initial_lr"]], [like["lr"], like["initial_lr"]]),
        (schedule.base_lrs, other.base_lrs), (schedule.get_last_lr(), other.get_last_lr()),
    ):  # fmt: skip
        assert [*map(float, ours)] == pytest.approx([*map(float, theirs)])


def test_a_measured_rate_goes_on_by_a_schedule_of_torch(tmp_path):
    made = with_own_optimizer(tmp_path, lambda adam: torch.optim.lr_scheduler.StepLR(adam, 1, 0.5))
    made.train()
    rates = [row["learning_rate"] for row in made.state.log_history if "learning_rate" in row]
    assert made.args.learning_rate != 1e-2
    assert rates == pytest.approx([made.args.learning_rate * part for part in (1.0, 0.5, 0.25)])


class Config(dict):
    """As axolotl's `DictDefault`: what is not there is None."""

    __getattr__ = dict.get


def test_the_plugin_of_axolotl_hands_over_the_callback():
    """`benchmarks/other_trainers.py` runs it in axolotl itself."""
    plugin = lora_init.axolotl()
    plugin.pre_model_load(Config(lora_init={"samples": 8}))
    (callback,) = plugin.add_callbacks_post_trainer(Config(), None)
    assert isinstance(callback, lora_init.StartCallback) and callback.samples == 8
    plugin.pre_model_load(Config())  # without a block `lora_init:` it is all defaults
    (callback,) = plugin.add_callbacks_post_trainer(Config(), None)
    assert vars(callback) == vars(lora_init.StartCallback())
    refused("makes the adapter, too", plugin.pre_model_load, Config(lora_model_dir="start"))
    with pytest.raises(LoraInitError, match=r"Set lora_mlp_kernel: false, lora_o_kernel: false\."):
        plugin.pre_model_load(Config(lora_mlp_kernel=True, lora_o_kernel=True))
    for name in ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel"):
        words = rf"^axolotl's fused kernels bypass .* Set {name}: false\.$"
        refused(words, plugin.pre_model_load, Config({name: True}))
    refused(r"Did you mean samples\?", plugin.pre_model_load, Config(lora_init={"sample": 8}))
    assert plugin.get_input_args() == "lora_init.training.axolotl.AxolotlArgs"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(save_model(tiny_llama(), tmp_path_factory.mktemp("model")))


@pytest.mark.filterwarnings("ignore:the learning rate was measured for AdamW")
def test_a_step_goes_by_all_examples_and_by_texts_weighed_a_quarter(tmp_path, tokenizer):
    """A plain step of rate 1 over all of the data, in three parts: what it adds is the gradient."""
    adapted, watch = model(), Watch(samples=8, replay=0.125)
    settings = dict(per_device_train_batch_size=8, gradient_accumulation_steps=3, max_steps=1, max_grad_norm=0.0)
    settings |= dict(optim="sgd", learning_rate=1.0, lr_scheduler_type="constant")
    trainer(tmp_path, adapted, watch, processing_class=tokenizer, **settings).train()
    expected = model()
    (texts,) = replayed(expected, tokenizer, 3, 42, 3)
    for name, value in adapter_of(expected).items():
        value.copy_(watch.begun[name])
    whole = {key: torch.stack([row[key] for row in rows()]) for key in rows()[0]}
    (expected(**whole).loss + 0.25 * expected(**texts).loss).backward()
    trained = adapter_of(adapted)
    for name, parameter in expected.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(trained[name], parameter.detach() - parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_processes_that_share_out_the_texts_of_a_step_have_the_gradient_of_one(share, tmp_path, tokenizer, monkeypatch):
    """Their gradients are averaged: with half of the examples and half of the texts each, the mean is as before."""

    def gradient(n_processes, rank):
        adapted = model()
        adapted.get_base_model().model.layers[0].self_attn.q_proj.lora_B.default.weight.data.fill_(0.1)
        callback = lora_init.StartCallback(samples=8, replay=share)
        made = trainer(tmp_path, adapted, per_device_train_batch_size=8 // n_processes, processing_class=tokenizer)
        made.state.max_steps = 1
        with monkeypatch.context() as patch:
            patch.setattr(TrainingArguments, "world_size", n_processes)
            patch.setattr(TrainingArguments, "process_index", rank)
            callback.texts = texts
            callback.on_step_begin(made.args, made.state, made.control, model=adapted)
        return {name: one.grad for name, one in adapted.named_parameters() if one.grad is not None}

    texts = replayed(model(), tokenizer, 4, 42, 1)
    alone, first, second = gradient(1, 0), gradient(2, 0), gradient(2, 1)
    assert any(one.abs().max() > 0 for one in alone.values())
    for name, expected in alone.items():
        torch.testing.assert_close((first[name] + second[name]) / 2, expected, rtol=1e-4, atol=1e-7)


def test_texts_are_trained_on_with_dropout_after_an_evaluation_too(tmp_path, tokenizer):
    texts, found = replayed(model(), tokenizer, 2, 42, 1), []
    for evaluated in (False, True):
        adapted = model(lora_dropout=0.5)
        adapted.get_base_model().model.layers[0].self_attn.q_proj.lora_B.default.weight.data.fill_(0.1)
        callback, made = lora_init.StartCallback(samples=8, replay=0.5), trainer(tmp_path, adapted)
        callback.texts = texts
        adapted.train(not evaluated)
        torch.manual_seed(0)
        callback.on_step_begin(made.args, made.state, made.control, model=adapted)
        found.append([one.grad for one in adapted.parameters() if one.grad is not None])
    assert found[0] and all(torch.equal(one, other) for one, other in zip(*found, strict=True))


class Replays(lora_init.StartCallback):
    """Count the texts of each step: the model is called on each batch of data, and once more where there are texts."""

    def on_step_begin(self, args, state, control, model=None, **rest):
        seen = []
        hook = model.register_forward_pre_hook(lambda m, a, kw: seen.append(len(kw["labels"])), with_kwargs=True)
        super().on_step_begin(args, state, control, model, **rest)
        hook.remove()
        self.counted = [*getattr(self, "counted", []), sum(seen)]


@pytest.mark.parametrize(("share", "expected"), [(0.125, [0, 1, 0]), (0.5, [2, 2, 2]), (0, [0, 0, 0])])
def test_a_share_below_a_text_a_step_is_one_now_and_then(tmp_path, tokenizer, share, expected):
    watch = Replays(samples=8, replay=share)
    trainer(tmp_path, model(), watch, processing_class=tokenizer).train()
    assert watch.counted == expected


def test_a_resumed_run_replays_the_texts_to_come(tmp_path, tokenizer):
    first, again = model(), model()
    settings = dict(processing_class=tokenizer, max_steps=6)
    trainer(tmp_path, first, lora_init.StartCallback(samples=8, replay=0.25), save_strategy="steps", save_steps=3,
            **settings).train()  # fmt: skip
    made = trainer(tmp_path, again, lora_init.StartCallback(samples=8, replay=0.25), **settings)
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, value in adapter_of(first).items():
        torch.testing.assert_close(adapter_of(again)[name], value)


def test_the_adapter_is_dialed_on_held_out_batches_and_saved(tmp_path, tokenizer, capsys):
    settings = dict(eval_strategy="steps", eval_steps=3, per_device_eval_batch_size=4, processing_class=tokenizer)
    settings |= dict(eval_dataset=rows(20, 9), save_strategy="steps", save_steps=3)
    adapted = model()
    trainer(tmp_path, adapted, lora_init.StartCallback(samples=8, dial=True), **settings).train()
    as_trained = load_file(tmp_path / "checkpoint-3" / "adapter_model.safetensors")
    expected = model()
    set_peft_model_state_dict(expected, as_trained)
    held_out = [
        {key: torch.stack([row[key] for row in rows(20, 9)[i : i + 4]]) for key in rows()[0]} for i in range(0, 20, 4)
    ]
    found = lora_init.dial(expected, held_out, tokenizer=tokenizer, seed=42)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    for name, value in adapter_of(expected).items():
        torch.testing.assert_close(adapter_of(adapted)[name], value)
        torch.testing.assert_close(saved[name.replace(".default", "")], value)
    assert f"lora_init: dial, strength: {found.summary()['strength']}" in capsys.readouterr().err


def test_what_cannot_be_dialed_at_the_end_stays_as_trained(tmp_path, tokenizer, capsys):
    callback, adapted, plain = lora_init.StartCallback(samples=8, dial=True), model(), model()
    settings = dict(eval_strategy="steps", eval_steps=3, eval_dataset=rows(4), processing_class=tokenizer)
    made = trainer(tmp_path, adapted, callback, **settings)
    made.train()
    callback.on_train_end(made.args, made.state, made.control, adapted)  # as where evaluation never came
    *_, too_few, nothing = capsys.readouterr().err.splitlines()
    for said, reason in ((too_few, "batches: 4 examples, and at least 6 are needed"), (nothing, "was evaluated")):
        assert said.startswith("lora_init: not dialed, and the adapter is as trained: ") and reason in said
    trainer(tmp_path, plain, lora_init.StartCallback(samples=8), **settings).train()
    assert all(torch.equal(value, adapter_of(plain)[name]) for name, value in adapter_of(adapted).items())


def test_without_a_dial_nothing_is_said_or_saved_when_training_has_ended(tmp_path, capsys):
    made = trainer(tmp_path, model())
    callback = lora_init.StartCallback(samples=8)
    callback.on_train_end(made.args, made.state, made.control, made.model, eval_dataloader=DataLoader(rows(), 4))
    assert capsys.readouterr().err == "" and not [*tmp_path.rglob("adapter*")]


def test_a_frozen_a_stays_as_it_began(tmp_path):
    watch, adapted = Watch(samples=8, freeze_a=True), model()
    trainer(tmp_path, adapted, watch).train()
    for name, value in adapter_of(adapted).items():
        assert torch.equal(value, watch.begun[name]) == (".lora_A." in name), name


def test_a_frozen_a_stays_so_in_a_run_that_is_resumed(tmp_path):
    saving = dict(save_strategy="steps", save_steps=2)
    first, again = model(), model()
    trainer(tmp_path, first, lora_init.StartCallback(samples=8, freeze_a=True), **saving).train()
    callback = lora_init.StartCallback(samples=8, freeze_a=True)
    trainer(tmp_path, again, callback, **saving).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, value in adapter_of(first).items():
        torch.testing.assert_close(adapter_of(again)[name], value)


@pytest.mark.parametrize(("settings", "said"), [
    (dict(lr_scheduler_type="constant"), r"with the schedule cosine and linear, and not with constant"),
    (dict(optim="sgd"), r"measured for AdamW, and not for the optimizer SGD"),
])  # fmt: skip
def test_a_schedule_or_optimizer_that_the_rate_was_not_measured_with_is_named(settings, said, tmp_path):
    with pytest.warns(LoraInitWarning, match=said):
        trainer(tmp_path, model(), lora_init.StartCallback(samples=8), max_steps=1, **settings).train()
