"""initialize(trainer): statistics from what the trainer trains on, and the adapter in the trainer."""

import functools
import json
import re
import types

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import DataLoader, IterableDataset, RandomSampler
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from transformers.utils.deprecation import deprecate_kwarg

import lora_init
from lora_init.adapters.peft_model import adapter_layers
from lora_init.errors import LoraInitWarning
from lora_init.trainers.trainers import TrainerIntegration, _keep_for_training, leaves_loss
from tests.commands import tokenizer_of
from tests.conftest import refused, tiny_bert, tiny_llama, tiny_vit
from tests.trainers.made import CHAT, CONFIG, WORDS, chats, of_class, plain, seen_by, sentences, settings

# These trainers take the rates that a tiny model learns at.
pytestmark = pytest.mark.filterwarnings("ignore:.*(learning_rate|lora_alpha) is ")

trl = pytest.importorskip("trl")


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of(WORDS, bos_token="<s>", chat_template=CHAT)


def pairs():
    both = zip(sentences(), sentences()[::-1], strict=True)
    return Dataset.from_list([{"prompt": f"what {a}", "chosen": f" {a}", "rejected": f" {b}"} for a, b in both])


def sft(tmp_path, tokenizer, model=None, peft_config=None, **more):
    args = settings(trl.SFTConfig, tmp_path, bf16=False, max_length=32, **more)
    model = model or tiny_llama()
    return trl.SFTTrainer(model, args, train_dataset=chats(), processing_class=tokenizer, peft_config=peft_config)


def dpo(tmp_path, tokenizer, model=None, peft_config=None, **more):
    args = settings(trl.DPOConfig, tmp_path, bf16=False, max_length=32, **more)
    model = model or tiny_llama()
    return trl.DPOTrainer(model, args=args, train_dataset=pairs(), processing_class=tokenizer, peft_config=peft_config)


def batches_of(trainer, n=3):
    """The batches that a trainer trains on, as the model gets them."""
    seen, inner = [], trainer.training_step

    def step(model, inputs, *rest, **more):
        seen.append(inputs["input_ids"].clone())
        return inner(model, inputs, *rest, **more)

    trainer.training_step = step
    trainer.train()
    return seen[:n]


LORA = dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")
MADE = {
    "Trainer": plain,
    "SFTTrainer": sft,
    "SFTTrainer with peft_config": lambda *a, **k: sft(*a, peft_config=LoraConfig(**LORA), **k),
    "DPOTrainer with peft_config": lambda *a, **k: dpo(*a, peft_config=LoraConfig(**LORA), **k),
}
RANK = {made: {} if "peft" in made else {"rank": 4} for made in MADE}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("made", MADE)
def test_the_trainer_trains_the_adapter(made, checkpointing, tmp_path, tokenizer):
    # The reentrant kind, transformers 4's default, learns nothing unless the embeddings' output requires a gradient.
    more = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    trainer = MADE[made](tmp_path, tokenizer, **more if checkpointing else {"gradient_checkpointing": False})
    base = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    adapted = lora_init.initialize(trainer, **RANK[made])
    assert isinstance(adapted, PeftModel) and trainer.model is adapted
    layers = adapter_layers(adapted)
    start = {name: layer.lora_A["default"].weight.detach().clone() for name, layer in layers.items()}
    for gram in (a @ a.T for a in start.values()):  # directions of one length, not random rows
        assert (gram / gram[0, 0] - torch.eye(len(gram))).abs().max() < 1e-3
    if "peft" in made:
        assert {name.rpartition(".")[2] for name in layers} == {"q_proj", "v_proj"}
        assert sum(layer.r["default"] for layer in layers.values()) == 4 * len(layers)
        assert {layer.scaling["default"] for layer in layers.values()} == {2.0}
        assert adapted.peft_config["default"].lora_dropout == 0.1
    else:
        assert len(layers) == 14
    trainer.train()
    for name, layer in layers.items():
        assert layer.lora_B["default"].weight.abs().max() > 0, name
        assert not torch.equal(layer.lora_A["default"].weight, start[name]), name
    after = adapted.get_base_model().state_dict()
    for name, value in base.items():
        plain_name = name.removeprefix("base_model.model.")
        if "lora_" not in name:
            key = plain_name if plain_name in after else plain_name.replace(".weight", ".base_layer.weight")
            assert torch.equal(after[key], value), name
    trainer.save_model(str(tmp_path / "saved"))
    assert json.loads((tmp_path / "saved/adapter_config.json").read_text())["r"] == 4


@pytest.mark.parametrize("made", MADE)
def test_statistics_are_from_the_batches_that_training_sees(made, tmp_path, tokenizer, monkeypatch):
    seen = seen_by(TrainerIntegration, monkeypatch)
    trainer, other = (MADE[made](tmp_path, tokenizer) for _ in range(2))
    lora_init.initialize(trainer, **RANK[made])
    assert len(seen) > 3
    trained, without = batches_of(trainer), batches_of(other)
    assert len(trained) == 3
    for ours, theirs, undisturbed in zip(seen, trained, without, strict=False):
        assert torch.equal(ours["input_ids"], theirs) and torch.equal(theirs, undisturbed)


