"""StartCallback: the adapter of a trainer that another tool makes starts when training begins, in place."""

import copy

import pytest
import torch
from peft import LoKrConfig, LoraConfig, get_peft_model
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments

import lora_init
from lora_init.errors import LoraInitError
from tests.conftest import tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:.*(learning_rate|lora_alpha) is ", "ignore:.*say little about the data")


def rows(n=24, length=10):
    tokens = torch.randint(3, 64, (n, length), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in tokens]


def model(**settings):
    torch.manual_seed(1)
    config = dict(r=4, lora_alpha=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM") | settings
    return get_peft_model(tiny_llama(), LoraConfig(**config))


def trainer(tmp_path, adapted, *callbacks, data=None, **more):
    settings = dict(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, report_to="none", save_strategy="no",
        use_cpu=True, disable_tqdm=True, learning_rate=1e-2,
    )  # fmt: skip
    arguments = TrainingArguments(**settings | more)
    return Trainer(adapted, arguments, train_dataset=rows() if data is None else data, callbacks=[*callbacks])


class Watch(lora_init.StartCallback):
    """Note the adapter as it is when the first step begins, and whose parameters the optimizer has."""

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **rest):
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


def test_a_frozen_a_stays_as_it_began(tmp_path):
    watch, adapted = Watch(samples=8, freeze_a=True), model()
    trainer(tmp_path, adapted, watch).train()
    for name, value in adapter_of(adapted).items():
        assert torch.equal(value, watch.begun[name]) == (".lora_A." in name), name


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
    assert rates[1:] == pytest.approx([made.args.learning_rate * left / 3 for left in (2, 1)])


class Stream(IterableDataset):
    def __iter__(self):
        return iter(rows())


def trained():
    adapted = model()
    for name, value in adapter_of(adapted).items():
        value.add_(".lora_B." in name)
    return adapted


def started():
    return lora_init.initialize(tiny_llama(), [{"input_ids": rows()[0]["input_ids"][None]}] * 4, rank=4, rho=1)


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
    "a stream": (model, {}, dict(data=Stream()), "the data are a stream (Stream), of which training would miss"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_started_is_one_line_and_stays_as_it_was(tmp_path, case):
    make, options, more, expected = WRONG[case]
    adapted = make()
    before = copy.deepcopy(adapted.state_dict())
    with pytest.raises(LoraInitError) as caught:
        trainer(tmp_path, adapted, lora_init.StartCallback(**options), **more).train()
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())


@pytest.mark.parametrize(("options", "expected"), [
    ({"sample": 8}, "has no argument sample=. Did you mean samples?"),
    ({"method": "evva"}, "Did you mean eva?"),
    ({"learning_rate": 1e-3}, "learning_rate=0.001: 'measured' is expected"),
    ({"samples": 0}, "samples=0: a number of examples"),
])  # fmt: skip
def test_wrong_options_are_refused_when_the_callback_is_made(options, expected):
    with pytest.raises(LoraInitError) as caught:
        lora_init.StartCallback(**options)
    assert expected in str(caught.value)


class Config(dict):
    """As axolotl's `DictDefault`: what is not there is None."""

    __getattr__ = dict.get


def test_the_plugin_of_axolotl_hands_over_the_callback():
    """`benchmarks/other_trainers.py` runs it in axolotl itself."""
    plugin = lora_init.axolotl()
    plugin.pre_model_load(Config(lora_init={"samples": 8}))
    (callback,) = plugin.add_callbacks_post_trainer(Config(), None)
    assert isinstance(callback, lora_init.StartCallback) and callback.samples == 8
    with pytest.raises(LoraInitError, match="makes the adapter, too"):
        plugin.pre_model_load(Config(lora_model_dir="start"))
    with pytest.raises(LoraInitError, match=r"Set lora_mlp_kernel: false, lora_o_kernel: false\."):
        plugin.pre_model_load(Config(lora_mlp_kernel=True, lora_o_kernel=True))
    with pytest.raises(LoraInitError, match=r"Did you mean samples\?"):
        plugin.pre_model_load(Config(lora_init={"sample": 8}))
    assert plugin.get_input_args() == "lora_init.adapters.doors.axolotl.AxolotlArgs"
