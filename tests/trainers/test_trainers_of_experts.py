"""initialize(trainer) of a mixture of experts: each expert is started and trained, whatever the trainer does beside."""

import copy
from contextlib import nullcontext
from functools import cache

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

import lora_init
from lora_init.adapters.peft_model import adapter_layers
from lora_init.errors import LoraInitWarning
from lora_init.trainers.registry import find_trainer
from tests.commands import tokenizer_of
from tests.conftest import refused
from tests.layers.made import BOTH, MODELS
from tests.trainers.made import CHAT, WORDS, chats, sentences, settings
from tests.versions import needs_experts_by_peft

pytestmark = [
    needs_experts_by_peft,
    pytest.mark.filterwarnings("ignore:.*(learning_rate|lora_alpha) is "),
]
trl = pytest.importorskip("trl")
EXPERTS = dict(target_modules=["q_proj"], target_parameters=BOTH)
CHECKPOINTING = [None, dict(use_reentrant=True), dict(use_reentrant=False)]
checkpointing = pytest.mark.parametrize("how", CHECKPOINTING, ids=["not", "reentrant", "not reentrant"])


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of(WORDS, bos_token="<s>", chat_template=CHAT)


def model(name):
    torch.manual_seed(0)
    return MODELS[name]()


def plain(tmp_path, tokenizer, name, **more):
    ids = [tokenizer(text)["input_ids"] for text in sentences()]
    data = Dataset.from_dict({"input_ids": ids, "labels": ids})
    return Trainer(model(name), settings(TrainingArguments, tmp_path, **more), DataCollatorForSeq2Seq(tokenizer), data)


def sft(tmp_path, tokenizer, name, peft_config=None, **more):
    args = settings(trl.SFTConfig, tmp_path, bf16=False, max_length=32, **more)
    return trl.SFTTrainer(model(name), args, train_dataset=chats(), processing_class=tokenizer, peft_config=peft_config)


def sft_with_config(*given, **more):
    return sft(*given, peft_config=LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **EXPERTS), **more)


MADE = {"Trainer": plain, "SFTTrainer": sft, "SFTTrainer with peft_config": sft_with_config}


def checkpointed(how):
    return dict(gradient_checkpointing=how is not None, gradient_checkpointing_kwargs=how)


def started(made, tmp_path, tokenizer, name="mixtral", how=None):
    """Make a trainer and initialize it in one line; return it with what the adapter begins with."""
    trainer = MADE[made](tmp_path, tokenizer, name, **checkpointed(how))
    adapted = lora_init.initialize(
        trainer, learning_rate="measured", progress=False, **{} if "peft" in made else dict(rank=4, **EXPERTS)
    )
    return trainer, {name: p.detach().clone() for name, p in adapted.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_every_expert_is_trained_from_its_own_directions(name, made, tmp_path, tokenizer):
    trainer, start = started(made, tmp_path, tokenizer, name)
    base = {key: p.detach().clone() for key, p in trainer.model.named_parameters() if "lora_" not in key}
    layers = adapter_layers(trainer.model)
    assert sum("experts" in one for one in layers) == 4
    for layer, one in layers.items():
        if "experts" in layer:
            for a in one.lora_A["default"].weight.detach().reshape(one.num_experts, 4, -1):
                gram = a @ a.T  # directions of one length, not random rows
                assert (gram / gram[0, 0] - torch.eye(4)).abs().max() < 1e-3
    trainer.train()
    for key, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, base[key] if key in base else start[key]) == (key in base), key
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(model(name), tmp_path / "saved").eval()
    ids = torch.arange(3, 17)[None]
    assert torch.equal(loaded(ids).logits, trainer.model.eval()(ids).logits)


def trained(made, tmp_path, tokenizer, how):
    """Start and train; return the start, the rate, the losses, and the parameters at the end."""
    trainer, start = started(made, tmp_path, tokenizer, how=how)
    torch.manual_seed(0)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return start, trainer.args.learning_rate, losses, dict(trainer.model.named_parameters())


@pytest.fixture(scope="module")
def without_checkpointing(tmp_path_factory, tokenizer):
    """The same of each kind of trainer without checkpointing, once."""
    return cache(lambda made: trained(made, tmp_path_factory.mktemp("without"), tokenizer, None))


@checkpointing
@pytest.mark.parametrize("made", MADE)
def test_checkpointing_changes_neither_start_nor_rate_nor_training(
    made, how, tmp_path, tokenizer, without_checkpointing
):
    start, rate, losses, parameters = trained(made, tmp_path, tokenizer, how)
    expected, other_rate, other_losses, other_parameters = without_checkpointing(made)
    assert rate == other_rate != 1e-2
    for key, tensor in expected.items():
        assert torch.equal(start[key], tensor), key
    assert losses == pytest.approx(other_losses, rel=1e-4)  # which are logged with few digits
    for key, parameter in other_parameters.items():
        torch.testing.assert_close(parameters[key], parameter, atol=1e-4, rtol=1e-3)  # Adam divides by small gradients