def test_a_collator_with_a_state_of_its_own_begins_training_as_it_was(tmp_path, tokenizer):
    class Drawing(DataCollatorForSeq2Seq):
        drawn = 0

        def __call__(self, rows, return_tensors=None):
            self.drawn += 1
            return super().__call__(rows, return_tensors)

    trainer = plain(tmp_path, tokenizer)
    trainer.data_collator = collator = Drawing(tokenizer)
    lora_init.initialize(trainer, rank=4, max_batches=2)
    assert trainer.data_collator is collator and collator.drawn == 0


def test_nothing_of_the_pass_is_left_in_the_trainer(tmp_path, tokenizer):
    """Accelerate counts steps by the loaders that are open: one left over would end every accumulation early."""
    trainer = sft(tmp_path, tokenizer)
    before, open_before = torch.random.get_rng_state(), trainer.accelerator.gradient_state.dataloader_references[:]
    lora_init.initialize(trainer, rank=4, max_batches=2)
    assert trainer.accelerator.gradient_state.dataloader_references == open_before
    assert trainer.accelerator._dataloaders == []
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("with_config", [True, False])
def test_the_reference_of_dpo_is_the_plain_model(with_config, tmp_path, tokenizer):
    tiny_llama().save_pretrained(tmp_path / "model")
    model = type(tiny_llama()).from_pretrained(tmp_path / "model")
    config = LoraConfig(**LORA | {"lora_dropout": 0.0}) if with_config else None
    trainer = dpo(tmp_path, tokenizer, model, config, max_steps=6)
    lora_init.initialize(trainer, **({} if with_config else {"rank": 4}))
    assert (trainer.ref_model is None) == with_config
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(0.6931, abs=2e-4)  # ln 2: the model is the reference yet
    assert min(losses) < 0.66


@pytest.mark.parametrize("with_adapter", [False, True])
def test_with_checkpointing_of_the_older_kind_gradients_reach_the_adapter(with_adapter, tmp_path, tokenizer):
    """Its inputs have to ask for gradients; for an adapter of their own trainers see to that."""
    more = dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}, max_steps=1)
    model = get_peft_model(tiny_llama(), LoraConfig(**LORA)) if with_adapter else None
    trainer = plain(tmp_path, tokenizer, model, **more)
    embedding = trainer.model.get_input_embeddings()
    before = len(embedding._forward_hooks)
    model = lora_init.initialize(trainer, **({} if with_adapter else {"rank": 2}))
    assert len(embedding._forward_hooks) == before + (not with_adapter)  # once, by whoever made the adapter
    trainer.train()
    layers = adapter_layers(model).values()
    assert all(layer.lora_B["default"].weight.abs().max() > 0 for layer in layers)


def test_with_checkpointing_of_the_older_kind_gradients_reach_the_adapter_of_a_model_of_images(tmp_path):
    """Of models of tokens alone transformers itself makes the inputs ask for gradients."""
    rows = [{"pixel_values": torch.rand(1, 16, 16), "labels": i % 3} for i in range(16)]
    older = dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}, max_steps=1)
    trainer = Trainer(tiny_vit(), settings(TrainingArguments, tmp_path, **older), train_dataset=rows)
    layers = adapter_layers(lora_init.initialize(trainer, rank=2))
    trainer.train()
    assert all(layer.lora_B["default"].weight.any() for layer in layers.values())


@pytest.mark.parametrize("by", ["initialize", "StartCallback"])
def test_a_frozen_a_stays_so_where_the_reference_switches_the_adapter_off(by, tmp_path, tokenizer):
    """PEFT lets all of an adapter train when it is switched on again."""
    trainer = dpo(tmp_path, tokenizer, peft_config=LoraConfig(**LORA), max_steps=3)
    if by == "initialize":
        lora_init.initialize(trainer, freeze_a=True)
        trainer.evaluate(trainer.train_dataset)  # before the optimizer is made
        begun = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if ".lora_A." in name}
    else:
        begun = {}

        class Noting(lora_init.StartCallback):
            def on_train_begin(self, args, state, control, model=None, **rest):
                super().on_train_begin(args, state, control, model, **rest)
                begun.update((name, p.detach().clone()) for name, p in model.named_parameters() if ".lora_A." in name)

        trainer.add_callback(Noting(samples=8, freeze_a=True))
    trainer.train()
    assert begun and all(torch.equal(trainer.model.get_parameter(name), a) for name, a in begun.items())
    layers = adapter_layers(trainer.model).values()
    assert all(layer.lora_B["default"].weight.abs().max() > 0 for layer in layers)


@pytest.mark.parametrize("method", ["lora-ga", "natural-gradient-step"])
def test_starts_from_gradients_take_the_loss_of_sft(method, tmp_path, tokenizer):
    trainer = sft(tmp_path, tokenizer)
    if method == "lora-ga":
        refused(r"rho=2.*Leave rho out", lora_init.initialize, sft(tmp_path, tokenizer), rank=2, rho=2, method=method)
    message = (
        r"before training.*--start" if method == "lora-ga" else "3 of 12 different examples"
    )  # most rows are alike
    with pytest.warns(UserWarning, match=message):
        adapted = lora_init.initialize(trainer, rank=2, rho=1, method=method, task_type="CAUSAL_LM")
    assert all(layer.lora_B["default"].weight.abs().max() > 0 for layer in adapter_layers(adapted).values())
    trainer.train()


def test_labels_of_a_trainer_say_which_tokens_count(tmp_path, tokenizer):
    counted = []
    for mask in ("attention", "labels"):
        trainer = dpo(tmp_path, tokenizer, peft_config=LoraConfig(**LORA))
        lora_init.initialize(trainer, token_mask=mask, statistics=tmp_path / f"{mask}.safetensors")
        counted.append(lora_init.Statistics.load(tmp_path / f"{mask}.safetensors").provenance.n_samples)
    assert counted[1] < counted[0]


@pytest.mark.parametrize(("rows", "batch", "accumulation", "epochs", "drop_last", "max_steps"), [
    (9, 2, 4, 3, False, -1), (9, 2, 4, 3, True, -1), (9, 2, 4, 2.5, False, -1), (8, 2, 4, 3, False, -1),
    (5, 4, 1, 2, False, -1), (5, 4, 1, 2, True, -1), (7, 2, 3, 1, True, -1), (3, 2, 8, 2, False, -1),
    (9, 2, 4, 3, False, 2), (10, 3, 2, 0.5, False, -1),
])  # fmt: skip
def test_steps_are_those_that_the_trainer_takes(
    rows, batch, accumulation, epochs, drop_last, max_steps, tmp_path, tokenizer
):
    how = dict(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, num_train_epochs=epochs)
    trainer = plain(tmp_path, tokenizer, max_steps=max_steps, dataloader_drop_last=drop_last, **how)
    trainer.train_dataset = trainer.train_dataset.select([i % len(trainer.train_dataset) for i in range(rows)])
    length = TrainerIntegration(trainer).length
    trainer.train()
    assert length.steps == trainer.state.max_steps == trainer.state.global_step
    # Between two ends of an epoch the trainer counts batches, and more of them belong to the first step.
    # With drop_last each epoch leaves out others.
    tolerance = 1e-9 if trainer.state.epoch == round(trainer.state.epoch) and not drop_last else 0.25
    assert length.epochs == pytest.approx(max(1.0, trainer.state.epoch), rel=tolerance)


class OwnLoader(Trainer):
    def get_train_dataloader(self):
        return DataLoader(self.train_dataset, batch_size=2, collate_fn=self.data_collator)


class OwnSampler(Trainer):
    def _get_train_sampler(self, *given):
        return RandomSampler(self.train_dataset, num_samples=4)


@pytest.mark.parametrize("kind", [OwnLoader, OwnSampler])
def test_the_length_is_that_of_the_loader_whatever_the_arguments_say(kind, tmp_path, tokenizer):
    trainer = of_class(kind)(tmp_path, tokenizer)
    assert trainer.args.train_batch_size > 2
    length, read = TrainerIntegration(trainer).length, []
    inner = trainer.training_step
    trainer.training_step = lambda model, inputs, *rest: (
        read.append(len(inputs["input_ids"])) or inner(model, inputs, *rest)
    )
    trainer.train()
    assert length.steps == trainer.state.max_steps and {length.batch_size} == {*read}
    assert length.rows == len(trainer.train_dataset)
    assert length.epochs == pytest.approx(max(1.0, sum(read) / length.rows), rel=0.5)