OF_ROUTERS = {
    "Trainer without": (plain, False),
    "Trainer": (plain, True),
    "SFTTrainer": (sft, True),
    "SFTTrainer, weighed": (lambda *given: sft(*given, router_aux_loss_coef=0.5), True),
    "SFTTrainer, weighed by 0": (lambda *given: sft(*given, router_aux_loss_coef=0.0), True),
}


@pytest.mark.parametrize("case", OF_ROUTERS)
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_a_pass_has_the_loss_of_routers_that_training_has(name, case, tmp_path, tokenizer, monkeypatch):
    make, asks = OF_ROUTERS[case]
    if "weighed" in case and not hasattr(trl.SFTConfig, "router_aux_loss_coef"):
        pytest.skip("an older TRL has no weight of its own")
    made = MODELS[name]

    def with_router(*given):
        found = made()
        found.config.output_router_logits = asks
        return found

    monkeypatch.setitem(MODELS, name, with_router)
    trainer = make(tmp_path, tokenizer, name)
    batch, moe = next(iter(trainer.get_train_dataloader())), trainer.model.eval()
    weight = moe.router_aux_loss_coef
    found = find_trainer(trainer).forward(with_labels=True)(moe, dict(batch)).loss.detach()
    assert moe.router_aux_loss_coef == weight
    with torch.no_grad():
        assert float(found) == pytest.approx(float(trainer.compute_loss(moe, dict(batch))), rel=1e-5)
        without = moe(**{key: batch[key] for key in ("input_ids", "labels")}, output_router_logits=False)
    if "attention_mask" not in batch or batch["attention_mask"].all():
        assert (float(found - without.loss) > 1e-4) == (case not in ("Trainer without", "SFTTrainer, weighed by 0"))


def never():
    raise AssertionError("a batch was read")
    yield


@pytest.mark.parametrize("option", [dict(use_dora=True), dict(lora_dropout=0.1)])
@pytest.mark.parametrize("given", ["batches", "a config", "a trainer"])
def test_what_peft_cannot_do_with_parameters_is_said_before_the_pass(given, option, tmp_path, tokenizer):
    (name,) = option
    if given == "a config":
        message = f"^config does not fit MixtralForCausalLM: .*{name}"
        config = LoraConfig(**EXPERTS, **option)
        refused(message, lora_init.initialize, model("mixtral"), never(), config=config)
        return
    message = rf"experts.gate_up_proj': PEFT does not adapt parameters with {name}=.*Leave out one"
    if given == "batches":
        refused(message, lora_init.initialize, model("mixtral"), never(), rank=4, **EXPERTS, **option)
        return
    trainer = sft(tmp_path, tokenizer, "mixtral")
    collator, read = trainer.data_collator, []
    trainer.data_collator = lambda rows: read.append(rows) or collator(rows)
    refused(message, lora_init.initialize, trainer, rank=4, **EXPERTS, **option)
    assert not read and not adapter_layers(trainer.model)


@pytest.mark.parametrize("parameters", [None, BOTH])
@pytest.mark.parametrize("given", ["a plain model", "peft_config"])
def test_all_linear_leaves_experts_out_and_says_so(given, parameters, tmp_path, tokenizer):
    what = dict(target_modules="all-linear", target_parameters=parameters)
    config = LoraConfig(r=4, task_type="CAUSAL_LM", **what) if given == "peft_config" else None
    trainer = sft(tmp_path, tokenizer, "gpt_oss", config)
    said = r"fused experts hold 62% of the weights and get no adapter: target_parameters=\['experts.down_proj', "
    with nullcontext() if parameters else pytest.warns(LoraInitWarning, match=said):
        lora_init.initialize(trainer, progress=False, **{} if config else dict(rank=4, **what))
    assert len(adapter_layers(trainer.model)) == (12 if parameters else 8)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("modules", ["all-linear", ["q_proj", "gate_proj", "up_proj"]])
def test_experts_that_peft_makes_of_modules_are_refused_with_how_to_name_them(
    modules,
    name,
    tmp_path,
    tokenizer,
):
    if isinstance(modules, list) and name == "mixtral":
        modules = ["q_proj", "w1", "w3"]
    config = LoraConfig(r=4, target_modules=modules, task_type="CAUSAL_LM")
    trainer = sft(tmp_path, tokenizer, name, copy.deepcopy(config))
    if not trainer.model.peft_config["default"].rank_pattern:
        pytest.skip("an older PEFT leaves experts alone")
    message = "PEFT makes target_modules the fused experts of this model.*and experts in target_parameters: "
    refused(f"^the trainer's peft_config: {message}", lora_init.initialize, trainer)
    refused(f"^config: {message}", lora_init.initialize, model(name), never(), config=config)