class Stream(IterableDataset):
    """Rows of each epoch of their own, as a trainer that calls `set_epoch` shuffles them."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter([{"input_ids": [1 + self.epoch, 3, 5 + i], "labels": [2, 3, 4]} for i in range(12)])


class Counted(Stream):
    def __len__(self):
        return 12


class Once(Stream):
    """Rows that are there a single time."""

    def __init__(self):
        self.rows = iter([{"input_ids": [1, 3, 5 + i], "labels": [2, 3, 4]} for i in range(12)])

    def __iter__(self):
        return self.rows


@pytest.mark.parametrize(("kind", "max_steps", "rows"), [
    (Stream, 8, None), (Counted, 8, 12), (Counted, -1, 12), (Once, 3, None),
])  # fmt: skip
def test_training_sees_a_stream_as_it_would_have_been_and_its_steps_are_counted(
    kind, max_steps, rows, tmp_path, tokenizer
):
    trainer, other = (plain(tmp_path, tokenizer, max_steps=max_steps, num_train_epochs=2) for _ in range(2))
    trainer.train_dataset, other.train_dataset = kind(), kind()
    lora_init.initialize(trainer, rank=2, max_batches=2)
    length = TrainerIntegration(trainer).length
    found, expected = batches_of(trainer, 8), batches_of(other, 8)
    assert len(found) == len(expected) == trainer.state.max_steps == length.steps
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert length.rows == rows


@pytest.mark.parametrize("start", ["initialize", "callback"])
def test_a_stream_that_ends_in_the_pass_comes_again_as_a_list_does(start, tmp_path, tokenizer, capsys):
    """A longer one is taken to be all new, and the sentence says so."""
    few = Dataset.from_list([*Stream()])
    many = Dataset.from_list([*Stream()] * 40)  # of which the pass reads a part
    rates = []
    for data in (few, few.to_iterable_dataset(), many.to_iterable_dataset()):
        trainer = plain(tmp_path, tokenizer, max_steps=40, lr_scheduler_type="cosine", warmup_steps=4)
        trainer.train_dataset = data
        if start == "initialize":
            lora_init.initialize(trainer, rank=2, learning_rate="measured", max_batches=8)
            told = " ".join(capsys.readouterr().err.split())
            assert ("epochs of 12 examples" in told) == (len(rates) < 2)
            assert ("a stream: its examples are taken to be all new" in told) == (len(rates) == 2)
        else:
            model = get_peft_model(trainer.model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
            callback = lora_init.StartCallback(learning_rate="measured", samples=32)
            made = {"data_collator": trainer.data_collator, "callbacks": [callback]}
            trainer = Trainer(model, trainer.args, train_dataset=data, **made)
            trainer.train()
        rates.append(trainer.args.learning_rate)
    assert rates[1] == pytest.approx(rates[0], rel=0.1) and rates[2] > 2 * rates[0], rates


def test_batches_of_ones_own_say_nothing_of_how_long_a_stream_is(tmp_path, tokenizer, capsys):
    trainer = plain(tmp_path, tokenizer, max_steps=40, lr_scheduler_type="cosine", warmup_steps=4)
    trainer.train_dataset = Dataset.from_list([*Stream()]).to_iterable_dataset()
    batches = [trainer.data_collator([row]) for row in [*Stream()][:4]]
    lora_init.initialize(trainer, batches, rank=2, learning_rate="measured")
    assert "a stream: its examples are taken to be all new" in " ".join(capsys.readouterr().err.split())


def with_own_loss(*given):
    trainer = plain(*given)
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: outputs.logits.square().mean()
    return trainer


class OwnOptimizer(Trainer):
    def create_optimizer(self, *given):
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=self.args.learning_rate)
        return self.optimizer


class OwnClass(Trainer):
    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        return torch.optim.SGD, {"lr": args.learning_rate}


def with_own_step(*given):
    trainer = plain(*given)
    trainer.training_step = types.MethodType(lambda self, model, inputs, *more: model(**inputs).logits.sum(), trainer)
    return trainer


def with_beta(*given):
    trainer = plain(*given)
    trainer.args.beta = 0.1  # as DPOConfig and KTOConfig have
    return trainer


def with_own_model_loss(*given):
    trainer = plain(*given)
    trainer.model.loss_function = lambda logits, labels, **more: logits.square().mean()
    return trainer


def with_own_optimizer_under_its_name(*given):
    trainer = plain(*given)

    @functools.wraps(Trainer.create_optimizer)
    def create_optimizer(*_):
        return OwnOptimizer.create_optimizer(trainer)

    trainer.create_optimizer = create_optimizer
    return trainer


def with_own_optimizer_as_a_partial(*given):
    trainer = plain(*given)
    trainer.create_optimizer = functools.partial(OwnOptimizer.create_optimizer, trainer)
    functools.update_wrapper(trainer.create_optimizer, Trainer.create_optimizer)
    return trainer


class OwnUnderTheirDecorator(Trainer):
    @deprecate_kwarg("something", version="99.0")
    def create_optimizer(self, *given):
        return OwnOptimizer.create_optimizer(self, *given)


class Seq2SeqTrainer(Trainer):  # named as one whose loss is known
    def compute_loss(self, model, inputs, *given, **more):
        return model(**inputs).logits.square().mean()


class OwnStep(Trainer):
    def training_step(self, *given, **more):
        return super().training_step(*given, **more)


UNMEASURED = {
    "an optimizer of one's own": (of_class(OwnOptimizer), "for the optimizer that OwnOptimizer makes itself"),
    "a patch": (with_own_optimizer_under_its_name, "for the optimizer that Trainer makes itself"),
    "a partial": (with_own_optimizer_as_a_partial, "for the optimizer that Trainer makes itself"),
    "a decorator": (of_class(OwnUnderTheirDecorator), "for the optimizer that OwnUnderTheirDecorator makes itself"),
    "its class": (of_class(OwnClass), "for the optimizer that OwnClass makes itself"),
    "SGD": (lambda *given: plain(*given, optim="sgd"), "for the optimizer sgd"),
    "Adafactor": (lambda *given: plain(*given, optim="adafactor"), "for the optimizer adafactor"),
    "Adagrad": (lambda *given: plain(*given, optim="adagrad"), "for the optimizer adagrad"),
    "Lion": (lambda *given: plain(*given, optim="lion_32bit"), "for the optimizer lion_32bit"),
    "GaLore": (lambda *given: sft(*given, optim="galore_adamw"), "for the optimizer galore_adamw"),
    "DPO": (lambda *given: dpo(*given, peft_config=LoraConfig(**LORA)), "for the loss of DPOTrainer"),
    "a loss of one's own": (with_own_loss, "for the loss of Trainer"),
    "a class of a known name": (of_class(Seq2SeqTrainer), "for the loss of Seq2SeqTrainer"),
    "a step of one's own": (of_class(OwnStep), "for the loss of OwnStep"),
    "a step put in its place": (with_own_step, "for the loss of Trainer"),
    "a loss by preferences": (with_beta, "for the loss of Trainer"),
    "a loss of the model's": (with_own_model_loss, "for the loss of Trainer"),
}


@pytest.mark.parametrize("kind", UNMEASURED)
def test_a_rate_is_not_set_where_none_was_measured(kind, tmp_path, tokenizer):
    make, said = UNMEASURED[kind]
    trainer = make(tmp_path, tokenizer)
    refused(f"learning_rate='measured': no rate was measured {said}", lora_init.initialize, trainer, rank=4,
            learning_rate="measured")  # fmt: skip
    assert trainer.args.learning_rate == 1e-2


def test_a_rate_that_was_measured_on_text_is_set_for_images_with_a_word(tmp_path):
    rows = [{"pixel_values": torch.rand(1, 16, 16), "labels": i % 3} for i in range(16)]
    trainer = Trainer(tiny_vit(), TrainingArguments(tmp_path, max_steps=2, report_to="none"), train_dataset=rows)
    with pytest.warns(LoraInitWarning, match="measured on models of text, and ViTForImageClassification"):
        lora_init.initialize(trainer, rank=2, method="random", learning_rate="measured", progress=False)
    assert trainer.args.learning_rate != 5e-5


class OwnSchedule(Trainer):
    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer or self.optimizer)
        return self.lr_scheduler


@pytest.mark.parametrize("kind", [Trainer, OwnSchedule, "given"])
def test_a_schedule_that_the_arguments_do_not_name_is_told_of(kind, tmp_path, tokenizer, recwarn):
    given = kind == "given"
    trainer = of_class(Trainer if given else kind)(tmp_path, tokenizer)
    if given:
        trainer.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(torch.optim.AdamW(trainer.model.parameters()))
    lora_init.initialize(trainer, rank=4, learning_rate="measured", progress=False)
    said = [str(one.message) for one in recwarn if "measured with the schedule" in str(one.message)]
    of = {Trainer: [], OwnSchedule: ["that OwnSchedule makes itself"], "given": ["ConstantLR"]}[kind]
    schedules = [
        f"the learning rate was measured with the schedule cosine and linear, and not with {one}" for one in of
    ]
    assert [line.removesuffix(": tune it.") for line in said] == schedules


def test_the_adapter_of_a_trainer_keeps_its_name(tmp_path, tokenizer):
    """The trainer saves it in a folder of that name, and the user's own PeftModel knows no other."""
    model = get_peft_model(tiny_llama(), LoraConfig(**CONFIG), adapter_name="mine")
    trainer = plain(tmp_path, tokenizer, model)
    assert [*lora_init.initialize(trainer).peft_config] == [*trainer.model.peft_config] == ["mine"]
    trainer = plain(tmp_path, tokenizer, get_peft_model(tiny_llama(), LoraConfig(**CONFIG), adapter_name="mine"))
    assert [*lora_init.initialize(trainer, adapter_name="other").peft_config] == ["other"]


@pytest.mark.parametrize("name", ["compute_loss", "training_step"])
def test_a_loss_that_was_put_into_a_class_of_the_library_is_nobodys(name, tmp_path, tokenizer, monkeypatch):
    trainer = plain(tmp_path, tokenizer)
    assert TrainerIntegration(trainer).source_of_loss == "Trainer" and TrainerIntegration(trainer).has_plain_loss
    monkeypatch.setattr(Trainer, name, lambda self, model, inputs, *given, **more: model(**inputs).logits.sum())
    assert TrainerIntegration(trainer).source_of_loss == "" and not TrainerIntegration(trainer).has_plain_loss


class Reads(torch.nn.Module):
    """A model of tokens, or of what stands in for them."""

    main_input_name = "input_ids"

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, encoder_outputs=None):
        return {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "encoder_outputs": encoder_outputs}


@pytest.mark.parametrize("name", ["input_ids", "inputs_embeds", "encoder_outputs", "attention_mask"])
def test_embeddings_or_the_outputs_of_an_encoder_stand_in_for_tokens(name, tmp_path, tokenizer):
    integration, model, batch = (
        TrainerIntegration(plain(tmp_path, tokenizer)),
        Reads(),
        {name: torch.ones(2, 3, dtype=torch.int64)},
    )
    integration.handle = types.SimpleNamespace(model=model)
    run = integration.forward(with_labels=False)
    if name == "attention_mask":
        refused("^a batch of Trainer has attention_mask, and Reads needs input_ids", run, model, batch)
    else:
        assert run(model, batch)[name] is batch[name]


class OwnBoth(Trainer):
    def create_optimizer_and_scheduler(self, num_training_steps):
        super().create_optimizer_and_scheduler(num_training_steps)


@pytest.mark.parametrize(("kind", "optimizer", "schedule"), [
    (Trainer, "adamw_torch", "linear"), (OwnOptimizer, None, "linear"), (OwnClass, None, "linear"),
    (OwnSchedule, "adamw_torch", None), (OwnBoth, None, None),
])  # fmt: skip
def test_what_a_method_of_ones_own_may_make_is_named_so(kind, optimizer, schedule, tmp_path, tokenizer):
    found, own = TrainerIntegration(of_class(kind)(tmp_path, tokenizer)), f"that {kind.__name__} makes itself"
    assert found.optimizer.removesuffix("_fused") == (optimizer or own) and found.schedule == (schedule or own)


def test_a_measured_rate_reaches_an_optimizer_that_was_given_with_its_own(tmp_path, tokenizer):
    trainer = plain(tmp_path, tokenizer, max_steps=2, lr_scheduler_type="constant", logging_steps=1)
    given = {"lr": 1e-5}
    trainer.optimizer_cls_and_kwargs = (torch.optim.AdamW, given)
    with pytest.warns(UserWarning, match="measured with the schedule"):
        lora_init.initialize(trainer, rank=4, learning_rate="measured", progress=False)
    trainer.train()
    used = {row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row}
    assert used == {trainer.args.learning_rate} and trainer.args.learning_rate not in (1e-5, 1e-2)
    assert given == {"lr": 1e-5}  # a second trainer may be made with it


@pytest.mark.parametrize(("given", "rate"), [({"lr": 1e-5}, 1e-5), ({}, None)])
def test_the_rate_of_an_optimizer_that_was_given_with_its_own(given, rate, tmp_path, tokenizer):
    trainer = plain(tmp_path, tokenizer)
    assert TrainerIntegration(trainer).learning_rate == trainer.args.learning_rate
    trainer.optimizer_cls_and_kwargs = (torch.optim.AdamW, given)
    assert TrainerIntegration(trainer).learning_rate == rate


def test_a_warm_up_of_more_than_half_of_the_steps_is_told_of(tmp_path, tokenizer):
    assert TrainerIntegration(plain(tmp_path, tokenizer, max_steps=8, warmup_steps=4)).schedule == "linear"
    trainer = plain(tmp_path, tokenizer, max_steps=8, warmup_steps=5)
    assert TrainerIntegration(trainer).schedule == "linear (a warm-up of 5 of 8 steps)"


def trained(trainer):
    trainer.train()
    return trainer


def made_later(tmp_path, tokenizer):
    trainer = plain(tmp_path, tokenizer)
    return Trainer(
        None, trainer.args, trainer.data_collator, trainer.train_dataset, model_init=lambda: tiny_llama().train()
    )


def without_data(*given):
    trainer = plain(*given)
    trainer.train_dataset = None
    return trainer


def own_loss(tmp_path, tokenizer):
    trainer = plain(tmp_path, tokenizer)
    trainer.compute_loss = lambda model, inputs, **more: model(**inputs).loss * 2
    return trainer


REFUSED = {
    "after training": (lambda *a: trained(sft(*a)), {}, r"the SFTTrainer has an optimizer already"),
    "said twice": (
        lambda *a: sft(*a, peft_config=LoraConfig(**LORA)), {"rank": 8}, r"^rank=8: the trainer's peft_config decides"
    ),
    # These equal the defaults, which do not count as given.
    "said twice, rank": (
        lambda *a: sft(*a, peft_config=LoraConfig(**LORA)), {"rank": 16}, r"^rank=16: .* decides that and says 4\."
    ),
    "said twice, alpha": (
        lambda *a: sft(*a, peft_config=LoraConfig(**LORA | {"lora_alpha": 9})), {"lora_alpha": 16}, "^lora_alpha=16: "
    ),
    "said twice, dropout": (
        lambda *a: sft(*a, peft_config=LoraConfig(**LORA)), {"lora_dropout": 0.0}, "^lora_dropout=0"
    ),
    "said twice, layers": (
        lambda *a: sft(*a, peft_config=LoraConfig(**LORA)), {"target_modules": "all-linear"}, "^target_modules='all-l"
    ),
    "ranks of its own": (
        lambda *a: sft(*a, peft_config=LoraConfig(**LORA, rank_pattern={"q_proj": 2})), {}, r"sets rank_pattern, which"
    ),
    "not fresh": (
        lambda *a: sft(*a, peft_config=LoraConfig(**LORA, init_lora_weights="pissa")), {}, r"is no fresh one: B is not"
    ),
    "two adapters": (
        lambda *a: dpo(*a, model=sft(*a, peft_config=LoraConfig(**LORA)).model), {}, r"has the adapters default, ref"
    ),
    "no data to train on": (without_data, {}, r"^the Trainer has no train_dataset to learn from\. Make it with one"),
    "a model to come": (made_later, {}, r"makes its model anew when training begins. Give it model="),
    "a head that TRL leaves out": (sft, {"target_modules": ["q_proj", "lm_head"]}, r"would never be trained. Leave"),
    "a task said twice": (
        lambda *a: sft(*a, peft_config=LoraConfig(**LORA)), {"task_type": "SEQ_CLS"}, "^task_type='SEQ_CLS': the"
    ),
    "smoothed labels": (
        lambda *a: plain(*a, label_smoothing_factor=0.1), {"method": "grad-a"}, r"this Trainer computes a loss of its"
    ),
    "another loss of SFT": (lambda *a: sft(*a, loss_type="dft"), {"method": "grad-a"}, r"this SFTTrainer computes a"),
    "a loss put in its place": (own_loss, {"method": "grad-a"}, r"this Trainer computes a loss of its own"),
    "a loss of its own": (
        lambda *a: dpo(*a, peft_config=LoraConfig(**LORA)), {"method": "lora-one"}, r"this DPOTrainer computes a loss"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case, tmp_path, tokenizer):
    make, arguments, message = REFUSED[case]
    trainer = make(tmp_path, tokenizer)
    before = trainer.model
    refused(message, lora_init.initialize, trainer, **arguments)
    assert trainer.model is before


@pytest.mark.parametrize(("batch", "message"), [
    ({"texts": ["made while it trains"]}, "SFTTrainer makes its batches of tokens while it trains"),
    ({"prompt_input_ids": torch.ones(2, 3), "chosen_input_ids": torch.ones(2, 3)},
     "has prompt_input_ids, chosen_input_ids, and LlamaForCausalLM takes none of these. A DPOTrainer needs TRL 0.29"),
    ({"attention_mask": torch.ones(2, 3)},
     "has attention_mask, and LlamaForCausalLM needs input_ids. A DPOTrainer needs TRL 0.29"),
])  # fmt: skip
def test_a_failure_leaves_the_trainer_as_it_was(batch, message, tmp_path, tokenizer):
    trainer = sft(tmp_path, tokenizer, peft_config=LoraConfig(**LORA))
    before, state = trainer.model, {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.data_collator = lambda rows: batch
    refused(message, lora_init.initialize, trainer)
    assert trainer.model is before and state.keys() == before.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in before.state_dict().items())


@pytest.mark.parametrize("with_adapter", [True, False])
def test_the_head_of_a_classifier_is_trained_whole(with_adapter, tmp_path):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 64, (32, 8), generator=generator).tolist()
    data = Dataset.from_dict({"input_ids": ids, "labels": [i % 2 for i in range(32)]})
    config = LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = get_peft_model(tiny_bert(), config) if with_adapter else tiny_bert()
    trainer = Trainer(model, settings(TrainingArguments, tmp_path), train_dataset=data)
    adapted = lora_init.initialize(trainer, **({} if with_adapter else {"rank": 4}))
    assert trainer.model is trainer.model_wrapped is trainer.callback_handler.model is adapted
    head = {
        name: p.detach().clone() for name, p in adapted.named_parameters() if p.requires_grad and "lora_" not in name
    }
    assert head and all("classifier" in name for name in head)
    trainer.train()
    assert all(not torch.equal(adapted.get_parameter(name), before) for name, before in head.items())


@pytest.mark.parametrize("frozen", ["", "modules_to_save.default.bias", "modules_to_save.default"])
def test_of_a_head_what_was_frozen_by_hand_stays_so_and_decides_on_the_rate(frozen, tmp_path):
    data = [{"input_ids": list(range(3, 11)), "labels": i % 2} for i in range(32)]
    config = LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = get_peft_model(tiny_bert(), config)
    for name, parameter in model.named_parameters():
        if frozen and frozen in name:
            parameter.requires_grad_(False)
    expected = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    trainer = Trainer(model, settings(TrainingArguments, tmp_path), train_dataset=data)
    adapted = lora_init.initialize(trainer, learning_rate="measured")
    assert {name for name, parameter in adapted.named_parameters() if parameter.requires_grad} == expected
    batch = {"input_ids": torch.tensor([row["input_ids"] for row in data[:8]])}
    steps = TrainerIntegration(trainer).length.steps
    again = lora_init.learning_rate(adapted, [batch], steps=steps, train_batch_size=4)
    assert again.new_head == (frozen != "modules_to_save.default")
    assert trainer.args.learning_rate == pytest.approx(again.rate, rel=0.3)


@pytest.mark.parametrize("ours", ["default", "ours"])
@pytest.mark.parametrize(
    "by_hand", [("modules_to_save", False), ("norm", True), ("lora_A", False), ("layer.0.", False)]
)
def test_what_trains_by_hand_trains_after_a_start_whatever_the_adapter_is_called(by_hand, ours, tmp_path):
    data = [{"input_ids": list(range(3, 11)), "labels": i % 2} for i in range(32)]
    config = LoraConfig(r=1, target_modules=["query", "value"], task_type="SEQ_CLS")
    model, (part, trains) = get_peft_model(tiny_bert(), config, adapter_name="theirs"), by_hand
    for name, parameter in model.named_parameters():
        if part.lower() in name.lower():
            parameter.requires_grad_(trains)
    expected = {name.replace(".theirs", ""): p.requires_grad for name, p in model.named_parameters()}
    trainer = Trainer(model, settings(TrainingArguments, tmp_path), train_dataset=data)
    adapted = lora_init.initialize(trainer, adapter_name=ours)
    found = {name.replace(f".{ours}", ""): p.requires_grad for name, p in adapted.named_parameters()}
    assert found == expected


def test_an_adapter_that_was_loaded_to_be_served_is_trained(tmp_path, tokenizer):
    model = get_peft_model(tiny_llama(), LoraConfig(**LORA))
    trainer = plain(tmp_path, tokenizer, model.requires_grad_(False))
    adapted = lora_init.initialize(trainer)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained and all(".lora_" in name for name in trained)


def test_what_a_peft_config_selects_is_not_excluded_beside_it(tmp_path, tokenizer):
    trainer = sft(tmp_path, tokenizer, peft_config=LoraConfig(**LORA))
    refused("exclude_modules=.*: the trainer's peft_config decides that and says None", lora_init.initialize, trainer,
            exclude_modules=["q_proj"])  # fmt: skip


def test_a_measured_rate_is_that_of_the_trainers_own_steps(tmp_path, tokenizer):
    trainer = sft(tmp_path, tokenizer)
    adapted = lora_init.initialize(trainer, rank=4, learning_rate="measured")
    batches = [{key: batch[key] for key in ("input_ids", "attention_mask")} for batch in trainer.get_train_dataloader()]
    again = lora_init.learning_rate(adapted, batches, steps=TrainerIntegration(trainer).length.steps).rate
    assert trainer.args.learning_rate == pytest.approx(again, rel=0.3) and again != 1e-2


def test_it_ends_with_one_line_on_stderr(tmp_path, tokenizer, capsys):
    lora_init.initialize(sft(tmp_path, tokenizer), rank=4)
    line = capsys.readouterr().err.splitlines()[-1]
    said = r"eva: 14 layers, rank [\d to]+, \d+ batches of 4 examples, \d{1,2}\.\d s\. "
    assert re.fullmatch(said + "Train with AdamW at .*", line)
    lora_init.initialize(dpo(tmp_path, tokenizer, peft_config=LoraConfig(**LORA)))
    line = capsys.readouterr().err.splitlines()[-1]
    unmeasured = "Its learning rate is for you to tune: none was measured for the loss of DPOTrainer."
    assert line.startswith("eva: ") and line.endswith(f" s. {unmeasured}")
    lora_init.initialize(sft(tmp_path, tokenizer), rank=4, progress=False)
    assert "batches of 4 examples" not in capsys.readouterr().err


@pytest.mark.parametrize("theirs", ["gaussian", "eva"])
@pytest.mark.filterwarnings("ignore")
def test_another_fresh_start_of_peft_gives_way_to_the_one_from_data(theirs, tmp_path, tokenizer):
    trainer = plain(tmp_path, tokenizer, model=tiny_llama())
    trainer.model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=theirs))
    before = trainer.model.get_parameter(A).clone()
    lora_init.initialize(trainer)
    now = trainer.model.get_parameter(A)
    assert not torch.allclose(now, before) and torch.allclose(
        now @ now.T / (now @ now.T)[0, 0], torch.eye(2), atol=1e-3
    )


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"


@pytest.mark.parametrize(("changes", "leaves"), [
    ({}, True), ({"loss_type": "nll"}, True), ({"loss_type": "chunked_nll"}, True), ({"loss_type": "dft"}, False),
    ({"label_smoothing_factor": 0.1}, False), ({"beta": 0.0}, False),
])  # fmt: skip
def test_arguments_leave_the_loss_to_the_model_unless_they_name_another(changes, leaves):
    assert leaves_loss(types.SimpleNamespace(**{"label_smoothing_factor": 0.0} | changes)) is leaves


@pytest.mark.parametrize(("what", "classifies"), [
    ("Sequence", True), ("Image", True), ("Audio", True), ("Video", True), ("Token", False),
])  # fmt: skip
def test_a_classifier_is_known_by_the_name_of_its_class(what, classifies, tmp_path):
    model = type(f"OwnFor{what}Classification", (torch.nn.Linear,), {})(2, 2)
    args = TrainingArguments(tmp_path, report_to=[], use_cpu=True)
    assert TrainerIntegration(Trainer(model, args)).classifies is classifies


def test_a_classifier_with_a_loss_of_its_own_counts_as_none_whatever_its_task(tmp_path):
    model = get_peft_model(tiny_bert(), LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    found = []
    for smoothing in (0.0, 0.1):
        args = TrainingArguments(tmp_path, report_to=[], use_cpu=True, label_smoothing_factor=smoothing)
        found.append(TrainerIntegration(Trainer(model, args)).classifies)
    assert found == [True, False]


class Once(IterableDataset):
    """Rows that are there only once."""

    def __init__(self):
        self.rows, self.epoch = iter(range(5)), 0

    def __iter__(self):
        return self.rows

    def __len__(self):
        return 5

    def set_epoch(self, epoch):
        self.epoch = epoch


def test_rows_that_are_there_once_are_kept_for_training_unless_workers_read_them():
    for rows, workers, kept in ((Once(), 0, True), (Once(), 2, False), ([1, 2], 0, False)):
        trainer = types.SimpleNamespace(train_dataset=rows, args=types.SimpleNamespace(dataloader_num_workers=workers))
        _keep_for_training(trainer)
        assert (trainer.train_dataset is not rows) == kept
        if kept:
            twice = trainer.train_dataset
            in_the_pass = iter(twice)
            assert [next(in_the_pass), next(in_the_pass)] == [0, 1]
            assert [*twice] == [0, 1, 2, 3, 4] and [*twice] == [] and len(twice) == 5
            twice.set_epoch(3)
            assert rows.epoch == twice.epoch == 3
